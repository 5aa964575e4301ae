"""After OrthSR (Li et al., "Enhancing Robustness of Vision-Language Models through Orthogonality Learning and Self-
Regularization", 2024, arXiv:2407.08374): rotations of the frozen weights, held near the answers of the model without them.

    W' = W Rᵀ, R orthogonal      in place of each rotated weight: see ``models/rotation.py``
    L = CE + λ·KL(softmax(s·I₀T₀ᵀ) ‖ softmax(s·I Tᵀ))     I₀, T₀: the model without rotations ("bypass"), on the same images
    W ← W Rᵀ, R ← I              when the task is over: plain weights, nothing else is left

Products of rotations are rotations: after a whole stream WWᵀ is still that of the pre-trained weights, which is measured and
said. At R = I the KL is 0, and so is its gradient.

This is no reproduction. No release was found, and of the paper its abstracts and a summary of its ablations could be read. From
there: rotations in both towers, orthogonal by Cayley's form, the KL against the untouched model, a CutOut that follows
attention, evaluation from base to new classes. The rest is chosen here, and an option where another choice was thinkable:
which layers, blocks, the direction and weight of the KL, all of the CutOut (off by default: with probability ``cutout_share``
a square of the model's mean colour around the patch of the frozen model's highest class-token attention, or one drawn in
proportion to it), AdamW and its rate, and everything about a sequence of tasks, of which the paper has none.

Exact shortcuts: R is folded into W once a forward pass; the bypass encodes the texts once a task, and the images too where
they are shown as they are. ``adapt=full`` trains all weights under the same loss, for comparison; rotations alone are
``adapt=rotation`` of any method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.packing import Packed
from perdure.core.seeding import derive
from perdure.data.task import Batch, Context, Task
from perdure.methods.base import Method, Recipe, register
from perdure.models import rotation
from perdure.models.attending import class_attention
from perdure.models.clip import CLIP
from perdure.ops.losses import distillation
from perdure.training.contrastive import of_captions, of_classes
from perdure.training.fit import Backward
from perdure.training.schedule import Schedule


@dataclass(frozen=True)
class Config(Recipe):
    lr: Annotated[float, Field(ge=0, description="peak learning rate, of the rotations' entries")] = 1e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="of the classification loss")] = 0.0
    adapt: Annotated[
        Literal["rotation", "full"], Field(description="rotations of the weights, or all weights for comparison")
    ] = "rotation"
    kl: Annotated[Literal["forward", "reverse"], Field(description="KL(bypass ‖ model), or KL(model ‖ bypass)")] = (
        "forward"
    )
    kl_weight: Annotated[float, Field(ge=0, description="λ; 0: no bypass")] = 1.0
    anchor: Annotated[
        Literal["initial", "previous"], Field(description="the bypass: the pre-trained model, or that before the task")
    ] = "initial"
    augment: Annotated[bool, Field(description="crop training images at random")] = True
    cutout: Annotated[
        Literal["off", "random", "attentive"], Field(description="blank a square: anywhere, or where attention lies")
    ] = "off"
    cutout_at: Annotated[
        Literal["peak", "drawn"], Field(description="attentive: the patch of most attention, or one drawn by it")
    ] = "peak"
    cutout_side: Annotated[float, Field(gt=0, le=1, description="of the square, as a share of the image's side")] = 0.5
    cutout_share: Annotated[float, Field(ge=0, le=1, description="share of the images that lose a square")] = 0.5


@register("orth_sr", paper="arXiv:2407.08374")
class OrthSR(Method):
    """Rotations of the weights, held near the pre-trained model's answers (after OrthSR, of which no release was found)."""

    Config = Config
    plays = ("learn",)

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        if self.config.cutout == "attentive" and clip.kind != "clip":
            raise PerdureError(
                f"cutout=attentive follows the attention of a class token, and the {clip.kind} at {clip.path} has none. Set "
                "cutout=random or off, or use a CLIP."
            )
        super().bind(clip, context)
        self.said: dict[str, float] = {}

    # ---- the bypass

    @contextlib.contextmanager
    def bypass(self) -> Iterator[None]:
        """Meanwhile, the model computes by the anchor's weights: other memory under the same parameters, nothing is copied."""
        held = [parameter.data for parameter, _ in self.frozen]
        self.turning(False)
        for parameter, tensor in self.frozen:
            parameter.data = tensor
        try:
            with torch.no_grad():
                yield
        finally:
            for (parameter, _), tensor in zip(self.frozen, held, strict=True):
                parameter.data = tensor
            self.turning(True)

    def turning(self, on: bool) -> None:
        """Let the rotations act, or not."""
        for _, layer in rotation.rotated(self.clip.backbone):
            layer.rotation.on = on

    def anchored(self) -> list[tuple[Tensor, Tensor]]:
        """What may be other in the anchor than the rotations: parameters of the model, and the anchor's tensors."""
        c, own = self.config, self.clip.plain()
        if c.adapt == "full":
            names = [name for name, tensor in own.items() if tensor.requires_grad]
        else:
            names = [f"{name}.weight" for name, _ in rotation.rotated(self.clip.backbone)]
        if c.anchor == "initial":
            return [(own[name], self.clip.pretrained[name]) for name in names]
        return [(own[name], own[name].detach().clone()) for name in names] if c.adapt == "full" else []

    # ---- learn

    def trains_on(self, task: Task) -> bool:
        self.said = {}  # of the task before
        return super().trains_on(task)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        c = self.config
        self.draw = torch.Generator().manual_seed(derive(self.context.seed, task.name, "squares of CutOut"))
        self.frozen = self.anchored() if c.kl_weight or c.cutout == "attentive" else []
        self.shown: Tensor | None = None
        if c.kl_weight:
            with self.bypass():
                self.texts = self.clip.encode_tokens(self.tokens)
                if not c.augment and c.cutout == "off":
                    self.shown = self.clip.similarity(self.clip.embeddings(task.train.pixels), self.texts)

    def schedule(self, task: Task) -> Schedule:
        return replace(super().schedule(task), augment=self.config.augment)

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch: cross entropy, and the KL against the bypass."""
        c, clip = self.config, self.clip
        images = self.cut(clip.sized(batch.images)) if c.cutout != "off" else batch.images
        wanted = self.wanted(images, batch) if c.kl_weight else None
        embedded = clip.encode_image(images)
        texts = self.frozen_texts if self.frozen_texts is not None else clip.encode_tokens(self.tokens)
        if c.loss == "contrastive":
            losses = {"task": of_captions(c, clip, embedded, batch.get("captions"))}
        else:
            losses = {"task": of_classes(c, clip, embedded, texts, batch.labels, self.group)}
        if wanted is not None:
            form = {"forward": "kl", "reverse": "reverse_kl"}[c.kl]
            losses["kl"] = c.kl_weight * distillation(clip.similarity(embedded, texts), wanted, 1.0, form)
        backward(**losses)

    def wanted(self, images: Tensor, batch: Batch) -> Tensor:
        """(B, C): the logits of the bypass."""
        if self.shown is not None and batch.index is not None:
            return self.shown[batch.index.to(self.shown.device)]
        with self.bypass():
            return self.clip.similarity(self.clip.encode_image(images), self.texts)

    def cut(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), some without a square."""
        c, (count, _, side, _) = self.config, images.shape
        patches = self.clip.patches
        if c.cutout == "random":
            weights = torch.ones(count, patches**2)
        else:
            with self.bypass():
                weights = class_attention(self.clip, images).flatten(1).cpu()
        drawn = torch.multinomial(weights, 1, generator=self.draw).squeeze(1)
        places = drawn if c.cutout == "random" or c.cutout_at == "drawn" else weights.argmax(1)
        chosen = torch.rand(count, generator=self.draw) < c.cutout_share
        half, at = c.cutout_side * side / 2, torch.arange(side) + 0.5
        rows, columns = (((k + 0.5) * side / patches)[:, None] for k in (places // patches, places % patches))
        inside = ((at - rows).abs() < half)[:, :, None] & ((at - columns).abs() < half)[:, None, :]
        gone = (inside & chosen[:, None, None])[:, None].to(images.device)
        return torch.where(gone, self.clip.mean.to(images.dtype), images)

    def pack_progress(self) -> Packed:
        files, values = super().pack_progress()
        return {**files, "draw": {"state": self.draw.get_state()}}, values

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_progress(files, values)
        self.draw.set_state(files["draw"]["state"].cpu())

    # ---- fold

    def finish(self, task: Task) -> None:
        if self.config.adapt == "rotation":
            found = rotation.folded(self.clip.backbone)
            self.clip.load_weights(f"folded {task.name}", found)  # the rotations turn nothing again
            self.said["drift of W Wᵀ, largest"] = max(drift(found[n], self.clip.pretrained[n]) for n in found)
            turned = [float((found[n] - self.clip.pretrained[n]).norm() / found[n].norm()) for n in found]
            self.said["change of the rotated weights, mean share"] = sum(turned) / len(turned)
        self.frozen, self.shown = [], None

    def remarks(self) -> dict[str, float]:
        return self.said


def drift(now: Tensor, then: Tensor) -> float:
    """The largest entry of WWᵀ - W₀W₀ᵀ, as a share of the largest of W₀W₀ᵀ."""
    was = then.double() @ then.double().T
    return float((now.double() @ now.double().T - was).abs().max() / was.abs().max())
