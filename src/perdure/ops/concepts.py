"""Concepts in a space of texts: how far a direction lies from them, which to choose, what scores mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.core.errors import PerdureError


@dataclass(frozen=True)
class Spread:
    """Mean (D,) and inverse covariance (D, D) of texts, and the mean of their own ``distances``."""

    mean: Tensor
    inverse: Tensor
    typical: float

    def distances(self, x: Tensor) -> Tensor:
        """(n, D) → (n,): the squared Mahalanobis distance, (x - m) S⁻¹ (x - m)ᵀ."""
        away = x - self.mean
        return ((away @ self.inverse) * away).sum(1)


def spread(texts: Tensor, ridge: float = 0.0) -> Spread:
    """Of texts (N, D), S unbiased and with ``ridge`` on its diagonal, in fp64. ``PerdureError`` where S has no inverse."""
    count, width = texts.shape
    if not ridge and count <= width:
        raise PerdureError(
            f"{count} candidate concepts in {width} dimensions have a covariance without an inverse: give more than "
            f"{width}, or set ridge=1e-4."
        )
    x = texts.double()
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / max(1, count - 1)
    covariance.diagonal().add_(ridge)
    inverse = torch.linalg.inv(covariance)
    own = Spread(mean, inverse, 0.0).distances(x).mean().item()
    return Spread(mean.float(), inverse.float(), own)


def chosen(rows: Tensor, candidates: Tensor, count: int) -> list[int]:
    """Each of rows (N, D), made unit, in turn takes the nearest of candidates (N', D) not taken yet; the first ``count``."""
    far = torch.cdist(F.normalize(rows[:count], dim=1), candidates, compute_mode="donot_use_mm_for_euclid_dist")
    picks: list[int] = []
    for row in far:
        row[picks] = torch.inf
        picks.append(int(row.argmin()))
    return picks


def agreement(scores: Tensor, wanted: Tensor) -> Tensor:
    """The mean over concepts of the cosine between the columns of scores³ (B, M) and of wanted³ (B, M)."""
    return F.cosine_similarity(scores**3, wanted**3, dim=0).mean()


def summed(phrases: list[str], shares: Tensor, most: int) -> list[tuple[str, float]]:
    """Shares (M,) of concepts added up by phrase, the ``most`` largest by size first."""
    found: dict[str, float] = {}
    for phrase, share in zip(phrases, shares.tolist(), strict=True):
        found[phrase] = found.get(phrase, 0.0) + share
    return heaviest(found, most)


def heaviest(shares: Mapping[str, float], most: int) -> list[tuple[str, float]]:
    """The ``most`` of named shares that are largest by size; of equals, in the order of their names."""
    return sorted(shares.items(), key=lambda one: (-abs(one[1]), one[0]))[:most]
