"""What a run leaves on the disk: the last task's weights alone, files that are named again, tensors that stay in their file."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, same_bits
from faults import outcome
from safetensors.torch import load_file

import perdure
from perdure import launch
from perdure.core import packing
from perdure.core.errors import DamagedFile
from perdure.core.packing import Frozen, frozen_files, pack, unpack
from perdure.core.tensors import Onto, Stored, write_tensors
from perdure.data.task import Task
from perdure.engine.checkpoint import read_task
from perdure.engine.watcher import Watcher
from perdure.methods.finetune import Experts
from perdure.methods.merge import Merge
from perdure.models.clip import CLIP

QUICK: dict[str, Any] = {**SHORT, "tasks": 2, "iterations": 2, "threads": 1}


class Ear(Watcher):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def warn(self, text: str) -> None:
        self.heard.append(text)


class Stop(Watcher):
    def __init__(self, before: int) -> None:
        self.before = before

    def learns(self, task: str, number: int) -> None:
        if number == self.before:
            raise KeyboardInterrupt


def sizes(folder: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_size for p in sorted(folder.glob("task_*/weights.safetensors"))}


@pytest.mark.slow
def test_keep_last_leaves_the_last_weights_alone_and_says_what_cannot_be_done_then(tmp_path: Path) -> None:
    every, last = tmp_path / "all", tmp_path / "last"
    perdure.run("finetune", "mini-mtil", every, **QUICK)
    metrics = perdure.run("finetune", "mini-mtil", last, keep="last", **QUICK)
    assert list(sizes(every)) == ["task_00_before", "task_01_animals", "task_02_digits"]
    assert list(sizes(last)) == ["task_00_before", "task_02_digits"] and sizes(last)["task_00_before"] < 100
    assert metrics["accuracy"] == outcome(every)["accuracy"]
    assert not launch.same_run(launch.read_config(every), launch.read_config(last))  # the same run, kept otherwise
    launch.export(last, tmp_path / "out")
    assert CLIP.load(str(tmp_path / "out")).fingerprint()
    with pytest.raises(
        DamagedFile, match=r"task_01_animals/weights.safetensors is missing: it was removed .*keep=last"
    ):
        launch.export(last, tmp_path / "earlier", task=1)
    # the last one damaged: there is nothing between it and the beginning
    path, ear = last / "task_02_digits" / "weights.safetensors", Ear()
    path.write_bytes(path.read_bytes()[:-9])
    perdure.resume(last, ear)
    assert "cut short" in ear.heard[0] and "keep=last" in ear.heard[1] and "after task_00_before" in ear.heard[1]
    assert same_bits(load_file(path), load_file(every / "task_02_digits" / "weights.safetensors"))


@pytest.mark.slow
def test_files_that_the_task_before_has_are_named_again_and_kept_as_long_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are never written twice; under keep=last they stay where they are."""
    monkeypatch.setattr(packing, "LARGE", 1000)
    folder, whole = tmp_path / "run", tmp_path / "whole"
    asked = {**QUICK, "tasks": 3, "images": 8}
    perdure.run("individual", "mini-mtil", whole, **{**asked, "keep": "all"})

    with pytest.raises(KeyboardInterrupt):
        perdure.run("individual", "mini-mtil", folder, keep="last", watcher=Stop(3), **asked)
    perdure.resume(folder)
    found = {p.name: p.parent.name for p in folder.glob("task_*/expert_*")}
    assert found == {
        "expert_animals.safetensors": "task_01_animals", "expert_digits.safetensors": "task_02_digits",
        "expert_food.safetensors": "task_03_food",
    }  # fmt: skip
    named = read_task(folder / "task_03_food", tensors=False).record["files"]
    assert named["expert/animals"]["path"] == "task_01_animals/expert_animals.safetensors"
    lean = read_task(folder / "task_03_food", tensors=True).files["expert/digits"]
    assert isinstance(lean, Frozen) and lean.file is not None
    assert same_bits(dict(lean), load_file(whole / "task_02_digits" / "expert_digits.safetensors"))
    assert outcome(folder)["accuracy"] == outcome(whole)["accuracy"]


