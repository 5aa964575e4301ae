"""SLCA (Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model", ICCV 2023,
arXiv:2303.05118), on the image tower of a CLIP.

    learn    a new linear head on the image features f; cross entropy over the task's own columns; SGD, the tower at a hundredth
             of the head's rate (``tower_lr_scale``)
    align    all heads, on draws of all classes seen, N(μ_c·(0.9 + 0.1·(t_c + 1)/(t + 1)), Σ_c), 256 a class and epoch:
             CE(h / (n·τ)), n = mean over the tasks' heads of ‖h_k‖ + 1e-7, with the gradient through n
    predict  argmax of the aligned heads; learning goes on from the heads before they were aligned

As in the release: heads normal(0, 0.02), bias 0; means and covariances of un-augmented images by the tower as it is after the
task, never renewed; the first task is not aligned; the alignment's rate falls by a cosine, once an epoch. Exact shortcuts:
statistics in one pass, a Cholesky factor once a class and task. Where the tower does not learn (``tower_lr_scale=0``, or only
the answer role is played) the heads are trained on features that are encoded once, unless images are cropped anew.
Otherwise than there:
- The release has a ViT without texts. A class that was never learned keeps the probability of its text, by the slow tower;
  where both kinds compete, the learned ones share their texts' mass by softmax(h).
- The task of a class is its task (the release divides by the size of the task at hand, which is right where all are of one
  size: ``task_of_class=release``). Crops are perdure's, without flips and jitter.
- A class of one image is a point but for the ridge of 1e-4; one that comes again gets a new column, and one Gaussian of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.features import Features
from perdure.data.checks import say_alone
from perdure.data.task import Batch, Context, Task
from perdure.methods.base import Method, Recipe, register
from perdure.methods.base_head import HeadMethod, HeadOptions, HeadState
from perdure.models.clip import CLIP
from perdure.ops import gaussians
from perdure.ops.losses import classification
from perdure.training.fit import Backward, Stepper, batches
from perdure.training.schedule import Schedule


@dataclass(frozen=True)
class Alignment(HeadOptions):
    """What counts where only the answer role is played."""

    on: Annotated[Literal["pretrained", "drifting"], Field(description="the weights it stands on")] = "drifting"
    lr: Annotated[float, Field(ge=0, description="of the heads, by SGD")] = 0.01
    epochs: Annotated[int, Field(ge=0, le=10**6, description="passes over a task")] = 20
    batch_size: Annotated[int, Field(ge=1, le=10**6, description="images a step")] = 128
    milestones: Annotated[tuple[int, ...], Field(description="epochs where the rate falls by gamma, or none")] = (18,)
    momentum: Annotated[float, Field(ge=0, lt=1, description="SGD's, in both stages")] = 0.9
    weight_decay: Annotated[float, Field(ge=0, description="in both stages")] = 5e-4
    align: Annotated[bool, Field(description="align the heads after each task but the first")] = True
    align_lr: Annotated[float | None, Field(ge=0, description="of the alignment; none: lr")] = None
    align_epochs: Annotated[int, Field(ge=0, le=10**6, description="of the alignment")] = 5
    align_draws: Annotated[int, Field(ge=1, le=10**6, description="a class and epoch, and as many a step")] = 256
    tau: Annotated[float | None, Field(gt=0, description="τ of the normalised logits; none: logits as they are")] = 0.1
    mean_scaling: Annotated[bool, Field(description="shrink the means of older classes, by a tenth at most")] = True
    task_of_class: Annotated[Literal["true", "release"], Field(description="t_c, which scales the means")] = "true"


@dataclass(frozen=True)
class Config(Alignment, Recipe):
    iterations: Annotated[int, Field(ge=0, le=10**9, description="optimiser steps a task, where epochs=0")] = 0
    warmup: Annotated[int, Field(ge=0, le=10**9, description="steps of linear warm-up")] = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="of the heads' loss")] = 0.0
    loss: Annotated[Literal["softmax"], Field(description="of the heads, which know no texts")] = "softmax"
    positive_pull: Annotated[float, Field(ge=0, le=0, description="heads have no texts to be pulled to")] = 0.0
    optimizer: Annotated[Literal["adamw", "adam", "sgd"], Field(description="of tower and heads")] = "sgd"
    towers: Annotated[Literal["image"], Field(description="the text tower is not used, and stays")] = "image"
    tower_lr_scale: Annotated[float, Field(ge=0, description="factor on the tower's rate; 0: it stays")] = 0.01
    augment: Annotated[bool, Field(description="crop training images at random")] = True


@dataclass
class Aligned(HeadState):
    """By class, its task; heads as learning goes on from them (weight (C, D), bias (C,)) and as they answer; Gaussians."""

    block: list[int] = field(default_factory=list)
    heads: dict[str, Tensor] = field(default_factory=dict)
    aligned: dict[str, Tensor] = field(default_factory=dict)
    gaussians: dict[str, Tensor] = field(default_factory=dict)


@register("slca", paper="arXiv:2303.05118")
class SLCA(HeadMethod):
    """A tower that learns slowly under a head a task; the heads aligned on Gaussian draws of all classes."""

    Config = Config
    State = Aligned
    role_options = {"answer": Alignment}
    state: Aligned
    head: nn.Linear | None = None  # of the task at hand, where it is trained together with the tower

    # ---- learn

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        Method.bind(self, clip, context)
        self.excused = True
        if self.config.on == "pretrained" and self.config.tower_lr_scale:
            raise PerdureError(
                "on=pretrained: the heads are trained with a tower that learns, and cannot answer on the pre-trained one. Set "
                "tower_lr_scale=0, or on=drifting."
            )

    @property
    def learns_apart(self) -> bool:
        """Whether heads are trained on features that are encoded once."""
        return not self.config.tower_lr_scale and not self.config.augment

    def begin_task(self, task: Task) -> None:
        say_alone(task, self.context.warn)
        self.head = None
        if not self.learns_apart:
            self.head, self.column = self.born(task, self.clip.width)

    def born(self, task: Task, width: int) -> tuple[nn.Linear, Tensor]:
        """A new head for the classes that have images, and the column of each of the task's classes (C,)."""
        there = torch.bincount(task.train.labels, minlength=len(task.classes)) > 0
        head = nn.Linear(width, int(there.sum()))
        with torch.no_grad():
            draw = self.generator(task, "head of SLCA")
            head.weight.copy_(0.02 * gaussians.normal(head.out_features, width, draw))
            head.bias.zero_()
        return head.to(self.clip.device), (there.cumsum(0) - 1).to(self.clip.device)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        tower = Method.parameters(self) if self.config.tower_lr_scale else {}
        return {**tower, **named(self.head)} if self.head else {}

    def schedule(self, task: Task) -> Schedule:
        plan = Method.schedule(self, task)
        return replace(plan, augment=self.config.augment, milestones=plan.milestones or ())

    def step(self, batch: Batch, backward: Backward) -> None:
        assert self.head is not None
        with torch.set_grad_enabled(self.config.tower_lr_scale > 0):
            raw = self.clip.image_features(batch.images)
        x = raw if self.config.features == "raw" else nn.functional.normalize(raw, dim=1)
        backward(task=self.loss(self.head, x, batch.labels))

    def loss(self, head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy over the task's own columns, in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return classification(head(x), self.column[labels], self.config.label_smoothing)

    # ---- align

    def calibrate(self, task: Task) -> None:
        state = self.state
        x, place = self.learned_on(task)
        if self.head is None:
            self.head, self.column = self.born(task, x.shape[1])
            self.learn_apart(task, self.head, x)
        self.keep(self.head, place[place >= 0])
        self.head = None
        state.gaussians = gaussians.add(state.gaussians, x, place[task.train.labels], len(state.classes))
        state.aligned = state.heads
        if self.config.align and len(state.tasks) > 1:
            self.align(task, int((place >= 0).sum()))

    def learn_apart(self, task: Task, head: nn.Linear, x: Tensor) -> None:
        """Train the task's head on features x (N, D)."""
        labels, plan = task.train.labels.to(x.device), Method.schedule(self, task)
        order = self.generator(task, "order of SLCA's features")
        draws = (Batch(x[i], labels[i]) for i in batches(len(x), plan.batch_size, order))
        self.train(HeadLearner(self, head), plan, draws, "head")

    def keep(self, head: nn.Linear, rows: Tensor) -> None:
        """Put the columns of the task's head among those of all classes, at ``rows``."""
        state, total = self.state, len(self.state.classes)
        state.block = [*state.block, *[len(state.tasks) - 1] * (total - len(state.block))]
        heads = {}
        for name, column in head.named_parameters():
            old = state.heads.get(name, column[:0])
            heads[name] = torch.cat([old, column.new_zeros(total - len(old), *column.shape[1:])]).detach()
            heads[name][rows] = column.detach()
        state.heads = heads

    def align(self, task: Task, size: int) -> None:
        """Train all heads on draws of all classes; ``size``: how many of these are the task's."""
        c, state = self.config, self.state
        count, now = len(state.classes), len(state.tasks) - 1
        of = torch.tensor(state.block) if c.task_of_class == "true" else torch.arange(count) // size
        scale = 0.9 + 0.1 * (of.double() + 1) / (now + 1) if c.mean_scaling else torch.ones(count, dtype=torch.float64)
        means = state.gaussians["means"]
        heads, rate = Aligner(state.heads, state.block, c.tau), c.lr if c.align_lr is None else c.align_lr
        plan = Schedule(
            c.align_epochs * count, rate, 0, c.align_draws, c.weight_decay, optimizer="sgd", momentum=c.momentum, stride=count
        )  # fmt: skip
        draws = self.draws((scale.to(means.device)[:, None] * means).float(), self.generator(task, "draws of SLCA"))
        self.train(heads, plan, draws, "alignment")
        state.aligned = {name: p.detach() for name, p in heads.parameters().items()}

    def draws(self, means: Tensor, generator: torch.Generator) -> Iterator[Batch]:
        """Draws of all classes, shuffled anew each epoch."""
        each, count = self.config.align_draws, len(means)
        sample = gaussians.Sampler(self.state.gaussians)
        labels = torch.arange(count, device=means.device).repeat_interleave(each)
        while True:
            drawn = sample.draw(range(count), gaussians.normal(count * each, means.shape[1], generator), means)
            for some in gaussians.shuffled(count * each, generator).split(each):
                yield Batch(drawn[some], labels[some])

    # ---- answer

    def scores(self, seen: Features, rows: list[int]) -> Tensor:
        heads = self.state.aligned
        return self.inputs(seen) @ heads["weight"][rows].T + heads["bias"][rows]


def named(head: nn.Linear) -> dict[str, nn.Parameter]:
    """A head's parameters, under names that no tower has."""
    return {f"head.{name}": parameter for name, parameter in head.named_parameters()}


class HeadLearner(Stepper):
    """Trains the head of the task at hand on features."""

    def __init__(self, method: SLCA, head: nn.Linear):
        self.method, self.head = method, head

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return named(self.head)

    def step(self, batch: Batch, backward: Backward) -> None:
        backward(head=self.method.loss(self.head, batch.images, batch.labels))


class Aligner(Stepper):
    """Trains all heads; ``block`` (C,): the task whose head a class belongs to."""

    def __init__(self, heads: Mapping[str, Tensor], block: list[int], tau: float | None):
        self.heads = {name: nn.Parameter(tensor.clone()) for name, tensor in heads.items()}
        self.blocks = [[row for row, own in enumerate(block) if own == k] for k in sorted(set(block))]
        self.tau = tau

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.heads

    def step(self, batch: Batch, backward: Backward) -> None:
        with torch.autocast(batch.images.device.type, enabled=False):
            logits = batch.images @ self.heads["weight"].T + self.heads["bias"]
            if self.tau is not None:
                norms = [torch.linalg.vector_norm(logits[:, own], dim=1, keepdim=True) + 1e-7 for own in self.blocks]
                logits = logits / (torch.stack(norms).mean(0) * self.tau)
            backward(alignment=classification(logits, batch.labels))
