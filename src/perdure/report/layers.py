"""Heat maps of what a method had to say of single layers: a row a kind of layer, a column a block, tasks side by side."""

from __future__ import annotations

import re

from matplotlib.patches import Rectangle

from perdure.report import svg
from perdure.report.charts import Board, Chart
from perdure.report.entries import Entry, mapping, number

# As a remark is called that is about one layer: "ranks of vision_model.encoder.layers.3.mlp.fc1".
ABOUT = re.compile(r"(?P<what>.+) of (?P<tower>vision|text)_model\.encoder\.layers\.(?P<block>\d+)\.\w+\.(?P<kind>\w+)")
TOWERS = {"vision": "image", "text": "text"}
Cell = tuple[str, int, float]  # a kind of layer, a block, a value


def about_layers(name: str) -> bool:
    """Whether a remark is drawn here, and needs no column in a table."""
    return ABOUT.fullmatch(name) is not None


def layers(entries: list[Entry]) -> list[Chart]:
    """A heat map a run and subject, where runs have any."""
    with svg.settings():
        return [_map(entry, what, by_task) for entry in entries for what, by_task in _found(entry).items()]


def _found(entry: Entry) -> dict[str, dict[str, list[Cell]]]:
    # What is said → task → cells.
    found: dict[str, dict[str, list[Cell]]] = {}
    for task, said in mapping(entry.run.get("remarks")).items():
        for name, value in mapping(said).items():
            hit, known = ABOUT.fullmatch(name), number(value)
            if hit is not None and known is not None:
                cell = (f"{TOWERS[hit['tower']]} {hit['kind']}", int(hit["block"]), known)
                found.setdefault(hit["what"], {}).setdefault(str(task), []).append(cell)
    return found


def _map(entry: Entry, what: str, by_task: dict[str, list[Cell]]) -> Chart:
    every = [cell for cells in by_task.values() for cell in cells]
    kinds = list(dict.fromkeys(kind for kind, _, _ in every))
    wide = max(block for _, block, _ in every) + 2
    most = max((value for _, _, value in every), default=0.0) or 1.0
    width, height = max(360, 90 + 5 * wide * len(by_task)), 40 + 14 * len(kinds)
    board = Board(f"layers-{entry.index}-{'-'.join(what.split())}", (width, height))
    board.axes.set_position((84 / width, 19 / height, 1 - 92 / width, 1 - 27 / height))
    for place, (task, cells) in enumerate(by_task.items()):
        for kind, block, value in cells:
            gid = f"cell-{place}-{kinds.index(kind)}-{block}"
            board.tips[gid] = f"{task}, {kind}, block {block + 1}: {value:g}"
            corner, paint = (place * wide + block, kinds.index(kind)), svg.colour(entry.style.colour)
            board.axes.add_patch(Rectangle(corner, 0.9, 0.9, color=paint, alpha=value / most, linewidth=0, gid=gid))
    board.axes.grid(visible=False)
    board.axes.set(xlim=(-0.5, wide * len(by_task) - 0.5), ylim=(len(kinds), -0.2))
    board.axes.set_yticks([row + 0.45 for row in range(len(kinds))], kinds)
    places = [str(entry.tasks.index(task) + 1) if task in entry.tasks else task for task in by_task]
    board.axes.set_xticks([k * wide + (wide - 1) / 2 - 0.05 for k in range(len(places))], places)
    title = f"{entry.label}: {what}, up to {most:g}"
    label = (
        f"{what} of each layer of {entry.label}: a column a block, tasks side by side by their numbers; most: {most:g}."
    )
    return board.chart(title, label)
