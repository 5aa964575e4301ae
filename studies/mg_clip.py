"""MG-CLIP and class-incremental learning on the small world, the combinations, and what the modality gap tells.

    python studies/mg_clip.py [--seeds 3] [--jobs 2] [--runs DIR] [table] [combinations] [softmax] [gap]

Everything is resumable: pairs and runs that are finished are not made again. Tables and figures go to ``docs/mg_clip``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from runs import command, do, read, spread
from scipy.stats import spearmanr
from torch import Tensor

from perdure import launch
from perdure.data.task import Query
from perdure.engine.checkpoint import folder_names, read_task
from perdure.methods.mg_clip import MGCLIP
from perdure.models.heads import CosineHead, mix, softmax
from perdure.ops import metrics
from perdure.ops.gap import relative_change

OUT = Path(__file__).resolve().parents[1] / "docs" / "mg_clip"
PARTS = ("table", "combinations", "softmax", "gap")
CIL, MTIL = "mini-cil", "mini-mtil"
STEPS: dict[str, Any] = {"iterations": 24, "warmup": 3}  # eight epochs of a step's 190 images
REPLAY: dict[str, Any] = {**STEPS, "synthetic": 64, "pairs": "PAIRS"}
# row of the table → method and options
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero-shot": ("zero_shot", {}),
    "nearest class mean, frozen features": ("ncm", {}),
    "sequential fine-tuning": ("finetune", STEPS),
    "sequential LoRA": ("finetune_lora", STEPS),
    "MG-CLIP": ("mg_clip", {}),
    "MG-CLIP, 10 epochs without the monitor": ("mg_clip", {"epochs": 10}),
    "MG-CLIP without compensation": ("mg_clip", {"head": False}),
    "GIFT": ("gift", REPLAY),
    "ConDU": ("condu", STEPS),
    "GIFT + ConDU": ("gift+condu", REPLAY),
    "GIFT + MG-CLIP": ("gift+mg_clip", REPLAY),
    "ConDU + MG-CLIP": ("condu+mg_clip", STEPS),
    "GIFT + ConDU + MG-CLIP": ("gift+condu+mg_clip", REPLAY),
}
ADAPTING = ("sequential fine-tuning", "sequential LoRA", "MG-CLIP", "MG-CLIP, 10 epochs without the monitor", "GIFT")
COMBINED = [row for row in ROWS if " + " in row]
FIRST = 4  # tasks of mini-mtil that the combinations learn, with the stream's own steps and pairs
OF_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    row: (method, {**({"tasks": FIRST} if row in COMBINED else {}), **({"pairs": "PAIRS"} if "gift" in method else {})})
    for row, (method, _) in ROWS.items() if row in ("GIFT", "ConDU", "MG-CLIP", *COMBINED)
}  # fmt: skip


def folder_of(runs: Path, stream: str, row: str, seed: int) -> Path:
    return runs / stream / row.replace(" ", "-").replace(",", "").lower() / f"seed_{seed}"


def seeds_of(row: str, seeds: int) -> int:
    """Combinations of two are run once."""
    return 1 if row in COMBINED[:-1] else seeds


def train(runs: Path, stream: str, rows: dict[str, tuple[str, dict[str, Any]]], seeds: int, jobs: int) -> None:
    draw = ["synthetic=64"] if stream == CIL else []
    for seed in range(seeds):
        drawn = launch.generate(stream, runs / stream / "pairs", seeds=[seed], assignments=draw)
        print(f"pairs of {stream}, seed {seed}: {drawn} drawn", flush=True)
    pairs = {"pairs": runs / stream / "pairs"}
    words = []
    for seed in range(seeds):
        for row, (method, values) in rows.items():
            if seed >= seeds_of(row, seeds):
                continue
            own = {**values, **(pairs if "pairs" in values else {}), **({"threads": 1} if jobs > 1 else {})}
            words.append(command(folder_of(runs, stream, row, seed), method, stream, seed, own))
    do(words, jobs)


def table(runs: Path, seeds: int, jobs: int) -> None:
    """Class-incremental: accuracy over the classes seen so far, the task hidden."""
    train(runs, CIL, ROWS, seeds, jobs)
    lines = [
        f"| {CIL}, {seeds} seeds (combinations of two: one) | average over steps | last step | forgetting | probe, after "
        "| negative mean moved by |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        found = [read(folder_of(runs, CIL, row, seed)) for seed in range(seeds_of(row, seeds))]
        names = ("incremental_average", "incremental_last", "forgetting")
        cells = [spread([f[name] for f in found]) for name in names]
        moved = [100 * moved_by(f["gap"]) for f in found]
        lines.append(f"| {row} | {' | '.join(cells)} | {spread([f['probe'][-1] for f in found])} | {spread(moved)} % |")
    epochs = [state(folder_of(runs, CIL, "MG-CLIP", seed))["epochs"] for seed in range(seeds)]
    finish("table", [*lines, "", f"Epochs that the gap allowed MG-CLIP, seed by seed: {', '.join(map(str, epochs))}."])


def combinations(runs: Path, seeds: int, jobs: int) -> None:
    """Multi-domain, the task known: the combinations beside their parts."""
    train(runs, MTIL, OF_TASKS, 1, jobs)
    lines = [
        f"| {MTIL}, first {FIRST} tasks, seed 0 | Transfer | Average | Last | probe, after |",
        "|---|---|---|---|---|",
    ]
    for row in OF_TASKS:
        found = read(folder_of(runs, MTIL, row, 0))
        matrix = np.array(found["accuracy"])[
            : FIRST + 1, :FIRST
        ]  # what a longer run did on them is what a shorter one does
        cells = [f"{float(metrics.FIGURES[name](matrix)):.1f}" for name in ("transfer", "average", "last")]  # type: ignore[arg-type]
        lines.append(f"| {row} | {' | '.join(cells)} | {found['probe'][FIRST]:.1f} |")
    finish("combinations", lines)


def state(folder: Path) -> Any:
    names = read(folder)["tasks"]
    return read_task(folder / folder_names(names)[-1], tensors=False).record["values"]


def moved_by(course: list[dict[str, float]]) -> float:
    """The relative change of the negative mean, from before any task to after the last."""
    return relative_change(course[0]["negative"], course[-1]["negative"])


def finish(name: str, lines: list[str]) -> None:
    (OUT / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


@torch.no_grad()
def softmax_of(folder: Path) -> dict[str, float]:
    """Last accuracy of a finished MG-CLIP run under other ways of mixing."""
    config, data, method = launch.reopen(folder)
    assert isinstance(method, MGCLIP)
    clip = launch.load_clip(config, data.model)
    method.bind(clip, data.context(config["seed"]))
    read_task(folder / folder_names([t.name for t in data.tasks])[-1], tensors=True).restore(method)
    classes = tuple(c for t in data.tasks for c in t.classes)
    query = Query(torch.cat([t.test.pixels for t in data.tasks]), classes)
    starts = np.cumsum([0, *(len(t.classes) for t in data.tasks)])
    labels = torch.cat([t.test.labels + int(s) for t, s in zip(data.tasks, starts, strict=False)])
    images = torch.cat([clip.encode_image(x) for x in query.images.split(256)])
    text = clip.similarity(images, clip.class_texts([c.prompts() for c in classes]))
    head, every = CosineHead(method.state.head["rows"])(images), torch.arange(len(classes))

    def right(scores: Tensor) -> float:
        return 100 * scores.argmax(1).eq(labels).float().mean().item()

    c = method.config
    out = {"text alone": right(text), "head alone": right(head)}
    for times, name in ((1, "single softmax (the paper)"), (2, "double softmax (the release)")):
        out[name] = right(mix(softmax(text, times), softmax(head), every, c.text_weight, c.head_weight))
    out["single softmax, cosines times 10"] = right(
        mix(softmax(text), softmax(10 * head), every, c.text_weight, c.head_weight)
    )
    return out


def softmax_(runs: Path, seeds: int, jobs: int) -> None:
    """What the text probabilities' softmax is worth."""
    train(runs, CIL, {"MG-CLIP": ROWS["MG-CLIP"]}, seeds, jobs)
    found = [softmax_of(folder_of(runs, CIL, "MG-CLIP", seed)) for seed in range(seeds)]
    lines = [f"| MG-CLIP on {CIL}, {seeds} seeds | last step |", "|---|---|"]
    finish("softmax", lines + [f"| {name} | {spread([f[name] for f in found])} |" for name in found[0]])


