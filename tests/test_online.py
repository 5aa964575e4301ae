"""The online protocol: one pass, asked in between, and the same bits whether it is asked or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import same_bits
from safetensors.torch import load_file
from test_resumed import Enough, outcome

import perdure
from perdure import Learner, launch
from perdure.core.errors import PerdureError
from perdure.engine.online import course
from perdure.report import html

ONLINE: dict[str, Any] = {
    "tasks": 2, "images": 22, "batch_size": 5, "precision": "fp32", "online": True, "evaluate_every": 2, "replayed": 3,
    "memory": 12, "warmup": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run that was asked in between, once for all tests here."""
    folder = tmp_path_factory.mktemp("online") / "asked"
    return perdure.run("experience_replay", "mini-cil", folder, **ONLINE), folder


@pytest.mark.slow
def test_it_is_asked_about_the_tasks_begun_so_far(asked: tuple[dict[str, Any], Path]) -> None:
    metrics, _ = asked
    points = metrics["online"]
    assert [(p["task"], p["step"], p["images"]) for p in points] == [
        (task, step, before + images)
        for task, before in zip(metrics["tasks"], (0, 22), strict=True)
        for step, images in ((2, 10), (4, 20), (5, 22))  # of 22 images in batches of 5: the last is the row itself
    ]
    assert points[2]["accuracy"] == pytest.approx(metrics["incremental"][0])
    assert points[5]["accuracy"] == pytest.approx(metrics["incremental"][1])
    assert metrics["anytime"] == pytest.approx(sum(p["accuracy"] for p in points) / 6)
    trained = sum(one["train"] for one in metrics["seconds_by_task"][1:])
    assert metrics["throughput"] == pytest.approx(44 / trained, rel=1e-2)
    assert metrics["config"]["epochs"] == 1 and metrics["remarks"][metrics["tasks"][1]]["images offered"] == 44
    page = html.render([metrics])
    assert "Anytime" in page and "Throughput" in page


@pytest.mark.slow
def test_being_asked_changes_no_bit_and_a_run_goes_on_where_it_was(
    asked: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    metrics, folder = asked
    silent = perdure.run("experience_replay", "mini-cil", tmp_path / "silent", **{**ONLINE, "evaluate_every": 0})
    assert silent["losses"] == metrics["losses"] and silent["accuracy"] == metrics["accuracy"]
    assert [p["step"] for p in silent["online"]] == [5, 5]
    with pytest.raises(KeyboardInterrupt):
        perdure.run("experience_replay", "mini-cil", tmp_path / "broken", watcher=Enough(), **ONLINE)
    launch.resume(tmp_path / "broken")
    whole, broken = (outcome(place) for place in (folder, tmp_path / "broken"))
    assert {k: v for k, v in whole.items() if k != "throughput"} == {
        k: v for k, v in broken.items() if k != "throughput"
    }
    files = sorted(p.relative_to(folder) for p in folder.rglob("*.safetensors"))
    assert any(p.name == "state.safetensors" for p in files)
    for other in ("silent", "broken"):
        assert all(same_bits(load_file(folder / p), load_file(tmp_path / other / p)) for p in files), other


def test_a_stream_is_seen_once_by_default_and_more_is_refused() -> None:
    config, _ = launch.configure("finetune", "mini-cil", 0, ["online=true"], {})
    assert {key: config["options"][key] for key in ("epochs", "batch_size", "warmup")} == {
        "epochs": 1, "batch_size": 10, "warmup": 0
    }  # fmt: skip
    config, _ = launch.configure("finetune", "mini-cil", 0, ["online=true", "batch_size=16"], {})
    assert config["options"]["batch_size"] == 16
    plain, _ = launch.configure("finetune", "mini-cil", 0, [], {})
    assert plain["options"]["epochs"] == 0 and plain["options"]["batch_size"] == 64
    for wrong, said in (("epochs=3", "3 passes see them more often"), ("epochs=0", "0 passes say iterations")):
        with pytest.raises(PerdureError, match=f"online=true: every image is seen once, and {said}"):
            launch.configure("ocl_sda", "mini-cil", 0, ["online=true", wrong], {})


@pytest.mark.parametrize("name", ["ridge", "individual", "finetune+ridge"])
def test_what_answers_when_a_task_is_over_cannot_be_asked_before(name: str) -> None:
    with pytest.raises(PerdureError, match="evaluate_every: what .* answers with is made when a task is over"):
        launch.prepare(name, "mini-mtil", 0, ["evaluate_every=3"], {})


def test_a_model_in_use_is_no_stream(tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match="online belongs to runs over a stream"):
        Learner(tmp_path / "HOME", online=True)


def test_runs_that_are_not_asked_have_no_course() -> None:
    assert course([{"task": "before", "seconds": {"train": 1.0}}, {"task": "a", "seconds": {"train": 1.0}}]) == {}
