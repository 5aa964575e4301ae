"""What a training leaves on record, and what it is stopped for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from perdure.core.errors import PerdureError

LOOK = 50  # steps after which losses are looked at: each look waits for the device


class Losses(dict[str, list[float]]):
    """Every loss by name, one value a step. ``steps``: how many were taken, whatever they recorded."""

    steps = 0


def check_finite(record: Sequence[Mapping[str, Tensor]], name: str) -> None:
    """Refuse a training that diverged, among its last steps: its weights are worth nothing."""
    recent = record[-LOOK:]
    values = [loss for losses in recent for loss in losses.values()]
    if not values or bool(torch.stack(values).isfinite().all()):
        return
    first = len(record) - len(recent) + 1
    step, part = next(
        (number, part)
        for number, losses in enumerate(recent, first)
        for part, loss in losses.items()
        if not math.isfinite(loss.item())
    )
    raise PerdureError(
        f"Training on {name} diverged: the loss '{part}' is not a number from step {step} on. Tasks that were finished "
        "are kept. Start a new run with a smaller lr, a longer warmup or clip_grad=1."
    )


def check_reached(reached: bool, steps: int, name: str) -> None:
    """Refuse a training in which no gradient came to any parameter."""
    if not reached:
        raise PerdureError(
            f"Training on {name}: in {steps} steps no loss reached any parameter, so nothing was learned. The losses that "
            "a method hands to 'backward' must depend on its 'parameters()', with gradients switched on."
        )


def course(record: Sequence[Mapping[str, Tensor]]) -> Losses:
    """Each loss over the steps, 0 where a step lacks it."""
    names = dict.fromkeys(name for losses in record for name in losses)  # in the order in which they appeared
    zero = next((loss.new_zeros(()) for losses in record for loss in losses.values()), torch.zeros(()))
    out = Losses({name: torch.stack([losses.get(name, zero) for losses in record]).tolist() for name in names})
    out.steps = len(record)
    return out
