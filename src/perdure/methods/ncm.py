"""Nearest class mean on frozen features: the baseline that a method has to beat before its learning is worth anything.

Nothing is trained. A class is the mean of its training images' unit features by the pre-trained model (Mensink et al.,
TPAMI 2013; on frozen pre-trained features: Janson et al., 2022, arXiv:2210.04428); the nearest by cosine similarity wins.
Where none of the competing classes was seen, the pre-trained model answers with their texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from perdure.data.task import Query, Task
from perdure.methods.base import Method, State, register
from perdure.models.heads import CosineHead, Row, places
from perdure.ops.prototypes import class_means
from perdure.training.schedule import Schedule


@dataclass
class Means(State):
    """A mean a class, and the names and templates of the classes."""

    classes: list[Row] = field(default_factory=list)
    means: dict[str, Tensor] = field(default_factory=dict)


@register("ncm", paper="arXiv:2210.04428")
class NearestClassMean(Method):
    """The mean of each class's frozen image features; nothing is trained."""

    State = Means
    state: Means

    def schedule(self, task: Task) -> Schedule:
        return Schedule(steps=0, lr=0.0, warmup=0, batch_size=1)

    def calibrate(self, task: Task) -> None:
        features = self.clip.embeddings(task.train.pixels)
        means, sizes = class_means(features, task.train.labels.to(features.device), len(task.classes))
        there = sizes > 0
        old = self.state.means.get("means", means[:0])
        self.state.means = {"means": torch.cat([old, means[there]])}
        named = [(c.name, c.templates) for c in task.classes]
        self.state.classes = [*self.state.classes, *(n for n, s in zip(named, there.tolist(), strict=True) if s)]

    def finalize(self, query: Query, logits: Tensor) -> Tensor:
        place = places(self.state.classes)
        rows = [place.get((c.name, c.templates)) for c in query.classes]
        known = [k for k, row in enumerate(rows) if row is not None]
        if not known or query.features is None:
            return logits
        out = torch.full_like(logits, -1.0)  # the lowest cosine
        out[:, known] = CosineHead(self.state.means["means"][[r for r in rows if r is not None]])(
            query.features.embedded
        )
        return out
