"""CLIP's two towers over ``transformers.CLIPModel``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.features import Features
from perdure.core.pixels import as_floats, resized
from perdure.models import loading
from perdure.models.held import Held
from perdure.models.towers import Part

PARTS: dict[str, Part] = {"vision_model": "image", "visual_projection": "image", "logit_scale": "scale"}


class CLIP(Held):
    """A CLIP model with its tokenizer and preprocessing.

    Weights are fp32 (the master copy); the caller's autocast decides how the towers compute. The final projections and
    everything after them stay in fp32: bf16 hides small differences between similarities.
    """

    tokenizer: Any
    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, tokenizer: Any, mean: Sequence[float], std: Sequence[float], path: str):
        super().__init__(backbone)
        self.tokenizer = tokenizer
        self.path = path
        self.size: int = self.backbone.config.vision_config.image_size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.revision = ""  # of a Hub id: the commit it was loaded from
        self.note = ""  # what someone should know of how it was loaded
        self._texts: dict[tuple[tuple[str, ...], ...], Tensor] = {}

    @classmethod
    def load(cls, path: str, device: str = "cpu") -> CLIP:
        """From a folder or Hub id that ``CLIPModel.from_pretrained`` loads. Raises ``PerdureError`` if it does not."""
        place = loading.locate(path)
        with loading.quiet():
            backbone = loading.backbone(place)
            tokenizer = loading.tokenizer(place)
        mean, std, note = loading.preprocessing(place)
        backbone.set_attn_implementation(attention(backbone.config.vision_config, device))
        clip = cls(backbone.eval(), tokenizer, mean, std, path)
        clip.revision, clip.note = place.revision or "", note
        return clip.to(device)

    # ---- encoding

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def scale(self) -> Tensor:
        """The factor between cosine similarities and logits, exp(logit_scale)."""
        return self.backbone.logit_scale.exp()

    @property
    def bias(self) -> Tensor | None:
        """What is added to logits: nothing, in CLIP."""
        return None

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """s·I·Tᵀ in fp32, of unit embeddings (B, D) and (C, D)."""
        with torch.autocast(images.device.type, enabled=False):
            return self.scale * images @ texts.T

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or float in 0 … 1 → the vision tower's input, resized and normalised."""
        x = as_floats(images.to(self.device))
        if x.shape[-2:] != (self.size, self.size):
            x = resized(x, self.size)
        return (x - self.mean) / self.std

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (N, L), cut after the longest end token: CLIP's text tower is causal, later tokens change nothing."""
        ids = self.tokenizer(list(prompts), padding=True, return_tensors="pt", verbose=False).input_ids
        ends = ids == self.tokenizer.eos_token_id
        if not bool(ends.any(1).all()):
            raise PerdureError(
                f"The tokenizer of {self.path} puts no end token after '{prompts[int((~ends.any(1)).int().argmax())]}', and "
                "CLIP's text is read there. Use the tokenizer that belongs to the model."
            )
        lengths, context = ends.int().argmax(1) + 1, self.backbone.config.text_config.max_position_embeddings
        if int(lengths.max()) > context:
            raise PerdureError(
                f"The prompt '{prompts[int(lengths.argmax())]}' is {int(lengths.max())} tokens long; the text tower of "
                f"{self.path} reads {context}. Shorten the class's name or its template."
            )
        return ids[:, : int(lengths.max())].to(self.device)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit image embeddings (B, D) in fp32, of images as ``pixels`` takes them."""
        return F.normalize(self.image_features(images), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """``encode_image`` before it is made unit."""
        return self.project(self.backbone.vision_model(pixel_values=self.pixels(images)).pooler_output)

    def project(self, pooled: Tensor) -> Tensor:
        """What the image tower pools (B, H) → embeddings (B, D) that are not unit yet, in fp32."""
        with torch.autocast(pooled.device.type, enabled=False):
            return self.backbone.visual_projection(pooled.float())

    def features(self, pixels: Any, block: int = 0, grid: int = 1, size: int = 256) -> Features:
        """Many images (N, 3, H, W), in memory or in files, ``size`` at a time, without gradients. ``block``: of which block,
        counted from the last one as 1, the patches are wanted, as means over ``grid`` × ``grid`` fields; 0: of none. Kept while
        ``remembering``. ``PerdureError`` where there is no such block or grid."""
        side = self.checked_side(block, grid)

        def seen(images: Tensor) -> Features:
            out = self.backbone.vision_model(pixel_values=self.pixels(images), output_hidden_states=block > 0)
            pooled = out.pooler_output.float()
            raw, patches = self.project(pooled), pooled[:, :0]
            if block:
                fields = out.hidden_states[-block][:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
                patches = F.adaptive_avg_pool2d(fields, grid).flatten(1)
            return Features(F.normalize(raw, dim=-1), pooled, patches, raw.norm(dim=-1, keepdim=True))

        def all_seen() -> Features:
            return Features.cat([seen(images) for images in pixels.split(size)])

        with torch.no_grad():
            return self.recall(("images", id(pixels), block, grid), pixels, all_seen)

    def checked_side(self, block: int, grid: int) -> int:
        """Patches a side; refused where the image tower has no such block, or fewer patches than the grid has fields."""
        vision = self.backbone.config.vision_config
        side: int = vision.image_size // vision.patch_size
        if block > vision.num_hidden_layers or grid > side:
            raise PerdureError(
                f"block={block}, grid={grid}: the image tower of {self.path} has {vision.num_hidden_layers} blocks and "
                f"{side} × {side} patches."
            )
        return side

    def embeddings(self, pixels: Any) -> Tensor:
        """``encode_image`` of many images, as ``features`` has it."""
        return self.features(pixels).embedded

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Unit text embeddings (N, D) in fp32, of token ids (N, L)."""
        return F.normalize(self.text_features(ids), dim=-1)

    def text_features(self, ids: Tensor) -> Tensor:
        """``encode_tokens`` before it is made unit."""
        hidden = self.backbone.text_model(input_ids=ids).pooler_output
        with torch.autocast(hidden.device.type, enabled=False):
            return self.backbone.text_projection(hidden.float())

    @property
    def token_embedding(self) -> nn.Embedding:
        """What the text tower makes of a token before it adds its position."""
        return self.backbone.text_model.embeddings.token_embedding

    def encode_embeddings(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """``encode_tokens`` with these embeddings (N, L, W) in the place of those of the tokens; pooled, as ever, where
        ``ids`` (N, L) have the end token. ``PerdureError`` where L is longer than the text tower reads."""
        if ids.shape[1] > (context := self.backbone.config.text_config.max_position_embeddings):
            raise PerdureError(
                f"A prompt with learned vectors is {ids.shape[1]} tokens long; the text tower of {self.path} reads {context}. "
                "Take fewer vectors, or shorter names and templates."
            )
        hook = self.token_embedding.register_forward_hook(lambda *_: embeddings)
        try:
            return self.encode_tokens(ids)
        finally:
            hook.remove()

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit text embeddings (N, D) in fp32."""
        return self.encode_tokens(self.tokens(prompts))

    @torch.no_grad()
    def class_texts(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """(C, D): for each class the mean of its prompts' unit embeddings, made unit again.

        Kept while the weights stay, and longer while ``remembering``; not to be used while they are being trained.
        """
        key = tuple(map(tuple, prompts))

        def worked_out() -> Tensor:
            flat = [prompt for own in prompts for prompt in own]
            encoded = torch.cat([self.encode_text(flat[k : k + 512]) for k in range(0, len(flat), 512)])
            return F.normalize(torch.stack([e.mean(0) for e in encoded.split([len(own) for own in prompts])]), dim=-1)

        if key not in self._texts:
            self._texts[key] = self.recall(("texts", key), None, worked_out)
        return self._texts[key]

    def part_of(self, name: str) -> Part:
        """What the parameter ``name`` of the backbone belongs to; see ``Towers``."""
        return PARTS.get(name.split(".")[0], "text")

    @cached_property
    def pretrained(self) -> dict[str, Tensor]:
        """The weights it was born with, read again from where it was loaded; refused where those are others now."""
        with torch.random.fork_rng(devices=[]):  # whenever it happens, it must not move the caller's draws
            found = CLIP.load(self.path).to(self.device)
        if self.identity and found.fingerprint() != self.identity:
            raise PerdureError(
                f"The CLIP at {self.path} has changed since it was loaded. Put the weights back that the run began with, "
                "or start a new run."
            )
        return found.weights()

    def check_saveable(self) -> None:
        """Refuse what ``save`` could not write, before anything is written."""
        if not hasattr(self.tokenizer, "save_pretrained"):
            raise PerdureError(f"The tokenizer of {self.path} cannot be saved. Load the CLIP with its tokenizer files.")

    def save(self, folder: Path) -> None:
        """Write a checkpoint that plain transformers loads: adapters merged, tokenizer and preprocessing beside."""
        from transformers import CLIPImageProcessor, CLIPModel

        self.check_saveable()
        plain = CLIPModel(self.backbone.config)
        plain.load_state_dict(self.weights(), strict=False)
        mean, std = (x.flatten().tolist() for x in (self.mean, self.std))
        crop = {"height": self.size, "width": self.size}
        processor = CLIPImageProcessor(
            size={"shortest_edge": self.size}, crop_size=crop, image_mean=mean, image_std=std, do_convert_rgb=True
        )
        with loading.quiet():
            plain.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)

    def changed(self, name: str) -> None:
        """Its weights are others now: forget what was computed with the old ones."""
        super().changed(name)
        self._texts.clear()


def attention(vision: Any, device: str) -> str:
    """Plain products for a processor and few patches, where torch's fused attention is slower (bf16, backwards: by half)."""
    patches = (vision.image_size // vision.patch_size) ** 2
    return "eager" if device == "cpu" and patches <= 64 else "sdpa"
