"""Pictures of one's own, as they were found, made into tasks and a stream.

Where there is no split, a fifth of each class is held out by the hash of its bytes: copies stay on one side, and adding
pictures moves none to the other, but for a class so small that all fell on one side and one had to be chosen.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from perdure.benchmarks import mini
from perdure.benchmarks.own.names import classes_of, plain, say_shared
from perdure.benchmarks.own.told import Told
from perdure.core.errors import PerdureError
from perdure.core.state import as_json, digest
from perdure.data.files import Files
from perdure.data.folders import say_odd_kinds
from perdure.data.places import Source, mark
from perdure.data.task import Class, Images, Stream, Task

SIDES: dict[str, Sequence[str]] = {"train": ("train", "training"), "test": ("test", "testing")}
VALIDATION = ("val", "valid", "validation", "dev")  # counts as test where there is no test
HELD_OUT = 5  # one in so many
SIDE = 32  # pixels, until the model says its own


@dataclass(frozen=True)
class Row:
    """A picture as it was found. ``name`` identifies it within its stream; ``label``: its class as it is written there, empty
    where it has a caption alone; ``side``: ``train``, ``test``, or empty where it comes without a split."""

    source: Source
    name: str
    label: str
    side: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Found:
    """A task as it was found: its pictures, and what their classes are called. ``where`` is for messages."""

    name: str
    rows: Sequence[Row]
    names: Mapping[str, Any]
    templates: tuple[str, ...]
    where: str


def side_of(word: str) -> str | None:
    """``train``, ``test`` or ``val`` for a word that people use for it."""
    plain = word.strip().lower()
    known = {**SIDES, "val": VALIDATION}
    return next((side for side, words in known.items() if plain in words), None)


def stream_of(name: str, found: Sequence[Found], told: Told) -> Stream:
    """The stream of tasks as they were found, in this order."""
    made = [task_of(one, index) for index, one in enumerate(found)]
    tasks = [task for task, _ in made]
    say_shared(tasks)
    identity = [[task.name, marks, [[c.name, *c.also] for c in task.classes]] for task, marks in made]
    whole = digest(as_json([identity, [list(one.templates) for one in found]]))
    notes = (f"Pictures of {name}: the user's own.",)
    return Stream(
        name, tuple(tasks), mini.probe(), str(mini.MODEL), whole, told.labels, told.task_id,
        mini.multi_domain("I").defaults, notes, generator=str(mini.GENERATOR), vocabulary=mini.vocabulary(),
        drawings=mini.multi_domain("I").drawings,
    )  # fmt: skip


def task_of(found: Found, index: int) -> tuple[Task, list[list[Any]]]:
    """A task, and what identifies its pictures."""
    if not found.rows:
        raise PerdureError(f"{found.where} holds no pictures.")
    train, test = sides_of(found)
    if not all(row.label for row in found.rows):
        found, train, test = by_text(found, train, test)
        labels = in_order({row.label for row in (*train, *test)})  # a picture is looked for among all texts
    else:
        labels = in_order({row.label for row in train})
    if odd := in_order({row.label for row in test} - set(labels)):
        raise PerdureError(
            f"{found.where}: there are no training pictures of the class '{odd[0]}', but there are test pictures."
        )
    classes = classes_of(labels, found.names, found.templates, found.where)
    place = {label: number for number, label in enumerate(labels)}
    ordered = [
        sorted(side, key=lambda row: place[row.label]) for side in (train, test)
    ]  # stable: else as they were found
    say_odd_kinds(found.where, labels, [(row.source, place[row.label]) for row in ordered[0]])
    sides = [
        Images(Files(tuple(row.source for row in side), SIDE), torch.tensor([place[row.label] for row in side]).long())
        for side in ordered
    ]
    texts = captions(ordered[0], classes, place, found.where)
    sides[0] = Images(sides[0].pixels, sides[0].labels, texts)
    marks = [
        [row.name, mark(row.source), row.label, number, *([row.caption] if row.caption else [])]
        for number, side in enumerate(ordered)
        for row in side
    ]
    return Task(found.name, classes, sides[0], sides[1], index), marks


def by_text(found: Found, train: Sequence[Row], test: Sequence[Row]) -> tuple[Found, list[Row], list[Row]]:
    """A task whose pictures have captions and no classes: each text is a class, asked for as it stands. Texts that differ in
    case and spaces alone are one."""
    lacking = sum(not row.label for row in found.rows)
    if lacking < len(found.rows):
        raise PerdureError(
            f"{found.where}: {lacking} of its {len(found.rows)} pictures have a text but no class, the others have one. Give "
            "each its class, or none of them."
        )
    texts: dict[str, str] = {}
    for row in found.rows:
        texts.setdefault(plain(row.caption), row.caption)
    warnings.warn(
        f"{found.where}: its pictures have texts and no classes, so that each of {len(texts)} texts is asked for as it stands, "
        "and a test picture counts as right where its own text fits it best. loss=contrastive learns pictures and texts as "
        "pairs; a method of classes takes each text for one.",
        stacklevel=2,
    )
    one, two = ([replace(row, label=texts[plain(row.caption)]) for row in side] for side in (train, test))
    return replace(found, names={text: text for text in texts.values()}, templates=("{}",)), one, two


def in_order(labels: set[str]) -> list[str]:
    """Labels sorted, numbers by what they are worth."""
    numbers = all(label.isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label) if numbers else 0, label))


def captions(
    rows: Sequence[Row], classes: Sequence[Class], place: Mapping[str, int], where: str
) -> tuple[str, ...] | None:
    """A text an image, where any has one; the prompt of its class stands in for one that is missing, and it is said so."""
    lacking = sum(not row.caption for row in rows)
    if lacking == len(rows):
        return None
    if lacking:
        warnings.warn(
            f"{where}: {lacking} of {len(rows)} training pictures have no text; their class's prompt stands in for it.",
            stacklevel=2,
        )
    return tuple(row.caption or classes[place[row.label]].prompts()[0] for row in rows)


def sides_of(found: Found) -> tuple[list[Row], list[Row]]:
    """Pictures for training and for testing, by the split they come with or by their bytes."""
    split = Counter(row.side for row in found.rows)
    if not split[""]:
        return [[row for row in found.rows if row.side == side] for side in SIDES]  # type: ignore[return-value]
    if len(split) > 1:
        raise PerdureError(
            f"{found.where}: {split['']} of its pictures are in no split, the others are. Put each in one."
        )
    groups: dict[str, list[Row]] = {}
    for row in found.rows:
        groups.setdefault(row.label, []).append(row)
    halves = [hold_out(group) for group in groups.values()]
    train, test = ([row for half in halves for row in half[side]] for side in (0, 1))
    warnings.warn(
        f"{found.where} has no split of its own: {len(test)} of {len(found.rows)} pictures are held out for testing, by their "
        "bytes.",
        stacklevel=2,
    )
    return train, test


def hold_out(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """One class's pictures for training and for testing, by the hash of their bytes; of two or more at least one on each
    side, where they are not all copies."""
    marks = [int(mark(row.source), 16) for row in rows]
    chosen = [one % HELD_OUT == 0 for one in marks]
    if len(set(marks)) > 1 and len(set(chosen)) == 1:
        chosen = [one == min(marks) for one in marks]
    elif len(set(marks)) == 1:
        chosen = [False] * len(marks)
    halves = [[row for row, test in zip(rows, chosen, strict=True) if test is side] for side in (False, True)]
    return halves[0], halves[1]


def only_sides(rows: Sequence[Row], where: str) -> list[Row]:
    """Rows of the two sides: those of ``val`` count as test where there is no test, else are left out, and it is said so."""
    there = {row.side for row in rows}
    if "val" in there and "test" in there:
        left = sum(row.side == "val" for row in rows)
        warnings.warn(
            f"{where}: {left} pictures of the split 'val' are left out, as there is a test split.", stacklevel=2
        )
        return [row for row in rows if row.side != "val"]
    kept = [Row(r.source, r.name, r.label, "test", r.caption) if r.side == "val" else r for r in rows]
    missing = [side for side in SIDES if side not in {row.side for row in kept}]
    if "" not in there and missing:
        raise PerdureError(
            f"{where}: no picture is in the split '{missing[0]}'. Give both, or none: then some are held out for testing."
        )
    return kept
