"""MTIL and X-TAIL: the field's streams of whole data sets, one after another, from where torchvision keeps them.

MTIL (Zheng et al., ICCV 2023, arXiv:2303.06628): eleven data sets in two orders, each asked among its own classes, the task
known. X-TAIL (Xu et al., NeurIPS 2024, arXiv:2406.18868): ten of them alphabetically, 16 images a class, all classes compete,
the task hidden. ``facts/mtil.json`` has the orders, class names, templates and splits.

Data lie under ``PERDURE_DATA`` as torchvision lays them out; nothing is fetched unless asked (``perdure data fetch``), and
``perdure data check`` says what is there. Where a data set comes without a split, the published rule draws one: the first
four fifths of a permutation by seed 42, here of the *sorted* file list, as some are listed as the file system has them. The
split's digest is part of the stream's; ``perdure data check --keep-splits`` writes the split down (``manifests.py``).
Otherwise than in X-TAIL's release: its splits are CoOp's, these are MTIL's; and of a class that has fewer than 16 images all
are taken, none twice.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from perdure.benchmarks import manifests
from perdure.benchmarks.class_incremental import MODEL, SIDE, root
from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.state import as_json, digest
from perdure.data.files import Files, Pixels, take
from perdure.data.task import Class, Images, Stream, Task

XTAIL = ("Aircraft", "Caltech101", "DTD", "EuroSAT", "Flowers", "Food", "MNIST", "OxfordPet", "StanfordCars", "SUN397")
DRAWN = ("Caltech101", "EuroSAT", "SUN397")  # come without a split
SHOTS = 16
Side = tuple[Pixels, list[int], list[str]]  # pictures, labels, and a name of each that tells them apart
Loaded = tuple[list[str], Side, Side]  # class names, training and test side


@dataclass(frozen=True)
class DataSet:
    """Where a data set lies under the root, how torchvision reads it, and what to do where its link is dead."""

    home: str
    load: Callable[[Path, bool], Loaded]
    by_hand: str


def facts() -> Any:
    """What the papers' streams are made of."""
    return json.loads((files("perdure") / "benchmarks" / "facts" / "mtil.json").read_text(encoding="utf-8"))


def listed(base: Path, paths: Sequence[Any], labels: Sequence[int]) -> Side:
    """A side of pictures in files."""
    found = [Path(p) for p in paths]
    return Files(tuple(found), SIDE), [int(x) for x in labels], [p.relative_to(base).as_posix() for p in found]


def split(side: Side, kept: Sequence[Sequence[int]] | None = None) -> tuple[Side, Side]:
    """Both sides: ``kept`` says which pictures; else the published random split, of the pictures sorted by their names."""
    pixels, labels, names = side
    order = sorted(range(len(names)), key=names.__getitem__)
    drawn = torch.randperm(len(order), generator=torch.Generator().manual_seed(42)).tolist()
    edge = int(0.8 * len(order))
    chosen = kept or [[order[k] for k in sorted(part)] for part in (drawn[:edge], drawn[edge:])]
    one, two = (
        (take(pixels, torch.tensor(part)), [labels[k] for k in part], [names[k] for k in part]) for part in chosen
    )
    return one, two


def files_of(found: Any, base: Path) -> Side:
    """The pictures that one of torchvision's data sets lists, under the names it has for them."""
    if hasattr(found, "index"):  # Caltech-101
        home = base / "caltech101" / "101_ObjectCategories"
        paths = [home / found.categories[y] / f"image_{k:04d}.jpg" for k, y in zip(found.index, found.y, strict=True)]
        return listed(base, paths, found.y)
    pairs = getattr(found, "samples", None) or getattr(found, "_samples", None)
    if pairs:
        return listed(base, [path for path, _ in pairs], [label for _, label in pairs])
    paths = found._image_files if hasattr(found, "_image_files") else getattr(found, "_images", [])
    return listed(base, paths, found._labels)


