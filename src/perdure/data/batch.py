"""What a training step is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from perdure.core.device import sent
from perdure.core.pixels import as_floats


class Batch(Mapping[str, Any]):
    """A training batch: a record whose fields are read by name, ``batch.images`` or ``batch["images"]``.

    images: (B, 3, H, W) float32 in 0 … 1, augmented (of a phase on features: (B, D)), until ``to`` perhaps uint8 still;
    labels: (B,) int64; where they are known, index: (B,) int64, the images' numbers in what is trained on, and captions: a
    text an image. A kind of data that a method adds is one more field.
    """

    images: Tensor
    labels: Tensor

    def __init__(self, images: Tensor, labels: Tensor, **more: Any):
        self.fields = {"images": images, "labels": labels, **more}

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def __getattr__(self, name: str) -> Any:
        if name == "fields" or name not in self.fields:
            raise AttributeError(f"this batch has no '{name}'")
        return self.fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device, its images as floats: bytes travel, floats are made there.
        ``index`` stays with the processor, which looks images up by it: asked back, it would wait."""
        goes = [name for name, x in self.fields.items() if isinstance(x, Tensor) and name != "index"]
        there = {name: sent(self[name], device) for name in goes}
        return Batch(**{**self.fields, **there, "images": as_floats(there["images"])})
