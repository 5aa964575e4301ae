"""Classifiers on top of image features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Row = tuple[str, tuple[str, ...]]  # what a row stands for: a class's name and templates


class CosineHead(nn.Module):
    """A row a class, no bias, no temperature: features (N, D) → their cosine similarities to the rows (N, C), in fp32."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(features, dim=1) @ F.normalize(self.rows, dim=1).T


def places(kept: Sequence[Row]) -> dict[Row, int]:
    """The number of the row of each class."""
    return {one: row for row, one in enumerate(kept)}


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
