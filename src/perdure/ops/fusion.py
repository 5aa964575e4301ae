"""Unifying experts and decoupling them again (ConDU, Gao et al., ICLR 2026, arXiv:2503.10705), one stretch of one tensor at a
time: memory does not grow with the number of tasks, and a stretch stays in the processor's cache.

A task's delta is δⁱ = θⁱ - θ⁰. All tasks share one unified delta δ; a task keeps a trigger: one bit a parameter (its mask
Mⁱ, eight to a byte, the first in the highest bit) and one scalar (its rescaler λⁱ). Its expert is θ⁰ + λⁱ·Mⁱ⊙δ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.weights import Weights, floating, original

STRETCH = 1 << 18  # elements worked on at once; a multiple of 8
Keep = Callable[[str, Tensor, Tensor], None]


def elect(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Deltas (T, n) → the unified delta (n,), and which tasks agree with it (T, n) bool.

    The elected sign is that of the sum over the tasks (a sum ≤ 0 elects minus); the magnitude is the largest among the
    tasks of that sign, 0 where there is none.
    """
    sign = torch.where(deltas.sum(0) > 0, 1.0, -1.0)
    aligned = deltas * sign
    return aligned.amax(0).clamp_min_(0).mul_(sign), aligned > 0


def decouple(unified: Tensor, bits: Tensor, rescaler: float) -> Tensor:
    """λ·M⊙δ of one tensor: ``unified`` of any shape, ``bits`` its packed mask (⌈n/8⌉,) uint8."""
    return unified * unpacked(bits, unified.numel()).view(unified.shape).to(unified.device) * rescaler


def expert(origin: Weights, name: str, unified: Weights, bits: Weights, rescaler: float) -> Tensor:
    """One tensor of the expert θ⁰ + λ·M⊙δ; a tensor that training cannot change is θ⁰'s."""
    return origin[name] + decouple(unified[name], bits[name], rescaler) if name in unified else origin[name]


def packed(mask: Tensor) -> Tensor:
    """(…, n) bool → (…, ⌈n/8⌉) uint8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=-1))


def unpacked(bits: Tensor, count: int) -> Tensor:
    """(⌈n/8⌉,) uint8 → (n,) bool."""
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count).view(np.bool_))


class Means:
    """Σ over tensors of mean|·|, a task; the tensors are those of the original CLIP, where q, k and v are one."""

    def __init__(self, tasks: int):
        self.tasks = tasks
        self.sums: dict[str, Tensor] = {}
        self.sizes: dict[str, int] = {}

    def add(self, name: str, own: Tensor, kept: Tensor, size: int) -> None:
        """Σ|δⁱ| and Σ|Mⁱ⊙δ|, (T,) each, over ``size`` elements of tensor ``name``."""
        name = original(name)
        both = torch.stack([own, kept]).double()
        self.sums[name] = self.sums.get(name, torch.zeros(2, self.tasks, dtype=torch.float64)) + both
        self.sizes[name] = self.sizes.get(name, 0) + size

    def rescalers(self) -> list[float]:
        """λⁱ, which keeps Σ mean|λⁱ·Mⁱ⊙δ| = Σ mean|δⁱ|. Where nothing of a task is left (it changed nothing, or was
        outvoted everywhere) no rescaler could: 1, and its expert is θ⁰ (the release divides by 0 there)."""
        total = torch.zeros(2, self.tasks, dtype=torch.float64)
        for name, sums in self.sums.items():
            total += sums / self.sizes[name]
        own, kept = total
        return torch.where(kept > 0, own / kept.clamp_min(1e-300), 1.0).float().tolist()


@torch.no_grad()
def unify(
    origin: Weights, tuned: Weights, unified: Weights, triggers: Sequence[tuple[Weights, float]], keep: Keep
) -> list[float]:
    """One session: decouple the tasks known so far, add the one just learned, unify them anew; return all rescalers.

    ``origin``: θ⁰; ``tuned``: θᵗ; ``unified``: δ so far (empty before the second task); ``triggers``: (packed masks by
    tensor name, rescaler) of each task known. Each may read its tensors from disk as they are asked for.
    ``keep(name, δ, M)`` takes each new tensor of δ and the packed masks of all T tasks, (T, ⌈n/8⌉).
    As in the release an old delta is (θ⁰ + λ·M⊙δ) - θ⁰, rounded as weights are. Raises ``PerdureError`` for weights of
    another architecture, and for those that are no numbers.
    """
    means = Means(len(triggers) + 1)
    for name in floating(origin):
        start, end = origin[name], tuned[name]
        if start.shape != end.shape:
            raise PerdureError(
                f"The expert is of another architecture: '{name}' has the shape {tuple(end.shape)}, not {tuple(start.shape)}."
            )
        old = unified[name] if triggers else start
        bits = [masks[name] for masks, _ in triggers]
        new, masks = unify_tensor(name, start, end, old, bits, [r for _, r in triggers], means)
        keep(name, new.view(start.shape), masks)
    return means.rescalers()


def unify_tensor(
    name: str, origin: Tensor, tuned: Tensor, unified: Tensor, bits: Sequence[Tensor], rescalers: Sequence[float],
    means: Means,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One tensor of ``unify``, in stretches: the new δ, flat, and the packed masks (T, ⌈n/8⌉)."""
    origin, tuned, unified = (x.detach().reshape(-1).cpu().float() for x in (origin, tuned, unified))
    count, tasks = origin.numel(), len(bits) + 1
    new, masks = torch.empty(count), torch.empty(tasks, -(-count // 8), dtype=torch.uint8)
    deltas = torch.empty(tasks, min(STRETCH, count))
    for at in range(0, count, STRETCH):
        s = slice(at, min(at + STRETCH, count))
        b = slice(at // 8, -(-s.stop // 8))
        stretch = deltas[:, : s.stop - at]
        for row, one, rescaler in zip(stretch, bits, rescalers, strict=False):
            torch.add(origin[s], decouple(unified[s], one[b], rescaler), out=row).sub_(origin[s])
        torch.sub(tuned[s], origin[s], out=stretch[-1])
        if not torch.isfinite(stretch[-1].sum()):
            raise PerdureError(
                f"The expert holds values in '{name}' that are no numbers: its training diverged. "
                "Nothing was unified; train it again with a smaller lr."
            )
        new[s], agree = elect(stretch)
        masks[:, b] = packed(agree)
        means.add(name, stretch.abs().sum(1), agree.float() @ new[s].abs(), s.stop - at)
    return new, masks


def shares(scores: Tensor, most: int, weighting: str) -> Tensor:
    """How much each model says to each image: (N, T) similarities to the tasks → gates (N, 1 + T), the pre-trained first.

    The ``most`` best experts answer, and always the pre-trained model. ``mean`` (the release): all alike. ``similarity``
    (the paper): an expert by its similarity (at least 0), the pre-trained model, which has none, by their mean. Gates
    sum to 1.
    """
    best, which = scores.topk(min(most, scores.shape[1]), dim=1)
    weights = torch.ones_like(best) if weighting == "mean" else best.clamp_min(0) + 1e-12
    gates = torch.cat([weights.mean(1, keepdim=True), torch.zeros_like(scores)], dim=1)
    gates.scatter_(1, which + 1, weights)
    return gates / gates.sum(1, keepdim=True)
