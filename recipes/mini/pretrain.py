"""Pre-train the small CLIP: a plain ``transformers.CLIPModel``, in four stages.

A plain ViT trained contrastively from scratch learns nothing in the time a processor has, so:

1. ``table``: a teacher (convolutional stem, one transformer layer) classifies each drawing's caption against a free table
   of caption vectors; dark ink on white paper first, random colours later.
2. ``text``: the text tower learns that table.
3. ``contrast``: both towers together, contrastively, equal captions counting as positives.
4. ``distil``: a plain ViT takes over the teacher's image embeddings (cosine and the batch's similarities); the text tower
   is the teacher's.

Every stage is a checkpointed loop: run again after an interruption, it goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

CONTEXT = 16
PAD, BOS, UNKNOWN, EOS = range(4)  # not 2: transformers pools at the wrong token for that end token
TEMPLATES = ["{}"] * 5 + [
    "a {}", "the {}", "an icon of {}", "an icon of a {}", "a {} icon", "a small icon of {}", "a drawing of {}",
    "a drawing of a {}", "a picture of {}", "a picture of a {}", "a weather icon of {}", "an icon of the {}",
]  # fmt: skip
STEPS = {"table": 3600, "text": 500, "contrast": 2200, "distil": 4800, "generator": 5900}


def tokenizer(captions: list[str], path: Path) -> Tokenizer:
    """A BPE tokenizer of 4,096 entries learnt from the captions."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<bos>", "<unk>", "<eos>"]
    corpus = captions + [t.format("") for t in TEMPLATES] * 200 + list("abcdefghijklmnopqrstuvwxyz") * 50
    tok.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=4096, special_tokens=special, show_progress=False))
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    tok.enable_truncation(CONTEXT)
    tok.save(str(path))
    return tok


def encode(tok: Tokenizer, texts: list[str]) -> Tensor:
    """Token ids (N, L), padded to the longest text: the text tower is causal, so padding changes nothing."""
    rows = [e.ids for e in tok.encode_batch(texts)]
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def small_clip(vocabulary: int, layers: int, width: int, heads: int) -> CLIPModel:
    text = dict(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=CONTEXT, projection_dim=128, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        hidden_act="gelu",
    )  # fmt: skip
    vision = dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=32, patch_size=8, projection_dim=128, hidden_act="gelu",
    )  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


class Stem(nn.Module):
    """Convolutions in place of the patch embedding: (B, 3, 32, 32) → (B, width, 4, 4)."""

    def __init__(self, width: int):
        super().__init__()

        def block(i: int, o: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU()]

        self.net = nn.Sequential(*block(3, 32, 2), *block(32, 64, 2), *block(64, 64, 1), *block(64, width, 2))
        self.proj = nn.Conv2d(width, width, 1)

    @property
    def weight(self) -> Tensor:  # transformers asks the patch embedding for its dtype
        return self.proj.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.net(x.contiguous(memory_format=torch.channels_last)))


def teacher_clip(vocabulary: int) -> CLIPModel:
    model = small_clip(vocabulary, layers=1, width=160, heads=5)
    model.vision_model.embeddings.patch_embedding = Stem(160).to(memory_format=torch.channels_last)
    nn.init.constant_(model.logit_scale, math.log(10.0))
    return model


def image_embedding(model: CLIPModel, pixels: Tensor) -> Tensor:
    hidden = model.vision_model(pixel_values=pixels).pooler_output
    with torch.autocast("cpu", enabled=False):  # bf16 would hide small differences here
        return F.normalize(model.visual_projection(hidden.float()), dim=-1)


def text_embedding(model: CLIPModel, ids: Tensor) -> Tensor:
    hidden = model.text_model(input_ids=ids).pooler_output
    with torch.autocast("cpu", enabled=False):
        return F.normalize(model.text_projection(hidden.float()), dim=-1)


