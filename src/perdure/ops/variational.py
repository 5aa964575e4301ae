"""Gaussian posteriors with independent entries: their divergence, their draws, and the weights of several past ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def divergence(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) ‖ N(prior_mean, e^prior_logvar)) of tensors of one shape, summed over all entries."""
    spread = (logvar - prior_logvar).exp() + (mean - prior_mean).square() * (-prior_logvar).exp()
    return 0.5 * (prior_logvar - logvar + spread - 1).sum()


def discounts(count: int, lam: float) -> list[float]:
    """What each of ``count`` past posteriors weighs, the newest first: λⁱ(1 - λ)/(1 - λⁿ), which sum to 1.

    λ = 0: the newest alone (VCL); λ = 1: all alike (n-step).
    """
    powers = [lam**i for i in range(count)]
    return [p / sum(powers) for p in powers]


def returns(count: int, lam: float) -> list[float]:
    """What a sample of the task i tasks back weighs, i = 0 … count - 1: λⁱ(1 - λⁿ⁻ⁱ)/(1 - λⁿ), or (n - i)/n where λ = 1.

    It is the sum of ``discounts`` from i on: a posterior knows all tasks up to its own.
    """
    return list(accumulate(reversed(discounts(count, lam))))[::-1]


def normal(like: Tensor) -> Tensor:
    """Standard normal numbers in the shape of ``like``."""
    return torch.randn_like(like)


def deviation(logvar: Tensor) -> Tensor:
    """σ·ε: what a draw adds to the means. Its gradient reaches ``logvar``."""
    return (logvar / 2).exp() * normal(logvar)


def shifted(past: Sequence[T], newest: T, count: int, release: bool = False) -> list[T]:
    """Past posteriors, the oldest first, with the newest behind them; ``count`` stay.

    ``release``: as the released code shifts its ``count`` slots (all of them filled), which moves every one down but the last:
    the second newest stays what it was, and is copied on and on.
    """
    return [*past[1:-1], past[-2], newest] if release else [*past, newest][-count:]


def entropies(probabilities: Tensor) -> Tensor:
    """(N,) in nats, of probabilities (N, C)."""
    return torch.special.entr(probabilities).sum(1)
