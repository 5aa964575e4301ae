"""Merging by arithmetic on weights: what fusion of models is compared with. Memory does not grow with the tasks.

``interpolate``: WiSE-FT (Wortsman et al., CVPR 2022, arXiv:2109.01903), θ = (1 - α)·θ⁰ + α·θ_tuned; here task after task: the
next one starts from the interpolated weights. ``towards=previous``: back to what the task began with, θᵗ⁻¹ in the place of θ⁰,
as in the table of ZSCL (arXiv:2303.06628; there α = 0.8). The rest merge deltas δᵗ = θᵗ - θ⁰ of experts tuned from θ⁰:
``average``: θ⁰ + mean δ (model soups, Wortsman et al., ICML 2022, arXiv:2203.05482).
``sum``: θ⁰ + scale·Σ δ (task arithmetic, Ilharco et al., ICLR 2023, arXiv:2212.04089).
``ties``: of each δ only the ``density`` largest magnitudes a tensor are kept; the sign of their sum is elected; scale times
the mean of those that have it (TIES-Merging, Yadav et al., NeurIPS 2023, arXiv:2306.01708).
``magmax``: scale times the δ of largest magnitude; here each task is tuned from the weights of the one before, not from the
merged ones (Marczak et al., ECCV 2024, arXiv:2407.06322).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from perdure.core.weights import Weights, floating, interpolate
from perdure.data.task import Task
from perdure.methods.base import METHODS, Method, Row, State, register

Rule = Literal["interpolate", "average", "sum", "ties", "magmax"]


@dataclass(frozen=True)
class Config:
    rule: Annotated[Rule, Field(description="which merge")] = "interpolate"
    alpha: Annotated[float, Field(ge=0, le=1, description="interpolate: share of the tuned weights")] = 0.5
    towards: Annotated[
        Literal["initial", "previous"],
        Field(description="interpolate: with the pre-trained weights, or those that the task began with"),
    ] = "initial"
    scale: Annotated[float, Field(ge=0, description="sum, ties, magmax: of the merged delta")] = 0.3
    density: Annotated[float, Field(gt=0, le=1, description="ties: share of a tensor's deltas that is kept")] = 0.2


@dataclass
class Merged(State):
    """What the next task is merged with: by tensor, names after a slash."""

    mean: dict[str, Tensor] = field(default_factory=dict)  # average, of weights
    total: dict[str, Tensor] = field(default_factory=dict)  # sum: Σ δ; magmax: the largest δ; ties: Σ of positive ones
    negative: dict[str, Tensor] = field(default_factory=dict)  # ties: Σ of negative δ
    votes: dict[str, Tensor] = field(default_factory=dict)  # ties: positive δ (0, …) and negative ones (1, …), counted
    last: dict[str, Tensor] = field(default_factory=dict)  # magmax: the weights last tuned
    count: int = 0


@register("merge", role="fuse")
class Merge(Method):
    """Fuse role: merge the tuned weights with the pre-trained ones, or with the other experts."""

    Config = Config
    State = Merged
    state: Merged

    def start(self, task: Task) -> None:
        if self.config.rule == "magmax" and self.state.last:
            self.clip.load_weights(f"tuned {self.state.count}", self.state.last)
        elif self.config.rule != "interpolate":
            self.clip.restart()
        elif self.config.towards == "previous":
            self.before = self.clip.weights()

    def fuse(self, task: Task) -> None:
        tuned, state = self.clip.weights(), self.state
        state.count += 1
        if self.config.rule == "interpolate":
            back = self.before if self.config.towards == "previous" else self.clip.pretrained
            merged = interpolate(back, tuned, self.config.alpha)
        elif self.config.rule == "average":
            merged = interpolate(state.mean, tuned, 1 / state.count) if state.mean else tuned
            state.mean = merged
        else:
            merged = self.merged(tuned)
        if self.config.rule == "magmax":
            state.last = tuned
        self.clip.load_weights(f"merged {task.name}", merged)

    def merged(self, tuned: Weights) -> dict[str, Tensor]:
        """θ⁰ + scale·(the deltas so far and that of ``tuned``, merged)."""
        origin, state, rule = self.clip.pretrained, self.state, self.config.rule
        merged = dict(origin)
        for name in floating(origin):
            delta = tuned[name] - origin[name]
            if rule == "ties":
                joint = self.elected(name, trimmed(delta, self.config.density))
            else:
                before = state.total.get(name, torch.zeros_like(delta))
                joint = before + delta if rule == "sum" else torch.where(delta.abs() > before.abs(), delta, before)
                state.total[name] = joint
            merged[name] = origin[name] + self.config.scale * joint
        return merged

    def elected(self, name: str, delta: Tensor) -> Tensor:
        """TIES: the mean of the trimmed deltas that have the elected sign."""
        state, zero = self.state, torch.zeros_like(delta)
        state.total[name] = state.total.get(name, zero) + delta.clamp_min(0)
        state.negative[name] = state.negative.get(name, zero) + delta.clamp_max(0)
        state.votes[name] = state.votes.get(name, torch.stack([zero, zero])) + torch.stack([delta > 0, delta < 0])
        positive, negative = state.total[name], state.negative[name]
        up, down = state.votes[name].clamp_min(1)
        return torch.where(positive + negative > 0, positive / up, negative / down)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """``delta`` with all but the share ``density`` of largest magnitude set to 0."""
    kept = max(1, round(density * delta.numel()))
    least = delta.abs().flatten().kthvalue(delta.numel() - kept + 1).values
    return torch.where(delta.abs() >= least, delta, 0.0)


for name, rule, summary, paper in (
    ("wise_ft", "interpolate", "Fine-tuning interpolated with the weights before it, after each task.", "2109.01903"),
    (
        "weight_average",
        "average",
        "The mean of experts tuned from the pre-trained weights (a model soup).",
        "2203.05482",
    ),
    ("task_arithmetic", "sum", "The scaled sum of the experts' deltas.", "2212.04089"),
    ("ties", "ties", "The experts' deltas trimmed, their signs elected, those that agree averaged.", "2306.01708"),
    ("magmax", "magmax", "The delta of largest magnitude, of tasks tuned one after another.", "2407.06322"),
):
    published = {"ties": {"scale": 1.0}, "magmax": {"scale": 0.5}}.get(rule, {})
    row = Row(learn=("finetune", {}), fuse=("merge", {"rule": rule, **published}))
    METHODS.add(name, row, summary, paper=f"arXiv:{paper}")
