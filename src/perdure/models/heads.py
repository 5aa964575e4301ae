"""Classifiers on top of image features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Row = tuple[str, tuple[str, ...]]  # what a row stands for: a class's name and templates
Gate = Literal["mass", "argmax", "none"]


class Asked(Protocol):
    """A class as a question has it."""

    @property
    def name(self) -> str: ...

    @property
    def templates(self) -> tuple[str, ...]: ...


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


def known(kept: Sequence[Row], asked: Sequence[Asked]) -> tuple[list[int], list[int]]:
    """Which of the classes asked for have a row: their columns in the question, and their rows."""
    place = places(kept)
    there = [(k, place[c.name, c.templates]) for k, c in enumerate(asked) if (c.name, c.templates) in place]
    return [column for column, _ in there], [row for _, row in there]


def mix(
    text: Tensor, visual: Tensor, columns: Sequence[int] | Tensor, a: float, b: float, gate: Gate = "mass",
    asked: Sequence[Asked] = (),
) -> Tensor:  # fmt: skip
    """(a·p_text + b·p_visual) / (a + b) over the classes that have a row (MG-CLIP), and what becomes of the others.

    text: probabilities (N, C); visual: (N, C'), of the classes ``columns`` (C'). ``gate``: ``mass``, a class without a row
    keeps p_text, the visual probabilities share out what the text gives to those that have one; ``argmax`` (RAIL), only
    images whose likeliest class by the text has a row, or bears the name of one that has, are answered by the mixture, in
    which the others have p_visual = 0; ``none``, all images are. ``asked``: the C classes, for their names.
    """
    there = torch.as_tensor(columns, device=text.device)
    out = text.clone()
    if gate == "mass":
        mass = text[:, there].sum(1, keepdim=True)
        out[:, there] = (a * text[:, there] + b * visual * mass) / (a + b)
        return out
    out = a * text / (a + b)
    out[:, there] += b * visual / (a + b)
    if gate == "none":
        return out
    names = {asked[k].name for k in there.tolist()}
    inside = torch.tensor([c.name in names for c in asked], device=text.device)[text.argmax(1)]
    return torch.where(inside.unsqueeze(1), out, text)


def softmax(logits: Tensor, times: int = 1) -> Tensor:
    """Softmax over the classes, ``times`` times."""
    return logits if times == 0 else softmax(torch.softmax(logits, 1), times - 1)
