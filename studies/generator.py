"""Does the embedded generator draw what it is asked for? The judge is the embedded CLIP.

    python studies/generator.py [--images 160] [--steps 12]

Zero-shot top-1 of the small CLIP on generated images, within the classes of each domain and among 200 of the vocabulary,
beside the same on real held-out drawings; and a grid of samples. Written to ``docs/gift``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perdure.benchmarks import mini
from perdure.data.task import Class
from perdure.models.clip import CLIP
from perdure.synthesis.generator import Generator
from perdure.synthesis.prompts import Request

OUT = Path(__file__).resolve().parents[1] / "docs" / "gift"
SAMPLES = (
    "an icon of home", "an icon of search", "an icon of heart", "an icon of star", "an icon of mail", "an icon of key",
    "a drawing of a cat", "a drawing of a fish", "a drawing of pizza", "a drawing of apple", "a drawing of a car",
    "a drawing of a bicycle", "a weather icon of cloud", "a weather icon of snow", "a drawing of a scissors",
    "a drawing of a hammer", "the letter a", "the letter r", "the number eight", "an icon of calendar",
)  # fmt: skip


def drawn(generator: Generator, prompts: Sequence[str]) -> Tensor:
    """(N, 3, 32, 32) uint8, image k from seed k."""
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    return torch.stack([image for _, image in generator.draw(requests)])


@torch.no_grad()
def accuracy(clip: CLIP, images: Tensor, labels: Tensor, classes: Sequence[Class]) -> float:
    """Zero-shot top-1 in per cent, as streams are evaluated: texts averaged over a class's templates."""
    texts = clip.class_texts([c.prompts() for c in classes])
    found = torch.cat([(clip.encode_image(x) @ texts.T).argmax(1) for x in images.split(256)])
    return 100 * found.eq(labels).float().mean().item()


def judge(clip: CLIP, generator: Generator, images: int) -> list[tuple[str, int, float, float]]:
    """Rows (domain, classes, generated, real held-out drawings)."""
    rows = []
    for task in mini.multi_domain("I").tasks:
        prompts = task.prompts()
        labels = torch.arange(images) % len(prompts)
        made = drawn(generator, [prompts[k] for k in labels.tolist()])
        real = accuracy(clip, task.test.pixels, task.test.labels, task.classes)
        rows.append((task.name, len(prompts), accuracy(clip, made, labels, task.classes), real))
        print(*rows[-1], flush=True)
    return [*rows, vocabulary(clip, generator)]


def vocabulary(clip: CLIP, generator: Generator) -> tuple[str, int, float, float]:
    """200 prompts of the vocabulary, drawn once each; the real drawings are the probe's of the same concepts."""
    order = torch.randperm(len(mini.vocabulary()), generator=torch.Generator().manual_seed(0))[:200].tolist()
    names = [mini.vocabulary()[k] for k in sorted(order)]
    prompts = [c.prompts()[0] for c in names]
    probe, place = mini.probe(), {c.name: k for k, c in enumerate(names)}
    known = torch.tensor([place.get(c.name, -1) for c in probe.classes])[probe.test.labels]
    real = accuracy(clip, probe.test.pixels[known >= 0], known[known >= 0], names)
    made = drawn(generator, prompts)
    return "200 of the vocabulary", 200, accuracy(clip, made, torch.arange(200), names), real


def grid(generator: Generator, path: Path, each: int = 8, scale: int = 2) -> None:
    """Samples, two prompts a row, ``each`` seeds a prompt."""
    images = drawn(generator, [p for p in SAMPLES for _ in range(each)]).permute(0, 2, 3, 1).numpy()
    rows = images.reshape(len(SAMPLES) // 2, 2 * each, 32, 32, 3).swapaxes(1, 2).reshape(-1, 2 * each * 32, 3)
    Image.fromarray(np.ascontiguousarray(rows)).resize((rows.shape[1] * scale, rows.shape[0] * scale), 0).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160, help="a domain, its classes in turn")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=8.0)
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    clip = CLIP.load(str(mini.MODEL))
    generator = Generator(str(mini.GENERATOR), options.steps, options.guidance, 32)
    generator.check_prompts(SAMPLES)  # loads it
    start = time.perf_counter()
    grid(generator, OUT / "samples.png")
    each = (time.perf_counter() - start) / (8 * len(SAMPLES))
    rows = judge(clip, generator, options.images)
    lines = [
        f"<!-- made by: python studies/generator.py --images {options.images} --steps {options.steps} -->",
        "| within the classes of | classes | generated | real held-out drawings |",
        "|---|---|---|---|",
        *(f"| {name} | {classes} | {made:.1f} | {real:.1f} |" for name, classes, made, real in rows),
        "",
        f"{options.steps} steps, guidance {options.guidance}: {each:.3f} s an image, 1,000 in {1000 * each:.0f} s.",
    ]
    (OUT / "generator.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