def test_a_file_of_the_same_content_is_not_kept_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_faults import Holder

    from perdure.engine import checkpoint

    monkeypatch.setattr(checkpoint, "SMALL", 50)
    first = Holder(3).keep(tmp_path, 0, {})["files"]["state"]
    second = Holder(3).keep(tmp_path, 1, {"state": first})["files"]["state"]
    third = Holder(4).keep(tmp_path, 2, {"state": second})["files"]["state"]
    assert second == first != third and third["path"].startswith("task_02")
    assert not list(tmp_path.glob("task_01*/state.safetensors"))
    assert read_task(tmp_path / "task_01_one", tensors=True).files["state"]["moves/t"].tolist() == [3.0] * 3


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[tuple[Frozen, dict[str, torch.Tensor]]]:
    tensors = {"b": torch.rand(3), "a": torch.arange(4)}
    one = Frozen(tensors)
    write_tensors(tmp_path / "file", tensors)
    one.stay_in(Onto(Stored(tmp_path / "file"), torch.device("cpu")))
    yield one, tensors


def test_frozen_tensors_that_stay_in_their_file_are_what_they_were(
    frozen: tuple[Frozen, dict[str, torch.Tensor]],
) -> None:
    one, tensors = frozen
    assert len(one) == 2 and bool(one) and "a" in one and "c" not in one and not dict.__len__(one)
    assert same_bits({**one}, tensors) and same_bits(dict(one), tensors) and same_bits(dict(one.items()), tensors)
    assert same_bits(dict(copy.deepcopy(one)), tensors) and {t.dtype for t in one.values()} == {
        torch.float32,
        torch.int64,
    }
    with pytest.raises(KeyError):
        one["c"]


def test_a_state_of_frozen_tensors_in_files_comes_back_as_such(frozen: tuple[Frozen, dict[str, torch.Tensor]]) -> None:
    one, tensors = frozen
    files, values = pack(Experts({"x": one, "y": {"t": torch.ones(1)}}, ["x", "y"]))
    assert frozen_files(values) == {"expert/x"} and frozen_files({"fuse": values}) == {"fuse.expert/x"}
    again = unpack(Experts, files, values)
    assert again.expert["x"] is one and type(again.expert["y"]) is dict


@pytest.mark.slow
@pytest.mark.parametrize("method", ["weight_average", "task_arithmetic", "ties", "magmax"])
def test_sums_stay_in_the_files_of_the_task_that_made_them(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**QUICK, "tasks": 3, "images": 8}
    perdure.run(method, "mini-mtil", tmp_path / "held", **asked)
    monkeypatch.setattr(packing, "LARGE", 1000)
    resting, start = list[bool](), Merge.start

    def noted(self: Merge, task: Task) -> None:
        resting.extend(isinstance(one, Frozen) and one.file is not None for one in self.state.sums.values())
        start(self, task)

    monkeypatch.setattr(Merge, "start", noted)

    with pytest.raises(KeyboardInterrupt):
        perdure.run(method, "mini-mtil", tmp_path / "lean", keep="last", watcher=Stop(3), **asked)
    perdure.resume(tmp_path / "lean")
    assert resting and all(resting)
    names = sorted(p.name for p in tmp_path.glob("lean/task_*/*sums_*"))
    assert names and all("-3." in name for name in names)  # those of the tasks before are gone
    assert outcome(tmp_path / "lean")["accuracy"] == outcome(tmp_path / "held")["accuracy"]
    for path in tmp_path.glob("lean/task_03*/*.safetensors"):
        assert same_bits(load_file(path), load_file(tmp_path / "held" / path.relative_to(tmp_path / "lean")))
