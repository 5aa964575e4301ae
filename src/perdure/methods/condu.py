"""ConDU (Gao et al., "Enhanced Continual Learning of Vision-Language Models with Model Fusion", ICLR 2026, arXiv:2503.10705).

    δ̃ⁱ = λⁱ·Mⁱ⊙δ    decouple: the deltas of the tasks before, from the unified delta and their triggers
    δ, (Mⁱ, λⁱ) = unify(δ̃¹ … δ̃ᵗ⁻¹, θᵗ - θ⁰)    elected sign, largest agreeing magnitude; all triggers anew

Each task tunes an expert from θ⁰. One delta is kept, and a trigger a task: one bit a parameter and a scalar. A known task is
answered by its expert θ⁰ + λⁱ·Mⁱ⊙δ; where it is hidden or was never learned, prototypes in θ⁰'s feature space pick the
K nearest experts, and they answer together with θ⁰ itself.

As in the release: λ is made of means a tensor, over the original CLIP's tensors (q, k and v are one), and an old delta is
rounded as weights are. Otherwise than in the release:
- A task that changed nothing, or was outvoted everywhere, answers as θ⁰ and is named in a warning (the release: NaN).
- A task that was learned is answered by its expert, the first one too (the release: by θ⁰, in its first session).
- Tasks are in the order in which they were learned (the release: as a folder listing has them).
- Prototypes are made of the training images without augmentation, and few-shot ones of the few images alone; the release
  augments (``prototype_images=augmented``) and takes the whole training set.
- The logits' factor is the model's own (the release: 100). Training does without the release's last step, at rate 0.
- LoRA: the products s·B·A are unified by default. Factors are not unique ((-B)(-A) is the same expert), so a vote on their
  signs says nothing of the weights; the release's way is ``lora_unify=factors lora_init=random``.
- The experts answer with equal weights (``weighting=mean``, as in the release); the paper's are the similarities.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.packing import Packed
from perdure.core.seeding import derive
from perdure.core.weights import Lazy, Weights, check_alike
from perdure.data.files import Pixels, all_cropped
from perdure.data.task import Context, Query, Task
from perdure.methods.base import METHODS, Expert, Method, Recipe, Row, State, register
from perdure.models import lora
from perdure.models.clip import CLIP
from perdure.ops import fusion
from perdure.ops.prototypes import best_similarity, blend, class_means


@dataclass(frozen=True)
class Fusion:
    experts: Annotated[int, Field(ge=0, description="K: experts that answer beside the pre-trained model")] = 4
    weighting: Annotated[
        Literal["mean", "similarity"], Field(description="of the experts where the task is hidden or was not learned")
    ] = "mean"
    prototype_images: Annotated[
        Literal["plain", "augmented"], Field(description="training images that prototypes are made of")
    ] = "plain"
    lora_unify: Annotated[
        Literal["products", "factors"], Field(description="what is unified where adapters are trained")
    ] = "products"


@dataclass(frozen=True)
class Config(Fusion, Recipe):
    """How experts are taught, and unified."""


@dataclass
class Unified(State):
    """One delta for all tasks; a trigger and the prototypes of each, by name, in the order learned."""

    order: list[str] = field(default_factory=list)
    unified: dict[str, Tensor] = field(default_factory=dict)
    rescaler: list[float] = field(default_factory=list)
    trigger: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # task → packed masks by tensor
    prototypes: dict[str, Tensor] = field(default_factory=dict)  # task → (C, D), unit


@register("condu", paper="arXiv:2503.10705")
class ConDU(Method):
    """Unify the experts of all tasks into one delta; decouple any of them again with its trigger."""

    Config = Config
    State = Unified
    role_options = {"fuse": Fusion}
    carries_weights = False
    state: Unified

    def join(self, clip: CLIP, context: Context) -> None:
        super().join(clip, context)
        self.factors = lora.factors(clip.backbone)  # that every task starts from
        if self.config.lora_unify == "factors" and not any(lora.adapters(clip.backbone)):
            raise PerdureError(
                "lora_unify=factors: no low-rank adapters are trained here. Set adapt=lora, or lora_unify=products."
            )

    @property
    def unifies_factors(self) -> bool:
        return self.config.lora_unify == "factors"

    @property
    def origin(self) -> Weights:
        """θ⁰: what deltas are taken from."""
        return self.factors if self.unifies_factors else self.clip.pretrained

    def start(self, task: Task) -> None:
        self.clip.restart()
        if self.unifies_factors:
            self.clip.backbone.load_state_dict(self.factors, strict=False)

    # ---- unifying

    def fuse(self, task: Task) -> None:
        state, tuned = self.state, self.tuned()
        if task.name in state.order:
            raise PerdureError(f"The task '{task.name}' is unified already: give each task a name of its own.")
        check_alike(self.origin, tuned)
        self.unify([*state.order, task.name], tuned, self.known(state.order))
        for name, trigger in state.trigger.items():
            if not left(trigger):
                self.context.warn(
                    f"Nothing is left of task {name}: it changed no weight, or the other tasks outvoted it everywhere. "
                    "The pre-trained model answers for it."
                )
        state.prototypes[task.name] = self.prototypes(task)

    def unify(self, names: Sequence[str], tuned: Weights, known: Sequence[tuple[Weights, float]]) -> None:
        """Unify the expert ``tuned``, the last of ``names``, with those ``known`` by their triggers and rescalers."""
        unified: dict[str, Tensor] = {}
        triggers: dict[str, dict[str, Tensor]] = {name: {} for name in names}

        def keep(name: str, delta: Tensor, masks: Tensor) -> None:
            unified[name] = delta.to(self.clip.device)
            for trigger, bits in zip(triggers.values(), masks, strict=True):
                trigger[name] = bits.clone()

        state = self.state
        state.rescaler = fusion.unify(self.origin, tuned, state.unified, known, keep)
        state.order, state.unified, state.trigger = list(triggers), unified, triggers

    def known(self, names: Sequence[str]) -> list[tuple[Weights, float]]:
        """What tasks are decoupled by."""
        s = self.state
        return [(s.trigger[name], s.rescaler[s.order.index(name)]) for name in names]

    def forget(self, task: str, before: Packed, after: Packed) -> None:
        """Unify the experts that are left, as they are decoupled now, without the task's."""
        s = self.state
        names = [name for name in s.order if name != task]
        prototypes = {name: s.prototypes[name] for name in names}
        if names:
            self.unify(names, self.expert(s.order.index(names[-1])), self.known(names[:-1]))
        else:
            self.state = Unified()
        self.state.prototypes = prototypes

    def tuned(self) -> Weights:
        """θᵗ: the weights as training left them."""
        if self.unifies_factors:
            return lora.factors(self.clip.backbone)
        return self.clip.weights() if self.factors else self.clip.plain()  # a copy only where it must be

    def decoupled(self, number: int) -> Weights:
        """The expert of the task learned as number 0, 1, …: plain weights, made tensor by tensor as they are asked for."""
        pretrained = self.clip.pretrained
        if not left(self.state.trigger[self.state.order[number]]):
            return pretrained
        weights = self.expert(number)
        return lora.multiplied(self.clip.backbone, pretrained, weights) if self.unifies_factors else weights

    def expert(self, number: int) -> Weights:
        """What was unified, decoupled: weights, or factors."""
        s = self.state
        bits, rescaler = s.trigger[s.order[number]], s.rescaler[number]
        return Lazy(self.origin, partial(fusion.expert, self.origin, unified=s.unified, bits=bits, rescaler=rescaler))

    # ---- prototypes

    @torch.no_grad()
    def prototypes(self, task: Task) -> Tensor:
        """(C, D): each class's place between its training images and its prompts, in θ⁰'s feature space."""
        clip = self.clip
        clip.load_weights("pretrained", clip.pretrained)
        parts: Iterable[Pixels] = [task.train.pixels]
        if self.config.prototype_images == "augmented":
            draw = torch.Generator().manual_seed(derive(self.context.seed, task.name, "crops of the prototypes"))
            parts = all_cropped(task.train.pixels, clip.size, draw)
        features = torch.cat([clip.embeddings(x) for x in parts])
        means, sizes = class_means(features, task.train.labels.to(clip.device), len(task.classes))
        if empty := [c.name for c, size in zip(task.classes, sizes.tolist(), strict=True) if not size]:
            self.context.warn(f"{task.name}: no training image of {', '.join(empty)}; the prototype is its text alone.")
        texts = torch.stack([clip.encode_text(c.prompts()).mean(0) for c in task.classes])
        return blend(means, texts)

    # ---- answering

    def base_expert(self) -> Expert:
        return Expert("pretrained", self.clip.pretrained)

    def experts(self, query: Query) -> Sequence[Expert]:
        s, clip, pretrained = self.state, self.clip, self.clip.pretrained
        names = [f"{name}, decoupled from {len(s.order)}" for name in s.order]
        if query.task is not None and query.task < len(s.order):
            return (Expert(names[query.task], self.decoupled(query.task)),)
        if not s.order or not self.config.experts:
            return (Expert("pretrained", pretrained),)
        clip.load_weights("pretrained", pretrained)
        features = clip.features(query.images) if query.features is None else query.features
        nearness = torch.stack([best_similarity(features.embedded, s.prototypes[name]) for name in s.order], dim=1)
        gates = fusion.shares(nearness, self.config.experts, self.config.weighting)
        return (
            Expert("pretrained", pretrained, gates[:, 0], features),
            *(Expert(name, self.decoupled(k), gates[:, k + 1]) for k, name in enumerate(names)),
        )


def left(trigger: Weights) -> bool:
    """Whether a task keeps anything of the unified delta."""
    return any(bool(bits.any()) for bits in trigger.values())


METHODS.add(
    "condu_lora", Row(learn=("condu", {"adapt": "lora"})), "ConDU with experts that are low-rank adapters.",
    paper="arXiv:2503.10705",
)  # fmt: skip
