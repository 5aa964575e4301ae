"""What a tower makes of images, and what is worth remembering of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Features:
    """N images as an image tower sees them, in fp32.

    ``embedded`` (N, D): unit, in the space of the texts; ``pooled`` (N, H): before the projection into it; ``patches``
    (N, H·g²): a block's patches as means over g × g fields; (N, 0) where none were asked for. ``norms`` (N, 1): how long
    the projections were before they were made unit; None: as long as that.
    """

    embedded: Tensor
    pooled: Tensor
    patches: Tensor
    norms: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embedded)

    @property
    def raw(self) -> Tensor:
        """(N, D): the projections as they were, not unit."""
        return self.embedded if self.norms is None else self.embedded * self.norms

    def tensors(self) -> dict[str, Tensor]:
        """What is there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Features:
        """Each tensor changed."""
        return Features(**{name: change(tensor) for name, tensor in self.tensors().items()})

    def __getitem__(self, rows: Tensor) -> Features:
        rows = rows.to(self.embedded.device)
        return self.mapped(lambda tensor: tensor[rows])

    @staticmethod
    def cat(parts: list[Features]) -> Features:
        """Several sets as one."""
        return Features(**{name: torch.cat([p.tensors()[name] for p in parts]) for name in parts[0].tensors()})


class Memory:
    """Results that stay true, by question; the oldest leave when more than ``most`` bytes are kept."""

    def __init__(self, most: int = 1 << 30):
        self.most = most
        self.kept: dict[Hashable, tuple[Any, Any]] = {}

    def recall(self, question: Hashable, about: Any, compute: Callable[[], T]) -> T:
        """``compute()``, or what it gave for the same question before.

        ``about``: the objects whose ids are part of the question; they are held, so that no others get those ids.
        """
        if question not in self.kept:
            self.kept[question] = (compute(), about)
            while len(self.kept) > 1 and sum(size(found) for found, _ in self.kept.values()) > self.most:
                del self.kept[next(iter(self.kept))]
        return self.kept[question][0]


def size(found: Any) -> int:
    """Bytes of a tensor, or of all those of ``Features``."""
    return found.nbytes if isinstance(found, Tensor) else sum(t.nbytes for t in found.tensors().values())
