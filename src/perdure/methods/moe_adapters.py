"""MoE-Adapters with DDAS (Yu et al., "Boosting Continual Learning of Vision-Language Models via Mixture-of-Experts Adapters",
CVPR 2024, arXiv:2403.11549): CLIP frozen, a pool of small experts beside every block, a router a task, a selector of routers.

    learn    router t (noisy) and the experts that are free, by cross entropy through both towers; the equations are in
             ``models/experts.py``. The experts that a block used most are then frozen; later routers may take them.
    select   A_i: an autoencoder a task on frozen features, A₀ one on a reference set; i = argmin ‖A_i(f) - f‖²
    answer   router i for images and texts; i = 0, or a loss above the threshold: CLIP without any expert, bit for bit

A known task takes its own router; one that was never learned, and a hidden one that nothing fits, is CLIP's own to answer.
Exact shortcuts: idle experts are not computed; texts are routed once; features of the selector are kept where images are not
augmented; what CLIP alone makes of an image is worked out once a run. Old tasks are not sealed: a router may take an expert
that still learns.

As in the release: a last step at rate 0 (it is counted), two experts frozen a task whatever k is, also if they are frozen
already; no balance term in the loss (there it is computed and thrown away). Otherwise than there (its way: in brackets):
- The selector decides an image (``select=batch``: 128 in the order of the file, all of one data set, by their mean loss: so the
  true task leaks into the answer). Only the tasks learned so far compete (there untrained autoencoders do too).
- Features are the first block's of the frozen image tower, standardised (``selector_features=alexnet``), and the reference set
  is drawn by the stream's generator, from its vocabulary, or a folder of pictures (there TinyImageNet).
- Thresholds are each task's 0.99 quantile of losses on training images kept from its autoencoder (``threshold=0.0655``).
- The logits' factor is the model's own (100). The list of frozen experts is the run's (there a file that only grows).
- The class-incremental variant is ``routers=one experts=2 freeze=0 test_noise=true``, see its presets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from perdure.core import processes
from perdure.core.errors import PerdureError
from perdure.core.packing import Packed
from perdure.data.files import Pixels
from perdure.data.task import Batch, Context, Query, Task
from perdure.methods.base import Expert, Method, State, Training, register
from perdure.models.clip import CLIP
from perdure.models.experts import attach
from perdure.synthesis.reference import folder, strangers
from perdure.synthesis.replay import Replay, Synthesis
from perdure.training.fit import Backward
from perdure.training.schedule import Schedule
from perdure.training.selecting import Selection, Selector


@dataclass(frozen=True)
class Config(Selection, Synthesis, Training):
    lr: Annotated[float, Field(ge=0, description="of experts and routers")] = 1e-3
    experts: Annotated[int, Field(ge=1, le=10**4, description="experts a block")] = 22
    top_k: Annotated[int, Field(ge=1, description="experts that an image or text is sent to")] = 2
    bottleneck: Annotated[int, Field(ge=1, le=10**5, description="hidden units of an expert")] = 64
    dropout: Annotated[float, Field(ge=0, lt=1, description="of an expert's hidden units, in training")] = 0.1
    freeze: Annotated[int, Field(ge=0, description="experts a block that are frozen after a task, those used most")] = 2
    routers: Annotated[
        Literal["task", "one"], Field(description="a router a task, or one for all (the class-incremental variant)")
    ] = "task"
    test_noise: Annotated[
        bool, Field(description="routing is noisy when answering too, as in that variant's release")
    ] = False
    reference: Annotated[
        str,
        AfterValidator(folder),
        Field(
            description="the selector's reference set: synthetic | drawings (real ones of the stream's world) | none | a "
            "folder; auto: synthetic where it can be drawn"
        ),
    ] = "auto"


@dataclass
class Learned(State):
    """Tasks in the order learned; frozen experts by block; autoencoders by number (0: the reference set's, i: the i-th task's)
    and their thresholds; how features are standardised; training images that are held out, by task."""

    order: list[str] = field(default_factory=list)
    frozen: dict[str, list[int]] = field(default_factory=dict)
    selector: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    thresholds: list[float] = field(default_factory=list)
    standard: dict[str, Tensor] = field(default_factory=dict)  # mean, std
    held_out: dict[str, list[int]] = field(default_factory=dict)


@register("moe_adapters", paper="arXiv:2403.11549")
class MoEAdapters(Method):
    """Experts beside frozen towers, a router a task, an autoencoder a task that says whose an image is."""

    Config = Config
    plays, must_fuse = ("learn",), True
    State = Learned
    state: Learned
    learning: int | None = None  # the router that is being learned

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        c = self.config
        if c.top_k > c.experts:
            raise PerdureError(f"top_k={c.top_k}: a block has {c.experts} experts. Set top_k={c.experts} or less.")
        if clip.kind != "clip":
            raise PerdureError(
                f"moe_adapters routes by a class token and by the first token of a text that is read forwards; the {clip.kind} "
                f"at {clip.path} has neither. Use it with a CLIP."
            )
        clip.backbone.requires_grad_(False)
        self.join(clip, context or Context())
        shape = c.towers, c.experts, c.top_k, c.bottleneck, c.dropout
        self.mixtures = attach(clip.backbone, *shape, self.route)
        for mixture in self.mixtures.values():
            mixture.noisy = c.test_noise
        self.selector = Selector(c, clip, self.state, self.context.seed, self.train)
        self.said: dict[str, float] = {}
        self.strangers = None if c.routers == "one" else strangers(c, self.context, clip)

    def modules(self) -> Mapping[str, nn.Module]:
        return self.mixtures

    def steady(self) -> bool:
        return True  # what holds the pre-trained weights' name is CLIP without any expert

    # ---- routes

    def router_name(self, number: int) -> str:
        return f"router {number} after {len(self.state.order)} tasks"

    def route(self) -> int | None:
        """The router that acts: the one being learned, or the one that the weights the model holds are called after."""
        if self.learning is not None:
            return self.learning
        count = 1 if self.config.routers == "one" else len(self.state.order)
        names = [self.router_name(number) for number in range(count)] if self.state.order else []
        return names.index(self.clip.holds) if self.clip.holds in names else None

    def base_expert(self) -> Expert:
        return Expert("pretrained", self.clip.pretrained)

    def experts(self, query: Query) -> Sequence[Expert]:
        learned = len(self.state.order)
        if not learned:
            return (self.base_expert(),)
        if self.config.routers == "one":
            return (Expert(self.router_name(0), {}),)
        if query.task is not None:
            return (Expert(self.router_name(query.task), {}) if query.task < learned else self.base_expert(),)
        self.load_expert(self.base_expert())
        chosen = self.selector.choose(query.images)
        routed = [Expert(self.router_name(k), {}, (chosen == k + 1).float()) for k in range(learned)]
        return (replace(self.base_expert(), gate=(chosen == 0).float()), *routed)

    def logits(self, query: Query) -> Tensor:
        with processes.alone(self.config.test_noise):  # all draw the same noise
            return super().logits(query)

    # ---- learn

    def trains_on(self, task: Task) -> bool:
        self.said = {}  # of the task before
        return super().trains_on(task)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.learning = 0 if self.config.routers == "one" else len(self.state.order)
        for name, mixture in self.mixtures.items():
            frozen = self.state.frozen.get(name, [])
            mixture.grow(self.learning + 1)
            mixture.begin(self.learning, [e for e in range(self.config.experts) if e not in frozen])

    def schedule(self, task: Task) -> Schedule:
        plan = replace(super().schedule(task), stride=1)
        return replace(plan, steps=plan.steps + 1, horizon=plan.steps) if plan.steps else plan

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch: cross entropy of s·I·Tᵀ. Experts are counted on the way forward: on the way back, towers that keep less
        in memory go through their blocks once more."""
        self.count(True)
        with processes.alone():  # routing is noisy, and what it takes is counted
            loss = self.task_loss(batch)
        self.count(False)
        backward(task=loss)

    def count(self, on: bool) -> None:
        """Count which experts are taken, or not."""
        for mixture in self.mixtures.values():
            mixture.counting = on

    def pack_progress(self) -> Packed:
        files, values = super().pack_progress()
        return files, {**values, "counts": {name: mixture.counts for name, mixture in self.mixtures.items()}}

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_progress(files, values)
        for name, mixture in self.mixtures.items():
            mixture.counts = list(values["counts"][name])

    def finish(self, task: Task) -> None:
        state = self.state
        self.learning = None
        for name, mixture in self.mixtures.items():
            mixture.learning = False
            old = state.frozen.get(name, [])
            state.frozen[name] = sorted({*old, *mixture.taken_most(self.config.freeze)})
        state.order = [*state.order, task.name]
        shares = [len(state.frozen[name]) / self.config.experts for name in self.mixtures]
        self.said["share of experts frozen"] = sum(shares) / len(shares)

    # ---- select

    def fuse(self, task: Task) -> None:
        """Learn the task's autoencoder, and before the first one what is of no task."""
        if self.config.routers == "one" or task.name not in self.state.order:
            return
        if not self.state.thresholds:
            reference = self.reference_images()
            self.selector.standardise(task.train.pixels if reference is None else reference)
            if reference is not None:
                self.selector.learn_reference(reference)
        self.selector.learn_task(task)
        self.confusion()

    def confusion(self) -> None:
        """What the selector makes of the held-out images of the tasks learned, in per cent of each task's."""
        names = ["CLIP alone", *self.state.order]
        for task in self.context.tasks:
            if held := self.state.held_out.get(task.name):
                chosen = self.selector.choose(task.train.take(torch.tensor(held)).pixels)
                for number, count in enumerate(chosen.bincount(minlength=len(names)).tolist()):
                    if count:
                        self.said[f"{task.name} to {names[number]}, %"] = 100 * count / len(held)

    def reference_images(self) -> Pixels | None:
        """The reference set's images, drawn where they are."""
        kept = self.strangers
        if kept is None:
            self.context.warn("The selector has no reference set: what fits no task is told by the thresholds alone.")
        return kept.pairs("reference set", []).images if isinstance(kept, Replay) else kept

    # ---- what it has to say, and state

    def remarks(self) -> dict[str, float]:
        return self.said

    def unpack_state(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_state(files, values)
        self.selector.restore(self.state)
        for mixture in self.mixtures.values():
            mixture.grow(min(1, len(self.state.order)) if self.config.routers == "one" else len(self.state.order))
