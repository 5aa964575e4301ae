"""What a concept bottleneck trains, on features: a search that says which concepts count, and the bottleneck itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from perdure.core.packing import Packed
from perdure.core.paths import placed
from perdure.data.task import Batch
from perdure.ops.concepts import Spread, agreement
from perdure.ops.losses import classification
from perdure.training.fit import Backward, Stepper


@dataclass(frozen=True)
class BottleneckOptions:
    """Which concepts there are, how some are chosen, how the bottleneck is trained."""

    concepts: Annotated[
        str,
        AfterValidator(placed),
        Field(description="JSON file {class: [concept, …]}; empty: words of the vocabulary near each class"),
    ] = ""
    concept_names: Annotated[
        str,
        AfterValidator(placed),
        Field(description="JSON file of the classes' names by the ids of concepts; empty: it has the names"),
    ] = ""
    prefix: Annotated[str, Field(description="what a concept of a file is read after")] = (
        "A bad photo of an object with "
    )
    neighbours: Annotated[int, Field(ge=1, le=10**6, description="words of the vocabulary a class")] = 25
    per_class: Annotated[int, Field(ge=1, le=10**6, description="concepts chosen a class")] = 10
    search_epochs: Annotated[int, Field(ge=1, le=10**6, description="of the search for concepts")] = 31
    search_lr: Annotated[float, Field(ge=0, description="of the search, by Adam")] = 1e-2
    search_bn: Annotated[
        Literal["train", "release"], Field(description="release: running statistics after the first epoch")
    ] = "train"
    division_power: Annotated[float, Field(ge=0, description="of m₀, by which the search's regulariser is divided")] = 5
    ridge: Annotated[float, Field(ge=0, description="on the covariance of the candidates")] = 1e-4
    lr: Annotated[float, Field(ge=0, description="of the bottleneck, by Adam")] = 1e-3
    first_lr: Annotated[float | None, Field(ge=0, description="of the first task; none: lr")] = None
    epochs: Annotated[int, Field(ge=1, le=10**6, description="passes over a task's and old classes' features")] = 60
    first_epochs: Annotated[int | None, Field(ge=1, le=10**6, description="of the first task; none: epochs")] = None
    milestones: Annotated[tuple[int, ...], Field(description="epochs where the rate falls; or none")] = (30, 40, 50)
    gamma: Annotated[float, Field(ge=0, le=1, description="factor on the rate at each milestone")] = 0.1
    batch_size: Annotated[int, Field(ge=1, le=10**6, description="features a step, of the search too")] = 64
    pseudo: Annotated[bool, Field(description="features of new classes moved to the means of old ones")] = True
    sg_num: Annotated[int, Field(ge=0, le=10**6, description="draws a step of each of two old classes")] = 1
    sim: Annotated[float, Field(ge=0, description="weight of the likeness of scores to concepts; 0: none")] = 1.0
    sparsity: Annotated[float, Field(ge=0, description="weight of the elastic net on the heads")] = 1e-3
    keep_weights: Annotated[
        Literal["last", "held_out", "best_of_test"],
        Field(description="the last, or the best by held-out training images; by test images: refused in a run"),
    ] = "last"
    look_every: Annotated[int, Field(ge=1, le=10**6, description="epochs between looks for the best weights")] = 10


@dataclass
class Judge:
    """Keeps the best weights by their accuracy on features (N, D) with labels (N,), looked at every ``every`` epochs from the
    first on, and at the last; ``size`` steps an epoch, ``steps`` in all. Without features it never looks."""

    features: Tensor | None
    labels: Tensor | None
    every: int
    size: int
    steps: int
    best: float = 0.0
    kept: dict[str, Tensor] = field(default_factory=dict)
    settled: bool = False  # whether the last look found nothing better

    def due(self, step: int) -> bool:
        """Whether to look after so many steps."""
        whole, epoch = step % self.size == 0, step // self.size - 1
        return self.features is not None and whole and (epoch % self.every == 0 or step == self.steps)

    def look(self, logits: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights if their logits (N, C) of its features are right more often than any before."""
        assert self.labels is not None
        share = logits.argmax(1).eq(self.labels).double().mean().item()
        self.settled = share <= self.best
        if not self.settled:
            self.best, self.kept = share, {name: t.detach().clone() for name, t in weights.items()}

    def pack(self) -> Packed:
        """What it has kept so far."""
        return {"judge": self.kept}, {"best": self.best, "settled": self.settled}

    def unpack(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """The inverse of ``pack``."""
        self.best, self.settled = values["best"], values["settled"]
        self.kept = {
            name: t.to(self.labels.device) for name, t in files.get("judge", {}).items() if self.labels is not None
        }

    def settle(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights to go on with: the best; where none was ever right, or none was looked at, ``weights``."""
        return self.kept or {name: t.detach().clone() for name, t in weights.items()}


def new_gate(width: int, candidates: int, classes: int, seed: int) -> nn.Sequential:
    """D → N → batch norm → n."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(width, candidates, bias=False), nn.BatchNorm1d(candidates), nn.Linear(candidates, classes)
        )


class Search(Stepper):
    """Trains a gate whose first layer's rows are to lie among the concepts.

    ``power``: of m₀ in the regulariser's weight; ``thaws``: whether batch norm goes on by each batch after the first epoch.
    """

    def __init__(self, gate: nn.Sequential, space: Spread, power: float, thaws: bool, judge: Judge):
        self.gate, self.space, self.power, self.thaws, self.judge = gate, space, power, thaws, judge
        self.gate.train()

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.gate.named_parameters())

    def step(self, batch: Batch, backward: Backward) -> None:
        rows = self.gate.get_parameter("0.weight")
        with torch.autocast(rows.device.type, enabled=False):
            unit = rows / rows.norm(dim=1, keepdim=True).detach()
            away = (self.space.distances(unit).mean() - self.space.typical).abs() / self.space.typical**self.power
            backward(search=classification(self.logits(batch.images), batch.labels), regularizer=away)

    def logits(self, x: Tensor) -> Tensor:
        """(B, n); one feature alone is no batch to be normalised by."""
        alone = len(x) == 1 and self.gate.training
        self.gate.train(self.gate.training and not alone)
        out: Tensor = self.gate(x)
        self.gate.train(self.gate.training or alone)
        return out

    def stepped(self, step: int) -> None:
        if step % self.judge.size == 0 and not self.thaws:
            self.gate.eval()
        if self.judge.due(step):
            was = self.gate.training
            with torch.no_grad():
                self.judge.look(self.gate.eval()(self.judge.features), self.gate.state_dict())
            self.gate.train(was)

    def enough(self, steps: int) -> bool:
        return self.judge.settled

    def pack_progress(self) -> Packed:
        files, values = self.judge.pack()
        return {**files, "gate": dict(self.gate.named_buffers())}, {**values, "training": self.gate.training}

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        self.judge.unpack(files, values)
        self.gate.train(values["training"])
        for name, buffer in self.gate.named_buffers():
            buffer.copy_(files["gate"][name])


