"""The training loop: the only place that back-propagates and steps an optimiser.

``fit`` owns gradients, autocast, clipping, the optimiser, the learning rate and the record of losses. It knows no method: a
learner says what is trained, for how long, and what one step's losses are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perdure.core import processes
from perdure.core.device import sent
from perdure.core.precision import autocast
from perdure.data.files import CPU, crops
from perdure.data.loader import ahead
from perdure.data.task import Batch, Task
from perdure.data.transforms import some_numbers
from perdure.training.learner import Backward, Gradients, Learner, Regulariser, Stepper
from perdure.training.processes import averaged, whole
from perdure.training.progress import NOTHING_KEPT, Place, Saver
from perdure.training.record import LOOK, Losses, check_finite, check_reached, course
from perdure.training.scale import Scale
from perdure.training.schedule import Schedule

__all__ = [
    "Backward",
    "Gradients",
    "Learner",
    "Losses",
    "Stepper",
    "batches",
    "drawn",
    "fit",
    "mean_gradient",
    "optimise",
]
OnStep = Callable[[int, int, Mapping[str, Tensor]], None]


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches without end; every epoch a new order, a last short batch kept."""
    while True:
        yield from torch.randperm(count, generator=generator).split(size)


def fit(
    learner: Learner,
    task: Task,
    generator: torch.Generator,
    image_size: int,
    device: torch.device,
    precision: str = "fp32",
    on_step: OnStep | None = None,
    workers: int = 0,
    saver: Saver = NOTHING_KEPT,
) -> Losses:
    """Train on one task; return every loss by name, one value a step.

    ``image_size``: the side of the augmented crops, in pixels. ``precision``: ``bf16`` and ``fp16`` compute under autocast,
    with the weights and the optimiser in fp32 (``fp16`` with its losses scaled); ``fp32`` computes as stored. ``workers``:
    threads that read pictures ahead. Same generator, same task, same bits, whatever their number. ``saver``: who keeps the
    training as it goes, and knows where it was broken off.
    """
    while True:
        skipped = saver.begin(learner, generator)
        plan = learner.schedule(task).over(len(task.train))
        with contextlib.closing(drawn(task, plan, generator, image_size, workers, skipped, device)) as draws:
            losses = optimise(learner, plan, draws, device, precision, on_step, task.name, saver)
        if not losses.steps or not learner.again(task):
            learner.finish(task)
            return losses


def drawn(
    task: Task, plan: Schedule, generator: torch.Generator, image_size: int, workers: int = 0, skipped: int = 0,
    device: torch.device = CPU,
) -> Generator[Batch, None, None]:  # fmt: skip
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
        if numbers is None:
            return pixels[index]
        return crops(pixels, index, image_size, sent(numbers, device) if in_memory else numbers)

    def batches_read(todo: Iterator[tuple[Tensor, Tensor | None]]) -> Generator[Batch, None, None]:
        for (index, _), images in ahead(todo, read, 0 if in_memory else workers, generator):
            more: dict[str, Any] = {} if captions is None else {"captions": tuple(captions[k] for k in index.tolist())}
            more |= {"parts": len(index)} if parts else {}
            yield Batch(images, task.train.labels[index], index=index, **more)

    todo = jobs()
    for _ in range(skipped):
        next(todo)
    return batches_read(todo)


