"""What real sizes cost on this processor: seconds and peak memory of a step, of features and of an evaluation.

    python bench/sizes.py                                                    # a small table: ViT-B/16, batches of 8
    python bench/sizes.py --models vit-l-14 --methods finetune gift --batch 32 --savings none both --parts 8

Models have random weights and their published shapes; each is written once as a checkpoint (``--checkpoints``) and loaded
as any other. Every cell of the table is measured in a process of its own, so that its peak memory is its own, and stands in a
file of JSON lines (``--out``) as soon as it is done: what stands there is not measured again, whatever broke off. ``condu``
learns as ``finetune`` does. The share of the peak is the arithmetic that a step needs (what is computed twice counts once)
over its seconds, against a 2048³ product in the same precision. Evaluation and features are fp32, as in a run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gift_step import Given, product
from random_models import MODELS, checkpoint
from torch.utils.flop_counter import FlopCounterMode

from perdure import launch
from perdure.core.errors import PerdureError
from perdure.core.precision import precision_of
from perdure.data.task import Batch, Class, Images, Query, Task
from perdure.engine.environment import forget_peak_memory, peak_memory_mb
from perdure.methods.base import Method
from perdure.models.clip import CLIP
from perdure.models.recompute import by_blocks
from perdure.synthesis.store import Pairs
from perdure.training.fit import Accumulator, fit

TRAINED = ("finetune", "finetune_lora", "gift", "mg_clip")
LOOKED_AT = {"ridge": {}, "ridge_patches": {"block": 2, "grid": 2}}  # what is asked of the image tower
SAVINGS = ("none", "checkpointing", "parts", "both")
CLASSES = 400  # of an evaluation
Cell = dict[str, Any]


# ---- one cell, in a process of its own


def measured(cell: Cell, place: str) -> dict[str, float]:
    """What a cell costs. ``PerdureError`` where the model is of a kind that perdure does not load."""
    clip = CLIP.load(place)
    clip.evaluation_batch = cell["batch"]
    if cell["method"] in TRAINED:
        return training(clip, cell)
    return evaluation(clip, cell) if cell["method"] == "evaluation" else features(clip, cell)


def drawn(count: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def classes(count: int) -> tuple[Class, ...]:
    return tuple(Class(f"class {k}", ("a photo of a {}, of some kind.",)) for k in range(count))


def training(clip: CLIP, cell: Cell) -> dict[str, float]:
    """The median of the steps after a first one."""
    batch = cell["batch"]
    images = Images(drawn(max(batch, 4), clip.size), torch.arange(max(batch, 4)) % cell["classes"])
    task = Task("bench", classes(cell["classes"]), images, images)
    about = launch.method_options(launch.method_entry(cell["method"]))
    values = {key: option.default for key, (_, option) in about.items()}
    asked = dict(iterations=cell["steps"] + 1, warmup=0, batch_size=batch, synthetic_batch=batch, generator="none")
    values |= {key: value for key, value in asked.items() if key in values} | {"lr": 1e-6}
    if cell["method"] == "gift":
        values |= {"vocabulary": "imagenet"}
    method = launch.build(cell["method"], values)
    method.bind(clip)
    if cell["method"] == "gift":  # each text is that of its pair alone
        method.replay = Given(Pairs(images.pixels, [f"a photo of a thing {k}." for k in range(len(images))]))  # type: ignore[attr-defined]
    method.begin_task(task)
    work = arithmetic(method, task, batch)
    if cell["saving"] in ("checkpointing", "both"):
        by_blocks(clip.backbone)
    clip.accumulate = cell["parts"] if cell["saving"] in ("parts", "both") else 1
    forget_peak_memory()
    method.begin_task(task)
    stamps = [time.perf_counter()]
    step = lambda *_: stamps.append(time.perf_counter())  # noqa: E731
    fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device, cell["precision"], step)
    seconds = statistics.median(b - a for a, b in itertools.pairwise(stamps[1:]))
    return costs(seconds, work, cell["precision"])


def arithmetic(method: Method, task: Task, batch: int) -> float:
    """Floating-point operations of a step, forward and backward: a share that is the same whatever the batch, and one an
    image, from steps of 2 and of 4 images with all activations kept."""

    def counted(few: int) -> float:
        method.order = iter([torch.arange(few)])  # type: ignore[attr-defined]
        some = Batch(task.train.pixels[:few] / 255, task.train.labels[:few])
        with FlopCounterMode(display=False) as counter:
            method.step(some, Accumulator(method.parameters(), {}))
        for parameter in method.parameters().values():
            parameter.grad = None
        return float(counter.get_total_flops())

    two, four = counted(2), counted(4)
    return two + (four - two) / 2 * (batch - 2)


def features(clip: CLIP, cell: Cell) -> dict[str, float]:
    """Seconds for 1,000 images, from those that are looked at."""
    pixels, asked = drawn(cell["images"], clip.size), LOOKED_AT[cell["method"]]
    return looking(clip, cell, lambda count: clip.features(pixels[:count], **asked), 1000)


def evaluation(clip: CLIP, cell: Cell) -> dict[str, float]:
    """Seconds an image among 400 classes, and, apart from it, for their texts, which are embedded once for all images."""
    pixels, names = drawn(cell["images"], clip.size), classes(CLASSES)
    method = launch.build("zero_shot", {})
    method.bind(clip)
    start = time.perf_counter()
    clip.class_texts([one.prompts() for one in names])
    texts = time.perf_counter() - start
    return {**looking(clip, cell, lambda count: method.answer([Query(pixels[:count], names)]), 1), "texts": texts}


def looking(clip: CLIP, cell: Cell, look: Any, count: int) -> dict[str, float]:
    """Seconds for ``count`` images, from ``look`` at those there are, after one batch."""
    with FlopCounterMode(display=False) as counter:
        look(1)
    look(min(cell["batch"], cell["images"]))
    forget_peak_memory()
    start = time.perf_counter()
    look(cell["images"])
    seconds = (time.perf_counter() - start) / cell["images"] * count
    return costs(seconds, counter.get_total_flops() * count, "fp32")


def costs(seconds: float, work: float, precision: str) -> dict[str, float]:
    peak = peak_memory_mb()  # before the product
    return {"seconds": seconds, "peak_mb": peak, "gflop": work / 1e9, "peak_gflop_s": product(precision)}


# ---- the table


def cells(options: argparse.Namespace) -> list[Cell]:
    """Every cell that was asked for."""
    out = []
    for model, method in itertools.product(options.models, options.methods):
        base = {"model": model, "method": method, "batch": options.batch, "threads": torch.get_num_threads()}
        if method not in TRAINED:
            out.append({**base, "precision": "fp32", "saving": "none", "images": options.images})
            continue
        for precision, saving in itertools.product(options.precisions, options.savings):
            parts = options.parts if saving in ("parts", "both") else 1
            more = {"precision": precision, "saving": saving, "parts": parts}
            out.append({**base, **more, "classes": options.classes, "steps": options.steps})
    return out


def alone(cell: Cell, place: Path) -> dict[str, float] | str:
    """``measured`` in a process of its own; a sentence where it was not."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell), "--checkpoints", str(place)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "THP_MEM_ALLOC_ENABLE": "1"})
    if done.returncode:
        killed = " (killed: too little memory?)" if done.returncode in (-9, 137) else ""
        return f"it ended with {done.returncode}{killed}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return str(found["refused"]) if "refused" in found else found


