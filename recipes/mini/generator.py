"""Train the small text-to-image model on the pre-training pairs, and write it as an ordinary diffusers directory.

A U-Net predicts v (Salimans & Ho 2022) on 32×32 pixels under the squared-cosine schedule, conditioned on the small CLIP's
text tower. Its directory is a Stable Diffusion pipeline like any other; as the pixels need no compressing, the
autoencoder in it is the identity. It learns the captions that at least ``LEAST`` drawings of pre-training carry (the
vocabulary) and those that the streams ask for.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from pretrain import (
    CONTEXT,
    STEPS,
    TEMPLATES,
    checkpoints,
    paint,
    place,
    stage,
)

LEAST = 20
SCHEDULE = dict(
    num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", steps_offset=1
)
SCALE = 64.0  # the tiny autoencoder squashes its latents softly: divided by this, they lie where that is linear
VOCABULARY_TEMPLATE = "an icon of {}"
BATCH = 64


def unet() -> UNet2DConditionModel:
    plain, cross = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    model = UNet2DConditionModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(24, 48, 96, 144), layers_per_block=1,
        down_block_types=(plain[0], plain[0], plain[1], plain[1]), up_block_types=(cross[0], cross[0], cross[1], cross[1]),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=8,
        time_embedding_dim=192, addition_embed_type="text", addition_embed_type_num_heads=4,
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last)


def identity() -> AutoencoderTiny:
    """An autoencoder of one level whose two convolutions each way pass the three channels through."""
    one = dict(num_encoder_blocks=(0,), num_decoder_blocks=(0,))
    vae = AutoencoderTiny(
        encoder_block_out_channels=(3,), decoder_block_out_channels=(3,), latent_channels=3, scaling_factor=SCALE, **one
    )
    first, last = vae.encoder.layers[0], vae.encoder.layers[-1]
    back, out = vae.decoder.layers[0], vae.decoder.layers[-1]
    for conv, gain, shift in ((first, 2 / SCALE, -1 / SCALE), (last, 1, 0), (back, SCALE / 2, 0.5), (out, 1, 0)):
        nn.init.dirac_(conv.weight)
        conv.weight.data.mul_(gain)
        nn.init.constant_(conv.bias, shift)
    return vae


class Pairs:
    """The drawings whose caption the generator learns, and the text tower's states of everything said about them."""

    def __init__(self, path: Path, asked: set[str], text: CLIPTextModel, tok: PreTrainedTokenizerFast):
        data = np.load(path)
        count = Counter(data["captions"].tolist())
        self.vocabulary = sorted(c for c, n in count.items() if n >= LEAST)
        learnt = set(self.vocabulary) | asked
        keep = np.array([c in learnt for c in data["captions"].tolist()])
        captions = data["captions"][keep].tolist()
        self.images, self.palette = torch.from_numpy(data["images"][keep]), torch.from_numpy(data["palette"][keep])
        self.names = sorted(set(captions))
        number = {c: i for i, c in enumerate(self.names)}
        self.ids = torch.tensor([number[c] for c in captions])
        weight = [count[c] ** -0.5 * (2 if c in asked else 1) for c in captions]
        self.weight = torch.tensor(weight) * torch.where(self.palette, 1.5, 1.0)
        kinds = sorted(set(TEMPLATES))
        self.share = torch.tensor([float(TEMPLATES.count(k)) for k in kinds])
        self.states = torch.stack([states(text, tok, [k.format(n) for n in self.names]) for k in kinds])
        self.nothing = states(text, tok, [""])

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """→ images (n, 3, 32, 32) in [-1, 1] and text states (n, 16, 128), one in ten of the empty prompt."""
        b = torch.multinomial(self.weight, n, replacement=True)
        layers, paper, _ = paint(self.images[b], self.palette[b], 0.3)
        layers = place(layers, 0.1, 0.08, (0.88, 1.06))
        said = self.states[torch.multinomial(self.share, n, replacement=True), self.ids[b]]
        said = torch.where((torch.rand(n) < 0.1)[:, None, None], self.nothing, said)
        return (layers[:, :3] + paper * (1 - layers[:, 3:])).clamp(0, 1) * 2 - 1, said


