"""Algebra on weights: a θ is a mapping from parameter names to tensors of one shape each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.core.errors import PerdureError

Weights = Mapping[str, Tensor]
QKV = re.compile(r"\.[qkv]_proj\.(weight|bias)$")


class Lazy(Mapping[str, Tensor]):
    """Weights that are worked out tensor by tensor, when they are asked for: no second model in memory."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]):
        self.names, self.compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def original(name: str) -> str:
    """The tensor of the original CLIP that a parameter is part of: there, q, k and v of one attention are one tensor."""
    return QKV.sub(r".qkv.\1", name)


def check_alike(a: Weights, b: Weights) -> None:
    """Refuse weights of different architectures, naming the first difference."""
    for name in sorted(set(a) ^ set(b)):
        raise PerdureError(f"The weights differ: only one of the two has a tensor '{name}'.")
    for name in a:
        if a[name].shape != b[name].shape:
            shapes = f"{tuple(a[name].shape)} and {tuple(b[name].shape)}"
            raise PerdureError(f"The weights differ: '{name}' has the shapes {shapes}.")


def interpolate(a: Weights, b: Weights, share: float) -> dict[str, Tensor]:
    """(1 - share)·a + share·b, tensor by tensor."""
    check_alike(a, b)
    return {name: a[name].lerp(b[name], share) for name in a}


def floating(weights: Weights) -> list[str]:
    """The names of the floating-point tensors: what training can change."""
    return [name for name, tensor in weights.items() if tensor.is_floating_point()]


def inner(a: Weights, b: Weights) -> float:
    """Σ a·b over the floating-point tensors, in double precision."""
    return float(sum(torch.sum(a[n].double() * b[n].double()) for n in a if a[n].is_floating_point()))


@dataclass(frozen=True)
class Plane:
    """The plane through three weight vectors, with an orthonormal basis (Garipov et al., NeurIPS 2018).

    ``origin`` lies at (0, 0), the second vector at (x, 0) with x > 0, the third at ``corner``; lengths are L2
    norms of weights.
    """

    origin: Weights
    u: Weights
    v: Weights
    reach: float
    corner: tuple[float, float]

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        """The weights at a point of the plane."""
        o = self.origin
        return {n: o[n] + x * self.u[n] + y * self.v[n] if n in self.u else o[n] for n in o}


def plane(origin: Weights, second: Weights, third: Weights) -> Plane:
    """The plane through three weight vectors that do not lie on one line. ``PerdureError`` where they do."""
    check_alike(origin, second)
    check_alike(origin, third)
    names = floating(origin)
    a, b = ({n: w[n] - origin[n] for n in names} for w in (second, third))
    reach = math.sqrt(inner(a, a))
    u = {n: a[n] / max(reach, 1e-30) for n in names}
    along = inner(b, u)
    rest = {n: b[n] - along * u[n] for n in names}
    height = math.sqrt(inner(rest, rest))
    if min(reach, height) < 1e-6 * max(reach, math.sqrt(inner(b, b)), 1e-30):
        raise PerdureError("The three weight vectors lie on one line: there is no plane through them.")
    return Plane(origin, u, {n: rest[n] / height for n in names}, reach, (along, height))
