"""Evaluation under an explicit protocol: which class names compete, and whether the task is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.seeding import derive
from perdure.data.task import Class, Probe, Query, Stream, Task
from perdure.methods.base import Method
from perdure.ops import metrics
from perdure.ops.gap import measure

DRAWS = 1000  # bootstrap samples
BASE_NEW = ("performance_drop", "base", "new", "harmonic_mean")  # figures of streams with base and new classes


@dataclass(frozen=True)
class Protocol:
    """``labels``: the classes that compete for an image of task j after task i: those of task j (``task``), of the tasks
    seen so far and of task j (``seen``), or of all tasks (``all``). ``task_id``: whether the method is told j."""

    labels: Literal["task", "seen", "all"]
    task_id: Literal["known", "hidden"]

    def classes(self, stream: Stream, seen: int, j: int) -> tuple[tuple[Class, ...], int]:
        """The competing classes after ``seen`` tasks, and where task j's own begin among them."""
        numbers = {"task": [j], "seen": sorted({*range(seen), j}), "all": range(len(stream.tasks))}[self.labels]
        own = sum(len(stream.tasks[k].classes) for k in numbers if k < j)
        return tuple(c for k in numbers for c in stream.tasks[k].classes), own

    def __str__(self) -> str:
        return f"labels={self.labels}, task_id={self.task_id}"


def evaluate(
    method: Method, stream: Stream, protocol: Protocol, seen: int, only_seen: bool = False
) -> dict[str, Tensor]:
    """After ``seen`` tasks: which test images of each task, by name, and of the probe are answered rightly, (N,) uint8;
    ``only_seen``: of these tasks alone."""
    queries, labels = {}, {}
    for j, task in enumerate(stream.tasks[:seen] if only_seen else stream.tasks):
        classes, own = protocol.classes(stream, seen, j)
        queries[task.name] = Query(task.test.pixels, classes, j if protocol.task_id == "known" else None)
        labels[task.name] = task.test.labels + own
    if stream.probe is not None and not only_seen:
        queries["probe"] = Query(stream.probe.test.pixels, stream.probe.classes)
        labels["probe"] = stream.probe.test.labels
    answers = method.answer(list(queries.values()))
    return {name: hits(answer, labels[name], name) for name, answer in zip(queries, answers, strict=True)}


def hits(answer: Tensor, labels: Tensor, what: str) -> Tensor:
    """(N,) uint8: which of the images are answered rightly, by logits (N, C). ``PerdureError`` where these are no numbers."""
    if bool(answer.isnan().any()):
        raise PerdureError(
            f"The images of {what} are answered with values that are no numbers (NaN): training diverged, or a head holds "
            "what is none. Nothing of this state is kept, those before it are. A smaller lr may help."
        )
    return answer.argmax(1).cpu().eq(labels).to(torch.uint8)


