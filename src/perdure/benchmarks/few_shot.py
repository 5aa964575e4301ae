"""Few-shot class-incremental streams: a base session with many images, then sessions of N new classes with K images each (Tao
et al., CVPR 2020, arXiv:2004.10956); and base-to-new streams: half of a task's classes learned, the other half asked for only.

Which images the later sessions have is published: ``session_2.txt``, ``session_3.txt`` … a data set, of CIFAR-100 numbers into
its training set, else paths of pictures. They are looked for under ``PERDURE_DATA`` in ``index_list/NAME``, and in
``index_list`` beside the data. Classes are in the data set's own order; the split's identity covers the lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from perdure.benchmarks.class_incremental import (
    HOMES,
    MODEL,
    TEMPLATE,
    Loaded,
    cifar100,
    cub200,
    labelled,
    reading,
    root,
)
from perdure.benchmarks.own.names import spoken
from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.state import as_json, digest
from perdure.data.files import Files
from perdure.data.splits import sizes_of, split_classes, subset
from perdure.data.task import Class, Images, Probe, Stream, Task

SHOTS = 5
MINI_HOME = (
    "miniimagenet/images/*.jpg with miniimagenet/split/train.csv and test.csv, or these in index_list/mini_imagenet"
)


def csv_lines(path: Path) -> list[tuple[str, str]]:
    """The rows ``file name, WordNet id`` of one side of miniImageNet, its head left out."""
    rows = [line.strip().split(",") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    return [(name, wnid) for name, wnid in rows]


@cache
def mini_imagenet(base: Path) -> Loaded:
    """miniImageNet as few-shot class-incremental papers cut it: 500 training and 100 test images of each of 100 classes."""
    home = base / "miniimagenet"
    splits = (home / "split", base / "index_list" / "mini_imagenet")
    split = next((place for place in splits if (place / "train.csv").is_file()), None)
    if split is None or not (home / "images").is_dir():
        lacking = home / "images" if split is not None else " or ".join(str(place / "train.csv") for place in splits)
        raise PerdureError(
            f"miniImageNet is not there: looked for {lacking}. Wanted under {base}: {MINI_HOME}. Put them there, or set "
            "PERDURE_DATA to where they are."
        )
    with reading(split):
        rows = [csv_lines(split / f"{side}.csv") for side in ("train", "test")]
        wnids = sorted({wnid for _, wnid in rows[0]})
        place = {wnid: k for k, wnid in enumerate(wnids)}
        sides = [labelled(home, [(home / "images" / n, place[w]) for n, w in side]) for side in rows]
    (train, one), (test, two) = sides
    return [spoken(wnid) for wnid in wnids], train, test, digest(as_json([one, two]))


# stream → (loader, folder of its data, of its lists, classes of the first session, of each further one, in words)
SESSIONS: dict[str, tuple[Callable[[Path], Loaded], str, str, int, int, str]] = {
    "cifar100-fscil": (cifar100, "cifar-100-python", "cifar100", 60, 5,
                       "Few-shot class-incremental: CIFAR-100, 60 classes, then 8 sessions of 5 classes with 5 images."),
    "cub200-fscil": (cub200, "CUB_200_2011", "cub200", 100, 10,
                     "Few-shot class-incremental: CUB-200-2011, 100 classes, then 10 sessions of 10 with 5 images."),
    "miniimagenet-fscil": (mini_imagenet, "miniimagenet", "mini_imagenet", 60, 5,
                           "Few-shot class-incremental: miniImageNet, 60 classes, then 8 sessions of 5 with 5 images."),
}  # fmt: skip


def home_of(name: str) -> str:
    """What a stream of ``SESSIONS`` wants under ``PERDURE_DATA``, in words."""
    load, _, lists, *_ = SESSIONS[name]
    return f"{HOMES.get(load.__name__, MINI_HOME)}; index_list/{lists}/session_2.txt …"


def load_sessions(name: str) -> Stream:
    """The stream ``name`` of ``SESSIONS``. ``PerdureError`` where its data or lists are not there."""
    load, home, lists, base, increment, summary = SESSIONS[name]
    places = (root() / "index_list" / lists, root() / home / "index_list")
    names, train, test, identity = load(root())
    sizes = sizes_of(len(names), base, increment)
    classes = [Class(n, (TEMPLATE,)) for n in names]
    chosen = listed_images(places, train, classes, sizes, name)
    tasks = split_classes(classes, train.take(chosen), test, list(range(len(names))), sizes)
    whole = digest(as_json([identity, names, base, increment, chosen.tolist(), TEMPLATE]))
    return Stream(
        name, tasks, None, MODEL, whole, labels="seen", task_id="hidden", defaults={"all": {"shots_from": 2}},
        notes=(summary,), base_new="sessions",
    )  # fmt: skip


def listed_images(
    places: Sequence[Path], train: Images, classes: Sequence[Class], sizes: Sequence[int], name: str
) -> Tensor:
    """The numbers (n,) of the training images of all sessions: all of the first session's classes, those listed of the others.

    Raises ``PerdureError`` where the lists are missing, overlap, or have other than ``SHOTS`` images of a session's classes.
    """
    folder = next((place for place in places if (place / "session_2.txt").is_file()), None)
    if folder is None:
        raise PerdureError(
            f"The lists of images of {name} are not there: looked for session_2.txt in {places[0]} and in {places[1]}. They "
            "come with CEC's release (data/index_list), and with most that follow it. Put them there."
        )
    numbers, first = key_numbers(train), sizes[0]
    chosen = [(train.labels < first).nonzero().squeeze(1)]
    for session, size in enumerate(sizes[1:], 2):
        path = folder / f"session_{session}.txt"
        index = torch.tensor(read_list(path, numbers), dtype=torch.int64)
        check_session(path, train.labels[index], classes, range(first, first + size))
        chosen.append(index)
        first += size
    return torch.cat(chosen)


def check_session(path: Path, labels: Tensor, classes: Sequence[Class], wanted: range) -> None:
    """Refuse a list with images of another session's classes, or other than ``SHOTS`` of one of its own."""
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    for k, count in enumerate(counts):
        if count and k not in wanted:
            raise PerdureError(
                f"Sessions overlap: {path} lists images of '{classes[k].name}', a class of another session. Its own are "
                f"'{classes[wanted[0]].name}' to '{classes[wanted[-1]].name}'."
            )
        if k in wanted and count != SHOTS:
            raise DamagedFile(f"{path} lists {count} images of '{classes[k].name}', not {SHOTS}. Copy it anew.")


