"""Classes cut into steps: class-incremental streams."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from perdure.core.errors import PerdureError, unknown
from perdure.core.paths import expanded
from perdure.core.seeding import derive
from perdure.core.state import as_json, digest, read_json
from perdure.data.task import Class, Images, Stream, Task


def sizes_of(classes: int, base: int, increment: int) -> list[int]:
    """Step sizes: ``base`` classes, then ``increment`` a step. ``PerdureError`` where they do not come out even."""
    if not (0 < base <= classes) or increment < 1 or (classes - base) % increment:
        raise PerdureError(
            f"{classes} classes cannot be cut into {base} and then {increment} a step. "
            "Both must be at least 1, and what is left after the first step a multiple of the increment."
        )
    return [base, *[increment] * ((classes - base) // increment)]


def split_classes(
    classes: Sequence[Class], train: Images, test: Images, order: Sequence[int], sizes: Sequence[int]
) -> tuple[Task, ...]:
    """Tasks ``step_01`` …: the classes in ``order`` (indices into ``classes``), ``sizes[k]`` of them in step k + 1.

    Raises ``PerdureError`` for an order that is no permutation, a class in two steps, a step without classes or images, and
    labels out of range.
    """
    count = len(classes)
    if len(order) != count:
        raise PerdureError(f"The class order has {len(order)} entries, but there are {count} classes.")
    if sorted(order) != list(range(count)):
        twice = sorted({k for k in order if list(order).count(k) > 1})
        what = f"class {twice[0]} is in it twice" if twice else "it names classes that are not there"
        raise PerdureError(f"The class order must hold each of 0 … {count - 1} once: {what}.")
    if min(sizes, default=0) < 1 or sum(sizes) != count:
        raise PerdureError(f"Steps of {list(sizes)} classes do not share out {count} classes, at least one a step.")
    for side, images in (("training", train), ("test", test)):
        if len(images) and not 0 <= int(images.labels.min()) <= int(images.labels.max()) < count:
            raise PerdureError(f"Labels of {side} images must lie in 0 … {count - 1}.")
    for k, one in enumerate(classes):
        if one in classes[:k]:
            raise PerdureError(f"There are two classes of the name '{one.name}': a class belongs to one step.")
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    steps = [list(order[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    tasks = tuple(
        Task(f"step_{k + 1:02d}", tuple(classes[n] for n in step), subset(train, step), subset(test, step), k)
        for k, step in enumerate(steps)
    )
    for task in tasks:
        if not len(task.train) or not len(task.test):
            side = "test" if len(task.train) else "training"
            raise PerdureError(f"{task.name} ({', '.join(c.name for c in task.classes[:3])}, …) has no {side} images.")
    return tasks


def subset(images: Images, numbers: Sequence[int]) -> Images:
    """The images of some classes, relabelled 0, 1, … in the order given."""
    place = torch.full((int(images.labels.max()) + 1 if len(images) else 0,), -1)
    for new, old in enumerate(numbers):
        if old < len(place):
            place[old] = new
    labels = place[images.labels]
    chosen = (labels >= 0).nonzero().squeeze(1)
    return replace(images.take(chosen), labels=labels[chosen])


def reordered(stream: Stream, order: str) -> Stream:
    """A class-incremental stream with its classes in another order, in steps of the same sizes: another split.

    ``order``: a seed, or a JSON file with a list of class names. Raises ``PerdureError`` for anything else.
    """
    if stream.labels != "seen":
        raise PerdureError(f"class_order={order}: {stream.name} is no class-incremental stream; its tasks are domains.")
    check_whole(stream, f"class_order={order}")
    whole = stream.joined(grouped=False)
    numbers = read_order(order, [c.name for c in whole.classes])
    tasks = split_classes(whole.classes, whole.train, whole.test, numbers, [len(t.classes) for t in stream.tasks])
    identity = digest(as_json([stream.digest, numbers]))
    return replace(stream, tasks=tasks, digest=identity)


def recut(stream: Stream, base: int, increment: int) -> Stream:
    """A class-incremental stream with its classes in other steps: ``base`` of them, then ``increment`` a step; another split.

    Raises ``PerdureError`` for any other stream, and where the classes do not come out even.
    """
    if not base or not increment:
        raise PerdureError(
            f"base={base} increment={increment}: give both, the classes of the first step and of each other."
        )
    if stream.labels != "seen":
        raise PerdureError(f"base={base}: {stream.name} is no class-incremental stream; its tasks are domains.")
    check_whole(stream, f"base={base}")
    whole = stream.joined(grouped=False)
    order = list(range(len(whole.classes)))
    tasks = split_classes(whole.classes, whole.train, whole.test, order, sizes_of(len(order), base, increment))
    return replace(stream, tasks=tasks, digest=digest(as_json([stream.digest, base, increment])), base_new="sessions")


def check_whole(stream: Stream, asked: str) -> None:
    """Refuse to cut a stream anew whose later sessions have few images already."""
    if stream.base_new == "sessions":
        raise PerdureError(
            f"{asked}: which images the later sessions of {stream.name} have is fixed, so its classes stay where they are. Cut "
            "a whole stream, as mini-cil or cifar100-10, with base=, increment=, shots= and shots_from=2."
        )


def tasks_reordered(stream: Stream, order: str) -> Stream:
    """A stream of domains with its tasks in another order: another split.

    ``order``: a seed, or a JSON file with a list of task names. Raises ``PerdureError`` for anything else.
    """
    if stream.labels == "seen":
        raise PerdureError(
            f"task_order={order}: {stream.name} is a class-incremental stream, whose steps follow from class_order. Give that."
        )
    numbers = read_order(order, [t.name for t in stream.tasks], "task")
    tasks = tuple(replace(stream.tasks[k], index=place) for place, k in enumerate(numbers))
    return replace(stream, tasks=tasks, digest=digest(as_json([stream.digest, "tasks", numbers])))


def read_order(order: str, names: Sequence[str], kind: str = "class") -> list[int]:
    """An order of classes (tasks) from a seed, a JSON file with a list of names, or that list as text → indices into
    ``names``, each once."""
    if order.isdecimal():
        generator = torch.Generator().manual_seed(derive(int(order), f"{kind} order"))
        return torch.randperm(len(names), generator=generator).tolist()
    said = f"{kind}_order" if order.startswith("[") else order
    found = listed(order, kind)
    if not isinstance(found, list) or not all(isinstance(n, str) for n in found):
        raise PerdureError(f"{said} must hold a JSON list of {kind} names.")
    if len(found) != len(names):
        several = "classes" if kind == "class" else f"{kind}s"
        raise PerdureError(f"{said} lists {len(found)} {several}, but the stream has {len(names)}.")
    for name in found:
        if name not in names:
            raise unknown(kind, name, names)
        if found.count(name) > 1:
            place = "a class belongs to one step" if kind == "class" else f"a {kind} has one place"
            raise PerdureError(f"{said} lists the {kind} '{name}' twice: {place}.")
    places = {name: k for k, name in enumerate(names)}
    return [places[name] for name in found]


def listed(order: str, kind: str) -> Any:
    """What an order that is no seed holds: JSON as text, as a run keeps it, or in a file."""
    if order.startswith("["):
        try:
            return json.loads(order)
        except json.JSONDecodeError as error:
            raise PerdureError(f"{kind}_order={order:.80} is no JSON list of {kind} names: {error}.") from None
    if not os.path.isfile(expanded(order)):
        raise PerdureError(
            f"{kind}_order={order} is neither a seed (a number) nor a file. Give a seed, or a JSON file that lists the "
            f"{kind} names; of a run that was begun with it: put the file back where it was."
        )
    return read_json(expanded(order))