def place(layers: Tensor, turn: float, shift: float, scale: tuple[float, float]) -> Tensor:
    """Rotate, shift and scale each picture at random. layers: (B, C, 32, 32)."""
    n = len(layers)
    angle, zoom = (torch.rand(n) - 0.5) * turn, 1 / (scale[0] + (scale[1] - scale[0]) * torch.rand(n))
    aspect = 1 + (torch.rand(n) - 0.5) * 0.2
    dx, dy = (torch.rand(2, n) - 0.5) * shift
    rows = [zoom * angle.cos() * aspect, -zoom * angle.sin(), dx], [zoom * angle.sin(), zoom * angle.cos() / aspect, dy]
    grid = F.affine_grid(torch.stack([torch.stack(r, 1) for r in rows], 1), list(layers.shape), align_corners=False)
    return F.grid_sample(layers, grid, align_corners=False)


def paint(rgba: Tensor, palette: Tensor, colour: float) -> tuple[Tensor, Tensor, Tensor]:
    """Colours for (B, 32, 32, 4) uint8 drawings: a share ``colour`` takes random ones, the rest black on white.

    Returns the premultiplied drawing with its alpha (B, 4, 32, 32), the paper (B, 3, 1, 1), and which are plain (B,).
    """
    n = len(rgba)
    own = palette.view(-1, 1, 1, 1)
    x = rgba.permute(0, 3, 1, 2).float() / 255
    ink, paper = torch.rand(n, 3, 1, 1), torch.rand(n, 3, 1, 1)
    grey = torch.rand(n) < 0.45
    ink[grey], paper[grey] = torch.rand(int(grey.sum()), 1, 1, 1) * 0.3, 1 - torch.rand(int(grey.sum()), 1, 1, 1) * 0.15
    close = (ink.mean(1) - paper.mean(1)).abs().flatten() < 0.3
    paper[close] = (paper[close] + 0.5) % 1
    bright = paper[close].mean(1, keepdim=True) > 0.5
    ink[close] = torch.where(bright, ink[close] * 0.3, 1 - 0.3 * (1 - ink[close]))
    swap = (torch.rand(n) < 0.3) & ~palette
    ink[swap], paper[swap] = paper[swap].clone(), ink[swap].clone()
    paper = torch.where(own, 0.5 + 0.5 * paper, paper)
    plain = torch.rand(n) >= colour
    ink[plain], paper[plain] = 0.0, 1.0
    drawn = torch.where(own, x[:, :3], ink.expand(-1, -1, 32, 32))
    return torch.cat([drawn * x[:, 3:], x[:, 3:]], 1), paper, plain


def augment(rgba: Tensor, palette: Tensor, colour: float) -> Tensor:
    """(B, 32, 32, 4) uint8 → (B, 3, 32, 32) in [-1, 1], coloured, placed at random, half of them a little noisy."""
    n = len(rgba)
    layers, paper, plain = paint(rgba, palette, colour)
    wild = place(layers, 0.35, 0.25, (0.75, 1.15))
    if plain.any():
        wild[plain] = place(layers[plain], 0.2, 0.15, (0.85, 1.1))
    image = wild[:, :3] + paper * (1 - wild[:, 3:])
    noisy = (torch.rand(n) < 0.5).view(-1, 1, 1, 1) * 0.03
    return (image + torch.randn_like(image) * noisy).clamp(0, 1) * 2 - 1


class Pool:
    """The pre-training pairs whose caption was drawn at least ``least`` times, and how often each is drawn."""

    def __init__(self, path: Path, least: int = 5):
        data = np.load(path)
        count = Counter(data["captions"].tolist())
        keep = np.array([count[c] >= least for c in data["captions"].tolist()])
        self.images = torch.from_numpy(data["images"][keep])
        self.palette = torch.from_numpy(data["palette"][keep])
        self.captions: list[str] = data["captions"][keep].tolist()
        self.all_captions: list[str] = data["captions"].tolist()
        self.names = sorted(set(self.captions))
        number = {c: i for i, c in enumerate(self.names)}
        self.ids = torch.tensor([number[c] for c in self.captions])
        weight = [count[c] ** -0.25 * (2 if c.startswith(("letter ", "number ")) else 1) for c in self.captions]
        self.weight = torch.tensor(weight) * torch.where(self.palette, 2.0, 1.0)

    def draw(self, n: int) -> Tensor:
        return torch.multinomial(self.weight, n, replacement=True)


