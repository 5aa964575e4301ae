"""A task with images of earlier ones mixed in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.data.files import joined
from perdure.data.task import Context, Images, Task


def earlier(context: Context, names: Iterable[str]) -> dict[str, Task]:
    """Earlier tasks by name. ``PerdureError`` where one is not at hand."""
    known, names = {t.name: t for t in context.tasks}, list(names)
    if gone := [name for name in names if name not in known]:
        raise PerdureError(
            f"Training images of {', '.join(gone)} are wanted again, and not at hand. Learn a stream that holds all tasks, or "
            "let no images be kept."
        )
    return {name: known[name] for name in names}


def recalled(context: Context, kept: Mapping[str, Sequence[int]]) -> dict[str, Images]:
    """Training images of earlier tasks, ``kept`` by their numbers. ``PerdureError`` where a task is not at hand."""
    return {name: context.images(name, torch.tensor(kept[name])) for name in earlier(context, kept)}


def rehearsed(task: Task, context: Context, again: Mapping[str, Images]) -> tuple[Task, Tensor]:
    """``task`` with images of earlier ones, by task, and for each class (C,) whose it is: 0 the task's own, k the k-th earlier
    one's. Where the protocol asks within a task, classes compete within theirs only.

    ``PerdureError`` where a task is not at hand.
    """
    known = earlier(context, again)
    sides = [task.train, *again.values()]
    sizes = torch.tensor([len(t.classes) for t in (task, *known.values())])
    owner, shift = torch.arange(len(sizes)).repeat_interleave(sizes), sizes.cumsum(0) - sizes
    if not again:
        return task, owner
    labels = torch.cat([side.labels + shift[k] for k, side in enumerate(sides)])
    texts = [side.captions for side in sides]
    captions = None if any(one is None for one in texts) else tuple(c for one in texts for c in one or ())
    train = Images(joined([side.pixels for side in sides]), labels, captions)
    classes = (*task.classes, *(one for old in known.values() for one in old.classes))
    return replace(task, classes=classes, train=train, group=owner if context.labels == "task" else None), owner
