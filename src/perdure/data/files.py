"""Images that stay in their files until they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perdure.core.errors import DamagedFile


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
            with Image.open(path) as picture:
                picture = picture.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for damaged files
            raise DamagedFile(f"{path} is no image that can be read: {error}.") from None
        factor = self.side / min(picture.size)
        wide, tall = (max(self.side, round(x * factor)) for x in picture.size)
        picture = picture.resize((wide, tall), Image.Resampling.BICUBIC)
        left, top = (wide - self.side) // 2, (tall - self.side) // 2
        picture = picture.crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


Pixels = Any  # (N, 3, H, W) uint8: a Tensor, or Files


def take(pixels: Pixels, index: Tensor) -> Pixels:
    """The images numbered ``index``; files stay unread."""
    return pixels.select(index) if isinstance(pixels, Files) else pixels[index]


def joined(parts: Sequence[Pixels]) -> Pixels:
    """Several sets of images as one."""
    first = parts[0]
    if isinstance(first, Files):
        return Files(tuple(p for part in parts for p in part.paths), first.side)
    return torch.cat(list(parts))
