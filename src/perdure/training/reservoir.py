"""A bounded memory of real images, which any method may replay: a reservoir (Vitter, ACM TOMS 1985), in which every image
offered so far lies with the same chance, whatever came when.

What is remembered are pixels, at the model's size and as it sees them when it answers, and labels that mean something to
whoever keeps it. It outlives a task and a resume as state, and needs no image that is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor


@dataclass(frozen=True)
class MemoryOptions:
    """How much is remembered, and what of it a step sees."""

    memory: Annotated[int, Field(ge=1, le=10**8, description="M, images that are remembered in all")] = 1000
    replayed: Annotated[int, Field(ge=0, le=10**6, description="images of the memory a step; 0: none")] = 32
    draw: Annotated[
        Literal["uniform", "balanced"], Field(description="of the memory: every image alike, or every class alike")
    ] = "uniform"


@dataclass
class Remembered:
    """A memory as state: ``pixels`` (n, 3, S, S) uint8 and ``labels`` (n,) int64, of which ``offered`` rows, n at most, hold an
    image; and how many images were offered in all."""

    images: dict[str, Tensor] = field(default_factory=dict)
    offered: int = 0


class Reservoir:
    """Puts images into a memory of ``most``, and draws from it; all by one generator."""

    def __init__(self, kept: Remembered, most: int, generator: torch.Generator):
        self.kept, self.most, self.generator = kept, most, generator
        kept.images = {name: tensor.cpu() for name, tensor in kept.images.items()}

    def __len__(self) -> int:
        return min(self.kept.offered, self.most)

    @property
    def labels(self) -> Tensor:
        """Of all that is remembered."""
        return self.kept.images["labels"][: len(self)] if self.kept.images else torch.empty(0, dtype=torch.int64)

    def reserve(self, count: int, side: int) -> None:
        """Make room for so many images more, of so many pixels a side: as much as the memory may grow by."""
        rows, images = min(self.most, self.kept.offered + count), self.kept.images
        if not images:
            images.update(
                pixels=torch.zeros(0, 3, side, side, dtype=torch.uint8), labels=torch.zeros(0, dtype=torch.int64)
            )
        for name, tensor in images.items():
            more = tensor.new_zeros(max(0, rows - len(tensor)), *tensor.shape[1:])
            images[name] = torch.cat([tensor, more])

    def offer(self, images: Tensor, labels: Tensor) -> None:
        """Offer images (B, 3, S, S), float in 0 … 1, with labels (B,): the n-th one ever is taken with the chance M/n, in the
        place of any of those that are there."""
        pixels = (images * 255).round().to(torch.uint8).cpu()
        for image, label in zip(pixels, labels.tolist(), strict=True):
            place = self.kept.offered
            if place >= self.most:
                place = int(torch.randint(place + 1, (1,), generator=self.generator))
            self.kept.offered += 1
            if place < self.most:
                self.kept.images["pixels"][place] = image
                self.kept.images["labels"][place] = label

    def drawn(self, count: int, how: str = "uniform") -> Tensor:
        """The numbers of ``count`` images, each once, or of all where there are fewer."""
        if how == "balanced":
            return balanced(self.labels, count, self.generator)
        return torch.randperm(len(self), generator=self.generator)[:count]

    def taken(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images (n, 3, S, S) uint8 and labels (n,) of these numbers."""
        return self.kept.images["pixels"][index], self.kept.images["labels"][index]


def balanced(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The numbers of ``count`` images, each once, of those with labels (N,): so that their classes are as even as can be. Which
    of a class and, where not all classes can have as many, which classes, is drawn."""
    order = torch.randperm(len(labels), generator=generator)
    own, by_class = labels[order].sort(stable=True)
    turn = torch.empty_like(by_class)
    turn[by_class] = torch.arange(len(labels)) - torch.searchsorted(own, own)  # how many of its class come before it
    return order[turn.argsort(stable=True)][:count]
