"""The augmentation of CLIP's fine-tuning: a random crop of area and aspect (torchvision's RandomResizedCrop), no flip."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TRIES = 10  # as torchvision's RandomResizedCrop
SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
Range = tuple[float, float]


def some_numbers(count: int, generator: torch.Generator) -> Tensor:
    """(4, TRIES, count) uniform numbers: all that chance has to say about the crops of so many images."""
    return torch.rand(4, TRIES, count, generator=generator)


def crop_shares(
    height: Tensor, width: Tensor, numbers: Tensor, scale: Range = SCALE, ratio: Range = RATIO
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Crops (n,) each of images of so many pixels: width and height as shares of the image's, and where they lie in what is
    left (0 … 1). The first of the tries that fits into the image; where none does, the largest in the middle whose aspect
    is allowed."""
    share, spread, across, down = numbers
    area = scale[0] + (scale[1] - scale[0]) * share
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * spread)
    wide, tall = (area * aspect * height / width).sqrt(), (area / aspect * width / height).sqrt()
    fits = (wide <= 1) & (tall <= 1)
    first, missed = fits.int().argmax(0, keepdim=True), ~fits.any(0)
    most_wide, most_tall = (height * ratio[1] / width).clamp_max(1), (width / (height * ratio[0])).clamp_max(1)
    wide, tall = wide.gather(0, first).squeeze(0), tall.gather(0, first).squeeze(0)
    wide, tall = torch.where(missed, most_wide, wide), torch.where(missed, most_tall, tall)
    middle = torch.full_like(wide, 0.5)
    return wide, tall, torch.where(missed, middle, across[0]), torch.where(missed, middle, down[0])


def crop_box(size: tuple[int, int], numbers: Tensor, scale: Range = SCALE, ratio: Range = RATIO) -> Box:
    """The crop of a picture of ``size`` (width, height), in whole pixels as torchvision has it, by ``numbers`` (4, TRIES).

    ``crop_shares`` of one picture, in plain numbers: threads that decode would wait for one another over so small tensors.
    """
    width, height = size
    shares, spreads, across, down = numbers.tolist()
    wide, tall = min(1, height * ratio[1] / width), min(1, width / (height * ratio[0]))
    place = 0.5, 0.5
    for share, spread in zip(shares, spreads, strict=True):
        area = scale[0] + (scale[1] - scale[0]) * share
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * spread)
        tried = math.sqrt(area * aspect * height / width), math.sqrt(area / aspect * width / height)
        if max(tried) <= 1:
            (wide, tall), place = tried, (across[0], down[0])
            break
    own = max(1, round(wide * width)), max(1, round(tall * height))
    left, top = round(place[0] * (width - own[0])), round(place[1] * (height - own[1]))
    return left, top, left + own[0], top + own[1]


def random_resized_crop(
    images: Tensor, size: int, draw: torch.Generator | Tensor, scale: Range = SCALE, ratio: Range = RATIO
) -> Tensor:
    """A random crop of each image, resampled bicubically.

    images: (B, 3, H, W) float32 in 0 … 1 → (B, 3, size, size), clamped to the same range. ``draw``: a generator, or
    ``some_numbers`` of it.
    """
    n, _, height, width = images.shape
    numbers = some_numbers(n, draw) if isinstance(draw, torch.Generator) else draw
    tall_in, wide_in = (numbers.new_full((n,), float(x)) for x in (height, width))
    wide, tall, across, down = crop_shares(tall_in, wide_in, numbers, scale, ratio)
    zero = numbers.new_zeros(n)
    rows = ((wide, zero, (1 - wide) * (2 * across - 1)), (zero, tall, (1 - tall) * (2 * down - 1)))
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    out = F.grid_sample(images, grid.to(images.device), mode="bicubic", padding_mode="border", align_corners=False)
    return out.clamp_(0, 1)


def turned(images: Tensor, turns: Sequence[int] = (0, 1, 2, 3)) -> Tensor:
    """(B, 3, H, W) → (len(turns)·B, 3, H, W): all images turned anticlockwise by so many quarters, one turn after another.
    H must be W where a turn is odd."""
    return torch.cat([torch.rot90(images, k, (-2, -1)) for k in turns])
