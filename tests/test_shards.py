"""Pictures in tars: read where they lie by many threads, like pictures in folders; what is damaged is said before training."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from albums import drawings, labelled, pack, png, tasks, write

import perdure
from perdure.benchmarks.folder import load_folder
from perdure.core.errors import DamagedFile, PerdureError
from perdure.data.files import Files, cannot_be_read, stacked, unreadable
from perdure.data.places import Place, index
from perdure.data.transforms import some_numbers

pytestmark = pytest.mark.filterwarnings("ignore")


def shards(base: Path, **more: Any) -> Path:
    (digits,) = tasks("digits")
    pack(base / "train" / "a.tar", labelled(digits, 3, 5, **more))
    pack(base / "test" / "b.tar", labelled(digits, 3, 3, "test", **more))
    return base


def test_pictures_in_tars_are_those_in_folders(tmp_path: Path) -> None:
    (digits,) = tasks("digits")
    packed = load_folder(shards(tmp_path / "s")).tasks[0]
    for side, each in (("train", 5), ("test", 3)):
        write(digits, tmp_path / "f" / side, 3, each, side)
    files = load_folder(tmp_path / "f").tasks[0]
    assert [c.name for c in packed.classes] == [c.name for c in files.classes]
    for side in ("train", "test"):
        mine, theirs = getattr(packed, side), getattr(files, side)
        assert isinstance(mine.pixels.paths[0], Place) and torch.equal(mine.labels, theirs.labels)
        assert torch.equal(mine.pixels[:], theirs.pixels[:])
    numbers, order = some_numbers(4, torch.Generator().manual_seed(1)), torch.tensor([7, 0, 3, 3])
    both = [x.train.pixels for x in (packed, files)]
    assert torch.equal(*(x.crops(order, 20, numbers) for x in both)) and torch.equal(*(x.at(16)[order] for x in both))
    assert torch.equal(torch.cat(list(both[0].split(4))), both[1][:])


def test_many_threads_read_one_tar(tmp_path: Path) -> None:
    files = load_folder(shards(tmp_path / "s")).tasks[0].train.pixels
    order = torch.randint(len(files), (200,), generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(files.read, files.select(order).paths))
    assert torch.equal(stacked(found, files.side), files[:][order])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_every_form_of_tar_have_their_bytes_where_the_index_says(form: int, tmp_path: Path) -> None:
    (tmp_path / ("deep" * 20)).mkdir()
    for name in (f"{'deep' * 20}/{'n' * 90}.txt", "b.txt"):
        (tmp_path / name).write_text(name * 50)
    (tmp_path / "link.txt").symlink_to("b.txt")
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        for path in sorted(tmp_path.rglob("*.txt")):
            tar.add(path, path.relative_to(tmp_path).as_posix())
    found = index(tmp_path / "x.tar")
    assert len(found) == 2  # a link has no bytes of its own
    assert all(place.read_bytes().decode() == place.name * 50 for place in found)


def test_tasks_in_tars_numbers_captions_and_json(tmp_path: Path) -> None:
    digits, food = tasks("digits", "food")
    plain = labelled(digits, 3, 6, named=False)
    pack(tmp_path / "s" / "digits" / "0.tar", {k: v for k, v in plain.items() if k.startswith("train/0")})
    pack(tmp_path / "s" / "digits" / "1.tar", {k: v for k, v in plain.items() if not k.startswith("train/0")})
    (tmp_path / "s" / "digits" / "classes.json").write_text(json.dumps(["nought", "one", "two"]))
    files: dict[str, bytes] = {}
    for k in range(2):
        for n, drawing in enumerate(drawings(food, k, 6)):
            files |= {f"{k}{n}.PNG": png(drawing), f"{k}{n}.json": json.dumps({"label": f"dish {k}x"}).encode()}
            files |= {f"{k}{n}.txt": f"dish {k} number {n}".encode()} if k else {}
    pack(tmp_path / "s" / "food" / "0.tar", {**files, "about.md": b"mine"})
    with pytest.warns(UserWarning) as heard:
        stream = load_folder(tmp_path / "s")
    first, second = stream.tasks
    assert [c.name for c in first.classes] == ["nought", "one", "two"] and first.train.captions is None
    assert [c.name for c in second.classes] == ["dish 0x", "dish 1x"]
    texts = [c for c in second.train.captions or () if "number" in c]
    assert texts and set(second.train.captions or ()) - set(texts) == {"a photo of a dish 0x."}
    said = " ".join(str(w.message) for w in heard)
    assert "training pictures have no text" in said and "1 files in tars belong to no picture" in said


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: cut(p, p.stat().st_size // 2), "cut short"),
        (lambda p: cut(p, index(p)[4].offset - 512), "after 4 files: it lacks the mark"),  # exactly between two files
        (lambda p: cut(p, index(p)[4].offset - 100), "cut short"),  # within a head
        (lambda p: cut(p, 0), "cut short"),
        (lambda p: p.write_bytes(b"no tar" * 1000), "cut short, damaged or compressed"),
        (lambda p: p.write_bytes(gzip.compress(p.read_bytes())), "compressed"),
        (lambda p: p.write_bytes(damaged_head(p)), "cut short or damaged after 4 files"),
        (lambda p: pack(p, {"a.png": b"", "b.cls": b"1"}), "1 of 1 pictures have no class"),
        (lambda p: pack(p, {"a.png": b"", "a.jpg": b"", "a.cls": b"1"}), "is several pictures"),
        (lambda p: pack(p, {"a.png": b"", "a.json": b'{"label": null}'}), "have no class"),
        (lambda p: pack(p, {"a.png": b"", "a.json": b"{"}), "a.json is damaged"),
        (lambda p: pack(p, {"a.png": b"", "a.cls": b"\xff\xfe"}), "a.cls is no text"),
        (lambda p: pack(p, {}), "no training pictures of the class"),
    ],
)
def test_what_is_damaged_is_said_before_training(spoil: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    shards(tmp_path / "s")
    spoil(tmp_path / "s" / "train" / "a.tar")
    with pytest.raises(PerdureError, match=said):
        perdure.run("ridge", str(tmp_path / "s"), tmp_path / "run", features=32)
    assert not (tmp_path / "run").exists()


def damaged_head(path: Path) -> bytes:
    data, at = bytearray(path.read_bytes()), index(path)[4].offset - 512
    data[at + 5] ^= 1  # a letter of the name: the checksum of the head is wrong
    return bytes(data)


def test_a_name_that_is_in_a_tar_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for _ in range(2):
            (tmp_path / "a.png").write_bytes(b"x")
            tar.add(tmp_path / "a.png", "a.png")
    with pytest.raises(DamagedFile, match=r"holds a\.png twice"):
        index(tmp_path / "x.tar")


def test_a_picture_in_a_tar_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (digits,) = tasks("digits")
    files = labelled(digits, 2, 4)
    pack(tmp_path / "x.tar", {**files, "train/0-1.png": b"no picture", "train/1-2.png": files["train/1-2.png"][:200]})
    places = tuple(p for p in index(tmp_path / "x.tar") if p.name.endswith(".png"))
    held = Files(places, 8)
    assert [p.name for p in cannot_be_read(held) if isinstance(p, Place)] == ["train/0-1.png", "train/1-2.png"]
    assert sorted(unreadable(held)) == [1, 6]
    with pytest.raises(DamagedFile, match=r"x\.tar/train/0-1\.png is no image .*: its first bytes are no picture's"):
        held[:]
    os.truncate(tmp_path / "x.tar", places[5].offset)
    with pytest.raises(DamagedFile, match="the archive ends within it"):
        held[5:6]
