"""What used to go wrong without a word."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT
from torch import Tensor

import perdure
from perdure import launch
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.core.packing import kinds, pack
from perdure.data.task import Batch, Stream
from perdure.engine.checkpoint import folder_name
from perdure.engine.settings import Settings
from perdure.engine.teach import Teacher
from perdure.engine.watcher import Watcher
from perdure.methods.base import METHODS, Method, State
from perdure.models.clip import CLIP
from perdure.training.fit import Backward
from perdure.training.schedule import Schedule

BRIEF: dict[str, Any] = {**SHORT, "tasks": 1, "images": 8, "iterations": 1, "warmup": 0, "threads": 1}


@pytest.mark.parametrize("method", ["individual", "finetune"])
def test_answers_that_are_no_numbers_end_the_run(method: str, tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match=r"images of animals are answered with values that are no numbers"):
        perdure.run(method, "mini-mtil", tmp_path / "run", **{**BRIEF, "lr": 1e20})
    assert not list((tmp_path / "run").glob("task_01*"))


class Odd(Method):
    def remarks(self) -> dict[str, float]:
        return {"share": float("nan")}


def test_remarks_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    try:
        with pytest.raises(PerdureError, match="'share' is nan"):
            perdure.run(Odd, "mini-mtil", tmp_path / "run", **BRIEF)
    finally:
        METHODS.remove("odd")


def test_classes_of_one_text_that_compete_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = mini.multi_domain("I").tasks[0]
    twins = replace(mini.multi_domain("I"), tasks=(first, replace(first, name="again", index=1)), name="twins")
    twice = f"('{first.classes[0].name}' of {first.name} and '{first.classes[0].name}' of again)"
    for labels in ("task", "all"):
        perdure.run("zero_shot", twins, tmp_path / labels, images=4, labels=labels)
        assert (f"have one text in several tasks {twice}" in capsys.readouterr().err) == (labels == "all")


class Phase(Method):
    """Trains its towers in a phase that the loop lends it."""

    def step(self, batch: Batch, backward: Backward) -> None:
        backward(task=self.classify(self.clip.encode_image(batch.images), batch.labels))


def test_towers_that_a_lent_phase_trained_have_changed(clip: CLIP, stream: Stream) -> None:
    task = stream.shortened(tasks=1, images=8).tasks[0]
    method, settings = Phase(iterations=0), Settings(precision="fp32", threads=1)
    method.bind(clip)
    method.begin_task(task)
    teacher = Teacher(method, 0, settings, Watcher())
    draws = iter([Batch(task.train.pixels[:], task.train.labels)] * 2)
    before = clip.holds
    teacher.train(method, Schedule(2, 1e-3, 0, 8), draws, "phase")
    assert clip.holds != before and clip.own_state()  # what a save keeps


@dataclass
class ByPairs(State):
    seen: dict[tuple[int, int], float] = field(default_factory=dict)


@dataclass
class Abstract(State):
    seen: Sequence[int] = ()


@dataclass
class Bytes(State):
    seen: bytes = b""


@dataclass
class Tensors(State):
    seen: dict[str, Tensor] = field(default_factory=dict)


@pytest.mark.parametrize("state", [ByPairs, Abstract, Bytes])
def test_a_state_that_could_not_come_back_is_refused_when_it_is_made(state: type) -> None:
    with pytest.raises(PerdureError, match=f"field 'seen: .* of the State {state.__name__}"):
        kinds(state)


@pytest.mark.parametrize("value", [{1: torch.ones(1)}, {"a": 2.0}])
def test_a_field_of_tensors_holds_tensors_by_words(value: Any) -> None:
    with pytest.raises(PerdureError, match="'seen' of the State Tensors holds tensors by words"):
        pack(Tensors(value))


def test_long_names_find_a_place(tmp_path: Path) -> None:
    long = [name * 30 for name in ("first task ", "first task, other ")]
    assert len(folder_name(3, long[0])) < 120 and folder_name(3, long[0]) != folder_name(3, long[1])
    assert folder_name(3, "food") == "task_03_food"
    whole = mini.multi_domain("I")
    stream = replace(whole, tasks=(replace(whole.tasks[0], name=long[1]),), name="long")
    assert perdure.run("individual", stream, tmp_path / "run", **BRIEF)["finished"]


def test_a_model_that_has_moved_is_said(tmp_path: Path) -> None:
    shutil.copytree(mini.MODEL, tmp_path / "model")
    perdure.run("zero_shot", "mini-mtil", tmp_path / "run", tasks=1, images=4, model=str(tmp_path / "model"))
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(PerdureError, match=rf"no folder {tmp_path / 'model'}\..*put it back"):
        launch.export(tmp_path / "run", tmp_path / "out")
    (tmp_path / "model").symlink_to(tmp_path / "moved")
    launch.export(tmp_path / "run", tmp_path / "out")


def test_tokens_that_the_model_does_not_know_are_refused(clip: CLIP) -> None:
    short = copy.copy(clip)
    short.tokenizer = copy.deepcopy(clip.tokenizer)
    short.tokenizer.add_tokens(["zebrafinch"])
    with pytest.raises(PerdureError, match=r"makes tokens up to number \d+, and the text tower knows \d+"):
        short.tokens(["a zebrafinch"])


def test_files_mean_the_same_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "refs").mkdir()
    (tmp_path / "c.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for method, option, place in (("moe_adapters", "reference", "refs"), ("clg_cbm", "concepts", "c.json")):
        known = launch.method_options(launch.method_entry(method))[option][1]
        assert known.parse(place) == str(tmp_path / place) and known.parse("auto") == "auto"


def test_autocast_around_a_run_is_refused(tmp_path: Path) -> None:
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(PerdureError, match=r"torch\.autocast is on around"),
    ):
        perdure.run("zero_shot", "mini-mtil", tmp_path / "run", tasks=1, images=4)


def test_a_head_on_other_weights_is_said_by_an_export(tmp_path: Path) -> None:
    perdure.run("finetune+ridge", "mini-mtil", tmp_path / "run", **BRIEF, features=32)
    said = launch.export(tmp_path / "run", tmp_path / "out")
    assert "on features of the weights 'pretrained', not of these" in str(said)
    assert json.loads((tmp_path / "out" / "perdure.json").read_text())["beside"]
