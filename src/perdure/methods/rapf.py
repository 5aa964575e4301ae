"""RAPF (Huang et al., "Class-Incremental Learning with CLIP: Adaptive Representation Adjustment and Parameter Fusion",
ECCV 2024, arXiv:2407.14143).

    logits   s·⟨Wf/‖Wf‖, t⟩            f: image features of the frozen CLIP, t: unit texts; one linear map W learns
    loss     CE over all classes seen, on the task's images and on draws of old classes
             + mean relu(⟨Wg/‖Wg‖, t_new⟩ - ⟨Wg/‖Wg‖, t_old⟩ + margin), g drawn of an old class whose text lies near a new one
    draws    μ + Lε, LLᵀ = Σ, of each class's f: W may change, they do not grow old
    fusion   W_old = USVᵀ, R = UᵀW, R_old = SVᵀ, M = min(1, |R - R_old| / max|R - R_old| + b), W ← U(M⊙R + (1 - M)⊙R_old)

As in the release: Adam anew each task, the rate a tenth after two milestones; of each old class that a batch replays
int(10β) draws, of each near pair int(20β), the latter in the hinge alone; the map goes on from its fused self. Exact shortcuts:
features and texts once a task, a Cholesky factor once a class. Otherwise than there, unless a preset says so:
- W starts as the identity (the release: random, ``init=random``, so that the first task starts from nothing).
- How many old classes a batch replays follows from the release's own aim of 2,000 draws an epoch (there: 2, 4, 5 or 10 by
  data set, ``replayed``). Gaussians are shrunk, pairs are near by a quantile (``near=0.03q``) of the distances of all texts.
- Texts are the mean over a class's templates; images are not rounded to half precision.
- A class that was never learned keeps the probability of its text: W has seen nothing of it. The release knows no such class.
- A class of one image is a point but for the ridge of 1e-4 (the release: not a number). A class that comes again is the
  Gaussian of all its images. A task that moves W nowhere leaves it as it was (the release: 0/0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from perdure.core.features import Features
from perdure.core.seeding import derive
from perdure.data.task import Batch, Task
from perdure.methods.base import register
from perdure.methods.base_head import HeadMethod, HeadOptions, HeadState
from perdure.ops import gaussians
from perdure.ops.losses import classification
from perdure.training.fit import Backward, Stepper, batches
from perdure.training.schedule import Schedule

AIM = 2000  # draws an epoch


@dataclass(frozen=True)
class Config(HeadOptions):
    lr: Annotated[float, Field(ge=0, description="of W, by Adam")] = 1e-3
    epochs: Annotated[int, Field(ge=0, le=10**6, description="passes over a task's features")] = 15
    batch_size: Annotated[int, Field(ge=1, le=10**6, description="features of the task a step")] = 64
    milestones: Annotated[tuple[int, ...], Field(description="epochs where the rate falls by gamma, or none")] = (4, 10)
    gamma: Annotated[float, Field(ge=0, le=1, description="factor on the rate at each milestone")] = 0.1
    init: Annotated[Literal["identity", "random"], Field(description="how W starts, before the first task")] = (
        "identity"
    )
    beta: Annotated[float, Field(ge=0, description="draws: int(10β) a replayed class, int(20β) a near pair")] = 2.0
    replayed: Annotated[
        int, Field(ge=0, le=10**6, description="old classes a batch; 0: so many that an epoch has 2,000 draws")
    ] = 0
    shrink: Annotated[bool, Field(description="draw from shrunk covariances")] = True
    near: Annotated[
        Annotated[float, Field(ge=0)] | Annotated[str, Field(pattern=r"^(0?\.\d+|1(\.0+)?|0)q$")],
        Field(description="distance of texts below which a pair is near; 0.03q: that quantile of all distances"),
    ] = "0.03q"
    hinge: Annotated[float, Field(ge=0, description="weight of the loss on near pairs; 0: none")] = 1.0
    margin: Annotated[float, Field(description="of that loss")] = 0.1
    fusion: Annotated[
        float, Field(ge=0, le=1, description="b: what hardly moved keeps the share 1 - b of the old W; 1: no fusion")
    ] = 0.6


@dataclass
class Adapted(HeadState):
    """W (``map``: weight (D, D), and the texts (C, D) that it is asked with), the classes' Gaussians, the last near pairs."""

    map: dict[str, Tensor] = field(default_factory=dict)
    gaussians: dict[str, Tensor] = field(default_factory=dict)
    pairs: int = 0


