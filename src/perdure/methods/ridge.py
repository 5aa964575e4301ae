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
- RanPAC (preset ``ranpac-cifar100``): λ by hold-out on the task's own images; its first-task adaptation: ``first_only``.
- ``on=pretrained``: the head stands on the pre-trained weights whatever learns, and is exact for ever; ``on=drifting``: on
  what the fuse role calls its base, whose moves are measured (``reencode``: the sums are made again from the old images).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.features import Features
from perdure.core.memory import check_square
from perdure.core.packing import Packed, unpack
from perdure.core.seeding import derive
from perdure.data.copies import copies
from perdure.data.files import Pixels, all_cropped
from perdure.data.task import Class, Context, Query, Task
from perdure.methods.base import register
from perdure.methods.base_head import STEADY, HeadMethod
from perdure.models.clip import CLIP
from perdure.models.heads import known, mix, places
from perdure.models.lift import RandomLayer
from perdure.ops import ridge
from perdure.training.closed_form import OPEN, ClosedForm, ClosedFormRecipe, Sums


@register("ridge", paper="arXiv:2406.18868")
class Ridge(HeadMethod):
    """A closed-form head on frozen features, mixed with the text; exact, in any order, in seconds."""

    Config = ClosedFormRecipe
    State = Sums
    state: Sums
    role_options = {"answer": ClosedFormRecipe}

    def join(self, clip: CLIP, context: Context) -> None:
        super().join(clip, context)
        c = self.config
        c.check()
        check_square(c.features, 4, "A ridge head", "features")
        if c.input == "patches":
            clip.checked_side(c.block, c.grid)
        lift = RandomLayer(c.features, c.weights, derive(context.seed, "random layer of ridge"))
        self.head = ClosedForm(self.state, lift, context.warn)

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

    @torch.no_grad()
    def calibrate(self, task: Task) -> None:
        c, state = self.config, self.state
        seen = self.seen(task)
        x = self.inputs(seen)
        if not x.any():
            raise PerdureError(f"{task.name}: the features of all its images are 0: nothing to learn a head from.")
        if c.on == "drifting":
            self.drifted(task, self.inputs(self.look(task.train.pixels)) if c.augment else x)
            if c.reencode:
                self.sum_up_again()
        rows = self.rows_of(task)
        self.head.add(x, rows[task.train.labels], len(state.classes))
        self.count(task, rows)
        state.tasks = [*state.tasks, task.name]
        if c.choose == "holdout" and c.open("lam"):
            state.lam = self.head.held_out(x, task.train.labels, self.order(task))
        elif c.choose == "loo" and any(map(c.open, OPEN)):
            self.head.choose(c, *self.judged(task, seen, rows), x, rows[task.train.labels], copies(task.train.pixels))
        for key in OPEN:
            if getattr(c, key) != "chosen":
                setattr(state, key, float(getattr(c, key)))

    def seen(self, task: Task) -> Features:
        """The task's training images, as they are or cropped at random."""
        if not self.config.augment:
            return self.look(task.train.pixels)
        draw = torch.Generator().manual_seed(derive(self.context.seed, task.name, "crops of ridge"))
        with self.clip.remembering(False):
            return Features.cat([self.look(crop) for crop in all_cropped(task.train.pixels, self.clip.size, draw)])

    def count(self, task: Task, rows: Tensor) -> None:
        """Note how many images each row has seen."""
        counts = torch.bincount(rows[task.train.labels], minlength=len(self.state.classes))
        counts[: len(self.state.counts)] += torch.tensor(self.state.counts, dtype=torch.int64)
        self.state.counts = counts.tolist()

    def forget(self, task: str, before: Packed, after: Packed) -> None:
        old, then = unpack(Sums, *before), unpack(Sums, *after)
        place = places(self.state.classes)
        self.head.forget(old, then, [place[row] for row in then.classes])
        self.state.tasks = [name for name in self.state.tasks if name != task]
        self.state.moved.pop(task, None)
        if self.config.choose == "loo":
            self.head.settle(self.config)

    # ---- choosing

    def order(self, task: Task) -> Tensor:
        """The order in which hold-out takes a task's images."""
        draw = torch.Generator().manual_seed(derive(self.context.seed, task.name, "order of ridge's hold-out"))
        return torch.randperm(len(task.train), generator=draw)

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

    # ---- drift

    def drifted(self, task: Task, after: Tensor) -> None:
        """Say how far the features of the task's images moved while it was learned: so far the old sums are off."""
        before = self.before
        far = self.move(task, after)
        if before is not None and self.state.tasks and not self.config.reencode and far > STEADY:
            old = range(len(self.state.classes))
            answers = [self.head.scores(x, old).argmax(1) for x in (before, after)]
            agree = (answers[0] == answers[1]).double().mean().item()
            self.context.warn(
                f"The features that the ridge head stands on moved by {far:.0%} while {task.name} was learned; of its images "
                f"the head answers {agree:.0%} as before. What it knows of earlier tasks is as much out of date: on=pretrained "
                "is exact, and reencode=true sums the old images up again."
            )

    def sum_up_again(self) -> None:
        """Make the sums of the tasks so far again, by the weights the model holds now."""
        state, here = self.state, {task.name: task for task in self.context.tasks if len(task.train)}
        if gone := [name for name in state.tasks if name not in here]:
            raise PerdureError(f"reencode=true: the images of {', '.join(gone)} are not at hand. Set reencode=false.")
        state.sums = {}
        for name in state.tasks:
            rows = self.rows_of(here[name])[here[name].train.labels]
            self.head.add(self.inputs(self.seen(here[name])), rows, len(state.classes))

    # ---- answering

    def finalize(self, query: Query, logits: Tensor) -> Tensor:
        c, state = self.config, self.state
        columns, rows = known(state.classes, query.classes)
        if not rows or query.features is None:
            return logits
        scores = self.head.scores(self.inputs(query.features), rows)
        visual = (scores if c.score == "raw" else (state.temperature * scores).softmax(1)).float()
        return mix(logits.softmax(1), visual, columns, 1 - state.weight, state.weight, c.gate, query.classes)

    # ---- what it has to say, and state

    def remarks(self) -> dict[str, float]:
        s = self.state
        return {"λ": s.lam, "τ": s.temperature, "share of the head": s.weight, **super().remarks()}

    def unpack_state(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_state(files, values)
        self.head = ClosedForm(self.state, self.head.lift, self.context.warn)
