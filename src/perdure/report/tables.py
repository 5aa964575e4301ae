"""The tables of the page: metrics, accuracy matrices, time, and what the runs were made with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from perdure.report.entries import Entry, Interval, Value, comparable, mapping, number
from perdure.report.layers import about_layers
from perdure.report.palette import colours


@dataclass(frozen=True)
class Metric:
    """A column of the metrics table; `better` is `higher` or `lower`, `always` shows it even where it is empty."""

    name: str
    title: str
    unit: str
    better: str
    meaning: str
    always: bool = False


METRICS = (
    Metric("transfer", "Transfer", "%", "higher", "Mean accuracy on tasks not learned yet, after others have been: "
           "how much zero-shot ability is left.", True),
    Metric("average", "Average", "%", "higher", "Mean accuracy over all tasks, learned or not, and all stages but "
           "the one before the first task.", True),
    Metric("last", "Last", "%", "higher", "Mean accuracy over all tasks after the last one.", True),
    Metric("forgetting", "Forgetting", "points", "lower", "How far tasks have fallen at the end from the best since "
           "they were learned, on average over all but the last.", True),
    Metric("backward_transfer", "Backward transfer", "points", "higher", "Change on a task from the moment it was "
           "learned to the end, on average over all but the last; below zero is forgetting."),
    Metric("forward_transfer", "Forward transfer", "points", "higher", "Change on a task from before any was learned "
           "to just before its own turn; below zero means that learning cost zero-shot ability."),
    Metric("incremental_average", "Incremental average", "%", "higher", "Accuracy over the classes seen so far, "
           "averaged over the stages."),
    Metric("incremental_last", "Incremental last", "%", "higher", "Accuracy over all classes after the last stage."),
    Metric("anytime", "Anytime", "%", "higher", "Accuracy over the tasks begun so far, averaged over all moments at which it "
           "was asked, while tasks were learned and after each."),
    Metric("throughput", "Throughput", "images/s", "higher", "Images of the tasks learned a second of training."),
    Metric("performance_drop", "Performance drop", "points", "lower", "Accuracy over the classes seen after the first "
           "session minus that after the last one."),
    Metric("base", "Base", "%", "higher", "Accuracy on the classes of the first session, after the last one."),
    Metric("new", "New", "%", "higher", "Accuracy on the classes that came after the first session, or that were never "
           "taught where half of a task's were, after the last one."),
    Metric("harmonic_mean", "Harmonic mean", "%", "higher", "Of base and new."),
    Metric("probe", "Probe", "%", "higher", "Zero-shot accuracy on data that no task contains, before the first task "
           "and after the last."),
    Metric("seconds", "Time", "", "lower", "Wall-clock time of the run, training and evaluation."),
    Metric("peak_memory_mb", "Memory", "", "lower", "Highest memory use of the run."),
)  # fmt: skip


@dataclass
class Cell:
    """One metric of one run: the exact value, how it is written, and what stands beneath in quieter type."""

    metric: str
    value: Value
    text: str
    note: str = ""
    before: Value = None
    best: bool = False


@dataclass(frozen=True)
class Shade:
    """One accuracy of a matrix: the exact value, its text, its colours in light and dark, its state and its tip."""

    value: Value
    text: str
    tip: str
    state: str
    colours: str = ""


@dataclass(frozen=True)
class Matrix:
    """The accuracy matrix of one run: (newest task, cells) rows; `upright` asks for vertical task names."""

    entry: Entry
    rows: list[tuple[str, list[Shade]]] = field(default_factory=list)
    upright: bool = False


def plain(value: Value) -> str:
    """The exact value as JSON would write it, empty for None: what the page's data attributes hold."""
    return "" if value is None else json.dumps(value)


