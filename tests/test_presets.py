"""Every shipped preset runs: two steps, with every value it holds. Those for MTIL, X-TAIL and CIFAR-100 take them on small
trees of the data sets in their real formats. The others are class-incremental and for ImageNet-100, ImageNet-R, CUB-200,
Stanford Cars, EuroSAT or ISIC, of which there are no small trees in that form: they have a stand-in from the small world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import perdure
from perdure import launch
from perdure.benchmarks import STREAMS, mini
from perdure.core.state import write_json
from perdure.data.splits import sizes_of
from perdure.data.task import Stream
from perdure.launch.configure import PRESETS, configure, read_preset
from perdure.synthesis.store import collect

NAMES = sorted(p.name.removesuffix(".yaml") for p in PRESETS.iterdir() if p.name.endswith(".yaml"))
# What is not the method's, and what only a big machine can do; a preset says all else.
SMALL: dict[str, Any] = {"images": 6, "batch_size": 4, "precision": "fp32"}
SMALL_GENERATOR: dict[str, Any] = {"generator": "stream", "vocabulary": "stream", "sampling_steps": 1, "synthetic": 3}
ON_TREES = ("mtil", "mtil-2", "x-tail", "cifar100-10", "cifar100-20")
UNCUT = {"base": 0, "increment": 0}  # a stand-in has too few classes to be cut
UNTRAINED = ("ridge", "rapf", "cgil", "clg_cbm")  # whose losses, if any, are those of phases
LAST_AT_0 = ("gift", "zscl", "lwf", "lwf_vr", "wc", "we", "icarl")


def stand_in(preset: dict[str, Any]) -> Stream:
    """Drawings under the names of the tasks that the preset's rates are for."""
    domains = preset.get("stream") in ("mtil", "x-tail")
    small = mini.multi_domain("I") if domains else mini.class_incremental()
    names = list(preset.get("lr_by_task", {})) or [t.name for t in small.tasks[:1]]
    tasks = tuple(replace(small.tasks[0], name=name, index=k) for k, name in enumerate(names))
    return replace(small, name="stand-in", tasks=tasks, defaults={})


def overrides(preset: dict[str, Any]) -> dict[str, Any]:
    """Two steps on one task; the embedded generator for Stable Diffusion."""
    if preset["method"] == "keep_lora":
        return {**SMALL, "epochs": 2, "images": 4, "epochs_by_task": {}}
    if preset["method"] == "ridge":  # takes no steps; 15,000 features are for a big machine
        return {"images": 6, "precision": "fp32", "features": 32}
    if preset["method"] == "cgil":  # two images a class at least; another model is loaded than the small one
        return {**SMALL, "images": 18, "epochs": 1, "draws": 8, "vae_passes": 10, "model": str(mini.MODEL)}
    if preset["method"] == "clg_cbm":  # six images and the vocabulary's words hold no ten concepts a class
        return {**SMALL, "epochs": 1, "first_epochs": 1, "search_epochs": 1, "per_class": 1}
    if preset["method"] == "taalm":  # of two images a class at least it learns what pairs count
        return {**SMALL, "images": 18, "iterations": 2, "meta_steps": 1, "meta_batch": 1}
    last = preset["method"] in LAST_AT_0  # these take a last step at rate 0
    by_epochs = {"epochs": 2 - last, "images": 4} if "epochs" in preset else {"iterations": 2 - last}
    if preset["method"] == "moe_adapters":  # takes a last step at rate 0; AlexNet's weights are not everybody's
        by_epochs |= {"epochs": 1} if "epochs" in preset else {"iterations": 1}
        return {**SMALL, **by_epochs, "experts": 3, "selector_features": "clip", "reference": "none"}
    if preset["method"] in ("gift", "zscl"):
        by_epochs |= SMALL_GENERATOR
    if "average_every" in preset:
        by_epochs["average_every"] = 1  # of two steps
    return {**SMALL, **by_epochs}


def stands_on_a_tree(preset: dict[str, Any]) -> bool:
    """Whether its stream is loaded from small trees in its real form, in the steps that it has there."""
    return preset.get("stream") in ON_TREES and "base" not in preset


def test_there_are_presets() -> None:
    assert len(NAMES) >= 18


