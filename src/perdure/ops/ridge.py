"""Ridge regression from running sums (fp64): solving, leaving images out exactly, choosing, and how the sums are kept.

    G = Σ φφᵀ (M, M),  b = Σ φyᵀ (M, C)        over all images of all tasks
    S = G + λI = LLᵀ,  A = S⁻¹b                 scores of an image: φA
    r₋ᵢ = (φᵢA - hᵢyᵢ) / (1 - hᵢ),  hᵢ = φᵢᵀS⁻¹φᵢ   what image i would be told by the sums of all images but itself (PRESS)

Of G the lower triangle alone is read, everywhere: a product ΦᵀΦ is not symmetric to the bit, and what was saved must come
back as what was used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.core.errors import PerdureError

Part = tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]
NARROW = 1024  # up to here one eigendecomposition is cheaper than a Cholesky factor a λ
JITTER = 1e-14  # of the mean diagonal: the least that is added where rounding has made the sums indefinite


def pack(gram: Tensor) -> Tensor:
    """The lower triangle of (M, M) as a rectangle of M(M + 1)/2 numbers, without lists of indices."""
    half = -(-len(gram) // 2)
    left, right = gram[:, :half].tril(), gram[half:, half:].tril().T
    if len(gram) % 2:
        left[: half - 1, 1:] += right
        return left
    out = torch.cat([left.new_zeros(1, half), left])
    out[:half] += right
    return out


def unpack(packed: Tensor) -> Tensor:
    """The inverse of ``pack``: (M, M), zero above the diagonal."""
    rows, half = packed.shape
    width = rows - (rows == 2 * half + 1)  # M even: a row more
    gram = packed.new_zeros(width, width)
    if width % 2:
        gram[:, :half] = packed.tril()
        gram[half:, half:] = packed[: half - 1, 1:].triu().T
    else:
        gram[:, :half] = packed[1:].tril()
        gram[half:, half:] = packed[:half].triu().T
    return gram


def cholesky(gram: Tensor, lam: float) -> tuple[Tensor, float]:
    """L of G + (λ + jitter)·I = LLᵀ, and the jitter, which is 0 unless rounding demands one. Reads the lower triangle of G.

    ``PerdureError`` where the sums are singular and λ = 0: then there is not one solution.
    """
    level, jitter = gram.diagonal().mean().item(), 0.0
    while True:
        shifted = gram.clone()
        shifted.diagonal().add_(lam + jitter)
        factor, wrong = torch.linalg.cholesky_ex(shifted)
        least = factor.diagonal().abs().amin().square().item()
        if not wrong.item() and (lam or least > len(gram) * torch.finfo(gram.dtype).eps * level):
            return factor, jitter
        if not lam:
            raise PerdureError(
                "The sums of the ridge head are singular: there are fewer images than random features, or features that "
                "depend on one another. Give lam a value above 0."
            )
        jitter = 10 * jitter or JITTER * level


def solve(factor: Tensor, cross: Tensor) -> Tensor:
    """A = (LLᵀ)⁻¹b by two triangular solves: (M, M), (M, C) → (M, C)."""
    return torch.cholesky_solve(cross, factor)


def leave_one_out(
    factor: Tensor, half: Tensor, lifted: Tensor, targets: Tensor, groups: Sequence[Tensor] = ()
) -> Tensor:
    """(n, C): the scores of images whose sums are in L, each as if it had not been learned.

    ``half`` = L⁻¹b (M, C); ``lifted`` Φ (n, M) and ``targets`` Y (n, C) of the images; ``groups``: numbers of images that
    are copies of one another and are left out together.
    """
    v = torch.linalg.solve_triangular(factor, lifted.T, upper=False)
    scores, leverage = v.T @ half, v.square().sum(0).unsqueeze(1)
    out = (scores - leverage * targets) / (1 - leverage)
    for group in groups:
        hat = v[:, group].T @ v[:, group]
        out[group] = targets[group] - left_out(hat, targets[group] - scores[group])
    return out


def leave_one_out_before(factor: Tensor, cross: Tensor, lifted: Tensor, targets: Tensor) -> Tensor:
    """``leave_one_out`` from the sums before these images were added: L and b know nothing of them yet.

    r₋ᵢ = yᵢ - Eᵢ/Jᵢᵢ with J = (I + ΦS⁻¹Φᵀ)⁻¹, E = J(Y - ΦA): no difference of numbers that nearly agree, at n²M + n³.
    """
    v = torch.linalg.solve_triangular(factor, lifted.T, upper=False)
    kernel = v.T @ v
    kernel.diagonal().add_(1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
    error = inverse @ (targets - lifted @ solve(factor, cross))
    return targets - error / inverse.diagonal().unsqueeze(1)


def left_out_course(
    gram: Tensor, cross: Tensor, lams: Sequence[float], parts: Callable[[], Iterable[Part]], images: int
) -> Iterator[Tensor]:
    """For each λ the scores (N, C) of N images, each as if it had not been learned. ``parts()`` goes through them: numbers
    (n,), Φ (n, M), Y (n, C), and the groups of copies among them."""
    narrow = Spectrum(gram, cross) if len(gram) <= NARROW else None
    for lam in lams:
        out = cross.new_zeros(images, cross.shape[1])
        if narrow is None:
            factor = cholesky(gram, lam)[0]
            half = torch.linalg.solve_triangular(factor, cross, upper=False)
        for index, lifted, targets, groups in parts():
            if narrow is None:
                out[index] = leave_one_out(factor, half, lifted, targets, groups)
            else:
                out[index] = narrow.leave_one_out(lam, lifted, targets, groups)
        yield out


def whole_groups(count: int, groups: Sequence[Tensor], size: int) -> list[tuple[Tensor, list[Tensor]]]:
    """``count`` images in parts of about ``size``, copies of one image together: a part's numbers, and its groups by place."""
    copies = torch.cat([*groups, torch.zeros(0, dtype=torch.int64)])
    alone = torch.ones(count, dtype=torch.bool)
    alone[copies] = False
    parts: list[tuple[Tensor, list[Tensor]]] = [
        (part, []) for part in alone.nonzero().squeeze(1).split(size) if len(part)
    ]
    if len(copies):
        edges = torch.tensor([0, *map(len, groups)]).cumsum(0).tolist()
        parts.append((copies, [torch.arange(a, b) for a, b in zip(edges, edges[1:], strict=False)]))
    return parts


