"""The runs of a report, checked once: what every table and chart reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perdure.report.palette import Style, style

MANY = 16  # tasks; of more, no eye follows every number or chart
Run = dict[str, Any]
Value = float | None
Interval = tuple[float, float] | None

# What a method that is no contestant is called, and why it is none, by its reference and scope.
REFERENCES = {
    ("lower", "task"): ("lower reference", "Learns nothing: what the model could do from the start."),
    ("upper", "stream"): (
        "upper bound",
        "Learns all tasks at once, which a stream does not allow: what could be reached.",
    ),
    ("upper", "task"): (
        "upper bound",
        "Learns every task alone, from the start: one expert a task, and nothing to forget.",
    ),
}


@dataclass(frozen=True)
class Entry:
    """One run: its metrics dict, its label, and the (rows x tasks) accuracies in per cent with None for gaps."""

    index: int
    run: Run
    method: str
    seeds: str
    label: str
    reference: str
    why: str
    tasks: list[str]
    accuracy: list[list[Value]]
    style: Style

    def metric(self, name: str) -> Value:
        """The metric `name`, None where the file has none."""
        return number(self.run.get(name))

    def interval(self, name: str) -> Interval:
        """The 95 % interval of the metric `name`, None where the file has none."""
        return pair(mapping(self.run.get("intervals")).get(name))

    def deviation(self, name: str) -> Value:
        """The standard deviation over seeds of the metric `name`, None where the file has none."""
        return number(mapping(self.run.get("std")).get(name))

    def course(self, name: str) -> list[Value]:
        """A list field with one number a stage (`probe`), empty where the file has none."""
        found = self.run.get(name)
        return [number(item) for item in found] if isinstance(found, list) else []

    def cell_interval(self, row: int, column: int) -> Interval:
        """The 95 % interval of one accuracy, None where the file has none."""
        return pair(at(at(self.run.get("accuracy_interval"), row), column))

    @property
    def unfinished(self) -> str:
        """How far the run has come, in words, if its tasks are not all learned yet; else empty."""
        done, whole = len(self.accuracy) - 1, len(self.tasks)
        return "" if done >= whole or self.at_once else f"unfinished: {done} of {whole} tasks"

    @property
    def at_once(self) -> bool:
        """Whether all tasks were learned at once, before the first row."""
        return self.run.get("scope") == "stream"

    def stage(self, row: int) -> str:
        """What had been learned at a row of the matrix, in words: `before`, `after 2 digits`."""
        return f"after {self.newest(row)}" if row else "before"

    def newest(self, row: int) -> str:
        """What was learned last at a row of the matrix, from 1 on: `2 digits`."""
        if self.at_once:
            return "all tasks" if len(self.accuracy) <= 2 else f"all, row {row}"
        return f"{row} {self.tasks[row - 1]}"

    def state(self, row: int, column: int) -> str:
        """`unseen`, `now` (the task just learned) or `learned`, of a cell of the matrix."""
        if row == 0 or self.run.get("learns") is False:
            return "unseen"
        if self.at_once or column + 1 < row:
            return "learned"
        return "now" if column + 1 == row else "unseen"


def number(value: object) -> Value:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def pair(value: object) -> Interval:
    """`value` as (low, high) if it is a pair of finite numbers, else None."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def mapping(value: object) -> dict[str, Any]:
    """`value` if it is a dict, else an empty one: files may hold null where a dict is optional."""
    return value if isinstance(value, dict) else {}


def at(value: object, index: int) -> object:
    """`value[index]` if there is such an item of a list, else None."""
    return value[index] if isinstance(value, list) and index < len(value) else None


