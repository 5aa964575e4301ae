"""CLG-CBM (Yu et al., "Language Guided Concept Bottleneck Models for Interpretable Continual Learning", CVPR 2025,
arXiv:2503.23283).

    scores   Wx/|x|         x: unit image features of the frozen CLIP; a row of W a concept, a phrase with a unit text b
    logits   H·scores       H: a row a class
    search   Linear → batch norm → Linear on x; CE + |mean d(w/|w|) - m₀| / m₀⁵, d(v) = (v - m) S⁻¹ (v - m)ᵀ, m and S of the
             task's candidates, m₀ the mean of their own d; its first rows take the nearest candidates, 10 a class
    loss     CE - sim·mean cos((Wx)³, (Bx)³) + 1e-3·(0.99 Σ|H| + 0.005 ΣH²), the cosines over the batch, a concept each
    batch    the task's x; of each old class c the x of the new class r whose mean lies nearest to c's text, x - μ_r + μ_c;
             and draws N(μ, Σ) of two old classes

As in the release: all of W and H go on learning, Adam anew each task, a tenth of the rate at three milestones; candidates of
several classes are kept as often as they are listed. Exact shortcuts: features once a task, a Cholesky factor once a class,
rows are matched only as far as they are needed. Otherwise than there, unless a preset says so:
- The last weights are kept. The release keeps those that do best on the task's *test* images (``keep_weights=best_of_test``:
  for its golden numbers, refused in a run); ``held_out`` looks at a tenth of the training images.
- Batch norm stays in training mode (the release: by running statistics after the first epoch, ``search_bn=release``).
- S has a ridge: with fewer candidates than dimensions the release inverts what has no inverse.
- No concept lists ship: theirs have no licence. ``concepts`` reads a file; without one a class's candidates are the words of
  the stream's vocabulary whose text is nearest to its own, by rule: neighbours, which nobody described it by.
- Texts of names are the mean over a class's templates. A class that was never learned keeps the probability of its text. One
  that comes again goes on from its row, and is the Gaussian of all its images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.features import Features
from perdure.core.seeding import derive
from perdure.core.state import as_json, digest
from perdure.data.concepts import Concepts as Lists
from perdure.data.concepts import check_enough, lists_of, read_concepts
from perdure.data.task import Batch, Class, Context, Query, Task
from perdure.methods.base import Reason, register
from perdure.methods.base_head import HeadMethod, HeadOptions, HeadState
from perdure.models.clip import CLIP
from perdure.models.heads import known
from perdure.ops import concepts, gaussians
from perdure.training.bottleneck import Bottleneck, BottleneckOptions, Judge, Search, grown, held_out, new_gate, scored
from perdure.training.fit import batches
from perdure.training.schedule import Schedule

TOLD = 5  # concepts of an explanation
LIGHT = 0.01  # a weight of the heads that counts for little
Sides = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # features and rows: trained on; judged by


@dataclass(frozen=True)
class Config(BottleneckOptions, HeadOptions):
    features: Annotated[Literal["unit"], Field(description="image features are made unit")] = "unit"


@dataclass
class Concepts(HeadState):
    """The concepts' phrases; their unit texts (M, D), W (M, D) and H (C, M); the classes' Gaussians; what a file listed."""

    phrases: list[str] = field(default_factory=list)
    bottleneck: dict[str, Tensor] = field(default_factory=dict)
    gaussians: dict[str, Tensor] = field(default_factory=dict)
    file: str = ""
    noted: dict[str, float] = field(default_factory=dict)


@register("clg_cbm", paper="arXiv:2503.23283")
class CLGCBM(HeadMethod):
    """A bottleneck of named concepts on frozen features; old classes live on as moved features of new ones."""

    Config = Config
    State = Concepts
    state: Concepts

    def join(self, clip: CLIP, context: Context) -> None:
        super().join(clip, context)
        if self.config.keep_weights == "best_of_test" and context.stream:
            raise PerdureError(
                "keep_weights=best_of_test chooses weights by the test images, which would then measure nothing. Take last, or "
                "held_out, which looks at a tenth of the training images."
            )
        here = [
            task for task in context.tasks if len(task.train)
        ]  # a model in use keeps no pictures of what it learned
        self.lists: Lists = {}
        found = [self.phrases_of(task.name, task.classes) for task in here]
        self.file = digest(as_json(found)) if len(here) == len(context.tasks) and self.lists else ""

    # ---- candidates

    def phrases_of(self, where: str, classes: Sequence[Class]) -> list[list[str]]:
        """The phrases that a file lists for each class; none without a file. ``PerdureError`` where they will not do."""
        c = self.config
        if not c.concepts:
            if not self.context.vocabulary:
                raise PerdureError(
                    "This stream has no vocabulary to take concepts from. Give them as concepts=FILE, a JSON file "
                    "{class: [concept, …]}."
                )
            return []
        self.lists = self.lists or read_concepts(c.concepts, c.concept_names)
        return lists_of(self.lists, [one.name for one in classes], c.per_class, c.concepts, where)

    def candidates(self, task: Task, rows: Sequence[int]) -> tuple[list[str], Tensor]:
        """Phrases and unit texts (N, D) of the classes of ``rows``, as often as they are listed."""
        classes = [Class(*self.state.classes[row]) for row in rows]
        if listed := self.phrases_of(task.name, classes):
            if self.file and self.state.file not in ("", self.file):
                raise PerdureError(f"concepts={self.config.concepts} has changed since this began. Put the file back.")
            self.state.file = self.state.file or self.file
            phrases = [phrase for own in listed for phrase in own]
            return phrases, self.clip.class_texts([[self.config.prefix + phrase] for phrase in phrases])
        taken = {name for name, _ in self.state.classes} | {one.name for one in task.classes}
        words = [one for one in self.context.vocabulary if one.name not in taken]
        texts = self.clip.class_texts([one.prompts() for one in words])
        near = (self.texts()[rows] @ texts.T).topk(min(self.config.neighbours, len(words)), 1).indices.flatten()
        check_enough(len(near), self.config.per_class, len(rows), task.name)
        if len(self.state.tasks) == 1:
            self.context.warn(
                "There is no concepts=FILE: a class's concepts are the words of the vocabulary that lie nearest to its name, "
                "by rule. They are its neighbours, not attributes that anyone described."
            )
        return [words[k].name for k in near.tolist()], texts[near]

    # ---- learning

    def calibrate(self, task: Task) -> None:
        state, old = self.state, len(self.state.classes)
        x, place = self.learned_on(task)
        rows, fresh = place[task.train.labels], [row for row in place.tolist() if row >= 0]
        phrases, texts = self.candidates(task, fresh)
        state.gaussians = gaussians.add(state.gaussians, x, rows, len(state.classes))
        sides = self.sides(task, x, rows, place)
        picks = self.search(task, sides, fresh, texts)
        state.phrases = [*state.phrases, *(phrases[k] for k in picks)]
        self.fit_bottleneck(task, sides, [row for row in range(old) if row not in fresh], fresh, texts[picks])

    def sides(self, task: Task, x: Tensor, rows: Tensor, place: Tensor) -> Sides:
        """What is trained on, and what the best weights are chosen by, if any are."""
        kind = self.config.keep_weights
        if kind == "last":
            return x, rows, None, None
        if kind == "best_of_test":
            own = place[task.test.labels.to(place.device)]
            return x, rows, self.inputs(self.look(task.test.pixels))[own >= 0], own[own >= 0]
        out = held_out(rows, self.generator(task, "held out by CLG-CBM"))
        return x[~out], rows[~out], x[out], rows[out]

    def search(self, task: Task, sides: Sides, fresh: list[int], texts: Tensor) -> list[int]:
        """Which of the candidates (N, D) become concepts."""
        c, (x, rows, test, test_rows) = self.config, sides
        number = rows.new_full((len(self.state.classes),), -1)
        number[fresh] = torch.arange(len(fresh), device=rows.device)
        gate = new_gate(x.shape[1], len(texts), len(fresh), derive(self.context.seed, task.name, "gate of CLG-CBM"))
        plan = Schedule(
            0, c.search_lr, 0, c.batch_size, optimizer="adam", epochs=c.search_epochs, floor=1.0
        ).over(len(x))  # fmt: skip
        judge = Judge(test, None if test_rows is None else number[test_rows], c.look_every, plan.stride, plan.steps)
        space = concepts.spread(texts, c.ridge)
        learner = Search(gate.to(x.device), space, c.division_power, c.search_bn == "train", judge)
        order = self.generator(task, "order of CLG-CBM's search")
        draws = (Batch(x[i], number[rows[i]]) for i in batches(len(x), c.batch_size, order))
        self.train(learner, plan, draws, "search")
        return concepts.chosen(judge.settle(gate.state_dict())["0.weight"], texts, c.per_class * len(fresh))

    def fit_bottleneck(self, task: Task, sides: Sides, olds: list[int], fresh: list[int], texts: Tensor) -> None:
        """Train W and H, grown by the concepts (M', D) that were chosen."""
        c, state, (x, rows, test, test_rows) = self.config, self.state, sides
        if c.pseudo and olds:
            x, rows = self.with_pseudo(x, rows, olds, fresh)
        kept, born = state.bottleneck, self.generator(task, "birth of CLG-CBM's bottleneck")
        named = torch.cat([kept.get("concepts", texts[:0]), texts])
        weight = grown(kept.get("weight"), len(named), x.shape[1], born).to(x.device)
        heads = grown(kept.get("heads"), len(state.classes), len(named), born).to(x.device)
        first = len(state.tasks) == 1
        lr, epochs = (c.first_lr, c.first_epochs) if first else (None, None)
        plan = Schedule(
            0, c.lr if lr is None else lr, 0, c.batch_size, optimizer="adam", epochs=epochs or c.epochs,
            milestones=c.milestones, gamma=c.gamma,
        ).over(len(x))  # fmt: skip
        judge = Judge(test, test_rows, c.look_every, plan.stride, plan.steps)
        learner = Bottleneck(weight, heads, named, c.sim, c.sparsity, judge)
        self.train(learner, plan, self.draws(task, x, rows, olds), "bottleneck")
        found = judge.settle(learner.parameters())
        state.bottleneck = {"concepts": named, **found}
        likeness = concepts.agreement(scored(x, found["weight"]), x @ named.T).item()
        dense = (found["heads"].abs() > LIGHT).double().mean().item()
        state.noted = {"concepts": len(named), "likeness to concepts": likeness, "weights above 0.01, share": dense}

    def with_pseudo(self, x: Tensor, rows: Tensor, olds: list[int], fresh: list[int]) -> tuple[Tensor, Tensor]:
        """With features of old classes: those of the new class whose mean lies nearest to the old one's text, moved."""
        means = self.state.gaussians["means"].float()
        near = (self.texts()[olds] @ F.normalize(means[fresh], dim=1).T).argmax(1).tolist()
        of = {old: fresh[k] for old, k in zip(olds, near, strict=True)}
        moved = [x[rows == new] - means[new] + means[old] for old, new in of.items()]
        labels = [rows.new_full((len(own),), old) for old, own in zip(of, moved, strict=True)]
        return torch.cat([x, *moved]), torch.cat([rows, *labels])

    def draws(self, task: Task, x: Tensor, rows: Tensor, olds: list[int]) -> Iterator[Batch]:
        """Features in batches, each with draws of two old classes."""
        c, generator = self.config, self.generator(task, "order and draws of CLG-CBM")
        sample, order = gaussians.Sampler(self.state.gaussians), gaussians.shuffled(len(olds), generator)
        size = -(-len(x) // c.batch_size)
        for step, index in enumerate(batches(len(x), c.batch_size, generator)):
            images, labels = x[index], rows[index]
            if c.sg_num and olds:
                two = [olds[int(order[(2 * (step % size) + q) % len(olds)])] for q in (0, 1)]
                images = torch.cat([images, sample.draw(two, gaussians.normal(2 * c.sg_num, x.shape[1], generator))])
                labels = torch.cat([labels, labels.new_tensor(two).repeat_interleave(c.sg_num)])
            yield Batch(images, labels)

    # ---- answering, and why

    def scores(self, seen: Features, rows: list[int]) -> Tensor:
        kept = self.state.bottleneck
        return scored(self.inputs(seen), kept["weight"]) @ kept["heads"][rows].T

    def told(self, shares: Tensor) -> list[Reason]:
        """What each concept contributed (M,), in words. A neighbouring word describes nothing: it is likened to."""
        found = concepts.summed(self.state.phrases, shares, TOLD)
        return (
            found if self.state.file or self.config.concepts else [(f"like “{word}”", share) for word, share in found]
        )

    def explain(self, query: Query, chosen: Sequence[int]) -> list[list[Reason]]:
        columns, rows = known(self.state.classes, query.classes)
        if not rows or query.features is None:
            return [[] for _ in chosen]
        row_of, kept = dict(zip(columns, rows, strict=True)), self.state.bottleneck
        scores = scored(self.inputs(query.features), kept["weight"])
        answers = zip(scores, chosen, strict=True)
        return [self.told(s * kept["heads"][row_of[k]]) if k in row_of else [] for s, k in answers]

    def heaviest(self) -> dict[str, list[Reason]]:
        """By what each concept contributes to a picture at the class's mean."""
        kept, state = self.state.bottleneck, self.state
        if not kept:
            return {}
        shares = kept["heads"] * scored(state.gaussians["means"].float(), kept["weight"])
        return {name: self.told(own) for (name, _), own in zip(state.classes, shares, strict=True)}

    def remarks(self) -> dict[str, float]:
        return {**self.state.noted, **super().remarks()}
