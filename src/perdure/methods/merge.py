"""Merging by arithmetic on weights: interpolation and averaging.

WiSE-FT (Wortsman et al., CVPR 2022, arXiv:2109.01903): θ = (1 - α)·θ⁰ + α·θ_tuned. Here, task after task: the next task
starts from the interpolated weights, and θ⁰ stays the pre-trained model.
Weight averaging (model soups, Wortsman et al., ICML 2022, arXiv:2203.05482): the mean of experts, each tuned from θ⁰;
kept as a running mean, so that memory does not grow with the tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from perdure.core.weights import interpolate
from perdure.data.task import Task
from perdure.methods.base import METHODS, Method, Row, State, register


@dataclass(frozen=True)
class Config:
    rule: Annotated[Literal["interpolate", "average"], Field(description="which merge")] = "interpolate"
    alpha: Annotated[float, Field(ge=0, le=1, description="interpolate: share of the tuned weights")] = 0.5


@dataclass
class Mean(State):
    mean: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0


@register("merge", role="fuse")
class Merge(Method):
    """Fuse role: merge the tuned weights with the pre-trained ones, or with the other experts."""

    Config = Config
    State = Mean
    state: Mean

    def start(self, task: Task) -> None:
        if self.config.rule == "average":
            self.clip.restart()

    def fuse(self, task: Task) -> None:
        tuned = self.clip.weights()
        if self.config.rule == "interpolate":
            merged = interpolate(self.clip.pretrained, tuned, self.config.alpha)
        else:
            self.state.count += 1
            merged = interpolate(self.state.mean, tuned, 1 / self.state.count) if self.state.mean else tuned
            self.state.mean = merged
        self.clip.become(f"merged {task.name}", merged)


METHODS.add(
    "wise_ft", Row(learn=("finetune", {}), fuse=("merge", {"rule": "interpolate"})),
    "Fine-tuning interpolated with the pre-trained weights after each task (WiSE-FT).", paper="arXiv:2109.01903",
)  # fmt: skip
METHODS.add(
    "weight_average", Row(learn=("finetune", {}), fuse=("merge", {"rule": "average"})),
    "The mean of experts tuned from the pre-trained weights (a model soup of tasks).", paper="arXiv:2203.05482",
)  # fmt: skip
