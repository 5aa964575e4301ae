"""Images as numbers: the conversions that every reader of pixels shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Resample = Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class Fit:
    """How a picture is made a square of so many pixels a side, as a model's image processor does.

    ``crop``: the shorter side is resized to ``edge`` pixels (0: to the side) and the centre cut out, as CLIP does; else the
    whole picture is pressed into the square, whatever its shape, as SigLIP does. Both antialiased.
    """

    crop: bool = True
    resample: Resample = "bicubic"
    edge: int = 0


CENTRE = Fit()


def as_floats(images: Tensor) -> Tensor:
    """float32 in 0 … 1: uint8 is divided by 255, floats are that already."""
    return images / 255 if images.dtype == torch.uint8 else images.float()


def resized(images: Tensor, size: int, fit: Fit = CENTRE) -> Tensor:
    """(B, 3, H, W) in 0 … 1 → (B, 3, size, size), as ``fit`` says."""
    tall, wide = size, size
    if fit.crop:
        height, width = images.shape[-2:]
        factor = (fit.edge or size) / min(height, width)
        tall, wide = max(size, round(height * factor)), max(size, round(width * factor))
    x = F.interpolate(images, (tall, wide), mode=fit.resample, antialias=True).clamp(0, 1)
    top, left = (tall - size) // 2, (wide - size) // 2
    return x[..., top : top + size, left : left + size]
