"""CLIP over ``transformers.CLIPModel``; and from where to where it and its kin (``siglip.py``) are read and written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.tensors import plain_errors
from perdure.models import hub, loading
from perdure.models.held import fingerprint_of
from perdure.models.loading import Preprocessing
from perdure.models.two_towers import TwoTowers


class CLIP(TwoTowers):
    """CLIP, and the name for all of its kin: what a method is given."""

    kind = "clip"
    usual = Preprocessing()
    class_token = 1

    @classmethod
    def load(cls, path: str, device: str = "cpu") -> CLIP:
        """From a folder or Hub id that transformers' ``CLIPModel``, ``SiglipModel`` or ``Siglip2Model`` load: by what its
        config.json says, a CLIP or one of its kin. Raises ``PerdureError`` if it is neither."""
        from perdure.models.siglip import SigLIP, SigLIP2

        place = hub.locate(path)
        stamp = hub.stamp(place.folder)
        kind = {"clip": CLIP, "siglip": SigLIP, "siglip2": SigLIP2}[place.kind]
        with loading.quiet():
            backbone = loading.backbone(place)
            tokenizer = loading.tokenizer(place)
        found, note = loading.preprocessing(place, kind.usual, kind.sides(backbone.config.vision_config)[0])
        clip = kind(backbone.eval(), tokenizer, found.mean, found.std, path, found.fit)
        clip.check_loaded()
        backbone.set_attn_implementation(attention(clip.patches, device))
        clip.revision, clip.note = place.revision, " ".join(filter(None, (note, kind.remark)))
        clip.files = (place.folder, stamp)
        return clip.to(device)

    def as_on_disk(self) -> bool:
        """Whether the files it was loaded from have not been touched since."""
        return self.files is not None and hub.stamp(self.files[0]) == self.files[1]

    # ---- encoding

    @classmethod
    def sides(cls, vision: Any) -> tuple[int, int]:
        """By the image tower's configuration: the side of its images in pixels, and in patches."""
        return vision.image_size, vision.image_size // vision.patch_size

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return self.backbone.config.projection_dim

    @property
    def bias(self) -> Tensor | None:
        """What is added to logits: nothing, in CLIP."""
        return None

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (N, L), cut after the longest end token: CLIP's text tower is causal, later tokens change nothing."""
        ids = self.tokenizer(list(prompts), padding=True, return_tensors="pt", verbose=False).input_ids
        ends = ids == self.tokenizer.eos_token_id
        if not bool(ends.any(1).all()):
            raise PerdureError(
                f"The tokenizer of {self.path} puts no end token after '{prompts[int((~ends.any(1)).int().argmax())]}', and "
                "CLIP's text is read there. Use the tokenizer that belongs to the model."
            )
        lengths = ends.int().argmax(1) + 1
        self.check_lengths(prompts, lengths)
        self.check_known(ids)
        return ids[:, : int(lengths.max())].to(self.device)

    def framed(self, words: Tensor) -> Tensor:
        """Token ids (N, L + 2) of texts that are given as those of their words (N, L): start, words, end."""
        start, end = (
            words.new_full((len(words), 1), t) for t in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        )
        return torch.cat([start, words, end], 1).to(self.device)

    def seen(self, images: Tensor, hidden: bool = False) -> Any:
        """What transformers' image tower gives of images as ``pixels`` takes them; ``hidden``: of every block too."""
        return self.backbone.vision_model(pixel_values=self.pixels(images), output_hidden_states=hidden)

    def pooled(self, seen: Any) -> Tensor:
        """(B, H): what stands for the whole images."""
        return seen.pooler_output

    def project(self, pooled: Tensor) -> Tensor:
        """What the image tower pools (B, H) → embeddings (B, D) that are not unit yet, in fp32."""
        with torch.autocast(pooled.device.type, enabled=False):
            return self.backbone.visual_projection(pooled.float())

    def read(self, ids: Tensor) -> Tensor:
        hidden = self.backbone.text_model(input_ids=ids).pooler_output
        with torch.autocast(hidden.device.type, enabled=False):
            return self.backbone.text_projection(hidden.float())

    # ---- in files

    @cached_property
    def pretrained(self) -> dict[str, Tensor]:
        """The weights it was born with: a copy while it holds them, else read again from where it was loaded; refused where
        those are others now."""
        if self.identity and self.holds == "pretrained" and self.as_on_disk():
            own = {name: tensor.detach().clone() for name, tensor in self.plain().items()}
            if fingerprint_of(own) == self.identity:  # not while it is being trained
                return own
        with torch.random.fork_rng(devices=[]):  # whenever it happens, it must not move the caller's draws
            found = CLIP.load(self.path).to(self.device)
        if self.identity and found.fingerprint() != self.identity:
            raise PerdureError(
                f"The CLIP at {self.path} has changed since it was loaded. Put the weights back that the run began with, "
                "or start a new run."
            )
        return {**found.weights(), **self.grown}

    def described(self) -> dict[str, Any]:
        """What makes it this model beside its weights, as a run records it."""
        config, own = self.backbone.config, self.preprocessing
        return {
            "kind": self.kind,
            "activation": {"image": config.vision_config.hidden_act, "text": config.text_config.hidden_act},
            "preprocessing": {"side": self.size, "mean": list(own.mean), "std": list(own.std), **vars(own.fit)},
        }

    def check_known(self, ids: Tensor) -> None:
        """Refuse tokens that the text tower has no embedding of."""
        known = self.backbone.config.text_config.vocab_size
        if int(ids.max()) >= known:
            raise PerdureError(
                f"The tokenizer of {self.path} makes tokens up to number {int(ids.max())}, and the text tower knows {known}. "
                "Use the tokenizer that belongs to the model."
            )

    def check_loaded(self) -> None:
        """Refuse a checkpoint whose texts could not be read where this architecture reads them."""
        if self.tokenizer.eos_token_id is None:
            raise PerdureError(f"The tokenizer of '{self.path}' has no end token, and CLIP's text is read there.")

    def check_saveable(self) -> None:
        """Refuse what ``save`` could not write, before anything is written."""
        if self.grown:
            raise PerdureError(
                f"The model holds weights inside its towers ({', '.join(self.grown)}) for which a plain transformers "
                "checkpoint has no place: without them it is another model. Nothing was written."
            )
        if not hasattr(self.tokenizer, "save_pretrained"):
            raise PerdureError(f"The tokenizer of {self.path} cannot be saved. Load the CLIP with its tokenizer files.")

    def save(self, folder: Path) -> None:
        """Write a checkpoint that plain transformers loads: adapters merged, tokenizer and preprocessing beside."""
        import transformers

        self.check_saveable()
        plain = getattr(transformers, hub.KINDS[self.kind])(self.backbone.config)
        plain.load_state_dict(self.weights(), strict=False)
        mean, std = list(self.preprocessing.mean), list(self.preprocessing.std)
        processor = getattr(transformers, hub.KINDS[self.kind].replace("Model", "ImageProcessor"))(
            **self.size_keys(), image_mean=mean, image_std=std, do_convert_rgb=True,
            resample=loading.NUMBER[self.fit.resample],
        )  # fmt: skip
        with loading.quiet(), plain_errors():
            plain.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)

    def size_keys(self) -> dict[str, Any]:
        """``fit`` in the words of transformers' image processors."""
        square = {"height": self.size, "width": self.size}
        if not self.fit.crop:
            return {"size": square, "do_center_crop": False}
        return {"size": {"shortest_edge": self.fit.edge or self.size}, "crop_size": square, "do_center_crop": True}


def attention(patches: int, device: str) -> str:
    """Plain products for a processor and few patches a side, where torch's fused attention is slower (bf16, backwards: by
    half)."""
    return "eager" if device == "cpu" and patches <= 8 else "sdpa"
