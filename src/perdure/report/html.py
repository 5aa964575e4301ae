"""One self-contained HTML page about one run or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from perdure.report import analysis, charts, configuration, layers, losses, palette, tables
from perdure.report.entries import MANY, Entry, Run, collect, comparable, mapping, mean, same_order
from perdure.report.verdict import verdict

COST = ("seconds", "peak_memory_mb")
TEMPLATE = Path(__file__).with_name("report.html.j2")


def render(runs: list[Run]) -> str:
    """The page as text. It holds everything it shows, runs no script and asks for nothing outside itself.

    runs: the dicts read from `metrics.json` files, one a run (or a mean over seeds); accuracies in per cent,
    (tasks + 1) x tasks. Raises ValueError if there is no run, or a run without tasks or a fitting matrix.
    """
    entries = collect(runs)
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.filters.update(exact=tables.plain, seconds=tables.duration, megabytes=tables.memory)
    return engine.from_string(TEMPLATE.read_text(encoding="utf-8")).render(_context(entries))


def write(runs: list[Run], path: Path) -> Path:
    """Write the page to `path`, making its folder, and return `path`. Raises what `render` raises, and OSError."""
    path = Path(path)
    page = render(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def is_own(path: Path) -> bool:
    """Whether a page or a picture is one that perdure wrote, and may write anew."""
    marks = (b'<meta name="generator" content="perdure">', b"tEXtSoftware\0perdure", b"A perdure report on")
    start = path.read_bytes()[: 1 << 20]
    return any(mark in start for mark in marks)


def _context(entries: list[Entry]) -> dict[str, Any]:
    columns, rows = tables.metrics(entries)
    many = max(len(entry.tasks) for entry in entries) > MANY
    streams = list(dict.fromkeys(str(entry.run.get("stream") or "unnamed stream") for entry in entries))
    return {
        "entries": entries,
        "streams": streams,
        "summary": " ".join(filter(None, [verdict(entries) if len(entries) > 1 else "", summary(entries)])),
        "columns": columns,
        "metrics": list(zip(entries, rows, strict=True)),
        "intervals": any(isinstance(entry.run.get("intervals"), dict) for entry in entries),
        "deviations": any(isinstance(entry.run.get("std"), dict) for entry in entries),
        "seeds": [_seed_table(entry) for entry in entries if tables.seeds(entry)],
        "comparable": comparable(entries),
        "matrices": [tables.matrix(entry) for entry in entries],
        "scale": tables.scale(),
        "swatches": [(entry, charts.swatch(entry)) for entry in entries],
        "many": many,
        "tasks": [] if many else charts.tasks(entries),
        "courses": charts.courses(entries),
        "gaps": charts.gaps(entries),
        "losses": losses.losses(entries),
        "remarks": [(entry, *table) for entry in entries if (table := tables.remarks(entry))[1]],
        "layers": layers.layers(entries),
        "analyses": analysis.analyses(entries),
        "explained": [(entry, entry.run["explained"]) for entry in entries if mapping(entry.run.get("explained"))],
        "cost": _cost(entries),
        "settings": configuration.table(entries),
        "protocol": configuration.protocol(entries),
        "notes": configuration.notes(entries),
        "same_order": same_order(entries),
        "palette": palette,
    }


def summary(entries: list[Entry]) -> str:
    """What the page shows, in one sentence."""
    if len(entries) == 1:
        entry, start = entries[0], mean(entries[0].accuracy[0])
        end = mean(entry.accuracy[-1])
        if end is None or start is None or len(entry.accuracy) == 1:
            return f"{entry.label} on {len(entry.tasks)} tasks{', ' if entry.unfinished else ''}{entry.unfinished}."
        when = (
            f"after {entry.newest(len(entry.accuracy) - 1)}, {entry.unfinished}" if entry.unfinished else "at the end"
        )
        return (
            f"Over {len(entry.tasks)} tasks, the mean accuracy of {entry.label} on all of them goes from "
            f"{start:.1f} % before the first to {end:.1f} % {when}."
        )
    lasts = [(entry.metric("last"), entry) for entry in entries if not entry.reference]
    ranked = sorted([(value, entry.label) for value, entry in lasts if value is not None], reverse=True)
    if not ranked or not comparable(entries):
        return f"{len(entries)} runs that learn task after task, side by side."
    others = ", ".join(f"{label} {value:.1f} %" for value, label in ranked[1:])
    best = f"{ranked[0][1]} has a mean accuracy of {ranked[0][0]:.1f} % over all tasks"
    return f"After the last of {len(entries[0].tasks)} tasks, {best}" + (f"; {others}." if others else ".")


def _seed_table(entry: Entry) -> tuple[Entry, list[tables.Metric], list[tuple[str, list[tables.Cell]]]]:
    # A seed's file may lack what a report of its own would need; here it is only asked for its metrics.
    runs = tables.seeds(entry)
    filled = [{**run, "tasks": entry.tasks, "accuracy": entry.accuracy} for run in runs]
    parts = collect(filled)
    columns, rows = tables.metrics(parts)
    names = [part.seeds or str(part.index + 1) for part in parts]
    return entry, columns, list(zip(names, rows, strict=True))


def _cost(entries: list[Entry]) -> dict[str, Any]:
    found = [tables.times(entry) for entry in entries]
    names = list(dict.fromkeys(name for by_task in found for name in by_task))
    sums = [sum(value or 0.0 for value in pair) for by_task in found for pair in by_task.values()]
    return {
        "known": any(sums) or any(entry.metric(name) is not None for entry in entries for name in COST),
        "names": names,
        "times": found,
        "most": max(sums, default=0.0) or 1.0,
        "total": [entry.metric(COST[0]) for entry in entries],
        "memory": [entry.metric(COST[1]) for entry in entries],
    }
