"""Images that stay in their files until they are asked for."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from perdure.core.errors import DamagedFile
from perdure.core.pixels import CENTRE, Fit, as_floats
from perdure.data.transforms import crop_box, random_resized_crop, some_numbers

# What Pillow raises for damaged files.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # modes of 16-bit grey pictures


@dataclass(frozen=True)
class Files:
    """(N, 3, side, side) uint8, read when indexed as a checkpoint's image processor would: as ``fit`` says. ``crops`` cuts
    from the whole picture.

    Indexed like a tensor, by a slice or by numbers (B,), it gives a tensor.
    """

    paths: tuple[Path, ...]
    side: int
    fit: Fit = CENTRE

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        chosen = self.select(index).paths
        empty = torch.empty(0, 3, self.side, self.side, dtype=torch.uint8)
        return torch.stack(list(readers().map(self.read, chosen))) if chosen else empty

    def at(self, side: int, fit: Fit = CENTRE) -> Files:
        """The same files, read at another size and another way: the model's."""
        return replace(self, side=side, fit=fit)

    def select(self, index: Tensor | slice) -> Files:
        """Some of the files, still unread."""
        numbers = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return replace(self, paths=tuple(self.paths[k] for k in numbers))

    def split(self, size: int) -> Iterator[Tensor]:
        """All images, ``size`` at a time."""
        return (self[at : at + size] for at in range(0, max(1, len(self)), size))

    def read(self, path: Path) -> Tensor:
        """One picture, (3, side, side) uint8."""
        with opened(path) as picture:
            short, edge = min(picture.size), self.fit.edge or self.side
            wide, tall = (edge if x == short or not self.fit.crop else int(edge * x / short) for x in picture.size)
            picture = picture.resize((wide, tall), Image.Resampling[self.fit.resample.upper()])
            left, top = (wide - self.side) // 2, (tall - self.side) // 2
            return as_tensor(picture.crop((left, top, left + self.side, top + self.side)))

    def crops(self, index: Tensor, size: int, numbers: Tensor) -> Tensor:
        """(B, 3, size, size) uint8: random crops of the whole pictures ``index`` (B,), by ``numbers`` as ``some_numbers`` has
        them, antialiased."""

        def one(job: tuple[Path, Tensor]) -> Tensor:
            with opened(job[0]) as picture:
                crop = picture.crop(crop_box(picture.size, job[1]))
                return as_tensor(crop.resize((size, size), Image.Resampling.BICUBIC))

        chosen = self.select(index).paths
        return torch.stack([one(job) for job in zip(chosen, numbers.unbind(2), strict=True)])


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture as RGB, the right way up. Of several frames the first; transparency is dropped, as image processors do; grey of
    16 bits keeps its range (processors cut it off at 255). ``DamagedFile`` for what cannot be read."""
    try:
        with LongTexts(), Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in DEEP:
                picture = Image.fromarray((np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8))
            yield picture.convert("RGB")
    except UNREADABLE as error:
        raise DamagedFile(f"{path} is no image that can be read: {error}.") from None


def cannot_be_opened(pixels: Any, most: int) -> list[Path]:
    """Pictures in files that are gone or no pictures by their first bytes, of at most ``most`` that are looked at, evenly
    spread: a cheap look, nothing is decoded."""
    if isinstance(pixels, Joined):
        return [path for part in pixels.parts for path in cannot_be_opened(part, most)]
    if not isinstance(pixels, Files) or not len(pixels):
        return []
    places = torch.linspace(0, len(pixels) - 1, min(most, len(pixels))).round().long()

    def trouble(path: Path) -> bool:
        try:
            with LongTexts(), Image.open(path):
                return False
        except UNREADABLE:
            return True

    paths = pixels.select(places).paths
    return [path for path, bad in zip(paths, readers().map(trouble, paths), strict=True) if bad]


class LongTexts(contextlib.AbstractContextManager[None]):
    """Lets Pillow read sound PNGs that carry long notes: only their pixels are wanted. Its limits are put back when the
    last of several threads is done."""

    lock, inside, limits = threading.Lock(), 0, (0, 0)

    def __enter__(self) -> None:
        with self.lock:
            if not LongTexts.inside:
                LongTexts.limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
                PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28
            LongTexts.inside += 1

    def __exit__(self, *failure: object) -> None:
        with self.lock:
            LongTexts.inside -= 1
            if not LongTexts.inside:
                PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = LongTexts.limits


@cache
def readers() -> ThreadPoolExecutor:
    """Who decodes pictures: Pillow lets go of Python's lock meanwhile."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="perdure-reads")


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

    def at(self, side: int, fit: Fit = CENTRE) -> Joined:
        """Those in files read at another size and another way."""
        return Joined(tuple(at(part, side, fit) for part in self.parts))

    def one(self, number: int) -> Tensor:
        """One image, (3, H, W) float."""
        part, place = self.place(number)
        return as_floats(part[torch.tensor([place])])[0]

    def place(self, number: int) -> tuple[Any, int]:
        """The set that an image is in, and its number there."""
        for part in self.parts:
            if number < len(part):
                return part, number
            number -= len(part)
        raise IndexError(number)

    def crops(self, index: Tensor, size: int, numbers: Tensor) -> Tensor:
        """(B, 3, size, size) float, as ``Files.crops``."""
        out = []
        for number, own in zip(index.tolist(), numbers.unbind(2), strict=True):
            part, place = self.place(number)
            out.append(as_floats(crops(part, torch.tensor([place]), size, own.unsqueeze(2)))[0])
        return torch.stack(out)

    def split(self, size: int) -> Iterator[Tensor]:
        """All images, ``size`` at a time."""
        return (self[at : at + size] for at in range(0, max(1, len(self)), size))


Pixels = Any  # (N, 3, H, W) uint8, or float in 0 … 1: a Tensor, Files or Joined


def take(pixels: Pixels, index: Tensor) -> Pixels:
    """The images numbered ``index``; files stay unread."""
    return pixels.select(index) if isinstance(pixels, Files) else pixels[index]  # joined ones are read


def at(pixels: Pixels, side: int, fit: Fit = CENTRE) -> Pixels:
    """The same images; those in files are read at another size and another way."""
    return pixels if isinstance(pixels, Tensor) else pixels.at(side, fit)


def crops(pixels: Pixels, index: Tensor, size: int, numbers: Tensor) -> Tensor:
    """Random crops (B, 3, size, size) of the images ``index`` (B,), of files those of the whole pictures."""
    if isinstance(pixels, Tensor):
        return random_resized_crop(as_floats(pixels[index]), size, numbers)
    return pixels.crops(index, size, numbers)


def all_cropped(pixels: Pixels, size: int, generator: torch.Generator, batch: int = 256) -> Iterator[Tensor]:
    """One random crop of each image, in order, ``batch`` at a time: which crops are drawn depends on it."""
    for index in torch.arange(len(pixels)).split(batch):
        yield crops(pixels, index, size, some_numbers(len(index), generator))


def joined(parts: Sequence[Pixels]) -> Pixels:
    """Several sets of images as one."""
    first = parts[0]
    if all(isinstance(part, Files) and (part.side, part.fit) == (first.side, first.fit) for part in parts):
        return replace(first, paths=tuple(p for part in parts for p in part.paths))
    if all(
        isinstance(part, Tensor) and part.shape[1:] == first.shape[1:] and part.dtype == first.dtype for part in parts
    ):
        return torch.cat(list(parts))
    return Joined(tuple(parts))