def optimise(
    learner: Stepper, plan: Schedule, draws: Iterator[Batch], device: torch.device, precision: str = "fp32",
    on_step: OnStep | None = None, name: str = "features", saver: Saver = NOTHING_KEPT,
) -> Losses:  # fmt: skip
    """Take ``plan.steps`` steps, or until the learner has ``enough``; return each loss over the steps.

    Raises ``PerdureError`` within 50 steps where a loss is not finite or nothing can learn; ``name`` says of what. What
    ``saver`` knows of an earlier beginning is gone on with; ``draws`` are those of the steps that are left.
    """
    parameters = dict(learner.parameters())
    if plan.steps == 0 or not parameters:
        return Losses()
    optimizer, trained = plan.optimizer_of(parameters), list(parameters.values())
    begun = saver.take_up(parameters, optimizer)
    record, reached = begun.record, begun.reached
    scale = (begun.scale or Scale()) if precision == "fp16" else None
    # whatever the caller has switched off
    with torch.inference_mode(False), torch.enable_grad(), learner.regularised() as more:
        for step in range(begun.step, begun.step if begun.last else plan.steps):
            losses: dict[str, Tensor] = {}
            with autocast(device, precision):
                learner.step(whole(next(draws), device), Accumulator(parameters, losses, more, scale))
            reached = reached or any(p.grad is not None for p in trained)
            plan.set(optimizer, step)
            if plan.clip is not None:
                nn.utils.clip_grad_norm_(trained, plan.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            learner.stepped(step + 1)
            record.append(losses)
            if on_step:
                on_step(step + 1, plan.steps, losses)
            last = learner.enough(step + 1) or step + 1 == plan.steps
            if last or (step + 1) % LOOK == 0:
                check_finite(record, name)
                check_reached(reached, step + 1, name)
            if scale:
                scale.stepped()
            saver.stepped(Place(step + 1, last, reached, record, scale))
            if last:
                break
    return course(record)


def mean_gradient(
    learner: Stepper, parameters: Mapping[str, Tensor], draws: Iterable[Batch], device: torch.device, name: str
) -> dict[str, Tensor]:
    """The mean over batches of the gradient of the learner's losses, of any ``parameters``, in fp32; no step is taken.

    Zero where nothing reaches a parameter. Raises ``PerdureError`` where a loss is not finite; ``name`` says of what.
    """
    total = {key: torch.zeros_like(p) for key, p in parameters.items()}
    learns = {key: p.requires_grad for key, p in parameters.items()}
    count = 0
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for p in parameters.values():
            p.requires_grad_(True)
        for batch in draws:
            count += 1
            losses: dict[str, Tensor] = {}
            learner.step(whole(batch, device), Accumulator(parameters, losses))
            check_finite([losses], name)
            for key, p in parameters.items():
                total[key] += 0 if p.grad is None else p.grad
                p.grad = None
        for key, p in parameters.items():
            p.requires_grad_(learns[key])
    return {key: gradient / max(1, count) for key, gradient in total.items()}


class Accumulator:
    """The ``backward`` of one step; writes each loss into ``losses``."""

    def __init__(
        self, parameters: Mapping[str, Tensor], losses: dict[str, Tensor], regulariser: Regulariser | None = None,
        scale: Scale | None = None,
    ):  # fmt: skip
        self.parameters, self.losses, self.regulariser, self.scale = parameters, losses, regulariser, scale

    def __call__(self, **losses: Tensor) -> Gradients:
        if self.regulariser is not None:
            losses |= self.regulariser.terms(losses)
        try:
            return self.propagate(losses)
        finally:
            if self.regulariser is not None:
                self.regulariser.clear()

    def propagate(self, losses: Mapping[str, Tensor]) -> Gradients:
        """``__call__`` with all losses there are."""
        self.losses.update({name: loss.detach().float() for name, loss in losses.items()})
        rooted = [loss.float() for loss in losses.values() if loss.requires_grad]
        if not rooted:
            return dict.fromkeys(self.parameters)
        # Autocast would round what flows back through the parts that were computed in fp32 on purpose.
        with torch.autocast(rooted[0].device.type, enabled=False):
            loss, own = torch.stack(rooted).sum(), list(self.parameters.values())
            found = self.scale.gradients(loss, own) if self.scale else torch.autograd.grad(loss, own, allow_unused=True)
        gradients: Gradients = dict(zip(self.parameters, averaged(found), strict=True))
        for name, gradient in gradients.items():
            if gradient is not None:
                self.add(name, gradient)
        return gradients

    def add(self, name: str, gradient: Tensor) -> None:
        parameter = self.parameters[name]  # a new tensor each time: what was returned before stays as it was
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def replace(self, name: str, gradient: Tensor) -> None:
        self.parameters[name].grad = gradient
