"""All methods under one protocol: docs/table.md.

    python studies/table.py [rates] [runs] [page] [--seeds 3] [--jobs 2] [--methods ridge gift …] [--columns "order I" …]

``rates``  chooses each method's learning rate: a third, once and three times the small world's default, on training images that
           are held out of the first three tasks of order I (``held_out.py``), seed 0, at full length; the best Average wins.
``runs``   makes what is missing of the table under the short protocol (``runs.short``), seed by seed.
``page``   writes the table into docs/table.md, of what is there.

What is measured stands in docs/table/*.jsonl as soon as it is done, a line a run: broken off, it goes on where it was, in any
clone. Without a word, all three are done.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from runs import short, spread

import perdure
from perdure import launch

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = Path(__file__).with_name("held_out.py")
BEGIN, END = "<!-- made by studies/table.py: begin -->", "<!-- end -->"
PARTS = ("rates", "runs", "page")
FACTORS = (1 / 3, 1.0, 3.0)
TUNING = {"precision": "bf16", "threads": 1}  # of the rates
HIDDEN, KNOWN = "order I, task hidden", "order I"
# column → stream and settings
COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    KNOWN: ("mini-mtil", {}),
    "class-incremental": ("mini-cil", {}),
    "all names, 16 shots": ("mini-xtail", {}),
    "5 shots": ("mini-mtil", {"shots": 5}),
    "order II": ("mini-mtil-2", {}),
    HIDDEN: ("mini-mtil", {"task_id": "hidden"}),
}
NO_ROW, NO_RATE = ("merge",), ("zero_shot", "ncm")  # a fuse role, for combinations; nothing is trained
ASKS_TASK = ("individual", "condu", "moe_adapters")  # parts of names of methods that answer by the task
NEEDS = {  # by name; of the others: nothing
    "gift": "a text-to-image model", "zscl": "reference images and texts", "lwf_vr": "sentences", "icarl": "old images",
    "wc": "reference images and texts", "we": "reference images and texts", "experience_replay": "old images",
    "ocl_sda": "old images", "individual": "the task's identity", "condu": "votes, or the task's identity",
    "moe_adapters": "a selector and its reference images, or the task's identity", "clg_cbm": "concepts of each class",
    "joint": "all tasks at once",
}  # fmt: skip
PLAIN = 12_700_000  # bytes of the small CLIP's weights: a file of so many stands in the place of a checkpoint


def rows(wanted: Iterable[str]) -> list[str]:
    """The methods that are asked for, or all; references first, then by name."""
    known = [entry.name for entry in launch.methods() if entry.name not in NO_ROW]
    first: list[str] = ["zero_shot", "finetune", "joint", "individual"]
    order = [name for name in first if name in known]
    named = list(wanted)
    if strange := sorted(set(named) - set(known)):
        raise SystemExit(f"There is no method {', '.join(strange)}. There are: {', '.join(known)}.")
    order += sorted((n for n in known if n not in order), key=lambda name: "+" in name)  # combinations at the end
    return [name for name in order if not named or name in named]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def note(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line, safe on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Job(NamedTuple):
    """A run to be made, and what its line says of it beside its figures."""

    folder: Path
    method: str
    stream: str
    seed: int
    values: dict[str, Any]
    about: dict[str, Any]


def ran(job: Job) -> dict[str, Any]:
    """The metrics of a run, which is done if it was not, and the sizes of what it keeps. The run is deleted."""
    if (job.folder / "config.json").exists():
        metrics = perdure.resume(job.folder)
    else:
        metrics = perdure.run(job.method, job.stream, job.folder, seed=job.seed, **job.values)
    last = max(job.folder.glob("task_*/state.json"))
    metrics["files"] = {key: about["bytes"] for key, about in json.loads(last.read_text())["files"].items()}
    shutil.rmtree(job.folder)
    return metrics


def each(jobs: Iterable[Job], at_a_time: int, path: Path, told: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Do all jobs, in processes that do many; note in ``path`` what is ``told`` of their metrics. Those that fail are named
    when the others are done."""
    failed = []
    with ProcessPoolExecutor(at_a_time, get_context("spawn")) as pool:
        doing = {pool.submit(ran, job): job.about for job in jobs}
        for job in as_completed(doing):
            about = doing[job]
            try:
                note(path, {**about, **told(job.result())})
                print("done:", *about.values(), flush=True)
            except perdure.PerdureError as problem:
                failed.append(f"{about}: {problem}")
    if failed:
        raise SystemExit("\n".join(failed))


def default_rate(method: str) -> float | None:
    """The small world's learning rate of a method that trains; else None."""
    rate = method not in NO_RATE and launch.configure(method, "mini-mtil", 0, {}, {})[0]["options"].get("lr")
    return float(rate) if rate else None


