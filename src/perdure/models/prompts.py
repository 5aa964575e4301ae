"""Prompts inside both towers, tied by a linear map (CPE-CLIP, arXiv:2303.04751): vectors that stand among a layer's tokens.

    text    G₀ goes between the start token and the words, before positions are added: the words move L places
    image   V = G Pᵀ + b; V₀ goes behind the patches, before the first layer norm, without a position
    layer i = 1 … depth - 1, its L prompts being G_i (V_i):
            replace           they take the place of what came out at the prompts' places
            accumulate        they are added behind it: L·(i + 1) prompts
            accumulate_same   all of G₀ … G_i take its place

Later layers pass on what is there. After the last one the prompts are dropped, so that a tower's output is shaped as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Mode = Literal["replace", "accumulate", "accumulate_same"]


class Prompts(nn.Module):
    """``vectors`` G (depth, L, W), and ``project``: P (W', W) and b (W'), from the text tower's width to the image tower's."""

    def __init__(self, depth: int, length: int, width: int, image_width: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(depth, length, width))
        nn.init.xavier_uniform_(self.vectors)
        self.project = nn.Linear(width, image_width)


class Prompted:
    """The prompts of one tower. ``image``: whether they are V, else G; ``first``: the place of the first one; ``acts()``:
    whether they are there now."""

    def __init__(self, prompts: Prompts, image: bool, mode: Mode, first: int, acts: Callable[[], bool]):
        self.prompts, self.image, self.mode, self.first, self.acts = prompts, image, mode, first, acts
        self.depth, self.length, _ = prompts.vectors.shape

    def values(self, first: int, last: int) -> Tensor:
        """The prompts of the layers ``first`` … ``last``, (m, width)."""
        vectors = self.prompts.vectors[first : last + 1].flatten(0, 1)
        return self.prompts.project(vectors) if self.image else vectors

    def count(self, layer: int) -> int:
        """Prompts in layer number ``layer``."""
        return self.length * (1 if self.mode == "replace" else min(layer, self.depth - 1) + 1)

    def put(self, x: Tensor, prompts: Tensor, kept: int = 0, there: int = 0) -> Tensor:
        """x (N, n, width), of whose prompts ``there`` the first are ``kept``, with prompts (m, width) behind those."""
        prompts = prompts.to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, : self.first + kept], prompts, x[:, self.first + there :]], 1)

    def before(self, layer: int) -> Callable[..., Any]:
        """The hook before layer number ``layer``: its prompts, and a causal mask that fits."""

        def hook(block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self.acts() or not layer:
                return None
            x, mask, there = given[0], given[1], self.count(layer - 1)
            if layer < self.depth:
                new = self.values(0 if self.mode == "accumulate_same" else layer, layer)
                x = self.put(x, new, there if self.mode == "accumulate" else 0, there)
            return (x, mask if mask is None else causal(x.shape[1], mask), *given[2:])

        return hook

    def after(self, layers: int) -> Callable[..., Any]:
        """The hook after the last of ``layers`` layers: without prompts."""

        def hook(encoder: nn.Module, given: Any, out: Any) -> Any:
            if self.acts():
                x, count = out.last_hidden_state, self.count(layers - 1)
                out.last_hidden_state = torch.cat([x[:, : self.first], x[:, self.first + count :]], 1)
            return out

        return hook


def causal(length: int, like: Tensor) -> Tensor:
    """A causal mask (1, 1, n, n) of the kind that a mask ``like`` is: what may be seen, or what is added."""
    seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=like.device).tril()
    if like.dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, torch.finfo(like.dtype).min)


def attach_image(backbone: Any, prompts: Prompts, mode: Mode, patches: int, acts: Callable[[], bool]) -> None:
    """Let the image tower of a CLIP, of so many patches, have prompts."""
    tower = backbone.vision_model
    prompted = Prompted(prompts, True, mode, 1 + patches, acts)

    def begin(norm: nn.Module, given: tuple[Tensor]) -> tuple[Tensor] | None:
        return (prompted.put(given[0], prompted.values(0, 0)),) if acts() else None

    tower.pre_layrnorm.register_forward_pre_hook(begin)
    hook_layers(tower.encoder, prompted)


def attach_text(
    backbone: Any, prompts: Prompts, mode: Mode, end: int, acts: Callable[[], bool], cut: Callable[[int], None]
) -> None:
    """Let the text tower of a CLIP have prompts. ``end``: the end token; texts for which there is no room any more are cut,
    their end token kept, and their number is told to ``cut``."""
    tower = backbone.text_model
    prompted = Prompted(prompts, False, mode, 1, acts)
    room = backbone.config.text_config.max_position_embeddings - prompts.vectors.shape[1]

    def shorten(text: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        ids = given["input_ids"]
        if not acts() or ids.shape[1] <= room:
            return None
        long = (ids == end).int().argmax(1) >= room
        ids = ids[:, :room].clone()
        ids[long, -1] = end
        if bool(long.any()):
            cut(int(long.sum()))
        return args, {**given, "input_ids": ids}

    def begin(embeddings: Any, args: Any, given: dict[str, Any], out: Tensor) -> Tensor:
        if not acts():
            return out
        x = prompted.put(embeddings.token_embedding(given["input_ids"]), prompted.values(0, 0))
        return x + embeddings.position_embedding.weight[: x.shape[1]]

    tower.register_forward_pre_hook(shorten, with_kwargs=True)
    tower.embeddings.register_forward_hook(begin, with_kwargs=True)
    hook_layers(tower.encoder, prompted)


def hook_layers(encoder: Any, prompted: Prompted) -> None:
    """The hooks before each layer and after the last."""
    for number, block in enumerate(encoder.layers):
        block.register_forward_pre_hook(prompted.before(number))
    encoder.register_forward_hook(prompted.after(len(encoder.layers)))
