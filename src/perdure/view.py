"""What the command line draws: a run's progress while it goes, tables when it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from perdure.engine.watcher import Watcher


def shade(value: float) -> str:
    """A colour for an accuracy, from dim red over yellow to green; the number itself stands beside it."""
    return "red" if value < 35 else "yellow" if value < 60 else "green" if value < 85 else "bold green"


def matrix(tasks: Sequence[str], rows: Sequence[Sequence[float]], probe: Sequence[float], title: str) -> Table:
    """The accuracy matrix so far; the diagonal, the task just learned, in brackets."""
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        caption="\\[x]: just learned; left of it: learned before",
        box=None,
    )
    table.add_column("after", style="bold")
    for name in tasks:
        table.add_column(name, justify="right")
    table.add_column("probe", justify="right", style="dim")
    for i, row in enumerate(rows):
        cells = []
        for j, value in enumerate(row):
            text = f"\\[{value:.1f}]" if j == i - 1 else f"{value:.1f} "
            cells.append(f"[{shade(value)}]{text}[/]")
        table.add_row(tasks[i - 1] if i else "(before)", *cells, f"{probe[i]:.1f}" if i < len(probe) else "")
    return table


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
        return matrix(self.tasks, self.rows, self.probe, self.title)

    def drawing(self) -> RenderableType:
        return Group(self.table(), self.bar) if self.tasks else self.bar

    def begins(self, tasks: list[str], rows: list[list[float]], probe: list[float]) -> None:
        self.tasks, self.rows, self.probe = tasks, rows, probe
        if rows:
            onward = "going on" if len(rows) <= len(tasks) else "nothing is left to do"
            self.console.print(f"{self.title}: {len(rows) - 1} of {len(tasks)} tasks were learned before; {onward}.")

    def learns(self, task: str, number: int) -> None:
        what = f"task {number}/{len(self.tasks)}: {task}" if number else "before any task"
        self.bar.update(self.current, description=f"{self.title} · {what}", total=None, completed=0, note="")
        self.began = time.monotonic()

    def step(self, step: int, total: int, losses: Mapping[str, Tensor]) -> None:
        now = time.monotonic()
        if now - self.drawn > 0.2 or step == total:
            self.drawn = now
            note = " ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            self.bar.update(self.current, total=total, completed=step, note=f"loss: {note}")

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
            self.console.print(
                f"{self.title} · {number}/{len(self.tasks)} {name}: {own}{mean:.1f} % over all tasks "
                f"({time.monotonic() - self.began:.0f} s)"
            )

    def warn(self, text: str) -> None:
        self.console.print(f"Warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def summary(runs: Sequence[Mapping[str, Any]]) -> Table:
    """One row a run: the figures that papers print."""
    table = Table(title="Accuracy in per cent, with 95 % bootstrap intervals", title_justify="left")
    table.add_column("method")
    streams = {r["stream"] for r in runs}
    if len(streams) > 1:
        table.add_column("stream")
    columns = ["transfer", "average", "last", "forgetting"]
    if any(r.get("incremental_average") is not None for r in runs):
        columns += ["incremental_average", "incremental_last"]
    for name in columns:
        table.add_column(name.replace("_", " ").capitalize(), justify="right")
    table.add_column("Probe before → after", justify="right")
    table.add_column("Seconds", justify="right")
    for r in runs:
        cells = [figure(r, name) for name in columns]
        probe = f"{r['probe'][0]:.1f} → {r['probe'][-1]:.1f}" if r.get("probe") else "–"
        seeds = f" ({len(r['seed'])} seeds)" if isinstance(r["seed"], list) else ""
        where = [r["stream"]] if len(streams) > 1 else []
        table.add_row(r["method"] + seeds, *where, *cells, probe, f"{r['seconds']:.0f}")
    return table


def figure(run: Mapping[str, Any], name: str) -> str:
    """``61.3 [dim]59.8–62.9[/]``, or a dash where the figure means nothing."""
    value, interval = run.get(name), run.get("intervals", {}).get(name)
    if value is None:
        return "–"
    return f"{value:.1f}" + (f" [dim]{interval[0]:.1f} to {interval[1]:.1f}[/]" if interval else "")
