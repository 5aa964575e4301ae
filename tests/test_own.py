"""Streams that a YAML file lists, and pictures that cannot be read."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from albums import drawings, labelled, pack, table, tasks, write
from typer.testing import CliRunner

import perdure
from perdure import launch
from perdure.benchmarks.own.pictures import Pictures
from perdure.cli import app
from perdure.core.errors import PerdureError
from perdure.data.files import unreadable

pytestmark = pytest.mark.filterwarnings("ignore")


def loaded(path: Path) -> Any:
    return Pictures(str(path)).settled().load()


# ---- a YAML file


def listing(base: Path) -> dict[str, Any]:
    """Three tasks in three places, and the YAML that lists them."""
    digits, food, tools = tasks("digits", "food", "tools")
    write(digits, base / "here" / "numbers", 3, 5)
    pack(base / "packed" / "0.tar", labelled(food, 3, 5))
    rows = []
    for k in range(2):
        for n, drawing in enumerate(drawings(tools, k, 5)):
            drawing.save(base / f"{k}{n}.png")
            rows.append({"path": f"{k}{n}.png", "kind": str(k)})
    table(base / "tools.csv", rows)
    return {
        "tasks": [
            {"folder": "here/numbers", "name": "digits", "classes": {"zero": ["nought", "zero"]}},
            {"table": "tools.csv", "image_key": "path", "label_key": "kind", "classes": ["saw", "drill"],
             "templates": ["a drawing of a {}."]},
            {"folder": "packed"},
        ],
        "order": ["packed"], "labels": "all", "task_id": "hidden", "templates": ["an icon of {}"],
    }  # fmt: skip


@pytest.mark.slow
def test_a_yaml_file_lists_tasks_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(listing(tmp_path)))
    stream = loaded(tmp_path / "my.yaml")
    assert [t.name for t in stream.tasks] == ["packed", "digits", "tools"] and stream.name == "my"
    assert (stream.labels, stream.task_id) == ("all", "hidden")
    nought = next(c for c in stream.tasks[1].classes if c.name == "nought")
    assert nought.prompts() == ["an icon of nought", "an icon of zero"]
    assert [c.prompts() for c in stream.tasks[2].classes] == [["a drawing of a saw."], ["a drawing of a drill."]]
    monkeypatch.chdir(tmp_path)
    metrics = perdure.run("ridge", "my.yaml", "run", features=32)
    assert metrics["tasks"] == ["packed", "digits", "tools"]
    monkeypatch.chdir("/")
    assert perdure.resume(tmp_path / "run")["finished"]
    (tmp_path / "my.yaml").rename(tmp_path / "stream.yaml")  # beside the pictures it is the folder's stream
    assert [t.name for t in loaded(tmp_path).tasks] == ["packed", "digits", "tools"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda y: y["tasks"][0].update(foldr="x"), "Did you mean 'folder'"),
        (lambda y: y["tasks"][0].pop("folder"), "task 1 must say where its pictures lie"),
        (lambda y: y["tasks"][0].update(folder="nowhere"), "there is no folder .*nowhere"),
        (lambda y: y["tasks"][0].update(folder="here"), None),
        (lambda y: y["tasks"][0].update(label_key="x"), "is for tables and data sets"),
        (lambda y: y["tasks"][1].update(table="no.csv"), "there is no table"),
        (lambda y: y["tasks"][1].update(classes=["saw"]), "the label 1 has no name; there are names for 0 … 0"),
        (lambda y: y["tasks"][1].update(templates=["a drawing"]), "must hold exactly one"),
        (lambda y: y["tasks"][1].update(name=3), "name must be a word"),
        (lambda y: y["tasks"][1].update(classes="saw"), "must say what each class is called"),
        (lambda y: y["tasks"][2].update(name="digits"), "two tasks have one name"),
        (lambda y: y.update(order=["pakced"]), "Did you mean 'packed'"),
        (lambda y: y.update(tasks=[]), "lists no tasks"),
        (lambda y: y.update(tasks={"a": 1}), "tasks must be a list"),
        (lambda y: y["tasks"].append({"dataset": "here"}), "is no folder that save_to_disk wrote"),
    ],
)
def test_what_is_wrong_with_a_listing_is_said(spoil: Callable[[Any], Any], said: str | None, tmp_path: Path) -> None:
    content = listing(tmp_path)
    spoil(content)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(PerdureError, match=said or "one class only|is no task"):
        loaded(tmp_path / "my.yaml")


def test_classes_of_several_tasks_are_said_with_what_competes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tasks("digits")[0], tmp_path / name, 2, 4)
    (tmp_path / "b" / "one").rename(tmp_path / "b" / "One_")
    with pytest.warns(
        UserWarning, match=r"2 classes are in several tasks \('one' in a and b\).*labels=all both compete"
    ):
        loaded(tmp_path)


# ---- pictures that cannot be read


def spoilt(base: Path) -> list[Path]:
    """Forty pictures; two that a look at their first bytes does not give away are cut short."""
    (digits,) = tasks("digits")
    for side in ("train", "test"):
        write(digits, base / side, 2, 10, side)
    bad = [base / "train" / "one" / "3.png", base / "test" / "zero" / "7.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return bad


@pytest.mark.slow
def test_a_share_of_unreadable_pictures_is_tolerated_named_and_the_same_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, said = spoilt(tmp_path / "mine"), list[str]()
    config, stream = launch.configure("ridge", str(tmp_path / "mine"), 0, {"unreadable": 0.05}, {}, said.append)
    (task,) = stream.tasks
    assert [len(task.train), len(task.test)] == [19, 19] and not unreadable(task.train.pixels)
    assert {p for side in (task.train, task.test) for p in side.pixels.paths}.isdisjoint(bad)
    warned = next(text for text in said if "cannot be read" in text)
    assert "2 of 40 pictures" in warned and all(str(path) in warned for path in bad)
    with pytest.raises(
        PerdureError, match="2 of 40 pictures of mine cannot be read .*more than unreadable=0.04 tolerates"
    ):
        perdure.run("ridge", str(tmp_path / "mine"), tmp_path / "no", unreadable=0.04)
    metrics = perdure.run("ridge", str(tmp_path / "mine"), tmp_path / "run", features=32, unreadable=0.05)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [(one["task"], one["side"]) for one in kept["left_out"]] == [("mine", "train"), ("mine", "test")]
    assert kept["split"] == config["split"] != loaded(tmp_path / "mine").digest
    monkeypatch.setattr("perdure.data.tolerated.unreadable", lambda pixels: pytest.fail("decoded again"))
    again = launch.reopen(tmp_path / "run")[1]
    assert again.digest == config["split"] and len(again.tasks[0].train) == 19
    assert perdure.resume(tmp_path / "run")["last"] == metrics["last"]


def test_a_class_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    spoilt(tmp_path / "mine")
    for path in (tmp_path / "mine" / "train" / "one").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(PerdureError, match=r"No training picture of the class 'one' \(mine\) can be read"):
        launch.configure("ridge", str(tmp_path / "mine"), 0, {"unreadable": 0.5}, {})


def test_every_picture_that_cannot_be_read_is_named_by_data_check(tmp_path: Path) -> None:
    bad = spoilt(tmp_path / "mine")
    bad.append(tmp_path / "mine" / "train" / "zero" / "bomb.png")
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    bad[-1].write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    found = CliRunner().invoke(app, ["data", "check", str(tmp_path / "mine")])
    assert found.exit_code == 1 and "3 pictures cannot be read, of 41" in found.output
    assert all(str(path) in found.output for path in bad) and "decompression bomb" in found.output
    with pytest.raises(PerdureError, match=r"1 of its test pictures cannot be read, .*zero/7\.png the first"):
        perdure.run("ridge", str(tmp_path / "mine"), tmp_path / "run")
