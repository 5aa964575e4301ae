"""The ridge head on the small world: what it reaches on every stream and protocol, and which composition is best.

    python studies/ridge.py [--seeds 3] [--jobs 2] [--runs DIR] [table] [candidates] [hidden] [domains]

The composition was chosen on ``mini-mtil`` (``candidates``); no other column of ``table`` took part in that. Everything is
resumable. Tables go to ``docs/ridge``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runs import command, do, read, spread

OUT = Path(__file__).resolve().parents[1] / "docs" / "ridge"
PARTS = ("table", "candidates", "hidden", "domains")
HIDDEN = {"labels": "all", "task_id": "hidden"}
# column of the table → stream and options
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "order I": ("mini-mtil", {}),
    "order II": ("mini-mtil-2", {}),
    "5 shots": ("mini-mtil", {"shots": 5}),
    "all names, task hidden": ("mini-mtil", HIDDEN),
    "class-incremental": ("mini-cil", {}),
}
METHODS = ("zero_shot", "ncm", "ridge", "ridge_patches")
PATCHES = {"input": "patches", "features": 4096, "judge": 1024}
RAIL = {
    "input": "projected", "weights": "uniform", "lam": 0.1, "choose": "fixed", "score": "raw", "weight": 0.8,
    "gate": "argmax",
}  # fmt: skip
RANPAC = {"unit": False, "choose": "holdout", "score": "raw", "weight": 1, "gate": "argmax"}
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "ridge, linear (M = 0)": ("ridge", {"features": 0}),
    "ridge, M = 1,024": ("ridge", {"features": 1024}),
    "ridge, after the projection": ("ridge", {"input": "projected"}),
    "ridge": ("ridge", {}),
    "ridge, RAIL's settings": ("ridge", RAIL),
    "ridge, RanPAC's settings behind RAIL's gate": ("ridge", RANPAC),
    "patches, M = 2,048": ("ridge", {"input": "patches"}),
    "patches of the last block": ("ridge_patches", {"block": 1}),
    "patches, one mean of all": ("ridge_patches", {"grid": 1}),
    "**ridge_patches**": ("ridge_patches", {}),
    "ridge_patches, λ judged by all features": ("ridge_patches", {"judge": 0}),
    "ConDU's experts and ridge": ("condu+ridge", {}),
    "ConDU's experts and patches": ("condu+ridge", PATCHES),
    "ConDU's experts and patches, half and half": ("condu+ridge", {**PATCHES, "weight": 0.5}),
    "first task adapted (RanPAC), patches on it": ("finetune+ridge", {**PATCHES, "first_only": True, "on": "drifting"}),
    "fine-tuning and patches, half and half": ("finetune+ridge", {**PATCHES, "weight": 0.5}),
}


def ran(runs: Path, wanted: dict[str, tuple[str, str, dict[str, Any]]], seeds: int, jobs: int) -> None:
    """Do the runs ``name`` → (method, stream, options)."""
    threads = {"threads": 1} if jobs > 1 else {}
    do(
        [
            command(runs / name / f"seed_{seed}", method, stream, seed, {**values, **threads})
            for name, (method, stream, values) in wanted.items()
            for seed in range(seeds)
        ],
        jobs,
    )


def found(runs: Path, name: str, seeds: int) -> list[dict[str, Any]]:
    return [read(runs / name / f"seed_{seed}") for seed in range(seeds)]


def table(runs: Path, seeds: int, jobs: int) -> None:
    """Every stream and protocol; Transfer / Average / Last, or the class-incremental average / last."""
    names = {f"{m}, {c}": (m, s, v) for m in METHODS for c, (s, v) in STREAMS.items()}
    ran(runs, names, seeds, jobs)
    lines = [f"| {seeds} seeds | {' | '.join(STREAMS)} |", f"|---|{'---|' * len(STREAMS)}"]
    for method in METHODS:
        cells = []
        for column, (stream, _) in STREAMS.items():
            figures = (
                ("incremental_average", "incremental_last") if stream == "mini-cil" else ("transfer", "average", "last")
            )
            metrics = found(runs, f"{method}, {column}", seeds)
            cells.append(" / ".join(spread([m[f] for m in metrics]) for f in figures))
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    finish("table", lines)


def candidates(runs: Path, seeds: int, jobs: int) -> None:
    """What was tried on order I, the task known."""
    ran(runs, {plain(name): (m, "mini-mtil", v) for name, (m, v) in CANDIDATES.items()}, seeds, jobs)
    compared("candidates", runs, CANDIDATES, "", seeds)


def hidden(runs: Path, seeds: int, jobs: int) -> None:
    """The closed forms among them, with all names competing and the task hidden."""
    closed = {name: one for name, one in CANDIDATES.items() if one[0] in ("ridge", "ridge_patches")}
    ran(runs, {f"{plain(n)}, hidden": (m, "mini-mtil", {**v, **HIDDEN}) for n, (m, v) in closed.items()}, seeds, jobs)
    compared("hidden", runs, closed, ", hidden", seeds)


def compared(part: str, runs: Path, rows: Iterable[str], mark: str, seeds: int) -> None:
    """A table of rows: figures, the probe at the end, seconds of learning."""
    titles = (
        f"{seeds} seed{'s' * (seeds > 1)}",
        "Transfer",
        "Average",
        "Last",
        "probe, after",
        "seconds to learn eight tasks",
    )
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name in rows:
        metrics = found(runs, plain(name) + mark, seeds)
        cells = [spread([m[f] for m in metrics]) for f in ("transfer", "average", "last")]
        cells.append(spread([m["probe"][-1] for m in metrics]))
        cells.append(f"{sum(s['train'] for m in metrics for s in m['seconds_by_task']) / len(metrics):.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    finish(part, lines)


def plain(name: str) -> str:
    """A row's name as a folder."""
    return name.strip("*")


def domains(runs: Path, seeds: int, jobs: int) -> None:
    """Where a head stops: the last row, domain by domain, against an expert of one's own."""
    methods = ("zero_shot", "ridge", "ridge_patches", "individual")
    ran(runs, {f"{m}, order I": (m, "mini-mtil", {}) for m in methods}, seeds, jobs)
    runs_of = {m: found(runs, f"{m}, order I", seeds) for m in methods}
    tasks = runs_of["ridge"][0]["tasks"]
    lines = [f"| | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
    for method, metrics in runs_of.items():
        cells = [spread([m["accuracy"][-1][j] for m in metrics]) for j in range(len(tasks))]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    finish("domains", lines)


def finish(name: str, lines: list[str]) -> None:
    lines = [line.replace(" ± 0.0", "") for line in lines]  # what no seed touches
    (OUT / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each; 1: one run with all threads")
    parser.add_argument("--runs", type=Path, default=Path("runs/study-ridge"))
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        globals()[part](options.runs.resolve(), options.seeds, options.jobs)


if __name__ == "__main__":
    main()
