"""A stream to tune on: ``mini-mtil``'s first tasks, each asked about a fifth of its training images, which is not trained on.

No test image of any stream is in it. ``python studies/table.py rates`` runs on it; ``perdure run --stream studies/held_out.py``
does too.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from perdure.benchmarks import mini
from perdure.data.task import Images, Stream, Task

TASKS, FIFTH = 3, 5


def parted(images: Images) -> tuple[Images, Images]:
    """What is trained on, and what is held out: every image whose bytes' checksum says so, copies together."""
    sums = [int(hashlib.sha256(x.numpy().tobytes()).hexdigest(), 16) for x in images.pixels]
    held = torch.tensor([x % FIFTH == 0 for x in sums])
    return images.take((~held).nonzero().squeeze(1)), images.take(held.nonzero().squeeze(1))


def asked_of_its_own(task: Task) -> Task:
    train, test = parted(task.train)
    return replace(task, train=train, test=test)


def stream() -> Stream:
    """The stream, under a name and a digest of its own; nothing of another concept is asked about."""
    whole = mini.multi_domain("I")
    tasks = tuple(asked_of_its_own(task) for task in whole.tasks[:TASKS])
    digest = hashlib.sha256(f"a fifth held out of {whole.digest}".encode()).hexdigest()
    return replace(whole, name="held-out", tasks=tasks, probe=None, digest=digest)
