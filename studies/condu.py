"""ConDU on the small world: against other fusions of the same experts, and what unifying costs.

    python studies/condu.py [--seeds 3] [--jobs 2] [--runs DIR] [table] [variants] [tsne] [agreement]

The experts of all tasks are trained once a seed (``individual``, ``finetune``); every fusion is then fed the same experts,
task after task, through its own ``fuse``, and evaluated: as ``perdure run`` would, to the bit, without training them again.
Everything is resumable. Tables and figures go to ``docs/condu``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from runs import command, do, read, spread
from torch import Tensor

from perdure import launch
from perdure.benchmarks import mini
from perdure.core.seeding import reseed
from perdure.core.state import write_json
from perdure.core.weights import floating, original
from perdure.data.task import Query, Stream
from perdure.engine.checkpoint import folder_names, read_task
from perdure.engine.evaluate import Protocol, evaluate, per_cent
from perdure.methods.base import Method
from perdure.methods.condu import ConDU
from perdure.models.clip import CLIP
from perdure.ops import fusion, metrics

OUT = Path(__file__).resolve().parents[1] / "docs" / "condu"
STREAM = "mini-mtil"
PARTS = ("table", "variants", "tsne", "agreement")
FEW: dict[str, Any] = {"shots": 5, "iterations": 40, "warmup": 4}
LORA: dict[str, Any] = {"adapt": "lora", "lr": 2e-3}
# folder of trained runs → method and options
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("individual", {}), "lora": ("individual", LORA),
    "full-5": ("individual", FEW), "lora-5": ("individual", {**FEW, **LORA}),
    "sequential": ("finetune", {}), "sequential-5": ("finetune", FEW),
}  # fmt: skip
# row of the table → experts, and what fuses them (None: the run as it is)
ROWS: dict[str, tuple[str, str | None]] = {
    "sequential fine-tuning": ("sequential", None),
    "own experts, not unified": ("full", None),
    "ConDU (FT)": ("full", "condu"),
    "ConDU (LoRA)": ("lora", "condu"),
    "weight averaging": ("full", "weight_average"),
    "task arithmetic": ("full", "task_arithmetic"),
    "TIES": ("full", "ties"),
    "MagMax": ("sequential", "magmax"),
    "5-shot: sequential fine-tuning": ("sequential-5", None),
    "5-shot: own experts, not unified": ("full-5", None),
    "5-shot: ConDU (FT)": ("full-5", "condu"),
    "5-shot: ConDU (LoRA)": ("lora-5", "condu"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mean, K = 4 (default)": {}, "mean, K = 1": {"experts": 1}, "mean, K = 8 (all)": {"experts": 8},
    "similarity, K = 4": {"weighting": "similarity"}, "similarity, K = 8": {"weighting": "similarity", "experts": 8},
    "prototypes of augmented images": {"prototype_images": "augmented"}, "pre-trained model alone": {"experts": 0},
}  # fmt: skip
KNOWN, HIDDEN = Protocol("task", "known"), Protocol("task", "hidden")


def tuned(folder: Path, task: str) -> dict[str, Tensor]:
    """The weights that a run ended ``task`` with: an expert's, or the sequential model's."""
    names = read(folder)["tasks"]
    files = read_task(folder / folder_names(names)[names.index(task) + 1], tensors=True).files
    return files.get(f"expert/{task}") or files.get(f"expert_{task}") or files["weights"]


def data_of(seed: int, values: Mapping[str, Any]) -> Stream:
    return mini.multi_domain("I").few_shot(values.get("shots", 0), seed)


def begun(name: str, seed: int, stream: Stream, values: Mapping[str, Any]) -> Method:
    """The method, bound to the model as a run of this seed binds it."""
    known = {key: option.default for key, (_, option) in launch.method_options(launch.method_entry(name)).items()}
    method = launch.build(name, {**known, **values})
    reseed(seed, "bind")
    method.bind(CLIP.load(stream.model), stream.context(seed))
    return method


def fused(runs: Path, row: str, seed: int) -> dict[str, Any]:
    """The accuracies of a row: ``known`` (T + 1, T) and ``probe`` after each task, ``hidden`` (T,) after the last."""
    experts, rule = ROWS[row]
    cache = runs / "rows" / f"{row.replace(' ', '-').replace(':', '').lower()}-{seed}.json"
    if cache.exists():
        found: dict[str, Any] = json.loads(cache.read_text())
        return found
    source = runs / experts / f"seed_{seed}"
    stream = data_of(seed, EXPERTS[experts][1])
    out: dict[str, Any] = {"known": [], "probe": [], "hidden": None}
    if rule is None:
        run = read(source)
        out = {"known": run["accuracy"], "probe": run["probe"], "hidden": run["accuracy"][-1]}
        if experts.startswith("full"):  # the task hidden: no expert can be chosen
            out["hidden"] = run["accuracy"][0]
    else:
        method, last = begun(rule, seed, stream, {}), len(stream.tasks)
        for number in range(last + 1):
            if number:
                task = stream.tasks[number - 1]
                method.clip.load_weights(f"tuned {task.name}", tuned(source, task.name))
                method.fuse(task)
            if number == last or not row.startswith("5-shot"):  # few-shot rows: the last accuracy alone
                hits = evaluate(method, stream, KNOWN, number)
                out["known"].append([per_cent(hits[t.name]) for t in stream.tasks])
                out["probe"].append(per_cent(hits["probe"]))
        if not method.carries_weights:  # else there is one model, and nothing to be told
            hits = evaluate(method, stream, HIDDEN, last)
        out["hidden"] = [per_cent(hits[t.name]) for t in stream.tasks]
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_json(cache, out)
    print(f"{row}, seed {seed}: last {np.mean(out['known'][-1]):.1f}, hidden {np.mean(out['hidden']):.1f}", flush=True)
    return out


def train(runs: Path, seeds: int, jobs: int) -> None:
    one = {"threads": 1} if jobs > 1 else {}
    do(
        [
            command(runs / name / f"seed_{seed}", method, STREAM, seed, {**values, **one})
            for seed in range(seeds) for name, (method, values) in EXPERTS.items()
        ],
        jobs,
    )  # fmt: skip


def table(runs: Path, seeds: int, jobs: int) -> None:
    """Transfer, Average and Last of every row, with the task known and hidden; what unifying costs each task."""
    train(runs, seeds, jobs)
    lines = [
        f"| {seeds} seeds | Transfer | Average | Last, task known | Last, task hidden | probe, after |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        found = [fused(runs, row, seed) for seed in range(seeds)]
        if row == next(iter(ROWS)):
            start = np.array(found[0]["known"][0])
            cells = f"{start[1:].mean():.1f} | {start.mean():.1f} | {start.mean():.1f} | {start.mean():.1f}"
            lines.append(f"| (before any task) | {cells} | {found[0]['probe'][0]:.1f} |")
        course = all(len(f["known"]) > 1 for f in found)
        cells = " | ".join(
            spread([float(metrics.FIGURES[n](f["known"])) for f in found]) if course else "–"  # type: ignore[arg-type]
            for n in ("transfer", "average")
        )
        cells += f" | {spread([float(np.mean(f['known'][-1])) for f in found])}"
        hidden = spread([float(np.mean(f["hidden"])) for f in found])
        lines.append(f"| {row} | {cells} | {hidden} | {spread([f['probe'][-1] for f in found])} |")
    tasks = [t.name for t in mini.multi_domain("I").tasks]
    lines += ["", f"| accuracy, task known | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for kind, own in (("full", "FT"), ("lora", "LoRA")):
        runs_of = [read(runs / kind / f"seed_{seed}")["accuracy"][-1] for seed in range(seeds)]
        last = [fused(runs, f"ConDU ({own})", seed)["known"][-1] for seed in range(seeds)]
        lines.append(f"| own expert, {own} | {cells_of(np.mean(runs_of, 0))} |")
        lines.append(f"| ConDU ({own}), decoupled from {len(tasks)} | {cells_of(np.mean(last, 0))} |")
        lines.append(f"| lost by unifying | {cells_of(np.mean(runs_of, 0) - np.mean(last, 0))} |")
    finish_table("table", lines)


def cells_of(values: Any) -> str:
    return " | ".join(f"{v:.1f}" for v in values)


def finish_table(name: str, lines: list[str]) -> None:
    (OUT / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def learned(runs: Path, seed: int, values: Mapping[str, Any], kind: str = "full") -> tuple[ConDU, Stream]:
    """ConDU after all tasks."""
    stream = data_of(seed, EXPERTS[kind][1])
    method = begun("condu", seed, stream, values)
    assert isinstance(method, ConDU)
    for task in stream.tasks:
        method.clip.load_weights(f"tuned {task.name}", tuned(runs / kind / f"seed_{seed}", task.name))
        method.fuse(task)
    return method, stream


def variants(runs: Path, seeds: int, jobs: int) -> None:
    """How the experts vote where the task is hidden, after the last task."""
    train(runs, seeds, jobs)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for seed in range(seeds):
        states = {}
        for name, values in VARIANTS.items():
            images = values.get("prototype_images", "plain")
            if images not in states:
                states[images] = learned(runs, seed, {"prototype_images": images})[0].pack_state()
            stream = data_of(seed, {})
            method = begun("condu", seed, stream, values)
            method.unpack_state(*states[images])
            hits = evaluate(method, stream, HIDDEN, len(stream.tasks))
            tasks = float(np.mean([per_cent(hits[t.name]) for t in stream.tasks]))
            found[name].append((tasks, per_cent(hits["probe"])))
            print(name, seed, *found[name][-1], flush=True)
    lines = [f"| the vote, {seeds} seeds | Last, task hidden | probe, after |", "|---|---|---|"]
    for name, pairs in found.items():
        lines.append(f"| {name} | {spread([a for a, _ in pairs])} | {spread([p for _, p in pairs])} |")
    finish_table("variants", lines)


@torch.no_grad()
def tsne(runs: Path, seeds: int, jobs: int) -> None:
    """Test images' features by the pre-trained model, with the prototypes; and by each task's decoupled expert."""
    from sklearn.manifold import TSNE

    train(runs, 1, jobs)
    method, stream = learned(runs, 0, {})
    images = [t.test.spread(60) for t in stream.tasks]
    method.clip.load_weights("pretrained", method.clip.pretrained)
    before = [method.clip.embeddings(x.pixels) for x in images]
    after = []
    for k, x in enumerate(images):
        (expert,) = method.experts(Query(x.pixels, (), k))
        assert expert.weights is not None
        method.clip.load_weights(expert.name, expert.weights)
        after.append(method.clip.embeddings(x.pixels))
    prototypes = list(method.state.prototypes.values())
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = (("pre-trained features and prototypes (+)", [*before, *prototypes]),
              ("features by each task's expert", after))  # fmt: skip
    for axes, (title, features) in zip(figure.subplots(1, 2), panels, strict=True):
        places = TSNE(random_state=0, init="pca", perplexity=30).fit_transform(torch.cat(features).numpy())
        parts = np.split(places, np.cumsum([len(f) for f in features])[:-1])
        for k, part in enumerate(parts):
            colour = plt.get_cmap("tab10")(k % len(stream.tasks))
            own = k >= len(stream.tasks)
            axes.scatter(
                *part.T, s=46 if own else 8, marker="+" if own else "o", color=colour,
                label=None if own else stream.tasks[k].name,
            )  # fmt: skip
        axes.set(title=title, xticks=[], yticks=[])
    figure.axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(OUT / "tsne.png", dpi=130)
    print(OUT / "tsne.png")


def layer(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    tower = "image" if name.startswith("vis") else "text"
    words = original(name).split(".")
    if "layers" in words:
        return f"{tower} {words[words.index('layers') + 1]} {'attention' if 'self_attn' in words else words[-2]}"
    return f"{tower} {'projection' if 'projection' in name else 'embeddings and last norm'}"


def agreement(runs: Path, seeds: int, jobs: int) -> None:
    """By layer and task: the share of a task's delta whose sign the unified one has, and of its magnitude."""
    train(runs, 1, jobs)
    method, stream = learned(runs, 0, {})
    origin, s = method.clip.pretrained, method.state
    names = floating(origin)
    layers = list(dict.fromkeys(layer(n) for n in names if n != "logit_scale"))
    signs, kept = np.zeros((2, len(layers), len(stream.tasks)))
    for k, task in enumerate(stream.tasks):
        own = tuned(runs / "full" / "seed_0", task.name)
        sums: dict[str, np.ndarray[Any, Any]] = {place: np.zeros(4) for place in layers}
        for name in (n for n in names if n != "logit_scale"):
            delta = own[name] - origin[name]
            mask = fusion.unpacked(s.trigger[task.name][name], delta.numel()).view(delta.shape)
            sums[layer(name)] += [
                (mask & (delta != 0)).sum(), (delta != 0).sum(), (delta.abs() * mask).sum(), delta.abs().sum()
            ]  # fmt: skip
        for row, place in enumerate(layers):
            agree, all_of, magnitude, whole = sums[place]
            signs[row, k], kept[row, k] = agree / max(all_of, 1), magnitude / max(whole, 1e-12)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axes, (title, share) in zip(
        figure.subplots(1, 2, sharey=True), (("signs kept", signs), ("magnitude kept", kept)), strict=True
    ):
        shown = axes.imshow(share * 100, aspect="auto", cmap="viridis", vmin=40, vmax=100)
        axes.set(title=f"{title}, per cent", xticks=range(len(stream.tasks)), yticks=range(len(layers)))
        axes.set_xticklabels([t.name for t in stream.tasks], rotation=40, ha="right")
        axes.set_yticklabels(layers, fontsize=7)
        figure.colorbar(shown, ax=axes)
    figure.savefig(OUT / "agreement.png", dpi=120)
    print(OUT / "agreement.png", f"signs {signs.mean():.1%}, magnitude {kept.mean():.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each; 1: one run with all threads")
    parser.add_argument("--runs", type=Path, default=Path("runs/study-condu"))
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        globals()[part](options.runs.resolve(), options.seeds, options.jobs)


if __name__ == "__main__":
    main()
