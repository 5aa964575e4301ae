"""Classifiers on top of image features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Module):
    """A row a class, no bias, no temperature: features (N, D) → their cosine similarities to the rows (N, C)."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) @ F.normalize(self.rows, dim=1).T


def places(kept: Sequence[Sequence[Any]]) -> dict[tuple[str, tuple[str, ...]], int]:
    """The number of the row of each class, by name and templates, of rows that are kept as [name, templates]."""
    return {(name, tuple(templates)): row for row, (name, templates) in enumerate(kept)}


def mix(text: Tensor, visual: Tensor, columns: Tensor, a: float, b: float) -> Tensor:
    """(a·p_text + b·p_visual) / (a + b) over the classes that have a row (MG-CLIP).

    text: probabilities (N, C); visual: (N, C'), of the classes ``columns`` (C',). A class without a row keeps p_text: the
    visual probabilities share out what the text gives to those that have one.
    """
    mass = text[:, columns].sum(1, keepdim=True)
    out = text.clone()
    out[:, columns] = (a * text[:, columns] + b * visual * mass) / (a + b)
    return out


def softmax(logits: Tensor, times: int = 1) -> Tensor:
    """Softmax over the classes, ``times`` times."""
    return logits if times == 0 else softmax(torch.softmax(logits, 1), times - 1)