def in_memory(found: Any) -> Side:
    """A side that torchvision holds in memory, in its own order."""
    pixels = torch.as_tensor(found.data)
    pixels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels.unsqueeze(1).expand(-1, 3, -1, -1)
    labels = [int(x) for x in found.targets]
    return pixels, labels, [f"{k:06d}" for k in range(len(labels))]


def reader(
    kind: str, train: tuple[Any, ...] = (), test: tuple[Any, ...] | None = None
) -> Callable[[Path, bool], Loaded]:
    """How a data set is read: torchvision's class, and what it is given for either side; without a test side the published
    rule draws one."""

    def load(base: Path, fetch: bool) -> Loaded:
        from torchvision import datasets

        made = [getattr(datasets, kind)(str(base), *own, download=fetch) for own in (train, test) if own is not None]
        names, *others = (list(getattr(one, "classes", None) or getattr(one, "categories", [])) for one in made)
        if others and others[0] != names:  # labels are numbers among a side's own classes
            odd = sorted(set(names) ^ set(others[0]))
            raise ValueError(f"its two sides have not the same classes: {', '.join(odd[:3])}")
        if hasattr(made[0], "data"):
            return names, in_memory(made[0]), in_memory(made[1])
        sides = [files_of(one, base) for one in made]
        one, two = sides if len(sides) == 2 else split(sides[0], manifests.read(base, kind, sides[0][2], sides[0][1]))
        return names, one, two

    return load


FETCH = "perdure data fetch {}"
SETS: dict[str, DataSet] = {
    "Aircraft": DataSet("fgvc-aircraft-2013b", reader("FGVCAircraft", ("train", "variant"), ("test", "variant")), FETCH),
    "Caltech101": DataSet(
        "caltech101/101_ObjectCategories", reader("Caltech101"), FETCH + "; or 101_ObjectCategories.tar.gz of CaltechDATA"
    ),
    "CIFAR100": DataSet("cifar-100-python", reader("CIFAR100", (True,), (False,)), FETCH),
    "DTD": DataSet("dtd/dtd", reader("DTD", ("train", 1), ("test", 1)), FETCH),
    "EuroSAT": DataSet("eurosat/2750", reader("EuroSAT"), FETCH),
    "Flowers": DataSet("flowers-102", reader("Flowers102", ("train",), ("test",)), FETCH),
    "Food": DataSet("food-101", reader("Food101", ("train",), ("test",)), FETCH),
    "MNIST": DataSet("MNIST/raw", reader("MNIST", (True,), (False,)), FETCH),
    "OxfordPet": DataSet("oxford-iiit-pet", reader("OxfordIIITPet", ("trainval",), ("test",)), FETCH),
    "StanfordCars": DataSet(
        "stanford_cars", reader("StanfordCars", ("train",), ("test",)),
        "its official link is dead: cars_train, cars_test, devkit and cars_test_annos_withlabels.mat, by hand",
    ),
    "SUN397": DataSet("SUN397", reader("SUN397"), FETCH + "; 37 GB: or unpack SUN397.tar.gz of its authors there"),
}  # fmt: skip


def of_damage() -> tuple[type[Exception], ...]:
    """What torchvision and scipy raise of lists that are cut short or are none."""
    found = (KeyError, IndexError, ValueError, TypeError, OSError, AssertionError, zlib.error)
    with contextlib.suppress(ImportError):
        from scipy.io.matlab import MatReadError

        return *found, MatReadError
    return found


@contextlib.contextmanager
def explained(name: str, base: Path) -> Iterator[None]:
    """What torchvision raises, in words that say where and what to do."""
    one = SETS[name]
    try:
        yield
    except (ImportError, ModuleNotFoundError) as error:
        raise PerdureError(
            f"{name}: its lists need scipy ({error}). Install it: pip install 'perdure[datasets]'"
        ) from None
    except (RuntimeError, FileNotFoundError, NotADirectoryError) as error:
        raise PerdureError(
            f"{name} is not at {base / one.home} ({str(error).splitlines()[0]}) How to get it: {one.by_hand.format(name)}."
        ) from None
    except of_damage() as error:
        said = str(error) or type(error).__name__
        raise DamagedFile(f"The lists of {name} in {base / one.home} are not those of the data set ({said}).") from None


