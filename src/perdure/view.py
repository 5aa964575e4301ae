"""What the command line draws: a run's progress while it goes, tables when it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from perdure.engine.watcher import Watcher


def shade(value: float) -> str:
    """A colour for an accuracy, from dim red over yellow to green; the number itself stands beside it."""
    return "red" if value < 35 else "yellow" if value < 60 else "green" if value < 85 else "bold green"


def matrix(
    tasks: Sequence[str], rows: Sequence[Sequence[float]], probe: Sequence[float], title: str, width: int = 0
) -> Table:
    """The accuracy matrix so far; the diagonal, the task just learned, in brackets. ``width``: of the terminal, in columns
    (0: any); of more tasks than fit, the last ones learned are shown, and how many are left out is said."""
    shown = fitting(tasks, len(rows) - 1, width)
    left = len(tasks) - len(shown)
    table = Table(
        title=escape(title),
        title_justify="left",
        caption_justify="left",
        caption="\\[x]: just learned; left of it: learned before"
        + (f". {left} of {len(tasks)} tasks are not shown; the report has all" if left else ""),
        box=None,
    )
    table.add_column("after", style="bold", overflow="fold")
    for j in shown:
        table.add_column(escape(tasks[j]), justify="right", overflow="fold")
    table.add_column("probe", justify="right", style="dim")
    for i, row in enumerate(rows):
        cells = []
        for j in shown:
            text = f"\\[{row[j]:.1f}]" if j == i - 1 else f"{row[j]:.1f} "
            cells.append(f"[{shade(row[j])}]{text}[/]")
        name = escape(tasks[i - 1]) if i else "(before)"
        table.add_row(name, *cells, f"{probe[i]:.1f}" if i < len(probe) else "")
    return table


def fitting(tasks: Sequence[str], newest: int, width: int) -> list[int]:
    """The numbers of the tasks whose columns fit, the one just learned (``newest``, from 1) the last where not all do."""
    room = width - min(max(map(len, tasks)), 20) - 2 - 7
    sizes = [max(7, min(len(name), 20)) + 2 for name in tasks]
    if not width or sum(sizes) <= room:
        return list(range(len(tasks)))
    last = min(max(newest, 1), len(tasks))
    first = last - 1
    while first > 0 and sum(sizes[first - 1 : last]) <= room:
        first -= 1
    while last < len(tasks) and sum(sizes[first : last + 1]) <= room:
        last += 1
    return list(range(first, last))


class Screen(Watcher):
    """A live view on a terminal; a line a task elsewhere."""

    def __init__(self, console: Console, title: str):
        self.console, self.title = console, title
        self.tasks: list[str] = []
        self.rows: list[list[float]] = []
        self.probe: list[float] = []
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.current = self.bar.add_task("loading", total=None, note="")
        self.live = Live(get_renderable=self.drawing, console=console, refresh_per_second=4, transient=True)
        self.drawn = 0.0

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.live.stop()
        if self.rows:
            self.console.print(self.table())

    def table(self) -> Table:
        return matrix(self.tasks, self.rows, self.probe, self.title, self.console.width)

    def drawing(self) -> RenderableType:
        return Group(self.table(), self.bar) if self.tasks else self.bar

    def begins(self, tasks: list[str], rows: list[list[float]], probe: list[float]) -> None:
        self.tasks, self.rows, self.probe = tasks, rows, probe
        if rows:
            onward = "going on" if len(rows) <= len(tasks) else "nothing is left to do"
            self.say(f"{self.title}: {len(rows) - 1} of {len(tasks)} tasks were learned before; {onward}.")

    def learns(self, task: str, number: int) -> None:
        what = f"task {number}/{len(self.tasks)}: {task}" if number else "before any task"
        self.bar.update(self.current, description=escape(f"{self.title} · {what}"), total=None, completed=0, note="")
        self.began = time.monotonic()

    def step(self, step: int, total: int, losses: Mapping[str, Tensor]) -> None:
        now = time.monotonic()
        if now - self.drawn > 0.2 or step == total:
            self.drawn = now
            note = " ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            self.bar.update(self.current, total=total, completed=step, note=escape(f"loss: {note}"))

    def draws(self, done: int, total: int, new: int) -> None:
        self.bar.update(self.current, total=total, completed=done, note="synthetic images")

    def evaluates(self) -> None:
        self.bar.update(self.current, note="evaluating")

    def row(self, accuracy: list[float], probe: float | None) -> None:
        self.rows.append(accuracy)
        if probe is not None:
            self.probe.append(probe)
        if not self.console.is_terminal:
            number = len(self.rows) - 1
            name = self.tasks[number - 1] if number else "before any task"
            mean = sum(accuracy) / len(accuracy)
            own = f"{accuracy[number - 1]:.1f} % there, " if number else ""
            self.say(
                f"{self.title} · {number}/{len(self.tasks)} {name}: {own}{mean:.1f} % over all tasks "
                f"({time.monotonic() - self.began:.0f} s)"
            )

    def say(self, text: str) -> None:
        """A line as it is, whatever brackets names hold."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"Warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


