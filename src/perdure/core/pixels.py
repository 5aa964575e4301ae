"""Images as numbers: what every reader of pixels shares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def as_floats(images: Tensor) -> Tensor:
    """float32 in 0 … 1: uint8 is divided by 255, floats are that already."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def resized(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in 0 … 1 → (B, 3, size, size): the shorter side to ``size``, bicubic, then the centre."""
    height, width = images.shape[-2:]
    factor = size / min(height, width)
    tall, wide = max(size, round(height * factor)), max(size, round(width * factor))
    x = F.interpolate(images, (tall, wide), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (tall - size) // 2, (wide - size) // 2
    return x[..., top : top + size, left : left + size]