@cache
def load(name: str, base: Path, fetch: bool = False) -> Task:
    """One data set as a task. ``PerdureError`` where it is not there; ``fetch``: then it is downloaded by torchvision."""
    about = facts()["datasets"][name]
    if not fetch and not (base / SETS[name].home).exists():  # torchvision makes folders where it looks
        raise PerdureError(
            f"{name} is not at {base / SETS[name].home}. How to get it: {SETS[name].by_hand.format(name)}."
        )
    with explained(name, base):
        own, train, test = SETS[name].load(base, fetch)
    names = [one.replace("_", " ") for one in about.get("classnames", own)]
    wanted = set(range(len(names)))
    for side, (_, labels, _) in (("training", train), ("test", test)):
        there = set(labels)
        if not there or there - wanted or len(own or names) != len(names) or (side == "training" and there != wanted):
            found = f"labels {min(there)} … {max(there)} ({len(there)} of them)" if there else "no images"
            raise DamagedFile(
                f"{name} at {base / SETS[name].home}: the {side} side has {found}, of {len(own or names)} classes; wanted are "
                f"{len(names)} classes, labels 0 … {len(names) - 1}. Unpack it again."
            )
    classes = tuple(Class(one, tuple(about["templates"])) for one in names)
    sides = [Images(pixels, torch.tensor(labels, dtype=torch.int64)) for pixels, labels, _ in (train, test)]
    return Task(name, classes, sides[0], sides[1])


def names_in(images: Images, base: Path) -> list[str] | int:
    """What tells a side's pictures apart; of those in memory their number."""
    if not isinstance(images.pixels, Files):
        return len(images)
    return [Path(str(path)).relative_to(base).as_posix() for path in images.pixels.paths]


def keep(name: str, base: Path) -> Path | None:
    """Write down the split of a data set that comes without one, and return where; None: its own lists say it."""
    if name not in DRAWN:
        return None
    task = load(name, base)
    lists = [[*zip(names_in(x, base), x.labels.tolist(), strict=True)] for x in (task.train, task.test)]  # type: ignore[arg-type]
    return manifests.write(base, name, lists)


@cache
def mark(name: str, base: Path) -> str:
    """What identifies a data set's split: names and labels of both sides, classes and templates."""
    task = load(name, base)
    sides = [[names_in(x, base), x.labels.tolist()] for x in (task.train, task.test)]
    return digest(as_json([name, sides, [[c.name, list(c.templates)] for c in task.classes]]))


def stream(name: str, order: Sequence[str], labels: str = "task", task_id: str = "known", shots: int = 0) -> Stream:
    """The data sets in order. ``PerdureError`` that names every one that is missing."""
    base, tasks, missing = root(), [], []
    for index, one in enumerate(order):
        try:
            tasks.append(replace(load(one, base), index=index))
        except DamagedFile:
            raise
        except PerdureError as error:
            missing.append(str(error))
    if missing:
        others = f" {len(missing) - 1} more of its {len(order)} data sets are missing." if len(missing) > 1 else ""
        raise PerdureError(
            f"{missing[0]}{others} All are listed by: perdure data check. Another place: set PERDURE_DATA."
        )
    whole = digest(as_json([name, [mark(one, base) for one in order]]))
    defaults: dict[str, Any] = {"all": {"shots": shots}} if shots else {}
    notes = (f"{', '.join(order)}: each under its own terms of use.",)
    return Stream(name, tuple(tasks), None, MODEL, whole, labels, task_id, defaults, notes)


def mtil(order: str) -> Stream:
    """MTIL in order ``I`` or ``II``."""
    return stream({"I": "mtil", "II": "mtil-2"}[order], facts()["orders"][order])


def x_tail() -> Stream:
    """X-TAIL, order I."""
    return stream("x-tail", XTAIL, labels="all", task_id="hidden", shots=SHOTS)
