"""The training loop: the only place that back-propagates and steps an optimiser.

``fit`` owns gradients, autocast, clipping, the optimiser, the learning rate and the record of losses. It knows no method: a
learner says what is trained, for how long, and what one step's losses are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from perdure.core.packing import Packed
from perdure.data.task import Batch, Task
from perdure.training.draws import drawn
from perdure.training.processes import averaged, whole
from perdure.training.progress import NOTHING_KEPT, Place, Saver
from perdure.training.record import LOOK, Losses, check_finite, check_reached, course
from perdure.training.schedule import Schedule

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

    def replace(self, name: str, gradient: Tensor) -> None:
        """Put a gradient (a projection, say) in the place of all that the parameter ``name`` has."""
        ...


class Regulariser(Protocol):
    """What is added to a step's losses, whatever they are of."""

    def terms(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Further losses by name, where these are about to be back-propagated."""
        ...

    def clear(self) -> None:
        """They were."""
        ...


class Stepper:
    """What ``optimise`` asks of whatever learns."""

    def regularised(self) -> AbstractContextManager[Regulariser | None]:
        """Entered while steps are taken: what is added to their losses; None: nothing."""
        return contextlib.nullcontext()

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What learns, by name."""
        return {}

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch: hand its losses to ``backward``."""

    def stepped(self, step: int) -> None:
        """After the optimiser's step number ``step`` (1 …): what is done to the weights themselves."""

    def enough(self, steps: int) -> bool:
        """Whether to stop after so many steps, before the schedule ends."""
        return False

    def pack_progress(self) -> Packed:
        """What changes from step to step beside the parameters, as (tensors by file, plain values): see ``Method``."""
        return {}, {}

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """The inverse of ``pack_progress``, before the first step and when all is prepared as for the very first one."""


class Learner(Stepper):
    """What ``fit`` asks of a method."""

    def schedule(self, task: Task) -> Schedule:
        """How long and how fast ``task`` is trained on."""
        raise NotImplementedError

    def again(self, task: Task) -> bool:
        """After training: whether to train anew, under the schedule that is asked for then."""
        return False

    def finish(self, task: Task) -> None:
        """When training is over, before anything is fused: what is left to do with what was learned."""


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

    ``image_size``: the side of the augmented crops, in pixels. ``precision``: ``bf16`` computes under autocast, with the
    weights and the optimiser in fp32; ``fp32`` computes as stored. ``workers``: threads that read pictures ahead. Same
    generator, same task, same bits, whatever their number. ``saver``: who keeps the training as it goes, and knows where it
    was broken off.
    """
    while True:
        skipped = saver.begin(learner, generator)
        plan = learner.schedule(task).over(len(task.train))
        with contextlib.closing(drawn(task, plan, generator, image_size, workers, skipped)) as draws:
            losses = optimise(learner, plan, draws, device, precision, on_step, task.name, saver)
        if not losses.steps or not learner.again(task):
            learner.finish(task)
            return losses


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
    # whatever the caller has switched off
    with torch.inference_mode(False), torch.enable_grad(), learner.regularised() as more:
        for step in range(begun.step, begun.step if begun.last else plan.steps):
            losses: dict[str, Tensor] = {}
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                learner.step(whole(next(draws), device), Accumulator(parameters, losses, more))
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
            saver.stepped(Place(step + 1, last, reached, record))
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
        self, parameters: Mapping[str, Tensor], losses: dict[str, Tensor], regulariser: Regulariser | None = None
    ):
        self.parameters, self.losses, self.regulariser = parameters, losses, regulariser

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
            found = torch.autograd.grad(torch.stack(rooted).sum(), list(self.parameters.values()), allow_unused=True)
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
