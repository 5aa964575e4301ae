"""SigLIP (Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, arXiv:2303.15343) and SigLIP 2 (Tschannen et
al., 2025, arXiv:2502.14786) over transformers' ``SiglipModel`` and ``Siglip2Model``.

    logits = s·I·Tᵀ + b;   each pair's probability is the sigmoid of its logit

Otherwise than CLIP: a bias; no projection after the towers (the embedding is what the image tower pools by attention, and what
the text tower's head makes of its last token); no class token; pictures are pressed into the square.

A text is always padded to the tower's whole context, and nothing is cut off or masked: the tower looks both ways, it was
trained so, and it is read at the last place, padding or not. A shorter text would be another text. Which side is padded, and
whether capitals are made small, is what the checkpoint's tokenizer says.

The fixed-resolution checkpoints of SigLIP 2 are of SigLIP's architecture (model_type ``siglip``). Those of its NaFlex form
(``siglip2``) see pictures of any shape, cut into patches; here they see a square of as many patches as the tower has places
(num_patches, 16 × 16 in the published ones), into which every picture is pressed. transformers keeps the shape: for
pictures that are not square its embeddings are others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.pixels import Fit
from perdure.models.clip import CLIP
from perdure.models.loading import Preprocessing

HALF = (0.5, 0.5, 0.5)


class SigLIP(CLIP):
    """A CLIP that was trained with a sigmoid a pair: its logits have a bias."""

    kind = "siglip"
    usual = Preprocessing(HALF, HALF, Fit(crop=False))
    class_token = 0

    @property
    def width(self) -> int:
        return self.backbone.config.vision_config.hidden_size

    @property
    def bias(self) -> Tensor | None:
        return self.backbone.logit_bias

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """s·I·Tᵀ + b in fp32, of unit embeddings (B, D) and (C, D)."""
        return super().similarity(images, texts) + self.backbone.logit_bias

    def pooled(self, seen: Any) -> Tensor:
        if not torch.is_autocast_enabled(seen.pooler_output.device.type):
            return seen.pooler_output
        with torch.autocast(seen.pooler_output.device.type, enabled=False):  # once more, for an embedding that is fp32
            return self.backbone.vision_model.head(seen.last_hidden_state.float())

    def project(self, pooled: Tensor) -> Tensor:
        return pooled.float()

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (N, L), padded to the text tower's context."""
        context = self.backbone.config.text_config.max_position_embeddings
        ids = self.tokenizer(list(prompts), padding="max_length", max_length=context, verbose=False).input_ids
        self.check_lengths(prompts, torch.tensor([len(own) for own in ids]))
        self.check_known(torch.tensor(ids))
        return torch.tensor(ids, device=self.device)

    def framed(self, words: Tensor) -> Tensor:
        """Words (N, L), an end if the tokenizer has one, and padding (N, context): there is no start."""
        tokenizer, context = self.tokenizer, self.backbone.config.text_config.max_position_embeddings
        ends = [] if tokenizer.eos_token_id is None else [words.new_full((len(words), 1), tokenizer.eos_token_id)]
        ids = torch.cat([words, *ends], 1)
        padding = words.new_full((len(words), context - ids.shape[1]), tokenizer.pad_token_id)
        return torch.cat([ids, padding] if tokenizer.padding_side == "right" else [padding, ids], 1).to(self.device)

    def read(self, ids: Tensor) -> Tensor:
        hidden = self.backbone.text_model(input_ids=ids).last_hidden_state[:, -1]
        with torch.autocast(hidden.device.type, enabled=False):
            return self.backbone.text_model.head(hidden.float())

    def check_loaded(self) -> None:
        if self.tokenizer.pad_token_id is None:
            raise PerdureError(f"The tokenizer of '{self.path}' has no padding token, and SigLIP's text is read there.")
        if not self.backbone.config.vision_config.vision_use_head:
            raise PerdureError(
                f"The SigLIP at '{self.path}' has no pooling head (vision_use_head): no image embedding."
            )


class SigLIP2(SigLIP):
    """SigLIP 2 in its NaFlex form, at a square of ``num_patches`` patches."""

    kind = "siglip2"
    usual = Preprocessing(HALF, HALF, Fit(crop=False, resample="bilinear"))
    remark = "SigLIP 2 (NaFlex) is shown every picture as a square here, whatever its shape."

    @classmethod
    def sides(cls, vision: Any) -> tuple[int, int]:
        patches = math.isqrt(vision.num_patches)
        return patches * vision.patch_size, patches

    def seen(self, images: Tensor, hidden: bool = False) -> Any:
        """As ``CLIP.seen``; the pixels go in as patches (B, n², 3·p²), a patch's rows, columns and channels in this order."""
        side, patch = self.patches, self.backbone.config.vision_config.patch_size
        cut = self.pixels(images).unflatten(3, (side, patch)).unflatten(2, (side, patch))
        values = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shapes = torch.full((len(values), 2), side, device=values.device)
        return self.backbone.vision_model(  # no mask: no patch is padding
            pixel_values=values, pixel_attention_mask=None, spatial_shapes=shapes, output_hidden_states=hidden
        )

    def size_keys(self) -> dict[str, Any]:
        return {"patch_size": self.size // self.patches, "max_num_patches": self.patches**2}
