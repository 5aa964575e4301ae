"""A share of pictures that cannot be read, tolerated: they are found by decoding all, named, and left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from perdure.core.errors import PerdureError
from perdure.core.state import as_json, digest
from perdure.data.files import Files, Joined, unreadable
from perdure.data.task import Images, Stream

NAMED = 5  # in a message
LeftOut = dict[str, Any]  # {"task": …, "side": "train" or "test", "number": …, "why": …}: as config.json keeps it


def find_unreadable(stream: Stream, tolerated: float, warn: Callable[[str], None]) -> list[LeftOut]:
    """The pictures of a stream's tasks that cannot be decoded. ``PerdureError`` where they are more than the share
    ``tolerated`` of all that lie in files, or no picture of a class would be left to train on. Nothing is looked at where
    nothing is tolerated: then a run refuses the first that it meets."""
    if not tolerated:
        return []
    sides = [(task.name, side, getattr(task, side)) for task in stream.tasks for side in ("train", "test")]
    total = sum(len(images) for _, _, images in sides if isinstance(images.pixels, Files | Joined))
    found: list[LeftOut] = [
        {"task": task, "side": side, "number": number, "why": why}
        for task, side, images in sides
        for number, why in unreadable(images.pixels).items()
    ]
    if not found:
        return []
    said = f"{len(found)} of {total} pictures of {stream.name} cannot be read ({100 * len(found) / total:.2g} %)"
    named = "\n".join(f"  {one['why']}" for one in found[:NAMED]) + ("\n  …" if len(found) > NAMED else "")
    if len(found) > tolerated * total:
        raise PerdureError(
            f"{said}, more than unreadable={tolerated:g} tolerates. Put them right, take them away or tolerate more; perdure "
            f"data check names all.\n{named}"
        )
    without(stream, found)  # whether enough is left
    warn(f"{said}; they are left out, and config.json names all.\n{named}")
    return found


def without(stream: Stream, left_out: Sequence[LeftOut]) -> Stream:
    """The stream without these pictures: another split."""
    if not left_out:
        return stream
    gone: dict[tuple[str, str], set[int]] = {}
    for one in left_out:
        gone.setdefault((one["task"], one["side"]), set()).add(one["number"])
    tasks = tuple(
        replace(t, train=kept(t.train, gone.get((t.name, "train"))), test=kept(t.test, gone.get((t.name, "test"))))
        for t in stream.tasks
    )
    for before, after in zip(stream.tasks, tasks, strict=True):
        lost = sorted(set(before.train.labels.tolist()) - set(after.train.labels.tolist()))
        if lost:
            raise PerdureError(
                f"No training picture of the class '{before.classes[lost[0]].name}' ({before.name}) can be read. Put at least "
                "one right, or take the class away."
            )
    where = digest(as_json([[one["task"], one["side"], one["number"]] for one in left_out]))
    return replace(stream, tasks=tasks, digest=f"{stream.digest}/without {where[:16]}")


def kept(images: Images, gone: set[int] | None) -> Images:
    """All images but those."""
    if gone is None:
        return images
    return images.take(torch.tensor([number for number in range(len(images)) if number not in gone], dtype=torch.int64))
