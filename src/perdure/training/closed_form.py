"""Training by solving: a linear head over random features, from running sums. No steps are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.memory import check_square
from perdure.models.heads import Gate, Row
from perdure.models.lift import Draw, RandomLayer
from perdure.ops import ridge

CHUNK = 1024  # images at a time
LAMBDAS = tuple(10 ** (k / 2) for k in range(-8, 1))  # times the mean ‖φ‖² of the first task
TEMPERATURES = tuple(2.5 * 2 ** (k / 2) for k in range(11))
HELD_OUT = tuple(10.0**k for k in range(-8, 9))  # RanPAC's candidates for λ, absolute


OPEN = ("lam", "temperature", "weight")  # what can be chosen
Chosen = Literal["chosen"]


@dataclass(frozen=True)
class ClosedFormRecipe:
    """How a closed-form head is learned, and how it answers."""

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

    def open(self, key: str) -> bool:
        """Whether an option is to be chosen; raw scores have no temperature."""
        return getattr(self, key) == "chosen" and not (key == "temperature" and self.score == "raw")

    def check(self) -> None:
        """Refuse options that do not go together."""
        missing = [key for key in OPEN if self.open(key)]
        if self.choose == "fixed" and missing:
            raise PerdureError(f"choose=fixed: give a number for {', '.join(missing)}, or choose=loo.")
        if self.choose == "holdout" and (rest := [key for key in missing if key != "lam"]):
            raise PerdureError(f"choose=holdout chooses lam alone: give a number for {', '.join(rest)}, or choose=loo.")
        if self.score == "raw" and self.open("weight"):
            raise PerdureError("score=raw gives no probabilities to choose a weight by: give weight a number.")


@dataclass
class Sums:
    """What outlives a task: the running sums, what they are of, and what was chosen by them."""

    classes: list[Row] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # images by class
    tasks: list[str] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)  # gram, packed (M(M + 1)/2); cross (M, C); solution (M, C)
    layer: str = ""  # sha256 of W
    scale: float = 0.0  # mean ‖φ‖² of the first task's images
    images: int = 0  # that λ, τ and w were judged by
    evidence: ridge.Evidence = field(default_factory=list)  # Σ over tasks, by λ and τ
    # by τ, of the λ of the day, where λ was judged by fewer features
    evidence_of_all: ridge.Evidence = field(default_factory=list)
    lam: float = 0.0
    temperature: float = 1.0
    weight: float = 1.0
    moved: dict[str, float] = field(
        default_factory=dict
    )  # by task: how far its images' features moved while it was learned


class ClosedForm:
    """A = (G + λI)⁻¹b over all images ever added, whatever their order: G = Σ φφᵀ, b = Σ φyᵀ, in fp64."""

    def __init__(self, kept: Sums, lift: RandomLayer, warn: Callable[[str], None]):
        self.kept, self.lift, self.warn = kept, lift, warn
        self.known = False  # whether the sums are known to be of this W

    def add(self, x: Tensor, rows: Tensor, classes: int) -> None:
        """Add images x (N, width) of the classes ``rows`` (N,) out of ``classes``."""
        kept, first = self.kept.sums, self.lift(x[:1])
        width = self.checked(first.shape[1])
        gram = ridge.unpack(kept["gram"]) if kept else first.new_zeros(width, width)
        cross = first.new_zeros(width, classes)
        if kept:
            cross[:, : kept["cross"].shape[1]] = kept["cross"]
        squares = 0.0
        for some, row in zip(x.split(CHUNK), rows.to(x.device).split(CHUNK), strict=True):
            lifted = self.lift(some)
            gram.addmm_(lifted.T, lifted)
            cross.index_add_(1, row, lifted.T)
            squares += lifted.square().sum().item()
        self.kept.layer = self.lift.mark()
        self.kept.scale = self.kept.scale or squares / len(x)
        self.kept.sums = {"cross": cross, "gram": ridge.pack(gram)}
        self.unsolved()

    def forget(self, before: Sums, after: Sums, rows: Sequence[int]) -> None:
        """Take away what was added between two earlier states: exact unlearning, up to fp64's rounding. ``rows``: where the
        classes of ``after`` stand now; those that are left without images go."""
        kept, new = self.kept, after.sums["cross"].clone()
        gram, counts = kept.sums["gram"] - after.sums["gram"], list(kept.counts)
        if before.sums:
            new[:, : len(before.classes)] -= before.sums["cross"]
            gram += before.sums["gram"]
        for row, count, old in zip(rows, after.counts, [*before.counts, *[0] * len(rows)], strict=False):
            counts[row] -= count - old
        cross, left = kept.sums["cross"].clone(), [k for k, count in enumerate(counts) if count]
        cross[:, rows] -= new
        kept.classes, kept.counts = [kept.classes[k] for k in left], [counts[k] for k in left]
        kept.sums = {"cross": cross[:, left].clone(), "gram": gram} if left else {}
        kept.images -= after.images - before.images
        for name in ("evidence", "evidence_of_all"):
            now, then, once = (getattr(one, name) for one in (kept, after, before))
            if now and then:
                setattr(kept, name, ridge.added(ridge.added(now, ridge.times(then, -1)), once or ridge.times(then, 0)))
        self.unsolved()

    def checked(self, width: int) -> int:
        """``width``; refused where it does not fit into memory, or where the sums were made with another, or another W."""
        known = len(self.kept.sums["cross"]) if self.kept.sums else width
        if known != width:
            raise PerdureError(f"The ridge head was learned with {known} features, and is asked with {width} now.")
        self.lift.check(self.kept.layer)
        check_square(width, 4, "A ridge head", "features")  # the sums, shifted, factored, and one on the way
        return width

    def solved(self) -> Tensor:
        """A (M, C), made from the sums when it is first asked for, and kept beside them."""
        if "solution" not in self.kept.sums:
            kept = self.kept
            factor, jitter = ridge.cholesky(ridge.unpack(kept.sums["gram"]), kept.lam)
            if jitter:
                self.warn(f"The ridge head's sums are nearly singular: {jitter:.1e} was added to λ = {kept.lam:.1e}.")
            kept.sums["solution"] = ridge.solve(factor, kept.sums["cross"])
        return self.kept.sums["solution"]

    def unsolved(self) -> None:
        """The sums, or λ, are others now."""
        self.kept.sums.pop("solution", None)

    def scores(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """φA (N, len(rows)), fp64, of x (N, width)."""
        if not self.known:
            self.checked(self.lift(x[:1]).shape[1])
            self.known = True
        columns = self.solved()[:, rows]
        return torch.cat([self.lift(some) @ columns for some in x.split(CHUNK)])

    # ---- choosing λ

    def left_out(
        self,
        x: Tensor,
        rows: Tensor,
        columns: Sequence[int],
        copies: Sequence[Tensor],
        lams: Sequence[float],
        width: int,
    ) -> Iterator[Tensor]:
        """For each λ, the scores (N, C') of added images for the classes ``columns``, each as if it had not been added, by a
        head of the first ``width`` features. ``copies``: groups of images that are left out together."""
        wanted, rows = torch.tensor(columns, device=x.device), rows.to(x.device)
        groups = ridge.whole_groups(len(rows), copies, CHUNK)

        def parts() -> Iterator[ridge.Part]:
            for index, among in groups:
                yield index, self.lift(x[index], width), (rows[index].unsqueeze(1) == wanted).double(), among

        gram, cross = ridge.unpack(self.kept.sums["gram"]), self.kept.sums["cross"]
        return ridge.left_out_course(gram[:width, :width], cross[:width, columns], lams, parts, len(rows))

    def choose(
        self, recipe: ClosedFormRecipe, judged: ridge.Judged, columns: Sequence[int], x: Tensor, rows: Tensor,
        copies: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Add the evidence of the images last added to that of those before, and take λ, τ and w where it is likeliest."""
        c, kept, whole = recipe, self.kept, len(self.kept.sums["cross"])
        lams, taus = self.lams(c), self.taus(c)
        share = None if c.open("weight") else float(c.weight)

        def evidence(lams: Sequence[float], width: int) -> ridge.Evidence:
            course = self.left_out(x, rows, columns, copies, lams, width)
            return [
                judged.error(s, share or 0.0) if c.score == "raw" else judged.evidence(s, taus, share) for s in course
            ]

        width = min(c.judge or whole, whole) if c.lam == "chosen" else whole
        kept.evidence = ridge.added(kept.evidence, evidence(lams, width))
        kept.images += len(x)
        self.settle(c)
        if width < whole:
            kept.evidence_of_all = ridge.added(kept.evidence_of_all, evidence([kept.lam], whole))
            self.settle(c)
        self.unsolved()

    def settle(self, recipe: ClosedFormRecipe) -> None:
        """Take λ, τ and w where the evidence is likeliest."""
        kept = self.kept
        if not kept.evidence or not kept.images:
            return
        lam, tau = ridge.likeliest(kept.evidence)
        kept.lam, found = self.lams(recipe)[lam], kept.evidence[lam]
        if kept.evidence_of_all:
            (found,), (_, tau) = kept.evidence_of_all, ridge.likeliest(kept.evidence_of_all)
        kept.temperature, kept.weight = self.taus(recipe)[tau], found[tau][1] / kept.images

    def lams(self, recipe: ClosedFormRecipe) -> list[float]:
        """The values that λ may take."""
        return [self.kept.scale * k for k in LAMBDAS] if recipe.lam == "chosen" else [float(recipe.lam)]

    def taus(self, recipe: ClosedFormRecipe) -> Sequence[float]:
        """The values that τ may take."""
        if recipe.open("temperature"):
            return TEMPERATURES
        return [1.0 if recipe.score == "raw" else float(recipe.temperature)]

    def held_out(self, x: Tensor, labels: Tensor, order: Tensor) -> float:
        """λ by RanPAC's rule: fitted on the first four fifths of x (N, width), in ``order``, judged on the rest."""
        fitted, order = int(0.8 * len(order)), order.to(x.device)
        if not 0 < fitted < len(order):
            return self.kept.lam or self.kept.scale  # one image: nothing to judge by
        targets = F.one_hot(labels.to(x.device)[order]).double()
        return ridge.best_on_held_out(self.lift(x[order]), targets, fitted, HELD_OUT)
