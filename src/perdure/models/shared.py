"""A tower's work shared out to the processes of a run: each embeds its rows of a batch, and gets the embeddings of all.

    e = [tower(x₁); …; tower(xₙ)]        ∂L/∂θ = mean over processes r of  J_rᵀ Σ_s (∂L_s/∂e)_r,    J_r = ∂tower(x_r)/∂θ

What follows may be any function L of the embeddings of the whole batch, a matrix over it too: each process computes all of it.
So each finds the same ∂L_s/∂e, and their sum weighs J_r with the number of processes, which the mean over the gradients
(``training/processes.py``) takes back. Parameters that stand after the towers have the same gradient everywhere, and keep it.
The sum on the way back is what makes this hold for towers behind towers too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perdure.core import processes


def shared(tower: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``tower(*inputs)`` (B, …) of inputs of B rows each, which may be pictures that are still in files: this process reads and
    computes its rows alone. Random numbers must not be drawn, nor rows act on each other, inside: see ``processes.alone``."""
    length = len(inputs[0])
    if not processes.sharing() or not length:
        return tower(*(some[:] for some in inputs))
    own = processes.worked(length)
    return Gathered.apply(tower(*(some[own] for some in inputs)), length)


def stretch(pixels: Any) -> Any:
    """Of many images (N, 3, H, W), in memory or in files, those that are this process's; one at least, where there are any."""
    own = processes.worked(len(pixels))
    return pixels if not processes.sharing() else pixels[own] if isinstance(pixels, Tensor) else pixels.select(own)


class Gathered(torch.autograd.Function):
    """The rows of all processes, in order, with their gradient."""

    @staticmethod
    def forward(context: Any, part: Tensor, length: int) -> Tensor:
        context.length, context.count = length, len(part)
        return processes.gathered(part, length)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = processes.rows(context.length)
        found = processes.total(gradient.clone(memory_format=torch.contiguous_format))[own]
        if found.shape[0] == context.count:
            return found, None
        return found.new_zeros(context.count, *found.shape[1:]), None  # a row that stood in where there was none
