"""What any two-tower model offers a method, whichever architecture is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

from perdure.core.pixels import Fit

Part = Literal["image", "text", "scale"]
Scores = Literal["softmax", "sigmoid"]


class Towers(Protocol):
    """An image and a text tower into one space: ``CLIP``, ``SigLIP``, ``SigLIP2``."""

    @property
    def size(self) -> int:
        """The side of the images that the image tower sees, in pixels."""
        ...

    @property
    def fit(self) -> Fit:
        """How a picture is made a square of that size."""
        ...

    @property
    def scale(self) -> Tensor:
        """The factor between cosine similarities and logits."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """What is added to logits; None: nothing."""
        ...

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """N prompts → token ids (N, L); L is what the text tower needs to see."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), uint8 or float in 0 … 1 → unit embeddings (B, D) in fp32."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """N prompts → unit embeddings (N, D) in fp32."""
        ...

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Token ids (N, L) → unit embeddings (N, D) in fp32."""
        ...

    def scaled(self, images: Tensor, texts: Tensor) -> Tensor:
        """Unit embeddings (B, D) and (C, D) → their cosine similarities, scaled (B, C), in fp32: logits without the bias."""
        ...

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Unit embeddings (B, D) and (C, D) → logits (B, C) in fp32."""
        ...

    def probabilities(self, logits: Tensor, scores: Scores) -> Tensor:
        """Logits (B, C) → probabilities: over the classes, or of each class for itself (``sigmoid``)."""
        ...

    def part_of(self, name: str) -> Part:
        """The tower that a parameter belongs to by its name, its projection included; ``scale``: the logits' factor and
        bias, which belong to neither."""
        ...
