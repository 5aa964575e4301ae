"""Trackers: what they are told of a run, what a kill leaves of it, and what is refused before the work."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT
from test_resumed import Enough

import perdure
from perdure import launch
from perdure.core.errors import PerdureError
from perdure.engine.watcher import Watcher
from perdure.launch.trackers import checked
from perdure.launch.trackers.files import JSONLines

ASKED: dict[str, Any] = {**SHORT, "tasks": 2, "iterations": 4, "warmup": 2, "lr": 3e-4, "threads": 1}
OF_TIME = ("images_per_second", "seconds/train", "seconds/evaluate", "peak_memory_mb")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "track.jsonl").read_text().splitlines()]


def table(folder: Path) -> list[list[str]]:
    with open(folder / "track.csv", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in to Weights & Biases."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.slow
def test_lines_and_tables_hold_what_the_run_did_and_a_kill_leaves_the_same(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    metrics = perdure.run("finetune", "mini-mtil", whole, report_to=["jsonl", "csv"], **ASKED)
    config, *found = records(whole)
    assert (config["kind"], config["seed"], config["options"]["lr"]) == ("config", 0, 3e-4)
    steps, rows = ([r for r in found if r["kind"] == kind] for kind in ("step", "row"))
    assert [(r["number"], r["step"], r["at"]) for r in steps] == [(1 + k // 4, k % 4 + 1, k + 1) for k in range(8)]
    assert [r["lr"] for r in steps[:3]] == pytest.approx([1.5e-4, 3e-4, 3e-4])  # two steps of warm-up
    assert [r["loss/task"] for r in steps[4:]] == pytest.approx(metrics["losses"][rows[2]["task"]]["task"], abs=1e-5)
    assert any(r.get("images_per_second", 0) > 0 for r in steps)
    for row, accuracy, probe, gap in zip(rows, metrics["accuracy"], metrics["probe"], metrics["gap"], strict=True):
        assert [row[f"accuracy/{name}"] for name in metrics["tasks"]] == accuracy and row["accuracy/probe"] == probe
        assert {k: row[f"gap/{k}"] for k in gap} == gap and row["peak_memory_mb"] > 0
    assert "figures/last" not in rows[1] and rows[2]["figures/last"] == metrics["last"]

    with pytest.raises(KeyboardInterrupt):
        perdure.run("finetune", "mini-mtil", broken, watcher=Enough(), report_to="jsonl,csv", **ASKED)
    with open(broken / "track.jsonl", "a") as file:
        file.write('{"kind": "step", "numb')  # as a kill in the midst of a line leaves it
    launch.resume(broken, report_to="csv, jsonl")
    assert timeless(records(broken)) == timeless(records(whole))
    lines, others = ([row for row in table(f) if row[5] not in OF_TIME] for f in (whole, broken))
    assert lines == others and lines[0] == ["kind", "number", "task", "step", "at", "figure", "value"]
    assert ["config", "0", "", "0", "0", "options/lr", "0.0003"] in lines
    assert {row[6] for row in lines if row[5] == "loss/task"} == {str(r["loss/task"]) for r in steps}


@pytest.mark.slow
def test_steps_that_an_earlier_process_took_are_told_once(tmp_path: Path) -> None:
    """Killed inside a task that was saved: what is not trained again is in the records all the same."""

    class Late(Watcher):
        def step(self, step: int, total: int, losses: Any) -> None:
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 4 + 3:
                raise KeyboardInterrupt

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    asked = {**ASKED, "save_every": "2"}
    perdure.run("finetune", "mini-mtil", whole, report_to="jsonl,csv", **asked)
    with pytest.raises(KeyboardInterrupt):
        perdure.run("finetune", "mini-mtil", broken, watcher=Late(), report_to="jsonl,csv", **asked)
    assert list(broken.glob("begun_task_02_*"))
    launch.resume(broken, report_to="jsonl,csv")
    assert timeless(records(broken)) == timeless(records(whole))
    lines, others = ([row for row in table(f) if row[5] not in OF_TIME] for f in (whole, broken))
    assert lines == others
    assert all(
        record.get("images_per_second", 0) < 1e5 for record in records(broken)
    )  # what was only told has no speed


def timeless(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in OF_TIME} for record in found]


@pytest.mark.slow
def test_tensorboard_and_wandb_take_it_in_their_own_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nobody: None
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    asked = {**ASKED, "iterations": 2, "warmup": 0}
    with pytest.raises(KeyboardInterrupt):
        perdure.run("finetune", "mini-mtil", folder, watcher=Enough(), report_to="tensorboard,wandb", **asked)
    metrics = launch.resume(folder, report_to="tensorboard,wandb")
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("loss/task")] == [1, 2, 3, 4]
    assert [e.value for e in board.Scalars("accuracy/probe")] == pytest.approx(metrics["probe"])
    assert "lr" in board.Tags()["scalars"] and "config/text_summary" in board.Tags()["tensors"]
    offline = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(offline) == 2  # one a process, under one name
    assert len({p.name for p in offline}) == 1
    assert b"accuracy/probe" in offline[1].read_bytes() and b"loss/task" in offline[0].read_bytes()


@pytest.mark.slow
def test_a_tracker_that_refuses_ends_nothing_that_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nobody: None
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0")  # somebody is logged in, with a key that is none
    words = ["run", "--method", "finetune", "--stream", "mini-mtil", "--out", tmp_path / "refused", "tasks=2"]
    line = [sys.executable, "-m", "perdure", *map(str, words), "--report-to", "jsonl,wandb"]
    found = subprocess.run(line, capture_output=True, text=True)  # of its own: wandb remembers how it was set up
    said = " ".join(found.stderr.split())
    assert found.returncode == 2 and "tracker wandb cannot be begun" in said and "API key" in said
    assert not list((tmp_path / "refused").glob("task_*"))  # said before the work

    written, say = [0], JSONLines.say

    def full(tracker: JSONLines, text: str) -> None:
        written[0] += 1
        if written[0] > 3:
            raise OSError(28, "No space left on device")
        say(tracker, text)

    monkeypatch.setattr(JSONLines, "say", full)
    heard: list[str] = []
    ear = launch.Watcher()
    setattr(ear, "warn", heard.append)  # noqa: B010
    perdure.run("finetune", "mini-mtil", tmp_path / "run", watcher=ear, report_to="jsonl,csv", **ASKED)
    assert [text for text in heard if "tracker" in text] == [
        "The tracker jsonl failed ([Errno 28] No space left on device): it hears no more. The run goes on."
    ]
    assert len(records(tmp_path / "run")) == 4  # the configuration, and three
    assert table(tmp_path / "run")[-1][0] == "row"  # the other heard all


@pytest.mark.slow
def test_a_run_that_is_tracked_later_has_its_configuration_in_the_table(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        perdure.run("finetune", "mini-mtil", tmp_path, watcher=Enough(), **ASKED)
    launch.resume(tmp_path, report_to="csv")
    assert ["config", "0", "", "0", "0", "method", "finetune"] in table(tmp_path)


def test_an_unknown_tracker_and_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match="There is no tracker 'wandbb'. Did you mean 'wandb'"):
        perdure.run("finetune", "mini-mtil", tmp_path / "run", report_to="jsonl,wandbb")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(PerdureError, match=r"tensorboard needs the package tensorboard.*perdure\[tensorboard\]"):
        perdure.run("finetune", "mini-mtil", tmp_path / "run", report_to=["tensorboard"])
    assert not (tmp_path / "run").exists()  # said before the work
    assert [kind.__name__ for kind in checked("csv, jsonl,csv,")] == ["CSV", "JSONLines"]


def test_nobody_is_logged_in(nobody: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match="nobody is logged in here. Say wandb login.*WANDB_MODE=offline"):
        checked("wandb")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert len(checked("wandb")) == 1
    (tmp_path / ".netrc").write_text("machine elsewhere.example login user password secret\n")
    with pytest.raises(PerdureError, match="nobody is logged in"):
        checked("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0")
    assert len(checked("wandb")) == 1
