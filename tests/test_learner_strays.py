"""What a model in use is shown by mistake, and what it knows again in another process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_learner import RIDGE, drawings, learned, mine, states  # noqa: F401

from perdure import Learner, PerdureError
from perdure.benchmarks import mini
from perdure.data.places import mark
from perdure.engine.watcher import Watcher
from perdure.launch.learner.answers import names_in
from perdure.launch.learner.card import commands

# ruff: noqa: F811 (fixtures of another file)
pytestmark = pytest.mark.filterwarnings("ignore")


HALF = """
from perdure.methods.base import Method

class Half(Method):
    \"\"\"Fine-tuning under another name.\"\"\"
"""


@pytest.mark.slow
def test_a_method_of_a_file_is_known_in_the_next_process(tmp_path: Path, drawings: Path) -> None:
    (tmp_path / "half.py").write_text(HALF)
    words = ["--method", str(tmp_path / "half.py"), "iterations=1", "warmup=0", "--max-loss", "100"]
    for more in (
        ["learn", "HOME", str(drawings / "food"), *words],
        ["history", "HOME"],
        ["learn", "HOME", str(drawings / "digits"), "--max-loss", "99.5"],
        ["export", "HOME", "out"],
    ):
        done = subprocess.run([sys.executable, "-m", "perdure", *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    card, about = ((tmp_path / "out" / name).read_text() for name in ("README.md", "perdure.json"))
    assert str(tmp_path) not in card + about  # nothing of the maker's machine
    assert "perdure learn HOME food/ --max-loss 100 --method half.py" in card and "digits/ --max-loss 99.5" in card
    assert "warmup=0" in card
    picture = str(next((drawings / "food").rglob("*.png")))
    asked = [sys.executable, "-m", "perdure", "predict", "out", picture]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True)  # an export carries no code
    assert done.returncode and "is of the method 'half', from half.py" in done.stderr and "--method FILE" in done.stderr
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").rename(tmp_path / "elsewhere" / "out")
    for method, code in ((str(tmp_path / "half.py"), 0), ("finetune", 2)):
        done = subprocess.run([*asked, "--method", method], cwd=tmp_path / "elsewhere", capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    (tmp_path / "half.py").unlink()
    with pytest.raises(PerdureError, match="was read from .*half.py, which is gone"):
        Learner(tmp_path / "HOME")


def renamed(source: Path, target: Path, *names: str) -> Path:
    """Classes of a folder under other names, their pictures under other bytes."""
    for old, new in zip(sorted(source.iterdir()), names, strict=False):
        shutil.copytree(old, target / new)
    for path in target.rglob("*.png"):
        path.write_bytes(path.read_bytes() + target.name.encode())
    return target


def test_classes_that_the_model_could_not_tell_from_those_it_knows_are_refused(
    mine: Path, drawings: Path, tmp_path: Path
) -> None:
    assert Learner(mine).learn(renamed(drawings / "food", tmp_path / "one", "猫", "bar")).accepted
    before = states(mine)
    with pytest.raises(PerdureError, match="beside what is known: the classes '猫' and '犬' have one text"):
        Learner(mine).learn(renamed(drawings / "food", tmp_path / "two", "犬", "foo"))
    assert states(mine) == before


def test_a_new_picture_a_class_is_enough(mine: Path, drawings: Path, tmp_path: Path) -> None:
    shutil.copytree(drawings / "digits", tmp_path / "more")
    new = iter(path for path in sorted((drawings / "food").rglob("*.png")) if int(mark(path), 16) % 5)
    for folder in sorted((tmp_path / "more").iterdir()):
        shutil.copy(next(new), folder / "new.png")
    assert Learner(mine).learn(tmp_path / "more").accepted
    about = Learner(mine).history()[-1]["about"]
    assert (about["train"], about["test"]) == (3, 1)


def test_a_home_among_its_pictures_is_refused(tmp_path: Path, drawings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(drawings / "food", tmp_path / "photos")
    monkeypatch.chdir(tmp_path / "photos")
    with pytest.raises(PerdureError, match="would lie inside"):
        Learner("HOME", **RIDGE).learn(".")
    assert not (tmp_path / "photos" / "HOME").exists()


def test_what_is_no_folder_of_pictures_is_said_as_such(mine: Path, drawings: Path, tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match="There is no folder petz"):
        Learner(mine).learn("petz")
    picture = next((drawings / "food").rglob("*.png"))
    with pytest.raises(PerdureError, match="is a file. Give a folder"):
        Learner(mine).learn(picture)
    with pytest.raises(PerdureError, match="holds a model as transformers keep it.*--from"):
        Learner(mini.MODEL)
    with pytest.raises(PerdureError, match="Pictures are paths, folders"):
        Learner(mine).predict(Image.open(picture))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_home_that_has_learned_nothing_says_so(tmp_path: Path, drawings: Path) -> None:
    learner = Learner(tmp_path / "HOME", **RIDGE)
    learner.learn(drawings / "food")
    learner.undo()
    with pytest.raises(PerdureError, match="another model in use") as found:
        Learner(tmp_path / "HOME", method="finetune")
    assert "delete" not in str(found.value)  # what was taken back lies there
    shutil.rmtree(next((tmp_path / "HOME").glob("undone_*")))
    with pytest.raises(PerdureError, match="has learned nothing yet: delete the folder"):
        Learner(tmp_path / "HOME", method="finetune")
    with pytest.raises(PerdureError, match="has learned nothing yet"):
        learner.forget("food")


def test_a_probe_of_what_is_taught_and_a_model_that_is_an_export_are_said(
    learned: Path, drawings: Path, tmp_path: Path
) -> None:
    (outcome,) = Learner(tmp_path / "HOME", probe=drawings / "food", **RIDGE).learn(drawings / "food")
    assert "The probe holds classes that are taught here" in " ".join(outcome.notes)
    Learner(learned).export(tmp_path / "out")
    heard: list[str] = []

    class Ear(Watcher):
        def warn(self, text: str) -> None:
            heard.append(text)

    Learner(tmp_path / "new", model=str(tmp_path / "out"), watcher=Ear(), **RIDGE).learn(
        drawings / "food", dry_run=True
    )
    assert any("is an export of perdure: its weights are taken" in text for text in heard)


@pytest.mark.slow
def test_paths_that_hold_other_pictures_are_not_measured(tmp_path: Path, drawings: Path) -> None:
    shutil.copytree(drawings / "food", tmp_path / "food")
    learner = Learner(tmp_path / "HOME", keep="paths", **RIDGE)
    learner.learn(tmp_path / "food")
    assert learner.evaluate()[0].after is not None
    for path in (tmp_path / "food").rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"x")
    assert Learner(tmp_path / "HOME").evaluate()[0].after is None
    assert "--keep paths" in commands(learner.config, learner.history())[0]


def test_names_with_commas_between_or_in_quotation_marks() -> None:
    assert names_in(' cat, "salt,  pepper" ,dog,,') == ["cat", "salt, pepper", "dog"]
    assert names_in('5" pipe,cat') == ['5" pipe', "cat"] and names_in("") == []
    assert names_in("x" * 200_000 + ",cat")[1] == "cat"
