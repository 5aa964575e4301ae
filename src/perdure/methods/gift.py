"""GIFT: synthetic replay (Wu et al., "Synthetic Data is an Elegant GIFT for Continual Vision-Language Models", CVPR 2025,
arXiv:2503.04229).

    L = L_CE + α·L_CD + β·L_ITA + λ·Σ F·(θ - θᵗ⁻¹)²,    F = g²/mean(g²) a tensor,  g = ∇(α·L_CD + β·L_ITA)

While a task is learned, the model before it (the teacher) is distilled on image-text pairs from a text-to-image model: the
student keeps the teacher's similarities between them (L_CD) and keeps matching pairs together (L_ITA). F, made anew at every
step, holds back the weights that those pairs rely on.

Exact shortcuts: the teacher sees the fixed pairs once a task; a text that occurs twice in a batch is encoded once, and no
further than to its end token; the penalty's gradient, 2·λ·F·(θ - θᵗ⁻¹), is written down instead of derived.

As in the release: iterations run from 0 to N, the last at rate 0; a "tensor" is one of the original CLIP, which holds the
projections of q, k and v together; the task's label smoothing applies to L_ITA too. Where the release is odd, the paper's
reading is the default: ``kl`` is KL(teacher‖student) (the release's is ``reverse_kl``); ``static`` goes on distilling
once F is fixed (in the release, ``static_release``, no gradient of L_CD and L_ITA flows from then on and those of every
later step pile up); and ``feature_mse`` minds ``sides`` (in the release, ``feature_mse_release``, the features of both
sides are distilled whatever ``sides`` says, which L_ITA alone still minds).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.packing import Packed
from perdure.core.seeding import derive
from perdure.core.weights import interpolate, original
from perdure.data.task import Batch, Context, Task
from perdure.methods.base import Method, Recipe, State, register
from perdure.models.clip import CLIP
from perdure.ops.losses import alignment, alignment_targets, distillation, positive_pull
from perdure.synthesis.replay import Replay, Synthesis
from perdure.training.fit import Backward, Gradients, batches
from perdure.training.schedule import Schedule

NO_GRADIENT = 1e-6  # F of a tensor that the pairs do not reach


@dataclass(frozen=True)
class Config(Synthesis, Recipe):
    distillation: Annotated[
        Literal["contrastive", "kl", "reverse_kl", "feature_mse", "feature_mse_release", "none"],
        Field(description="form of L_CD; feature_mse_release: of both sides, whatever sides says"),
    ] = "contrastive"
    alpha: Annotated[float, Field(ge=0, description="weight of distillation, L_CD")] = 1.0
    temperature: Annotated[float, Field(gt=0, description="of distillation")] = 2.0
    sides: Annotated[
        Literal["both", "image", "text"],
        Field(description="whose embeddings the student replays; the rest: the teacher's"),
    ] = "both"
    beta: Annotated[float, Field(ge=0, description="weight of image-text alignment, L_ITA")] = 0.25
    consolidation: Annotated[
        Literal["adaptive", "static", "static_release", "l2", "none"], Field(description="what weighs the penalty")
    ] = "adaptive"
    lam: Annotated[float, Field(ge=0, description="weight of consolidation, λ")] = 1.0
    static_steps: Annotated[int, Field(ge=1, description="static: F is the mean over so many first steps")] = 10
    teacher: Annotated[Literal["previous", "initial", "mix"], Field(description="which model is distilled")] = (
        "previous"
    )
    teacher_mix: Annotated[float, Field(ge=0, le=1, description="mix: share of the previous model's weights")] = 0.5
    synthetic_batch: Annotated[int, Field(ge=1, le=10**6, description="synthetic pairs a step")] = 64


@dataclass
class Learned(State):
    """The prompts of the classes of the tasks learned, in order."""

    prompts: list[str] = field(default_factory=list)


@register("gift", paper="arXiv:2503.04229")
class GIFT(Method):
    """Distil on synthetic image-text pairs; hold back the weights that those pairs rely on."""

    Config = Config
    State = Learned
    state: Learned

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        super().bind(clip, context)
        c = self.config
        if not self.replays and c.consolidation not in ("l2", "none"):
            raise PerdureError(
                f"consolidation={c.consolidation} weighs by the gradient of distillation and alignment, and both are off. "
                "Set consolidation=l2 or none, or turn one of them on."
            )
        if self.replays:
            self.replay = Replay(c, self.context, clip.size, clip.device.type, clip.tokens, clip.fit)

    @property
    def replays(self) -> bool:
        """Whether any loss is taken on the pairs."""
        return self.distils or self.config.beta > 0

    @property
    def distils(self) -> bool:
        return self.config.distillation != "none" and self.config.alpha > 0

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.anchor = {name: p.detach().clone() for name, p in self.parameters().items()}
        self.step_number = 0
        self.fisher: dict[str, Tensor | float] = {}
        self.pile: dict[str, Tensor] = {}
        if self.replays:
            self.pairs = self.replay.pairs(task.name, self.state.prompts)
            order = torch.Generator().manual_seed(derive(self.context.seed, task.name, "order of the pairs"))
            self.order = batches(len(self.pairs), self.config.synthetic_batch, order)
            self.prompts = list(dict.fromkeys(self.pairs.prompts))
            number = {prompt: k for k, prompt in enumerate(self.prompts)}
            self.prompt_of = torch.tensor([number[prompt] for prompt in self.pairs.prompts])
            self.teach()
        self.state.prompts += task.prompts()

    @torch.no_grad()
    def teach(self) -> None:
        """Embed the pairs with the teacher, once: it is frozen, and they are fixed."""
        teacher = self.clip
        if self.config.teacher != "previous":
            share = self.config.teacher_mix if self.config.teacher == "mix" else 0.0
            teacher = copy.deepcopy(self.clip)
            teacher.load_weights("teacher", interpolate(self.clip.pretrained, self.clip.weights(), share))
        size = teacher.evaluation_batch
        self.teacher_images = torch.cat([teacher.encode_image(x) for x in self.pairs.images.split(min(64, size))])
        rows = [teacher.encode_text(self.prompts[i : i + size]) for i in range(0, len(self.prompts), size)]
        self.teacher_texts = torch.cat(rows)

    def schedule(self, task: Task) -> Schedule:
        plan = super().schedule(task)
        return replace(plan, steps=plan.steps + 1, horizon=plan.steps) if plan.steps else plan

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch of the task, and one of the pairs."""
        losses = self.replay_losses(next(self.order)) if self.replays else {}
        released = self.config.consolidation == "static_release"
        if released and self.step_number >= self.config.static_steps:
            losses = {name: loss.detach() for name, loss in losses.items()}
            for name, gradient in self.pile.items():
                backward.add(name, gradient)
        penalty = self.consolidate(backward(**losses), backward)
        backward(task=self.task_loss(batch), **penalty)
        if released:
            self.pile = {name: p.grad for name, p in self.parameters().items() if p.grad is not None}
        self.step_number += 1

    def replay_losses(self, index: Tensor) -> dict[str, Tensor]:
        """α·L_CD and β·L_ITA of the pairs ``index`` (B',), each by image → text and text → image."""
        c, clip = self.config, self.clip
        which, place = self.prompt_of[index].unique(return_inverse=True)
        teacher_i, teacher_t = self.teacher_images[index], self.teacher_texts[which][place]
        student_i, student_t = teacher_i, teacher_t
        both = self.distils and c.distillation == "feature_mse_release"
        if both or c.sides != "text":
            student_i = clip.encode_image(self.pairs.images[index])
        if both or c.sides != "image":
            student_t = clip.encode_text([self.prompts[k] for k in which.tolist()])[place]
        losses = {}
        if self.distils and c.distillation.startswith("feature_mse"):
            losses["distil_image"] = c.alpha * (student_i - teacher_i).square().mean()
            losses["distil_text"] = c.alpha * (student_t - teacher_t).square().mean()
        teacher = clip.similarity(teacher_i, teacher_t)
        student = clip.similarity(
            teacher_i if c.sides == "text" else student_i, teacher_t if c.sides == "image" else student_t
        )
        if self.distils and not losses:
            losses["distil_image"] = c.alpha * distillation(student, teacher, c.temperature, c.distillation)
            losses["distil_text"] = c.alpha * distillation(student.T, teacher.T, c.temperature, c.distillation)
        if c.beta:
            targets = alignment_targets(place).to(student.device)
            losses["align_image"] = c.beta * alignment(student, targets, c.label_smoothing)
            losses["align_text"] = c.beta * alignment(student.T, targets, c.label_smoothing)
        if c.positive_pull:
            losses["pull"] = c.positive_pull * positive_pull(student_i, student_t)
        return losses

    def pack_progress(self) -> Packed:
        """The step, F where it is a mean over steps, and the pile of the release."""
        files, values = super().pack_progress()
        told = {name: f for name, f in self.fisher.items() if isinstance(f, Tensor)}
        constant = {name: f for name, f in self.fisher.items() if not isinstance(f, Tensor)}
        return {**files, "fisher": told, "pile": self.pile}, {**values, "step": self.step_number, "fisher": constant}

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_progress(files, values)
        here, self.step_number = self.clip.device, values["step"]
        self.fisher = {**values["fisher"], **{name: f.to(here) for name, f in files.get("fisher", {}).items()}}
        self.pile = {name: g.to(here) for name, g in files.get("pile", {}).items()}
        for _ in range(self.step_number if self.replays else 0):
            next(self.order)

    # ---- consolidation

    def consolidate(self, gradients: Gradients, backward: Backward) -> dict[str, Tensor]:
        """λ·Σ F·(θ - θᵗ⁻¹)², whose gradient is added in closed form; ``gradients``: g."""
        c = self.config
        if c.consolidation == "none" or not c.lam:
            return {}
        importance = self.importance(gradients)
        penalty = torch.zeros((), device=self.clip.device)
        for name, parameter in self.parameters().items():
            moved = parameter.detach() - self.anchor[name]
            pull = importance(name) * moved
            penalty += moved.mul_(pull).sum()  # in place: a step's memory is mostly new pages of tensors like these
            backward.add(name, pull.mul_(2 * c.lam))
        return {"consolidation": c.lam * penalty}

    def importance(self, gradients: Gradients) -> Callable[[str], Tensor | float]:
        """F by parameter name."""
        c = self.config
        if c.consolidation == "l2":
            return lambda name: 1.0
        if c.consolidation == "adaptive":
            means = mean_squares(gradients)
            return lambda name: fisher(gradients[name], means.get(name))
        if self.step_number < c.static_steps:
            means = mean_squares(gradients)
            share = 1 / (self.step_number + 1)
            for name, g in gradients.items():
                now = fisher(g, means.get(name))
                self.fisher[name] = now if share == 1 else (1 - share) * self.fisher[name] + share * now
        return self.fisher.__getitem__


def mean_squares(gradients: Gradients) -> dict[str, Tensor]:
    """mean(g²) of the tensor that each parameter belongs to; q, k and v are one. Parameters without gradient are left out."""
    sums: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    tensor_of = {name: original(name) for name, g in gradients.items() if g is not None}
    for name, tensor in tensor_of.items():
        g = gradients[name]
        assert g is not None
        sums[tensor] = sums.get(tensor, g.new_zeros(())) + torch.linalg.vector_norm(g).square()
        sizes[tensor] = sizes.get(tensor, 0) + g.numel()
    return {name: sums[tensor] / sizes[tensor] for name, tensor in tensor_of.items()}


def fisher(g: Tensor | None, mean_square: Tensor | None) -> Tensor | float:
    """F = g²/mean(g²); where no gradient came, a small constant."""
    if g is None or mean_square is None:
        return NO_GRADIENT
    return g.square().div_(mean_square.clamp_min(torch.finfo(g.dtype).tiny))
