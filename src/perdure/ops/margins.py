"""Margins between what belongs together and what does not (Chen et al., ICLR 2024, arXiv:2310.00927), and how far a model has
moved: linear CKA of features (Kornblith et al., ICML 2019, arXiv:1905.00414). Pure functions of unit embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RANGE, BINS = 1.0, 40  # of a histogram of margins, from -RANGE to RANGE


def class_margins(cosines: Tensor, labels: Tensor) -> Tensor:
    """(N, C), (N,) → (N,): the cosine to the own class's text less the best of the others; of one class alone, the cosine."""
    own = cosines.gather(1, labels[:, None]).squeeze(1)
    if cosines.shape[1] == 1:
        return own
    return own - cosines.scatter(1, labels[:, None], -torch.inf).amax(1)


def pair_margins(images: Tensor, texts: Tensor) -> Tensor:
    """(n, D) each → (n·(n - 1),): cos(x_i, y_i) - cos(x_i, y_j) of all j ≠ i, row by row."""
    cosines = images @ texts.T
    others = ~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    return (cosines.diagonal()[:, None] - cosines)[others]


def described(margins: Tensor, tau: float) -> dict[str, Any]:
    """Margins in figures: their median (of an even number the lower of two) and mean, the shares above 0 (what is answered
    rightly) and above τ, and how many fall into each of ``BINS`` equal parts of -1 … 1."""
    counts = torch.histc(margins.clamp(-RANGE, RANGE).float().cpu(), BINS, -RANGE, RANGE)
    return {
        "median": margins.median().item(),
        "mean": margins.mean().item(),
        "right": (margins > 0).double().mean().item(),
        "above_tau": (margins > tau).double().mean().item(),
        "histogram": [int(n) for n in counts.tolist()],
    }


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of features (N, H) and (N, H') of the same N things, 0 … 1; of features that are all alike, 1 if both are."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    cross, own, other = ((a.T @ b).norm() for a, b in ((x, y), (x, x), (y, y)))
    both = (own * other).item()
    return (cross.square() / both).item() if both else float(own.item() == other.item())


def correlation(a: list[float], b: list[float]) -> float | None:
    """Pearson's, of as many numbers; None of fewer than three, or where one side is constant."""
    if len(a) < 3:
        return None
    table = torch.tensor([a, b], dtype=torch.float64)
    if bool((table.std(1) == 0).any()):
        return None
    return torch.corrcoef(table)[0, 1].item()