def phrases(names: list[str]) -> list[str]:
    choice = torch.randint(len(TEMPLATES), (len(names),)).tolist()
    return [TEMPLATES[k].format(name) for k, name in zip(choice, names, strict=True)]


class Judge:
    """Zero-shot accuracy on every task that ships, text features averaged over the task's templates."""

    def __init__(self, assets: Path, tok: Tokenizer):
        self.tok = tok
        domains = json.loads((assets / "multi_domain.json").read_text())["domains"]
        for name in ("class_incremental", "probe"):
            domains[name] = json.loads((assets / f"{name}.json").read_text())
        self.tasks = {name: self.read(assets, d) for name, d in domains.items()}

    def read(self, assets: Path, task: dict[str, Any]) -> tuple[Tensor, Tensor, list[list[str]]]:
        drawings = task["test"]["drawings"]
        labels = torch.tensor([k for k, d in enumerate(drawings.values()) for _ in d])
        sheet = np.asarray(Image.open(assets / task["test"]["sheet"]))
        tiles = sheet.reshape(-1, 32, 32, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)[: len(labels)].copy()
        pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels, labels, [[t.format(c) for c in drawings] for t in task["templates"]]

    @torch.no_grad()
    def __call__(self, model: CLIPModel) -> dict[str, float]:
        was, out = model.training, {}
        model.eval()
        for name, (pixels, labels, prompts) in self.tasks.items():
            text = sum(text_embedding(model, encode(self.tok, p)) for p in prompts)
            image = torch.cat([image_embedding(model, x) for x in pixels.split(256)])
            out[name] = 100 * (image @ F.normalize(text, dim=-1).T).argmax(1).eq(labels).float().mean().item()
        model.train(was)
        mean = sum(v for k, v in out.items() if k not in ("class_incremental", "probe")) / (len(out) - 2)
        return {"mean": mean, **out}


def stage(
    name: str, folder: Path, module: nn.Module, params: list[nn.Parameter], lr: float, floor: float, decay: float,
    loss_at: Callable[[float], Tensor], judge: Callable[[], dict[str, float]] | None,
) -> None:  # fmt: skip
    """AdamW with warm-up and cosine down to ``floor``; checkpoints ``folder/name.pt`` and goes on from there."""
    total, path = STEPS[name], folder / f"{name}.pt"
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    torch.manual_seed(sum(map(ord, name)))
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        first = saved["step"]
    start, losses = time.time(), []
    for step in range(first, total):
        progress = step / total
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
            group["lr"] = lr * min(1, (step + 1) / 100) * (floor + (1 - floor) * cosine)
        loss = loss_at(progress)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0 or step + 1 == total:
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "rng": torch.get_rng_state(), "step": step + 1}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            seen = judge() if judge and (step + 1) % 400 == 0 else {}
            rate = (time.time() - start) / (step + 1 - first)
            scores = " ".join(f"{k}:{v:.1f}" for k, v in seen.items())
            print(
                f"[{name}] {step + 1}/{total} loss {np.mean(losses[-200:]):.3f} {rate:.3f} s/step {scores}", flush=True
            )


