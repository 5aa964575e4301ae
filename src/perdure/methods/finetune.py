"""Sequential fine-tuning and its limits: nothing learned, everything learned at once, an expert a task.

``finetune`` is the base method as it stands: cross entropy with the published recipe (AdamW, linear warm-up, cosine,
label smoothing, frozen logit scale). ``adapt=lora`` trains low-rank adapters, ``towers=image`` or ``text`` one tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from perdure.core.packing import Frozen
from perdure.data.task import Query, Task
from perdure.methods.base import METHODS, Expert, Method, Row, State, register
from perdure.training.schedule import Schedule


@register("finetune")
class FineTune(Method):
    """Sequential fine-tuning: each task from where the last one ended."""


@register("zero_shot")
class ZeroShot(Method):
    """The pre-trained model as it is: learns nothing, forgets nothing."""

    learns = False
    reference = "lower"

    def schedule(self, task: Task) -> Schedule:
        return Schedule(steps=0, lr=0.0, warmup=0, batch_size=1)


@register("joint")
class Joint(Method):
    """All tasks at once, as many steps in all as the others: the upper bound."""

    scope: ClassVar[Literal["task", "stream"]] = "stream"
    reference = "upper"


@dataclass
class Experts(State):
    """The tuned weights of each task learned, by task name."""

    expert: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


@register("individual")
class Individual(Method):
    """An expert a task, tuned from the pre-trained weights; a task not learned, or hidden, gets the pre-trained model."""

    State = Experts
    carries_weights = False
    reference = "upper"
    state: Experts

    def start(self, task: Task) -> None:
        self.clip.restart()

    def fuse(self, task: Task) -> None:
        self.state.expert[task.name] = Frozen(self.clip.weights())
        self.state.order.append(task.name)

    def base_expert(self) -> Expert:
        return Expert("pretrained", self.clip.pretrained)

    def experts(self, query: Query) -> Sequence[Expert]:
        if query.task is None or query.task >= len(self.state.order):
            return (self.base_expert(),)
        name = self.state.order[query.task]
        return (Expert(f"expert {name}", self.state.expert[name]),)


METHODS.add(
    "finetune_lora", Row(learn=("finetune", {"adapt": "lora"})), "Sequential fine-tuning of low-rank adapters.",
    paper="arXiv:2106.09685",
)  # fmt: skip
