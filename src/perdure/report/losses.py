"""The training losses of the page: tasks side by side, each followed by the phases after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes

from perdure.report import svg
from perdure.report.charts import MEDIUM, Board, Chart
from perdure.report.entries import Entry, at, mapping, number

MOST_POINTS = 150  # a task and loss term; more cannot be seen and would only make the page heavy


@dataclass(frozen=True)
class Term:
    """One term of the loss: its name, the name of its colour, and its line as CSS and matplotlib both call it."""

    name: str
    colour: str
    line: str


def losses(entries: list[Entry]) -> list[tuple[Chart, list[Term]]]:
    """One chart a run that recorded losses, tasks side by side, with its terms for the key beneath."""
    with svg.settings():
        charts = [_losses(entry) for entry in entries]
    return [chart for chart in charts if chart is not None]


def _losses(entry: Entry) -> tuple[Chart, list[Term]] | None:
    recorded = _recorded(entry)
    names = dict.fromkeys(name for _, terms in recorded for name in terms if name != "step" and _points(terms, name))
    if not names:
        return None
    terms = [Term(name, f"series-{i % 8}", ("solid", "dashed", "dotted")[i % 3]) for i, name in enumerate(names)]
    board, ends = Board(f"loss-{entry.index}", MEDIUM), [0.0]
    for _, found in recorded:
        widths = [_curve(board.axes, _points(found, term.name), term, ends[-1]) for term in terms]
        ends.append(ends[-1] + max(widths))
    board.upright(ends)
    places = {task: str(place + 1) for place, task in enumerate(entry.tasks) if not entry.at_once}
    numbers = [places.get(task, "all" if entry.at_once else task) for task, _ in recorded]
    board.axes.set_xticks([(a + b) / 2 for a, b in pairwise(ends)], numbers)
    board.axes.set_xlim(0, ends[-1])
    board.axes.set_ylim(bottom=min(0.0, board.axes.get_ylim()[0]))
    board.axes.locator_params(axis="y", nbins=5)
    label = f"Training loss of {entry.label} over the steps of each task; terms: {', '.join(names)}."
    return board.chart(entry.label, label), terms


def _recorded(entry: Entry) -> list[tuple[str, dict[str, Any]]]:
    # What was trained, in order: each task, then the phases after it, which stand beside it under no number of their own.
    main, phases = mapping(entry.run.get("losses")), mapping(entry.run.get("phases"))
    found: list[tuple[str, dict[str, Any]]] = []
    for task in dict.fromkeys([*main, *phases]):
        parts = [mapping(main[task])] if task in main else []
        parts += [mapping(terms) for terms in mapping(phases.get(task)).values()]
        found += [(task if number == 0 else "", terms) for number, terms in enumerate(parts)]
    return found


def _curve(axes: Axes, points: list[tuple[float, float]], term: Term, start: float) -> float:
    # Returns how wide the task is on the axis of steps, at least one step.
    if points:
        heights = [height for _, height in points]
        steps = [start + step for step, _ in points]
        axes.plot(steps, heights, color=svg.colour(term.colour), linestyle=term.line, linewidth=1.3)
    return max([1.0, *(step for step, _ in points)])


def _points(terms: dict[str, object], name: str) -> list[tuple[float, float]]:
    found, steps = terms.get(name), terms.get("step")
    if not isinstance(found, list):
        return []
    pairs = [(at(steps, i) if isinstance(steps, list) else i, value) for i, value in enumerate(found)]
    points = [(number(step), number(value)) for step, value in pairs]
    known = [(step, value) for step, value in points if step is not None and value is not None]
    return known[:: max(1, math.ceil(len(known) / MOST_POINTS))]
