"""Seconds and peak memory of GIFT's step against a plain implementation of the same step.

    python bench/gift_step.py [--batch 16] [--classes 100] [--steps 2]

Both run in the same loop on CLIP ViT-B/16 with random weights, on the same batches: once as the equations read (every class
text and every pair's text at the full 77 tokens at every step, the teacher's forward pass at every step, the penalty through
autograd, fp32), then perdure's step in fp32 and under bf16 autocast. Each runs in a process of its own, so that its peak memory
is its own. The fraction of the processor's peak is the step's arithmetic, forward and backward, over its seconds, against a
2048³ product in the same precision.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from perdure.core.precision import precision_of
from perdure.data.task import Batch, Class, Images, Task
from perdure.engine.environment import forget_peak_memory, peak_memory_mb
from perdure.methods.gift import GIFT
from perdure.models.clip import CLIP
from perdure.ops.losses import alignment, alignment_targets, distillation
from perdure.synthesis.store import Pairs
from perdure.training.fit import Backward, fit

KINDS = {"plain fp32": ("plain", "fp32"), "perdure fp32": ("perdure", "fp32"), "perdure bf16": ("perdure", "bf16")}


class PlainGIFT(GIFT):
    """GIFT's step as its equations read, with no shortcut."""

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.tokens = self.full(task.prompts())
        self.pair_tokens = self.full(self.pairs.prompts)
        self.frozen = copy.deepcopy(self.clip)

    def teach(self) -> None:
        """Nothing beforehand: the teacher embeds every batch."""

    def full(self, prompts: list[str]) -> Tensor:
        """Token ids padded to the whole context."""
        ids = self.clip.tokens(prompts)
        return F.pad(ids, (0, self.clip.backbone.config.text_config.max_position_embeddings - ids.shape[1]))

    def replay_losses(self, index: Tensor) -> dict[str, Tensor]:
        images, tokens, c = self.pairs.images[index], self.pair_tokens[index], self.config
        with torch.no_grad():
            teacher = self.clip.similarity(self.frozen.encode_image(images), self.frozen.encode_tokens(tokens))
        student = self.clip.similarity(self.clip.encode_image(images), self.clip.encode_tokens(tokens))
        targets = alignment_targets(self.prompt_of[index])
        return {
            "distil_image": c.alpha * distillation(student, teacher, c.temperature),
            "distil_text": c.alpha * distillation(student.T, teacher.T, c.temperature),
            "align_image": c.beta * alignment(student, targets, c.label_smoothing),
            "align_text": c.beta * alignment(student.T, targets, c.label_smoothing),
        }

    def step(self, batch: Batch, backward: Backward) -> None:
        importance = self.importance(backward(**self.replay_losses(next(self.order))))
        penalty = sum((importance(n) * (p - self.anchor[n]) ** 2).sum() for n, p in self.parameters().items())
        backward(task=self.task_loss(batch), consolidation=self.config.lam * penalty)


class Words:
    """A tokenizer by words, for random weights: start, a number a word, end, padding."""

    eos_token_id = 49407

    def __call__(self, texts: list[str], **_: object) -> Any:
        rows = [[49406, *(320 + sum(map(ord, w)) % 40000 for w in t.split()), self.eos_token_id] for t in texts]
        longest = max(map(len, rows))
        return argparse.Namespace(input_ids=torch.tensor([r + [0] * (longest - len(r)) for r in rows]))


def vit_b_16() -> CLIP:
    torch.manual_seed(0)
    text = dict(eos_token_id=49407, bos_token_id=49406, pad_token_id=0)
    config = CLIPConfig(text_config=text, vision_config=dict(patch_size=16), projection_dim=512)
    backbone = CLIPModel(config)
    backbone.set_attn_implementation("sdpa")
    return CLIP(backbone.eval(), Words(), (0.5,) * 3, (0.5,) * 3, "random")


