"""The plane through three weight vectors, on which a study draws a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.weights import Weights, check_alike, floating


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
