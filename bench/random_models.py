"""Models of published shapes with random weights, as checkpoints that are loaded like any other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

LARGE = {
    "vision": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14
    ),
    "text": dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    "shared": dict(projection_dim=768),
}
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
MODELS: dict[str, dict[str, Any]] = {
    "vit-b-16": {"vision": {**BASE, "patch_size": 16}, "text": {}, "shared": dict(projection_dim=512)},
    "vit-l-14": LARGE,
    "vit-l-14-336": {**LARGE, "vision": {**LARGE["vision"], "image_size": 336}},
    "siglip-b-16": {"vision": {**BASE, "patch_size": 16}, "text": {**BASE, "vocab_size": 32000}, "shared": {}},
}


def words() -> list[str]:
    """A vocabulary by words; the last one ends a text."""
    return [
        "<pad>",
        "<start>",
        "<unk>",
        *"a photo of some kind class thing . ,".split(),
        *map(str, range(1000)),
        "<end>",
    ]


def checkpoint(name: str, folder: Path) -> Path:
    """The folder of a model with random weights, made the first time."""
    place = folder / name
    if place.exists():
        return place
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    kind = "Siglip" if name.startswith("siglip") else "CLIP"
    about, vocabulary = MODELS[name], {word: k for k, word in enumerate(words())}
    start, end = vocabulary["<start>"], vocabulary["<end>"]
    text = {**about["text"], "bos_token_id": start, "eos_token_id": end, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=about["vision"], **about["shared"])
    torch.manual_seed(0)
    beside = folder / f".{name}-{os.getpid()}"
    getattr(transformers, f"{kind}Model")(config).save_pretrained(beside)
    split = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    split.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, bos_token="<start>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(beside)
    side = about["vision"].get("image_size", 224)
    numbers = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": side, "width": side}}
    (beside / "preprocessor_config.json").write_text(json.dumps(numbers))
    os.replace(beside, place)
    return place
