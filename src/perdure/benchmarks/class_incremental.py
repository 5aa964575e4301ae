"""Class-incremental streams of the field's data sets: a data set's classes cut into steps, all seen so far competing.

Data lie under ``PERDURE_DATA`` (default: ``data``), each where its own archive unpacks to; ``HOMES`` has the folders.
CIFAR-100 is fetched there by torchvision if it can be. Class orders are MG-CLIP's where it published one, else the order of
the classes in the data set; another with ``class_order=SEED`` or ``class_order=FILE``. A split's identity covers every file
name, label and the order. No split is drawn silently: where a data set comes without one (ImageNet-R), it is taken from
``split.json``, which ``write_split`` writes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.paths import expanded
from perdure.core.state import as_json, digest, read_json, write_json
from perdure.data.files import Files
from perdure.data.folders import folders, pictures, say_odd_kinds
from perdure.data.splits import sizes_of, split_classes
from perdure.data.task import Class, Images, Stream

MODEL, TEMPLATE, SIDE = "openai/clip-vit-base-patch16", "a good photo of a {}.", 224
FIRST_HUNDRED = ("n01440764", "n01855672")
HOMES = {
    "cifar100": "cifar-100-python, as unpacked",
    "imagenet100": "imagenet100/train/WNID and imagenet100/val/WNID, the hundred classes of the published order",
    "imagenet_r": "imagenet-r/WNID with imagenet-r/split.json, or imagenet-r/train/WNID and imagenet-r/test/WNID",
    "tiny_imagenet": "tiny-imagenet-200, as unpacked",
    "cub200": "CUB_200_2011, as unpacked",
    "vtab": "vtab/train/CLASS and vtab/test/CLASS, fifty classes of five data sets, ten each, in their order",
}
Loaded = tuple[list[str], Images, Images, str]  # class names, training and test images, identity


def root() -> Path:
    """Where data sets lie: ``PERDURE_DATA``, or ``data`` in the working directory."""
    return expanded(os.environ.get("PERDURE_DATA", "data")).resolve()


def published() -> Any:
    """Class orders and names of MG-CLIP's runs."""
    return json.loads((files("perdure") / "benchmarks" / "facts" / "class_orders.json").read_text(encoding="utf-8"))