def mean(values: Sequence[Value]) -> Value:
    """The mean of the numbers among `values`, None if there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def collect(runs: list[Run]) -> list[Entry]:
    """Check the metrics dicts and give each a label and a style.

    Raises ValueError if there is no run, or if a run has no tasks or no accuracy matrix that fits its tasks.
    """
    if not runs:
        raise ValueError("A report needs at least one run; the list of runs is empty.")
    methods = [str(run.get("label") or run.get("method") or "unnamed") for run in runs]
    matrices = [_matrix(run, method) for run, method in zip(runs, methods, strict=True)]
    labels = _labels(methods, [_seeds(run) for run in runs])
    places: Counter[bool] = Counter()
    entries = []
    for index, (run, method, (tasks, accuracy)) in enumerate(zip(runs, methods, matrices, strict=True)):
        reference, why = REFERENCES.get((str(run.get("reference")), str(run.get("scope"))), ("", ""))
        look = style(places[bool(reference)], bool(reference))
        places[bool(reference)] += 1
        entries.append(Entry(index, run, method, _seeds(run), labels[index], reference, why, tasks, accuracy, look))
    return entries


def _matrix(run: Run, method: str) -> tuple[list[str], list[list[Value]]]:
    tasks, rows = run.get("tasks"), run.get("accuracy")
    if not isinstance(tasks, list) or not tasks:
        raise ValueError(f"The run of method {method!r} has no tasks, so there is nothing to report.")
    fits = isinstance(rows, list) and 1 <= len(rows) <= len(tasks) + 1
    if not fits or not all(isinstance(row, list) and len(row) == len(tasks) for row in rows or []):
        raise ValueError(
            f"The run of method {method!r} needs an accuracy matrix of {len(tasks) + 1} rows (before any task, then "
            f"after each) by {len(tasks)} columns (one a task)."
        )
    return [str(task) for task in tasks], [[number(value) for value in row] for row in rows or []]


def _seeds(run: Run) -> str:
    seed = run.get("seed")
    if isinstance(seed, list):
        return ", ".join(str(item) for item in seed)
    return "" if seed is None else str(seed)


def _labels(methods: list[str], seeds: list[str]) -> list[str]:
    # A method name alone is the clearest label; seed and a count are added only where they are needed.
    pairs = list(zip(methods, seeds, strict=True))
    named, seen, labels = Counter(methods), Counter[tuple[str, str]](), []
    for method, seed in pairs:
        seen[method, seed] += 1
        label = f"{method}, seed {seed}" if named[method] > 1 and seed else method
        labels.append(f"{label} ({seen[method, seed]})" if Counter(pairs)[method, seed] > 1 else label)
    return labels


def comparable(entries: list[Entry]) -> bool:
    """Whether all runs learned the same tasks of the same stream, so that their numbers may be ranked."""
    return len({(str(entry.run.get("stream")), tuple(sorted(entry.tasks))) for entry in entries}) == 1


def same_order(entries: list[Entry]) -> bool:
    """Whether all runs met their tasks in the same order, so that a task's number means the same in all."""
    return len({tuple(entry.tasks) for entry in entries}) == 1


def courses(entries: list[Entry]) -> list[tuple[str, str, list[list[Value]]]]:
    """The courses that any run has, as (name, title, one list of numbers in per cent a run, from stage 0 on).

    Where classes come step by step, the accuracy over the classes seen stands in for the mean over tasks learned.
    """
    steps = [[None, *entry.course("incremental")] if entry.course("incremental") else [] for entry in entries]
    learned = [[_learned_mean(entry, row) for row in range(len(entry.accuracy))] for entry in entries]
    found = [
        ("mean-all", "Mean accuracy, all tasks", [[mean(row) for row in entry.accuracy] for entry in entries]),
        ("incremental", "Accuracy over the classes seen", steps)
        if any(steps)
        else ("mean-learned", "Mean accuracy, tasks learned so far", learned),
        ("probe", "Zero-shot probe", [entry.course("probe") for entry in entries]),
    ]
    return [course for course in found if any(value is not None for line in course[2] for value in line)]


def _learned_mean(entry: Entry, row: int) -> Value:
    values = enumerate(entry.accuracy[row])
    return mean([value for column, value in values if entry.state(row, column) != "unseen"])


def span(values: Sequence[float]) -> tuple[float, float]:
    """The tens, in per cent, between which a chart of `values` runs; its numbers say that it does not start at 0."""
    low = max(0.0, 10 * math.floor(min(values, default=0.0) / 10))
    high = min(100.0, 10 * math.ceil(max(values, default=100.0) / 10))
    return min(low, high - 10), high
