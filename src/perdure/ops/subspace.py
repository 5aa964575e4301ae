"""Subspaces that are to be left alone: orthonormal bases U (n, k) of what weights and features rely on.

Of a weight W (out, in) the leading singular directions; of features X (in, tokens) those of their Gram matrix XXᵀ, summed up in
fp64: the same subspace as by an SVD of X, up to directions of less than 1e-12 of the first one's energy.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RESIDUE = 1e-6  # of a gradient: what is left of it below this is rounding (fp32)
TINY = 1e-12  # of the largest energy: below it directions of a Gram matrix are rounding


def leading(energies: Tensor, share: float, held: float = 0.0, total: float | None = None) -> int:
    """How many of the energies (n,), from the largest on, reach with ``held`` the ``share`` of the total; all for a share of
    1."""
    if share >= 1:
        return len(energies)
    wanted = share * (float(energies.sum()) + held if total is None else total)
    return int((energies.cumsum(0) + held < wanted).sum()) + (1 if held < wanted else 0)


def of_weight(weight: Tensor, share: float, side: Literal["input", "release"], stop: Literal["at", "before"]) -> Tensor:
    """U of a weight (out, in): its leading directions by energy σ², on the input side; ``release``: on the output side.

    ``stop``: ``at`` the share, or one direction ``before`` it, and at least one.
    """
    left, sigma, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    energies = sigma.square()
    count = min(leading(energies, share), len(energies))
    if stop == "before":
        count = max(1, int((energies.cumsum(0) < share * energies.sum()).sum()))
    side_of = right.T if side == "input" else left
    return side_of[:, :count].to(weight.dtype).contiguous()


def grown(basis: Tensor, gram: Tensor, share: float) -> Tensor:
    """U (n, k) and, appended, the leading directions of what it leaves of a Gram matrix (n, n), until together they hold the
    ``share`` of its energy; U itself where it does already."""
    u = basis.double()
    total, held = gram.trace().item(), (u * (gram @ u)).sum().item()
    left = gram - u @ (u.T @ gram)
    left = left - (left @ u) @ u.T
    energies, directions = torch.linalg.eigh((left + left.T) / 2)
    energies, directions = energies.flip(0).clamp_min(0), directions.flip(1)
    real = int((energies > TINY * max(total, torch.finfo(gram.dtype).tiny)).sum())
    count = min(leading(energies[:real], share, held, total), real, len(u) - u.shape[1])
    if count <= 0:
        return basis
    new = directions[:, :count]
    new = torch.linalg.qr(new - u @ (u.T @ new)).Q
    return torch.cat([u, new], 1).to(basis.dtype)


def strongest(gradient: Tensor, basis: Tensor, rank: int, floor: float) -> tuple[Tensor, Tensor]:
    """A (in, r) and B₀ (r, out): AB₀ is the part of rank r of a gradient (in, out) that U (in, k) leaves.

    Directions whose σ is at most ``floor``·σ₁, or a millionth of the gradient, are rounding: they are 0 in both, and what is
    kept is freed of U once more. With ``floor`` 0 all are kept as they come.
    """
    left, sigma, right = torch.linalg.svd(gradient - basis @ (basis.T @ gradient), full_matrices=False)
    a, b0 = left.new_zeros(len(left), rank), right.new_zeros(rank, right.shape[1])
    count = min(rank, len(sigma))
    if floor > 0:
        least = torch.maximum(floor * sigma[0], RESIDUE * gradient.norm())
        count = min(count, int((sigma > least).sum()))
    a[:, :count] = left[:, :count]
    if floor > 0:
        a -= basis @ (basis.T @ a)
    b0[:count] = sigma[:count, None] * right[:count]
    return a, b0
