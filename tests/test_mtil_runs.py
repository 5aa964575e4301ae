"""Runs on MTIL's small trees: every protocol, whole and few-shot, and the heads that are solved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import perdure
from perdure.benchmarks import mtil
from perdure.core.state import read_json

STEP: dict[str, Any] = {"iterations": 1, "warmup": 0, "batch_size": 4, "tasks": 2, "images": 6, "precision": "fp32"}


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("task_id", ["known", "hidden"])
@pytest.mark.parametrize("labels", ["task", "seen", "all"])
def test_mtil_is_learned_under_every_protocol(
    labels: str, task_id: str, shots: int, mtil_data: Path, real_clip: str, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"labels": labels, "task_id": task_id, "shots": shots}
    # neither protocol nor shots are as usual where they are given: X-TAIL's are all, hidden, 16
    stream = "x-tail" if (labels, task_id) != ("all", "hidden") else "mtil-2"
    perdure.run("finetune", stream, tmp_path / "run", model=real_clip, **STEP, **asked)
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["finished"] and metrics["protocol"] == {"labels": labels, "task_id": task_id}
    assert [losses["step"] for losses in metrics["losses"].values()] == [[1], [1]]
    assert metrics["data"]["split"].endswith("/2 shots") == bool(shots) and metrics["config"]["shots"] == shots
    assert (metrics["incremental"] is not None) == (labels == "seen")


@pytest.mark.slow
def test_more_classes_that_compete_never_help(mtil_data: Path, real_clip: str, tmp_path: Path) -> None:
    """Row 0, where nothing is learned: the protocol reaches the evaluation."""
    born = {
        labels: perdure.run("zero_shot", "mtil", tmp_path / labels, model=real_clip, tasks=4, images=40, labels=labels)
        for labels in ("task", "seen", "all")
    }
    own, seen, everything = (born[labels]["accuracy"][0] for labels in ("task", "seen", "all"))
    assert own == seen != everything and all(a >= b for a, b in zip(own, everything, strict=True))


@pytest.mark.slow
def test_a_head_is_solved_for_a_miniature_mtil(mtil_data: Path, real_clip: str, tmp_path: Path) -> None:
    metrics = perdure.run("ridge", "mtil", tmp_path / "run", model=real_clip, images=6, precision="fp32", features=32)
    assert metrics["finished"] and metrics["tasks"] == mtil.facts()["orders"]["I"]
