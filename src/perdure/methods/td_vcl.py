"""TD-VCL (Melo et al., "Temporal-Difference Variational Continual Learning", NeurIPS 2025, arXiv:2410.07812): near several past
posteriors at once.

    q(θ) = Π N(μ, σ²);   θ = μ + σ·ε is drawn once a step, the answer is by μ
    L = mean over the batch of v_age·CE + β/B·Σᵢ wᵢ·KL(q ‖ q₋ᵢ),   i = 0 … m - 1, the newest posterior first
    wᵢ = λⁱ(1 - λ)/(1 - λᵐ)        v_a = Σ_{i ≥ a} wᵢ = λᵃ(1 - λᵐ⁻ᵃ)/(1 - λᵐ), of a sample that is a tasks old

λ = 0, or n = 1, is VCL (Nguyen et al., ICLR 2018, arXiv:1710.10628); λ = 1 is n-step, all posteriors alike. The paper learns
small networks and says nothing of CLIP. Here θ are the factors of low-rank adapters, μ what peft trains, one log σ² beside each
entry; all else is frozen. A KL over factors is no KL over their product, and the same product has many factors.

m counts the posteriors there are: the last n, the one before the first task (its prior) among them. Old likelihoods need
images: ``buffer`` of each task, whose numbers are kept, or synthetic ones as GIFT draws them (``buffer_of=synthetic``); with
none, the default, those terms are dropped, the KL is left.

As in the release: KL/B, whatever the number of images; a log σ² that learns at the means' rate. Otherwise, unless asked for:
- ``memory=release``: shifting its n slots it forgets to move the newest, so the second newest keeps the random values that it
  was born with (μ normal, deviation 0.1) and is trained, being in the optimiser; older ones become copies of it.
- ``weights=release``: its v has the shape (B, 1) where losses are (B,), so the mean is that of v times that of the losses.
- ``reach=release``: n - 1 posteriors at most, and the one before the first task only while that is learned; v with m = n.
- log σ² begins at -10, not at its networks' -5, at which draws alone spoil the model; λ = 1 is the limit (there: 0/0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.packing import Frozen
from perdure.core.seeding import derive
from perdure.data.rehearsed import earlier, recalled, rehearsed
from perdure.data.task import Batch, Context, Images, Task
from perdure.methods.base import Recipe, State, register
from perdure.methods.base_drawn import DrawnAnswers
from perdure.models.clip import CLIP
from perdure.models.drawn import Drawn, factors
from perdure.ops import variational
from perdure.synthesis.replay import Drawing, Replay, check_generator
from perdure.training.fit import Backward


@dataclass(frozen=True)
class Config(Drawing, Recipe):
    adapt: Annotated[Literal["lora"], Field(description="low-rank adapters alone are variational")] = "lora"
    lr: Annotated[float, Field(ge=0, description="peak learning rate, of μ and log σ²")] = 1e-3
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="of the likelihood")] = 0.0
    n: Annotated[int, Field(ge=1, le=1000, description="past posteriors that are kept near; 1: VCL")] = 8
    lam: Annotated[float, Field(ge=0, le=1, description="λ: 0 is VCL, 1 n-step, all posteriors alike")] = 0.5
    beta: Annotated[float, Field(ge=0, description="β, weight of the divergences, over the batch's size")] = 1e-3
    initial_logvar: Annotated[float, Field(ge=-40, le=10, description="log σ² before the first task")] = -10.0
    buffer: Annotated[
        int, Field(ge=0, le=10**7, description="images kept of each of the last n - 1 tasks; 0: no old likelihoods")
    ] = 0
    buffer_of: Annotated[
        Literal["images", "synthetic"], Field(description="the buffer: kept images, or as many drawn of those classes")
    ] = "images"
    samples: Annotated[
        int, Field(ge=0, le=10**4, description="draws whose mean probabilities answer; 0: the means answer")
    ] = 0
    memory: Annotated[
        Literal["queue", "release"], Field(description="past posteriors, or the release's slots, of which one is right")
    ] = "queue"
    reach: Annotated[
        Literal["all", "release"], Field(description="the last n posteriors, or, as released, n - 1 of tasks learned")
    ] = "all"
    weights: Annotated[
        Literal["sample", "release"], Field(description="a sample's weight on its own loss, or the mean weight on all")
    ] = "sample"


@dataclass
class Posteriors(State):
    """Past posteriors (mean and logvar, (P,) each), the oldest first; the shapes that P is of; tasks learned; images kept."""

    past: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    learned: int = 0
    buffer: dict[str, list[int]] = field(default_factory=dict)


@register("td_vcl", paper="arXiv:2410.07812")
class TDVCL(DrawnAnswers):
    """Adapters with a Gaussian posterior, kept near several past ones, weighted as the returns of TD(λ)."""

    Config = Config
    plays = ("learn",)
    State = Posteriors
    state: Posteriors

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        c = self.config
        if c.n < 2 and "release" in (c.memory, c.reach):
            raise PerdureError(
                "n=1: memory=release and reach=release keep near n - 1 posteriors, here none. Set n=2 or more, or neither."
            )
        super().bind(clip, context)
        self.drawn = Drawn(factors(clip.backbone))
        self.logvar = nn.Parameter(torch.full_like(self.drawn.means().detach(), c.initial_logvar))
        self.slot: dict[str, nn.Parameter] = {}  # of the release's memory: what is trained of it
        self.mixed: tuple[Task | None, Tensor, list[int]] = (None, self.drawn.means().new_zeros(0).long(), [])
        if c.buffer_of == "synthetic":
            if not c.buffer:
                raise PerdureError(
                    "buffer_of=synthetic: buffer=0 asks for no images. Set buffer to how many of each task."
                )
            check_generator(c, self.context, "buffer_of=synthetic", "buffer_of=images")
            self.replay = Replay(c, self.context, clip.size, clip.device.type, clip.tokens, clip.fit)

    def unpack_state(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        if values.get("shapes"):
            self.drawn.check(values["shapes"])
        super().unpack_state(files, values)

    # ---- learn

    def material(self, task: Task) -> Task:
        """The task, with images of those before it: kept ones, or synthetic ones in their place."""
        names = list(self.state.buffer)[::-1][: self.config.n - 1]
        drawn = self.config.buffer_of == "synthetic"
        kept = {name: self.state.buffer[name] for name in names}
        whole, ages = rehearsed(task, self.context, self.imagined(names) if drawn else recalled(self.context, kept))
        draw = torch.Generator().manual_seed(derive(self.context.seed, task.name, "buffer of TD-VCL"))
        picks = torch.randperm(len(task.train), generator=draw)[: self.config.buffer]
        self.mixed = whole, ages.to(self.clip.device), picks.sort().values.tolist()
        return whole

    def imagined(self, names: Sequence[str]) -> dict[str, Images]:
        """``buffer`` synthetic images of each task's classes."""
        out = {}
        for name, task in earlier(self.context, names).items():
            prompts = task.prompts()
            pairs = self.replay.of(prompts, self.config.buffer, f"{name}, again")
            labels = torch.tensor([prompts.index(prompt) for prompt in pairs.prompts])
            out[name] = Images(pairs.images, labels, tuple(pairs.prompts))
        return out

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        whole, ages, self.picks = self.mixed
        self.ages = ages if task is whole else ages.new_zeros(len(task.classes))  # (C,): how old each class is
        self.recall()

    def recall(self) -> None:
        """Go on from the last posterior, near the past ones that count."""
        state, n = self.state, self.config.n
        if not state.past:
            state.shapes = self.drawn.shapes
            self.keep(self.posterior())
        past: list[Mapping[str, Tensor]] = [*reversed(state.past.values())]
        with torch.no_grad():
            self.logvar.copy_(past[0]["logvar"])
        count = min(n, state.learned + 1) if self.config.reach == "all" else max(1, min(state.learned, n - 1))
        self.anchors, self.slot = past[:count], {}
        if self.config.memory == "release" and len(self.anchors) > 1:
            self.anchors[1] = self.slot = {k: nn.Parameter(t.clone()) for k, t in self.anchors[1].items()}

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {**super().parameters(), "logvar": self.logvar, **{f"slot.{k}": p for k, p in self.slot.items()}}

    def step(self, batch: Batch, backward: Backward) -> None:
        self.drawn.deviate(variational.deviation(self.logvar))
        each = self.classify(self.clip.encode_image(batch.images), batch.labels, batch.get("captions"), "none")
        divergence = self.config.beta * self.divergence() / len(batch.labels)
        backward(task=self.likelihood(each, self.ages[batch.labels]), divergence=divergence)

    def likelihood(self, each: Tensor, ages: Tensor) -> Tensor:
        """The weighted mean of losses (B,) of samples that are ``ages`` (B,) tasks old."""
        c = self.config
        count = c.n if c.reach == "release" else max(1, len(self.anchors))
        weights = each.new_tensor(variational.returns(count, c.lam))[ages.clamp_max(count - 1)]
        return (weights * each).mean() if c.weights == "sample" else weights.mean() * each.mean()

    def divergence(self) -> Tensor:
        """Σ w·KL of the posterior in training from the past ones."""
        mean, weights = self.drawn.means(), variational.discounts(len(self.anchors), self.config.lam)
        kls = [variational.divergence(mean, self.logvar, past["mean"], past["logvar"]) for past in self.anchors]
        return sum((w * kl for w, kl in zip(weights, kls, strict=True)), mean.new_zeros(()))

    def finish(self, task: Task) -> None:
        self.drawn.deviate(None)
        self.remember()
        if self.picks:
            self.state.buffer[task.name] = self.picks

    # ---- posteriors

    def remember(self) -> None:
        """Put the posterior in training behind the past ones."""
        if self.slot:
            self.state.past[f"slot {self.config.n - 2}"] = {k: p.detach() for k, p in self.slot.items()}
        self.state.learned += 1
        self.keep(self.posterior())

    def posterior(self) -> dict[str, Tensor]:
        """The one in training."""
        return {"mean": self.drawn.means().detach().clone(), "logvar": self.logvar.detach().clone()}

    def random_slots(self) -> list[dict[str, Tensor]]:
        """What the release's memory is born with."""
        draw = torch.Generator().manual_seed(derive(self.context.seed, "slots of TD-VCL"))
        means = [0.1 * torch.randn(len(self.logvar), generator=draw) for _ in range(self.config.n)]
        return [{"mean": mean.to(self.logvar.device), "logvar": self.logvar.detach().clone()} for mean in means]

    def keep(self, posterior: dict[str, Tensor]) -> None:
        """Put a posterior behind the past ones."""
        past, n = self.state.past, self.config.n
        if self.config.memory == "queue":
            names = variational.shifted(list(past), f"after {self.state.learned}", n)
            self.state.past = {name: past.get(name) or Frozen(posterior) for name in names}
        else:
            slots = variational.shifted(list(past.values()) or self.random_slots(), posterior, n, release=True)
            self.state.past = {f"slot {k}": slot for k, slot in enumerate(slots)}
