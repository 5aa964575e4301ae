"""Losses, as pure functions of embeddings and logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def classification(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, group: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Cross entropy of logits (B, C) against labels (B,), with label smoothing; ``reduction``: ``mean`` or ``none``, (B,).

    ``group`` (C,): classes compete within the label's group only; smoothing then spreads over that group.
    """
    if group is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction=reduction)
    rivals = group[labels][:, None] == group[None]
    log_p = logits.masked_fill(~rivals, -torch.inf).log_softmax(1)
    hit = -log_p.gather(1, labels[:, None]).squeeze(1)
    spread = -log_p.masked_fill(~rivals, 0).sum(1) / rivals.sum(1)
    each = (1 - smoothing) * hit + smoothing * spread
    return each.mean() if reduction == "mean" else each


def pairwise(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, group: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """SigLIP's loss (arXiv:2303.15343, eq. 1) of logits (B, C), bias included, against labels (B,): every image with every
    class is a pair that matches or not; -log σ(±logit), summed over the classes, the mean over images.

    ``smoothing``, ``group`` (C,) and ``reduction`` as in ``classification``: the targets, and that only the group's classes are
    paired.
    """
    rivals = torch.ones_like(logits, dtype=torch.bool) if group is None else group[labels][:, None] == group[None]
    targets = (1 - smoothing) * F.one_hot(labels, logits.shape[1]) + smoothing / rivals.sum(1, keepdim=True)
    pairs = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    each = pairs.masked_fill(~rivals, 0).sum(1)
    return each.mean() if reduction == "mean" else each


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """Σ w·loss / (Σ w + 1e-6) over the last dimension of losses (…, L), the mean over the others (TAALM)."""
    return ((weights * losses).sum(-1) / (weights.sum(-1) + 1e-6)).mean()


def contrastive(logits: Tensor, reduction: str = "mean") -> Tensor:
    """CLIP's loss of logits (B, B) of B pairs: the sum of both sides' cross entropies; ``reduction`` over the batch as in
    ``classification``."""
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own, reduction=reduction) + F.cross_entropy(logits.T, own, reduction=reduction)


def positive_pull(images: Tensor, texts: Tensor, reduction: str = "mean") -> Tensor:
    """The mean squared distance of unit images and texts (B, D) that belong together, 2 - 2·cos; ``reduction`` as in
    ``classification``."""
    each = (images - texts).square().sum(1)
    return each.mean() if reduction == "mean" else each


def distillation(student: Tensor, teacher: Tensor, temperature: float, form: str = "contrastive") -> Tensor:
    """Distil the rows of logits (B, B'): τ²·CE(softmax(teacher/τ), student/τ), the mean over rows (GIFT).

    ``form``: ``contrastive`` as above; ``kl`` for KL(teacher‖student), which differs by the teacher's entropy, a constant;
    ``reverse_kl`` for KL(student‖teacher), which the release computes under that name. Gradients reach ``student`` alone.
    """
    log_s, log_t = (student / temperature).log_softmax(1), (teacher.detach() / temperature).log_softmax(1)
    if form == "contrastive":
        per_row = -(log_t.exp() * log_s).sum(1)
    elif form == "kl":
        per_row = (log_t.exp() * (log_t - log_s)).sum(1)
    elif form == "reverse_kl":
        per_row = (log_s.exp() * (log_s - log_t)).sum(1)
    else:
        raise ValueError(f"form: contrastive, kl or reverse_kl, not {form}")
    return temperature**2 * per_row.mean()


def supervised_contrastive(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """SupCon (Khosla et al., NeurIPS 2020, arXiv:2004.11362, its loss "out") of unit features (N, D) with labels (N,): of an
    anchor the mean over all others of its label of -log softmax(similarity/temperature) over all others, the mean over the
    anchors whose label another one has; 0 where there is none."""
    own = torch.eye(len(labels), dtype=torch.bool, device=features.device)
    similarity = features @ features.T / temperature
    log_p = similarity.masked_fill(own, torch.finfo(similarity.dtype).min).log_softmax(1)
    positive = (labels[:, None] == labels[None]) & ~own
    count = positive.sum(1)
    anchors = -log_p.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)
    return anchors.sum() / (count > 0).sum().clamp_min(1)


def projected(features: Tensor, target: Tensor, projector: Callable[[Tensor], Tensor]) -> Tensor:
    """PFR's D of one view (arXiv:2112.15022): minus the mean cosine of what ``projector`` makes of features (B, D) and of
    the target (B, D), which no gradient reaches."""
    return -F.cosine_similarity(projector(features), target.detach(), dim=1, eps=1e-8).mean()


def barlow_twins(first: Tensor, second: Tensor, off_diagonal: float = 5e-3, scale: float = 0.1) -> Tensor:
    """Barlow Twins (Zbontar et al., ICML 2021, arXiv:2103.03230) of two views (B, D): with each dimension standardised over
    the batch, C their cross-correlation, scale · [Σᵢ (C_ii - 1)² + off_diagonal · Σ_{i≠j} C_ij²]."""
    count, width = first.shape
    a, b = (F.batch_norm(view, None, None, training=True) for view in (first, second))
    correlation = a.T @ b / count
    unit = torch.eye(width, device=first.device, dtype=first.dtype)
    weight = off_diagonal + (1 - off_diagonal) * unit
    return scale * (weight * (correlation - unit).square()).sum()


def variance_covariance(x: Tensor, delta: float | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """VCReg's two terms (arXiv:2306.13292) of x (…, d), whose axes but the last are N rows: with C the covariance of the rows
    (over N - 1), the mean over dimensions of max(0, 1 - √(C_ii + eps)), and the mean over i ≠ j of C_ij².

    ``delta``: the smooth variant, in which beyond it C_ij² goes on as the line 2·delta·|C_ij| - delta².
    """
    rows = x.flatten(0, -2)
    rows = rows - rows.mean(0)
    count, width = rows.shape
    covariance = rows.T @ rows / max(1, count - 1)
    variance = F.relu(1 - (covariance.diagonal() + eps).sqrt()).mean()
    apart = covariance - covariance.diagonal().diag()
    square = apart.square()
    if delta is not None:
        square = torch.where(apart.abs() <= delta, square, 2 * delta * apart.abs() - delta**2)
    return variance, square.sum() / max(1, width * (width - 1))


def alignment_targets(prompts: Tensor) -> Tensor:
    """(B,) numbers of prompts → (B, B): 1 where two pairs share their prompt, rows made to sum to 1 (GIFT)."""
    same = (prompts[:, None] == prompts[None]).float()
    return same / same.sum(1, keepdim=True)


def alignment(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of the rows of logits (B, B) against target rows that sum to 1, with label smoothing."""
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)
