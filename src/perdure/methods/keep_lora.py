"""KeepLoRA (Luo et al., "KeepLoRA: Continual Learning with Residual Gradient Adaptation", ICLR 2026, arXiv:2601.19659).

    U          a layer's protected directions: the leading ones of its pre-trained weight (energy ε_w), then of features
    Ĝ = G - UUᵀG = PΣQᵀ     G (in, out): the mean gradient of the task's cross entropy, over one pass
    A = P[:, :r], B₀ = Σ_r Q_rᵀ;  W + s·A(B - B₀), s = 1/r: B alone is trained, from B₀
    X̂ = X - UUᵀX            features of the merged model; U grows by their leading directions, up to the energy ε_f

So the change of a weight lies in the span of A, orthogonal to U; weight decay acts on B, and so pulls at AB₀ too, inside it.
Adapted are the projections of every attention in both towers; nothing else moves. KeepLoRA+ (``head=true``) adds
scale·cos(I, rows) to the logits where exactly one task's classes are asked for, rows trained with B from the unit class means.

The release takes AB₀ off the weight while it trains; here B₀ is taken off B: the same function, bit for bit at the start.
Exact shortcuts: U enters as U(UᵀG); features are summed up as Gram matrices in fp64, one for q, k and v, no token kept. A and
B₀ come from a full SVD (there a random one). Otherwise than in the release (its way: the option in brackets):
- The weights' directions are those of the input side, as the paper means and its LLaVA code has it (``side=release``: of the
  output side, which square layers hide, so that other directions are protected than the gradient is freed of).
- Directions of Ĝ below 1e-4·σ₁ are rounding and lie partly in U: they are left out (``rank_floor=0``). The last text layer,
  read at the end token alone, has no more directions than the task has classes.
- Bases of weights stop at the threshold, as those of features do (``weight_stop=before``: one direction before it).
- Features are a sum over all images, and of texts the tokens up to each end (``features=release``: token matrices averaged
  over full batches at equal place, so that U depends on the order; texts with all their padding).
- A class without an image in a full batch begins its row at its text. A gradient that is not finite is an error (there it is
  skipped).
As there: gradient and class means over full batches, not augmented; one cycle of rate and β₁.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.packing import pack
from perdure.core.pixels import as_floats
from perdure.core.seeding import derive
from perdure.core.weights import original
from perdure.data.task import Batch, Context, Query, Task
from perdure.methods.base import Method, State, Training, register
from perdure.models.beside import LowRank, linears
from perdure.models.clip import CLIP
from perdure.models.grams import grams
from perdure.models.heads import CosineHead
from perdure.ops import subspace
from perdure.ops.losses import classification, positive_pull
from perdure.ops.prototypes import class_means
from perdure.training.fit import Backward, batches, mean_gradient
from perdure.training.recipe import TaskName
from perdure.training.schedule import Schedule


@dataclass(frozen=True)
class Config(Training):
    lr: Annotated[float, Field(ge=0, description="peak learning rate, of B")] = 1e-3
    epochs: Annotated[
        int, Field(ge=0, le=10**6, description="passes over a task's images, in place of iterations; 0: iterations")
    ] = 10
    epochs_by_task: Annotated[
        dict[TaskName, Annotated[int, Field(ge=0)]], Field(description="epochs of single tasks, by task name")
    ] = field(default_factory=dict)
    one_cycle: Annotated[
        bool, Field(description="rate and β₁ go through one cycle; no: warm-up and cosine, or milestones")
    ] = True
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="of the classification loss")] = 0.0
    weight_decay: Annotated[float, Field(ge=0, description="of the optimiser, on B")] = 0.01
    augment: Annotated[bool, Field(description="crop training images at random")] = True
    rank: Annotated[int, Field(ge=1, le=1024, description="r, of each update")] = 16
    alpha: Annotated[float, Field(gt=0, description="updates are scaled by alpha / rank")] = 1.0
    layers: Annotated[tuple[str, ...], Field(description="linear layers that learn")] = (
        "q_proj", "k_proj", "v_proj", "out_proj",
    )  # fmt: skip
    weight_energy_image: Annotated[float, Field(ge=0, le=1, description="ε_w: of weights, image tower")] = 0.85
    weight_energy_text: Annotated[float, Field(ge=0, le=1, description="ε_w: of weights, text tower")] = 0.2
    feature_energy: Annotated[float, Field(ge=0, le=1, description="ε_f: of the features of learned tasks")] = 0.99
    side: Annotated[
        Literal["input", "release"],
        Field(description="of a weight, the directions of its input, or (release) its output"),
    ] = "input"
    weight_stop: Annotated[
        Literal["at", "before"], Field(description="bases of weights end at ε_w, or one direction before it")
    ] = "at"
    features: Annotated[
        Literal["gram", "release"], Field(description="all tokens, or (release) batches averaged at equal place")
    ] = "gram"
    rank_floor: Annotated[
        float, Field(ge=0, lt=1, description="a direction with less of the strongest one's σ is rounding, and left out")
    ] = 1e-4
    head: Annotated[bool, Field(description="KeepLoRA+: a cosine classifier a task")] = False
    head_scale: Annotated[float, Field(gt=0, description="of the classifier's cosines")] = 30.0


@dataclass
class Learned(State):
    """Each layer's U (in, k), and by task the classes and rows of its classifier."""

    basis: dict[str, Tensor] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


