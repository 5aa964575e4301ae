"""What a method is: three roles, learn, fuse and answer. The defaults together are sequential fine-tuning.

| role   | hooks                                               | default                                       |
|--------|-----------------------------------------------------|-----------------------------------------------|
| learn  | ``begin_task`` ``parameters`` ``schedule`` ``step`` | cross entropy, the published recipe           |
| fuse   | ``start`` ``fuse`` ``experts``                      | go on from the last weights; answer with them |
| answer | ``calibrate`` ``logits``                            | cosine similarity to the classes' texts       |

A new method is one file in this folder: a subclass with the hooks it changes, decorated with ``@register(name)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perdure.core.registry import Registry
from perdure.core.packing import pack, unpack
from perdure.core.weights import Weights
from perdure.data.task import Batch, Context, Query, Task
from perdure.models.clip import CLIP
from perdure.ops.losses import classification
from perdure.training.fit import Backward, Schedule

Rate = Annotated[float, Field(ge=0)]
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Recipe:
    """How a task is trained. The defaults are the published recipe of ZSCL, GIFT and ConDU for CLIP ViT-B/16."""

    lr: Annotated[float, Field(ge=0, description="peak learning rate")] = 1e-5
    lr_by_task: Annotated[dict[str, Rate], Field(description="learning rates of single tasks, by task name")] = field(
        default_factory=dict
    )
    iterations: Annotated[int, Field(ge=0, le=10**9, description="optimiser steps a task")] = 1000
    batch_size: Annotated[int, Field(ge=1, le=10**6, description="images a step")] = 64
    warmup: Annotated[int, Field(ge=0, le=10**9, description="steps of linear warm-up, then a cosine to 0")] = 100
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="of the classification loss")] = 0.2
    weight_decay: Annotated[float, Field(ge=0, description="AdamW's")] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1, description="AdamW's")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="AdamW's")] = 0.999
    clip_grad: Annotated[float | None, Field(gt=0, description="largest norm of the gradient; none: no limit")] = None
    towers: Annotated[Literal["both", "image", "text"], Field(description="which towers learn")] = "both"
    adapt: Annotated[Literal["full", "lora"], Field(description="train all weights, or low-rank adapters")] = "full"
    lora_rank: Annotated[int, Field(ge=1, le=1024, description="rank of the adapters")] = 8
    lora_alpha: Annotated[float, Field(gt=0, description="adapters are scaled by alpha / rank")] = 16.0
    lora_layers: Annotated[tuple[str, ...], Field(description="linear layers that get an adapter")] = LORA_LAYERS
    lora_init: Annotated[
        Literal["kaiming", "xavier", "random"],
        Field(description="how A starts, B being 0; random: both random, so that a new adapter changes the model"),
    ] = "kaiming"


@dataclass
class State:
    """What must outlive a task beyond the weights: plain values, ``dict[str, Tensor]``, or ``dict[str, dict]`` a task."""


@dataclass(frozen=True)
class Expert:
    """Weights that answer, and their say. ``weights`` None: those that the model holds after the last task.

    ``gate``: one for all images, or one an image (N,); where it is 0 the expert is not asked. ``embedded`` (N, D): the
    images' unit embeddings by these weights, where they are known already.
    """

    name: str
    weights: Weights | None = None
    gate: float | Tensor = 1.0
    embedded: Tensor | None = None


class Method:
    """Sequential fine-tuning, and the base of every method.

    ``bind`` gives it the model; then, for each task: ``start``, ``begin_task``, steps, ``fuse``, ``calibrate``; in
    between, ``predict``.
    """

    Config: ClassVar[type] = Recipe
    State: ClassVar[type] = State
    role_options: ClassVar[Mapping[str, type]] = {}  # the options that count where only this role is played
    scope: ClassVar[Literal["task", "stream"]] = "task"  # stream: sees all tasks at once
    learns: ClassVar[bool] = True  # False: no task changes anything
    carries_weights: ClassVar[bool] = True  # False: ``start`` and ``experts`` never need the last task's weights

    clip: CLIP

    def __init__(self, config: Any = None, **values: Any):
        self.config = config if config is not None else self.Config(**values)
        self.state = self.State()

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        """Take the model and what the run offers besides, and decide which weights may learn."""
        c = self.config
        if c.adapt == "lora":
            clip.adapt(c.lora_rank, c.lora_alpha, c.lora_layers, c.towers, c.lora_init)
        for name, parameter in clip.backbone.named_parameters():
            part = "image" if name.startswith("vis") else "text"  # vision_model, visual_projection | text_…
            parameter.requires_grad_(parameter.requires_grad and name != "logit_scale" and c.towers in ("both", part))
        self.join(clip, context or Context())

    def join(self, clip: CLIP, context: Context) -> None:
        """Take a model that is ready to learn: all that a part of a composition does which does not learn."""
        self.clip, self.context = clip, context

    # ---- learn

    def begin_task(self, task: Task) -> None:
        """Prepare for the task: what is made here can be made again, and is not state."""
        self.tokens = self.clip.tokens(task.prompts())
        self.group = task.group.to(self.clip.device) if task.group is not None else None
        self.frozen_texts = None
        if self.config.towers == "image":  # the texts cannot change: once is enough
            with torch.no_grad():
                self.frozen_texts = self.clip.encode_tokens(self.tokens)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What learns, by name."""
        return {n: p for n, p in self.clip.backbone.named_parameters() if p.requires_grad}

    def schedule(self, task: Task) -> Schedule:
        c = self.config
        return Schedule(
            steps=c.iterations * task.parts, lr=c.lr_by_task.get(task.name, c.lr), warmup=c.warmup,
            batch_size=c.batch_size, weight_decay=c.weight_decay, betas=(c.beta1, c.beta2), clip=c.clip_grad,
        )  # fmt: skip

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch: cross entropy of s·I·Tᵀ over the task's classes."""
        backward(task=self.task_loss(batch))

    def enough(self, steps: int) -> bool:
        """Whether to stop after so many steps, before the schedule ends."""
        return False

    def again(self, task: Task) -> bool:
        """After training: whether to train anew (what was learned is the method's to undo)."""
        return False

    def task_loss(self, batch: Batch) -> Tensor:
        """The classification loss of the task at hand."""
        texts = self.frozen_texts if self.frozen_texts is not None else self.clip.encode_tokens(self.tokens)
        logits = self.clip.scale * self.clip.encode_image(batch.images) @ texts.T
        return classification(logits, batch.labels, self.config.label_smoothing, self.group)

    # ---- fuse

    def start(self, task: Task) -> None:
        """Put the weights where learning ``task`` begins."""

    def fuse(self, task: Task) -> None:
        """After training: combine the new weights with what is kept."""

    def experts(self, query: Query) -> Sequence[Expert]:
        """Who answers a query."""
        return (Expert("last"),)

    def base_expert(self) -> Expert:
        """The weights whose features change least from task to task: a head on top of features is fitted on theirs."""
        return Expert("last")

    # ---- answer

    def calibrate(self, task: Task) -> None:
        """After fusing: fit what stands on top of the features of ``base_expert``, which the model holds now."""

    def logits(self, query: Query) -> Tensor:
        """(N, C) logits of the weights the model holds now."""
        texts = self.clip.class_texts([c.prompts() for c in query.classes])
        return self.clip.scale * self.embed(query) @ texts.T

    def embed(self, query: Query) -> Tensor:
        """The query's images as unit embeddings (N, D), by the weights the model holds now."""
        return self.clip.encode_image(query.images[:]) if query.embedded is None else query.embedded

    def finalize(self, query: Query, logits: Tensor) -> Tensor:
        """(N, C): the answer, of Σ gate × logits over the experts and the features of ``base_expert``, ``query.embedded``."""
        return logits

    def finalizes(self) -> bool:
        """Whether ``finalize`` is more than handing through: only then are the features of ``base_expert`` worked out."""
        return type(self).finalize is not Method.finalize

    def predict(self, query: Query) -> Tensor:
        """(N, C): Σ gate × logits over the experts, concluded by the answer role."""
        return self.answer([query])[0]

    @torch.no_grad()
    def answer(self, queries: Sequence[Query], size: int = 256) -> list[Tensor]:
        """``predict`` for many queries: an expert's weights are put on once for all, and it sees only the images that
        need it, ``size`` at a time."""
        home = self.base_expert()
        if self.finalizes():
            self.load_expert(home)
            queries = [replace(q, embedded=torch.cat([self.embed(x) for x in q.parts(size)])) for q in queries]
        plans = [self.experts(query) for query in queries]
        totals = [torch.zeros(len(q.images), len(q.classes), device=self.clip.device) for q in queries]
        for name in dict.fromkeys(expert.name for plan in plans for expert in plan):
            for query, plan, total in zip(queries, plans, totals, strict=True):
                for expert in (e for e in plan if e.name == name):
                    known = query.embedded if name == home.name else expert.embedded
                    self.add(expert, replace(query, embedded=expert.embedded if known is None else known), total, size)
        return [self.finalize(query, total) for query, total in zip(queries, totals, strict=True)]

    def load_expert(self, expert: Expert) -> None:
        """Put an expert's weights on."""
        if expert.weights is not None:
            self.clip.load_weights(expert.name, expert.weights)

    def add(self, expert: Expert, query: Query, total: Tensor, size: int) -> None:
        """Add gate × logits of one expert to ``total`` (N, C), for the images that need it."""
        gate = torch.as_tensor(expert.gate, dtype=torch.float32).cpu().expand(len(total))
        rows = gate.nonzero().squeeze(1)
        if not len(rows):
            return
        self.load_expert(expert)
        for part in rows.split(size):
            total[part] += gate[part].unsqueeze(1).to(total.device) * self.logits(query.part(part))

    # ---- state

    def pack_state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The state as (tensors by file, plain values): what a checkpoint keeps."""
        return pack(self.state)

    def unpack_state(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """The inverse of ``pack_state``."""
        self.state = unpack(self.State, files, values)


@dataclass(frozen=True)
class Row:
    """A baseline that is only a combination of parts: role → (method, option values)."""

    learn: tuple[str, dict[str, Any]]
    fuse: tuple[str, dict[str, Any]] | None = None
    answer: tuple[str, dict[str, Any]] | None = None

    def parts(self) -> dict[str, tuple[str, dict[str, Any]]]:
        named = {"learn": self.learn, "fuse": self.fuse, "answer": self.answer}
        return {role: part for role, part in named.items() if part is not None}


METHODS: Registry[Any] = Registry("method")
register = METHODS.register
