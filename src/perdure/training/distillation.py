"""Distilling a frozen model on reference images and texts that are no pairs: what ZSCL, LwF and iCaRL have in common.

    w·[D(s·R⁰C⁰ᵀ, s·R Cᵀ) + D(s·C⁰R⁰ᵀ, s·C Rᵀ)],    D(t, u) = τ²·mean over rows of CE(softmax(t/τ), log softmax(u/τ))

R⁰ and C⁰ are the teacher's unit embeddings of the reference images of a step and of all reference texts, R the student's of
the images. C is C⁰ (as released: no gradient reaches the text tower), or the student's own.

Exact shortcuts: the teacher embeds texts and images once a task, of the images no more than the steps show; once a run, where
it is the pre-trained model and the references stay. The task's and the reference images go through the image tower together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.weights import interpolate
from perdure.data.files import Pixels, take
from perdure.models.clip import CLIP
from perdure.ops.losses import distillation

NEVER = -1e4  # a logit whose share of any softmax is 0


@dataclass(frozen=True)
class DistillationRecipe:
    """What is distilled, from whom. The defaults are ZSCL's."""

    sides: Annotated[
        Literal["both", "image", "text", "none"],
        Field(description="rows of D: of images over the texts, of texts over the images, or both"),
    ] = "both"
    distil: Annotated[float, Field(ge=0, description="w, weight of D, each side (weight_adjust: 0.5)")] = 1.0
    among_images: Annotated[float, Field(ge=0, description="weight of D between the images of a batch")] = 0.0
    feature_mse: Annotated[float, Field(ge=0, description="weight of the mean squared error of R")] = 0.0
    temperature: Annotated[float, Field(gt=0, description="τ, of distillation")] = 2.0
    embed_texts: Annotated[
        Literal["teacher", "student"], Field(description="whose embeddings C of the reference texts the student has")
    ] = "teacher"
    teacher: Annotated[
        Literal["initial", "previous", "mix"],
        Field(description="which model is distilled: pre-trained, of the task before, or between"),
    ] = "initial"
    teacher_mix: Annotated[float, Field(ge=0, le=1, description="mix: share of the previous model's weights")] = 0.8
    reference_batch: Annotated[int, Field(ge=1, le=10**6, description="reference images a step")] = 64

    @property
    def compares(self) -> bool:
        """Whether images are compared with texts."""
        return self.sides != "none" and self.distil > 0

    @property
    def distils(self) -> bool:
        """Whether any loss is taken on references."""
        return self.compares or self.among_images > 0 or self.feature_mse > 0

    def check_reaches(self, towers: str) -> None:
        """Refuse distillation of which nothing would reach what learns."""
        if self.distils and towers == "text" and not (self.compares and self.embed_texts == "student"):
            raise PerdureError(
                "towers=text: distillation moves the image tower alone, which does not learn here. Set embed_texts=student "
                "(with sides other than none), sides=none, or towers=both."
            )


class Taught:
    """What a teacher makes of images; of those numbered ``index`` alone, where not all are wanted."""

    def __init__(self, teacher: CLIP, pixels: Pixels, index: Tensor | None = None):
        self.pixels, self.whole = pixels, index is None
        wanted = torch.arange(len(pixels)) if index is None else index
        self.place = torch.full((len(pixels),), -1)  # the row of each image; -1: not seen
        self.place[wanted] = torch.arange(len(wanted))
        self.rows = teacher.embeddings(pixels if index is None else take(pixels, index))

    def __getitem__(self, index: Tensor) -> Tensor:
        """Unit embeddings (B, D) of the images ``index``."""
        return self.rows[self.place[index].to(self.rows.device)]


class Distiller:
    """The distillation of one method; ``begin`` or ``rest`` before each task, ``forward`` at each step."""

    def __init__(self, recipe: DistillationRecipe, clip: CLIP):
        self.recipe, self.clip = recipe, clip
        self.taught: Taught | None = None
        self.ids: Tensor | None = None
        self.plan: Iterator[Tensor] | None = None
        self.shown = 0  # steps of the plan that were taken

    def rest(self) -> None:
        """Distil nothing until ``begin``."""
        self.plan, self.shown = None, 0

    def begin(self, pixels: Pixels, ids: Tensor, plan: Sequence[Tensor]) -> None:
        """Let the teacher see the texts ``ids`` (M, L) and ``pixels``; ``plan``: the numbers of those that each step shows.

        Where the steps show fewer than there are, those alone. The very objects of the task before are not looked at again
        where the teacher is the same; what it makes of an image must not depend on which tasks were learned in this process.
        """
        stays, shown = self.recipe.teacher == "initial", torch.cat([*plan, torch.arange(0)])
        with self.teacher():
            if not (stays and self.taught is not None and self.taught.whole and pixels is self.taught.pixels):
                index = None if len(pixels) <= len(shown) else shown.unique()
                self.taught = Taught(self.clip, pixels, index)
            if not stays or ids is not self.ids:
                self.ids = ids
                self.texts = torch.cat(
                    [self.clip.encode_tokens(some) for some in ids.split(self.clip.evaluation_batch)]
                )
        self.plan, self.shown = iter(plan), 0

    def skip(self, steps: int) -> None:
        """Go on after so many steps of the plan."""
        self.shown = steps
        for _ in range(steps if self.plan else 0):
            next(self.plan)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        """Meanwhile, the model holds the teacher's weights."""
        c, clip = self.recipe, self.clip
        with torch.no_grad(), clip.preserved():
            if c.teacher == "initial":
                clip.load_weights("pretrained", clip.pretrained)
            elif c.teacher == "mix":
                clip.load_weights("teacher", interpolate(clip.pretrained, clip.weights(), c.teacher_mix))
            yield

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Unit embeddings (B, D) of a task's images, and the losses on the references of this step."""
        if self.plan is None:
            return self.clip.encode_image(images), {}
        assert self.taught is not None
        index = next(self.plan)
        self.shown += 1
        shown = self.clip.sized(self.taught.pixels[index])
        embedded = self.clip.encode_image(torch.cat([self.clip.sized(images), shown]))
        own, student = embedded.split([len(images), len(index)])
        return own, self.losses(student, self.taught[index])

    def losses(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """The weighted losses of R and R⁰, (B, D) each, by name."""
        c, clip, out = self.recipe, self.clip, {}
        if c.compares:
            assert self.ids is not None
            texts = clip.encode_tokens(self.ids) if c.embed_texts == "student" else self.texts
            found, wanted = clip.similarity(student, texts), clip.similarity(teacher, self.texts)
            if c.sides != "text":
                out["distil_image"] = c.distil * distillation(found, wanted, c.temperature)
            if c.sides != "image":
                out["distil_text"] = c.distil * distillation(found.T, wanted.T, c.temperature)
        if c.among_images:
            found, wanted = apart(clip.similarity(student, student)), apart(clip.similarity(teacher, teacher))
            out["distil_among"] = c.among_images * distillation(found, wanted, c.temperature)
        if c.feature_mse:
            out["feature_mse"] = c.feature_mse * (student - teacher).square().mean()
        return out


def apart(similarity: Tensor) -> Tensor:
    """Similarities (B, B) of images among themselves, none of which is like itself."""
    return similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool, device=similarity.device), NEVER)
