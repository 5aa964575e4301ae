"""A stream from a folder of one's own pictures.

    DIR/CLASS/*                          one task
    DIR/TASK/CLASS/*                     a task a folder, alphabetically
    …/train/CLASS/*, …/test/CLASS/*      either of them with a split of its own (val counts as test where there is no test)

A class is asked for by its folder's name, or by what ``classes.json`` says (``{folder: name}``), beside the classes or in DIR.
``stream.yaml`` in DIR may give ``order`` (of tasks), ``templates``, ``labels``, ``task_id``. Where there is no split, a fifth
of each class is held out by the hash of its bytes: copies stay on one side, and adding pictures moves none to the other,
but for a class so small that all fell on one side and one had to be chosen.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from perdure.benchmarks import mini
from perdure.core.errors import PerdureError, unknown
from perdure.core.state import as_json, digest, read_json
from perdure.data.checks import places_in
from perdure.data.files import Files
from perdure.data.folders import PICTURES, folders, hidden, pictures, say_odd_kinds
from perdure.data.task import Class, Images, Stream, Task

TEMPLATES = ("a photo of a {}.",)
TRAINING, TESTING = ("train", "training"), ("test", "testing", "val", "valid", "validation")
HELD_OUT = 5  # one in so many
SIDE = 32  # until the model says its own


@dataclass(frozen=True)
class Told:
    """What lies beside the pictures in words: ``stream.yaml``."""

    order: tuple[str, ...] = ()
    templates: tuple[str, ...] = TEMPLATES
    labels: str = "task"
    task_id: str = "known"


def load_folder(base: Path) -> Stream:
    """The stream of a folder. ``PerdureError`` for one that is laid out in no known way."""
    told, subs = told_by(base), folders(base)
    if not subs:
        raise PerdureError(
            f"{base} holds no folders. Wanted: {base}/CLASS/*, or {base}/TASK/CLASS/*, with pictures in them."
        )
    homes = {base.name: base} if is_task(base) else {name: base / name for name in subs}
    if len(homes) > 1 or base.name not in homes:
        check_tasks(base, homes)
    if strange := sorted(set(told.order) - set(homes)):
        raise unknown("task in the order of stream.yaml", strange[0], sorted(homes))
    names = [*told.order, *sorted(set(homes) - set(told.order))]
    tasks, identity = [], []
    for index, name in enumerate(names):
        task, marks = task_of(name, homes[name], base, index, told)
        tasks.append(task)
        identity.append([name, marks])
    say_shared(tasks, told.labels)
    whole = digest(as_json([identity, list(told.templates)]))
    notes = (f"Pictures of {base.name}: the user's own.",)
    return Stream(
        base.name, tuple(tasks), mini.probe(), str(mini.MODEL), whole, told.labels, told.task_id,
        mini.multi_domain("I").defaults, notes, generator=str(mini.GENERATOR), vocabulary=mini.vocabulary(),
        drawings=mini.multi_domain("I").drawings,
    )  # fmt: skip


def told_by(base: Path) -> Told:
    """What ``stream.yaml`` says, checked."""
    path = base / "stream.yaml"
    if not path.exists():
        return Told()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PerdureError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    known = ("order", "templates", "labels", "task_id")
    if not isinstance(content, dict):
        raise PerdureError(f"{path} must hold 'key: value' lines. Keys: {', '.join(known)}.")
    if strange := [key for key in content if key not in known]:
        raise unknown(f"key in {path}", str(strange[0]), known)
    for key in ("order", "templates"):
        given = content.get(key, [])
        if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
            raise PerdureError(f"{path}: {key} must be a list of words, not {given!r}.")
    for key, allowed in (("labels", ("task", "seen", "all")), ("task_id", ("known", "hidden"))):
        if key in content and content[key] not in allowed:
            raise PerdureError(f"{path}: {key} is one of {', '.join(allowed)}, not {content[key]!r}.")
    if wrong := [t for t in content.get("templates", []) if places_in(t) != [""]]:
        raise PerdureError(
            f"{path}: the template '{wrong[0]}' must hold exactly one {{}}, where the class's name goes."
        )
    lists = {key: tuple(content[key]) for key in ("order", "templates") if content.get(key)}
    return Told(**{**content, **lists})


def has_pictures(folder: Path) -> bool:
    """Whether pictures lie in a folder itself."""
    return any(p.suffix.lower() in PICTURES and p.is_file() and not hidden(Path(p.name)) for p in folder.iterdir())


def sides_of(home: Path) -> tuple[Path, Path] | None:
    """Where a folder keeps the two sides of a split of its own."""
    subs = {name.lower(): home / name for name in folders(home)}
    train = next((subs[name] for name in TRAINING if name in subs), None)
    test = next((subs[name] for name in TESTING if name in subs), None)
    return (train, test) if train and test else None


def is_task(home: Path) -> bool:
    """Whether a folder is a task: class folders with pictures in them, or a split of such."""
    return sides_of(home) is not None or any(has_pictures(home / name) for name in folders(home))


def check_tasks(base: Path, homes: Mapping[str, Path]) -> None:
    """Refuse folders that are no tasks, naming the first."""
    odd = [home for home in homes.values() if not is_task(home)]
    if odd and len(odd) < len(homes):
        raise PerdureError(
            f"{base} holds folders of two kinds: {next(h for h in homes.values() if h not in odd).name} holds class folders, "
            f"{odd[0].name} does not. Wanted: {base}/CLASS/*, or {base}/TASK/CLASS/*."
        )
    if odd:
        raise PerdureError(
            f"{base} holds no pictures where they are looked for. Wanted: {base}/CLASS/*, or {base}/TASK/CLASS/*; pictures end "
            f"in {', '.join(PICTURES)}."
        )


def task_of(name: str, home: Path, base: Path, index: int, told: Told) -> tuple[Task, list[list[Any]]]:
    """A task, and what identifies its pictures."""
    split = sides_of(home)
    if split:
        both = [folders(side) for side in split]
        if odd := sorted(set(both[1]) - set(both[0])):
            raise PerdureError(f"{split[1]}: there are no training pictures of the class '{odd[0]}' ({split[0]}).")
        kept = both[0]
        sides = [{c: pictures(side / c) for c in own} for side, own in zip(split, both, strict=True)]
    else:
        kept = folders(home)
        found = {c: hold_out(pictures(home / c)) for c in kept}
        sides = [{c: both[side] for c, both in found.items()} for side in (0, 1)]
        warnings.warn(
            f"{home} has no split of its own: {sum(map(len, sides[1].values()))} of "
            f"{sum(len(p) for side in sides for p in side.values())} pictures are held out for testing, by their bytes.",
            stacklevel=2,
        )
    classes = classes_of(kept, home, base, told.templates)
    listed = [[(p, k) for k, c in enumerate(kept) for p in side.get(c, [])] for side in sides]
    say_odd_kinds(home, kept, listed[0])
    made = [
        Images(Files(tuple(p for p, _ in x), SIDE), torch.tensor([k for _, k in x], dtype=torch.int64)) for x in listed
    ]
    marks = [[p.relative_to(base).as_posix(), mark(p), kept[k], side] for side, x in enumerate(listed) for p, k in x]
    return Task(name, classes, made[0], made[1], index), marks


def mark(path: Path) -> str:
    """The sha256 of a file, worked out again only where the file has changed."""
    about = path.stat()
    return mark_of(path, about.st_mtime_ns, about.st_size)


@cache
def mark_of(path: Path, changed: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hold_out(found: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """One class's pictures for training and for testing, by the hash of their bytes; of two or more at least one on each
    side, where they are not all copies."""
    marks = {path: int(mark(path), 16) for path in found}
    test = {path for path in found if marks[path] % HELD_OUT == 0}
    by_hash = sorted(set(marks.values()))
    if len(by_hash) > 1 and (not test or len(test) == len(found)):
        test = {path for path in found if marks[path] == by_hash[0]}
    elif len(by_hash) == 1:
        test = set()
    return [p for p in found if p not in test], [p for p in found if p in test]


def classes_of(names: Sequence[str], home: Path, base: Path, templates: tuple[str, ...]) -> tuple[Class, ...]:
    """Classes by their folders' names, or by what ``classes.json`` says."""
    given: dict[str, Any] = {}
    for path in dict.fromkeys((base / "classes.json", home / "classes.json")):
        content = read_json(path) if path.exists() else {}
        if not isinstance(content, dict):
            raise PerdureError(f"{path} must say what each class folder is called: {{folder: name}}.")
        given |= content
    said = [given.get(name, name.replace("_", " ").replace("-", " ").strip()) for name in names]
    if wrong := [name for name, word in zip(names, said, strict=True) if not isinstance(word, str) or not word.strip()]:
        raise PerdureError(f"classes.json: the class '{wrong[0]}' must be given one name, not {given.get(wrong[0])!r}.")
    if len(names) < 2:
        raise PerdureError(f"{home} holds one class only ('{names[0]}'): there is nothing to tell apart.")
    plain: dict[str, str] = {}
    for name, word in zip(names, said, strict=True):
        key = " ".join(word.lower().split())
        if key in plain:
            raise PerdureError(
                f"{home}: the folders '{plain[key]}' and '{name}' are both called '{key}'. Put their pictures together, or "
                "give one of them another name in classes.json."
            )
        plain[key] = name
    if odd := [word for word in said if re.fullmatch(r"(class|label|category|n)?[ _]*\d+", word.lower())]:
        warnings.warn(
            f"{home}: '{odd[0]}' is no word that a model could know ({len(odd)} of {len(said)} classes). Say what the classes "
            f'are in {home / "classes.json"}: {{"{names[said.index(odd[0])]}": "its name", …}}.',
            stacklevel=2,
        )
    return tuple(Class(word, templates) for word in said)


def say_shared(tasks: Sequence[Task], labels: str) -> None:
    """Say which classes are in several tasks, and what that means."""
    homes: dict[str, list[str]] = {}
    for task in tasks:
        for one in task.classes:
            homes.setdefault(one.name, []).append(task.name)
    shared = {name: own for name, own in homes.items() if len(own) > 1}
    if shared and labels == "task":
        name, own = next(iter(shared.items()))
        warnings.warn(
            f"{len(shared)} classes are in several tasks ('{name}' in {' and '.join(own)}): an image competes with the classes "
            "of its own task; a head learns one row for both.",
            stacklevel=2,
        )
