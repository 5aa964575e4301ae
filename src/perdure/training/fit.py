"""The training loop: the only place that back-propagates and steps an optimiser.

``fit`` owns gradients, autocast, clipping, the optimiser, the learning rate and the record of losses. It knows no method: a
learner says what is trained, for how long, and what one step's losses are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.data.task import Batch, Task
from perdure.data.transforms import random_resized_crop

Gradients = dict[str, Tensor | None]
OnStep = Callable[[int, int, Mapping[str, Tensor]], None]


class Backward(Protocol):
    """What a step calls with its losses; gradients of several calls accumulate."""

    def __call__(self, **losses: Tensor) -> Gradients:
        """Back-propagate the sum of named losses; return THIS call's gradients by parameter name.

        A loss without a graph is recorded, no more.
        """
        ...

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a gradient that is known in closed form to what the parameter ``name`` has."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: linear warm-up to ``lr``, then a cosine to ``floor``·lr at ``horizon``.

    GIFT's, ZSCL's and ConDU's recipe goes to 0, a new rate each step; MG-CLIP's to a hundredth, a new rate each epoch
    (``stride`` steps). ``augment``: whether images are cropped at random.
    """

    steps: int
    lr: float
    warmup: int
    batch_size: int
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    horizon: int | None = None  # the step at which the rate is lowest; None: ``steps``, so that no step is taken there
    floor: float = 0.0
    stride: int = 1
    augment: bool = True

    def rate(self, step: int) -> float:
        """The learning rate of step 0 … steps - 1."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        length = (self.steps if self.horizon is None else self.horizon) - self.warmup
        gone = (step - self.warmup) // self.stride * self.stride
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * gone / max(1, length))))


class Stepper(Protocol):
    """What ``optimise`` asks of whatever learns."""

    def parameters(self) -> Mapping[str, nn.Parameter]: ...

    def step(self, batch: Batch, backward: Backward) -> None: ...

    def enough(self, steps: int) -> bool:
        """Whether to stop after so many steps."""
        ...


class Learner(Stepper, Protocol):
    """What ``fit`` asks of a method."""

    def schedule(self, task: Task) -> Schedule: ...

    def again(self, task: Task) -> bool:
        """After training: whether to train anew, under the schedule that is asked for then."""
        ...


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
) -> dict[str, list[float]]:
    """Train on one task; return every loss by name, one value a step.

    ``image_size``: the side of the augmented crops, in pixels. ``precision``: ``bf16`` computes under autocast, with the
    weights and the optimiser in fp32; ``fp32`` computes as stored. Same generator, same task, same bits.
    """
    while True:
        plan = learner.schedule(task)
        record = optimise(learner, plan, crops(task, plan, generator, image_size), device, precision, on_step)
        losses = course(record, task.name) if record else {}
        if not record or not learner.again(task):
            return losses


def crops(task: Task, plan: Schedule, generator: torch.Generator, image_size: int) -> Iterator[Batch]:
    """The task's training images in batches without end, cropped at random where the plan says so."""
    for index in batches(len(task.train), plan.batch_size, generator):
        images = task.train.pixels[index].float() / 255
        if plan.augment:
            images = random_resized_crop(images, image_size, generator)
        yield Batch(images, task.train.labels[index])


def optimise(
    learner: Stepper, plan: Schedule, draws: Iterator[Batch], device: torch.device, precision: str = "fp32",
    on_step: OnStep | None = None,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Take ``plan.steps`` steps of AdamW, or until the learner has ``enough``; return each step's losses by name."""
    parameters = dict(learner.parameters())
    if plan.steps == 0 or not parameters:
        return []
    trained = list(parameters.values())
    optimizer = torch.optim.AdamW(trained, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay, fused=True)
    record: list[dict[str, Tensor]] = []
    for step in range(plan.steps):
        batch = next(draws)
        losses: dict[str, Tensor] = {}
        backward = Accumulator(parameters, losses)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            learner.step(Batch(batch.images.to(device), batch.labels.to(device)), backward)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        if plan.clip is not None:
            nn.utils.clip_grad_norm_(trained, plan.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.append(losses)
        if on_step:
            on_step(step + 1, plan.steps, losses)
        if learner.enough(step + 1):
            break
    return record


def course(record: Sequence[Mapping[str, Tensor]], task: str) -> dict[str, list[float]]:
    """Each loss over the steps, 0 where a step lacks it. Refuses a training that diverged: its weights are worth nothing."""
    names = {name: None for losses in record for name in losses}  # in the order in which they appeared
    zero = next((loss.new_zeros(()) for losses in record for loss in losses.values()), torch.zeros(()))
    out = {name: torch.stack([losses.get(name, zero) for losses in record]).tolist() for name in names}
    for name, values in out.items():
        bad = [step for step, value in enumerate(values, 1) if not math.isfinite(value)]
        if bad:
            raise PerdureError(
                f"Training on {task} diverged: the loss '{name}' is not a number from step {bad[0]} on. "
                "Tasks that were finished are kept. Start a new run with a smaller lr, a longer warmup or clip_grad=1."
            )
    return out


class Accumulator:
    """The ``backward`` of one step; writes each loss into ``losses``."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], losses: dict[str, Tensor]):
        self.parameters, self.losses = parameters, losses

    def __call__(self, **losses: Tensor) -> Gradients:
        self.losses.update({name: loss.detach().float() for name, loss in losses.items()})
        rooted = [loss.float() for loss in losses.values() if loss.requires_grad]
        if not rooted:
            return dict.fromkeys(self.parameters)
        found = torch.autograd.grad(torch.stack(rooted).sum(), list(self.parameters.values()), allow_unused=True)
        gradients: Gradients = dict(zip(self.parameters, found, strict=True))
        for name, gradient in gradients.items():
            if gradient is not None:
                self.add(name, gradient)
        return gradients

    def add(self, name: str, gradient: Tensor) -> None:
        parameter = self.parameters[name]  # a new tensor each time: what was returned before stays as it was
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
