"""Images that stay in their files until they are asked for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from perdure.core.device import sent
from perdure.core.pixels import CENTRE, Fit, as_floats
from perdure.data.opening import looks_wrong, opened, trouble
from perdure.data.places import Source
from perdure.data.transforms import crop_box, random_resized_crop, some_numbers

CPU = torch.device("cpu")
OPENED, DECODED = 1000, 100  # so many pictures of a side are looked at before anything is computed
SLENDER = 16  # one side by the other: from there on a centre crop is cut out before it is resized


@dataclass(frozen=True)
class Files:
    """(N, 3, side, side) uint8, read when indexed as a checkpoint's image processor would: as ``fit`` says. ``crops`` cuts
    from the whole picture. ``paths`` say where each lies: in a file of its own, in an archive, in a table.

    Indexed like a tensor, by a slice or by numbers (B,), it gives a tensor.
    """

    paths: tuple[Source, ...]
    side: int
    fit: Fit = CENTRE

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return stacked(readers().map(self.read, self.select(index).paths), self.side)

    def at(self, side: int, fit: Fit = CENTRE) -> Files:
        """The same files, read at another size and another way: the model's."""
        return replace(self, side=side, fit=fit)

    def select(self, index: Tensor | slice) -> Files:
        """Some of the files, still unread."""
        numbers = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return replace(self, paths=tuple(self.paths[k] for k in numbers))

    def split(self, size: int) -> Iterator[Tensor]:
        """All images, ``size`` at a time; the next are read while the caller works on these."""
        ready = readers().map(self.read, self.paths[:size])
        for start in range(size, len(self), size):
            following = readers().map(self.read, self.paths[start : start + size])
            yield stacked(ready, self.side)
            ready = following
        yield stacked(ready, self.side)

    def read(self, path: Source) -> Image.Image:
        """One picture, side × side."""
        with opened(path) as picture:
            if self.fit.crop:
                picture = middle(picture)
            short, edge = min(picture.size), self.fit.edge or self.side
            wide, tall = (edge if x == short or not self.fit.crop else int(edge * x / short) for x in picture.size)
            picture = picture.resize((wide, tall), Image.Resampling[self.fit.resample.upper()])
            left, top = (wide - self.side) // 2, (tall - self.side) // 2
            return picture.crop((left, top, left + self.side, top + self.side))

    def crops(self, index: Tensor, size: int, numbers: Tensor) -> Tensor:
        """(B, 3, size, size) uint8: random crops of the whole pictures ``index`` (B,), by ``numbers`` as ``some_numbers`` has
        them, antialiased."""

        def one(job: tuple[Source, Tensor]) -> Image.Image:
            with opened(job[0]) as picture:
                return picture.crop(crop_box(picture.size, job[1])).resize((size, size), Image.Resampling.BICUBIC)

        chosen = self.select(index).paths
        return stacked(map(one, zip(chosen, numbers.unbind(2), strict=True)), size)


def middle(picture: Image.Image) -> Image.Image:
    """Of a very slender picture the middle, which is all that a centre crop shows: resized whole, a picture of one pixel by
    twenty thousand would take gigabytes."""
    wide, tall = picture.size
    short = min(wide, tall)
    if max(wide, tall) <= SLENDER * short:
        return picture
    kept = SLENDER // 2 * short
    left, top = (max(0, (x - kept) // 2) for x in (wide, tall))
    return picture.crop((left, top, left + min(wide, kept), top + min(tall, kept)))


def stacked(pictures: Iterable[Image.Image], side: int) -> Tensor:
    """(N, 3, side, side) uint8, of which there may be none. By numpy, a picture at a time: torch would start threads of its
    own, and several readers at once would wait for one another."""
    images = list(pictures)
    out = np.empty((len(images), 3, side, side), np.uint8)
    for place, picture in zip(out, images, strict=True):
        place[:] = np.asarray(picture).transpose(2, 0, 1)
    return torch.from_numpy(out)


def cannot_be_read(pixels: Any, opened: int = OPENED, decoded: int = DECODED) -> list[Source]:
    """Pictures in files that are gone or no pictures by their first bytes, of at most ``opened``, or that cannot be decoded,
    of at most ``decoded``, both evenly spread: a cheap look."""
    if isinstance(pixels, Joined):
        return [source for part in pixels.parts for source in cannot_be_read(part, opened, decoded)]
    if not isinstance(pixels, Files) or not len(pixels):
        return []

    def wrong(look: Callable[[Source], Any], most: int) -> set[int]:
        places = torch.linspace(0, len(pixels) - 1, min(most, len(pixels))).round().long()
        found = zip(places.tolist(), readers().map(look, pixels.select(places).paths), strict=True)
        return {place for place, bad in found if bad}

    return [pixels.paths[place] for place in sorted(wrong(looks_wrong, opened) | wrong(trouble, decoded))]


def unreadable(pixels: Any) -> dict[int, str]:
    """Images in files that cannot be decoded, by their numbers, and what is wrong with each. All are decoded."""
    if isinstance(pixels, Joined):
        starts = itertools.accumulate(map(len, pixels.parts), initial=0)
        found = [(start, unreadable(part)) for start, part in zip(starts, pixels.parts, strict=False)]
        return {start + number: why for start, own in found for number, why in own.items()}
    if not isinstance(pixels, Files):
        return {}
    return {number: why for number, why in enumerate(readers().map(trouble, pixels.paths)) if why}


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

    def select(self, index: slice) -> Joined:
        """A stretch of them; those in files still unread."""
        first, last, _ = index.indices(len(self))
        parts, start = [], 0
        for part in self.parts:
            own = slice(max(0, first - start), max(0, min(last - start, len(part))))
            if own.start < own.stop:
                parts.append(part[own] if isinstance(part, Tensor) else part.select(own))
            start += len(part)
        return Joined(tuple(parts))

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
    """Random crops (B, 3, size, size) of the images ``index`` (B,), of files those of the whole pictures. Images in memory are
    cropped where ``numbers`` lie: bytes travel."""
    if isinstance(pixels, Tensor):
        return random_resized_crop(as_floats(sent(pixels[index], numbers.device)), size, numbers)
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
