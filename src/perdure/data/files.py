"""Images that stay in their files until they are asked for."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

from perdure.core.errors import DamagedFile
from perdure.core.pixels import as_floats


@dataclass(frozen=True)
class Files:
    """(N, 3, side, side) uint8, read when indexed: the shorter side resized to ``side`` (bicubic), the centre cut out.

    Indexed like a tensor, by a slice or by numbers (B,), it gives a tensor.
    """

    paths: tuple[Path, ...]
    side: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        chosen = self.select(index).paths
        empty = torch.empty(0, 3, self.side, self.side, dtype=torch.uint8)
        return torch.stack([self.read(path) for path in chosen]) if chosen else empty

    def select(self, index: Tensor | slice) -> Files:
        """Some of the files, still unread."""
        numbers = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return Files(tuple(self.paths[k] for k in numbers), self.side)

    def split(self, size: int) -> Iterator[Tensor]:
        """All images, ``size`` at a time."""
        return (self[at : at + size] for at in range(0, max(1, len(self)), size))

    def read(self, path: Path) -> Tensor:
        try:
            with long_texts(), Image.open(path) as picture:
                picture = picture.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, for damaged files
            raise DamagedFile(f"{path} is no image that can be read: {error}.") from None
        factor = self.side / min(picture.size)
        wide, tall = (max(self.side, round(x * factor)) for x in picture.size)
        picture = picture.resize((wide, tall), Image.Resampling.BICUBIC)
        left, top = (wide - self.side) // 2, (tall - self.side) // 2
        picture = picture.crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


@contextlib.contextmanager
def long_texts() -> Iterator[None]:
    """Let Pillow read sound PNGs that carry long notes: only their pixels are wanted."""
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28
    try:
        yield
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = limits


@dataclass(frozen=True)
class Joined:
    """Several sets of images that are not alike (files beside tensors, other sizes), read as one at the first one's size."""

    parts: tuple[Any, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        numbers = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        images = [self.one(number) for number in numbers]
        size = images[0].shape[-2:] if images else (1, 1)
        alike = [
            x if x.shape[-2:] == size else F.interpolate(x[None], size, mode="bicubic", antialias=True)[0]
            for x in images
        ]
        return torch.stack(alike).clamp_(0, 1) if alike else torch.empty(0, 3, *size)

    def one(self, number: int) -> Tensor:
        """One image, (3, H, W) float."""
        for part in self.parts:
            if number < len(part):
                return as_floats(part[torch.tensor([number])])[0]
            number -= len(part)
        raise IndexError(number)

    def split(self, size: int) -> Iterator[Tensor]:
        """All images, ``size`` at a time."""
        return (self[at : at + size] for at in range(0, max(1, len(self)), size))


Pixels = Any  # (N, 3, H, W) uint8, or float in 0 … 1: a Tensor, Files or Joined


def take(pixels: Pixels, index: Tensor) -> Pixels:
    """The images numbered ``index``; files stay unread."""
    return pixels.select(index) if isinstance(pixels, Files) else pixels[index]  # joined ones are read


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


def joined(parts: Sequence[Pixels]) -> Pixels:
    """Several sets of images as one."""
    first = parts[0]
    if all(isinstance(part, Files) and part.side == first.side for part in parts):
        return Files(tuple(p for part in parts for p in part.paths), first.side)
    if all(
        isinstance(part, Tensor) and part.shape[1:] == first.shape[1:] and part.dtype == first.dtype for part in parts
    ):
        return torch.cat(list(parts))
    return Joined(tuple(parts))
