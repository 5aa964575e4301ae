"""Where the class token of an image tower looks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perdure.models.clip import CLIP


@torch.no_grad()
def class_attention(clip: CLIP, images: Tensor) -> Tensor:
    """The attention (B, side, side) of the class token to the patches in the last block, the mean over heads, of images as
    ``encode_image`` takes them; by the weights that the model holds. Of a CLIP, which has a class token."""
    attention: Any = clip.backbone.vision_model.encoder.layers[-1].self_attn
    found: dict[str, Tensor] = {}

    def note(which: str) -> Any:
        def hook(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            found[which] = out.float().unflatten(2, (attention.num_heads, -1)).transpose(1, 2)

        return getattr(attention, f"{which}_proj").register_forward_hook(hook)

    handles = [note(which) for which in "qk"]
    try:
        clip.seen(images)
    finally:
        for handle in handles:
            handle.remove()
    scores = (found["q"][:, :, :1] @ found["k"].mT).squeeze(2) * attention.scale
    side = clip.patches
    return scores.softmax(-1).mean(1)[:, clip.class_token :][:, : side**2].unflatten(1, (side, side))
