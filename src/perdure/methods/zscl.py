"""ZSCL (Zheng et al., "Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models", ICCV 2023,
arXiv:2303.06628), and the baselines of its table that are settings of one loop.

    L = CE + D(s·R⁰C⁰ᵀ, s·R C⁰ᵀ) + D(s·C⁰R⁰ᵀ, s·C⁰Rᵀ) + λ·Σ ‖θ - θᵗ⁻¹‖²        (D: see training/distillation.py)

While a task is learned, the student keeps the similarities that the pre-trained CLIP sees between reference images and
reference texts, and stays near the weights where the task began. What the task leaves is the running mean of those weights:

    we        m ← θᵗ⁻¹; after every step i = 0, I, 2I, …:  n ← n + 1,  m ← (m·n + θ)/(n + 1);  at the end θ ← m
    we_wise   the same with  m ← a·(m·n + θ)/(n + 1) + (1 - a)·θᵗ⁻¹;  the pull compounds
    moving    at those moments the model in training itself becomes d·θ + (1 - d)·k, and goes on from there

lwf        LwF (Li & Hoiem, TPAMI 2017, arXiv:1606.09282): references are the task's own images and class texts, the teacher is
           the model before the task; no penalty, no mean
lwf_vr     LwF-VR (Ding et al., arXiv:2207.09248): LwF, whose texts are 1,000 random sentences
wc, we     weight consolidation alone, averaging alone: nothing is distilled

As in the release: iterations run from 0 to N, the last at rate 0; the student never embeds the reference texts
(``embed_texts=student`` does); λ weighs a sum. Exact shortcuts: the penalty's gradient, 2·λ·(θ - θᵗ⁻¹), is written down; only
tensors that learn are anchored and averaged, as the others never move; and those of training/distillation.py.

Deviations: the release's references, ImageNet and Conceptual Captions, cannot ship: ``reference`` and ``vocabulary`` say what
stands for them. Its class-incremental code lets teacher and student share their memory in LwF, LwF-VR and iCaRL, so that
nothing is distilled; here they never do. With adapters, anchor and mean are those of their factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.packing import Packed
from perdure.core.seeding import derive
from perdure.data.task import Batch, Context, Task
from perdure.methods.base import METHODS, Method, Recipe, Row, register
from perdure.models.clip import CLIP
from perdure.synthesis.reference import Reference, ReferenceRecipe
from perdure.training.distillation import DistillationRecipe, Distiller
from perdure.training.fit import Backward, batches
from perdure.training.schedule import Schedule


@dataclass(frozen=True)
class Config(ReferenceRecipe, DistillationRecipe, Recipe):
    lam: Annotated[float, Field(ge=0, description="λ, weight of the penalty ‖θ - θᵗ⁻¹‖², a sum")] = 1.0
    average: Annotated[
        Literal["none", "we", "we_wise", "moving"], Field(description="which mean of the weights a task leaves")
    ] = "we"
    average_every: Annotated[
        int,
        Field(
            ge=0,
            le=10**9,
            description="I, steps from one averaging to the next; 0: a tenth of a task's",
        ),
    ] = 0
    wise_alpha: Annotated[float, Field(ge=0, le=1, description="we_wise: a, share of the mean")] = 0.98
    moving_decay: Annotated[float, Field(ge=0, le=1, description="moving: d, share of the weights in training")] = 0.999
    moving_towards: Annotated[
        Literal["previous", "initial", "last"],
        Field(description="moving: k, the weights before the task, the pre-trained, or those of the last such moment"),
    ] = "previous"


@register("zscl", paper="arXiv:2303.06628")
class ZSCL(Method):
    """Distil the pre-trained model on unpaired references, stay near, and average the weights."""

    Config = Config
    plays = ("learn",)

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        super().bind(clip, context)
        c = self.config
        c.check_reaches(c.towers)
        if c.average.startswith("we") and not c.epochs and 0 < c.iterations < c.average_every:
            raise PerdureError(
                f"average_every={c.average_every}: in {c.iterations} iterations the only averaging is after the first step, "
                "so the mean would be where the task began. Set average_every=0, or lower than iterations."
            )
        if c.average == "moving" and c.moving_towards == "initial" and c.adapt != "full":
            raise PerdureError(
                "moving_towards=initial: adapters have no pre-trained weights to go back to. Set moving_towards=previous, or "
                "adapt=full."
            )
        self.distiller = Distiller(c, clip)
        if c.distils:
            self.references = Reference(c, self.context, clip)

    def schedule(self, task: Task) -> Schedule:
        plan = super().schedule(task)
        return replace(plan, steps=plan.steps + 1, horizon=plan.steps, stride=1) if plan.steps else plan

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        c, learns = self.config, self.parameters()
        self.anchor = {name: p.detach().clone() for name, p in learns.items()} if self.anchors else {}
        self.mean = {name: p.detach().clone() for name, p in learns.items()} if c.average.startswith("we") else {}
        self.goal = dict(self.anchor)  # of moving
        if c.average == "moving" and c.moving_towards == "initial":
            self.goal = {name: self.clip.pretrained[name] for name in learns}
        steps, self.joined = self.schedule(task).steps, 0
        self.every = c.average_every or max(1, (steps - 1) // 10)
        if c.distils:
            pixels = self.references.pixels(task)
            order = torch.Generator().manual_seed(derive(self.context.seed, task.name, "order of the references"))
            plan = islice(batches(len(pixels), c.reference_batch, order), steps)
            self.distiller.begin(pixels, self.references.texts(task), list(plan))

    @property
    def anchors(self) -> bool:
        """Whether the weights that a task begins with are needed while it is learned."""
        return self.config.lam > 0 or self.config.average in ("we_wise", "moving")

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch of the task and one of the references, through the image tower together."""
        images, losses = self.distiller.forward(batch.images)
        backward(
            task=self.classify(images, batch.labels, batch.get("captions")), **losses, **self.consolidate(backward)
        )

    def consolidate(self, backward: Backward) -> dict[str, Tensor]:
        """λ·Σ ‖θ - θᵗ⁻¹‖², whose gradient is added in closed form."""
        lam, penalty = self.config.lam, torch.zeros((), device=self.clip.device)
        if not lam:
            return {}
        for name, parameter in self.parameters().items():
            moved = parameter.detach() - self.anchor[name]
            penalty += moved.square().sum()
            backward.add(name, moved.mul_(2 * lam))
        return {"consolidation": lam * penalty}

    # ---- averaging

    @torch.no_grad()
    def stepped(self, step: int) -> None:
        c = self.config
        if c.average == "none" or (step - 1) % self.every:
            return
        self.joined += 1
        for name, parameter in self.parameters().items():
            if c.average == "moving":
                now = parameter.clone()
                parameter.lerp_(self.goal[name], 1 - c.moving_decay)
                if c.moving_towards == "last":
                    self.goal[name] = now
                continue
            self.mean[name].lerp_(parameter, 1 / (self.joined + 1))
            if c.average == "we_wise":
                self.mean[name].lerp_(self.anchor[name], 1 - c.wise_alpha)

    def pack_progress(self) -> Packed:
        files, values = super().pack_progress()
        moving = {"goal": self.goal} if self.config.moving_towards == "last" else {}
        return {**files, "mean": self.mean, **moving}, {**values, "joined": self.joined, "shown": self.distiller.shown}

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_progress(files, values)
        here = self.clip.device
        self.mean = {name: mean.to(here) for name, mean in files.get("mean", {}).items()}
        self.goal = {**self.goal, **{name: goal.to(here) for name, goal in files.get("goal", {}).items()}}
        self.joined = values["joined"]
        self.distiller.skip(values["shown"])

    @torch.no_grad()
    def again(self, task: Task) -> bool:
        """After the last step: the mean takes the place of the weights in training, whatever they are fused with next."""
        for name, mean in self.mean.items():
            self.parameters()[name].copy_(mean)
        self.anchor, self.mean, self.goal = {}, {}, {}
        return False

    def remarks(self) -> dict[str, float]:
        """What it was distilled on."""
        if not self.config.distils or self.distiller.taught is None or self.distiller.ids is None:
            return {}
        kind = self.config.reference if self.config.reference in ("synthetic", "drawings", "own") else "of a folder"
        images, texts = len(self.distiller.taught.pixels), len(self.distiller.ids)
        return {f"reference images, {kind}": float(images), f"reference texts, {self.config.texts}": float(texts)}


LWF: dict[str, Any] = {"reference": "own", "texts": "own", "teacher": "previous", "lam": 0.0, "average": "none"}
LWF_VR = {**LWF, "texts": "random"}
NOTHING_DISTILLED = {"sides": "none"}

for name, values, summary, paper in (
    ("lwf", LWF, "Distil the model before the task on the task's own images and classes.", "1606.09282"),
    ("lwf_vr", LWF_VR, "LwF, with random sentences in the place of the classes.", "2207.09248"),
    ("wc", {**NOTHING_DISTILLED, "average": "none"}, "Fine-tuning, held near the weights it began with.", "2303.06628"),
    ("we", {**NOTHING_DISTILLED, "lam": 0.0}, "Fine-tuning that leaves the mean of its weights.", "2303.06628"),
):
    METHODS.add(name, Row(learn=("zscl", values)), summary, paper=f"arXiv:{paper}")
for name, values, who in (("zscl+condu", {}, "ZSCL"), ("lwf+condu", LWF, "LwF")):
    row = Row(learn=("zscl", values), fuse=("condu", {}))
    METHODS.add(name, row, f"{who} teaches experts, ConDU unifies them.", paper="arXiv:2503.10705")