def teach(pool: Pool, tok: Tokenizer, judge: Judge, folder: Path) -> CLIPModel:
    """Stages 1 to 3."""
    torch.manual_seed(0)
    teacher = teacher_clip(tok.get_vocab_size())
    whole = nn.Module()
    whole.clip = teacher
    whole.table = nn.Parameter(torch.randn(len(pool.names), 128) * 0.05)
    vision = [*teacher.vision_model.parameters(), *teacher.visual_projection.parameters(), teacher.logit_scale]
    text = [*teacher.text_model.parameters(), *teacher.text_projection.parameters()]

    def scale() -> Tensor:
        return teacher.logit_scale.exp().clamp(max=60)

    def table_loss(progress: float) -> Tensor:
        b = pool.draw(256)
        pixels = augment(pool.images[b], pool.palette[b], min(0.9, max(0.0, (progress - 0.1) * 1.5)))
        with torch.autocast("cpu", torch.bfloat16):
            e = image_embedding(teacher, pixels)
        return F.cross_entropy(scale() * e @ F.normalize(whole.table, dim=-1).T, pool.ids[b])

    def text_loss(progress: float) -> Tensor:
        b = torch.randint(len(pool.names), (256,))
        with torch.autocast("cpu", torch.bfloat16):
            t = text_embedding(teacher, encode(tok, phrases([pool.names[i] for i in b.tolist()])))
        return F.cross_entropy(20 * t @ F.normalize(whole.table.detach(), dim=-1).T, b)

    def contrast_loss(progress: float) -> Tensor:
        b = pool.draw(384)
        with torch.autocast("cpu", torch.bfloat16):
            e = image_embedding(teacher, augment(pool.images[b], pool.palette[b], 1.0))
            t = text_embedding(teacher, encode(tok, phrases([pool.captions[i] for i in b.tolist()])))
        logits = scale() * e @ t.T
        same = (pool.ids[b][:, None] == pool.ids[b][None]).float()
        same /= same.sum(1, keepdim=True)
        return -(same * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2

    stage("table", folder, whole, [*vision, whole.table], 2e-3, 0.1, 0.05, table_loss, None)
    stage("text", folder, whole, text, 1e-3, 0.1, 0.05, text_loss, None)
    print("after text", judge(teacher), flush=True)
    stage("contrast", folder, whole, [*vision, *text], 8e-4, 0.02, 0.05, contrast_loss, lambda: judge(teacher))
    return teacher.eval()


def distil(teacher: CLIPModel, pool: Pool, tok: Tokenizer, judge: Judge, folder: Path) -> CLIPModel:
    """Stage 4."""
    torch.manual_seed(1)
    student = small_clip(tok.get_vocab_size(), layers=4, width=192, heads=3)
    student.text_model.load_state_dict(teacher.text_model.state_dict())
    student.text_projection.load_state_dict(teacher.text_projection.state_dict())
    student.logit_scale.data.copy_(teacher.logit_scale.data)
    vision = [*student.vision_model.parameters(), *student.visual_projection.parameters()]

    def loss_at(progress: float) -> Tensor:
        b = torch.randint(len(pool.images), (256,))
        pixels = augment(pool.images[b], pool.palette[b], min(1.0, 0.2 + 1.6 * progress))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                t = image_embedding(teacher, pixels)
            s = image_embedding(student, pixels)
        return 4 * (1 - (s * t).sum(1)).mean() + F.cross_entropy(20 * s @ t.T, (20 * t @ t.T).softmax(1))

    stage("distil", folder, student, vision, 2e-3, 0.02, 0.02, loss_at, lambda: judge(student))
    return student.eval()


def export(student: CLIPModel, tok: Tokenizer, scores: dict[str, float], folder: Path) -> None:
    """The model in half precision, its tokenizer and preprocessing, as ``from_pretrained`` reads them."""
    student.half().save_pretrained(folder)
    names = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tok, model_max_length=CONTEXT, **names).save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    side = {"height": 32, "width": 32}
    CLIPImageProcessor(
        do_center_crop=False, do_resize=True, size=side, resample=3, image_mean=half, image_std=half
    ).save_pretrained(folder)
    (folder / "zero_shot.json").write_text(json.dumps({k: round(v, 2) for k, v in scores.items()}, indent=1) + "\n")
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors") and p.stem != "checksums")
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (folder / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")


def checkpoints(work: Path) -> Path:
    """The folder of the checkpoints: other pairs, other checkpoints."""
    pairs = hashlib.sha256((work / "pretrain.npz").read_bytes()).hexdigest()[:8]
    folder = work / f"pretrain-{pairs}"
    folder.mkdir(exist_ok=True)
    return folder


def main(work: Path, assets: Path) -> None:
    torch.set_num_threads(2)
    pool = Pool(work / "pretrain.npz")
    work = checkpoints(work)
    tok = tokenizer(pool.all_captions, work / "tokenizer.json")
    judge = Judge(assets, tok)
    print(f"{len(pool.captions):,} pairs, {len(pool.names):,} captions, {tok.get_vocab_size()} tokens", flush=True)
    teacher = teach(pool, tok, judge, work)
    print("teacher", judge(teacher), flush=True)
    student = distil(teacher, pool, tok, judge, work)
    scores = judge(student)
    print("student", scores, flush=True)
    export(student, tok, scores, assets / "clip")
