"""Classes as points in the space of embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def class_means(features: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Features (N, D), labels (N,) → their means by class (count, D), not made unit again, and how many each has (count,).

    A class without images has the mean 0.
    """
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, labels, features)
    sizes = torch.bincount(labels, minlength=count)
    return sums / sizes.clamp_min(1).unsqueeze(1), sizes


def blend(images: Tensor, texts: Tensor) -> Tensor:
    """Prototypes (C, D), unit: halfway between a class's image mean and its text mean (ConDU). An image mean of 0 counts
    for nothing: the class is where its text is."""
    return F.normalize((images + texts) / 2, dim=1)


def best_similarity(features: Tensor, prototypes: Tensor) -> Tensor:
    """(N,): cosine similarity of unit features (N, D) to the nearest of unit prototypes (C, D)."""
    return (features @ prototypes.T).amax(1)