COLUMNS = ("transfer", "average", "last", "forgetting")
WHERE_KNOWN = (
    "incremental_average", "incremental_last", "anytime", "performance_drop", "base", "new", "harmonic_mean",
)  # fmt: skip


def summary(runs: Sequence[Mapping[str, Any]], console: Console) -> RenderableType:
    """The figures that papers print, a row a run: with intervals where there is room, else without, else a block a run."""
    columns = [*COLUMNS, *(c for c in WHERE_KNOWN if any(r.get(c) is not None for r in runs))]
    roomy = console.options.update(width=10_000)
    for intervals in (True, False):
        table = figures(runs, columns, intervals)
        needs = Measurement.get(console, roomy, table)
        if (needs.maximum if intervals else needs.minimum) <= console.width:  # titles may be broken, numbers not
            return table
    return Group(*(block(run, columns) for run in runs))


def figures(runs: Sequence[Mapping[str, Any]], columns: Sequence[str], intervals: bool) -> Table:
    """One row a run."""
    table = Table(
        title=f"Accuracy in per cent{', with 95 % bootstrap intervals' if intervals else ''}", title_justify="left"
    )
    table.add_column("method", no_wrap=True)
    streams = {r["stream"] for r in runs}
    if len(streams) > 1:
        table.add_column("stream", no_wrap=True)
    for name in columns:
        table.add_column(name.replace("_", " ").capitalize(), justify="right", no_wrap=intervals)
    table.add_column("Probe before → after", justify="right", no_wrap=True)
    table.add_column("Seconds", justify="right")
    for r in runs:
        where = [escape(r["stream"])] if len(streams) > 1 else []
        cells = [figure(r, name, intervals) for name in columns]
        table.add_row(named(r), *where, *cells, probe_of(r), f"{r['seconds']:.0f}")
    return table


def block(run: Mapping[str, Any], columns: Sequence[str]) -> Text:
    """A run's figures, a line each, where the terminal is too narrow for a table."""
    lines = [f"{name.replace('_', ' ').capitalize()}: {figure(run, name, True)}" for name in columns]
    head = f"[bold]{named(run)}[/] on {escape(run['stream'])}"
    return Text.from_markup("\n  ".join([head, *lines, f"Probe: {probe_of(run)}", f"Seconds: {run['seconds']:.0f}"]))


def named(run: Mapping[str, Any]) -> str:
    """The method, or what a sweep calls the setting, and of how many seeds."""
    seeds = f" ({len(run['seed'])} seeds)" if isinstance(run["seed"], list) else ""
    return escape(run.get("label", run["method"]) + seeds)


def probe_of(run: Mapping[str, Any]) -> str:
    return f"{run['probe'][0]:.1f} → {run['probe'][-1]:.1f}" if run.get("probe") else "–"


def figure(run: Mapping[str, Any], name: str, intervals: bool = True) -> str:
    """``61.3 [dim]59.8 to 62.9[/]``, or a dash where the figure means nothing."""
    value, interval = run.get(name), run.get("intervals", {}).get(name)
    if value is None:
        return "–"
    return f"{value:.1f}" + (f" [dim]{interval[0]:.1f} to {interval[1]:.1f}[/]" if interval and intervals else "")
