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

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from perdure.core.packing import Frozen
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
    """What the next task is merged with: tensors by name, an entry ``WHAT COUNT`` each. ``mean`` (average): of weights;
    ``total``: Σ δ (sum), the largest δ (magmax), Σ of positive ones (ties); ``negative`` and ``votes`` (ties): Σ of negative δ,
    and positive δ (0, …) and negative ones (1, …), counted; ``last`` (magmax): the weights last tuned. Large ones stay in the
    files of the task that made them."""

    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    count: int = 0

    def of(self, what: str) -> Mapping[str, Tensor]:
        """What the tasks so far have left; nothing before the first."""
        return self.sums.get(f"{what} {self.count}", {})

    def renew(self, sums: Mapping[str, dict[str, Tensor]]) -> None:
        """One task more: these in the place of what was."""
        self.count += 1
        self.sums = {f"{what} {self.count}": Frozen(tensors) for what, tensors in sums.items()}


@register("merge", role="fuse")
class Merge(Method):
    """Fuse role: merge the tuned weights with the pre-trained ones, or with the other experts."""

    Config = Config
    State = Merged
    state: Merged

    def start(self, task: Task) -> None:
        if self.config.rule == "magmax" and self.state.count:
            self.clip.load_weights(f"tuned {self.state.count}", self.state.of("last"))
        elif self.config.rule != "interpolate":
            self.clip.restart()
        elif self.config.towards == "previous":
            self.before = self.clip.weights()

    def fuse(self, task: Task) -> None:
        tuned, state, rule = self.clip.weights(), self.state, self.config.rule
        sums: dict[str, dict[str, Tensor]] = {}
        if rule == "interpolate":
            back = self.before if self.config.towards == "previous" else self.clip.pretrained
            merged = interpolate(back, tuned, self.config.alpha)
        elif rule == "average":
            merged = interpolate(state.of("mean"), tuned, 1 / (state.count + 1)) if state.count else tuned
            sums = {"mean": merged}
        else:
            merged, sums = self.merged(tuned)
            sums |= {"last": tuned} if rule == "magmax" else {}
        state.renew(sums)
        self.clip.load_weights(f"merged {task.name}", merged)

    def unpack_state(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_state(files, values)
        for key, tensor in files.get("state", {}).items():  # of runs that kept all in one file
            what, _, name = key.partition("/")
            self.state.sums.setdefault(f"{what} {self.state.count}", {})[name] = tensor

    def merged(self, tuned: Weights) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """θ⁰ + scale·(the deltas so far and that of ``tuned``, merged), and what the next task is merged with."""
        origin, rule = self.clip.pretrained, self.config.rule
        merged, sums = dict(origin), dict[str, dict[str, Tensor]]()
        total = self.state.of("total")
        for name in floating(origin):
            delta = tuned[name] - origin[name]
            if rule == "ties":
                joint, new = self.elected(name, trimmed(delta, self.config.density))
            else:
                before = total[name] if total else torch.zeros_like(delta)
                joint = before + delta if rule == "sum" else torch.where(delta.abs() > before.abs(), delta, before)
                new = {"total": joint}
            for what, tensor in new.items():
                sums.setdefault(what, {})[name] = tensor
            merged[name] = origin[name] + self.config.scale * joint
        return merged, sums

    def elected(self, name: str, delta: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """TIES: the mean of the trimmed deltas that have the elected sign, and the sums that it is made of."""
        state, signs = self.state, torch.stack([delta > 0, delta < 0]).to(delta.dtype)
        new = {"total": delta.clamp_min(0), "negative": delta.clamp_max(0), "votes": signs}
        if state.count:
            new = {what: state.of(what)[name] + tensor for what, tensor in new.items()}
        up, down = new["votes"].clamp_min(1)
        return torch.where(new["total"] + new["negative"] > 0, new["total"] / up, new["negative"] / down), new


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
