"""What linear layers of the towers are given, summed up as Gram matrices XXᵀ in fp64: no token is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.core import processes
from perdure.core.weights import original
from perdure.models.clip import CLIP


@torch.no_grad()
def grams(
    clip: CLIP, layers: Mapping[str, nn.Linear], batches: Iterable[Tensor], tokens: Tensor, averaged: bool
) -> dict[str, Tensor]:
    """XXᵀ (in, in) by the name of a layer's weight in the original CLIP, where q, k and v are one, as what they are given is.

    X: all tokens of the images, given in ``batches`` (B, 3, H, W), and those of the texts ``tokens`` (C, L) up to each end.
    ``averaged`` (KeepLoRA's release): of the images the mean of the batches, token by token at equal place, for which they
    must be of one size; of the texts all positions that the tower has, padding included.
    """
    shared = {original(f"{name}.weight"): layer for name, layer in layers.items()}
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        sums[name] = sums[name] + x if name in sums else x

    seen = {name: layer for name, layer in shared.items() if clip.part_of(name) == "image"}
    if seen:
        count = 0
        if not averaged:
            sums.update(
                {n: torch.zeros(2 * [x.in_features], dtype=torch.float64, device=clip.device) for n, x in seen.items()}
            )
        with heard(seen, lambda name, x: add(name, x if averaged else square(x))):
            for images in batches:
                count += 1
                own = images if averaged else images[processes.rows(len(images))]
                if len(own):
                    with processes.alone():  # each hears what it is given itself
                        clip.encode_image(own)
        sums.update({name: square(sums[name] / count) if averaged else processes.total(sums[name]) for name in seen})
    read = {name: layer for name, layer in shared.items() if name not in seen}
    if read:
        ids, counted = padded(clip, tokens) if averaged else (tokens, up_to_end(clip, tokens))
        for index in torch.arange(len(ids)).split(clip.evaluation_batch):

            def hear(name: str, x: Tensor, places: Tensor = counted[index]) -> None:
                add(name, square(x[places]))

            with heard(read, hear), processes.alone():
                clip.encode_tokens(ids[index])
    return sums


def square(x: Tensor) -> Tensor:
    """XXᵀ (in, in) of tokens (…, in)."""
    x = x.flatten(0, -2).double()
    return x.T @ x


@contextlib.contextmanager
def heard(layers: Mapping[str, nn.Module], hear: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Meanwhile, hand over what each layer is given."""
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(lambda _, given, name=name: hear(name, given[0])).remove)
        yield


def up_to_end(clip: CLIP, tokens: Tensor) -> Tensor:
    """Which positions of token ids (C, L) reach a text's embedding: to its end token; where a tower looks both ways, all."""
    if clip.kind != "clip":
        return torch.ones_like(tokens, dtype=torch.bool)
    ends = (tokens == clip.tokenizer.eos_token_id).int().argmax(1, keepdim=True)
    return torch.arange(tokens.shape[1], device=tokens.device) <= ends


def padded(clip: CLIP, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids as long as the tower reads, 0 after each end, as the original tokenizer pads; all positions count."""
    context = clip.backbone.config.text_config.max_position_embeddings
    ids = F.pad(tokens * up_to_end(clip, tokens), (0, context - tokens.shape[1]))
    return ids, torch.ones_like(ids, dtype=torch.bool)
