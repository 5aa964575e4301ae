"""A stream from a folder of pictures: layouts, splits, names, and what cannot be read as one."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from albums import pack, tasks, write

import perdure
from perdure.benchmarks import mini
from perdure.benchmarks.folder import load_folder
from perdure.core.errors import PerdureError
from perdure.data.task import Task
from perdure.launch.configure import configure
from perdure.models.clip import CLIP

pytestmark = pytest.mark.filterwarnings("ignore")


def names(task: Task) -> Sequence[str]:
    return [one.name for one in task.classes]


def test_a_folder_of_classes_is_one_task_and_a_fifth_is_held_out_by_bytes(tmp_path: Path) -> None:
    (digits,) = tasks("digits")
    write(digits, tmp_path / "mine", 4, 12)
    with pytest.warns(UserWarning, match="held out for testing"):
        stream = load_folder(tmp_path / "mine")
    (task,) = stream.tasks
    assert task.name == "mine" and names(task) == sorted(names(task)) and len(task.classes) == 4
    assert len(task.train) + len(task.test) == 48 and 4 <= len(task.test) <= 18
    before = set(task.test.pixels.paths)
    write(digits, tmp_path / "more", 4, 20)
    for k, path in enumerate(sorted((tmp_path / "more").rglob("*.png"))):
        shutil.copy(path, tmp_path / "mine" / path.parent.name / f"new{k}.png")  # copies of the old ones among them
    grown = load_folder(tmp_path / "mine").tasks[0]
    assert before <= set(grown.test.pixels.paths)  # none has moved
    sides = [{p.read_bytes() for p in side.pixels.paths} for side in (grown.train, grown.test)]
    assert not sides[0] & sides[1]  # copies are on one side
    assert load_folder(tmp_path / "mine").digest != stream.digest


def test_a_folder_of_tasks_is_learned_alphabetically_or_in_the_order_given(tmp_path: Path) -> None:
    for task in tasks("food", "digits"):
        write(task, tmp_path / "s" / task.name / "train", 3, 5)
        write(task, tmp_path / "s" / task.name / "test", 3, 4, "test")
    stream = load_folder(tmp_path / "s")
    assert [t.name for t in stream.tasks] == ["digits", "food"] and [t.index for t in stream.tasks] == [0, 1]
    assert [len(t.test) for t in stream.tasks] == [12, 12]
    (tmp_path / "s" / "stream.yaml").write_text("order: [food]\ntemplates: ['a drawing of {}']\nlabels: all\n")
    (tmp_path / "s" / "classes.json").write_text(json.dumps({"zero": "nought"}))
    other = load_folder(tmp_path / "s")
    assert [t.name for t in other.tasks] == ["food", "digits"] and other.labels == "all"
    assert other.tasks[0].classes[0].templates == ("a drawing of {}",) and other.digest != stream.digest
    assert "nought" in names(other.tasks[1])


@pytest.mark.slow
def test_a_run_of_a_folder_is_gone_on_with_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in tasks("digits", "food"):
        write(task, tmp_path / "mine" / task.name, 3, 10)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    metrics = perdure.run("ridge", "mine", out, features=32, tasks=1)
    assert metrics["stream"] == "mine" and metrics["tasks"] == ["digits"] and metrics["last"] > 40
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert perdure.resume(out)["finished"]
    next((tmp_path / "mine" / "digits").rglob("*.png")).unlink()
    with pytest.raises(PerdureError, match="another version of the stream"):
        perdure.resume(out)
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(PerdureError, match="which is gone"):
        perdure.resume(out)


@pytest.mark.slow
def test_what_is_held_out_is_said_once(tmp_path: Path) -> None:
    (digits,) = tasks("digits")
    write(digits, tmp_path / "mine", 2, 6)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        perdure.run("ridge", str(tmp_path / "mine"), tmp_path / "run", features=32)
    assert sum("has no split of its own" in str(one.message) for one in heard) == 1


def test_a_small_model_for_photographs_is_said(tmp_path: Path) -> None:
    (digits,) = tasks("digits")
    write(digits, tmp_path / "mine", 2, 4)
    said: list[str] = []
    configure("ridge", str(tmp_path / "mine"), 0, {}, {}, said.append)
    assert any("model=openai/clip-vit-base-patch16" in text for text in said)
    said.clear()
    configure("ridge", str(tmp_path / "mine"), 0, {"model": str(mini.MODEL)}, {}, said.append)
    assert not said
    embedded, _ = configure("finetune", str(tmp_path / "mine"), 0, {}, {}, said.append)
    other, _ = configure("finetune", str(tmp_path / "mine"), 0, {"model": "someone/clip"}, {}, said.append)
    assert (
        embedded["options"]["lr"] == 2e-4 and other["options"]["lr"] == 1e-5
    )  # what suits drawings suits no other CLIP


def test_names_that_are_no_words_and_shared_classes_are_said(tmp_path: Path) -> None:
    (digits,) = tasks("digits")
    write(digits, tmp_path / "s" / "a", 2, 4)
    write(digits, tmp_path / "s" / "b", 2, 4)
    with pytest.warns(UserWarning) as heard:
        load_folder(tmp_path / "s")
    texts = " ".join(str(w.message) for w in heard)
    assert "classes are in several tasks" in texts
    with pytest.raises(PerdureError, match="'one' is in two steps of s"):  # as that said
        perdure.run("ridge", str(tmp_path / "s"), tmp_path / "run", labels="seen", features=32)
    assert not (tmp_path / "run").exists()
    for k, folder in enumerate(sorted((tmp_path / "s" / "a").iterdir())):
        folder.rename(folder.with_name(f"class_0{k}"))
    with pytest.warns(UserWarning, match="is no word that a model could know"):
        load_folder(tmp_path / "s")


def test_sides_of_a_folder(tmp_path: Path) -> None:
    (digits,) = tasks("digits")
    for side, each in (("train", 4), ("val", 2), ("test", 3)):
        write(digits, tmp_path / "s" / side, 2, each, "test" if side == "test" else "train")
    with pytest.warns(UserWarning, match="the folder 'val' is left out: beside train and test"):
        (task,) = load_folder(tmp_path / "s").tasks
    assert (len(task.train), len(task.test)) == (8, 6)
    shutil.rmtree(tmp_path / "s" / "test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (task,) = load_folder(tmp_path / "s").tasks
    assert (len(task.train), len(task.test)) == (8, 4)
    shutil.rmtree(tmp_path / "s" / "val")
    with pytest.warns(UserWarning, match=r"s has no split of its own: \d of 8 pictures"):  # train alone is none
        (task,) = load_folder(tmp_path / "s").tasks
    assert task.name == "s" and [c.name for c in task.classes] == ["one", "zero"]
    write(digits, tmp_path / "s" / "planes", 2, 4)  # a folder beside it: tasks, one of which is called train
    assert [t.name for t in load_folder(tmp_path / "s").tasks] == ["planes", "train"]
    for name in ("train", "plane"):  # or classes
        shutil.copytree(tmp_path / "s" / "train" / "one", tmp_path / "c" / name)
    assert [c.name for c in load_folder(tmp_path / "c").tasks[0].classes] == ["plane", "train"]


def test_wordnet_ids_are_known_and_a_class_may_have_several_words(tmp_path: Path, clip: CLIP) -> None:
    (digits,) = tasks("digits")
    write(digits, tmp_path / "mine", 3, 5)
    for old, new in (("zero", "n01440764"), ("one", "n99999999")):
        (tmp_path / "mine" / old).rename(tmp_path / "mine" / new)
    with pytest.warns(UserWarning, match=r"'n99999999' is no word that a model could know \(1 of 3 classes\)"):
        plain = load_folder(tmp_path / "mine")
    assert names(plain.tasks[0]) == ["tench", "n99999999", "two"]
    (tmp_path / "mine" / "classes.json").write_text(json.dumps({"n99999999": ["one", "a unit"], "n01440764": "zero"}))
    one = load_folder(tmp_path / "mine").tasks[0].classes[1]
    assert one.prompts() == ["a photo of a one.", "a photo of a a unit."] and one.name == "one"
    texts = clip.encode_text(one.prompts())
    mean = torch.nn.functional.normalize(texts.mean(0), dim=0)
    assert torch.allclose(clip.class_texts([one.prompts()])[0], mean, atol=1e-6)
    assert load_folder(tmp_path / "mine").digest != plain.digest  # what classes are called is part of what a run is


def empty(base: Path) -> None:
    for folder in base.iterdir():
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (empty, "holds no folders"),
        (lambda base: shutil.rmtree(base / "food"), "one class only"),
        (lambda base: (base / "food" / "empty").mkdir(), "empty holds no picture"),
        (lambda base: [p.unlink() for p in base.rglob("*.png")], "holds no pictures where"),
        (lambda base: (base / "stream.yaml").write_text("ordre: [a]"), "Did you mean 'order'"),
        (lambda base: (base / "stream.yaml").write_text("order: [fod]"), "Did you mean 'food'"),
        (lambda base: (base / "stream.yaml").write_text("templates: ['no place']"), "exactly one"),
        (lambda base: (base / "stream.yaml").write_text("labels: some"), "labels is one of"),
        (lambda base: (base / "stream.yaml").write_text("templates:"), "templates must be a list of words, not None"),
        (lambda base: (base / "classes.json").write_text("[1]"), "folder: name"),
        (lambda base: (base / "classes.json").write_text(json.dumps({"zero": ["a", 3]})), "one name"),
        (
            lambda base: (base / "classes.json").write_text(json.dumps({"zero": "same", "one": "Same "})),
            "both called 'same'",
        ),
        (
            lambda base: (base / "digits" / "one").rename(base / "digits" / "Zero_"),
            "'Zero_' and 'zero' are both called",
        ),
        (lambda base: pack(base / "digits" / "x.tar", {}), "holds tars .* and class folders"),
        (lambda base: (base / "digits" / "photos.tar.gz").write_bytes(b""), "is compressed"),
        (lambda base: (base / "stream.yaml").write_text("order: [food, food]"), "names 'food' twice"),
        (lambda base: (base / "digits" / "classes.json").write_text('["zero", "one"'), "is damaged"),
    ],
)
def test_what_is_no_stream_is_said(spoil: Any, said: str, tmp_path: Path) -> None:
    base = tmp_path / "s"
    for task in tasks("digits", "food"):
        write(task, base / task.name, 2, 3)
    if "one class only" in said:
        for extra in sorted((base / "digits").iterdir())[1:]:
            shutil.rmtree(extra)
    spoil(base)
    with pytest.raises(PerdureError, match=said):
        load_folder(base)


def test_a_picture_that_cannot_be_read_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    (digits,) = tasks("digits")
    write(digits, tmp_path / "mine", 3, 6)
    bad = sorted((tmp_path / "mine" / "one").iterdir())[2]
    bad.write_bytes(b"no picture")
    with pytest.raises(PerdureError, match=rf"1 of its (training|test) pictures cannot be read, {bad}"):
        perdure.run("ridge", str(tmp_path / "mine"), tmp_path / "run", features=32)
    assert not (tmp_path / "run").exists()
