"""Images per second of ``perdure run``'s training loop against a bare loop of the same model, batch and precision.

    python bench/train_loop.py [--steps 150] [--repeats 5]

The bare loop is what one would write by hand: the same CLIP, augmentation, text prompts, loss and AdamW, and nothing else.
The two are timed in turn, A B A B …, in one process; the ratio is the median over the pairs. It also takes the import time
of the command line and, with ``--demo``, the time and peak memory of the demo's job.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from rich.console import Console

from perdure.benchmarks import mini
from perdure.core.precision import precision_of
from perdure.core.seeding import reseed
from perdure.data.task import Task
from perdure.data.transforms import random_resized_crop
from perdure.methods.finetune import FineTune
from perdure.models.clip import CLIP
from perdure.training.fit import fit
from perdure.view import Screen

BATCH = 64


def ours(clip: CLIP, task: Task, steps: int, precision: str) -> None:
    method = FineTune(iterations=steps, warmup=15, lr=2e-4, batch_size=BATCH)
    method.bind(clip)
    method.begin_task(task)
    with Screen(Console(file=io.StringIO()), "bench") as screen:  # with the progress that the command line keeps
        screen.learns(task.name, 1)
        fit(method, task, reseed(0, 1), clip.size, clip.device, precision, screen.step)


def bare(clip: CLIP, task: Task, steps: int, precision: str) -> None:
    model = clip.backbone
    tokens = clip.tokens(task.prompts())
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0, fused=True
    )
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) == 0:
            order = torch.randperm(len(task.train), generator=generator)
        index, order = order[:BATCH], order[BATCH:]
        images = random_resized_crop(task.train.pixels[index].float() / 255, clip.size, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            image = model.visual_projection(model.vision_model(pixel_values=(images - 0.5) / 0.5).pooler_output)
            text = model.text_projection(model.text_model(input_ids=tokens).pooler_output)
            logits = model.logit_scale.exp() * F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
            loss = F.cross_entropy(logits, task.train.labels[index], label_smoothing=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def images_per_second(steps: int, repeats: int) -> None:
    task = mini.multi_domain("I").tasks[2]
    precision = precision_of("auto", "cpu")
    batches = -(-len(task.train) // BATCH)
    images = steps / batches * len(task.train)  # the last batch of an epoch is short
    rates: dict[str, list[float]] = {"perdure": [], "bare": []}
    for repeat in range(repeats + 1):
        for name, loop in (("perdure", ours), ("bare", bare)):
            clip = CLIP.load(str(mini.MODEL))
            clip.backbone.logit_scale.requires_grad_(False)
            start = time.perf_counter()
            loop(clip, task, steps, precision)
            if repeat:  # the first pair warms up
                rates[name].append(images / (time.perf_counter() - start))
    ratio = statistics.median(a / b for a, b in zip(rates["perdure"], rates["bare"], strict=True))
    for name, found in rates.items():
        print(
            f"{name:8s} {statistics.median(found):7.0f} images/s (min {min(found):.0f}, max {max(found):.0f}; {precision})"
        )
    print(f"perdure / bare: {100 * ratio:.1f} % (median of {repeats} pairs)")


def child(*words: str) -> tuple[float, float]:
    """Seconds and peak memory (MB) of a command of its own."""
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, words
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--demo", action="store_true", help="time the demo too (minutes)")
    options = parser.parse_args()
    times = [child(sys.executable, "-m", "perdure.cli", "--help")[0] for _ in range(5)]
    print(f"perdure --help: {statistics.median(times):.2f} s (median of 5)")
    start = time.perf_counter()
    from transformers import AutoTokenizer, CLIPModel  # noqa: F401  (imported here to be timed apart)

    imported = time.perf_counter()
    mini.multi_domain("I")
    CLIP.load(str(mini.MODEL))
    print(f"loading the small world and its CLIP: {time.perf_counter() - imported:.2f} s")
    print(f"importing transformers before that: {imported - start:.2f} s")
    images_per_second(options.steps, options.repeats)
    if options.demo:
        with tempfile.TemporaryDirectory() as folder:
            seconds, memory = child(sys.executable, "-m", "perdure.cli", "demo", "--out", f"{folder}/demo")
        print(f"perdure demo: {seconds:.0f} s, peak memory {memory:.0f} MB, on {torch.get_num_threads()} threads")
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