def gap(runs: Path, seeds: int, jobs: int) -> None:
    """Does the gap tell what is lost? Its change against the probe's, over all methods, seeds and steps."""
    train(runs, CIL, ROWS, seeds, jobs)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    ends: list[tuple[float, float, float]] = []
    for axes, measure in zip(figure.subplots(1, 2), ("negative", "angle"), strict=True):
        for k, row in enumerate(ROWS):
            for seed in range(seeds_of(row, seeds)):
                found = read(folder_of(runs, CIL, row, seed))
                course = found["gap"]
                change = [100 * relative_change(course[0][measure], g[measure]) for g in course]
                lost = [found["probe"][0] - p for p in found["probe"]]
                colour = plt.get_cmap("tab20")(k)
                axes.plot(change, lost, color=colour, linewidth=0.6, alpha=0.6)
                axes.plot(change[-1], lost[-1], "o", color=colour, markersize=5, label=row if not seed else None)
                if measure == "negative" and row in ADAPTING:
                    angle = 100 * relative_change(course[0]["angle"], course[-1]["angle"])
                    ends.append((change[-1], angle, lost[-1]))
        name = {"negative": "mean wrong logit", "angle": "angle of images and texts"}[measure]
        axes.set(xlabel=f"{name}: change, per cent", ylabel="lost on the probe, points")
    figure.axes[1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(OUT / "gap.png", dpi=130)
    negative, angle, lost = np.array(ends).T
    ranks = [spearmanr(x, lost).statistic for x in (negative, angle)]
    finish("gap", [
        f"Rank correlation (Spearman) with what is lost on the probe after the last step, {len(lost)} runs "
        f"({', '.join(ADAPTING)}): negative mean {ranks[0]:.2f}, angle {ranks[1]:.2f}."
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each; 1: one run with all threads")
    parser.add_argument("--runs", type=Path, default=Path("runs/study-mg_clip"))
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        {**globals(), "softmax": softmax_}[part](options.runs.resolve(), options.seeds, options.jobs)


if __name__ == "__main__":
    main()
