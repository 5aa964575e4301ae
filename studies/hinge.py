"""Whether RAPF's hinge parts the classes that it is for: confusions of hard pairs on the small world.

    python studies/hinge.py [--seeds 3] [--near 0.03q 0.1q] [--hinge 0 1 5]

``mini-cil``, ten steps. A hard pair: an old class and a new one whose texts lie nearer than ``near``. Counted are test images
of either class of a pair that are answered with the other, after the last step, all sixty classes competing; and the accuracy.
"""

from __future__ import annotations

import argparse

import torch

from perdure import launch
from perdure.benchmarks import mini
from perdure.core.caller import undisturbed
from perdure.core.seeding import reseed
from perdure.data.task import Query, Stream
from perdure.engine.settings import Settings
from perdure.engine.teach import Teacher
from perdure.engine.watcher import Watcher
from perdure.launch.configure import configure
from perdure.methods.rapf import near_pairs
from perdure.models.clip import CLIP


def counted(clip: CLIP, stream: Stream, seed: int, near: str, hinge: float) -> tuple[int, int, int, float]:
    """Hard pairs, confusions of them, images that could have been, accuracy in per cent."""
    config, _ = configure("rapf", "mini-cil", seed, {"near": near, "hinge": str(hinge)}, {})
    method = launch.build("rapf", config["options"])
    reseed(seed, "bind")
    method.bind(clip, stream.context(seed))
    teacher = Teacher(method, seed, Settings(precision="fp32"), Watcher())
    method.lend(teacher.train)
    classes = [one for task in stream.tasks for one in task.classes]
    texts, pairs, old = clip.class_texts([one.prompts() for one in classes]), set[tuple[int, int]](), 0
    for number, task in enumerate(stream.tasks, 1):
        teacher.learn(task, number)
        pairs |= set(near_pairs(texts, old, list(range(old, old + len(task.classes))), near) if old else ())
        old += len(task.classes)
    first, confused, possible, right, total = 0, 0, 0, 0, 0
    for task in stream.tasks:
        said = method.answer([Query(task.test.pixels, tuple(classes))])[0].argmax(1).tolist()
        for found, wanted in zip(said, (task.test.labels + first).tolist(), strict=True):
            right, total = right + (found == wanted), total + 1
            for pair in pairs:
                possible += wanted in pair
                confused += wanted in pair and found in pair and found != wanted
        first += len(task.classes)
    return len(pairs), confused, possible, 100 * right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--near", nargs="+", default=["0.03q", "0.1q"])
    parser.add_argument("--hinge", nargs="+", type=float, default=[0.0, 1.0, 5.0])
    asked = parser.parse_args()
    print(
        "| near | hard pairs | weight of the hinge | confusions, by seed | last step, by seed |\n|---|---|---|---|---|"
    )
    with undisturbed():
        torch.set_num_threads(1)
        clip, stream = CLIP.load(str(mini.MODEL)), mini.class_incremental()
        for near in asked.near:
            for hinge in asked.hinge:
                found = [counted(clip, stream, seed, near, hinge) for seed in range(asked.seeds)]
                pairs, possible = found[0][0], found[0][2]
                confused = ", ".join(str(one[1]) for one in found)
                last = ", ".join(f"{one[3]:.1f}" for one in found)
                print(f"| {near} | {pairs} | {hinge:g} | {confused} of {possible:,} | {last} |", flush=True)


if __name__ == "__main__":
    main()
