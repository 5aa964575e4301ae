"""MG-CLIP (Huang et al., "Mind the Gap: Preserving and Compensating for the Modality Gap in CLIP-Based Continual Learning",
ICCV 2025, arXiv:2507.09118).

    preserve:    adapt k and v with LoRA, cross entropy over the task's own classes, for as many epochs as move the
                 mean logit of the wrong classes by less than a tenth on the first task
    compensate:  a cosine classifier on the image features of the adapted model, a row a class
    predict:     (a·softmax(s·I·Tᵀ) + b·softmax(cos(I, rows))) / (a + b)

One adapter is carried from task to task; a head's old rows stay as they were. Exact shortcut: the head's features are encoded
once, and only the new rows are trained (the old ones have no gradient).

As in the release: alpha 1 (so that adapters are scaled by 1/rank), A Xavier-uniform and B zero, Adam with a cosine to a
hundredth that changes once an epoch, rows that start from the mean of the class's unit features. Otherwise than there:
- The number of epochs is found in the run itself: ten at most, as in its separate script; when the negative mean has moved
  too far the adapter is put back and trained anew for the epochs before (at least one), under their own schedule.
- The change is relative to the mean's magnitude (the release has no absolute value there: a negative mean never stops it).
- The means are over images (the release: over batches, ``gap_mean=batches``).
- ``softmax=double`` is the release's: it puts the text probabilities through softmax twice, which brings them to the scale
  of the head's cosines. The default is what is better on the small world (docs/mg_clip.md).
- ``freeze_A`` (off, as published) trains B alone from the second task on. In the release A then falls back to its values
  from before the first task, which is silently another model: ``frozen_A=initial``; ``frozen_A=trained`` leaves it where
  the first task's training did.
- Where classes compete that have no row, they keep their text probability (the release knows no such class).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.seeding import derive
from perdure.data.files import Pixels
from perdure.data.task import Batch, Class, Context, Query, Task
from perdure.methods.base import Method, Recipe, State, register
from perdure.models import lora
from perdure.models.clip import CLIP
from perdure.models.heads import CosineHead, Gate, Row, known, mix, places, softmax
from perdure.ops.gap import logit_means, relative_change
from perdure.ops.losses import classification
from perdure.ops.prototypes import class_means
from perdure.training.fit import Backward, Stepper, batches
from perdure.training.schedule import Schedule


@dataclass(frozen=True)
class Compensation:
    head: Annotated[bool, Field(description="compensate with a classifier on image features")] = True
    head_lr: Annotated[float, Field(ge=0, description="of the head")] = 5e-4
    head_epochs: Annotated[int, Field(ge=0, le=10**6, description="of the head, a task")] = 3
    head_batch: Annotated[int, Field(ge=1, le=10**6, description="features a step of the head")] = 64
    text_weight: Annotated[float, Field(ge=0, description="a, of the text probabilities")] = 1.0
    head_weight: Annotated[float, Field(ge=0, description="b, of the head's probabilities")] = 4.0
    softmax: Annotated[Literal["single", "double"], Field(description="of the text logits, before they are mixed")] = (
        "double"
    )
    gate: Annotated[Gate, Field(description="how classes without a row are kept: see docs/ridge.md")] = "mass"
    on: Annotated[
        Literal["drifting", "pretrained"],
        Field(description="the weights whose features the head stands on: those that answer, or the pre-trained ones"),
    ] = "drifting"


@dataclass(frozen=True)
class Config(Compensation, Recipe):
    lr: Annotated[float, Field(ge=0, description="of the adapters")] = 1e-3
    iterations: Annotated[
        int, Field(ge=0, le=10**9, description="optimiser steps a task, with warm-up, as other methods; 0: by epochs")
    ] = 0
    warmup: Annotated[int, Field(ge=0, le=10**9, description="steps of linear warm-up, where iterations are given")] = 0
    batch_size: Annotated[int, Field(ge=1, le=10**6, description="images a step")] = 128
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="of the classification loss")] = 0.0
    adapt: Annotated[Literal["full", "lora"], Field(description="train all weights, or low-rank adapters")] = "lora"
    lora_alpha: Annotated[float, Field(gt=0, description="adapters are scaled by alpha / rank")] = 1.0
    lora_layers: Annotated[tuple[str, ...], Field(description="linear layers that get an adapter")] = (
        "k_proj",
        "v_proj",
    )
    lora_init: Annotated[
        Literal["kaiming", "xavier", "random"],
        Field(description="how A starts, B being 0; random: both random, so that a new adapter changes the model"),
    ] = "xavier"
    freeze_A: Annotated[bool, Field(description="train the adapters' A on the first task only")] = False
    frozen_A: Annotated[
        Literal["initial", "trained"],
        Field(description="freeze_A: A as it was before the first task, as in the release, or as that left it"),
    ] = "initial"
    augment: Annotated[bool, Field(description="crop training images at random")] = False
    epochs: Annotated[int, Field(ge=0, le=10**6, description="a task; 0: the gap decides, on the first one")] = 0
    most_epochs: Annotated[int, Field(ge=1, le=10**6, description="that the gap may decide on")] = 10
    gap_change: Annotated[float, Field(gt=0, description="relative change of the negative mean that stops")] = 0.1
    gap_mean: Annotated[Literal["images", "batches"], Field(description="what the means are taken over")] = "images"


@dataclass
class Learned(State):
    """The epochs that the gap allows (0: not known yet), the changes seen by epoch, the head, and A before the first task."""

    epochs: int = 0
    changes: list[float] = field(default_factory=list)
    classes: list[Row] = field(default_factory=list)
    head: dict[str, Tensor] = field(default_factory=dict)
    first_A: dict[str, Tensor] = field(default_factory=dict)


@register("mg_clip", paper="arXiv:2507.09118")
class MGCLIP(Method):
    """Stop adapting before the modality gap moves; win the rest with a classifier on image features."""

    Config = Config
    State = Learned
    role_options = {"answer": Compensation}
    state: Learned

    # ---- preserve

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        super().bind(clip, context)
        if self.config.freeze_A and not lora.factors(clip.backbone):
            raise PerdureError("freeze_A: no adapters are trained here. Set adapt=lora, or freeze_A=false.")

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if self.config.freeze_A:
            self.freeze()
        self.per_epoch = -(-len(task.train) // self.config.batch_size)
        if self.searching:
            self.task, self.state.changes = task, []
            self.initial = {n: p.detach().clone() for n, p in self.parameters().items()}
            self.negative = self.negative_mean(task)

    @property
    def searching(self) -> bool:
        return not (self.config.iterations or self.config.epochs or self.state.epochs)

    @torch.no_grad()
    def freeze(self) -> None:
        """From the second task on, let no A learn."""
        factors = lora.downward(self.clip.backbone)
        if not self.state.first_A:
            self.state.first_A = {name: a.detach().clone() for name, a in factors.items()}
            return
        for name, a in factors.items():
            if self.config.frozen_A == "initial":
                a.copy_(self.state.first_A[name])
            a.requires_grad_(False)

    def negative_mean(self, task: Task) -> float:
        """The mean logit of the wrong classes on the training images, by the weights the model holds now."""
        return self.means(task.train.pixels, task.train.labels, task.classes)[1]

    @torch.no_grad()
    def means(self, pixels: Pixels, labels: Tensor, classes: tuple[Class, ...]) -> tuple[float, float]:
        """The mean logits (without a bias: a change is relative to them) of right and wrong classes, by training prompts."""
        texts = self.clip.encode_text([c.prompts()[0] for c in classes])
        images = self.clip.embeddings(pixels)
        size = self.config.batch_size if self.config.gap_mean == "batches" else None
        return logit_means(self.clip.scaled(images, texts), labels.to(images.device), size)

    def schedule(self, task: Task) -> Schedule:
        c = self.config
        plan = replace(super().schedule(task), augment=c.augment, stride=1, milestones=c.milestones or None)
        if c.iterations:
            return replace(plan, steps=c.iterations * task.parts)
        epochs = c.most_epochs if self.searching else c.epochs or self.state.epochs
        return replace(plan, steps=0, warmup=0, floor=0.01, epochs=epochs).over(len(task.train))

    def enough(self, steps: int) -> bool:
        if not self.searching or steps % self.per_epoch:
            return False
        self.state.changes.append(relative_change(self.negative, self.negative_mean(self.task)))
        return self.state.changes[-1] > self.config.gap_change

    @torch.no_grad()
    def again(self, task: Task) -> bool:
        if not self.searching:
            return False
        changes = self.state.changes
        self.state.epochs = max(1, len(changes) - (changes[-1] > self.config.gap_change))
        for name, parameter in self.parameters().items():
            parameter.copy_(self.initial[name])
        return True

    # ---- compensate

    def calibrate(self, task: Task) -> None:
        if not self.config.head:
            return
        features, labels = self.clip.embeddings(task.train.pixels), task.train.labels.to(self.clip.device)
        rows, sizes = class_means(features, labels, len(task.classes))
        there = sizes > 0  # a class without images gets no row: its text answers for it
        rows, labels = rows[there], (there.cumsum(0) - 1)[labels]
        learner = HeadLearner(CosineHead(rows), self.config)
        order = torch.Generator().manual_seed(derive(self.context.seed, task.name, "order of the head's features"))
        draws = (Batch(features[i], labels[i]) for i in batches(len(labels), self.config.head_batch, order))
        self.train(learner, learner.plan(len(labels)), draws, "head")
        self.keep([c for c, t in zip(task.classes, there.tolist(), strict=True) if t], learner.head.rows.detach())

    def keep(self, classes: Sequence[Class], rows: Tensor) -> None:
        """Add rows to the head; a class that has one already gets the new one."""
        state = self.state
        known = places(state.classes)
        old = state.head.get("rows", rows[:0]).clone()
        fresh = []
        for one, row in zip(classes, rows, strict=True):
            place = known.get((one.name, one.templates))
            if place is None:
                state.classes = [*state.classes, (one.name, one.templates)]
                fresh.append(row)
            else:
                old[place] = row
        state.head = {"rows": torch.cat([old, *(row.unsqueeze(0) for row in fresh)])}

    # ---- predict

    def finalizes(self) -> bool:
        return self.config.head

    def finalize(self, query: Query, logits: Tensor) -> Tensor:
        c = self.config
        if not c.head:
            return logits
        text = softmax(logits, 2 if c.softmax == "double" else 1)
        columns, rows = known(self.state.classes, query.classes)
        if not rows or query.features is None:
            return text
        visual = softmax(CosineHead(self.state.head["rows"][rows])(query.features.embedded))
        return mix(text, visual, columns, c.text_weight, c.head_weight, c.gate, query.classes)


class HeadLearner(Stepper):
    """Trains a head on features: cross entropy over the task's own rows."""

    def __init__(self, head: CosineHead, config: Compensation):
        self.head, self.config = head, config

    def plan(self, count: int) -> Schedule:
        c = self.config
        return Schedule(c.head_epochs * -(-count // c.head_batch), c.head_lr, 0, c.head_batch, floor=0.01)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {"rows": self.head.rows}

    def step(self, batch: Batch, backward: Backward) -> None:
        backward(head=classification(self.head(batch.images), batch.labels))