def for_gap(stream: Stream, images: int = 256) -> list[Probe | Task]:
    """What the modality gap is measured on: ``images`` images of the probe, or of all tasks where there is none."""
    asked: Sequence[Probe | Task] = [stream.probe] if stream.probe else stream.tasks
    return [replace(part, test=part.test.spread(max(1, images // len(asked)))) for part in asked]


@torch.no_grad()
def gap(method: Method, asked: Sequence[Probe | Task]) -> dict[str, float]:
    """The modality gap on the test images of ``asked``, by the weights whose features a head would stand on."""
    first = torch.tensor([0, *(len(part.classes) for part in asked)]).cumsum(0).tolist()
    clip = method.clip
    with clip.preserved():
        method.load_expert(method.head_expert())
        texts = clip.class_texts([c.prompts()[:1] for part in asked for c in part.classes])
        embedded = torch.cat([clip.embeddings(part.test.pixels) for part in asked])
    labels = torch.cat([part.test.labels + shift for part, shift in zip(asked, first, strict=False)])
    return measure(embedded, texts, labels.to(texts.device), clip.scale.item())


def per_cent(hits: Tensor) -> float:
    """The mean of hits, in per cent."""
    return 100 * hits.double().mean().item()


def summarise(stream: Stream, rows: list[dict[str, Tensor]], protocol: Protocol, transfers: bool) -> dict[str, Any]:
    """Every figure of a run, from the hits after each task (row 0: before any).

    While tasks are missing, figures are None; once all are done they come with 95 % bootstrap intervals. ``transfers``:
    whether the rows are a course over tasks; where all tasks are learned at once, figures that compare rows are None too.
    """
    names = [t.name for t in stream.tasks]
    accuracy = [[per_cent(row[name]) for name in names] for row in rows]
    sizes = np.array([len(t.test) for t in stream.tasks], dtype=np.float64)
    steps = seen_accuracy(np.array(accuracy), sizes) if protocol.labels == "seen" else None
    out: dict[str, Any] = {
        "accuracy": accuracy,
        "probe": [per_cent(row["probe"]) for row in rows] if "probe" in rows[0] else None,
        **dict.fromkeys(metrics.FIGURES),
        "incremental": steps.tolist() if steps is not None else None,
        "incremental_average": None,
        "incremental_last": None,
        **dict.fromkeys(BASE_NEW if stream.base_new else ()),
        "intervals": {},
    }
    if len(rows) <= len(names):
        return out
    samples = {name: bootstrap([row[name] for row in rows], name) for name in rows[0]}
    draws = np.stack([samples[n] for n in names], axis=-1)  # (draws, rows, tasks)
    for name, figure in metrics.FIGURES.items():
        value = figure(accuracy) if transfers or name in ("average", "last") else None
        if value is not None:
            out[name] = float(value)
            out["intervals"][name] = metrics.interval(figure(draws))  # type: ignore[arg-type]
    if steps is not None:
        out["incremental_average"], out["incremental_last"] = metrics.incremental(steps)
        resampled = seen_accuracy(draws, sizes)
        out["intervals"]["incremental_average"] = metrics.interval(resampled.mean(1))
        out["intervals"]["incremental_last"] = metrics.interval(resampled[:, -1])
    if stream.base_new == "probe" or (stream.base_new and steps is not None):
        given = np.array(accuracy), np.array(out["probe"] or []), draws, samples.get("probe")
        for name, (value, sampled) in of_base_and_new(stream, *given, sizes).items():
            out[name], out["intervals"][name] = float(value), metrics.interval(sampled)
    out["accuracy_interval"] = [[metrics.interval(draws[:, i, j]) for j in range(len(names))] for i in range(len(rows))]
    out["probe_interval"] = [metrics.interval(s) for s in samples["probe"].T] if "probe" in samples else None
    return out


def of_base_and_new(
    stream: Stream, accuracy: metrics.Matrix, probe: metrics.Matrix, draws: metrics.Matrix, probe_draws: Any,
    sizes: metrics.Matrix,
) -> dict[str, tuple[Any, metrics.Matrix]]:  # fmt: skip
    """What a stream with base and new classes is judged by, after the last task: each figure, and its bootstrap samples, of
    accuracies (rows, T) and the probe's (rows,), and of (draws, rows, T) and (draws, rows)."""

    def figures(rows: metrics.Matrix, asked: Any) -> dict[str, Any]:
        base, new = metrics.base_and_new(rows[..., -1, :], sizes)
        drop = {}
        if stream.base_new == "probe":
            new = asked[..., -1]
        else:
            drop = {"performance_drop": metrics.performance_drop(seen_accuracy(rows, sizes))}
        return {
            **drop,
            "base": base,
            **({"new": new, "harmonic_mean": metrics.harmonic_mean(base, new)} if new is not None else {}),
        }

    values, sampled = figures(accuracy, probe), figures(draws, probe_draws)
    return {name: (value, sampled[name]) for name, value in values.items()}


def seen_accuracy(accuracy: metrics.Matrix, sizes: metrics.Matrix) -> metrics.Matrix:
    """Class-incremental accuracy: (…, rows, T) → (…, rows - 1), over all test images of the tasks seen at each step.

    ``sizes`` (T,): test images a task.
    """
    tasks = len(sizes)
    seen = np.tril(np.ones((tasks, tasks)))[: accuracy.shape[-2] - 1] * sizes
    return (accuracy[..., 1:, :] * (seen / seen.sum(1, keepdims=True))).sum(-1)


def bootstrap(hits: list[Tensor], name: str) -> metrics.Matrix:
    """(draws, rows) accuracies of resampled test images of one task; the draws depend on its name alone."""
    rng = np.random.default_rng(derive("bootstrap", name))
    return metrics.resampled(torch.stack(hits).numpy().astype(bool), DRAWS, rng)
