"""What methods share that learn in ``calibrate``, on features of the base expert or of the pre-trained model: which classes
have a row, what a feature is, how far features moved while other weights were learned, and who answers for what was not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.features import Features
from perdure.core.seeding import derive
from perdure.data.task import Class, Context, Query, Task
from perdure.methods.base import Method, State
from perdure.models.clip import CLIP
from perdure.models.heads import Row, known, mix, places
from perdure.training.schedule import Schedule

STEADY = 0.02  # a mean move of features that is not worth a warning


@dataclass(frozen=True)
class HeadOptions:
    """What is learned on."""

    features: Annotated[
        Literal["raw", "unit"], Field(description="image features as they are projected, or made unit")
    ] = "raw"
    on: Annotated[Literal["pretrained", "drifting"], Field(description="the weights whose features it stands on")] = (
        "pretrained"
    )


@dataclass
class HeadState(State):
    """The classes that have a row, how many tasks there were, and by task how far the features of its images moved."""

    classes: list[Row] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    moved: dict[str, float] = field(default_factory=dict)


class HeadMethod(Method):
    """Learns in ``calibrate`` alone, on features; the towers stay as they are."""

    State: ClassVar[type] = HeadState
    state: Any
    before: Tensor | None = None  # the features of a task's images, before it is learned
    excused = False  # whether features that move are the method's own doing, and allowed for

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        clip.backbone.requires_grad_(False)
        self.join(clip, context or Context())

    def begin_task(self, task: Task) -> None:
        """Nothing is trained."""

    def schedule(self, task: Task) -> Schedule:
        return Schedule(steps=0, lr=0.0, warmup=0, batch_size=1)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {}

    def inputs(self, seen: Features) -> Tensor:
        """(N, D): what is learned on."""
        return seen.raw if self.config.features == "raw" else seen.embedded

    def generator(self, task: Task, what: str) -> torch.Generator:
        """What the draws called ``what`` are made by, of this task."""
        return torch.Generator().manual_seed(derive(self.context.seed, task.name, what))

    def learned_on(self, task: Task) -> tuple[Tensor, Tensor]:
        """A task is begun: the features (N, D) of its images, and the row of each of its classes (C,); see ``rows_of``."""
        x = self.inputs(self.look(task.train.pixels))
        if not x.any():
            raise PerdureError(f"{task.name}: the features of all its images are 0: nothing to learn from.")
        self.drifted(task, x)
        self.state.tasks = [*self.state.tasks, task.name]
        return x, self.rows_of(task).to(x.device)

    def rows_of(self, task: Task) -> Tensor:
        """The row of each of the task's classes (C,); a new one where a new class has images, -1 where a class has none."""
        state, there = self.state, set(task.train.labels.tolist())
        place = places(state.classes)
        rows = [
            place.setdefault((c.name, c.templates), len(place)) if k in there else -1
            for k, c in enumerate(task.classes)
        ]
        state.classes = list(place)
        return torch.tensor(rows)

    def texts(self) -> Tensor:
        """(C, D): unit text features of all rows, by the weights the model holds now."""
        return self.clip.class_texts([Class(*row).prompts() for row in self.state.classes])

    # ---- drift

    def foresees(self) -> bool:
        return self.config.on == "drifting"

    def foresee(self, task: Task) -> None:
        self.before = self.inputs(self.look(task.train.pixels))

    def drifted(self, task: Task, after: Tensor) -> None:
        """Say so where the features of the task's images moved, ``after`` (N, D) being where to: what is kept of earlier tasks
        is out of date for it."""
        far = self.move(task, after)
        if self.state.tasks and far > STEADY and not self.excused:
            self.context.warn(
                f"The features that {type(self).__name__} stands on moved by {far:.0%} while {task.name} was learned. What it "
                "keeps of earlier classes is of the old ones, and as much out of date: on=pretrained is exact."
            )

    def move(self, task: Task, after: Tensor) -> float:
        """How far the features of the task's images moved while it was learned, by their length; noted as state."""
        before, self.before = self.before, None
        if before is None:
            return 0.0
        far = ((after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)).mean().item()
        self.state.moved = {**self.state.moved, task.name: far}
        return far

    # ---- answering

    def finalizes(self) -> bool:
        return True

    def scores(self, seen: Features, rows: list[int]) -> Tensor:
        """(N, len(rows)): the logits of learned classes."""
        raise NotImplementedError

    def finalize(self, query: Query, logits: Tensor) -> Tensor:
        """The logits of learned classes; where others compete, these keep the probability of their text, and the learned
        ones share theirs out by softmax(logits)."""
        columns, rows = known(self.state.classes, query.classes)
        if not rows or query.features is None:
            return logits
        scores = self.scores(query.features, rows)
        if len(rows) == len(query.classes):
            return scores
        return mix(logits.softmax(1), scores.softmax(1), columns, 0, 1)

    def remarks(self) -> dict[str, float]:
        moved = self.state.moved
        return {"features moved by": list(moved.values())[-1]} if moved else {}