def key_numbers(train: Images) -> dict[str, int]:
    """What a list calls a training image → its number: its number, or the end of its path."""
    if not isinstance(train.pixels, Files):
        return {str(number): number for number in range(len(train))}
    return {Path(str(path)).name: number for number, path in enumerate(train.pixels.paths)}


def read_list(path: Path, numbers: dict[str, int]) -> list[int]:
    """The numbers of the images that a list names."""
    if not path.is_file():
        raise PerdureError(
            f"The list {path.name} is missing: looked for it in {path.parent}, where others are. Copy it anew."
        )
    keys = [
        line.strip().replace("\\", "/").rsplit("/", 1)[-1] for line in path.read_text().splitlines() if line.strip()
    ]
    if strange := [key for key in keys if key not in numbers]:
        raise DamagedFile(f"{path} lists '{strange[0]}', which is no training image of the data set. Copy it anew.")
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise DamagedFile(f"{path} lists '{twice[0]}' twice. Copy it anew.")
    return [numbers[key] for key in keys]


# ---- base to new


def base_to_new(stream: Stream, task: Task, name: str, shots: int) -> Stream:
    """The first half of a task's classes as a stream of one task, ``shots`` training images a class unless ``shots=`` says
    otherwise; the other half is the probe, which nothing teaches (Zhou et al., CVPR 2022, arXiv:2203.05557)."""
    half = -(-len(task.classes) // 2)
    numbers = range(len(task.classes))
    base = Task("base", task.classes[:half], subset(task.train, numbers[:half]), subset(task.test, numbers[:half]))
    return replace(
        stream, name=name, tasks=(base,), probe=Probe(task.classes[half:], subset(task.test, numbers[half:])),
        digest=digest(as_json([stream.digest, task.name, half])), labels="task", task_id="known", base_new="probe",
        defaults={**stream.defaults, "all": {**stream.defaults.get("all", {}), "shots": shots}},
    )  # fmt: skip
