"""Which images are copies of one another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from perdure.data.files import Files, Joined, Pixels


def copies(pixels: Pixels) -> list[Tensor]:
    """The numbers of images that are copies of one another, bit for bit: a group (2 or more) an image."""
    places: dict[bytes, list[int]] = {}
    for number, mark in enumerate(marks(pixels)):
        places.setdefault(mark, []).append(number)
    return [torch.tensor(group) for group in places.values() if len(group) > 1]


def marks(pixels: Pixels) -> Iterator[bytes]:
    """A digest of each image: of its pixels, or of its file as it lies there."""
    if isinstance(pixels, Joined):
        yield from (mark for part in pixels.parts for mark in marks(part))
    elif isinstance(pixels, Files):
        yield from (hashlib.sha256(path.read_bytes()).digest() for path in pixels.paths)
    else:
        yield from (hashlib.sha256(image.cpu().numpy().tobytes()).digest() for image in pixels)