def material(size: int, batch: int, classes: int) -> tuple[Task, Pairs]:
    """Random images of ``classes`` classes, and pairs, as many as a batch has; a fifth of the prompts occur twice."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2 * batch, 3, size, size), generator=generator, dtype=torch.uint8)
    names = tuple(Class(f"class {k}", ("a photo of a {}, of some kind.",)) for k in range(classes))
    labels = torch.randint(classes, (batch,), generator=generator)
    images = Images(pixels[:batch], labels)
    prompts = [f"a photo of a thing {k % (batch * 4 // 5)}." for k in range(batch)]
    return Task("bench", names, images, images), Pairs(pixels[batch:], prompts)


class Given:
    """Hands the method the same pairs without drawing any."""

    def __init__(self, pairs: Pairs):
        self.given = pairs

    def pairs(self, task: str, learned: list[str]) -> Pairs:
        return self.given

    def of(self, prompts: list[str], count: int, name: str) -> Pairs:
        return Pairs(self.given.images[:count], [prompts[k % len(prompts)] for k in range(count)])


def measure(kind: str, batch: int, classes: int, steps: int) -> dict[str, Any]:
    """One kind alone: the median of the steps' seconds after a first one, the peak of memory, the losses."""
    plain, precision = KINDS[kind]
    clip = vit_b_16()
    task, pairs = material(clip.size, batch, classes)
    rule = PlainGIFT if plain == "plain" else GIFT
    method = rule(
        iterations=steps,
        warmup=0,
        lr=1e-5,
        batch_size=batch,
        synthetic_batch=batch,
        generator="none",
        vocabulary="imagenet",
    )
    method.bind(clip)
    method.replay = Given(pairs)  # type: ignore[assignment]
    forget_peak_memory()
    method.begin_task(task)
    stamps = [time.perf_counter()]
    losses = fit(
        method, task, torch.Generator().manual_seed(0), clip.size, clip.device, precision,
        lambda *_: stamps.append(time.perf_counter()),
    )  # fmt: skip
    took = [b - a for a, b in zip(stamps[1:], stamps[2:], strict=False)]
    seconds = statistics.median(took)
    return {
        "kind": kind, "seconds": seconds, "peak_mb": peak_memory_mb(), "gflop": gflop(method, task) / 1e9,
        "peak_gflop_s": product(precision), "losses": losses,
    }  # fmt: skip


def gflop(method: GIFT, task: Task) -> float:
    """Floating-point operations of one step, forward and backward, counted in a small batch and scaled to the whole."""
    few = 2
    share, order, clip = len(task.train) / few, method.order, method.clip
    counts = {}
    for part, losses in (
        ("pairs", lambda: method.replay_losses(torch.arange(few))),
        ("task", lambda: {"task": clip.encode_image(task.train.pixels[:few]).sum()}),
        ("classes", lambda: {"classes": clip.encode_tokens(method.tokens).sum()}),
    ):
        with FlopCounterMode(display=False) as counter:
            sum(losses().values()).backward()  # type: ignore[union-attr]
        counts[part] = counter.get_total_flops() * (1 if part == "classes" else share)
    method.order = order
    return float(sum(counts.values()))


def product(precision: str) -> float:
    """GFLOP/s of a 2048³ product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, best = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype), 1e9
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / 1e9


def alone(kind: str) -> dict[str, Any]:
    """``measure`` in a process of its own; huge pages are perdure's, not the plain step's."""
    pages = {"THP_MEM_ALLOC_ENABLE": "0" if KINDS[kind][0] == "plain" else "1"}
    command = [sys.executable, __file__, "--kind", kind, *sys.argv[1:]]
    return dict(json.loads(subprocess.check_output(command, env={**os.environ, **pages})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images, and as many pairs")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after a first one")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options.kind, options.batch, options.classes, options.steps)))
        return
    sizes = f"{options.batch} images + {options.batch} pairs, {options.classes} classes"
    print(f"ViT-B/16, {sizes}, {torch.get_num_threads()} threads")
    native = precision_of("auto", "cpu") == "bf16"
    kinds = [kind for kind, (_, precision) in KINDS.items() if precision == "fp32" or native]
    rows = [alone(kind) for kind in kinds]
    base = rows[0]
    print(f"{'':14} {'s/step':>8} {'speed-up':>9} {'peak MB':>9} {'GFLOP':>9} {'of peak':>8} {'losses differ by':>17}")
    for row in rows:
        worst = max(
            abs(a - b) / max(abs(b), 1e-6)
            for name in base["losses"] for a, b in zip(row["losses"][name], base["losses"][name], strict=True)
        )  # fmt: skip
        reached = row["gflop"] / row["seconds"] / row["peak_gflop_s"]
        print(
            f"{row['kind']:14} {row['seconds']:8.2f} {base['seconds'] / row['seconds']:8.2f}x {row['peak_mb']:9.0f} "
            f"{row['gflop']:9.0f} {reached:8.0%} {worst:17.1e}"
        )


if __name__ == "__main__":
    main()
