"""Classes as Gaussians in a feature space: running means and covariances, shrinkage, draws, mixtures.

    μ = Σ x / n,  Σ = Σ (x - μ)(x - μ)ᵀ / (n - 1)      of a class, fp64 while it is worked out
    x = μ + Lε,  LLᵀ = Σ + ridge·I,  ε ~ N(0, I)       a draw

What is kept of C classes is three tensors: ``counts`` (C,) int64; ``means`` (C, D) fp64; ``covariances`` (C, …) fp32, each
the lower triangle alone, packed as ``ops.ridge.pack`` has it and without the ridge. One image has the covariance 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from perdure.ops import ridge

Kept = Mapping[str, Tensor]
RIDGE = 1e-4  # RAPF's and SLCA's
LEAST_DEVIATION = 1e-3  # of a mixture's component, by that of all: a component of one point would be infinitely dense


def normal(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """ε (rows, width) ~ N(0, I), drawn on the processor."""
    return torch.randn(rows, width, generator=generator)


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """0 … count - 1 in random order."""
    return torch.randperm(count, generator=generator)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, D) → mean (D,) and unbiased covariance (D, D), in fp64; of one row the covariance is 0."""
    x = x.double()
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / max(1, len(x) - 1)


def joined(
    n: int, mean: Tensor, covariance: Tensor, m: int, other: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The moments of n + m rows, from those of n and of m (Chan, Golub and LeVeque, 1983)."""
    step = other - mean
    scatter = (n - 1) * covariance + (m - 1) * spread + torch.outer(step, step) * (n * m / (n + m))
    return mean + step * (m / (n + m)), scatter / (n + m - 1)


def add(kept: Kept, x: Tensor, rows: Tensor, classes: int) -> dict[str, Tensor]:
    """``kept`` (empty: nothing yet), with features x (N, D) of the classes ``rows`` (N,), out of ``classes``."""
    old = len(kept["counts"]) if kept else 0
    counts = torch.cat([kept["counts"], kept["counts"].new_zeros(classes - old)]) if kept else rows.new_zeros(classes)
    means = x.new_zeros(classes, x.shape[1], dtype=torch.float64)
    packed = list(kept["covariances"]) if kept else []
    packed += [ridge.pack(x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float32))] * (classes - old)
    if kept:
        means[:old] = kept["means"]
    for row in rows.unique().tolist():
        own, n = x[rows == row], int(counts[row])
        mean, covariance = moments(own)
        if n:
            before = symmetric(ridge.unpack(packed[row]).double())
            mean, covariance = joined(n, means[row], before, len(own), mean, covariance)
        counts[row] += len(own)
        means[row], packed[row] = mean, ridge.pack(covariance.float())
    return {"counts": counts, "means": means, "covariances": torch.stack(packed)}


def symmetric(lower: Tensor) -> Tensor:
    """(D, D) from its lower triangle."""
    return lower + lower.tril(-1).T


def covariance(kept: Kept, row: int) -> Tensor:
    """Σ + ridge·I (D, D) of a class, fp32."""
    full = symmetric(ridge.unpack(kept["covariances"][row]))
    full.diagonal().add_(RIDGE)
    return full


def shrunk(covariance: Tensor) -> Tensor:
    """Σ + mean(diagonal)·I + mean(what else is not 0)·(1 - I) (RAPF, FeTrIL): never less than positive definite."""
    off = covariance - covariance.diagonal().diag()
    count = off.count_nonzero().clamp_min(1)
    level = off.sum() / count
    eye = torch.eye(len(off), dtype=off.dtype, device=off.device)
    return covariance + covariance.diagonal().mean() * eye + level * (1 - eye)


def factor(covariance: Tensor) -> Tensor:
    """L (D, D) fp32 of Σ = LLᵀ, by fp64; what rounding made indefinite gets the least ridge that helps."""
    level = torch.finfo(torch.float32).eps * covariance.diagonal().mean().item()
    found, wrong = torch.linalg.cholesky_ex(covariance.double())
    if wrong.item():
        found, _ = ridge.cholesky(covariance.double(), level)
    return found.float()


class Sampler:
    """Draws from the Gaussians of classes; a factor is made when it is first asked for, once."""

    def __init__(self, kept: Kept, shrink: bool = False):
        self.kept, self.shrink = kept, shrink
        self.means = kept["means"].float()
        self.factors: dict[int, Tensor] = {}

    def factor(self, row: int) -> Tensor:
        """L of a class."""
        if row not in self.factors:
            found = covariance(self.kept, row)
            self.factors[row] = factor(shrunk(found) if self.shrink else found)
        return self.factors[row]

    def draw(self, rows: Sequence[int], noise: Tensor, means: Tensor | None = None) -> Tensor:
        """(N, D): noise (N, D) as draws, as many of each of ``rows`` in turn. ``means`` (C, D): in place of the kept ones."""
        means, noise = self.means if means is None else means, noise.to(self.means.device)
        if not len(noise):
            return noise
        parts = noise.split(len(noise) // len(rows))
        return torch.cat([means[row] + part @ self.factor(row).T for row, part in zip(rows, parts, strict=True)])


def mixture(x: Tensor, components: int, steps: int, generator: torch.Generator) -> dict[str, Tensor]:
    """x (n, D) → ``weights`` (K,), ``means`` and ``deviations`` (K, D) of a mixture of Gaussians with diagonal covariances, by
    ``steps`` of EM from as many of the rows; where there are fewer, the others have the weight 0."""
    data, count = x.double(), min(components, len(x))
    least = (data.std(0, unbiased=False) * LEAST_DEVIATION).clamp_min(1e-12)
    means = data[shuffled(len(x), generator)[:count].to(x.device)]
    deviations = data.std(0, unbiased=False).clamp_min(least).expand(count, -1)
    weights = data.new_full((count,), 1 / count)
    for _ in range(steps):
        far = (data[:, None] - means) / deviations
        share = (weights.log() - deviations.log().sum(1) - 0.5 * far.square().sum(2)).softmax(1)
        mass = share.sum(0).clamp_min(1e-12)
        weights, means = mass / mass.sum(), share.T @ data / mass[:, None]
        spread = (share[..., None] * (data[:, None] - means).square()).sum(0) / mass[:, None]
        deviations = spread.sqrt().clamp_min(least)
    found = {"weights": weights, "means": means, "deviations": deviations}
    return {name: torch.cat([t, t.new_zeros(components - count, *t.shape[1:])]).float() for name, t in found.items()}
