"""How much a training pair counts: a small network on what a frozen model makes of an image and its class's text."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Importance(nn.Module):
    """Unit embeddings of images and of their own texts, (N, D) each → weights (N,) in 0 … 1.

    A linear layer on both and their cosine, or with ``hidden`` units between; it begins with 0.5 for all.
    """

    def __init__(self, width: int, hidden: int = 0):
        super().__init__()
        size = 2 * width + 1
        between = [nn.Linear(size, hidden), nn.GELU()] if hidden else []
        last = nn.Linear(hidden or size, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*between, last)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        cosine = (images * texts).sum(1, keepdim=True)
        return self.layers(torch.cat([images, texts, cosine], 1)).squeeze(1).sigmoid()
