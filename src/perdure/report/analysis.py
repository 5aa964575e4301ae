"""What ``perdure analyse`` found, on the page: margins, drift of weights and features, agreement of experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perdure.report import svg
from perdure.report.charts import SMALL, Board, Chart
from perdure.report.entries import Entry, mapping
from perdure.report.palette import colours

Cell = tuple[str, str]  # a text, and its colours
SYNTHETIC = "synthetic pairs"


@dataclass(frozen=True)
class Table:
    """Shaded numbers: ``heads`` of the columns, and rows of (name, cells)."""

    title: str
    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


@dataclass(frozen=True)
class Analysis:
    """One run's analysis, ready to be written."""

    entry: Entry
    tables: Sequence[Table]
    histograms: Sequence[Chart]
    note: str


def of(run: Mapping[str, Any]) -> dict[str, Any]:
    """The analysis of a run; empty where there is none, or it is of another run."""
    found = mapping(run.get("analysis"))
    same = all(found.get(key) == run.get(key) for key in ("method", "stream", "seed", "tasks"))
    return found if same and found.get("stages") else {}


def analyses(entries: Sequence[Entry]) -> list[Analysis]:
    """Those of all runs that have one."""
    with svg.settings():
        return [_analysis(entry, found) for entry in entries if (found := of(entry.run))]


def _analysis(entry: Entry, found: dict[str, Any]) -> Analysis:
    stages, tau = found["stages"], found["tau"]
    names = list(stages[0]["margins"])
    shares = [
        ("Median class margin, in cosine", [_row(s["margins"], names, "median", "{:.3f}", 0.3) for s in stages]),
        ("Share of margins above τ", [_row(s["margins"], names, "above_tau", "{:.0%}", 1) for s in stages]),
        (
            "Mean squared distance of images to their texts",
            [_row(s["margins"], names, "distance", "{:.2f}", 2) for s in stages],
        ),
    ]
    tables = [Table(title, names, _named(stages, rows)) for title, rows in shares]
    tables += _pairs(stages)
    parts = list(stages[0]["weights"])
    most = max((max(s["weights"].values()) for s in stages), default=0.0) or 1.0
    moved = [[_cell(s["weights"][part], "{:.1%}", most) for part in parts] for s in stages]
    tables.append(Table("Weights, how far from the pre-trained ones, by block", parts, _named(stages, moved)))
    heard = list(stages[0]["cka"])
    alike = [[_cell(s["cka"][part], "{:.2f}", 1) for part in heard] for s in stages]
    tables.append(Table("Features, how like the pre-trained ones (linear CKA), by block", heard, _named(stages, alike)))
    if all("spread" in s for s in stages):  # earlier versions did not look
        rank = max(s["spread"]["effective_rank"] for s in stages)
        wide = [
            [_cell(s["spread"]["effective_rank"], "{:.1f}", rank), _cell(s["spread"]["mean_correlation"], "{:.3f}", 1)]
            for s in stages
        ]
        heads = ["effective rank", "mean |correlation|"]
        tables.append(Table("Pooled image features, how many directions they use", heads, _named(stages, wide)))
    experts = found["experts"]
    if len(experts["names"]) > 1:
        rows = [
            (name, [_cell(v, "{:.0%}", 1) for v in row])
            for name, row in zip(experts["names"], experts["same"], strict=True)
        ]
        tables.append(Table("Experts, how often two give the same answer", experts["names"], rows))
    charts = [_histogram(entry, name, stages, tau) for name in names]
    return Analysis(entry, tables, charts, _note(found))


def _pairs(stages: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Margins of images and their own texts: of tasks that have captions, and of the synthetic pairs that were replayed."""
    sets = [
        {**s.get("pairs", {}), **({SYNTHETIC: s["synthetic_pairs"]} if s.get("synthetic_pairs") else {})}
        for s in stages
    ]
    names = list(sets[0])
    if not names:
        return []
    shares = (
        ("Median pair margin, in cosine", "median", "{:.3f}", 0.3),
        ("Share of pair margins above τ", "above_tau", "{:.0%}", 1),
    )
    return [
        Table(title, names, _named(stages, [_row(one, names, key, form, most) for one in sets]))
        for title, key, form, most in shares
    ]


def _row(by_name: Mapping[str, Any], names: Sequence[str], key: str, form: str, most: float) -> list[Cell]:
    return [_cell(by_name[name][key], form, most) for name in names]


def _cell(value: float, form: str, most: float) -> Cell:
    return form.format(value), colours(100 * value / most)


def _named(stages: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[Cell]]) -> list[tuple[str, Sequence[Cell]]]:
    names = [stage["task"].split("_", 2)[-1] for stage in stages]
    return list(zip(names, rows, strict=True))


def _note(found: Mapping[str, Any]) -> str:
    said = found.get("correlation")
    return (
        "" if said is None else f"Over the tasks, falls of the median margin and of accuracy correlate with {said:.2f}."
    )


def _histogram(entry: Entry, name: str, stages: Sequence[Mapping[str, Any]], tau: float) -> Chart:
    """Margins before any task and after the last, as shares of the images."""
    board = Board(f"margins-{entry.index}-{name}", SMALL)
    first, last = (stages[place]["margins"][name]["histogram"] for place in (0, -1))
    edges = [2 * k / len(first) - 1 for k in range(len(first) + 1)]
    for counts, paint in ((first, "reference"), (last, entry.style.colour)):
        board.axes.stairs([100 * n / (sum(counts) or 1) for n in counts], edges, color=svg.colour(paint), linewidth=1.3)
    board.upright([0, tau])
    there = [k for k, pair in enumerate(zip(first, last, strict=True)) if any(pair)]
    low, high = edges[there[0]], edges[there[-1] + 1]
    board.axes.set_xlim(min(low, -0.05), max(high, math.ceil(20 * tau) / 20))
    board.axes.locator_params(axis="both", nbins=4)
    label = f"Class margins of {name}, in cosine: shares of the images in per cent, before any task and after the last."
    return board.chart(name, label)
