"""How many directions features use, and how alike their dimensions are."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the shares of variance by principal direction (Roy and Vetterli, EUSIPCO 2007, there of singular
    values), of features (N, d): d where all directions vary alike, 1 where one does."""
    rows = features.double() - features.double().mean(0)
    shares = torch.linalg.svdvals(rows).square()
    shares = shares / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def mean_correlation(features: Tensor) -> float:
    """The mean |correlation| of two dimensions of features (N, d); dimensions that never vary are left out."""
    rows = features.double() - features.double().mean(0)
    norms = rows.norm(dim=0)
    rows = rows[:, norms > 0] / norms[norms > 0]
    size = rows.shape[1]
    apart = (rows.T @ rows).abs().sum() - size
    return float(apart / max(1, size * (size - 1)))