def duration(seconds: float) -> str:
    """Seconds as people say them: `8.1 s`, `12.5 min`, `3.2 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def memory(megabytes: float) -> str:
    """Megabytes as people say them: `812 MB`, `14.2 GB`."""
    return f"{megabytes:.0f} MB" if megabytes < 10000 else f"{megabytes / 1000:.1f} GB"


def signed(value: float) -> str:
    """One decimal with a true minus sign, and never a minus before zero."""
    return f"{value:.1f}".replace("-0.0", "0.0").replace("-", "\u2212")


def between(interval: Interval) -> str:
    """An interval as `47.0 to 49.5`, empty for None."""
    return "" if interval is None else f"{signed(interval[0])} to {signed(interval[1])}"


def metrics(entries: list[Entry]) -> tuple[list[Metric], list[list[Cell]]]:
    """The metrics that any run has, and one row of cells a run; the best of each column is marked."""
    rows = [[_cell(entry, metric) for metric in METRICS] for entry in entries]
    kept = [i for i, metric in enumerate(METRICS) if metric.always or any(row[i].value is not None for row in rows)]
    rows = [[row[i] for i in kept] for row in rows]
    columns = [METRICS[i] for i in kept]
    if comparable(entries):
        for place, metric in enumerate(columns):
            _mark([row[place] for row, entry in zip(rows, entries, strict=True) if not entry.reference], metric)
    return columns, rows


def _cell(entry: Entry, metric: Metric) -> Cell:
    course = entry.course("probe")
    if metric.name == "probe":
        value, before = (course[-1], course[0]) if course else (None, None)
        text = " \u2192 ".join("\u2013" if v is None else signed(v) for v in (before, value)) if course else "\u2013"
        return Cell("probe", value, text, before=before)
    value, deviation = entry.metric(metric.name), entry.deviation(metric.name)
    write = {"seconds": duration, "peak_memory_mb": memory}.get(metric.name, signed)
    notes = [between(entry.interval(metric.name)), "" if deviation is None else f"\u00b1 {write(deviation)}"]
    return Cell(metric.name, value, "\u2013" if value is None else write(value), ", ".join(filter(None, notes)))


def _mark(cells: list[Cell], metric: Metric) -> None:
    values = [cell.value for cell in cells if cell.value is not None]
    # Where all are equal, or there is only one, nothing is best.
    if len(values) > 1 and min(values) < max(values):
        best = max(values) if metric.better == "higher" else min(values)
        for cell in cells:
            cell.best = cell.value == best


def matrix(entry: Entry) -> Matrix:
    """The accuracy matrix of a run, ready to be written as a table."""
    rows = [
        (entry.newest(r) if r else "before", [_shade(entry, r, c, value) for c, value in enumerate(row)])
        for r, row in enumerate(entry.accuracy)
    ]
    return Matrix(entry, rows, len(entry.tasks) > 10 or max(map(len, entry.tasks)) > 11)


def _shade(entry: Entry, row: int, column: int, value: Value) -> Shade:
    where, state = f"{entry.tasks[column]}, {entry.stage(row)}", entry.state(row, column)
    if value is None:
        return Shade(None, "\u2013", f"{where}: not measured", state)
    interval = between(entry.cell_interval(row, column))
    tip = f"{where}: {value:.2f} %" + (f" (95 % interval {interval})" if interval else "")
    return Shade(value, f"{value:.1f}", tip, state, colours(value))


def scale() -> list[tuple[int, str]]:
    """The steps of the colour scale's legend: per cent and colours."""
    return [(value, colours(value)) for value in range(0, 101, 20)]


def times(entry: Entry) -> dict[str, tuple[Value, Value]]:
    """Seconds of training and of evaluation by task, empty where the file has none."""
    found = entry.run.get("seconds_by_task")
    items = [mapping(item) for item in found] if isinstance(found, list) else []
    return {str(item.get("task")): (number(item.get("train")), number(item.get("evaluate"))) for item in items}


def remarks(entry: Entry) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """What a method had to say of each task, as (names, a row of numbers a task); none where it said nothing."""
    found = {task: mapping(said) for task, said in mapping(entry.run.get("remarks")).items()}
    names = list(dict.fromkeys(name for said in found.values() for name in said if not about_layers(name)))
    values = [(str(task), [number(said.get(name)) for name in names]) for task, said in found.items()]
    return names, [(task, ["\u2013" if v is None else f"{v:.3g}" for v in row]) for task, row in values if names]


def seeds(entry: Entry) -> list[dict[str, Any]]:
    """The metrics dicts of each seed, where the run is a mean over seeds."""
    found = entry.run.get("runs")
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
