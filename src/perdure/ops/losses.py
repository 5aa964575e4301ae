"""Losses, as pure functions of embeddings and logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def classification(logits: Tensor, labels: Tensor, smoothing: float = 0.0, group: Tensor | None = None) -> Tensor:
    """Cross entropy of logits (B, C) against labels (B,), with label smoothing.

    ``group`` (C,): classes compete within the label's group only; smoothing then spreads over that group.
    """
    if group is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    rivals = group[labels][:, None] == group[None]
    log_p = logits.masked_fill(~rivals, -torch.inf).log_softmax(1)
    hit = -log_p.gather(1, labels[:, None]).squeeze(1)
    spread = -log_p.masked_fill(~rivals, 0).sum(1) / rivals.sum(1)
    return ((1 - smoothing) * hit + smoothing * spread).mean()