class Spectrum:
    """G = QΛQᵀ once, for many λ of a narrow head: a λ then costs n·M·C instead of M³/3."""

    def __init__(self, gram: Tensor, cross: Tensor):
        self.values, self.vectors = torch.linalg.eigh(gram)
        self.values.clamp_min_(0)  # what is below is rounding
        self.cross = self.vectors.T @ cross

    def leave_one_out(self, lam: float, lifted: Tensor, targets: Tensor, groups: Sequence[Tensor] = ()) -> Tensor:
        """As the function of that name."""
        rotated = lifted @ self.vectors
        shrunk = rotated / (self.values + lam)
        scores, leverage = shrunk @ self.cross, (shrunk * rotated).sum(1, keepdim=True)
        out = (scores - leverage * targets) / (1 - leverage)
        for group in groups:
            hat = shrunk[group] @ rotated[group].T
            out[group] = targets[group] - left_out(hat, targets[group] - scores[group])
        return out


def left_out(hat: Tensor, error: Tensor) -> Tensor:
    """(I - H)⁻¹E: the errors (g, C) of a group of images once it is left out."""
    return torch.linalg.solve(torch.eye(len(hat), dtype=hat.dtype, device=hat.device) - hat, error)


Evidence = list[list[list[float]]]  # by λ and τ: Σ log likelihood, Σ n·w


@dataclass(frozen=True)
class Judged:
    """Images by which λ, τ and w are chosen: the columns of their true classes (n,), p_text there (n,), and the text's mass
    (n,) on the C columns that the head has."""

    true: Tensor
    text: Tensor
    mass: Tensor

    def evidence(self, scores: Tensor, temperatures: Sequence[float], share: float | None) -> list[list[float]]:
        """For each τ: Σ log((1 - w)·p_text + w·m·softmax(τ·scores)), and n·w, w being ``share``, or the best one."""
        out = []
        for tau in temperatures:
            head = self.mass * torch.softmax(tau * scores, 1).gather(1, self.true.unsqueeze(1)).squeeze(1)
            w = best_share(self.text, head) if share is None else share
            mixed = ((1 - w) * self.text + w * head).clamp_min(1e-300)
            out.append([mixed.log().sum().item(), w * len(scores)])
        return out

    def error(self, scores: Tensor, share: float) -> list[list[float]]:
        """For scores that are no probabilities: less their squared error."""
        wanted = torch.zeros_like(scores).scatter_(1, self.true.unsqueeze(1), 1)
        return [[-(scores - wanted).square().sum().item(), share * len(scores)]]


def added(kept: Evidence, new: Evidence) -> Evidence:
    """The evidence of all tasks so far and of one more."""
    if not kept:
        return new
    return [
        [[x + y for x, y in zip(a, b, strict=True)] for a, b in zip(*rows, strict=True)]
        for rows in zip(kept, new, strict=True)
    ]


def times(evidence: Evidence, factor: float) -> Evidence:
    """Evidence, each figure times ``factor``."""
    return [[[factor * x for x in cell] for cell in row] for row in evidence]


def likeliest(evidence: Evidence) -> tuple[int, int]:
    """Where the likelihood is largest: the numbers of λ and τ."""
    cells = [(i, j) for i, row in enumerate(evidence) for j in range(len(row))]
    return max(cells, key=lambda cell: evidence[cell[0]][cell[1]][0])


def best_share(text: Tensor, head: Tensor, rounds: int = 40) -> float:
    """The share w that makes Σ log((1 - w)·text + w·head) largest, which is concave in w: by EM.

    text, head: (n,) probabilities of the true class.
    """
    share = 0.5
    for _ in range(rounds):
        mixed = (1 - share) * text + share * head
        share = (share * head / mixed.clamp_min(1e-300)).mean().item()
    return share


def best_on_held_out(lifted: Tensor, targets: Tensor, fitted: int, candidates: Sequence[float]) -> float:
    """λ by RanPAC's rule: fitted on the first ``fitted`` images, the mean squared error on the rest; the smallest of ties.

    Solved in the space of the images where they are fewer than the features: the same numbers.
    """
    x, y, rest, wanted = lifted[:fitted], targets[:fitted], lifted[fitted:], targets[fitted:]
    dual = len(x) < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if dual else x.T @ x)
    left, right = (rest @ x.T @ vectors, vectors.T @ y) if dual else (rest @ vectors, vectors.T @ (x.T @ y))
    losses = [(left / (values.clamp_min(0) + lam) @ right - wanted).square().mean().item() for lam in candidates]
    return candidates[min(range(len(losses)), key=losses.__getitem__)]
