"""The charts of the page: the course of every task, of the means, of the probe and of the modality gap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perdure.report import svg
from perdure.report.entries import Entry, Interval, Value, at, mapping, number, pair, same_order, span
from perdure.report.entries import courses as entry_courses

SMALL, MEDIUM = (200, 132), (360, 200)  # width and height in SVG units


@dataclass(frozen=True)
class Chart:
    """One chart: the SVG and the title (with, for a task, its number) that stands above it."""

    svg: str
    title: str
    number: str = ""


@dataclass(frozen=True)
class Line:
    """The course of one number over the stages of a run; `learned` is the stage marked on it."""

    entry: Entry
    values: Sequence[Value]
    bands: Sequence[Interval] = ()
    learned: int | None = None


class Board:
    """One chart being drawn: a matplotlib figure in SVG units, and the tips of its points."""

    def __init__(self, name: str, size: tuple[int, int], unit: str = " %") -> None:
        """name: unique in the page. size: width and height in SVG units. unit: of what is drawn, in the tips."""
        width, height = size
        self.unit, self.digits = unit, 1 if unit == " %" else 2
        self.name, self.tips = name, dict[str, str]()
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        self.axes = self.figure.add_axes((26 / width, 19 / height, 1 - 34 / width, 1 - 27 / height))
        _plain(self.axes)

    def line(self, line: Line) -> None:
        """Draw a course with a point (and its tip) at every stage; of a reference, its level."""
        look, paint = line.entry.style, svg.colour(line.entry.style.colour)
        if line.entry.reference:
            return self._level(line, paint)
        self._band(line, paint)
        heights = [math.nan if value is None else value for value in line.values]
        self.axes.plot(range(len(heights)), heights, color=paint, linewidth=1.5, linestyle=look.dash)
        for stage, value in enumerate(line.values):
            if value is not None:
                self._point(line, stage, value, paint)

    def _level(self, line: Line, paint: str) -> None:
        # A reference has no course: it learns nothing, or everything at once. Its level is what others are held to.
        known = _known(line)
        if known:
            gid = f"level-{line.entry.index}"
            self.tips[gid] = f"{line.entry.label} ({line.entry.reference}): {known[-1]:.{self.digits}f}{self.unit}"
            ends = (0, len(line.entry.tasks))
            self.axes.plot(ends, known[-1:] * 2, color=paint, linewidth=1.3, linestyle=line.entry.style.dash, gid=gid)

    def _point(self, line: Line, stage: int, value: float, paint: str) -> None:
        gid = f"point-{line.entry.index}-{stage}"
        self.tips[gid] = f"{line.entry.label}, {line.entry.stage(stage)}: {value:.{self.digits}f}{self.unit}"
        learned = stage == line.learned
        shape, size, edge = (line.entry.style.marker, 7.0, svg.colour("ground")) if learned else ("o", 3.2, paint)
        self.axes.plot([stage], [value], shape, color=paint, markersize=size, markeredgecolor=edge, gid=gid, zorder=3)

    def _band(self, line: Line, paint: str) -> None:
        known = [(stage, band) for stage, band in enumerate(line.bands) if band is not None]
        if len(known) > 1:
            stages, low, high = [s for s, _ in known], [b[0] for _, b in known], [b[1] for _, b in known]
            self.axes.fill_between(stages, low, high, color=paint, alpha=0.13, linewidth=0)

    def upright(self, places: Sequence[float]) -> None:
        """Draw a quiet upright line at each of the places."""
        for place in places:
            self.axes.axvline(place, color=svg.colour("rule"), linewidth=0.7, zorder=0)

    def chart(self, title: str, label: str, place: str = "") -> Chart:
        """Finish: the chart as SVG, with `label` for those who cannot see it."""
        return Chart(svg.inline(self.figure, self.name, label, self.tips), title, place)


def _plain(axes: Axes) -> None:
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(svg.colour("rule"))
    axes.tick_params(length=0, pad=4, labelcolor=svg.colour("quiet"), labelsize=9)
    axes.grid(axis="y", color=svg.colour("rule"), linewidth=0.7)
    axes.set_axisbelow(True)


def _stages(axes: Axes, last: int, most: int) -> None:
    step = max(1, math.ceil((last + 1) / most))
    axes.set_xlim(-0.35, last + 0.35)
    axes.set_xticks(list(range(0, last + 1, step)))


def _heights(axes: Axes, lines: list[Line]) -> None:
    values = [value for line in lines for value in _known(line)]
    values += [edge for line in lines for band in line.bands if band is not None for edge in band]
    low, high = span(values)
    axes.set_ylim(low - 1, high + 1)
    axes.locator_params(axis="y", nbins=6, steps=[1, 2, 5, 10])


def tasks(entries: list[Entry]) -> list[Chart]:
    """One small chart a task: its accuracy in per cent (0 to 100) over the stages, a line a run."""
    names = list(dict.fromkeys(task for entry in entries for task in entry.tasks))
    with svg.settings():
        return [_task(entries, name, place) for place, name in enumerate(names)]


def _task(entries: list[Entry], name: str, place: int) -> Chart:
    board = Board(f"task-{place}", SMALL)
    for entry in entries:
        if name not in entry.tasks:
            continue
        column = entry.tasks.index(name)
        rows = range(len(entry.accuracy))
        bands = [entry.cell_interval(row, column) for row in rows] if len(entries) == 1 else []
        learned = next((row for row in rows if entry.state(row, column) == "now"), None)
        board.line(Line(entry, [row[column] for row in entry.accuracy], bands, learned))
        board.upright([] if learned is None else [learned])
    _stages(board.axes, max(len(entry.tasks) for entry in entries), 10)
    board.axes.set_ylim(-3, 103)
    board.axes.set_yticks([0, 50, 100])
    label = f"Accuracy on {name} in per cent, before any task and after each. The matrices hold the same numbers."
    return board.chart(name, label, str(place + 1) if same_order(entries) else "")


def courses(entries: list[Entry]) -> list[Chart]:
    """The means over tasks (or over the classes seen) and the zero-shot probe, each where a run has it."""
    charts = []
    with svg.settings():
        for name, title, values in entry_courses(entries):
            pairs = zip(entries, values, strict=True)
            lines = [Line(entry, line, _bands(entry) if name == "probe" else []) for entry, line in pairs]
            charts.append(_course(name, title, lines))
    return charts


def _bands(entry: Entry) -> list[Interval]:
    if entry.reference:
        return []
    return [pair(at(entry.run.get("probe_interval"), row)) for row in range(len(entry.course("probe")))]


def _known(line: Line) -> list[float]:
    return [value for value in line.values if value is not None]


def _course(name: str, title: str, lines: list[Line]) -> Chart:
    board = Board(name, MEDIUM)
    for line in lines:
        board.line(line)
    _stages(board.axes, max(len(line.entry.tasks) for line in lines), 16)
    _heights(board.axes, lines)
    ends = [(line.entry.label, _known(line)) for line in lines]
    words = "; ".join(f"{label} from {values[0]:.1f} to {values[-1]:.1f}" for label, values in ends if values)
    return board.chart(title, f"{title} in per cent over the tasks: {words}.")


GAPS = (
    ("positive", "Mean logit of the right class", ""),
    ("negative", "Mean logit of the wrong classes", ""),
    ("distance", "Distance between the means of images and texts", ""),
    ("angle", "Angle between images and texts", "°"),
)


def gaps(entries: list[Entry]) -> list[Chart]:
    """The modality gap on the probe over the stages, where runs measured it."""
    charts = []
    with svg.settings():
        for name, title, unit in GAPS:
            lines = [Line(entry, _gap(entry, name)) for entry in entries]
            if any(_known(line) for line in lines):
                charts.append(_gap_chart(f"gap-{name}", title, unit, lines))
    return charts


def _gap(entry: Entry, name: str) -> list[Value]:
    found = entry.run.get("gap")
    return [number(mapping(stage).get(name)) for stage in found] if isinstance(found, list) else []


def _gap_chart(name: str, title: str, unit: str, lines: list[Line]) -> Chart:
    board = Board(name, MEDIUM, unit)
    for line in lines:
        board.line(line)
    _stages(board.axes, max(len(line.entry.tasks) for line in lines), 16)
    board.axes.margins(y=0.1)
    board.axes.locator_params(axis="y", nbins=5)
    ends = [(line.entry.label, _known(line)) for line in lines]
    words = "; ".join(f"{label} from {values[0]:.2f} to {values[-1]:.2f}" for label, values in ends if values)
    return board.chart(title, f"{title} over the tasks: {words}.")


def swatch(entry: Entry) -> str:
    """The line and marker of a run for the legend, as SVG."""
    with svg.settings():
        figure = Figure(figsize=(34 / 72, 12 / 72), dpi=72)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 34), ylim=(0, 12))
        paint, look = svg.colour(entry.style.colour), entry.style
        axes.plot([1, 33], [6, 6], color=paint, linewidth=1.6, linestyle=look.dash)
        if not entry.reference:
            axes.plot([17], [6], look.marker, color=paint, markersize=7, markeredgecolor=svg.colour("ground"))
        return svg.inline(figure, f"swatch-{entry.index}", f"Line of {entry.label}")
