"""One PNG for a README: the accuracy matrices of the runs, and the course of the means and of the probe."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from perdure.report.entries import MANY, Entry, Run, Value, collect, courses, span
from perdure.report.palette import LIGHT_SCALE, ink, light, shade

WIDTH, DPI = 10.0, 160  # inches and dots an inch: 1600 px wide
MOST_MATRICES = 4
INK, QUIET, RULE, EMPTY = "#1a2127", "#57626c", "#dbe0e4", "#f2f4f5"


def draw(runs: list[Run], path: Path) -> Path:
    """Draw the runs as a PNG of 1600 px width at `path`, making its folder, and return `path`.

    runs: the dicts read from `metrics.json` files; accuracies in per cent, (tasks + 1) x tasks. The matrices of the
    first four that change are shown (those that are no references first), the courses of all. Raises ValueError if there is no
    run, or a run without tasks or a fitting matrix, and OSError if the file cannot be written.
    """
    entries, path = collect(runs), Path(path)
    moving = [entry for entry in entries if any(row != entry.accuracy[0] for row in entry.accuracy)]
    shown = sorted(moving or entries[:1], key=lambda entry: bool(entry.reference))[:MOST_MATRICES]
    shown.sort(key=lambda entry: entry.index)
    columns = 1 if len(shown) == 1 else 2
    rows = math.ceil(len(shown) / columns)
    tall, foot = _matrix_height(shown, columns), 3.3 + 0.25 * math.ceil(len(entries) / 5)
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9, "text.color": INK}):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.09)
        figure = Figure(figsize=(WIDTH, rows * tall + foot), dpi=DPI, facecolor="white", layout=layout)
        parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[rows * tall, foot])
        _matrices(parts[0, 0], shown, rows, columns)
        _courses(parts[1, 0], entries)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": "perdure"})
    return path


def _matrix_height(shown: list[Entry], columns: int) -> float:
    # Names too long for their column stand upright, and need room above the cells.
    most = max(len(entry.accuracy) for entry in shown)
    if most > MANY + 1:
        return 4.6
    longest = max(len(task) for entry in shown for task in entry.tasks)
    names = 0.085 * longest if _upright(shown, columns) else 0.15
    return 0.55 + names + most * (0.27 if columns == 2 else 0.3)


def _upright(shown: list[Entry], columns: int) -> bool:
    return any(max(map(len, entry.tasks)) * len(entry.tasks) > (72 if columns == 2 else 130) for entry in shown)


def _matrices(figure: SubFigure, shown: list[Entry], rows: int, columns: int) -> None:
    grid = figure.subplots(rows, columns, squeeze=False)
    upright, numbered = _upright(shown, columns), any(len(entry.tasks) > MANY for entry in shown)
    for place, axes in enumerate(grid.flat):
        if place >= len(shown):
            axes.set_axis_off()
            continue
        _matrix(axes, shown[place], upright)
    figure.supxlabel(
        "Accuracy in %. Rows: stages of the stream; columns: tasks. "
        + (
            "Dots: the task just learned." if numbered else "Outlined: the task just learned; hatched: not learned yet."
        ),
        fontsize=8.5,
        color=QUIET,
    )


def _matrix(axes: Axes, entry: Entry, upright: bool) -> None:
    colours = LinearSegmentedColormap.from_list("accuracy", LIGHT_SCALE).with_extremes(bad=EMPTY)
    values = [[math.nan if value is None else value for value in row] for row in entry.accuracy]
    axes.imshow(values, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    if len(entry.tasks) > MANY:
        _numbered(axes, entry)
    else:
        for row, line in enumerate(entry.accuracy):
            for column, value in enumerate(line):
                _cell(axes, entry, (row, column), value)
        axes.set_xticks(range(len(entry.tasks)), entry.tasks, rotation=90 if upright else 0)
        axes.set_yticks(range(len(values)), [entry.stage(row) for row in range(len(values))])
    axes.tick_params(length=0, labelsize=7.2, labelcolor=QUIET, top=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    note = f"  ({entry.reference})" if entry.reference else ""
    axes.set_title(f"{entry.label}{note}", loc="left", fontsize=10.5, fontweight="bold")


def _numbered(axes: Axes, entry: Entry) -> None:
    # Of many tasks the colours alone can be read: the tasks go by their numbers, and a line runs along those just learned.
    step = max(1, math.ceil(len(entry.tasks) / 12))
    places = range(step - 1, len(entry.tasks), step)
    axes.set_xticks(places, [str(place + 1) for place in places])
    axes.set_yticks([0, *(place + 1 for place in places)], ["before", *(f"after {place + 1}" for place in places)])
    now = [row for row in range(1, len(entry.accuracy)) if entry.state(row, row - 1) == "now"]
    axes.plot([row - 1 for row in now], now, ".", color=INK, markersize=2)


def _cell(axes: Axes, entry: Entry, place: tuple[int, int], value: Value) -> None:
    row, column = place
    state = entry.state(row, column)
    ground = EMPTY if value is None else shade(value)
    corner = (column - 0.5, row - 0.5)
    # A white frame keeps the cells apart; hatching is drawn in the ink of the cell, so faint that numbers stay clear.
    axes.add_patch(Rectangle(corner, 1, 1, facecolor="none", edgecolor="white", linewidth=1.6))
    if state == "unseen":
        colour = ink(ground)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, linewidth=0, hatch="////", edgecolor=colour, alpha=0.13))
    if state == "now":
        inner = (column - 0.47, row - 0.45)
        axes.add_patch(Rectangle(inner, 0.94, 0.9, fill=False, edgecolor=INK, linewidth=1.6, zorder=3))
    weight = "bold" if state == "now" else "normal"
    text = "\u2013" if value is None else f"{value:.1f}"
    axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink(ground), fontweight=weight)


def _courses(figure: SubFigure, entries: list[Entry]) -> None:
    filled = courses(entries)
    if not filled:
        return
    grid = figure.subplots(1, len(filled), squeeze=False)[0]
    for axes, (_, title, lines) in zip(grid, filled, strict=True):
        for entry, values in zip(entries, lines, strict=True):
            _line(axes, entry, values)
        _frame(axes, title, max(len(entry.tasks) for entry in entries))
        low, high = span([value for line in lines for value in line if value is not None])
        axes.set_ylim(low - 0.5, high + 0.5)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, handlelength=3)


def _line(axes: Axes, entry: Entry, values: list[Value]) -> None:
    look, paint = entry.style, light(entry.style.colour)
    heights = [math.nan if value is None else value for value in values]
    if entry.reference:
        # A reference has no course: it learns nothing, or everything at once. Its level is what others are held to.
        level = next((value for value in reversed(values) if value is not None), math.nan)
        ends = [0, len(entry.tasks)]
        axes.plot(ends, [level, level], color=paint, linestyle=look.dash, linewidth=1.3, label=entry.label)
        return
    axes.plot(
        range(len(heights)), heights, color=paint, linestyle=look.dash, marker=look.marker, markersize=5,
        markeredgecolor="white", markeredgewidth=0.6, linewidth=1.6, label=entry.label,
    )  # fmt: skip


def _frame(axes: Axes, title: str, last: int) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    axes.set_xlabel("tasks learned", color=QUIET, fontsize=8)
    axes.set_xlim(-0.3, last + 0.3)
    axes.set_xticks(range(0, last + 1, max(1, math.ceil((last + 1) / 12))))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.tick_params(length=0, labelsize=8, labelcolor=QUIET)
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.locator_params(axis="y", nbins=6, steps=[1, 2, 5, 10])
