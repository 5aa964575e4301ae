"""Ridge regression on frozen features: an answer that is solved, not trained. By its settings it is also the primal form of
RAIL (Xu et al., "Advancing Cross-domain Discriminability in Continual Learning of Vision-Language Models", NeurIPS 2024,
arXiv:2406.18868) and phase 2 of RanPAC (McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual
Learning", NeurIPS 2023, arXiv:2307.02251).

    φ(x) = relu(xW)              the lift: W random, drawn once; ``features=0``: φ(x) = x
    G = Σ φφᵀ,  b = Σ φyᵀ        over all images of all tasks, in fp64
    A = (G + λI)⁻¹ b             by Cholesky
    p = (1 - w)·p_text + w·softmax(τ·φA)        over the classes that have a row; the others keep p_text

The sums of all tasks are the sums of their union, in any order: on features that do not change this *is* joint training. λ, τ
and w are chosen without a held-out image: exact leave-one-out scores of each task's training images, as if they had been
learned in all tasks but for that one image, and the likelihood of the mixture, summed over the tasks.

- ``input=patches`` reads, beside the pooled output, the patches of a block before the last, averaged over a coarse grid: what
  is thrown away on the way to the text. It is perdure's own, like the choice by leave-one-out and ``gate=mass``.
- RAIL (preset ``rail-xtail``): the fp64 batch solution, where the release has an fp32 recursion; an image counts as one of a
  learned class if any class of that name has been learned. The dual (kernel) form keeps every image and is left out.
- RanPAC (preset ``ranpac-cifar100``): λ by hold-out, as there, on the task's own images alone; its first-task adaptation is
  not part of this.
- ``on=pretrained``: the head stands on the pre-trained weights, whatever learns beside it, and is exact for ever.
  ``on=drifting``: on what the fuse role calls its base; how far the features move is measured, and ``reencode`` makes the sums
  again from the old images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.features import Features
from perdure.core.memory import check_square
from perdure.core.pixels import as_floats
from perdure.core.seeding import derive
from perdure.data.files import Pixels, copies
from perdure.data.task import Class, Context, Query, Task
from perdure.data.transforms import random_resized_crop
from perdure.methods.base import METHODS, Expert, Method, State, register
from perdure.methods.base import Row as Roles
from perdure.models.clip import CLIP
from perdure.models.heads import Gate, Row, known, mix, places
from perdure.models.lift import Draw, RandomLayer
from perdure.ops import ridge
from perdure.training.schedule import Schedule

LAMBDAS = tuple(10 ** (k / 2) for k in range(-8, 1))  # times the mean ‖φ‖² of the first task
HELD_OUT = tuple(10.0**k for k in range(-8, 9))  # RanPAC's candidates, absolute
TEMPERATURES = tuple(2.5 * 2 ** (k / 2) for k in range(11))
CHUNK = 1024  # images at a time
OPEN = ("lam", "temperature", "weight")  # what can be chosen
STEADY = 0.02  # a mean move of features that is not worth a warning

Chosen = Literal["chosen"]


@dataclass(frozen=True)
class Config:
    input: Annotated[
        Literal["hidden", "projected", "patches"],
        Field(description="what is lifted: pooled features, those after CLIP's projection, or pooled ones and patches"),
    ] = "hidden"
    block: Annotated[int, Field(ge=1, le=1000, description="patches: of which block, counted from the last one")] = 2
    grid: Annotated[int, Field(ge=1, le=100, description="patches: their means over a grid of so many a side")] = 2
    unit: Annotated[bool, Field(description="make what is lifted unit")] = True
    features: Annotated[int, Field(ge=0, le=10**6, description="M, random features; 0: no lift")] = 2048
    weights: Annotated[Draw, Field(description="W: normal, or uniform in ±1/√width")] = "normal"
    lam: Annotated[Annotated[float, Field(ge=0)] | Chosen, Field(description="λ of the ridge")] = "chosen"
    choose: Annotated[
        Literal["loo", "holdout", "fixed"],
        Field(description="loo: what is 'chosen', by leave-one-out; holdout: λ by RanPAC's rule; fixed: nothing"),
    ] = "loo"
    judge: Annotated[
        int, Field(ge=0, le=10**6, description="loo: choose λ by a head of so many of the features; 0: of all")
    ] = 0
    score: Annotated[Literal["softmax", "raw"], Field(description="softmax(τ·scores), or the scores")] = "softmax"
    temperature: Annotated[Annotated[float, Field(gt=0)] | Chosen, Field(description="τ")] = "chosen"
    weight: Annotated[Annotated[float, Field(ge=0, le=1)] | Chosen, Field(description="w, the head's share")] = "chosen"
    gate: Annotated[Gate, Field(description="how classes without a row are kept: see docs/ridge.md")] = "mass"
    augment: Annotated[bool, Field(description="learn from one random crop of each image")] = False
    on: Annotated[Literal["pretrained", "drifting"], Field(description="the weights whose features it stands on")] = (
        "pretrained"
    )
    reencode: Annotated[bool, Field(description="drifting: make the sums again from the old images")] = False


@dataclass
class Sums(State):
    """The running sums, and what was chosen. ``evidence``: Σ over tasks, by λ and τ (``of_all``: of the λ of the day, where
    λ was judged by fewer features); ``moved``: by task, how far the features of its images moved while it was learned."""

    classes: list[Row] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)  # gram, packed; cross (M, C)
    layer: str = ""  # sha256 of W
    scale: float = 0.0  # mean ‖φ‖² of the first task's images
    images: int = 0
    evidence: ridge.Evidence = field(default_factory=list)
    evidence_of_all: ridge.Evidence = field(default_factory=list)
    lam: float = 0.0
    temperature: float = 1.0
    weight: float = 1.0
    jitter: float = 0.0
    moved: dict[str, float] = field(default_factory=dict)


@register("ridge", paper="arXiv:2406.18868")
class Ridge(Method):
    """A closed-form head on frozen features, mixed with the text; exact, in any order, in seconds."""

    Config = Config
    State = Sums
    state: Sums
    role_options = {"answer": Config}
    solution: Tensor | None = None  # A, made from the state when it is asked for

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        clip.backbone.requires_grad_(False)
        self.join(clip, context or Context())

    def join(self, clip: CLIP, context: Context) -> None:
        super().join(clip, context)
        c = self.config
        self.lift = RandomLayer(c.features, c.weights, derive(context.seed, "random layer of ridge"))
        open_ = [key for key in OPEN if self.is_open(key)]
        if c.choose == "fixed" and open_:
            raise PerdureError(f"choose=fixed: give a number for {', '.join(open_)}, or choose=loo.")
        if c.choose == "holdout" and (rest := [key for key in open_ if key != "lam"]):
            raise PerdureError(f"choose=holdout chooses lam alone: give a number for {', '.join(rest)}, or choose=loo.")
        if c.score == "raw" and self.is_open("weight"):
            raise PerdureError("score=raw gives no probabilities to choose a weight by: give weight a number.")

    def is_open(self, key: str) -> bool:
        """Whether an option is to be chosen; raw scores have no temperature."""
        return getattr(self.config, key) == "chosen" and not (key == "temperature" and self.config.score == "raw")

    def begin_task(self, task: Task) -> None:
        """Nothing is trained."""

    def schedule(self, task: Task) -> Schedule:
        return Schedule(steps=0, lr=0.0, warmup=0, batch_size=1)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {}

    def stands_on(self) -> Expert | None:
        return Expert("pretrained", self.clip.pretrained) if self.config.on == "pretrained" else None

    # ---- features

    def look(self, images: Pixels) -> Features:
        c = self.config
        return self.clip.features(images, c.block, c.grid) if c.input == "patches" else self.clip.features(images)

    def inputs(self, seen: Features) -> Tensor:
        """x (N, width): what is lifted."""
        c = self.config
        if c.input == "patches":
            parts = seen.pooled, seen.patches
            x = torch.cat([F.normalize(part, dim=1) for part in parts] if c.unit else parts, 1)
        else:
            x = seen.pooled if c.input == "hidden" else seen.embedded
        return F.normalize(x, dim=1) if c.unit else x

    # ---- learning

    def foresees(self) -> bool:
        return self.config.on == "drifting"

    def foresee(self, task: Task) -> None:
        self.before = self.inputs(self.look(task.train.pixels))

    @torch.no_grad()
    def calibrate(self, task: Task) -> None:
        c, state = self.config, self.state
        seen = self.seen(task)
        x = self.inputs(seen)
        if not x.any():
            raise PerdureError(
                f"{task.name}: the features of all its images are 0. There is nothing to learn a head from."
            )
        if c.on == "drifting":
            self.drifted(task)
            if c.reencode:
                self.sum_up_again()
        rows = self.rows_of(task)
        self.sum_up(x, rows[task.train.labels])
        self.count(task, rows)
        state.tasks = [*state.tasks, task.name]
        if c.choose == "holdout" and self.is_open("lam"):
            state.lam = self.held_out(task, x)
        elif c.choose == "loo" and any(map(self.is_open, OPEN)):
            self.by_leave_one_out(task, seen, rows)
        for key in OPEN:
            if getattr(c, key) != "chosen":
                setattr(state, key, float(getattr(c, key)))
        self.solution = None

    def seen(self, task: Task) -> Features:
        """The task's training images, as they are or cropped at random."""
        if not self.config.augment:
            return self.look(task.train.pixels)
        draw = torch.Generator().manual_seed(derive(self.context.seed, task.name, "crops of ridge"))
        with self.clip.remembering(False):
            crops = (random_resized_crop(as_floats(x), self.clip.size, draw) for x in task.train.pixels.split(256))
            return Features.cat([self.look(crop) for crop in crops])

    def rows_of(self, task: Task) -> Tensor:
        """The row of each of the task's classes (C,); a new one where a new class has images, -1 where a class has none."""
        state, there = self.state, set(task.train.labels.tolist())
        place = places(state.classes)
        rows = [
            place.setdefault((c.name, c.templates), len(place)) if k in there else -1
            for k, c in enumerate(task.classes)
        ]
        state.classes = list(place)
        return torch.tensor(rows)

    def count(self, task: Task, rows: Tensor) -> None:
        """Note how many images each row has seen."""
        counts = torch.bincount(rows[task.train.labels], minlength=len(self.state.classes))
        counts[: len(self.state.counts)] += torch.tensor(self.state.counts, dtype=torch.int64)
        self.state.counts = counts.tolist()

    def sum_up(self, x: Tensor, rows: Tensor) -> None:
        """Add images x (N, width) of the rows (N,) to the sums."""
        kept, first = self.state.sums, self.lift(x[:1])
        width = self.checked(first.shape[1])
        gram = ridge.unpack(kept["gram"]) if kept else first.new_zeros(width, width)
        cross = first.new_zeros(width, len(self.state.classes))
        if kept:
            cross[:, : kept["cross"].shape[1]] = kept["cross"]
        squares = 0.0
        for some, row in zip(x.split(CHUNK), rows.to(x.device).split(CHUNK), strict=True):
            lifted = self.lift(some)
            gram.addmm_(lifted.T, lifted)
            cross.index_add_(1, row, lifted.T)
            squares += lifted.square().sum().item()
        self.state.layer = self.lift.mark()
        self.state.scale = self.state.scale or squares / len(x)
        self.state.sums = {"cross": cross, "gram": ridge.pack(gram)}

    def checked(self, width: int) -> int:
        """``width``; refused where it does not fit into memory, or where the state was learned with another, or another W."""
        kept = len(self.state.sums["cross"]) if self.state.sums else width
        if kept != width:
            raise PerdureError(f"The ridge head was learned with {kept} features, and is asked with {width} now.")
        self.lift.check(self.state.layer)
        check_square(width, 4, "A ridge head", "features")
        return width

    # ---- choosing

    def held_out(self, task: Task, x: Tensor) -> float:
        """RanPAC's rule: fitted on the first four fifths of the task's images, in a drawn order, judged on the rest."""
        order = self.order(task).to(x.device)
        fitted = int(0.8 * len(order))
        if not 0 < fitted < len(order):
            return self.state.lam or self.state.scale  # one image: nothing to judge by
        targets = F.one_hot(task.train.labels, len(task.classes)).double().to(x.device)
        return ridge.best_on_held_out(self.lift(x[order]), targets[order], fitted, HELD_OUT)

    def order(self, task: Task) -> Tensor:
        """The order in which hold-out takes a task's images."""
        draw = torch.Generator().manual_seed(derive(self.context.seed, task.name, "order of ridge's hold-out"))
        return torch.randperm(len(task.train), generator=draw)

    def by_leave_one_out(self, task: Task, seen: Features, rows: Tensor) -> None:
        """Add the task's evidence to that of the tasks before, and take λ, τ and w where it is likeliest."""
        c, state, whole = self.config, self.state, len(self.state.sums["cross"])
        lams = [state.scale * k for k in LAMBDAS] if c.lam == "chosen" else [float(c.lam)]
        width = min(c.judge or whole, whole)
        judged, columns = self.judged(task, seen, rows)
        evidence = self.evidence(task, seen, rows, judged, columns, lams, width)
        state.evidence = ridge.added(state.evidence, evidence)
        lam, tau = ridge.likeliest(state.evidence)
        state.lam, found = lams[lam], state.evidence[lam]
        if width < whole:
            evidence = self.evidence(task, seen, rows, judged, columns, [state.lam], whole)
            state.evidence_of_all = ridge.added(state.evidence_of_all, evidence)
            (found,), (_, tau) = state.evidence_of_all, ridge.likeliest(state.evidence_of_all)
        state.images += len(rows[task.train.labels])
        state.temperature, state.weight = self.temperatures[tau], found[tau][1] / state.images

    @property
    def temperatures(self) -> Sequence[float]:
        """The τ that may be chosen."""
        c = self.config
        return TEMPERATURES if self.is_open("temperature") else [1.0 if c.score == "raw" else float(c.temperature)]

    def judged(self, task: Task, seen: Features, rows: Tensor) -> tuple[ridge.Judged, list[int]]:
        """What the text says of the task's images, among the classes that compete and have a row; and those rows."""
        state = self.state
        asked = task.classes if self.context.labels == "task" else [Class(*row) for row in state.classes]
        columns, kept = known(state.classes, asked)
        place = {row: k for k, row in enumerate(kept)}
        true = torch.tensor([place[row] for row in rows[task.train.labels].tolist()], device=seen.embedded.device)
        text = self.clip.similarity(seen.embedded, self.clip.class_texts([one.prompts() for one in asked])).softmax(1)
        text = text[:, columns].double()
        return ridge.Judged(true, text.gather(1, true.unsqueeze(1)).squeeze(1), text.sum(1)), kept

    def evidence(
        self, task: Task, seen: Features, rows: Tensor, judged: ridge.Judged, columns: list[int], lams: Sequence[float],
        width: int,
    ) -> ridge.Evidence:  # fmt: skip
        """By λ and τ, how well a head of the first ``width`` features answers the task's images, each left out exactly."""
        c, sums = self.config, self.state.sums
        x, y = self.inputs(seen), rows[task.train.labels].to(seen.embedded.device)
        wanted = torch.tensor(columns, device=y.device)
        groups = ridge.whole_groups(len(y), copies(task.train.pixels), CHUNK)

        def parts() -> Iterator[ridge.Part]:
            for index, among in groups:
                yield index, self.lift(x[index], width), (y[index].unsqueeze(1) == wanted).double(), among

        gram, cross = ridge.unpack(sums["gram"])[:width, :width], sums["cross"][:width, columns]
        course = ridge.left_out_course(gram, cross, lams, parts, len(y))
        if c.score == "raw":
            return [judged.error(scores, float(c.weight)) for scores in course]
        share = None if self.is_open("weight") else float(c.weight)
        return [judged.evidence(scores, self.temperatures, share) for scores in course]

    # ---- drift

    def drifted(self, task: Task) -> None:
        """Say how far the features of the task's images moved while it was learned: so far the old sums are off."""
        before, after = self.before, self.inputs(self.look(task.train.pixels))
        far = ((after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)).mean().item()
        self.state.moved = {**self.state.moved, task.name: far}
        if self.state.tasks and not self.config.reencode and far > STEADY:
            old = range(len(self.state.classes))
            agree = (self.scores(before, old).argmax(1) == self.scores(after, old).argmax(1)).double().mean().item()
            self.context.warn(
                f"The features that the ridge head stands on moved by {far:.0%} while {task.name} was learned; of its images "
                f"the head answers {agree:.0%} as before. What it knows of earlier tasks is as much out of date: on=pretrained "
                "is exact, and reencode=true sums the old images up again."
            )

    def sum_up_again(self) -> None:
        """Make the sums of the tasks so far again, by the weights the model holds now."""
        state, here = self.state, {task.name: task for task in self.context.tasks}
        if gone := [name for name in state.tasks if name not in here]:
            raise PerdureError(f"reencode=true: the images of {', '.join(gone)} are not at hand. Set reencode=false.")
        state.sums = {}
        for name in state.tasks:
            self.sum_up(self.inputs(self.seen(here[name])), self.rows_of(here[name])[here[name].train.labels])

    # ---- answering

    def finalizes(self) -> bool:
        return True

    def finalize(self, query: Query, logits: Tensor) -> Tensor:
        c, state = self.config, self.state
        columns, rows = known(state.classes, query.classes)
        if not rows or query.features is None:
            return logits
        scores = self.scores(self.inputs(query.features), rows)
        visual = (scores if c.score == "raw" else (state.temperature * scores).softmax(1)).float()
        return mix(logits.softmax(1), visual, columns, 1 - state.weight, state.weight, c.gate, query.classes)

    def scores(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """φA (N, rows), fp64, of x (N, width)."""
        self.checked(self.lift(x[:1]).shape[1])
        columns = self.solved()[:, rows]
        return torch.cat([self.lift(some) @ columns for some in x.split(CHUNK)])

    def solved(self) -> Tensor:
        """A (M, rows), fp64, made from the state when it is first asked for."""
        if self.solution is None:
            state = self.state
            factor, jitter = ridge.cholesky(ridge.unpack(state.sums["gram"]), state.lam)
            if jitter:
                self.context.warn(
                    f"The sums of the ridge head are nearly singular: {jitter:.1e} was added to λ = {state.lam:.1e}."
                )
            self.solution = ridge.solve(factor, state.sums["cross"])
        return self.solution

    # ---- what it has to say, and state

    def remarks(self) -> dict[str, float]:
        s = self.state
        said = {"λ": s.lam, "τ": s.temperature, "share of the head": s.weight}
        return {**said, **({"features moved by": list(s.moved.values())[-1]} if s.moved else {})}

    def unpack_state(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_state(files, values)
        self.solution = None


METHODS.add(
    "ridge_patches", Roles(learn=("ridge", {"input": "patches", "features": 4096, "judge": 1024})),
    "A wide ridge head that reads the patches of an earlier block too: what perdure recommends.", paper="arXiv:2406.18868",
)  # fmt: skip