def read(path: Path) -> list[tuple[Cell, dict[str, float]]]:
    """What was measured before."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(one["cell"], one["cost"]) for one in map(json.loads, lines)]


def write(path: Path, done: list[tuple[Cell, dict[str, float]]]) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text("".join(json.dumps({"cell": cell, "cost": cost}) + "\n" for cell, cost in done), encoding="utf-8")
    os.replace(beside, path)


def table(done: list[tuple[Cell, dict[str, float]]]) -> str:
    """Markdown."""
    lines = [
        "| model | method | precision | batch | saved by | time | peak memory | of the peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell, cost in done:
        time_of = {"evaluation": f"{1 / cost['seconds']:.2f} pictures/s, texts {cost.get('texts', 0):.1f} s"}
        took = time_of.get(
            cell["method"], f"{cost['seconds']:.2f} s " + ("a step" if cell["method"] in TRAINED else "for 1,000")
        )
        share = cost["gflop"] / cost["seconds"] / cost["peak_gflop_s"]
        saving = cell["saving"] + (f" ({cell['parts']})" if cell.get("parts", 1) > 1 else "")
        lines.append(
            f"| {cell['model']} | {cell['method']} | {cell['precision']} | {cell['batch']} | {saving} | {took} | "
            f"{cost['peak_mb'] / 1000:.2f} GB | {share:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods, native = (*TRAINED, *LOOKED_AT, "evaluation"), precision_of("auto", "cpu") == "bf16"
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vit-b-16"])
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"][: 1 + native])
    parser.add_argument("--savings", nargs="+", choices=SAVINGS, default=["none", "both"])
    parser.add_argument("--batch", type=int, default=8, help="images a step, and as many pairs; images at a time")
    parser.add_argument("--parts", type=int, default=4, help="accumulate, where parts are the saving")
    parser.add_argument("--classes", type=int, default=20, help="of the task that is trained on")
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after a first one")
    parser.add_argument("--images", type=int, default=32, help="that are looked at for features and evaluation")
    parser.add_argument("--out", type=Path, default=Path("build/sizes.jsonl"))
    parser.add_argument("--checkpoints", type=Path, default=Path("build/sizes"))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        try:
            print(json.dumps(measured(json.loads(options.cell), str(options.checkpoints))))
        except PerdureError as error:
            print(json.dumps({"refused": str(error)}))
        return
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(options.out)
    for cell in cells(options):
        if cell in [known for known, _ in done]:
            continue
        cost = alone(cell, checkpoint(cell["model"], options.checkpoints))
        if isinstance(cost, str):
            print(f"{cell['model']}, {cell['method']}: left out, {cost}", file=sys.stderr)
            continue
        done.append((cell, cost))
        write(options.out, done)
    asked = cells(options)
    print(table([(cell, cost) for cell, cost in done if cell in asked]))


if __name__ == "__main__":
    main()
