"""A task with images of earlier ones mixed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.data.files import joined
from perdure.data.task import Context, Images, Task


def rehearsed(task: Task, context: Context, kept: Mapping[str, Sequence[int]]) -> tuple[Task, Tensor]:
    """``task`` with the images ``kept`` (their numbers, by task) of earlier ones, and for each class (C,) whose it is: 0 the
    task's own, k the k-th kept one's. Where the protocol asks within a task, classes compete within theirs only.

    ``PerdureError`` where a task is not at hand.
    """
    known = {t.name: t for t in context.tasks}
    if gone := [name for name in kept if name not in known]:
        raise PerdureError(
            f"Training images of {', '.join(gone)} are wanted again, and not at hand. Learn a stream that holds all tasks, or "
            "let no images be kept."
        )
    sides = [task.train, *(context.images(name, torch.tensor(numbers)) for name, numbers in kept.items())]
    sizes = torch.tensor([len(t.classes) for t in (task, *(known[name] for name in kept))])
    owner, shift = torch.arange(len(sizes)).repeat_interleave(sizes), sizes.cumsum(0) - sizes
    if not kept:
        return task, owner
    labels = torch.cat([side.labels + shift[k] for k, side in enumerate(sides)])
    texts = [side.captions for side in sides]
    captions = None if any(one is None for one in texts) else tuple(c for one in texts for c in one or ())
    train = Images(joined([side.pixels for side in sides]), labels, captions)
    classes = (*task.classes, *(one for name in kept for one in known[name].classes))
    return replace(task, classes=classes, train=train, group=owner if context.labels == "task" else None), owner