class Bottleneck(Stepper):
    """Trains all rows of W (M, D) and all heads H (C, M); ``concepts`` (M, D): unit texts of what the rows are called."""

    def __init__(self, weight: Tensor, heads: Tensor, concepts: Tensor, sim: float, sparsity: float, judge: Judge):
        self.weight, self.heads = nn.Parameter(weight.clone()), nn.Parameter(heads.clone())
        self.concepts, self.sim, self.sparsity, self.judge = concepts, sim, sparsity, judge

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {"weight": self.weight, "heads": self.heads}

    def step(self, batch: Batch, backward: Backward) -> None:
        x = batch.images
        with torch.autocast(x.device.type, enabled=False):
            scores, heads = scored(x, self.weight), self.heads
            losses = {"bottleneck": classification(scores @ heads.T, batch.labels)}
            if self.sim:
                losses["alignment"] = -self.sim * agreement(scores, x @ self.concepts.T)
            if self.sparsity:  # an elastic net of 0.99 : 0.01
                losses["sparsity"] = self.sparsity * (0.99 * heads.abs().sum() + 0.005 * heads.square().sum())
            backward(**losses)

    def stepped(self, step: int) -> None:
        if self.judge.due(step):
            assert self.judge.features is not None
            with torch.no_grad():
                self.judge.look(scored(self.judge.features, self.weight) @ self.heads.T, self.parameters())

    def pack_progress(self) -> Packed:
        return self.judge.pack()

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        self.judge.unpack(files, values)


def scored(x: Tensor, weight: Tensor) -> Tensor:
    """(N, M): the scores of concepts W (M, D) for features x (N, D)."""
    return F.normalize(x, dim=1) @ weight.T


def grown(old: Tensor | None, rows: int, width: int, generator: torch.Generator) -> Tensor:
    """A linear layer's weight (rows, width) at birth, as torch has it, with ``old`` in its first rows and columns."""
    weight = torch.empty(rows, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
    if old is not None:
        weight = weight.to(old.device)
        weight[: old.shape[0], : old.shape[1]] = old
    return weight


def held_out(rows: Tensor, generator: torch.Generator) -> Tensor:
    """(N,): whether a feature is held out; a tenth of each of the classes ``rows`` (N,), one at least, but of one alone."""
    out = torch.zeros(len(rows), dtype=torch.bool)
    for row in rows.unique().tolist():
        own = (rows == row).nonzero().squeeze(1).cpu()
        some = own[torch.randperm(len(own), generator=generator)]
        out[some[: min(max(1, len(own) // 10), len(own) - 1)]] = True
    return out.to(rows.device)
