"""Class-incremental streams: classes cut into steps, orders, data in their usual places, input that is wrong."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import perdure
from perdure import launch
from perdure.benchmarks import STREAMS, class_incremental, mini
from perdure.core.errors import DamagedFile, PerdureError
from perdure.data.files import Files
from perdure.data.splits import read_order, reordered, sizes_of, split_classes
from perdure.data.task import Class, Images, Stream

CLASSES = tuple(Class(n, ("a {}",)) for n in "abcdef")


def images(count: int = 12, classes: int = 6) -> Images:
    return Images(
        torch.arange(count)[:, None, None, None].expand(-1, 3, 2, 2).to(torch.uint8), torch.arange(count) % classes
    )


def test_classes_are_cut_in_the_order_given() -> None:
    tasks = split_classes(CLASSES, images(), images(6), [5, 0, 3, 1, 2, 4], sizes_of(6, 2, 2))
    assert [[c.name for c in t.classes] for t in tasks] == [["f", "a"], ["d", "b"], ["c", "e"]]
    for task in tasks:
        for pixel, label in zip(task.train.pixels[:, 0, 0, 0], task.train.labels, strict=True):
            assert CLASSES[int(pixel) % 6] == task.classes[label]
    assert sum(len(t.train) for t in tasks) == 12 and [len(t.test) for t in tasks] == [2, 2, 2]
    assert sizes_of(200, 100, 20) == [100, 20, 20, 20, 20, 20]


@pytest.mark.parametrize(
    ("order", "sizes", "said"),
    [
        ([0, 1, 2, 3, 4], [6], "5 entries, but there are 6 classes"),
        ([0, 1, 2, 3, 4, 4], [6], "class 4 is in it twice"),
        ([0, 1, 2, 3, 4, 9], [6], "names classes that are not there"),
        ([0, 1, 2, 3, 4, 5], [3, 0, 3], "at least one a step"),
        ([0, 1, 2, 3, 4, 5], [3, 2], "do not share out 6 classes"),
    ],
)
def test_orders_and_steps_that_do_not_fit(order: list[int], sizes: list[int], said: str) -> None:
    with pytest.raises(PerdureError, match=said):
        split_classes(CLASSES, images(), images(), order, sizes)


def test_a_class_in_two_steps_and_a_step_without_images() -> None:
    twice = (*CLASSES[:5], CLASSES[0])
    with pytest.raises(PerdureError, match="two classes of the name 'a'"):
        split_classes(twice, images(), images(), range(6), [3, 3])
    with pytest.raises(PerdureError, match=r"step_02 .* has no test images"):
        split_classes(CLASSES, images(), images(3), range(6), [3, 3])
    step = mini.class_incremental().tasks[0]
    with pytest.raises(PerdureError, match="is in two steps of again"):
        Stream("again", (step, replace(step, name="b")), None, "", "", labels="seen")


def test_labels_out_of_range_and_uneven_steps() -> None:
    with pytest.raises(PerdureError, match=r"Labels of training images must lie in 0 … 5"):
        split_classes(CLASSES, images(8, 8), images(), range(6), [6])
    with pytest.raises(PerdureError, match="100 classes cannot be cut into 50 and then 7"):
        sizes_of(100, 50, 7)


def order_file(folder: Path, names: Any) -> str:
    path = folder / "order.json"
    path.write_text(json.dumps(names))
    return str(path)


def test_an_order_is_a_seed_or_a_file(tmp_path: Path) -> None:
    stream = mini.class_incremental()
    names = [c.name for t in stream.tasks for c in t.classes]
    by_seed, again = reordered(stream, "3"), reordered(stream, "3")
    assert by_seed.digest == again.digest != stream.digest != reordered(stream, "4").digest
    assert sorted(c.name for t in by_seed.tasks for c in t.classes) == sorted(names)
    back = reordered(stream, order_file(tmp_path, names[::-1]))
    assert [c.name for t in back.tasks for c in t.classes] == names[::-1]
    first, last = stream.tasks[0], back.tasks[-1]
    mine = first.train.pixels[first.train.labels == 0]
    assert torch.equal(mine, last.train.pixels[last.train.labels == len(last.classes) - 1])
    for wrong, said in (
        (names[:-1], "lists 59 classes, but the stream has 60"),
        ([*names[:-1], names[0]], f"lists the class '{names[0]}' twice"),
        ([*names[:-1], "unicorn"], "no class 'unicorn'"),
        ({"a": 1}, "must hold a JSON list"),
    ):
        with pytest.raises(PerdureError, match=said):
            read_order(order_file(tmp_path, wrong), names)
    with pytest.raises(PerdureError, match="neither a seed"):
        reordered(stream, "nowhere.json")
    with pytest.raises(PerdureError, match="its tasks are domains"):
        reordered(mini.multi_domain("I"), "1")


@pytest.mark.slow
def test_a_run_keeps_its_class_order_whatever_becomes_of_the_file(tmp_path: Path) -> None:
    names = [c.name for t in mini.class_incremental().tasks for c in t.classes]
    path = order_file(tmp_path, names[::-1])
    short: dict[str, Any] = {"class_order": path, "tasks": 1, "images": 8}
    before = perdure.run("zero_shot", "mini-cil", tmp_path / "run", **short)
    Path(path).unlink()
    assert launch.reopen(tmp_path / "run")[1].tasks[0].classes[0].name == names[-1]
    assert launch.resume(tmp_path / "run")["accuracy"] == before["accuracy"]


# ---- data in their usual places


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path))
    for load in (class_incremental.vtab, class_incremental.cub200, class_incremental.tiny_imagenet):
        load.cache_clear()
    class_incremental.imagenet_r.cache_clear()
    return tmp_path


def draw(path: Path, shade: int, size: tuple[int, int] = (20, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)
    return path


@pytest.mark.slow
def test_vtab_from_folders_learns_and_is_read_as_needed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(50):
        for side, count in (("train", 2), ("test", 1)):
            for n in range(count):
                draw(home / "vtab" / side / f"class_{k:02d}" / f"{n}.png", k * 5)
    stream = STREAMS["vtab-5"].value()
    assert [len(t.classes) for t in stream.tasks] == [10] * 5 and isinstance(stream.tasks[0].train.pixels, Files)
    third = stream.tasks[2]
    assert third.train.pixels[:].shape == (20, 3, 224, 224) and int(third.train.pixels[:][-1].float().mean()) == 29 * 5
    metrics = perdure.run(
        "ncm", "vtab-5", home / "run", model=str(mini.MODEL), tasks=2, images=8, labels="seen", class_order=1
    )
    assert metrics["finished"] and metrics["incremental_last"] is not None
    monkeypatch.delenv("PERDURE_DATA")  # elsewhere, and with nothing said, the run knows where its data lie
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    class_incremental.vtab.cache_clear()
    assert perdure.resume(home / "run")["finished"] and "PERDURE_DATA" not in os.environ
    monkeypatch.setenv("PERDURE_DATA", str(home))
    draw(home / "vtab" / "train" / "class_00" / "new.png", 1)
    class_incremental.vtab.cache_clear()
    assert STREAMS["vtab-5"].value().digest != stream.digest


def test_splits_are_written_down_never_drawn_silently(home: Path) -> None:
    for k in range(200):
        for n in range(5):
            draw(home / "imagenet-r" / f"n{k:08d}" / f"{n}.png", k)
    with pytest.raises(PerdureError, match="none is drawn silently"):
        STREAMS["imagenet-r-10"].value()
    class_incremental.write_split(home / "imagenet-r", 0.8, 42)
    stream: Stream = STREAMS["imagenet-r-10"].value()
    assert [len(t.classes) for t in stream.tasks] == [20] * 10
    assert sum(len(t.train) for t in stream.tasks) == 800 and sum(len(t.test) for t in stream.tasks) == 200
    order = class_incremental.published()["orders"]["imagenet_R"]
    assert stream.tasks[0].classes[0].name == class_incremental.published()["classnames"]["imagenet_R"][order[0]]
    with pytest.raises(PerdureError, match="Remove it first"):
        class_incremental.write_split(home / "imagenet-r", 0.8, 1)


def test_cub_and_tiny_imagenet_as_they_unpack(home: Path) -> None:
    cub, tiny = home / "CUB_200_2011", home / "tiny-imagenet-200"
    paths = [f"{k:03d}.Bird_{k}/{n}.png" for k in range(1, 201) for n in range(2)]
    for number, path in enumerate(paths):
        draw(cub / "images" / path, number % 256)
    lines = {
        "classes.txt": [f"{k} {k:03d}.Bird_{k}" for k in range(1, 201)],
        "images.txt": [f"{n + 1} {p}" for n, p in enumerate(paths)],
        "image_class_labels.txt": [f"{n + 1} {n // 2 + 1}" for n in range(400)],
        "train_test_split.txt": [f"{n + 1} {n % 2}" for n in range(400)],
    }
    for name, rows in lines.items():
        (cub / name).write_text("\n".join(rows) + "\n")
    birds = STREAMS["cub200-10"].value()
    assert [(len(t.classes), len(t.train), len(t.test)) for t in birds.tasks] == [(20, 20, 20)] * 10
    assert birds.tasks[0].classes[0].name == "Bird 1"

    for k in range(200):
        draw(tiny / "train" / f"n{k:03d}" / "images" / "0.png", k)
        draw(tiny / "val" / "images" / f"val_{k}.png", k)
    (tiny / "words.txt").write_text("".join(f"n{k:03d}\tthing {k}, other\n" for k in range(200)))
    (tiny / "val" / "val_annotations.txt").write_text("".join(f"val_{k}.png\tn{k:03d}\t0\t0\n" for k in range(200)))
    steps = STREAMS["tiny-imagenet-10"].value()
    assert [len(t.classes) for t in steps.tasks] == [100] + [10] * 10 and steps.tasks[1].classes[0].name == "thing 100"
    assert int(steps.tasks[1].test.pixels[:][0].float().mean()) == 100


def test_data_that_are_not_there_or_not_images(home: Path) -> None:
    with pytest.raises(PerdureError, match=r"not at .*CUB_200_2011.*PERDURE_DATA"):
        STREAMS["cub200-10"].value()
    for side in ("train", "test"):
        draw(home / "vtab" / side / "a" / "0.png", 1)
    draw(home / "vtab" / "train" / "b" / "0.png", 1)
    with pytest.raises(PerdureError, match="'b' is in only one of train and test"):
        STREAMS["vtab-5"].value()
    (home / "CUB_200_2011").mkdir()
    with pytest.raises(DamagedFile, match=r"lists in .*CUB_200_2011"):
        STREAMS["cub200-10"].value()
    draw(home / "imagenet100" / "train" / "n01440764" / "0.png", 1)
    with pytest.raises(PerdureError, match="another hundred classes"):
        STREAMS["imagenet100-10"].value()
    with pytest.raises(PerdureError, match="share=1"):
        class_incremental.write_split(home, 1.0, 0)
    (home / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DamagedFile, match=r"broken\.png is no image"):
        Files((home / "broken.png",), 8)[:]
    tall = Files((draw(home / "tall.png", 9, (10, 31)),), 8)
    assert tall[:].shape == (1, 3, 8, 8) and len(list(tall.split(4))) == 1
