"""The modality gap (Liang et al., NeurIPS 2022, arXiv:2203.02053): how far apart images and texts lie; MG-CLIP's measures."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logit_means(logits: Tensor, labels: Tensor, batch: int | None = None) -> tuple[float, float]:
    """The mean logit of the true class, and of all other classes, of logits (N, C) with labels (N,) (MG-CLIP).

    ``batch``: the mean over batches of so many images of each batch's mean, as the release takes it, where a last, smaller
    batch counts as much as a whole one; None: the mean over images.
    """
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = (logits.sum(1) - true) / max(1, logits.shape[1] - 1)
    size = batch or max(1, len(logits))
    positive, negative = (torch.stack([part.mean() for part in x.split(size)]).mean() for x in (true, others))
    return positive.item(), negative.item()


def relative_change(before: float, after: float) -> float:
    """|after - before| / |before|: meaningful for negative means too (the release's has no absolute value below)."""
    return abs(after - before) / max(abs(before), 1e-12)


def measure(images: Tensor, texts: Tensor, labels: Tensor, scale: float) -> dict[str, float]:
    """Unit embeddings of images (N, D) with labels (N,) and of class texts (C, D) → the gap, in four numbers.

    ``positive`` and ``negative`` mean logits (``scale`` times cosine); ``distance``, L2, between the means of images and of
    texts; ``angle`` between them, in degrees.
    """
    positive, negative = logit_means(scale * images @ texts.T, labels)
    centre, other = images.mean(0), texts.mean(0)
    cosine = torch.cosine_similarity(centre, other, dim=0).clamp(-1, 1).item()
    return {
        "positive": positive,
        "negative": negative,
        "distance": (centre - other).norm().item(),
        "angle": math.degrees(math.acos(cosine)),
    }
