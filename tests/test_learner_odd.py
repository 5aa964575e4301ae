"""A model in use in odd circumstances: elsewhere, half made, stopped while it writes, among pictures that changed places."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import same_bits
from test_learner import QUICK, answers, drawings, learned, mine, opened, states  # noqa: F401
from test_learner_stops import weights
from typer.testing import CliRunner

from perdure import Learner, PerdureError
from perdure.cli import app
from perdure.engine.watcher import Watcher
from perdure.launch.learner import learner as inside
from perdure.methods.ridge import Ridge

# ruff: noqa: F811 (fixtures of another file)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_an_export_answers_without_what_it_learned_from_and_uncompiled(
    tmp_path: Path, drawings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(drawings / "food", tmp_path / "reference")
    home = opened(tmp_path / "HOME", drawings, **{**QUICK, "method": "zscl"}, reference=str(tmp_path / "reference"),
                  reference_batch=4, texts="reference")  # fmt: skip
    home.learn(drawings / "digits", max_loss=100)
    config = json.loads((tmp_path / "HOME" / "config.json").read_text())
    config["settings"]["compile"] = True  # a HOME that learned with a compiler, asked where there is none
    (tmp_path / "HOME" / "config.json").write_text(json.dumps(config))

    def refused(*given: Any) -> None:
        raise PerdureError("no compiler")

    monkeypatch.setattr("perdure.engine.settings.compiled", refused)
    before = answers(Learner(tmp_path / "HOME"), drawings / "digits")
    Learner(tmp_path / "HOME").export(tmp_path / "out")
    shutil.rmtree(tmp_path / "reference")
    monkeypatch.chdir(drawings)
    assert answers(Learner.from_pretrained(tmp_path / "out"), drawings / "digits") == before
    about = json.loads((tmp_path / "out" / "perdure.json").read_text())
    assert about["learned_with"] == {"reference": "reference"} and about["config"]["settings"]["compile"] is False
    assert about["config"]["options"]["reference_batch"] == 4


@pytest.mark.parametrize("most", [float("inf"), float("nan"), -1.0, 101.0])
def test_what_is_no_number_of_points_is_refused_before_the_work(most: float, tmp_path: Path, drawings: Path) -> None:
    with pytest.raises(PerdureError, match="from 0 to 100"):
        Learner(tmp_path / "HOME").learn(drawings / "food", max_loss=most)
    assert not (tmp_path / "HOME").exists()


def test_a_home_that_was_stopped_while_it_was_made_takes_several_tasks(tmp_path: Path, drawings: Path) -> None:
    home = opened(tmp_path / "HOME", drawings)
    home.learn(drawings / "food")
    shutil.rmtree(tmp_path / "HOME" / "task_01_food")
    shutil.rmtree(tmp_path / "HOME" / "task_00_before")  # which is measured after config.json is written
    for name in ("food", "animals"):
        shutil.copytree(drawings / name, tmp_path / "two" / name)
    assert "food would be learned" in str(Learner(tmp_path / "HOME").learn(tmp_path / "two", dry_run=True))
    Learner(tmp_path / "HOME").learn(tmp_path / "two")
    assert states(tmp_path / "HOME") == ["task_00_before", "task_01_animals", "task_02_food"]


@pytest.mark.slow
def test_what_was_saved_under_other_captions_is_not_gone_on_with(tmp_path: Path, drawings: Path) -> None:
    names = [path.relative_to(drawings).as_posix() for path in sorted((drawings / "digits").rglob("*.png"))]

    def listed(word: str) -> Path:
        with open(drawings / "captions.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "label", "text"])
            rows.writerows([name, Path(name).parent.name, f"{word} {Path(name).parent.name}"] for name in names)
        return drawings / "captions.csv"

    class Stops(Watcher):
        def step(self, step: int, total: int, losses: Any) -> None:
            if step == 3:
                raise KeyboardInterrupt

    values: dict[str, Any] = {**QUICK, "iterations": 5, "loss": "contrastive", "save_every": "1"}
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / "HOME", drawings, **values, watcher=Stops()).learn(listed("drawn"), max_loss=100)
    assert (tmp_path / "HOME" / "begun_task_01_captions" / "state.json").exists()
    heard: list[str] = []

    class Ear(Watcher):
        def warn(self, text: str) -> None:
            heard.append(text)

    for name in ("HOME", "whole"):
        home = opened(tmp_path / name, drawings, **values, watcher=Ear())
        assert home.learn(listed("painted"), max_loss=100).accepted
    assert sum("began with something else" in text for text in heard) == 1
    assert same_bits(weights(tmp_path / "HOME"), weights(tmp_path / "whole"))
    (drawings / "captions.csv").unlink()


def test_a_signal_while_a_state_is_written_is_told_as_it_is(
    mine: Path, drawings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = inside.write_state

    def slowly(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        whole(*given)

    monkeypatch.setattr(inside, "write_state", slowly)
    found = CliRunner().invoke(app, ["learn", str(mine), str(drawings / "food")])
    said = " ".join(found.output.split())
    assert found.exit_code == 143 and "is as it was after food" in said and "food is learned" in said
    assert states(mine)[-1] == "task_03_food"


def test_a_remark_that_is_no_number_is_refused_in_words(
    mine: Path, drawings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ridge, "remarks", lambda self: {"odd": float("nan")})
    with pytest.raises(PerdureError, match="no number: 'odd' is nan"):
        Learner(mine).learn(drawings / "food")
    assert states(mine)[-1] == "task_02_digits"


@pytest.mark.slow
def test_pictures_that_changed_places_are_not_measured(tmp_path: Path, drawings: Path) -> None:
    shutil.copytree(drawings / "food", tmp_path / "food")
    home = opened(tmp_path / "HOME", drawings, method="ridge", keep="paths")
    home.learn(tmp_path / "food")
    assert home.evaluate()[0].after is not None
    paths = [Path(p) for p in home.history()[0]["about"]["paths"]]
    first, last = paths[0].read_bytes(), paths[-1].read_bytes()
    paths[0].write_bytes(last)
    paths[-1].write_bytes(first)
    assert home.evaluate()[0].after is None


def test_a_stream_in_a_file_is_learned_as_a_run_takes_it(tmp_path: Path, drawings: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from perdure.benchmarks import mini\nfrom dataclasses import replace\n\n\n"
        "def stream():\n    return replace(mini.multi_domain('I').shortened(1, 24), name='few')\n"
    )
    (outcome,) = opened(tmp_path / "HOME", drawings).learn(str(tmp_path / "own.py"))
    assert outcome.accepted and outcome.task == "animals"
