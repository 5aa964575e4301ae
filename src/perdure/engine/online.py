"""Online learning: a stream seen once, in small batches, and asked about in between.

What is measured: the accuracy over the test images of all tasks begun so far, every so many steps and after each task; its mean
over these moments (accuracy over the stream, "anytime"); forgetting, as of any run; and how many images a second are learned.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.data.task import Stream, Task
from perdure.engine.evaluate import Protocol, evaluate, per_cent
from perdure.methods.base import Method

ONE_PASS = {"epochs": 1, "batch_size": 10, "warmup": 0}  # of a method that has these options; its own say more


def check_one_pass(values: Mapping[str, Any]) -> None:
    """Refuse more than one pass over a task's images where they are to be seen once."""
    if values.get("epochs", 1) != 1:
        way = "0 passes say iterations" if values["epochs"] == 0 else f"{values['epochs']} passes see them more often"
        raise PerdureError(f"online=true: every image is seen once, and {way}. Set epochs=1, or online=false.")


def check_asked(method: Method) -> None:
    """Refuse to ask a method while it learns whose answers are made when a task is over: experts, averages, heads."""
    parts = getattr(method, "parts", {"fuse": method, "answer": method})
    if type(parts["fuse"]).experts is not Method.experts or parts["answer"].finalizes():
        raise PerdureError(
            f"evaluate_every: what {type(method).__name__} answers with is made when a task is over (experts, or a head), so "
            "there is nothing to ask while it learns. Leave evaluate_every out."
        )


class Between:
    """Asks a method that is being trained, and counts what it was shown."""

    def __init__(self, method: Method, stream: Stream, protocol: Protocol, every: int):
        self.method, self.stream, self.protocol, self.every = method, stream, protocol, every
        self.begins(0, None)

    def begins(self, number: int, task: Task | None) -> None:
        """Task ``number`` (1 … T) is about to be learned; None: nothing is."""
        self.number, self.task, self.steps, self.seconds = number, task, 0, 0.0
        self.points: list[dict[str, Any]] = []

    def taken(self, step: int, total: int, losses: Mapping[str, Tensor]) -> None:
        """A step was taken."""
        self.steps = step
        if not self.every or step % self.every or step == total:
            return
        start, method = time.perf_counter(), self.method
        assert self.task is not None
        method.clip.trained(f"{self.task.name} at step {step}", method.parameters().values())
        hits = evaluate(method, self.stream, self.protocol, self.number, only_seen=True)
        self.add(hits)
        self.seconds += time.perf_counter() - start

    def add(self, hits: Mapping[str, Tensor]) -> None:
        """A moment at which it was asked about all tasks begun so far; hits by task, perhaps of others too."""
        seen = torch.cat([hits[task.name] for task in self.stream.tasks[: self.number]])
        self.points.append({"step": self.steps, "images": self.shown(), "accuracy": per_cent(seen)})

    def shown(self) -> int:
        """Images of the task that it was shown by now, each pass anew."""
        if not self.steps or self.task is None:
            return 0
        count, size = len(self.task.train), self.method.schedule(self.task).batch_size
        passes, rest = divmod(self.steps, -(-count // size))
        return passes * count + min(count, rest * size)


def course(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the records of tasks: the moments at which it was asked, the mean accuracy over them, images a second."""
    own = [record for record in records if record.get("online")]
    points, before = [], 0
    for record in own:
        points += [{"task": record["task"], **p, "images": before + p["images"]} for p in record["online"]["points"]]
        before += record["online"]["images"]
    if not points:
        return {}
    seconds = sum(record["seconds"]["train"] for record in own)
    return {
        "online": points,
        "anytime": sum(p["accuracy"] for p in points) / len(points),
        "throughput": before / seconds if seconds else None,
    }
