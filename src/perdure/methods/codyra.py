"""CoDyRA (Lu et al., "Take Only What You Need", Findings of EMNLP 2026, arXiv:2412.01004): low-rank updates that keep only the
ranks they need.

    ΔW = Σᵢ wᵢ Bᵢ Aᵢ          beside every adapted weight W, anew for each task: A uniform in ±1/√in, B = 0, w standard normal
    L = CE(s·I·Tᵀ) over the task's classes + CE(s·T·Iᵀ) over the batch's images, a row a class seen so far
    w ← sign(w)·max(|w| - κ, 0)    after each step of the later part, κ going up to κ_max by n - 1 stairs
    W ← W + ΔW                     when the task is over: plain weights, nothing else is left

The target of class c in the second term is 1 at each of its images (not normalised); the sum over images is divided by the
number of rows. Rows of earlier classes are 0 and only counted, so their texts need no forward pass: exact. Ranks whose w is 0
add nothing: they are left out of the merge. All else is frozen: biases, norms, embeddings, projections, the logit scale.

As in the release: β₂ = 0.9999; κ moves at iteration d = dense·T, the shrink begins at d + 1; Adam goes on with moments of a w
that is 0, which may come back while κ is small; with ``towers=text`` the second term is left out, with ``image`` it stays.
Otherwise than in the release:
- The shrink is the paper's soft threshold. The release's (``shrink=release``) does it in three steps, in place, the last of
  which sets to 0 what the first two left below κ: its dead zone is 2κ to either side, and at its edge w falls from κ to 0.
- A task is merged when it is over, not when the next begins: the same function.
- Under label smoothing, which the published runs do without, the mass is spread over the task's own classes (there over the
  excluded ones too, so that the loss is infinite).
- ``text_rows=current`` counts the task's classes alone, so that the second term does not fade as classes add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perdure.data.task import Batch, Context, Task
from perdure.methods.base import Method, State, Training, register
from perdure.models.beside import LowRank, linears
from perdure.models.clip import CLIP
from perdure.ops.losses import classification, positive_pull
from perdure.training.fit import Backward
from perdure.training.recipe import LORA_LAYERS


@dataclass(frozen=True)
class Config(Training):
    lr: Annotated[float, Field(ge=0, description="of A, B and w")] = 5e-4
    iterations: Annotated[int, Field(ge=0, le=10**9, description="optimiser steps a task")] = 500
    warmup: Annotated[int, Field(ge=0, le=10**9, description="steps of linear warm-up, then a cosine to 0")] = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="of the image side's loss")] = 0.0
    beta2: Annotated[float, Field(ge=0, lt=1, description="AdamW's and Adam's")] = 0.9999
    rank: Annotated[int, Field(ge=1, le=1024, description="ranks that a task begins with, a layer")] = 16
    layers: Annotated[tuple[str, ...], Field(description="linear layers that get an update")] = LORA_LAYERS
    kappa: Annotated[
        float, Field(ge=0, description="κ_max: how far the last shrinks move w; 0: no rank is given up")
    ] = 0.005
    kappa_steps: Annotated[int, Field(ge=1, description="n: κ takes n values, evenly from 0 to κ_max")] = 50
    dense: Annotated[float, Field(ge=0, le=1, description="share of the steps before any shrink")] = 0.5
    shrink: Annotated[
        Literal["soft", "release"],
        Field(description="soft threshold, or the release's, whose dead zone is twice as wide"),
    ] = "soft"
    text_rows: Annotated[
        Literal["all", "current"],
        Field(description="classes that the text side is divided by: seen so far, or the task's"),
    ] = "all"


@dataclass
class Learned(State):
    """How many classes the tasks so far had, and by task the ranks that each layer kept."""

    classes: int = 0
    ranks: dict[str, dict[str, int]] = field(default_factory=dict)


@register("codyra", paper="arXiv:2412.01004")
class CoDyRA(Method):
    """Low-rank updates a task, whose unneeded ranks are shrunk away, merged into plain weights."""

    Config = Config
    plays = ("learn",)
    State = Learned
    state: Learned

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        clip.backbone.requires_grad_(False)
        self.join(clip, context or Context())
        self.places = linears(clip.backbone, self.config.layers, self.config.towers)
        self.updates = {name: LowRank(layer, self.config.rank) for name, layer in self.places.items()}
        self.said: dict[str, float] = {}

    # ---- learn

    def trains_on(self, task: Task) -> bool:
        self.said = {}  # of the task before
        return super().trains_on(task)

    @torch.no_grad()
    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.steps = self.schedule(task).steps
        self.rows = len(task.classes) + (self.state.classes if self.config.text_rows == "all" else 0)
        for update in self.updates.values():
            update.draw()
            update.w.normal_()

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {f"{name}.{key}": p for name, update in self.updates.items() for key, p in update.named_parameters()}

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch: the image side, and the text side where the image tower learns."""
        c, clip = self.config, self.clip
        texts = self.frozen_texts if self.frozen_texts is not None else clip.encode_tokens(self.tokens)
        images = clip.encode_image(batch.images)
        logits = clip.similarity(images, texts)
        losses = {"task": classification(logits, batch.labels, c.label_smoothing, self.group)}
        if c.positive_pull:
            losses["pull"] = c.positive_pull * positive_pull(images, texts[batch.labels])
        if c.towers != "text":
            own = logits.log_softmax(0).gather(1, batch.labels[:, None])
            losses["text_side"] = -own.sum() / self.rows
        backward(**losses)

    def kappa(self, iteration: int) -> float:
        """κ at iteration 0 … T - 1: one stair up, before the step, at each multiple of ⌊(T - d)/n⌋ from d on."""
        c = self.config
        begin = c.dense * self.steps
        every = int((self.steps - begin) // c.kappa_steps)
        if not every or iteration < begin or c.kappa_steps == 1:
            return 0.0
        stairs = iteration // every - math.ceil(begin / every) + 1
        return c.kappa * min(stairs, c.kappa_steps - 1) / (c.kappa_steps - 1)

    @torch.no_grad()
    def stepped(self, step: int) -> None:
        if step - 1 > self.config.dense * self.steps:
            shrunk = shrink if self.config.shrink == "soft" else shrink_release
            for update in self.updates.values():
                update.w.copy_(shrunk(update.w, self.kappa(step - 1)))

    # ---- merge

    def finish(self, task: Task) -> None:
        self.state.classes += len(task.classes)
        deltas = {f"{name}.weight": update.product() for name, update in self.updates.items()}
        kept = {name: int((update.w != 0).sum()) for name, update in self.updates.items()}
        for update in self.updates.values():
            update.on = False
        own, born = self.clip.plain(), self.clip.pretrained
        self.clip.load_weights(f"merged {task.name}", {name: own[name] + delta for name, delta in deltas.items()})
        self.state.ranks[task.name] = kept
        self.said = {
            "ranks kept, mean": sum(kept.values()) / len(kept),
            "norm of the update": norm(deltas),
            "norm of all updates": norm({name: own[name].detach() - born[name] for name in deltas}),
            **{f"ranks of {name}": float(count) for name, count in kept.items()},
        }

    def remarks(self) -> dict[str, float]:
        return self.said


def norm(tensors: Mapping[str, Tensor]) -> float:
    """The Frobenius norm of all tensors together."""
    return sum(t.double().square().sum().item() for t in tensors.values()) ** 0.5


def shrink(w: Tensor, kappa: float) -> Tensor:
    """The soft threshold sign(w)·max(|w| - κ, 0)."""
    return w.sign() * (w.abs() - kappa).clamp_min(0)


def shrink_release(w: Tensor, kappa: float) -> Tensor:
    """The release's: w - κ above κ; then w + κ below -κ; then 0 where |w| < κ, so that all within 2κ is lost."""
    w = torch.where(w > kappa, w - kappa, w)
    w = torch.where(w < -kappa, w + kappa, w)
    return torch.where(w.abs() < kappa, torch.zeros_like(w), w)