def rates(asked: argparse.Namespace) -> None:
    path = asked.out / "rates.jsonl"
    done = {(one["method"], one["factor"]) for one in lines(path)}
    jobs = []
    for method in rows(asked.methods):
        rate = 0.0 if "+" in method else default_rate(method) or 0.0
        for factor in FACTORS:
            if rate and (method, factor) not in done:
                lr = rate * factor
                folder = asked.runs / f"rate {factor:.2f} of {method}"
                about = {"method": method, "factor": factor, "lr": lr}
                jobs.append(Job(folder, method, str(HELD_OUT), 0, {**TUNING, "lr": lr}, about))
    each(jobs, asked.jobs, path, lambda metrics: {"average": metrics["average"]})


def chosen(method: str, path: Path) -> dict[str, float]:
    """The rate that was best on what was held out; of equals the smallest. Nothing where none was tried. A combination takes
    that of the method that learns in it."""
    tried = [one for one in lines(path) if one["method"] == method.partition("+")[0]]
    best = max(tried, key=lambda one: (one["average"], -one["lr"]), default=None)
    return {"lr": best["lr"]} if best and len(tried) == len(FACTORS) else {}


def runs(asked: argparse.Namespace) -> None:
    path = asked.out / "runs.jsonl"
    done = {(one["method"], one["column"], one["seed"]) for one in lines(path)}
    jobs = []
    for seed, column, method in itertools.product(range(asked.seeds), asked.columns, rows(asked.methods)):
        if (method, column, seed) in done or (column == HIDDEN and not asks(method)):
            continue
        own = chosen(method, asked.out / "rates.jsonl")
        if not own and default_rate(method) is not None:
            print(f"left for later: {method}, whose rate is not chosen yet (rates)")
            continue
        stream, values = COLUMNS[column]
        folder = asked.runs / f"{method}, {column}, {seed}"
        about = {"method": method, "column": column, "seed": seed, **own}
        jobs.append(Job(folder, method, stream, seed, {**short(method), **values, **own}, about))
    each(jobs, asked.jobs, path, figures)


def asks(method: str) -> bool:
    """Whether a method answers by the task; another's figures are the same where it is hidden."""
    return any(part in method for part in ASKS_TASK)


def figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the table says of a run."""
    names = ("transfer", "average", "last", "incremental_average", "incremental_last", "reference")
    kept = {key: size for key, size in metrics["files"].items() if key != "hits"}
    in_place = kept.get("weights", 0) if kept.get("weights", 0) > PLAIN else 0
    return {
        **{name: metrics[name] for name in names}, "intervals": metrics["intervals"], "probe": metrics["probe"][-1],
        "seconds": round(sum(one["train"] for one in metrics["seconds_by_task"]), 1),
        "parameters": (sum(kept.values()) - in_place) // 4, "bytes": sum(kept.values()),
    }  # fmt: skip


def page(asked: argparse.Namespace) -> None:
    """The table, between the marks of docs/table.md."""
    found = lines(asked.out / "runs.jsonl")
    titles = ["", *COLUMNS, "probe, after", "learning, s", "numbers beside", "kept, MB", "needs"]
    out = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for method in rows(()):
        own = [one for one in found if one["method"] == method]
        first = [one for one in own if one["column"] == KNOWN]
        source = {column: KNOWN if column == HIDDEN and not asks(method) else column for column in COLUMNS}
        cells = [cell([one for one in own if one["column"] == source[column]], column) for column in COLUMNS]
        for name, scale, form in (
            ("probe", 1, ".1f"),
            ("seconds", 1, ".0f"),
            ("parameters", 1, ",.0f"),
            ("bytes", 1e6, ".1f"),
        ):
            known = [one[name] for one in first if one[name] is not None]
            cells.append(format(sum(known) / len(known) / scale, form) if known else "–")
        parts = method.split("+")
        cells.append(
            "; ".join(dict.fromkeys(NEEDS[part] for part in NEEDS if {part, f"{part}_lora"} & {*parts})) or "nothing"
        )
        out.append(f"| `{method}` | {' | '.join(cells)} |")
    path = asked.out.with_suffix(".md")
    before, _, rest = (path.read_text() if path.exists() else "").partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n" + "\n".join(out) + f"\n{END}{rest.partition(END)[2]}")


def cell(found: list[dict[str, Any]], column: str) -> str:
    """Transfer / Average / Last, or the average over the steps and the last; of one seed the 95 % interval of the last too."""
    if not found:
        return "–"
    names = (
        ("incremental_average", "incremental_last")
        if column == "class-incremental"
        else ("transfer", "average", "last")
    )
    known = {name: [one[name] for one in found if one[name] is not None] for name in names}
    text = " / ".join(spread(values) if values else "–" for values in known.values())
    interval = found[0]["intervals"].get(names[-1])
    return f"{text} ({interval[0]:.1f} to {interval[1]:.1f})" if len(found) == 1 and interval else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to do; all, if none is named")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of a thread each")
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--runs", type=Path, default=Path("runs/table"), help="where runs lie while they are made")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "table", help="what is measured; the page beside it"
    )
    asked = parser.parse_args()
    for part in asked.parts or PARTS:
        {"rates": rates, "runs": runs, "page": page}[part](asked)


if __name__ == "__main__":
    main()