@register("keep_lora", paper="arXiv:2601.19659")
class KeepLoRA(Method):
    """Updates along what the task's gradient has outside the directions that old abilities stand on."""

    Config = Config
    plays = ("learn",)
    goes_on = True
    State = Learned
    state: Learned

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        c = self.config
        clip.backbone.requires_grad_(False)
        self.join(clip, context or Context())
        self.places = linears(clip.backbone, c.layers, c.towers)
        if c.side == "release" and (odd := [n for n, m in self.places.items() if m.in_features != m.out_features]):
            raise PerdureError(
                f"side=release takes the output's directions for the input's, which only square layers hide; {odd[0]} is "
                "none. Set side=input, or leave it out of layers."
            )
        self.updates = {name: LowRank(layer, c.rank) for name, layer in self.places.items()}
        for update in self.updates.values():
            update.A.requires_grad_(False)
            update.w.requires_grad_(False).fill_(c.alpha / c.rank)
        self.classifier: CosineHead | None = None
        self.said: dict[str, float] = {}

    # ---- learn

    def trains_on(self, task: Task) -> bool:
        self.said = {}  # of the task before
        return super().trains_on(task)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        c, state = self.config, self.state
        if not state.basis:
            for name, layer in self.places.items():
                share = c.weight_energy_image if self.clip.part_of(name) == "image" else c.weight_energy_text
                state.basis[name] = subspace.of_weight(layer.weight, share, c.side, c.weight_stop)
        self.classifier = None  # the gradient is that of the towers' own logits
        weights = {name: layer.weight for name, layer in self.places.items()}
        gradients = mean_gradient(self, weights, self.full_batches(task, "gradient"), self.clip.device, task.name)
        for name, update in self.updates.items():
            a, b0 = subspace.strongest(gradients[name].T, state.basis[name], c.rank, c.rank_floor)
            update.set(a.T, b0.T)
        if c.head:
            self.classifier = CosineHead(self.class_rows(task))

    def full_batches(self, task: Task, what: str) -> Iterator[Batch]:
        """One pass over the task's images, not augmented, without a last short batch (unless it is the only one)."""
        size, count = self.config.batch_size, len(task.train)
        draw = torch.Generator().manual_seed(derive(self.context.seed, task.name, f"order of the {what} of KeepLoRA"))
        order = batches(count, size, draw)
        for index, _ in zip(order, range(max(1, count // size)), strict=False):
            yield Batch(as_floats(task.train.pixels[index]), task.train.labels[index]).to(self.clip.device)

    @torch.no_grad()
    def class_rows(self, task: Task) -> Tensor:
        """Unit class means (C, D) of the features that the model has of the task before it learns it."""
        seen = [(self.clip.encode_image(b.images), b.labels) for b in self.full_batches(task, "class means")]
        features, labels = (torch.cat(part) for part in zip(*seen, strict=True))
        means, sizes = class_means(features, labels, len(task.classes))
        texts = self.clip.encode_tokens(self.tokens)
        return F.normalize(torch.where((sizes > 0).unsqueeze(1), means, texts), dim=1)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        rows = {} if self.classifier is None else {"rows": self.classifier.rows}
        return {**{f"{name}.B": update.B for name, update in self.updates.items()}, **rows}

    def schedule(self, task: Task) -> Schedule:
        c = self.config
        plan = replace(super().schedule(task), augment=c.augment, one_cycle=c.one_cycle)
        epochs = c.epochs_by_task.get(task.name, c.epochs)
        return replace(plan, epochs=epochs, milestones=c.milestones or None).over(len(task.train)) if epochs else plan

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch: cross entropy of s·I·Tᵀ, with the classifier's logits where there is one."""
        texts = self.frozen_texts if self.frozen_texts is not None else self.clip.encode_tokens(self.tokens)
        images = self.clip.encode_image(batch.images)
        logits = self.clip.similarity(images, texts)
        if self.classifier is not None:
            logits = logits + self.config.head_scale * self.classifier(images)
        losses = {"task": classification(logits, batch.labels, self.config.label_smoothing, self.group)}
        if self.config.positive_pull:
            losses["pull"] = self.config.positive_pull * positive_pull(images, texts[batch.labels])
        backward(**losses)

    # ---- merge, and protect

    @torch.no_grad()
    def finish(self, task: Task) -> None:
        own, state = self.clip.plain(), self.state
        deltas = {f"{name}.weight": update.product() for name, update in self.updates.items()}
        for update in self.updates.values():
            update.on = False
        self.clip.load_weights(f"merged {task.name}", {name: own[name] + delta for name, delta in deltas.items()})
        grams = self.grams(task)
        for name, basis in state.basis.items():
            state.basis[name] = subspace.grown(basis, grams[original(f"{name}.weight")], self.config.feature_energy)
        if self.classifier is not None:
            state.classes[task.name] = [c.name for c in task.classes]
            state.rows[task.name] = self.classifier.rows.detach().clone()
        for tower in ("image", "text"):
            shares = [u.shape[1] / u.shape[0] for name, u in state.basis.items() if self.clip.part_of(name) == tower]
            if shares:
                self.said[f"protected, {tower}"] = sum(shares) / len(shares)
        self.said["norm of the update"] = sum(d.double().square().sum().item() for d in deltas.values()) ** 0.5

    def grams(self, task: Task) -> dict[str, Tensor]:
        """XXᵀ of what the layers are given of the task's images and texts."""
        released = self.config.features == "release"
        every = self.full_batches(task, "features") if released else self.all_batches(task)
        return grams(self.clip, self.places, (batch.images for batch in every), self.tokens, released)

    def all_batches(self, task: Task) -> Iterator[Batch]:
        """All images in the order in which they lie."""
        for index in torch.arange(len(task.train)).split(256):
            yield Batch(as_floats(task.train.pixels[index]), task.train.labels[index]).to(self.clip.device)

    # ---- answer

    def finalizes(self) -> bool:
        return self.config.head

    def finalize(self, query: Query, logits: Tensor) -> Tensor:
        asked = [c.name for c in query.classes]
        task = next((name for name, names in self.state.classes.items() if names == asked), None)
        if not self.config.head or task is None or query.features is None:
            return logits
        return logits + self.config.head_scale * CosineHead(self.state.rows[task])(query.features.embedded)

    def answer_state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        return pack(replace(self.state, basis={})) if self.config.head else ({}, {})

    def remarks(self) -> dict[str, float]:
        return self.said
