"""A model in use whose process is stopped while it learns, forgets or goes back, for real."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import same_bits
from test_faults import small_disk  # noqa: F401
from test_learner import answers, drawings, learned, mine, opened, states  # noqa: F401
from typer.testing import CliRunner

from perdure import Learner
from perdure.cli import app
from perdure.engine import home
from perdure.engine.watcher import Watcher

# ruff: noqa: F811 (fixtures of another file)
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
TRAINED = {
    "method": "finetune",
    "iterations": 60,
    "warmup": 1,
    "batch_size": 8,
    "precision": "fp32",
    "save_every": "never",
}


def start(*words: str | Path) -> subprocess.Popen[str]:
    """A process of its own, on one thread."""
    command = [sys.executable, "-m", "perdure", *map(str, words)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"}, **pipes)


def asked(folder: Path, drawings: Path, **values: Any) -> list[str | Path]:
    """The command that teaches a HOME digits."""
    given = {**TRAINED, **values}
    method = str(given.pop("method"))
    words = [f"{key}={value}" for key, value in given.items()]
    probe: list[str | Path] = ["--probe", drawings.parent / "probe", "--max-loss", "100"]
    return ["learn", folder, drawings / "digits", "--method", method, *probe, *words]


def weights(folder: Path) -> dict[str, Any]:
    return dict(home.course(folder)[0][-1].files["weights"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, drawings: Path) -> Path:
    """A HOME that learned digits in one go."""
    folder = tmp_path_factory.mktemp("whole") / "HOME"
    process = start(*asked(folder, drawings))
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return folder


def wait(process: subprocess.Popen[str], there: Any) -> None:
    """Until ``there()``; the process must not end before."""
    while not there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_it_learns_keeps_the_training_and_the_same_command_goes_on(
    number: int, code: int, tmp_path: Path, drawings: Path, undisturbed: Path
) -> None:
    folder = tmp_path / "HOME"
    process = start(*asked(folder, drawings, save_every="5"))
    wait(process, lambda: any(folder.glob("begun_task_01_digits/state.json")))
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code and "Traceback" not in out + err, out + err
    assert f"Stopped. {folder} is as it was before, and the training at hand is kept up to step" in out
    assert states(folder) == ["begun_task_01_digits", "task_00_before"]
    again = CliRunner().invoke(app, [str(word) for word in asked(folder, drawings)], catch_exceptions=False)
    assert again.exit_code == 0 and states(folder) == ["task_00_before", "task_01_digits"]
    assert same_bits(weights(folder), weights(undisturbed))


def test_killed_inside_a_task_it_goes_on_with_the_step_that_was_saved(
    tmp_path: Path, drawings: Path, undisturbed: Path
) -> None:
    folder = tmp_path / "HOME"
    process = start(*asked(folder, drawings, save_every="5"))
    wait(process, lambda: any(folder.glob("begun_task_01_digits/state.json")))
    process.kill()
    process.communicate()
    assert states(folder) == ["begun_task_01_digits", "task_00_before"]
    assert Learner(folder).history() == []  # as it was before
    heard: list[int] = []

    class Ear(Watcher):
        def step(self, step: int, total: int, losses: Any) -> None:
            heard.append(step)

    learner = opened(folder, drawings, **TRAINED, watcher=Ear())
    assert learner.learn(drawings / "digits", max_loss=100).accepted
    assert heard[0] > 5 and heard[-1] == 60
    assert len(learner.history()[0]["losses"]["task"]) == 60
    assert states(folder) == ["task_00_before", "task_01_digits"]
    assert same_bits(weights(folder), weights(undisturbed))


def test_what_was_saved_of_other_pictures_is_not_gone_on_with(tmp_path: Path, drawings: Path) -> None:
    folder, fewer = tmp_path / "HOME", tmp_path / "digits"
    shutil.copytree(drawings / "digits", fewer)
    next(fewer.rglob("*.png")).unlink()
    whole = tmp_path / "whole"
    quick = {**TRAINED, "iterations": 12}
    assert opened(whole, drawings, **quick).learn(fewer, max_loss=100).accepted
    process = start(*asked(folder, drawings, iterations=12, save_every="1"))
    wait(process, lambda: any(folder.glob("begun_task_01_digits/state.json")))
    process.kill()
    process.communicate()
    assert opened(folder, drawings, **quick).learn(fewer, max_loss=100).accepted
    assert same_bits(weights(folder), weights(whole)) and not list(folder.glob("begun_*"))


def test_what_was_saved_goes_when_something_else_is_learned(tmp_path: Path, drawings: Path) -> None:
    folder = tmp_path / "HOME"
    process = start(*asked(folder, drawings, save_every="1"))
    wait(process, lambda: any(folder.glob("begun_task_01_digits/state.json")))
    process.kill()
    process.communicate()
    assert opened(folder, drawings, **TRAINED).learn(drawings / "food", max_loss=100).accepted
    assert states(folder) == ["task_00_before", "task_01_food"]


@pytest.mark.parametrize("wait_for", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("command", ["undo", "forget"])
def test_killed_while_it_forgets_or_goes_back_a_home_is_as_before_or_as_after(
    command: str, wait_for: float, mine: Path, drawings: Path
) -> None:
    (mine / ".lock").unlink()  # which the command makes when it begins
    process = start(command, mine, *(["digits"] if command == "forget" else []))
    while process.poll() is None and not (mine / ".lock").exists():
        time.sleep(0.005)
    time.sleep(wait_for)
    process.kill()
    process.communicate()
    known = {task for *_, task in answers(Learner(mine), drawings / "digits")}
    names = [one["task"] for one in Learner(mine).history() if one["state"] == "current" and "forgot" not in one]
    assert names in (["animals", "digits"], ["animals"]) and known <= set(names)
    assert opened(mine, drawings).learn(drawings / "food").accepted


def test_a_disk_that_is_full_when_a_task_is_learned_leaves_the_home_as_it_was(small_disk: Path, drawings: Path) -> None:
    """The weights take 13 MB: one task's fit, a second's do not."""
    narrow = small_disk / "HOME"
    quick = {**TRAINED, "iterations": 2}
    assert opened(narrow, drawings, **quick).learn(drawings / "digits", max_loss=100).accepted
    before = answers(Learner(narrow), drawings / "digits")
    found = CliRunner().invoke(app, ["learn", str(narrow), str(drawings / "food"), "--max-loss", "100"])
    assert found.exit_code and "No space left" in str(found.exception) + found.output
    assert states(narrow) == ["task_00_before", "task_01_digits"]
    assert answers(Learner(narrow), drawings / "digits") == before
    subprocess.run(["mount", "-o", "remount,size=64m", narrow.parent], check=True)
    assert Learner(narrow).learn(drawings / "food", max_loss=100).accepted
