"""Rows of the accuracy matrix a second, with what unchanged weights make of the images remembered, and without.

    python bench/rows.py [--rows 4] [--images 200] [--method ridge|condu]

The same heads and experts, the same answers: the hits must be equal bit for bit. ``ridge`` stands on features that never
change; ``condu``, with the task hidden, asks the pre-trained weights about every image in every row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from perdure.benchmarks import mini
from perdure.data.task import Context, Stream
from perdure.engine.evaluate import Protocol, evaluate
from perdure.launch import build
from perdure.methods.base import Method
from perdure.models.clip import CLIP

VALUES = {"ridge": {"features": 512}, "condu": {}}


def learned(name: str, stream: Stream, tasks: int) -> Method:
    """The method after ``tasks`` tasks; experts are random steps away from the pre-trained weights: nothing is trained here."""
    method = build(name, VALUES[name])
    clip = CLIP.load(stream.model)
    method.bind(clip, Context(tasks=stream.tasks, labels="all"))
    draw = torch.Generator().manual_seed(0)
    for task in stream.tasks[:tasks]:
        method.start(task)
        if name == "condu":
            moved = {n: w + 1e-3 * torch.randn(w.shape, generator=draw) for n, w in clip.weights().items()}
            clip.load_weights(f"trained {task.name}", moved)
        method.fuse(task)
        with clip.preserved():
            method.load_expert(method.head_expert())
            method.calibrate(task)
    return method


def rows(method: Method, stream: Stream, count: int, remember: bool) -> tuple[float, Sequence[dict[str, Tensor]]]:
    """Seconds, and the hits of ``count`` rows after the first, which both ways must work out."""
    protocol = Protocol("all", "hidden")
    with method.clip.remembering(remember):
        evaluate(method, stream, protocol, 2)
        start = time.perf_counter()
        found = [evaluate(method, stream, protocol, 2) for _ in range(count)]
        return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--images", type=int, default=200, help="test images a task")
    parser.add_argument("--method", choices=sorted(VALUES))
    options = parser.parse_args()
    stream = mini.multi_domain("I").shortened(0, options.images)
    for name in [options.method] if options.method else sorted(VALUES):
        method = learned(name, stream, 2)
        (plain, wanted), (kept, found) = (rows(method, stream, options.rows, remember) for remember in (False, True))
        assert all(torch.equal(a[k], b[k]) for a, b in zip(wanted, found, strict=True) for k in a), "other answers"
        images = sum(len(t.test) for t in stream.tasks) + (len(stream.probe.test) if stream.probe else 0)
        print(
            f"{name}, {images} test images: {options.rows / plain:.2f} rows/s anew, {options.rows / kept:.2f} rows/s "
            f"remembered: {plain / kept:.1f}x; the same answers"
        )


if __name__ == "__main__":
    main()
