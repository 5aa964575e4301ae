"""Few-shot sessions whose images somebody has chosen: lists by class in the place of a draw."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perdure.core.errors import PerdureError, unknown
from perdure.core.paths import expanded
from perdure.core.state import as_json, digest, read_json
from perdure.data.files import Files
from perdure.data.task import Stream, Task


def listed_shots(stream: Stream, lists: str, since: int) -> Stream:
    """A class-incremental stream that from task ``since`` on (counted from 1) has only those training images that are listed by
    class; another split. ``lists``: a JSON file ``{class: [image, …]}``, or that as text, as a run keeps it; an image is its
    number among the training images of its class, from 0, or the name of its file. ``PerdureError`` where that cannot be."""
    if stream.labels != "seen":
        raise PerdureError(
            f"shots_file={lists:.80}: {stream.name} is no class-incremental stream; its tasks are domains."
        )
    found, few = read(lists), stream.tasks[since - 1 :]
    names = [one.name for task in few for one in task.classes]
    if strange := [name for name in found if name not in names]:
        raise unknown(f"class from task {since} on", strange[0], names)
    if lacking := [name for name in names if not found.get(name)]:
        raise PerdureError(
            f"shots_file lists no image of '{lacking[0]}'. List some of each class from task {since} on."
        )
    chosen = {task.name: picked(task, found) for task in few}
    tasks = tuple(replace(t, train=t.train.take(chosen[t.name])) if t.name in chosen else t for t in stream.tasks)
    return replace(stream, tasks=tasks, digest=digest(as_json([stream.digest, "shots", since, found])))


def read(lists: str) -> dict[str, list[Any]]:
    """The lists by class, checked for their form."""
    if lists.startswith("{"):
        try:
            found = json.loads(lists)
        except json.JSONDecodeError as error:
            raise PerdureError(f"shots_file={lists:.80} is no JSON object: {error}.") from None
    elif not os.path.isfile(expanded(lists)):
        raise PerdureError(f"shots_file={lists} is not there. Give a JSON file {{class: [image, …]}}.")
    else:
        found = read_json(expanded(lists))
    whole = isinstance(found, dict) and all(
        isinstance(own, list) and all(isinstance(one, int | str) and not isinstance(one, bool) for one in own)
        for own in found.values()
    )
    if not whole:
        raise PerdureError("shots_file must hold a JSON object {class: [image, …]}: numbers, or names of files.")
    return dict(found)


def picked(task: Task, found: Mapping[str, Sequence[Any]]) -> torch.Tensor:
    """The numbers (n,) of a task's listed training images, in the order in which they lie."""
    out: list[int] = []
    for k, one in enumerate(task.classes):
        own = (task.train.labels == k).nonzero().flatten().tolist()
        pixels = task.train.pixels
        files = {Path(str(pixels.paths[n])).name: n for n in own} if isinstance(pixels, Files) else {}
        known: dict[Any, int] = {**dict(enumerate(own)), **files}
        for image in found[one.name]:
            if image not in known:
                there = f"numbers 0 to {len(own) - 1}" + (", or names of its files" if files else "")
                raise PerdureError(
                    f"shots_file lists {image!r} of '{one.name}', which has the training images {there}."
                )
            out.append(known[image])
        if len({known[image] for image in found[one.name]}) < len(found[one.name]):
            raise PerdureError(f"shots_file lists an image of '{one.name}' twice.")
    return torch.tensor(sorted(out))