def there(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        raise PerdureError(
            f"The data of {what} are not at {folder}. Wanted under {root()}: {HOMES[what]}. "
            "Put them there, or set PERDURE_DATA to where they are."
        )
    return folder


@contextlib.contextmanager
def reading(home: Path) -> Iterator[None]:
    """The lists that come with a data set: one that is missing, cut short or of another form is said so."""
    try:
        yield
    except (KeyError, IndexError, ValueError, TypeError, OSError) as error:
        raise DamagedFile(f"The lists in {home} are not those of the data set ({error}). Unpack it again.") from None


def labelled(base: Path, listed: Sequence[tuple[Path, int]]) -> tuple[Images, list[Any]]:
    """Images of files with their labels, and what identifies them."""
    labels = torch.tensor([label for _, label in listed], dtype=torch.long)
    identity = [[p.relative_to(base).as_posix(), label] for p, label in listed]
    return Images(Files(tuple(p for p, _ in listed), SIDE), labels), identity


def by_folder(base: Path, what: str, sides: tuple[str, str], names: Sequence[str] | None = None) -> Loaded:
    """A folder a class on either side; ``names`` in the order of the sorted folders, else the folders' own."""
    found = [folders(there(base / side, what)) for side in sides]
    if found[0] != found[1]:
        odd = sorted(set(found[0]) ^ set(found[1]))
        raise PerdureError(f"{base}: the class folder '{odd[0]}' is in only one of {sides[0]} and {sides[1]}.")
    if names is not None and len(names) != len(found[0]):
        raise PerdureError(f"{base / sides[0]} holds {len(found[0])} class folders; {what} has {len(names)} classes.")
    lists = [[(p, k) for k, c in enumerate(found[0]) for p in pictures(base / side / c)] for side in sides]
    for side, listed in zip(sides, lists, strict=True):
        say_odd_kinds(base / side, found[0], listed)
    (train, one), (test, two) = (labelled(base, listed) for listed in lists)
    return list(names or [c.replace("_", " ") for c in found[0]]), train, test, digest(as_json([one, two]))


@cache
def cifar100(base: Path) -> Loaded:
    from torchvision.datasets import CIFAR100

    try:
        sides = [CIFAR100(str(base), train=train) for train in (True, False)]  # fetched only by who asks for it
    except (OSError, RuntimeError) as error:
        raise PerdureError(
            f"CIFAR-100 is not at {base / 'cifar-100-python'} ({str(error).splitlines()[0]}). Put it there, or set "
            'PERDURE_DATA to where it is. torchvision fetches it: python -c "from torchvision.datasets import CIFAR100; '
            f"CIFAR100('{base}', download=True)\""
        ) from None
    made = [Images(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in sides]
    return [c.replace("_", " ") for c in sides[0].classes], made[0], made[1], digest(b"cifar-100-python")


@cache
def imagenet100(base: Path) -> Loaded:
    found = folders(there(base / "imagenet100" / "train", "imagenet100"))
    if found[:1] + found[-1:] != [*FIRST_HUNDRED]:
        raise PerdureError(
            f"{base / 'imagenet100'} holds another hundred classes than the published ImageNet-100, which is the first "
            f"hundred of ImageNet: {FIRST_HUNDRED[0]} (tench) to {FIRST_HUNDRED[1]} (goose)."
        )
    return by_folder(base / "imagenet100", "imagenet100", ("train", "val"), published()["classnames"]["imagenet100"])


@cache
def imagenet_r(base: Path) -> Loaded:
    home = there(base / "imagenet-r", "imagenet_r")
    names = [n.replace("_", " ") for n in published()["classnames"]["imagenet_R"]]
    if (home / "train").is_dir():
        return by_folder(home, "imagenet_r", ("train", "test"), names)
    if not (home / "split.json").exists():
        raise PerdureError(
            f"{home} comes without a split, and none is drawn silently. Write one: python -c "
            f"\"from perdure.benchmarks.class_incremental import write_split; write_split('{home}', 0.8, 42)\""
        )
    split = read_json(home / "split.json")
    with reading(home):
        classes = sorted({Path(p).parts[0] for side in ("train", "test") for p in split[side]})
    if len(classes) != len(names):
        raise PerdureError(f"{home / 'split.json'} names {len(classes)} classes; ImageNet-R has {len(names)}.")
    lists = [[(home / p, classes.index(Path(p).parts[0])) for p in split[side]] for side in ("train", "test")]
    (train, one), (test, two) = (labelled(home, listed) for listed in lists)
    return names, train, test, digest(as_json([one, two]))


def write_split(folder: str | Path, share: float, seed: int) -> Path:
    """Draw a split of a folder a class by ``seed``, ``share`` of each class for training, and write ``split.json``."""
    home = Path(folder)
    if not 0 < share < 1:
        raise PerdureError(f"share={share}: the share for training lies between 0 and 1, both sides need images.")
    if (home / "split.json").exists():
        raise PerdureError(f"{home / 'split.json'} exists. Remove it first if another split is wanted.")
    generator = torch.Generator().manual_seed(seed)
    split: dict[str, Any] = {"seed": seed, "share": share, "train": [], "test": []}
    for one in (home / name for name in folders(home)):
        found = [p.relative_to(home).as_posix() for p in pictures(one)]
        order = torch.randperm(len(found), generator=generator).tolist()
        kept = set(order[: round(share * len(found))])
        for k, path in enumerate(found):
            split["train" if k in kept else "test"].append(path)
    write_json(home / "split.json", split)
    return home / "split.json"


@cache
def tiny_imagenet(base: Path) -> Loaded:
    home = there(base / "tiny-imagenet-200", "tiny_imagenet")
    ids = folders(home / "train")
    with reading(home):
        words = dict(line.split("\t", 1) for line in (home / "words.txt").read_text().splitlines() if "\t" in line)
        names = [words.get(wnid, wnid).split(",")[0].strip() for wnid in ids]
        place = {wnid: k for k, wnid in enumerate(ids)}
        train = [(p, k) for k, wnid in enumerate(ids) for p in pictures(home / "train" / wnid)]
        notes = [line.split("\t") for line in (home / "val" / "val_annotations.txt").read_text().splitlines() if line]
        test = sorted((home / "val" / "images" / note[0], place[note[1]]) for note in notes)
    (one, a), (two, b) = labelled(home, train), labelled(home, test)
    return names, one, two, digest(as_json([a, b]))


@cache
def cub200(base: Path) -> Loaded:
    home = there(base / "CUB_200_2011", "cub200")
    with reading(home):
        names = [name.split(".", 1)[-1].replace("_", " ") for _, name in numbered(home / "classes.txt")]
        labels = dict(numbered(home / "image_class_labels.txt"))
        training = dict(numbered(home / "train_test_split.txt"))
        paths = numbered(home / "images.txt")
        listed = [(home / "images" / path, int(labels[k]) - 1, training[k] == "1") for k, path in paths]
    (one, a), (two, b) = (labelled(home, [(p, y) for p, y, t in listed if t == side]) for side in (True, False))
    return names, one, two, digest(as_json([a, b]))


def numbered(path: Path) -> list[tuple[str, str]]:
    """The lines ``number value`` of a file."""
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in path.read_text().splitlines() if line]


@cache
def vtab(base: Path) -> Loaded:
    return by_folder(base / "vtab", "vtab", ("train", "test"))


# stream → (loader, classes of the first step, of each further step, published order, in words)
SETTINGS: dict[str, tuple[Callable[[Path], Loaded], int, int, str, str]] = {
    "cifar100-5": (cifar100, 20, 20, "cifar100", "CIFAR-100 in 5 steps of 20 classes."),
    "cifar100-10": (cifar100, 10, 10, "cifar100", "CIFAR-100 in 10 steps of 10 classes."),
    "cifar100-20": (cifar100, 5, 5, "cifar100", "CIFAR-100 in 20 steps of 5 classes."),
    "cifar100-50": (cifar100, 2, 2, "cifar100", "CIFAR-100 in 50 steps of 2 classes."),
    "imagenet100-10": (imagenet100, 10, 10, "imagenet100", "ImageNet-100 in 10 steps of 10 classes."),
    "imagenet-r-10": (imagenet_r, 20, 20, "imagenet_R", "ImageNet-R in 10 steps of 20 classes."),
    "tiny-imagenet-5": (tiny_imagenet, 100, 20, "", "TinyImageNet: 100 classes, then 5 steps of 20."),
    "tiny-imagenet-10": (tiny_imagenet, 100, 10, "", "TinyImageNet: 100 classes, then 10 steps of 10."),
    "tiny-imagenet-20": (tiny_imagenet, 100, 5, "", "TinyImageNet: 100 classes, then 20 steps of 5."),
    "cub200-10": (cub200, 20, 20, "", "CUB-200-2011 in 10 steps of 20 classes."),
    "vtab-5": (vtab, 10, 10, "", "VTAB's five data sets, 10 classes each, one after another."),
}


def load_stream(name: str) -> Stream:
    """The stream ``name`` of ``SETTINGS``. ``PerdureError`` where its data are not there."""
    load, base, increment, orders, summary = SETTINGS[name]
    names, train, test, identity = load(root())
    order = published()["orders"][orders] if orders else list(range(len(names)))
    classes = [Class(n, (TEMPLATE,)) for n in names]
    tasks = split_classes(classes, train, test, order, sizes_of(len(names), base, increment))
    whole = digest(as_json([identity, names, order, base, increment, TEMPLATE]))
    return Stream(name, tasks, None, MODEL, whole, labels="seen", task_id="hidden", notes=(summary,))
