"""What ``fit`` asks of whatever learns, and what it lends to a step."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from perdure.core.packing import Packed
from perdure.data.task import Batch, Task
from perdure.training.schedule import Schedule

Gradients = dict[str, Tensor | None]


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
