"""What careless people do with a model in use, and what they are told."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from albums import labelled, pack, tasks
from safetensors import SafetensorError
from test_learner import RIDGE, answers, drawings, learned, mine, opened, states  # noqa: F401
from typer.testing import CliRunner

from perdure import Learner, PerdureError
from perdure.cli import app
from perdure.cli.learner import predict
from perdure.core.tensors import plain_errors
from perdure.data.places import mark
from perdure.launch.learner.card import chosen, commands

# ruff: noqa: F811 (fixtures of another file)
pytestmark = pytest.mark.filterwarnings("ignore")


def command(*words: str | Path) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


def test_of_several_tasks_those_that_were_learned_are_told_whatever_comes_after(
    mine: Path, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("food", "other"):
        shutil.copytree(drawings / "food" if name == "food" else drawings / "animals", tmp_path / "two" / name)
    whole = Learner.learn_one
    heard: list[str] = []

    def stopped(self: Learner, task: Any, *more: Any) -> Any:
        if task.name == "other":
            raise KeyboardInterrupt
        return whole(self, task, *more)

    monkeypatch.setattr(Learner, "learn_one", stopped)
    for folder in (tmp_path / "two" / "other").iterdir():  # new pictures, or nothing would be learned
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes() + b"x")
    found = command("learn", mine, tmp_path / "two")
    assert found.exit_code == 130 and "food is learned" in found.output
    assert "is as it was after food" in " ".join(found.output.split())
    assert states(mine)[-1] == "task_03_food"
    monkeypatch.setattr(Learner, "learn_one", whole)
    Learner(mine).learn(tmp_path / "two", told=lambda one: heard.append(one.task))
    assert heard == ["food", "other"] and states(mine)[-1] == "task_04_other"


def test_what_is_wrong_with_a_later_task_is_said_before_the_first_is_learned(
    mine: Path, drawings: Path, tmp_path: Path
) -> None:
    shutil.copytree(drawings / "food", tmp_path / "two" / "crumbs")
    shutil.copytree(drawings.parent / "probe", tmp_path / "two" / "digits")  # a name that is taken
    before = states(mine)
    with pytest.raises(PerdureError, match="'digits' is learned already.* of several tasks its folder"):
        Learner(mine).learn(tmp_path / "two")
    assert states(mine) == before


def test_a_few_new_pictures_are_shared_out(mine: Path, drawings: Path, tmp_path: Path) -> None:
    shutil.copytree(drawings / "digits", tmp_path / "more")
    new = [path for path in sorted((drawings / "food").rglob("*.png")) if int(mark(path), 16) % 5][:3]
    for path in new:  # by their bytes none is held out
        shutil.copy(path, tmp_path / "more" / "zero" / f"new{path.name}")
    (outcome,) = Learner(mine).learn(tmp_path / "more")
    about = Learner(mine).history()[-1]["about"]
    assert (about["train"], about["test"]) == (2, 1) and "1 of them are held out" in " ".join(outcome.notes)


def test_an_export_can_be_asked_and_nothing_else(learned: Path, drawings: Path, tmp_path: Path) -> None:
    Learner(learned).export(tmp_path / "out")
    asked = command("predict", tmp_path / "out", drawings / "digits" / "zero", "--format", "csv")
    assert (
        asked.exit_code == 0
        and asked.output == command("predict", learned, drawings / "digits" / "zero", "--format", "csv").output
    )
    more = {"history": (), "evaluate": (), "undo": (), "learn": (str(drawings / "food"),)}
    for name, words in more.items():
        found = command(name, tmp_path / "out", *words)
        assert found.exit_code and "is an export" in str(found.exception), name


def test_names_may_hold_commas_and_any_bytes(learned: Path, drawings: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    picture = next((drawings / "digits" / "zero").iterdir())
    found = command("predict", learned, picture, "--classes", 'zero,"one, two"', "--topk", "2", "--format", "csv")
    assert found.exit_code == 0 and '"one, two"' in found.output
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(odd, "wb") as file:
        file.write(picture.read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(odd + b"\n"), encoding="utf-8"))
    predict(learned, ["-"])


def test_a_name_in_parts_is_the_name(tmp_path: Path, mine: Path, drawings: Path) -> None:
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "café")
        shutil.copytree(drawings / "food" / sorted(os.listdir(drawings / "food"))[0], tmp_path / form / name)
        shutil.copytree(drawings / "food" / sorted(os.listdir(drawings / "food"))[1], tmp_path / form / "bar")
        for path in (tmp_path / form).rglob("*.png"):
            path.write_bytes(path.read_bytes() + form.encode())
    for form in ("NFC", "NFD"):
        (outcome,) = Learner(mine).learn(tmp_path / form)
    assert "2 of its 2 classes are known already" in " ".join(outcome.notes)
    assert Learner(mine).predict(next((tmp_path / "NFC" / "bar").iterdir()))[0]["label"]


@pytest.mark.parametrize(
    "option", ["unreadable=0.1", "base=2", "increment=2", "shots_from=2", "shots_seed=1", "shots_file=a.json"]
)
def test_what_belongs_to_runs_is_refused(option: str, tmp_path: Path, drawings: Path) -> None:
    found = command("learn", tmp_path / "HOME", drawings / "food", option, "--method", "ridge")
    assert "belongs to runs over a stream" in str(found.exception) and not (tmp_path / "HOME").exists()


def test_a_home_whose_beginning_was_broken_off_is_begun_again(tmp_path: Path, drawings: Path) -> None:
    (tmp_path / "HOME").mkdir()
    (tmp_path / "HOME" / "probe.safetensors").write_bytes(b"cut short")
    assert opened(tmp_path / "HOME", drawings).learn(drawings / "food").accepted
    assert answers(Learner(tmp_path / "HOME"), drawings / "food")


def test_paths_of_pictures_that_have_none_are_refused_before_the_work(tmp_path: Path, drawings: Path) -> None:
    pack(tmp_path / "tars" / "a.tar", labelled(tasks("digits")[0], 3, 6))
    with pytest.raises(PerdureError, match="keep=paths"):
        Learner(tmp_path / "HOME", keep="paths", **RIDGE).learn(tmp_path / "tars")
    assert not (tmp_path / "HOME").exists()


def test_an_option_that_came_later_has_its_default(mine: Path) -> None:
    config = json.loads((mine / "config.json").read_text())
    del config["options"]["block"]
    (mine / "config.json").write_text(json.dumps(config))
    Learner(mine, **RIDGE, block=2)
    with pytest.raises(PerdureError, match="block: 3 was given"):
        Learner(mine, **RIDGE, block=3)


def test_the_card_s_commands_make_the_same_again(learned: Path) -> None:
    learner = Learner(learned)
    config = {**learner.config, "seed": 3}
    first, second = commands(config, [{**one, "task": f"my {one['task']}"} for one in learner.history()[:2]])
    words = shlex.split(first)
    assert words[:4] == ["perdure", "learn", "HOME", "my animals/"] and "--seed" in words and "features=96" in words
    assert "lam=0.01" in words and f"precision={config['settings']['precision']}" in words
    assert shlex.split(second) == ["perdure", "learn", "HOME", "my digits/"]
    assert all("=" in word for word in chosen(config))


def test_after_forgetting_undo_says_what_is_known(mine: Path) -> None:
    assert command("forget", mine, "animals").exit_code == 0
    found = " ".join(command("undo", mine).output.split())
    assert "knows: animals, digits." in found and "without" not in found.split("Current")[1]


def test_a_full_disk_is_said_as_such() -> None:
    with pytest.raises(OSError, match="No space left") as found, plain_errors():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert found.value.errno == 28
    with pytest.raises(SafetensorError), plain_errors():
        raise SafetensorError("Invalid header")


@pytest.mark.slow
def test_who_reads_no_further_ends_it_quietly(learned: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "perdure", "history", str(learned), "--json"], stdout=writes, stderr=subprocess.PIPE
    )
    os.close(writes)
    assert done.returncode in (1, 141) and not done.stderr  # noticed while it prints, or at the end