@torch.no_grad()
def states(text: CLIPTextModel, tok: PreTrainedTokenizerFast, prompts: list[str]) -> Tensor:
    ids = tok(prompts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt").input_ids
    return text(input_ids=ids)[0]


def assemble(net: UNet2DConditionModel, text: CLIPTextModel, tok: PreTrainedTokenizerFast) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=identity(), text_encoder=text, tokenizer=tok, unet=net,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE, timestep_spacing="trailing"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def train(pairs: Pairs, work: Path, whole: nn.Module) -> None:
    """v-prediction with an exponential average of the weights; checkpointed and resumed by ``stage``."""
    noise = DDPMScheduler(**SCHEDULE)
    whole.net.set_attn_processor(AttnProcessor())  # the fused one is slow backwards in bf16 on processors

    def loss_at(progress: float) -> Tensor:
        with torch.no_grad():  # what the last step made
            keep = min(0.998, (1 + progress * STEPS["generator"]) / (10 + progress * STEPS["generator"]))
            torch._foreach_lerp_(list(whole.ema.parameters()), list(whole.net.parameters()), 1 - keep)
        x, said = pairs.draw(BATCH)
        eps = torch.randn_like(x)
        t = (1000 * torch.rand(len(x)).sqrt()).long()  # more of the noisy end: what is drawn is decided there
        noisy = noise.add_noise(x, eps, t).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            v = whole.net(noisy, t, encoder_hidden_states=said).sample
        return F.mse_loss(v.float(), noise.get_velocity(x, eps, t))

    stage("generator", work, whole, list(whole.net.parameters()), 8e-4, 0.02, 0.01, loss_at, None)


def main(work: Path, assets: Path) -> None:
    torch.set_num_threads(2)
    text = CLIPTextModel.from_pretrained(assets / "clip").float().eval()
    tok = PreTrainedTokenizerFast.from_pretrained(assets / "clip")
    pairs = Pairs(work / "pretrain.npz", asked(assets), text, tok)
    sizes = f"{len(pairs.images):,} drawings, {len(pairs.names)} captions, {len(pairs.vocabulary)} in the vocabulary"
    print(sizes, flush=True)
    torch.manual_seed(0)
    whole = nn.Module()
    whole.net = unet()
    whole.ema = copy.deepcopy(whole.net).requires_grad_(False)
    train(pairs, checkpoints(work), whole)
    export(assemble(whole.ema.eval(), text, tok), pairs.vocabulary, assets)


def asked(assets: Path) -> set[str]:
    """The captions of every class of the multi-domain stream."""
    domains = json.loads((assets / "multi_domain.json").read_text())["domains"]
    names = {c for d in domains.values() for c in d["test"]["drawings"]}
    return {f"letter {n}" if len(n) == 1 else n for n in names} | {
        f"number {n}" for n in domains["digits"]["test"]["drawings"]
    }


def export(pipeline: StableDiffusionPipeline, vocabulary: list[str], assets: Path) -> None:
    """The pipeline in half precision as ``DiffusionPipeline.from_pretrained`` reads it, and the vocabulary."""
    folder = assets / "generator"
    pipeline.save_pretrained(folder, safe_serialization=True)
    for part in ("unet", "text_encoder", "vae"):
        for path in (folder / part).glob("*.safetensors"):
            save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
            path.chmod(0o644)
    config = folder / "vae" / "config.json"  # it derives one entry itself, and complains when it is given
    kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "block_out_channels"}
    config.write_text(json.dumps(kept, indent=2) + "\n")
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors") and p.stem != "checksums")
    sums = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (folder / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
    about = {"template": VOCABULARY_TEMPLATE, "names": vocabulary}
    (assets / "vocabulary.json").write_text(json.dumps(about, indent=1) + "\n")
