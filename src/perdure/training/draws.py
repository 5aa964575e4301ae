"""What is drawn of a task's images, in which order, and cropped where: by the generator alone, whoever reads them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from perdure.core import processes
from perdure.data.files import crops
from perdure.data.loader import ahead
from perdure.data.task import Batch, Task
from perdure.data.transforms import some_numbers
from perdure.training.schedule import Schedule


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches without end; every epoch a new order, a last short batch kept."""
    while True:
        yield from torch.randperm(count, generator=generator).split(size)


def drawn(
    task: Task, plan: Schedule, generator: torch.Generator, image_size: int, workers: int = 0, skipped: int = 0
) -> Generator[Batch, None, None]:
    """The task's training images in batches without end, cropped at random where the plan says so. The first ``skipped`` are
    drawn, here and now, and not read. Of pictures in files, processes that share a run read each its rows of a batch (see
    ``processes.whole``)."""
    pixels, captions = task.train.pixels, task.train.captions
    in_memory = isinstance(pixels, Tensor)  # nothing to wait for
    parts = processes.sharing() and not in_memory

    def jobs() -> Iterator[tuple[Tensor, Tensor | None]]:
        for index in batches(len(task.train), plan.batch_size, generator):
            yield index, some_numbers(len(index), generator) if plan.augment else None

    def read(job: tuple[Tensor, Tensor | None]) -> Tensor:
        index, numbers = job
        if parts:
            own = processes.worked(len(index))
            index, numbers = index[own], None if numbers is None else numbers[..., own]
        return pixels[index] if numbers is None else crops(pixels, index, image_size, numbers)

    def batches_read(todo: Iterator[tuple[Tensor, Tensor | None]]) -> Generator[Batch, None, None]:
        for (index, _), images in ahead(todo, read, 0 if in_memory else workers, generator):
            more: dict[str, Any] = {} if captions is None else {"captions": tuple(captions[k] for k in index.tolist())}
            more |= {"parts": len(index)} if parts else {}
            yield Batch(images, task.train.labels[index], index=index, **more)

    todo = jobs()
    for _ in range(skipped):
        next(todo)
    return batches_read(todo)
