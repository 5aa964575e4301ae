"""From embeddings to logits and scores, with a bias or without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.models.towers import Scores


class Logits(ABC):
    """What two towers say of an image and a text, once both are embedded."""

    kind: ClassVar[str]  # transformers' model_type
    backbone: Any
    path: str

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """What is added to logits; None: nothing."""

    @property
    def scale(self) -> Tensor:
        """The factor between cosine similarities and logits, exp(logit_scale)."""
        return self.backbone.logit_scale.exp()

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """s·I·Tᵀ in fp32, of unit embeddings (B, D) and (C, D)."""
        with torch.autocast(images.device.type, enabled=False):
            return self.scale * images @ texts.T

    def scaled(self, images: Tensor, texts: Tensor) -> Tensor:
        """s·I·Tᵀ, without the bias that a model may add to it."""
        logits = self.similarity(images, texts)
        return logits if self.bias is None else logits - self.bias

    def probabilities(self, logits: Tensor, scores: Scores = "softmax") -> Tensor:
        """Of logits (B, C) of ``similarity``: over the classes (the bias cancels), or of each class for itself, as a model with
        a bias was trained to say it. ``PerdureError`` for ``sigmoid`` of a model without."""
        if scores == "softmax":
            return logits.softmax(1)
        self.check_bias("sigmoid scores")
        return logits.sigmoid()

    def check_bias(self, what: str) -> None:
        """Refuse what only a model that was trained with a bias can do."""
        if self.bias is None:
            raise PerdureError(
                f"{what}: {self.path} is a '{self.kind}' model, whose logits have no bias and mean nothing one by one. Use "
                "softmax, or a SigLIP."
            )
