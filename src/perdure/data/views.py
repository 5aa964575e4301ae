"""Views of an image for learning without labels: what two of them share is what is to be kept."""

from __future__ import annotations

import torch
from torch import Tensor

from perdure.data.transforms import Range, random_resized_crop

CROP: Range = (0.2, 1.0)
GREY = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # as ITU-R BT.601 weighs them


def distorted(images: Tensor, draw: torch.Generator, scale: Range = CROP) -> Tensor:
    """A view of each image (B, 3, S, S) float32 in 0 … 1, drawn on the processor: a crop of a share of its area, mirrored half
    of the time, brightness, contrast and saturation jittered four times in five, grey one time in five."""
    count = len(images)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=draw).to(images.device)

    view = random_resized_crop(images, images.shape[-1], draw, scale=scale)
    view = torch.where(drawn(0, 1) < 0.5, view.flip(-1), view)
    jitter, brightness, contrast, saturation = drawn(0, 1) < 0.8, drawn(0.6, 1.4), drawn(0.6, 1.4), drawn(0.8, 1.2)
    bright = view * brightness
    even = bright.mean((1, 2, 3), keepdim=True)
    weights = GREY.to(images.device)
    grey = (bright * weights).sum(1, keepdim=True)
    mixed = grey + (even + (bright - even) * contrast - grey) * saturation
    view = torch.where(jitter, mixed.clamp(0, 1), view)
    return torch.where(drawn(0, 1) < 0.2, (view * weights).sum(1, keepdim=True).expand_as(view), view)
