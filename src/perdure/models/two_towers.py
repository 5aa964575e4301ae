"""An image and a text tower into one space, over a transformers model of any architecture: what they all do alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.core import processes
from perdure.core.errors import PerdureError
from perdure.core.features import Features
from perdure.core.pixels import Fit, as_floats, resized
from perdure.core.stopping import in_turn
from perdure.models.held import Held
from perdure.models.loading import Preprocessing
from perdure.models.logits import Logits
from perdure.models.recompute import in_parts
from perdure.models.shared import shared, stretch
from perdure.models.towers import Part

PARTS: dict[str, Part] = {
    "vision_model": "image", "visual_projection": "image", "logit_scale": "scale", "logit_bias": "scale"
}  # fmt: skip


class TwoTowers(Logits, Held):
    """Towers with their tokenizer and preprocessing; the hooks at the end are an architecture's own.

    Weights are fp32 (the master copy); the caller's autocast decides how the towers compute. The final projections and
    everything after them stay in fp32: bf16 hides small differences between similarities.
    """

    usual: ClassVar[Preprocessing]  # where a checkpoint does not say
    class_token: ClassVar[int]  # tokens of the image tower before the patches
    remark: ClassVar[str] = ""  # what someone should know who uses it
    tokenizer: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, tokenizer: Any, mean: Sequence[float], std: Sequence[float], path: str,
        fit: Fit | None = None,
    ):  # fmt: skip
        super().__init__(backbone)
        self.tokenizer = tokenizer
        self.path = path
        self.preprocessing = Preprocessing(tuple(mean), tuple(std), fit or self.usual.fit)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.revision = ""  # of a Hub id: the commit it was loaded from
        self.note = ""  # what someone should know of how it was loaded
        self.files: tuple[Path, list[tuple[str, int, int]]] | None = None  # where they lay, and as what
        self.accumulate = 1  # parts that a batch is cut into where gradients are wanted
        self.evaluation_batch = 256  # images at a time where none are
        self._texts: dict[tuple[tuple[str, ...], ...], Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def size(self) -> int:
        """The side of the images that the image tower sees, in pixels."""
        return self.sides(self.backbone.config.vision_config)[0]

    @property
    def patches(self) -> int:
        """Patches a side."""
        return self.sides(self.backbone.config.vision_config)[1]

    @property
    def fit(self) -> Fit:
        """How a picture is made a square of that size."""
        return self.preprocessing.fit

    @property
    def view(self) -> tuple[int, Fit]:
        """How it is shown pictures: ``images.at(*clip.view)``."""
        return self.size, self.fit

    # ---- images

    def sized(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or float in 0 … 1 → (B, 3, size, size) float in 0 … 1."""
        x = as_floats(images.to(self.device))
        return x if x.shape[-2:] == (self.size, self.size) else resized(x, self.size, self.fit)

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or float in 0 … 1 → the vision tower's input, resized and normalised."""
        return (self.sized(images) - self.mean) / self.std

    def encode_image(self, images: Any) -> Tensor:
        """Unit image embeddings (B, D) in fp32, of images as ``pixels`` takes them, or of such as are still in files."""
        return F.normalize(self.image_features(images), dim=-1)

    def image_features(self, images: Any) -> Tensor:
        """``encode_image`` before it is made unit."""

        def features(images: Tensor) -> Tensor:
            return in_parts(lambda some: self.project(self.pooled(self.seen(some))), images, self.accumulate)

        return shared(features, images)

    def features(self, pixels: Any, block: int = 0, grid: int = 1) -> Features:
        """Many images (N, 3, H, W), in memory or in files, ``evaluation_batch`` at a time, without gradients. ``block``: of
        which block, counted from the last one as 1, the patches are wanted, as means over ``grid`` × ``grid`` fields; 0: of
        none. Kept while ``remembering``. ``PerdureError`` where there is no such block or grid."""
        side = self.checked_side(block, grid)

        def features(images: Tensor) -> Features:
            out = self.seen(images, hidden=block > 0)
            pooled = self.pooled(out).float()
            raw, patches = self.project(pooled), pooled[:, :0]
            if block:
                tokens = out.hidden_states[-block][:, self.class_token :][:, : side**2].float()
                fields = tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)
                patches = F.adaptive_avg_pool2d(fields, grid).flatten(1)
            return Features(F.normalize(raw, dim=-1), pooled, patches, raw.norm(dim=-1, keepdim=True))

        def all_seen() -> Features:
            size = self.evaluation_batch
            parts = in_turn(stretch(pixels).split(size), most=-(-len(pixels) // (size * processes.count())))
            return Features.cat(list(map(features, parts))).mapped(
                lambda tensor: processes.gathered(tensor, len(pixels))
            )

        with torch.no_grad():
            return self.recall(("images", id(pixels), block, grid), pixels, all_seen)

    def embeddings(self, pixels: Any) -> Tensor:
        """``encode_image`` of many images, as ``features`` has it."""
        return self.features(pixels).embedded

    def checked_side(self, block: int, grid: int) -> int:
        """Patches a side; refused where the image tower has no such block, or fewer patches than the grid has fields."""
        blocks, side = self.backbone.config.vision_config.num_hidden_layers, self.patches
        if block > blocks or grid > side:
            raise PerdureError(
                f"block={block}, grid={grid}: the image tower of {self.path} has {blocks} blocks and {side} × {side} patches."
            )
        return side

    # ---- texts

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Unit text embeddings (N, D) in fp32, of token ids (N, L)."""
        return F.normalize(self.text_features(ids), dim=-1)

    def text_features(self, ids: Tensor) -> Tensor:
        """``encode_tokens`` before it is made unit."""
        return shared(lambda some: in_parts(self.read, some, self.accumulate), ids)

    @property
    def token_embedding(self) -> nn.Embedding:
        """What the text tower makes of a token before it adds its position."""
        return self.backbone.text_model.embeddings.token_embedding

    def encode_embeddings(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """``encode_tokens`` with these embeddings (N, L, W) in the place of those of the tokens; pooled, as ever, where
        ``ids`` (N, L) say. ``PerdureError`` where L is longer than the text tower reads."""
        if ids.shape[1] > (context := self.backbone.config.text_config.max_position_embeddings):
            raise PerdureError(
                f"A prompt with learned vectors is {ids.shape[1]} tokens long; the text tower of {self.path} reads {context}. "
                "Take fewer vectors, or shorter names and templates."
            )

        def read(embeddings: Tensor, ids: Tensor) -> Tensor:
            hook = self.token_embedding.register_forward_hook(lambda *_: embeddings)
            try:
                return self.read(ids)
            finally:
                hook.remove()

        return F.normalize(shared(read, embeddings, ids), dim=-1)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit text embeddings (N, D) in fp32."""
        return self.encode_tokens(self.tokens(prompts))

    @torch.no_grad()
    def class_texts(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """(C, D): for each class the mean of its prompts' unit embeddings, made unit again.

        Kept while the weights stay, and longer while ``remembering``; not to be used while they are being trained.
        """
        key = tuple(map(tuple, prompts))

        def encoded() -> Tensor:
            flat, size = [p for ps in prompts for p in ps], 2 * self.evaluation_batch  # a text is shorter than an image
            parts = in_turn(flat[at : at + size] for at in range(0, len(flat), size))
            rows = torch.cat([self.encode_text(part) for part in parts])
            means = torch.stack([e.mean(0) for e in rows.split([len(ps) for ps in prompts])])
            return F.normalize(means, dim=-1)

        if key not in self._texts:
            self._texts[key] = self.recall(("texts", key), None, encoded)
        return self._texts[key]

    def check_lengths(self, prompts: Sequence[str], lengths: Tensor) -> None:
        """Refuse a prompt of more tokens (N,) than the text tower reads."""
        context = self.backbone.config.text_config.max_position_embeddings
        if int(lengths.max()) > context:
            raise PerdureError(
                f"The prompt '{prompts[int(lengths.argmax())]}' is {int(lengths.max())} tokens long; the text tower of "
                f"{self.path} reads {context}. Shorten the class's name or its template."
            )

    # ---- weights

    def part_of(self, name: str) -> Part:
        """What the parameter ``name`` of the backbone belongs to; see ``Towers``."""
        first = name.split(".")[0]
        return PARTS.get(first, "text")

    def changed(self, name: str) -> None:
        """Its weights are others now: forget what was computed with the old ones."""
        super().changed(name)
        self._texts.clear()

    # ---- an architecture's own

    @classmethod
    @abstractmethod
    def sides(cls, vision: Any) -> tuple[int, int]:
        """By the image tower's configuration: the side of its images in pixels, and in patches."""

    @abstractmethod
    def seen(self, images: Tensor, hidden: bool = False) -> Any:
        """What transformers' image tower gives of images as ``pixels`` takes them; ``hidden``: of every block too."""

    @abstractmethod
    def pooled(self, seen: Any) -> Tensor:
        """(B, H): what stands for the whole images."""

    @abstractmethod
    def project(self, pooled: Tensor) -> Tensor:
        """What the image tower pools (B, H) → embeddings (B, D) that are not unit yet, in fp32."""

    @abstractmethod
    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (N, L) of prompts; ``PerdureError`` for one that the text tower cannot read whole."""

    @abstractmethod
    def read(self, ids: Tensor) -> Tensor:
        """(N, D) in fp32, not unit yet, of token ids (N, L), all at once."""
