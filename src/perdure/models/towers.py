"""What any two-tower model offers a method, whichever architecture is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

Part = Literal["image", "text", "scale"]


class Towers(Protocol):
    """An image and a text tower into one space. ``CLIP`` is the first implementation."""

    @property
    def scale(self) -> Tensor:
        """The factor between cosine similarities and logits."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """What is added to logits; None: nothing."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), uint8 or float in 0 … 1 → unit embeddings (B, D) in fp32."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """N prompts → unit embeddings (N, D) in fp32."""
        ...

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Unit embeddings (B, D) and (C, D) → logits (B, C) in fp32."""
        ...

    def part_of(self, name: str) -> Part:
        """The tower that a parameter belongs to by its name, its projection included; ``scale``: the logits' factor (and
        bias), which belongs to neither."""
        ...
