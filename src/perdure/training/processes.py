"""What training needs of the processes that share it: whole batches, and gradients that are those of all.

Of a batch that is read from files each process reads its rows (``drawn``), and gets the others' here. Losses are computed from
the whole batch in each process, so that they may be any function of it; only the towers are run over its rows. A gradient is
the mean over the processes of what each finds: after the towers all find the same; the rows of a tower come weighed with their
number (``models/shared.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from perdure.core import processes
from perdure.core.device import sent
from perdure.core.processes import barrier, count, main, rank
from perdure.data.batch import Batch

__all__ = ["averaged", "barrier", "count", "main", "rank", "whole"]
BUCKET = 1 << 22  # numbers that are sent at a time, where tensors are small


def whole(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; one of which each process holds its rows (``parts``: there are so many in all) with all images."""
    if "parts" not in batch:
        return batch.to(device)
    fields = {name: value for name, value in batch.fields.items() if name != "parts"}
    images = processes.gathered(sent(batch.images, device), batch.parts)  # as bytes, where they are
    return Batch(**{**fields, "images": images}).to(device)


def averaged(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each gradient's mean over the processes, the same bits in all; None stays, and must be None in each."""
    if not processes.sharing():
        return list(gradients)
    out = list(gradients)
    for places in buckets(out):
        sent = [g for k in places if (g := out[k]) is not None]
        flat = torch.cat([g.reshape(-1) for g in sent])  # a copy: two gradients may be one tensor
        means = processes.total(flat).div_(processes.count()).split([g.numel() for g in sent])
        for k, g, mean in zip(places, sent, means, strict=True):
            out[k] = mean.view_as(g)
    return out


def buckets(tensors: Sequence[Tensor | None]) -> Iterator[list[int]]:
    """The places of tensors that are sent together: neighbours of one type, up to ``BUCKET`` numbers. Each message costs a
    moment, however short."""
    now: list[int] = []
    room, kind = 0, None
    for place, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if now and (tensor.numel() > room or tensor.dtype != kind):
            yield now
            now = []
        room, kind = (room if now else BUCKET) - tensor.numel(), tensor.dtype
        now.append(place)
    if now:
        yield now
