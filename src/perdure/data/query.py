"""What a method is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from perdure.core.features import Features
from perdure.data.classes import Class
from perdure.data.files import Pixels, take


@dataclass(frozen=True)
class Query:
    """A question: which of ``classes`` does each image show?

    images: (N, 3, H, W) uint8, in memory or in files. ``task`` is the number of the task the images belong to, or None
    where it is hidden or the images belong to none; only the protocol sets it. ``features``: what a tower made of the
    images, where that is known already. ``whole``: the images that these are the numbered rows of, where all are asked.
    """

    images: Pixels
    classes: Sequence[Class]
    task: int | None = None
    features: Features | None = None
    whole: tuple[Pixels, Tensor] | None = None

    def part(self, rows: Tensor) -> Query:
        """The images numbered ``rows``."""
        known = None if self.features is None else self.features[rows]
        return replace(self, images=take(self.images, rows), features=known)

    def parts(self, rows: Tensor, size: int) -> list[Query]:
        """The images numbered ``rows``, ``size`` at a time."""
        parts = [self.part(some) for some in rows.split(size)]
        if len(rows) < len(self.images):
            return parts
        return [replace(part, whole=(self.images, some)) for part, some in zip(parts, rows.split(size), strict=True)]
