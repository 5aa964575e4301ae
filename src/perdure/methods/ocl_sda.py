"""OCL-SDA (Yu and Chiu, "Mitigating Forgetting in Online Continual Learning via Contrasting Semantically Distinct
Augmentations", arXiv:2211.05347).

    x      the step's images and images of a memory, each turned by 0, 90, 180 and 270 degrees
    y      label + k·C: an image turned by k quarters shows another class than the upright one, not another view of it
    L      w · SupCon(features of x, y; τ) + CE over all classes, on upright images drawn so that classes are even

SupCon: over all others, positives those of the same y, the mean over anchors that have one (``ops/losses``). The contrastive
term so learns four times the classes, and keeps room for those to come. The memory is a reservoir, the stream is seen once.

No release was found, and of the paper no more than abstract and introduction was seen. The natural reading, not the paper's
word, are: the turns, by quarters; features straight from the image tower (``projector=mlp``: behind two layers); the reservoir;
and that the even batch is drawn from the step's images and the whole memory together, as many as both (``balance``).
Otherwise than there:
- The classifier is the text tower with the classes' texts; ``classifier=cosine`` learns a row a class on image features beside
  them, which starts as the class's text. A class without a row is answered by its text.
- What turning makes another thing of the same set (6 and 9, b and q) is excluded by ``rotations``, ``rotations_by_task``.
- ``term=texts`` is ours: every turned class has a text ("a photo of a dog, upside down"), and the term is CLIP's own loss of
  the turned images over the texts of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.data.task import Batch, Context, Query, Task
from perdure.data.transforms import turned
from perdure.methods.base import register
from perdure.methods.base_replay import ReplayMethod, ReplayRecipe
from perdure.models.clip import CLIP
from perdure.models.heads import CosineHead
from perdure.ops.losses import classification, supervised_contrastive
from perdure.training.fit import Backward
from perdure.training.recipe import TaskName
from perdure.training.reservoir import balanced

Turn = Annotated[Literal[0, 90, 180, 270], Field(title="turn")]  # in degrees, anticlockwise
TURNED = ("{}", "{}, turned to the left", "{}, upside down", "{}, turned to the right")  # anticlockwise, a quarter each


@dataclass(frozen=True)
class Config(ReplayRecipe):
    contrast: Annotated[float, Field(ge=0, description="w, weight of the contrastive term; 0: none")] = 1.0
    temperature: Annotated[float, Field(gt=0, description="τ, of the contrastive term")] = 0.07
    term: Annotated[
        Literal["images", "texts"],
        Field(description="turned images told apart among themselves, or (ours) by texts of the turned classes"),
    ] = "images"
    rotations: Annotated[
        tuple[Turn, ...], Field(description="turns that are classes of their own, anticlockwise; 0 is always one")
    ] = (0, 90, 180, 270)
    rotations_by_task: Annotated[
        dict[TaskName, tuple[Turn, ...]],
        Field(description="those of single tasks, where a turn makes another class of the task (6 and 9)"),
    ] = field(default_factory=dict)
    projector: Annotated[
        Literal["none", "mlp"], Field(description="what stands between image features and the contrastive term")
    ] = "none"
    balance: Annotated[
        bool, Field(description="classify images in which classes are even; no: the step's, and as many as replayed")
    ] = True
    classifier: Annotated[
        Literal["text", "cosine"], Field(description="the classifier: the classes' texts, or a row a class beside them")
    ] = "text"


@register("ocl_sda", paper="arXiv:2211.05347")
class OCLSDA(ReplayMethod):
    """Replay in one pass, with every turned image as a class of its own in a contrastive term."""

    Config = Config
    plays = ("learn", "answer")

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        super().bind(clip, context)
        for where, turns in {"rotations": self.config.rotations, **self.config.rotations_by_task}.items():
            if 0 not in turns or len(turns) != len(set(turns)):
                raise PerdureError(
                    f"{where}: {list(turns)} must hold 0, the upright image, and each turn once, as [0, 90, 270]."
                )
        self.head = CosineHead(torch.zeros(0, clip.width, device=clip.device))
        self.projector = mlp(clip.width).to(clip.device) if self.config.projector == "mlp" else None

    # ---- learn

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        c, classes = self.config, self.state.classes
        self.turns = [k for k in range(4) if any(90 * k in self.turns_of(name) for _, name in classes)]
        self.allowed = torch.tensor([[90 * k in self.turns_of(name) for k in self.turns] for _, name in classes])
        if c.classifier == "cosine":
            self.grow()
        if c.term == "texts":
            prompts = [TURNED[k].format(p.rstrip(".")) if k else p for k in self.turns for p, _ in classes]
            self.turned_tokens = self.clip.tokens(prompts)

    def turns_of(self, task: str) -> Sequence[int]:
        """The turns, in degrees, that are classes of their own among images of a task."""
        return self.config.rotations_by_task.get(task, self.config.rotations)

    @torch.no_grad()
    def grow(self) -> None:
        """A row for each new class, which starts as its text."""
        rows, new = self.head.rows, [prompt for prompt, _ in self.state.classes[len(self.head.rows) :]]
        if new:
            self.head = CosineHead(torch.cat([rows, self.clip.encode_text(new)]))

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch, and the memory: the turned images and the upright ones go through the image tower together."""
        c = self.config
        images, labels = self.with_memory(batch)
        shown, pseudo = images[:0], labels[:0]
        if c.contrast:
            keep = self.allowed.T[:, labels.cpu()].flatten().to(labels.device)
            shown = turned(images, self.turns)[keep]
            pseudo = pseudo_labels(labels, len(self.allowed), len(self.turns))[keep]
        upright, own = self.even(batch) if c.balance else (images, labels)
        features = self.clip.encode_image(torch.cat([shown, upright]))
        apart, whole = features.split([len(shown), len(upright)])
        losses = {"task": self.classified(whole, own)}
        if c.contrast:
            losses["contrast"] = c.contrast * self.contrasted(apart, pseudo)
        backward(**losses)
        self.remember(batch)

    def even(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of the batch and the whole memory together, images in whose classes are even: as many as ``with_memory`` gives."""
        images, labels = self.clip.sized(batch.images), self.rows.to(batch.labels.device)[batch.labels]
        old = self.memory.labels
        count = len(images) + min(self.config.replayed, len(old))
        chosen = balanced(torch.cat([labels.cpu(), old]), count, self.draws)
        here = chosen[chosen < len(images)].to(labels.device)
        return self.joined(images[here], labels[here], chosen[chosen >= len(images)] - len(images))

    def contrasted(self, features: Tensor, labels: Tensor) -> Tensor:
        """The contrastive term of unit features (N, D) with their pseudo-labels (N,), in fp32."""
        if self.config.term == "texts":
            return classification(self.clip.similarity(features, self.clip.encode_tokens(self.turned_tokens)), labels)
        with torch.autocast(features.device.type, enabled=False):
            if self.projector is not None:
                features = F.normalize(self.projector(features), dim=1)
            return supervised_contrastive(features, labels, self.config.temperature)

    def classified(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of unit features (N, D) by the classifier that answers."""
        if self.config.classifier == "text":
            return self.classify(features, labels)
        return classification(self.by_rows(features), labels, self.config.label_smoothing, self.group)

    def by_rows(self, features: Tensor) -> Tensor:
        """(N, C): the logits of unit features (N, D) over all classes learned, by the head's rows."""
        return self.clip.similarity(features, F.normalize(self.head.rows, dim=1))

    # ---- answer, and what it brings

    def logits(self, query: Query) -> Tensor:
        texts = super().logits(query)
        if self.config.classifier == "text":
            return texts
        place = {prompt: row for row, (prompt, _) in enumerate(self.state.classes)}
        known = [(k, place[c.prompts()[0]]) for k, c in enumerate(query.classes) if c.prompts()[0] in place]
        columns, rows = [k for k, _ in known], [row for _, row in known]
        texts[:, columns] = self.by_rows(self.embed(query))[:, rows].to(texts)
        return texts

    def modules(self) -> Mapping[str, nn.Module]:
        projector = {} if self.projector is None else {"projector": self.projector}
        return {**projector, **({"head": self.head} if self.config.classifier == "cosine" else {})}

    def unpack_state(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_state(files, values)
        self.head = CosineHead(self.head.rows.new_zeros(len(self.state.classes), self.head.rows.shape[1]))


def pseudo_labels(labels: Tensor, classes: int, turns: int) -> Tensor:
    """(turns·B,), of labels (B,) among ``classes``, one turn after another: label + k·classes."""
    return (labels + classes * torch.arange(turns, device=labels.device)[:, None]).flatten()


def mlp(width: int) -> nn.Sequential:
    """Two layers as wide as they are fed."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
