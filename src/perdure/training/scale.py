"""fp16 keeps numbers from 6e-8 to 65,504: a loss is scaled before it is back-propagated, and its gradients scaled back.

As in mixed precision training (Micikevicius et al., ICLR 2018, arXiv:1710.03740), but for one thing: where gradients overflow,
the scale is halved and the same losses are back-propagated again, so that every step is taken, and with the gradients of its
own batch. Whoever asks for gradients is given them in fp32, at their true size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.core import processes

FIRST, GROWS_AFTER = 2.0**16, 2000  # steps without overflow after which the scale is doubled


@dataclass
class Scale:
    """What losses are multiplied with. ``steps``: taken since it last changed."""

    value: float = FIRST
    steps: int = 0

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """d ``loss``/d each of ``parameters``; None where nothing reaches it. Gradients that overflow at scale 1 are returned
        as they are: the loss itself is at fault."""
        while True:
            found = torch.autograd.grad(loss * self.value, parameters, allow_unused=True, retain_graph=True)
            if self.value <= 1 or finite(found):
                return [None if g is None else g.float() / self.value for g in found]
            self.value, self.steps = self.value / 2, 0

    def stepped(self) -> None:
        """A step was taken."""
        self.steps += 1
        if self.steps == GROWS_AFTER:
            self.value, self.steps = self.value * 2, 0


def finite(gradients: Sequence[Tensor | None]) -> bool:
    """Whether all numbers are, in all processes: they must try again together. Waits for the device."""
    sums = [g.float().abs().sum() for g in gradients if g is not None]
    total = torch.stack(sums).sum().reshape(1) if sums else torch.zeros(1)
    return bool(processes.total(total).isfinite())
