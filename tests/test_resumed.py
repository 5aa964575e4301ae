"""Runs of every kind of setting that are broken off and gone on with: the same bits; and all classes competing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT, known, same_bits
from safetensors.torch import load_file

import perdure
from perdure import launch
from perdure.engine.watcher import Watcher


class Enough(Watcher):
    """Breaks a run off while its second task is being learned."""

    def __init__(self) -> None:
        self.task = 0

    def learns(self, task: str, number: int) -> None:
        self.task = number

    def step(self, *heard: Any) -> None:
        if self.task == 2:
            raise KeyboardInterrupt

    def evaluates(self) -> None:
        self.step()  # where no steps are taken: the task is learned, and not yet kept


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions."""
    metrics = json.loads((folder / "metrics.json").read_text())
    changing = ("seconds", "seconds_by_task", "peak_memory_mb", "environment")
    return {key: value for key, value in metrics.items() if key not in changing}


def broken_off(method: str, folder: Path, **values: Any) -> tuple[Path, Path]:
    """The folders of a run that was left alone, and of the same one broken off in its second task and gone on with."""
    whole, broken = folder / "whole", folder / "broken"
    asked = {**known(method, {**SHORT, "tasks": 2, "images": 24, "batch_size": 8}), **values}
    perdure.run(method, "mini-mtil", whole, **asked)
    with pytest.raises(KeyboardInterrupt):
        perdure.run(method, "mini-mtil", broken, watcher=Enough(), **asked)
    assert len(list(broken.glob("task_*"))) == 2 and not json.loads((broken / "metrics.json").read_text())["finished"]
    launch.resume(broken)
    return whole, broken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("finetune", {"precision": "bf16"}),
        ("condu+mg_clip", {"precision": "bf16"}),
        ("mg_clip", {"precision": "bf16", "iterations": 0, "warmup": 0, "most_epochs": 2, "freeze_A": True}),
        ("finetune", {"shots": 2}),
        ("ridge_patches", {"features": 48, "judge": 16}),
        ("finetune+ridge", {"features": 48, "on": "drifting"}),
        ("zscl", {"reference": "drawings", "reference_batch": 8}),
        ("lwf_vr", {"reference_batch": 8, "average": "we_wise"}),
        ("icarl", {"reference_batch": 8, "memory": 30}),
        ("wise_ft", {"towards": "previous"}),
        ("codyra", {"precision": "bf16", "kappa": 0.5, "dense": 0.0, "kappa_steps": 2}),
        ("keep_lora", {"epochs": 2, "head": True}),
        (
            "moe_adapters",
            {"experts": 3, "reference": "none", "selector_steps": 3, "selector_code": 8, "task_id": "hidden"},
        ),
        ("rapf", {"precision": "bf16", "init": "random"}),
        ("slca", {"epochs": 2, "align_draws": 8}),
        ("finetune+slca", {"answer.epochs": 2, "align_epochs": 1}),
        ("clg_cbm", {"per_class": 2, "epochs": 2, "search_epochs": 2, "keep_weights": "held_out"}),
        ("td_vcl", {"n": 2, "buffer": 8, "samples": 2, "initial_logvar": -7.0}),
        ("taalm", {"precision": "bf16", "meta_source": "own", "meta_steps": 2, "meta_batch": 1, "hidden": 4}),
        ("finetune", {"precision": "bf16", "vcreg": "blocks", "vcreg_towers": "both", "vcreg_delta": 0.1}),
        ("pfr", {"precision": "bf16", "views": 2, "sides": "both"}),
        ("pfr", {"own": "barlow", "barlow_width": 16, "first_task": "own", "features": "pooled"}),
        ("experience_replay", {"memory": 40, "replayed": 4, "draw": "balanced"}),
        (
            "ocl_sda",
            {
                "memory": 40,
                "replayed": 4,
                "classifier": "cosine",
                "projector": "mlp",
                "rotations_by_task": {"digits": (0,)},
            },
        ),
        ("cpe_clip", {"precision": "bf16", "epochs": 1, "later_epochs": 1, "depth": 2, "lr_first": 0.01}),
        ("orth_sr", {"rotation_block": 32, "cutout": "attentive", "anchor": "previous", "lr": 1e-2}),
        ("finetune", {"adapt": "rotation", "rotation_block": 32, "rotation_layers": ("fc1",), "lr": 1e-2}),
        ("cgil", {"images": 64, "epochs": 1, "draws": 2, "vae_passes": 10, "vae_hidden": 8, "vae_latent": 4}),
    ],
)
def test_broken_off_and_gone_on_with_ends_with_the_same_bits(
    method: str, values: dict[str, Any], tmp_path: Path
) -> None:
    whole, broken = broken_off(method, tmp_path, **values)
    assert outcome(whole) == outcome(broken)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors"))
    assert files and files == sorted(p.relative_to(broken) for p in broken.rglob("*.safetensors"))
    for file in files:
        assert same_bits(load_file(whole / file), load_file(broken / file)), file
    precision = json.loads((broken / "config.json").read_text())["settings"]["precision"]
    assert precision == values.get("precision", "fp32")


@pytest.mark.slow
def test_when_all_classes_compete_less_is_right_and_never_more(tmp_path: Path) -> None:
    """``labels=all`` from the command's options to the figures: each image is asked among the classes of all tasks."""
    asked = {**SHORT, "tasks": 2, "images": 24, "batch_size": 8, "iterations": 2}
    own = perdure.run("finetune", "mini-mtil", tmp_path / "task", labels="task", **asked)
    every = perdure.run("finetune", "mini-mtil", tmp_path / "all", labels="all", **asked)
    assert every["protocol"]["labels"] == "all" and own["protocol"]["labels"] == "task"
    assert own["losses"] == every["losses"]  # training asks among the task's classes all the same
    pairs = [(a, b) for x, y in zip(every["accuracy"], own["accuracy"], strict=True) for a, b in zip(x, y, strict=True)]
    assert all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


class Counting(Watcher):
    """Breaks a run off where its first task is evaluated, the first time; counts steps."""

    def __init__(self, breaks: bool):
        self.breaks, self.steps, self.number = breaks, 0, 0

    def learns(self, task: str, number: int) -> None:
        self.number = number

    def step(self, *heard: Any) -> None:
        self.steps += self.number == 1

    def evaluates(self) -> None:
        if self.breaks and self.number == 1:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_stop_after_the_last_step_costs_no_training_that_took_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.engine.steps.WORTH", 0.0)
    broken, again = Counting(True), Counting(False)
    asked = {**SHORT, "tasks": 1, "threads": 1}
    with pytest.raises(KeyboardInterrupt):
        perdure.run("finetune", "mini-mtil", tmp_path / "broken", watcher=broken, **asked)
    assert broken.steps == SHORT["iterations"] and list((tmp_path / "broken").glob("begun_*"))
    launch.resume(tmp_path / "broken", again)
    perdure.run("finetune", "mini-mtil", tmp_path / "whole", **asked)
    assert again.steps == 0 and outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
