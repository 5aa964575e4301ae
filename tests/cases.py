"""Cases that the papers' own released code left behind: inputs, weights, every number; and what puts them before perdure."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from perdure.models.clip import CLIP

GOLDEN = Path(__file__).parent / "golden"


def case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class Tokenizer:
    """Hands back the recorded token ids of recorded texts."""

    def __init__(self, ids: dict[str, Tensor], end: int):
        self.ids, self.eos_token_id = ids, end

    def __call__(self, texts: list[str], **_: object) -> Any:
        return type("Encoded", (), {"input_ids": torch.stack([self.ids[t] for t in texts])})


def in_order(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.arange(count).split(size)


def tiny_clip(about: dict[str, Any], weights: dict[str, Tensor], ids: dict[str, Tensor]) -> CLIP:
    """A case's model; ``ids``: the recorded token ids of its texts."""
    backbone = CLIPModel(CLIPConfig(**about["hf_config"]))
    backbone.load_state_dict(weights, strict=False)
    tokenizer = Tokenizer(ids, about["hf_config"]["text_config"]["eos_token_id"])
    clip = CLIP(backbone.eval(), tokenizer, (0, 0, 0), (1, 1, 1), "tiny")
    clip.pretrained = clip.weights()
    return clip
