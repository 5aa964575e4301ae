"""Pictures in tables: metadata beside them, a CSV file as a stream, what is wrong with either, and a run from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from albums import drawings, table, tasks
from typer.testing import CliRunner

import perdure
from perdure import launch
from perdure.benchmarks.folder import load_folder
from perdure.benchmarks.own.pictures import Pictures
from perdure.cli import app
from perdure.core.errors import PerdureError

pytestmark = pytest.mark.filterwarnings("ignore")
Rows = list[dict[str, str]]


def listed(base: Path, *names: str, each: int = 8) -> Rows:
    """Pictures in one folder, and the rows of a table that lists them."""
    rows = []
    (base / "all").mkdir(parents=True)
    for task in tasks(*names):
        for k in range(2):
            for n, drawing in enumerate(drawings(task, k, each)):
                name = f"all/{task.name}{k}{n}.png"
                drawing.save(base / name)
                rows.append({"filepath": name, "title": task.classes[k].name, "fold": ["train", "val"][n % 4 == 0],
                             "month": task.name})  # fmt: skip
    return rows


@pytest.mark.slow
def test_a_csv_is_a_stream_that_goes_on_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = listed(tmp_path, "food", "digits")
    table(tmp_path / "mine.csv", rows)
    monkeypatch.chdir(tmp_path)
    words = (
        "run --method ridge --stream mine.csv --image-key filepath --label-key title --split-key fold --task-key month"
    )
    done = CliRunner().invoke(app, [*words.split(), "--out", "run", "features=32"], catch_exceptions=False)
    assert done.exit_code == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["tasks"] == ["food", "digits"] and metrics["stream"] == "mine"  # as the table first names them
    source = json.loads((tmp_path / "run" / "config.json").read_text())["source"]["stream"]
    assert source["where"] == str(tmp_path / "mine.csv") and source["task_key"] == "month"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert perdure.resume(tmp_path / "run")["finished"] and launch.reopen(tmp_path / "run")[1].tasks[0].name == "food"
    launch.export(tmp_path / "run", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert CliRunner().invoke(app, ["report", str(tmp_path / "run")]).exit_code == 0
    asked = Pictures("../mine.csv", "filepath", "title", "fold", "month")
    assert perdure.run("ridge", asked, tmp_path / "again", features=32)["last"] == metrics["last"]
    table(tmp_path / "mine.csv", rows[:-1])
    with pytest.raises(PerdureError, match="another version of the stream"):
        perdure.resume(tmp_path / "run")
    (tmp_path / "mine.csv").unlink()
    with pytest.raises(PerdureError, match="which is gone"):
        perdure.resume(tmp_path / "run")


def named(rows: Rows) -> Rows:
    return [{"file_name": row["filepath"], "label": row["title"]} for row in rows]


def loaded(path: Path, **keys: str) -> Any:
    return Pictures(str(path), **keys).settled().load()


@pytest.mark.parametrize("form", ["csv", "tabs", "semicolons", "jsonl", "excel"])
def test_the_forms_that_tables_have(form: str, tmp_path: Path) -> None:
    rows = named(listed(tmp_path, "digits"))
    rows[0]["label"] = 'one, "two"\nthree'
    rows[1]["label"] = rows[0]["label"]
    path = table(tmp_path / "t.csv", rows)
    plain = loaded(path)
    text = path.read_bytes().decode()
    if form == "jsonl":
        path = tmp_path / "t.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif form == "excel":
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    elif form != "csv":
        path.write_text(text.replace(", ", "§").replace(",", {"tabs": "\t"}.get(form, ";")).replace("§", ", "))
    other = loaded(path)
    assert other.digest == plain.digest and len(other.tasks[0].train) + len(other.tasks[0].test) == 16
    assert len(other.tasks[0].classes) == 3


def test_metadata_beside_pictures_with_captions_and_sides(tmp_path: Path) -> None:
    rows = [{**row, "text": f"picture {n}"} for n, row in enumerate(named(listed(tmp_path / "s", "digits")))]
    table(tmp_path / "s" / "metadata.csv", rows)
    (task,) = load_folder(tmp_path / "s").tasks
    assert task.name == "s" and len(task.train) + len(task.test) == 16
    numbers = {tmp_path / "s" / row["file_name"]: row["text"] for row in rows}
    assert task.train.captions == tuple(numbers[p] for p in task.train.pixels.paths)
    for side in ("train", "test"):  # sides by the folders that the table's names begin with
        (tmp_path / "s" / side).mkdir()
    for n, row in enumerate(rows):
        old, row["file_name"] = row["file_name"], f"{'test' if n % 4 == 0 else 'train'}/{n}.png"
        (tmp_path / "s" / old).rename(tmp_path / "s" / row["file_name"])
    table(tmp_path / "s" / "metadata.csv", rows[:-1])
    with pytest.warns(UserWarning, match=r"1 pictures beside it are not in it and are left out: 15\.png"):
        (task,) = load_folder(tmp_path / "s").tasks
    assert len(task.train) == 11 and len(task.test) == 4
    (tmp_path / "s" / "metadata.csv").unlink()
    for side in ("train", "test"):  # or a table a side
        own = [{"file_name": r["file_name"].split("/")[1], "label": r["label"]} for r in rows[:-1]
               if r["file_name"].startswith(side)]  # fmt: skip
        table(tmp_path / "s" / side / "metadata.csv", own)
    (other,) = load_folder(tmp_path / "s").tasks
    assert [len(other.train), len(other.test)] == [11, 4] and other.train.captions is None


@pytest.mark.slow
def test_captions_alone_are_classes_of_their_own(tmp_path: Path) -> None:
    rows = [{"file_name": row["filepath"], "text": f"a  {row['title']}, the {n}-th"} for n, row in
            enumerate(listed(tmp_path, "digits"))]  # fmt: skip
    rows[1]["text"] = "A zero, the 0-th"  # as the first one, but for case and spaces
    with pytest.warns(UserWarning, match="texts and no classes, so that each of 15 texts"):
        (task,) = loaded(table(tmp_path / "t.csv", rows)).tasks
    assert len(task.classes) == 15 and len(task.train) + len(task.test) == 16
    by_name = {row["file_name"]: row["text"] for row in rows}
    for images in (task.train, task.test):
        assert len(images)
        for path, label in zip(images.pixels.paths, images.labels.tolist(), strict=True):
            own = by_name[path.relative_to(tmp_path).as_posix()]
            assert task.classes[label].prompts() == [{"A zero, the 0-th": rows[0]["text"]}.get(own, own)]
    assert task.train.captions == tuple(by_name[p.relative_to(tmp_path).as_posix()] for p in task.train.pixels.paths)
    done = perdure.run("finetune", str(tmp_path / "t.csv"), tmp_path / "run", iterations=2, loss="contrastive")
    assert done["finished"]
    sides = [{**row, "fold": "test" if n % 4 == 0 else "train", "label": "x" if n % 4 else ""} for n, row in
             enumerate(rows)]  # fmt: skip
    for k, side in enumerate(("train", "test")):
        (tmp_path / "s" / side).mkdir(parents=True)
        own_rows = [r for r in sides if r["fold"] == side]
        for n, row in enumerate(own_rows):
            (tmp_path / row["file_name"]).rename(tmp_path / "s" / side / f"{n}.png")
        keys = ("label", "text")[k:]
        table(tmp_path / "s" / side / "metadata.csv",
              [{"file_name": f"{n}.png", **{key: row[key] for key in keys}} for n, row in enumerate(own_rows)])  # fmt: skip
    with pytest.raises(PerdureError, match="4 of its 16 pictures have a text but no class"):
        load_folder(tmp_path / "s")


def change(**cells: str) -> Callable[[Rows], Rows]:
    return lambda rows: [{**rows[0], **cells}, *rows[1:]]


def renamed(old: str, new: str) -> Callable[[Rows], Rows]:
    return lambda rows: [{new if key == old else key: value for key, value in row.items()} for row in rows]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (renamed("label", "lable"), "no column 'label'. Did you mean 'lable'"),
        (renamed("file_name", "filename"), "Did you mean 'filename'.*--image-key"),
        (lambda rows: renamed("label", "text")(change(label="")(rows)), "1 rows have nothing under 'text', line 2 the first"),
        (change(label="-1"), "label -1 has no name"),
        (change(file_name="gone.png"), "1 of its 16 pictures are not there: gone.png"),
        (change(label=" "), "1 rows have nothing under 'label', line 2 the first"),
        (lambda rows: [{**row, "file_name": f"no/{n}.png"} for n, row in enumerate(rows)], "16 of its 16 .* no/2.png, …"),
        (lambda rows: [*rows, {**rows[0], "label": "other"}], "lists all/digits00.png twice"),
        (lambda rows: rows[:1], "one class only"),
        (change(label="ZERO"), "both called 'zero'"),
        (change(label="0"), "t.csv: the label 0 has no name"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_said(spoil: Callable[[Rows], Rows], said: str, tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", spoil(named(listed(tmp_path, "digits"))))
    if "no name" in said:
        (tmp_path / "classes.json").write_text(json.dumps({"1": "one", "2": "two"}))
    with pytest.raises(PerdureError, match=said):
        loaded(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"), ("file_name,label\n", "is empty"), ("file_name,label\na.png\n", "line 2: there are fewer cells"),
        ("file_name,label\na.png,b,c\n", "line 2: there are more cells"), ("label,label\na,b\n", "two columns 'label'"),
        ('file_name,label\n"a.png,b\n', "cannot be read"), ("file_name,label\n\xff,b\n", "not UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_said(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="latin-1")
    with pytest.raises(PerdureError, match=said):
        loaded(tmp_path / "t.csv")


def test_splits_of_a_table(tmp_path: Path) -> None:
    rows: Sequence[Mapping[str, str]] = [
        {"file_name": row["filepath"], "label": row["title"], "split": ["Train", "val", "test"][n % 3]}
        for n, row in enumerate(listed(tmp_path, "digits"))
    ]
    path = table(tmp_path / "t.csv", rows)
    with pytest.warns(UserWarning, match="column 'split' is not used; --split-key split would"):
        loaded(path)
    with pytest.warns(UserWarning, match="5 pictures of the split 'val' are left out"):
        (task,) = loaded(path, split_key="split").tasks
    assert len(task.train) == 6 and len(task.test) == 5
    table(path, [{**row, "split": "half"} for row in rows])
    with pytest.raises(PerdureError, match="line 2: the split is 'train', 'test' or 'val', not 'half'"):
        loaded(path, split_key="split")
    table(path, [{**row, "split": "train"} for row in rows])
    with pytest.raises(PerdureError, match="no picture is in the split 'test'"):
        loaded(path, split_key="split")


@pytest.mark.parametrize(
    ("where", "keys", "said"),
    [
        ("all", {"label_key": "a"}, "--label-key names a column of a table"),
        ("mini-mtil", {"task_key": "a"}, "--task-key names"),
        ("no.csv", {}, "There is no file"), ("t.csv", {"label_key": "lab"}, "no column 'lab'. Did you mean 'label'"),
    ],
)  # fmt: skip
def test_columns_are_of_tables(where: str, keys: dict[str, str], said: str, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    table(tmp_path / "t.csv", named(listed(tmp_path, "digits")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PerdureError, match=said):
        launch.stream_of(Pictures(where, **keys))