def test_a_preset_that_cuts_a_stream_anew_comes_out_even() -> None:
    counts = {"cifar100-10": 100, "cub200-10": 200, "imagenet-r-10": 200, "imagenet100-10": 100}
    cut = [preset for preset in map(read_preset, NAMES) if "base" in preset]
    assert len(cut) >= 7
    for preset in cut:
        sizes = sizes_of(counts[preset["stream"]], preset["base"], preset["increment"])
        assert sizes[0] == preset["base"] and sizes[-1] == preset["increment"] and len(sizes) > 4


def on_trees(preset: dict[str, Any], data: Path, pairs: Path) -> dict[str, Any]:
    """Two steps a task; a folder of pictures for ImageNet, pairs that lie there for Stable Diffusion."""
    changed = {key: value for key, value in overrides(preset).items() if key not in SMALL_GENERATOR}
    if preset["method"] == "zscl":
        changed |= {"reference": str(data / "dtd" / "dtd" / "images"), "vocabulary": "imagenet"}
    if preset["method"] == "gift":
        collect(pairs, torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8), list("abc"), "noise")
        changed |= {"pairs": str(pairs), "synthetic": 3}
    if preset["method"] == "clg_cbm":
        names = [one.name for task in STREAMS[preset["stream"]].value().tasks for one in task.classes]
        write_json(pairs.with_name("concepts.json"), {name: [f"{name} {k}" for k in range(2)] for name in names})
        changed |= {"concepts": str(pairs.with_name("concepts.json"))}
    return changed


def check_values(metrics: dict[str, Any], preset: dict[str, Any], changed: dict[str, Any]) -> None:
    """Everything that the preset states was run with, but for what was changed."""
    stated = {k: v for k, v in preset.items() if k not in ("method", "stream", "about")}
    written = metrics["config"]
    assert {k: written[k] for k in stated if k not in changed} == {
        k: tuple(v) if isinstance(v, list) and isinstance(written[k], tuple) else v
        for k, v in stated.items()
        if k not in changed
    }
    assert {k: written[k] for k in changed if k in stated} == {k: changed[k] for k in stated if k in changed}


def steps(metrics: dict[str, Any]) -> list[int]:
    return [losses["step"][-1] for losses in metrics["losses"].values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if not stands_on_a_tree(read_preset(name))])
def test_a_preset_takes_two_steps_on_a_stand_in(name: str, tmp_path: Path) -> None:
    preset = read_preset(name)
    changed = {**overrides(preset), **UNCUT}
    metrics = perdure.run(preset["method"], stand_in(preset), tmp_path / "run", preset=name, tasks=1, **changed)
    assert metrics["finished"] and steps(metrics) == ([] if preset["method"] in UNTRAINED else [2])
    check_values(metrics, preset, changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if stands_on_a_tree(read_preset(name))])
def test_a_preset_takes_two_steps_a_task_on_its_own_stream(
    name: str, mtil_data: Path, real_clip: str, tmp_path: Path
) -> None:
    preset = read_preset(name)
    changed = on_trees(preset, mtil_data, tmp_path / "pairs")
    metrics = perdure.run(
        preset["method"], preset["stream"], tmp_path / "run", preset=name, model=real_clip, tasks=2, **changed
    )
    assert metrics["finished"] and steps(metrics) == ([] if preset["method"] in UNTRAINED else [2, 2])
    published = STREAMS[preset["stream"]].value()
    assert metrics["stream"] == preset["stream"] and metrics["tasks"] == [t.name for t in published.tasks[:2]]
    usual = {"labels": published.labels, "task_id": published.task_id}
    assert metrics["protocol"] == {key: preset.get(key, value) for key, value in usual.items()}
    assert metrics["config"]["shots"] == preset.get("shots", 0)
    check_values(metrics, preset, changed)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_s_values_reach_the_method(name: str) -> None:
    """Those too that two steps on the small world must change."""
    preset = read_preset(name)
    stated = {k: v for k, v in preset.items() if k not in ("method", "stream", "about", *UNCUT)}
    config, _ = configure(preset["method"], stand_in(preset), 0, {}, stated)
    method = launch.build(preset["method"], config["options"])
    parts = getattr(method, "parts", {"learn": method}).values()
    for key, value in stated.items():
        owner = next((part.config for part in parts if hasattr(part.config, key)), None)
        found = getattr(owner, key) if owner is not None else config["settings"][key]
        assert (list(found) if isinstance(found, tuple) else found) == value, key
