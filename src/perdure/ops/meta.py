"""Learning through learning: AdamW's steps as functions, so that what comes after a step can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Theta = Mapping[str, Tensor]
EPSILON = 1e-8


@dataclass(frozen=True)
class Inner:
    """How θ is moved: ``plain`` steps whose gradients are taken for constants, then ``differentiable`` ones, by AdamW."""

    plain: int = 1
    differentiable: int = 1
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01


@dataclass
class Moments:
    """AdamW's, after ``steps`` steps."""

    steps: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)


def adamw(theta: Theta, gradients: Theta, moments: Moments, inner: Inner) -> dict[str, Tensor]:
    """θ after one step; ``moments`` go on with it.

    1e-8 is added three times, under the root, to the root and to the quotient (TAALM): where a gradient is 0 the root would
    have no derivative.
    """
    beta1, beta2 = inner.betas
    moments.steps += 1
    after = {}
    for name, value in theta.items():
        g = gradients[name]
        first = (1 - beta1) * g + beta1 * moments.first.get(name, torch.zeros_like(g))
        second = (1 - beta2) * g.square() + beta2 * moments.second.get(name, torch.zeros_like(g))
        moments.first[name], moments.second[name] = first, second
        root = ((second + EPSILON).sqrt() + EPSILON) / (1 - beta2**moments.steps) ** 0.5 + EPSILON
        after[name] = value * (1 - inner.lr * inner.weight_decay) - inner.lr / (1 - beta1**moments.steps) * first / root
    return after


def updated(theta: Theta, loss: Callable[[Theta], Tensor], inner: Inner) -> tuple[dict[str, Tensor], list[Tensor]]:
    """θ' after the steps of ``inner`` on ``loss(θ)``, and the loss of each step. What ``loss`` depends on besides θ gets a
    gradient through the differentiable steps alone; θ itself stays as it is."""
    now = {name: value.detach().requires_grad_() for name, value in theta.items()}
    moments, losses = Moments(), []
    for step in range(inner.plain + inner.differentiable):
        through = step >= inner.plain
        losses.append(loss(now))
        found = torch.autograd.grad(
            losses[-1], list(now.values()), create_graph=through, allow_unused=True, materialize_grads=True
        )
        now = adamw(now, dict(zip(now, found, strict=True)), moments, inner)
        if not through:
            now = {name: value.detach().requires_grad_() for name, value in now.items()}
    return now, losses


def usefulness(
    theta: Theta, learn: Callable[[Theta], Tensor], query: Callable[[Theta], Tensor], inner: Inner,
    unrelated: Callable[[Theta], Tensor] | None = None, restrict: float = 1.0,
) -> Tensor:  # fmt: skip
    """How badly a later ``query(θ')`` is answered once θ has learned by the loss ``learn(θ)``; with ``unrelated``, losses (M,)
    of what has nothing to do with it, plus ``restrict`` times the mean of what these changed by."""
    after, _ = updated(theta, learn, inner)
    asked = query(after)
    if unrelated is None:
        return asked
    with torch.no_grad():
        before = unrelated(theta)
    return asked + restrict * (unrelated(after) - before).abs().mean()