@register("rapf", paper="arXiv:2407.14143")
class RAPF(HeadMethod):
    """One linear map on frozen image features; old classes replayed as Gaussians, near names pushed apart, the map fused."""

    Config = Config
    State = Adapted
    state: Adapted

    def calibrate(self, task: Task) -> None:
        c, state = self.config, self.state
        old = len(state.classes)
        x, place = self.learned_on(task)
        rows, texts = place[task.train.labels], self.texts()
        weight = state.map["weight"] if state.map else self.born(x.shape[1]).to(x.device)
        fresh = [row for row in place.tolist() if row >= old]
        pairs = near_pairs(texts, old, fresh, c.near) if c.hinge else []
        adapter = Adapter(weight, texts, self.clip.scale.item(), pairs, c)
        plan = Schedule(
            0, c.lr, 0, c.batch_size, optimizer="adam", epochs=c.epochs, milestones=c.milestones, gamma=c.gamma
        ).over(len(x))
        self.train(adapter, plan, self.draws(task, x, rows, pairs), "map")
        state.gaussians = gaussians.add(state.gaussians, x, rows, len(state.classes))
        trained = adapter.weight.detach()
        state.map = {"weight": fused(weight, trained, c.fusion) if old else trained, "texts": texts}
        state.pairs = len(pairs)

    def born(self, width: int) -> Tensor:
        """W before the first task."""
        if self.config.init == "identity":
            return torch.eye(width)
        draw = torch.Generator().manual_seed(derive(self.context.seed, "map of RAPF"))
        return torch.empty(width, width).uniform_(-(width**-0.5), width**-0.5, generator=draw)

    def draws(self, task: Task, x: Tensor, rows: Tensor, pairs: list[tuple[int, int]]) -> Iterator[Batch]:
        """The task's features in batches, each with draws of some old classes, and of the old one of each near pair."""
        c, generator, order = self.config, self.generator(task, "order and draws of RAPF"), torch.empty(0)
        each, edge = int(10 * c.beta), int(20 * c.beta)
        old = len(self.state.gaussians["counts"]) if self.state.gaussians else 0
        size = -(-len(x) // c.batch_size)
        most = each and (c.replayed or min(old, -(-AIM // (each * size))))
        sample = gaussians.Sampler(self.state.gaussians, c.shrink) if old else None
        for step, index in enumerate(batches(len(x), c.batch_size, generator)):
            images, labels, edges = x[index], rows[index], x[:0]
            if sample:
                place = step % size
                order = order if place else gaussians.shuffled(old, generator)
                some = [int(order[(place * most + q) % old]) for q in range(most)]
                noise = gaussians.normal(most * each + len(pairs) * edge, x.shape[1], generator)
                images = torch.cat([images, sample.draw(some, noise[: most * each])])
                labels = torch.cat([labels, rows.new_tensor(some).repeat_interleave(each)])
                edges = sample.draw([i for i, _ in pairs], noise[most * each :])
            yield Batch(images, labels, edges=edges)

    def scores(self, seen: Features, rows: list[int]) -> Tensor:
        found = self.state.map
        adapter = Adapter(found["weight"], found["texts"][rows], self.clip.scale.item(), [], self.config)
        with torch.no_grad():
            return adapter.logits(self.inputs(seen))

    def remarks(self) -> dict[str, float]:
        return {"near pairs": self.state.pairs, **super().remarks()}


class Adapter(Stepper):
    """W, and its loss."""

    def __init__(self, weight: Tensor, texts: Tensor, scale: float, pairs: list[tuple[int, int]], config: Config):
        self.weight, self.texts, self.scale, self.config = nn.Parameter(weight.clone()), texts, scale, config
        self.pairs = torch.tensor(pairs, dtype=torch.int64, device=texts.device).reshape(-1, 2)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {"weight": self.weight}

    def adapted(self, features: Tensor) -> Tensor:
        """Wf/‖Wf‖ (N, D), in fp32."""
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(features @ self.weight.T, dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """(N, C)."""
        with torch.autocast(features.device.type, enabled=False):
            return self.scale * self.adapted(features) @ self.texts.T

    def step(self, batch: Batch, backward: Backward) -> None:
        losses = {"map": classification(self.logits(batch.images), batch.labels)}
        if len(batch.edges):
            draws = self.adapted(batch.edges).unflatten(0, (len(self.pairs), -1))
            towards = self.texts[self.pairs[:, 1]] - self.texts[self.pairs[:, 0]]
            losses["hinge"] = self.config.hinge * F.relu((draws * towards[:, None]).sum(2) + self.config.margin).mean()
        backward(**losses)


def near_pairs(texts: Tensor, old: int, fresh: list[int], near: float | str) -> list[tuple[int, int]]:
    """(i, j): each of the ``old`` first classes and each fresh one whose unit texts (C, D) lie nearer than ``near``."""
    far = torch.cdist(texts, texts, compute_mode="donot_use_mm_for_euclid_dist")
    if isinstance(near, str):
        apart = far[torch.ones_like(far, dtype=torch.bool).triu(1)]  # each pair once
        near = apart.quantile(float(near[:-1])).item() if len(apart) else 0.0
    return [(i, fresh[j]) for i, j in (far[:old, fresh] < near).nonzero().tolist()]


@torch.no_grad()
def fused(old: Tensor, new: Tensor, bias: float) -> Tensor:
    """What moved most of W (D, D), seen in the singular basis of the old one, is taken; of the rest the share ``bias``."""
    if torch.equal(old, new):
        return new
    u, s, v = torch.linalg.svd(old)
    before, after = s[:, None] * v, u.T @ new
    moved = (after - before).abs()
    share = (moved / moved.max() + bias).clamp_max(1)
    return u @ (share * after + (1 - share) * before)
