"""Images as numbers: the one conversion that every reader of pixels shares."""

from __future__ import annotations

import torch
from torch import Tensor


def as_floats(images: Tensor) -> Tensor:
    """float32 in 0 … 1: uint8 is divided by 255, floats are that already."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
