"""What becomes of image features while two tasks of the small world are learned, one after the other: PFR and VCReg.

    python studies/features.py [--steps 25] [--lr 5e-4] [--seed 0] [pfr] [vcreg]

Letters, then digits, by the method and ``fit`` alone (32 images a step, no run, nothing kept), a row a setting. By task: the
accuracy of a linear probe (ridge regression) on unit image features, and the answers by the classes' texts; the effective rank
and the mean |correlation| of what the image tower pools, over the test images of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from perdure import launch
from perdure.benchmarks import mini
from perdure.core.seeding import reseed
from perdure.data.task import Context, Task
from perdure.launch.options import build
from perdure.models.clip import CLIP
from perdure.ops.redundancy import effective_rank, mean_correlation
from perdure.training.fit import fit

RIDGE, TASKS = 0.05, ("letters", "digits")
PARTS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "pfr": ("pfr", {"fine-tuning": {"distil": "none"}, "direct": {"distil": "direct"}, "projected": {}}),
    "vcreg": (
        "vcreg",
        {
            "fine-tuning": {"vcreg": "none"},
            "the port's 0.16, 0.01": {},
            "1, 0.05": {"vcreg_var": 1.0, "vcreg_cov": 0.05},
        },
    ),
}


def probed(clip: CLIP, task: Task) -> float:
    """Accuracy in per cent of a linear probe on a task's image features."""
    train, test = (clip.embeddings(side.pixels).double() for side in (task.train, task.test))
    hot = F.one_hot(task.train.labels, len(task.classes)).double()
    gram = train.T @ train + RIDGE * torch.eye(train.shape[1], dtype=torch.float64)
    hits = (test @ torch.linalg.solve(gram, train.T @ hot)).argmax(1) == task.test.labels
    return 100 * float(hits.double().mean())


def answered(clip: CLIP, task: Task) -> float:
    """Accuracy in per cent of the answers by the classes' texts."""
    texts = clip.class_texts([c.prompts() for c in task.classes])
    hits = clip.similarity(clip.embeddings(task.test.pixels), texts).argmax(1) == task.test.labels
    return 100 * float(hits.double().mean())


def tasks() -> list[Task]:
    """The two tasks."""
    named = {task.name: task for task in mini.multi_domain("I").tasks}
    return [replace(named[name], index=k) for k, name in enumerate(TASKS)]


def taught(name: str, values: Mapping[str, Any], seed: int) -> CLIP:
    """The small CLIP after both tasks."""
    clip = CLIP.load(str(mini.MODEL))
    known = {key: option.default for key, (_, option) in launch.method_options(launch.method_entry(name)).items()}
    method = build(name, {**known, "batch_size": 32, "warmup": 2, **values})
    method.bind(clip, Context(seed))
    for task in tasks():
        generator = reseed(seed, task.index)
        method.begin_task(task)
        fit(method, task, generator, clip.size, clip.device)
        clip.trained(task.name, method.parameters().values())
    return clip


def row(label: str, clip: CLIP) -> str:
    """What is measured of a model, as a row of a table."""
    pooled = torch.cat([clip.features(task.test.pixels).pooled for task in tasks()])
    cells = [f"{probed(clip, task):.1f} / {answered(clip, task):.1f}" for task in tasks()]
    return f"| {label} | {' | '.join(cells)} | {effective_rank(pooled):.1f} | {mean_correlation(pooled):.3f} |"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("parts", nargs="*", default=list(PARTS), help="pfr, vcreg")
    words.add_argument("--steps", type=int, default=25)
    words.add_argument("--lr", type=float, default=5e-4)
    words.add_argument("--seed", type=int, default=0)
    given = words.parse_args()
    for part in given.parts:
        method, settings = PARTS[part]
        print(
            f"| {part} | {' | '.join(f'{name}, probe / texts' for name in TASKS)} | effective rank | corr |", flush=True
        )
        print("|---|---|---|---|---|", flush=True)
        for label, values in settings.items():
            more = {"iterations": given.steps, "lr": given.lr, **values}
            print(row(label, taught(method, more, given.seed)), flush=True)


if __name__ == "__main__":
    main()
