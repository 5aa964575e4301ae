"""Small random checkpoints in the form that real ones have (CLIP and its kin, Stable Diffusion), and what plain transformers
makes of them. The tests take them from here too."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPTokenizer, Siglip2Tokenizer, set_seed
from transformers.convert_slow_tokenizer import bytes_to_unicode

WORDS = ["a photo of a cat", "a drawing of the sun", "an icon of a dog", "the letter q", "hot air balloon at night"]
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.25, 0.2]
BPE_SIZE = 49152 - 256 - 2


def bpe_file() -> Path:
    """CLIP's published merges, as open_clip's package brings them."""
    found = importlib.util.find_spec("open_clip")  # its file alone is wanted: it is not imported
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("CLIP's vocabulary comes with a package: pip install open_clip_torch")
    return Path(found.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"


def clip_tokenizer(folder: Path) -> int:
    """Write the files of CLIP's real tokenizer, from its merges; return the size of its vocabulary."""
    lines = gzip.decompress(bpe_file().read_bytes()).decode().split("\n")[1 : BPE_SIZE + 1]
    letters = list(bytes_to_unicode().values())
    merges = [(pair[0], pair[1]) for pair in map(str.split, lines)]
    words = [*letters, *(f"{x}</w>" for x in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: k for k, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]))
    return len(vocabulary)


def siglip_tokenizer(folder: Path) -> int:
    """A small tokenizer of SigLIP's manner: lower case, ``</s>`` ends a text and pads it."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Metaspace()
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789▁'-.,")
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator(WORDS, trainer)
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    about = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "model_input_names": ["input_ids"]}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **about).save_pretrained(folder)
    return made.get_vocab_size()


def siglip2_tokenizer(folder: Path) -> int:
    """A small one of SigLIP 2's manner, from letters alone."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = {word: k for k, word in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz▁"])}
    Siglip2Tokenizer(vocab=vocabulary, merges=[], model_max_length=64).save_pretrained(folder)
    return len(vocabulary)


def checkpoint(folder: Path, kind: str, side: int = 32, seed: int = 0, patch: int = 8, **processor: Any) -> Path:
    """Write a random ``kind`` (clip, siglip, siglip2) with tokenizer and preprocessing; ``processor``: other values of that."""
    folder.mkdir(parents=True)
    name, image = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[kind], {"image_size": side}
    words = {"clip": clip_tokenizer, "siglip": siglip_tokenizer, "siglip2": siglip2_tokenizer}[kind](folder)
    text = {**TEXT, "vocab_size": words, "max_position_embeddings": 64}
    about: dict[str, Any] = {"projection_dim": 24}
    sized: dict[str, Any] = {"size": {"height": side, "width": side}, "resample": 2}
    if kind == "clip":  # eos_token_id 2 is what OpenAI's own say, whose tokenizer ends with another
        text |= {"max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 2, "pad_token_id": 1}
        sized = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "resample": 3}
    if kind != "clip":
        about = {}
    if kind == "siglip2":
        image, sized = (
            {"num_patches": (side // patch) ** 2},
            {"patch_size": patch, "max_num_patches": (side // patch) ** 2},
        )
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config={**TEXT, "patch_size": patch, **image}, **about
    )
    set_seed(seed)
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases and the like, which begin at 0
        model.logit_scale.fill_(2.5)
        if kind != "clip":
            model.logit_bias.fill_(-3.0)
    model.save_pretrained(folder)
    values = {**sized, "image_mean": MEAN, "image_std": STD, **processor}
    getattr(transformers, f"{name}ImageProcessor")(**values).save_pretrained(folder)
    return folder


def plain_logits(folder: Path, pictures: list[Image.Image] | Tensor, prompts: list[str]) -> Tensor:
    """Logits (N, C) of plain transformers: the folder's own model, image processor and tokenizer, padded whole."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    context = model.config.text_config.max_position_embeddings
    ids = tokenizer(prompts, padding="max_length", max_length=context, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids, **processor(list(pictures), return_tensors="pt")).logits_per_image


def text_to_image(folder: Path, seed: int = 0) -> Path:
    """Write a random text-to-image pipeline in the form of Stable Diffusion v1.5, with CLIP's real tokenizer: 16 pixels."""
    import diffusers  # takes a while, and only this needs it

    words = clip_tokenizer(folder / "tokenizer")
    text = {**TEXT, "vocab_size": words, "max_position_embeddings": 77, "eos_token_id": 2, "bos_token_id": 0}
    set_seed(seed)
    blocks, kept = (16, 16), {"norm_num_groups": 8, "layers_per_block": 1}
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=blocks, down_block_types=down, up_block_types=up, cross_attention_dim=32,
        attention_head_dim=8, **kept,
    )  # fmt: skip
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    vae = diffusers.AutoencoderKL(
        block_out_channels=blocks, down_block_types=down, up_block_types=up, latent_channels=4, sample_size=16, **kept
    )
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    made = diffusers.StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler, None, None, None, False)
    made.save_pretrained(folder)
    return folder
