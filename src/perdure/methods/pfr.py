"""PFR (Gomez-Villa et al., "Continually Learning Self-Supervised Representations with Projected Functional Regularization",
CVPR Workshops 2022, arXiv:2112.15022).

    L = L_own(z₁, z₂) + λ·D,    D = -½ [mean cos(P(f₁), g₁) + mean cos(P(f₂), g₂)]

f: features of the image tower that is trained, g: those of its frozen copy from where the task began, which no gradient
reaches; of two views of each image. P, a small projector (linear to half the width, batch norm, ReLU, linear back), learns
beside the tower and is thrown away with the task: old features need not stay, they must be predictable from the new ones.
Direct distillation (``distil=direct``) is D without P, and asks that they stay.

    own=barlow    the release's: Barlow Twins of z = Z(f), Z a projector of three layers; labels are never looked at
    own=labels    the classification loss, on one view (D then has one term) or two; what suits a CLIP

A task without classes (``perdure learn --unlabelled``) is learned by Barlow Twins, whatever ``own`` says.

As in the release: features are the tower's, before Z; each view goes through P alone. Otherwise than there:
- The model before the first task is a pre-trained one, worth keeping: it is distilled from the first task on
  (``first_task=own``: as released, the first task is L_own alone).
- P and Z are drawn anew for each task. The release's wrapper does not renew P, its script starts a process a task, which does.
- Features are the image embedding before it is made unit, or what the tower pools (``features=pooled``). ``sides=both`` adds
  the same term on the texts of the task's classes, by a projector of their own.
- ``distil_on=synthetic`` takes f and g of image-text pairs as GIFT draws them, fixed for the task, in place of its own images'
  views: what the model knew of the world is asked of pictures of the world. The old features are made once a task.
- Optimisers are perdure's (the release: LARS). Views for Barlow Twins: crops of 0.2 to 1 of the area, mirrored, jittered in
  brightness, contrast and saturation, grey; neither hue, blur nor solarisation.
- A batch of one image is left out of D and Barlow Twins: batch norm can do nothing with it.

P may be any invertible change of features. That is what leaves new tasks their freedom; the texts of a CLIP do not follow it,
so zero-shot ability is protected less than by direct distillation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.packing import Packed
from perdure.core.seeding import derive
from perdure.data.task import Batch, Context, Task
from perdure.data.transforms import random_resized_crop
from perdure.data.views import distorted
from perdure.methods.base import Method, Recipe, register
from perdure.models.clip import CLIP
from perdure.models.recompute import in_parts
from perdure.ops.losses import barlow_twins, projected
from perdure.synthesis.replay import Replay, Synthesis, check_generator
from perdure.training.fit import Backward, batches

Seen = tuple[Tensor, Tensor]  # of a view: features (B, d), and embeddings (B, D) that are not unit


@dataclass(frozen=True)
class Config(Synthesis, Recipe):
    lam: Annotated[float, Field(ge=0, description="λ, weight of D")] = 1.0
    distil: Annotated[
        Literal["projected", "direct", "none"],
        Field(description="D through the projector P, without it (old features must stay), or no D"),
    ] = "projected"
    own: Annotated[
        Literal["labels", "barlow"], Field(description="L_own: classification, or Barlow Twins without any label")
    ] = "labels"
    views: Annotated[Literal[1, 2], Field(description="of an image, where labels are learned; else it is two")] = 1
    features: Annotated[
        Literal["embedding", "pooled"], Field(description="f and g: the embedding before it is unit, or what is pooled")
    ] = "embedding"
    sides: Annotated[
        Literal["image", "both"], Field(description="whose features D is of: images, or the classes' texts too")
    ] = "image"
    distil_on: Annotated[
        Literal["task", "synthetic"], Field(description="images that D is taken on: the task's, or synthetic ones")
    ] = "task"
    synthetic_batch: Annotated[int, Field(ge=2, le=10**6, description="distil_on=synthetic: images a step")] = 64
    first_task: Annotated[
        Literal["distil", "own"], Field(description="the first task: with D, or L_own alone as released")
    ] = "distil"
    barlow_width: Annotated[int, Field(ge=1, le=10**5, description="width of Z")] = 2048
    barlow_off_diagonal: Annotated[float, Field(ge=0, description="weight of correlations of two dimensions")] = 5e-3
    barlow_scale: Annotated[float, Field(gt=0, description="factor on Barlow Twins' loss")] = 0.1


@register("pfr", paper="arXiv:2112.15022")
class PFR(Method):
    """Asks that old image features be predictable from the new ones; learns from images without labels too."""

    Config = Config
    plays, keeps_captions = ("learn",), False
    needs_labels = False

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        super().bind(clip, context)
        c = self.config
        if c.towers == "text":
            raise PerdureError(
                "towers=text: PFR holds image features, which do not move here. Set towers=both or image."
            )
        if c.towers == "image" and c.sides == "both":
            raise PerdureError("sides=both: the texts cannot move with towers=image. Set sides=image, or towers=both.")
        self.beside = nn.ModuleDict()
        self.old: CLIP | None = None
        if c.distil_on == "synthetic":
            check_generator(c, self.context, "distil_on=synthetic", "distil_on=task")
            self.replay = Replay(c, self.context, clip.size, clip.device.type, clip.tokens, clip.fit)

    def begin_task(self, task: Task) -> None:
        c, clip = self.config, self.clip
        self.by_labels = c.own == "labels" and bool(task.classes)
        if task.classes:
            super().begin_task(task)
        self.distils = c.distil != "none" and c.lam > 0 and (task.index > 0 or c.first_task == "distil")
        self.old = clip.frozen_copy() if self.distils and c.distil_on == "task" else None
        self.shown = 0  # batches of synthetic images
        if self.distils and c.distil_on == "synthetic":
            self.replayed(task)
        self.of_texts = self.distils and self.by_labels and c.sides == "both" and len(task.classes) > 1
        if self.of_texts:
            with torch.no_grad():
                self.old_texts = clip.text_features(self.tokens)
        self.beside = nn.ModuleDict(self.heads()).to(clip.device)
        self.draws = torch.Generator().manual_seed(derive(self.context.seed, task.name, "views"))

    @torch.no_grad()
    def replayed(self, task: Task) -> None:
        """Draw the synthetic images, and look at them once as the model is now: it is to be frozen, and they are fixed."""
        before = takewhile(lambda one: one.name != task.name, self.context.tasks)
        self.synthetic = self.replay.pairs(task.name, [text for one in before for text in one.prompts()]).images
        some = self.synthetic.split(min(64, self.clip.evaluation_batch))
        self.old_features = torch.cat([self.encode(self.clip, images)[0] for images in some])
        order = torch.Generator().manual_seed(derive(self.context.seed, task.name, "order of the pairs"))
        self.order = batches(len(self.synthetic), self.config.synthetic_batch, order)

    def heads(self) -> dict[str, nn.Module]:
        """What learns beside the tower while this task is learned: P, that of texts, Z."""
        c, clip, out = self.config, self.clip, dict[str, nn.Module]()
        width = clip.width if c.features == "embedding" else clip.backbone.config.vision_config.hidden_size
        if self.distils and c.distil == "projected":
            out["projector"] = temporal_projector(width)
        if self.of_texts and c.distil == "projected":
            out["text_projector"] = temporal_projector(clip.width)
        if not self.by_labels:
            out["own"] = own_projector(width, c.barlow_width)
        return out

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {**super().parameters(), **{f"beside.{name}": p for name, p in self.beside.named_parameters()}}

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch, each view by the model as it is and as it was."""
        views = self.views(batch.images)
        seen = [self.encode(self.clip, view) for view in views]
        if self.of_texts:  # once a step, for the classification and for D
            texts = self.clip.text_features(self.tokens)
            self.frozen_texts = F.normalize(texts, dim=1)
        known = self.known(views, seen)
        losses = {"task": self.own_loss(seen, batch.labels)}
        with torch.autocast(self.clip.device.type, enabled=False):
            if known:
                head = self.head("projector")
                losses["distil"] = self.config.lam * torch.stack([projected(f, g, head) for f, g in known]).mean()
            if self.of_texts:
                losses["distil_text"] = self.config.lam * projected(texts, self.old_texts, self.head("text_projector"))
        backward(**losses)

    def pack_progress(self) -> Packed:
        files, values = super().pack_progress()
        own = {"beside": dict(self.beside.named_buffers()), "views": {"draws": self.draws.get_state()}}
        return {**files, **own}, {**values, "shown": self.shown}

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_progress(files, values)
        self.draws.set_state(files["views"]["draws"])
        self.shown = values.get("shown", 0)  # earlier versions had no synthetic images
        for _ in range(self.shown):
            next(self.order)
        for name, buffer in self.beside.named_buffers():
            buffer.copy_(files["beside"][name])

    def views(self, images: Tensor) -> list[Tensor]:
        """What of each image (B, 3, S, S) is shown: one view or two."""
        images = self.clip.sized(images)
        if not self.by_labels:
            return [distorted(images, self.draws) for _ in range(2)]
        more = self.config.views - 1
        return [images, *(random_resized_crop(images, images.shape[-1], self.draws) for _ in range(more))]

    def encode(self, clip: CLIP, images: Tensor) -> Seen:
        """The features of a view, and its embeddings."""
        if self.config.features == "embedding":
            raw = clip.image_features(images)
            return raw, raw
        pooled = in_parts(lambda some: clip.pooled(clip.seen(some)).float(), images, clip.accumulate)
        return pooled, clip.project(pooled)

    def own_loss(self, seen: list[Seen], labels: Tensor) -> Tensor:
        """L_own of the views."""
        if self.by_labels:
            parts = [self.classify(F.normalize(raw, dim=1), labels) for _, raw in seen]
            return torch.stack(parts).mean()
        c, one = self.config, seen[0][0]
        if len(labels) < 2:
            return one.sum() * 0
        with torch.autocast(one.device.type, enabled=False):
            first, second = (self.beside["own"](features) for features, _ in seen)
            return barlow_twins(first, second, c.barlow_off_diagonal, c.barlow_scale)

    def known(self, views: list[Tensor], seen: list[Seen]) -> list[tuple[Tensor, Tensor]]:
        """f and g of each term of D: of the views, or of a batch of the synthetic images."""
        if self.distils and self.config.distil_on == "synthetic":
            index = next(self.order)
            self.shown += 1
            terms = [(self.encode(self.clip, self.synthetic[index])[0], self.old_features[index])]
        elif self.old is not None:
            with torch.no_grad():
                before = [self.encode(self.old, view)[0] for view in views]
            terms = [(features, g) for (features, _), g in zip(seen, before, strict=True)]
        else:
            terms = []
        return [(f, g) for f, g in terms if len(f) > 1]

    def head(self, name: str) -> nn.Module:
        """A projector that learns, or what leaves features as they are."""
        return self.beside[name] if name in self.beside else nn.Identity()

    def finish(self, task: Task) -> None:
        self.beside, self.old = nn.ModuleDict(), None


def temporal_projector(width: int) -> nn.Sequential:
    """P."""
    return nn.Sequential(
        nn.Linear(width, width // 2), nn.BatchNorm1d(width // 2), nn.ReLU(), nn.Linear(width // 2, width)
    )


def own_projector(width: int, wide: int) -> nn.Sequential:
    """Z."""
    return nn.Sequential(
        nn.Linear(width, wide), nn.BatchNorm1d(wide), nn.ReLU(),
        nn.Linear(wide, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, wide),
    )  # fmt: skip
