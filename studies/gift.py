"""GIFT on the small world: what each part is worth, and the figures that the paper draws.

    python studies/gift.py [--seeds 3] [--jobs 2] [--tasks 3] [--runs DIR] [table] [numbers] [distillation] [surface]

Everything is resumable: pairs and runs that are finished are not made again. Tables and figures go to ``docs/gift``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from plane import plane
from runs import command, do, read, spread

from perdure import launch
from perdure.benchmarks import mini
from perdure.core.weights import Weights
from perdure.data.task import Class, Images
from perdure.engine.checkpoint import folder_names, read_task
from perdure.models.clip import CLIP
from perdure.ops import metrics
from perdure.synthesis.store import collect

OUT = Path(__file__).resolve().parents[1] / "docs" / "gift"
STREAM = "mini-mtil"
PARTS = ("table", "numbers", "distillation", "surface")
NUMBERS, NUMBERS_TASKS = (10, 100, 300, 1000), 2
# row of the tables → method and what it changes
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fine-tuning": ("finetune", {}),
    "GIFT": ("gift", {}),
    "GIFT on unrelated real drawings": ("gift", {"pairs": "REAL"}),
    "no distillation": ("gift", {"distillation": "none"}),
    "no alignment": ("gift", {"beta": 0}),
    "no consolidation": ("gift", {"consolidation": "none"}),
    "static consolidation": ("gift", {"consolidation": "static", "static_steps": 8}),
    "plain L2": ("gift", {"consolidation": "l2"}),
}
MAIN = ("fine-tuning", "GIFT", "GIFT on unrelated real drawings")  # these learn the whole stream
FIGURES = ("transfer", "average", "last")


def folder_of(runs: Path, row: str, seed: int) -> Path:
    return runs / row.replace(" ", "-").lower() / f"seed_{seed}"


def command_of(runs: Path, row: str, seed: int, jobs: int, tasks: int) -> list[str]:
    method, changes = VARIANTS[row]
    values = {"pairs": str(runs / "pairs"), **changes} if method == "gift" else {}
    values = {k: str(runs / "real") if v == "REAL" else v for k, v in values.items()}
    if jobs > 1:
        values["threads"] = 1
    if row not in MAIN:
        values["tasks"] = tasks
    return command(folder_of(runs, row, seed), method, STREAM, seed, values)


def pending(runs: Path, rows: Sequence[str], seeds: int, jobs: int, tasks: int) -> list[list[str]]:
    wanted = [(row, seed) for seed in range(seeds) for row in rows]
    return [command_of(runs, row, s, jobs, tasks) for row, s in wanted]


def prepare_pairs(runs: Path, seeds: int) -> None:
    """Synthetic pairs for every seed, and real drawings of concepts that no task of the stream teaches."""
    for seed in range(seeds):
        print(f"pairs, seed {seed}: {launch.generate(STREAM, runs / 'pairs', seeds=[seed])} drawn", flush=True)
    tasks = mini.class_incremental().tasks
    images = torch.cat([t.train.pixels for t in tasks])
    captions = [t.prompts()[k] for t in tasks for k in t.train.labels.tolist()]
    collect(runs / "real", images, captions, "training drawings of mini-cil")


def table(runs: Path, seeds: int, jobs: int, tasks: int) -> None:
    """Two tables, means and standard deviations over the seeds: the whole stream, and each part left out."""
    prepare_pairs(runs, seeds)
    do(pending(runs, MAIN, seeds, jobs, tasks), jobs)
    whole = len(mini.multi_domain("I").tasks)
    lines = rows_of(runs, MAIN, seeds, whole)
    do(pending(runs, list(VARIANTS), seeds, jobs, tasks), jobs)
    lines += ["", *rows_of(runs, [row for row in VARIANTS if row != MAIN[2]], seeds, tasks)]
    (OUT / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def rows_of(runs: Path, rows: Sequence[str], seeds: int, tasks: int) -> list[str]:
    """A table of the first ``tasks`` tasks: what a longer run did on them is what a shorter one would have done."""
    lines = [
        f"| first {tasks} tasks, {seeds} seeds | Transfer | Average | Last | probe, after | seconds a task |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = [read(folder_of(runs, row, seed)) for seed in range(seeds)]
        matrices = [np.array(r["accuracy"])[: tasks + 1, :tasks] for r in found]
        if row == rows[0]:
            start = matrices[0][0]
            before = f"{start[1:].mean():.1f} | {start.mean():.1f} | {start.mean():.1f} | {found[0]['probe'][0]:.1f}"
            lines.append(f"| (before any task) | {before} | |")
        cells = [spread([float(metrics.FIGURES[name](m)) for m in matrices]) for name in FIGURES]  # type: ignore[arg-type]
        cells.append(spread([r["probe"][tasks] for r in found]))
        seconds = [t["train"] for r in found for t in r["seconds_by_task"][1 : tasks + 1]]
        lines.append(f"| {row} | {' | '.join(cells)} | {np.mean(seconds):.0f} |")
    return lines


def numbers(runs: Path, seeds: int, jobs: int, tasks: int) -> None:
    """Accuracy against the number of synthetic images, on the first tasks."""
    most = [f"synthetic={max(NUMBERS)}", f"tasks={NUMBERS_TASKS}"]
    print(f"pairs: {launch.generate(STREAM, runs / 'pairs', assignments=most)} drawn", flush=True)
    values = {"tasks": NUMBERS_TASKS, "pairs": runs / "pairs", **({"threads": 1} if jobs > 1 else {})}
    words = [command(runs / "numbers" / str(n), "gift", STREAM, 0, {"synthetic": n, **values}) for n in NUMBERS]
    do(words, jobs)
    found = [read(runs / "numbers" / str(n)) for n in NUMBERS]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, marker in (("transfer", "o"), ("average", "s"), ("last", "^")):
        axes.plot(NUMBERS, [r[name] for r in found], marker=marker, label=name.capitalize())
    axes.plot(NUMBERS, [r["probe"][-1] for r in found], marker="d", label="Probe, after")
    axes.set_xscale("log")
    axes.set_xticks(NUMBERS, [f"{n:,}" for n in NUMBERS])
    axes.set(
        xlabel="synthetic images a task",
        ylabel="per cent",
        title=f"GIFT on the first {NUMBERS_TASKS} tasks of {STREAM}",
    )
    finish(figure, "numbers")
    for n, r in zip(NUMBERS, found, strict=True):
        print(n, {name: round(r[name], 1) for name in FIGURES}, round(r["probe"][-1], 1))


def distillation(runs: Path, seeds: int, jobs: int, tasks: int) -> None:
    """The distillation loss over the tasks, with and without consolidation."""
    rows = ("GIFT", "no consolidation", "plain L2")
    prepare_pairs(runs, 1)
    do(pending(runs, rows, 1, jobs, tasks), jobs)
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    for row, colour in zip(rows, ("tab:blue", "tab:red", "tab:gray"), strict=True):
        begin = 0
        for place, (task, losses) in enumerate(list(read(folder_of(runs, row, 0))["losses"].items())[:tasks]):
            values = np.array(losses["distil_image"]) + np.array(losses["distil_text"])
            steps = np.array(losses["step"])
            axes.plot(begin + steps, values, color=colour, label=row if place == 0 else None, linewidth=1.2)
            if row == rows[0]:
                axes.axvline(begin, color="lightgray", linewidth=0.8, zorder=0)
                axes.text(begin + 2, 0.98, task, transform=axes.get_xaxis_transform(), fontsize=8, va="top")
            begin += int(steps[-1])
    axes.set(xlabel="step", ylabel="contrastive distillation loss", xlim=(0, begin))
    finish(figure, "distillation")


def weights_after(folder: Path, tasks: int) -> dict[str, torch.Tensor]:
    """The weights of a run after ``tasks`` tasks."""
    config, data, method = launch.reopen(folder)
    method.bind(launch.load_clip(config, data.model), data.context(config["seed"]))
    read_task(folder / folder_names([t.name for t in data.tasks])[tasks], tensors=True).restore(method)
    return method.clip.weights()


@torch.no_grad()
def loss_at(clip: CLIP, weights: Weights, place: str, questions: Sequence[tuple[Images, Sequence[Class]]]) -> float:
    """The mean cross entropy over the questions of the model with these weights."""
    clip.load_weights(place, weights)
    found = []
    for images, classes in questions:
        texts = clip.class_texts([c.prompts() for c in classes])
        logits = torch.cat([clip.similarity(clip.encode_image(x), texts) for x in images.pixels.split(256)])
        found.append(F.cross_entropy(logits, images.labels).item())
    return float(np.mean(found))


def surface(runs: Path, seeds: int, jobs: int, tasks: int, side: int = 9) -> None:
    """The loss on the plane through the initial weights and those after the first tasks, without and with consolidation."""
    prepare_pairs(runs, 1)
    do(pending(runs, ("GIFT", "no consolidation"), 1, jobs, tasks), jobs)
    stream = mini.multi_domain("I")
    clip = CLIP.load(stream.model)
    without, with_ = (weights_after(folder_of(runs, row, 0), tasks) for row in ("no consolidation", "GIFT"))
    p = plane(clip.pretrained, without, with_)
    points = {"initial": (0.0, 0.0), "without": (p.reach, 0.0), "with": p.corner}
    xs, ys = (np.linspace(*margin([q[k] for q in points.values()]), side) for k in (0, 1))
    assert stream.probe is not None
    asked = {
        "zero-shot probe": [(stream.probe.test.spread(400), stream.probe.classes)],
        f"the {tasks} tasks learned": [(t.test.spread(100), t.classes) for t in stream.tasks[:tasks]],
    }
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (name, questions) in zip(figure.subplots(1, 2), asked.items(), strict=True):
        z = np.array([[loss_at(clip, p.at(x, y), f"{name} {x} {y}", questions) for x in xs] for y in ys])
        levels = np.geomspace(z.min(), z.max(), 14)
        shown = axes.contourf(xs, ys, z, levels=levels, cmap="viridis", norm=matplotlib.colors.LogNorm())
        figure.colorbar(shown, ax=axes, ticks=levels[::3], format="%.2f")
        for label, (x, y) in points.items():
            axes.plot(x, y, "o", color="white", markeredgecolor="black")
            axes.annotate(label, (x, y), xytext=(5, 5), textcoords="offset points", color="white", fontsize=9)
            print(name, label, round(loss_at(clip, p.at(x, y), f"{name} {label}", questions), 3))
        axes.set(title=f"cross entropy on {name}", xlabel="distance in weights", aspect="equal")
    finish(figure, "surface")


def margin(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.25 * (high - low)
    return low - room, high + room


def finish(figure: Figure, name: str) -> None:
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(OUT / f"{name}.png", dpi=130)
    print(OUT / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each; 1: one run with all threads")
    parser.add_argument("--tasks", type=int, default=3, help="of the ablation and the figures; 8: all")
    parser.add_argument("--runs", type=Path, default=Path("runs/study-gift"))
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        globals()[part](options.runs.resolve(), options.seeds, options.jobs, options.tasks)


if __name__ == "__main__":
    main()
