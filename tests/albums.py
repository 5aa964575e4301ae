"""Drawings of the small world laid out as people have their pictures: folders, tars, tables."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from perdure.benchmarks import mini
from perdure.data.task import Task


def tasks(*names: str) -> list[Task]:
    known = {t.name: t for t in mini.multi_domain("I").tasks}
    return [known[name] for name in names]


def drawings(task: Task, label: int, each: int, side: str = "train") -> list[Image.Image]:
    """Some drawings of one class."""
    images = getattr(task, side)
    numbers = (images.labels == label).nonzero().squeeze(1)[:each].tolist()
    return [Image.fromarray(images.pixels[n].permute(1, 2, 0).numpy()) for n in numbers]


def write(task: Task, home: Path, classes: int, each: int, side: str = "train") -> None:
    """Some of a task's drawings as PNG files, a folder a class."""
    for k, one in enumerate(task.classes[:classes]):
        folder = home / one.name.replace(" ", "_")
        folder.mkdir(parents=True)
        for n, drawing in enumerate(drawings(task, k, each, side)):
            drawing.save(folder / f"{n}.png")


def png(drawing: Image.Image) -> bytes:
    held = io.BytesIO()
    drawing.save(held, "png")
    return held.getvalue()


def pack(shard: Path, files: Mapping[str, bytes]) -> Path:
    """A tar of files."""
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return shard


def labelled(task: Task, classes: int, each: int, side: str = "train", named: bool = True) -> dict[str, bytes]:
    """Pictures with their classes beside them, as WebDataset has them."""
    files = {}
    for k, one in enumerate(task.classes[:classes]):
        for n, drawing in enumerate(drawings(task, k, each, side)):
            files[f"{side}/{k}-{n}.png"] = png(drawing)
            files[f"{side}/{k}-{n}.cls"] = (one.name if named else str(k)).encode()
    return files


def table(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
