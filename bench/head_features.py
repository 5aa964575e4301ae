"""MG-CLIP's head on features that are encoded once, against encoding the images again in every epoch.

    python bench/head_features.py [--images 640] [--epochs 3] [--size mini|vit-b-16]

The same rows, the same order, frozen towers, no augmentation: the weights at the end must be the same. ``mini``: the small
world's CLIP on its own drawings; ``vit-b-16``: random weights and images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from gift_step import vit_b_16
from torch import Tensor

from perdure.benchmarks import mini
from perdure.data.task import Batch, Images
from perdure.methods.mg_clip import Config, HeadLearner
from perdure.models.clip import CLIP
from perdure.models.heads import CosineHead
from perdure.ops.prototypes import class_means
from perdure.training.fit import batches, optimise


@torch.no_grad()
def encoded(clip: CLIP, pixels: Tensor) -> Tensor:
    return torch.cat([clip.encode_image(x) for x in pixels.split(64)])


def start(clip: CLIP, images: Images, count: int) -> tuple[Tensor, Tensor]:
    features = encoded(clip, images.pixels)
    return features, class_means(features, images.labels, count)[0]


def train(rows: Tensor, config: Config, count: int, draws: Iterator[Batch]) -> Tensor:
    learner = HeadLearner(CosineHead(rows), config)
    optimise(learner, learner.plan(count), draws, rows.device)
    return learner.head.rows.detach()


def cached(clip: CLIP, images: Images, count: int, config: Config) -> Tensor:
    features, rows = start(clip, images, count)
    order = batches(len(images), config.head_batch, torch.Generator().manual_seed(0))
    return train(rows, config, len(images), (Batch(features[i], images.labels[i]) for i in order))


def anew(clip: CLIP, images: Images, count: int, config: Config) -> Tensor:
    """The rows start from one pass over the images; every step of training then encodes its own."""
    _, rows = start(clip, images, count)
    order = batches(len(images), config.head_batch, torch.Generator().manual_seed(0))
    draws = (Batch(encoded(clip, images.pixels[i]), images.labels[i]) for i in order)
    return train(rows, config, len(images), draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", choices=("mini", "vit-b-16"), default="mini")
    options = parser.parse_args()
    if options.size == "mini":
        clip, task = CLIP.load(str(mini.MODEL)), mini.multi_domain("I").tasks[3]
        images, count = task.train.spread(options.images), len(task.classes)
    else:
        clip, draw, count = vit_b_16(), torch.Generator().manual_seed(0), 10
        pixels = torch.randint(0, 256, (options.images, 3, 224, 224), generator=draw, dtype=torch.uint8)
        images = Images(pixels, torch.randint(count, (options.images,), generator=draw))
    config = Config(head_epochs=options.epochs)
    took, rows = [], []
    for way in (anew, cached):
        begin = time.perf_counter()
        rows.append(way(clip, images, count, config))
        took.append(time.perf_counter() - begin)
    print(f"{options.size}, {len(images)} images, {options.epochs} epochs, {torch.get_num_threads()} threads")
    print(f"encoded anew {took[0]:.2f} s, once {took[1]:.2f} s: {took[0] / took[1]:.2f}x; ", end="")
    print(f"the rows differ by {(rows[0] - rows[1]).abs().max().item():.1e} at most")


if __name__ == "__main__":
    main()
