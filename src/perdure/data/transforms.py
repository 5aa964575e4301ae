"""Training augmentation for a whole batch at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TRIES = 10  # as torchvision's RandomResizedCrop


def random_resized_crop(
    images: Tensor,
    size: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A random crop of each image's area and aspect, resampled bicubically (CLIP's fine-tuning augmentation, no flip).

    images: (B, 3, H, W) float32 in 0 … 1 → (B, 3, size, size), clamped to the same range.
    """
    n, _, height, width = images.shape
    share, spread, across, down = torch.rand(4, TRIES, n, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * share
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * spread)
    wide, tall = (area * aspect * height / width).sqrt(), (area / aspect * width / height).sqrt()
    fits = (wide <= 1) & (tall <= 1)
    first = fits.int().argmax(0, keepdim=True)
    missed = ~fits.any(0)  # the whole image, where no try fits into it
    wide, tall = (x.gather(0, first).squeeze(0).masked_fill(missed, 1.0) for x in (wide, tall))
    across, down = across[0], down[0]
    zero = torch.zeros(n)
    rows = ((wide, zero, (1 - wide) * (2 * across - 1)), (zero, tall, (1 - tall) * (2 * down - 1)))
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    out = F.grid_sample(images, grid.to(images.device), mode="bicubic", padding_mode="border", align_corners=False)
    return out.clamp_(0, 1)
