"""What image features of finished runs are like: how many directions they use, and what a linear probe reads from them.

    python studies/features.py RUN ...

Of the weights that a run ends with, on all its tasks: the effective rank and the mean |correlation| of two dimensions of what
the image tower pools, over all test images; and by task the accuracy of a ridge regression on unit image features.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from perdure import launch
from perdure.data.task import Stream, Task
from perdure.models.clip import CLIP
from perdure.ops.redundancy import effective_rank, mean_correlation

RIDGE = 0.05


def weights_of(run: Path) -> CLIP:
    """The model that a run ends with."""
    with tempfile.TemporaryDirectory() as scratch:
        launch.export(run, Path(scratch) / "clip")
        return CLIP.load(f"{scratch}/clip")


def probed(clip: CLIP, task: Task) -> float:
    """Accuracy in per cent of a linear probe on a task's image features."""
    train, test = (clip.embeddings(side.pixels).double() for side in (task.train, task.test))
    hot = F.one_hot(task.train.labels, len(task.classes)).double()
    gram = train.T @ train + RIDGE * torch.eye(train.shape[1], dtype=torch.float64)
    hits = (test @ torch.linalg.solve(gram, train.T @ hot)).argmax(1) == task.test.labels
    return 100 * float(hits.double().mean())


def said(run: Path, clip: CLIP, stream: Stream) -> str:
    pooled = torch.cat([clip.features(task.test.pixels).pooled for task in stream.tasks])
    probes = ", ".join(f"{task.name} {probed(clip, task):.1f}" for task in stream.tasks)
    return f"{run}: effective rank {effective_rank(pooled):.1f}, |corr| {mean_correlation(pooled):.3f}; probe {probes}"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("runs", nargs="+", type=Path)
    for run in words.parse_args().runs:
        for one in launch.seed_folders(run) or [run]:
            print(said(one, weights_of(one), launch.reopen(one)[1]), flush=True)


if __name__ == "__main__":
    main()
