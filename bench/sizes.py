"""What real sizes cost on this processor: seconds and peak memory of a step, of features and of an evaluation.

    python bench/sizes.py                                                    # a small table: ViT-B/16, batches of 8
    python bench/sizes.py --models vit-l-14 --methods finetune gift --batch 32 --savings none both --parts 8

Models have random weights and their published shapes; each is written once as a checkpoint (``--checkpoints``) and loaded
as any other. Every cell of the table is measured in a process of its own, so that its peak memory is its own, and stands in a
file of JSON lines (``--out``) as soon as it is done: what stands there is not measured again, whatever broke off. ``condu``
learns as ``finetune`` does. The share of the peak is the arithmetic of a step over its seconds, against a 2048³ product in the
same precision (``--device cuda``: 8192³); with savings, which compute things twice, there is none. Evaluation and features
are fp32, as in a run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from random_models import MODELS, checkpoint
from step_costs import Cell, classes, costs, drawn, forget, now, training
from torch.utils.flop_counter import FlopCounterMode

from perdure import launch
from perdure.core.errors import PerdureError
from perdure.core.precision import HALF, precision_of
from perdure.data.task import Query
from perdure.models.clip import CLIP

TRAINED = ("finetune", "finetune_lora", "gift", "mg_clip")
LOOKED_AT = {"ridge": {}, "ridge_patches": {"block": 2, "grid": 2}}  # what is asked of the image tower
ROWS = tuple(entry.name for entry in launch.methods() if "role" not in entry.about)
SAVINGS = ("none", "checkpointing", "parts", "both")
CLASSES = 400  # of an evaluation


# ---- one cell, in a process of its own


def measured(cell: Cell, place: str) -> dict[str, float]:
    """What a cell costs. ``PerdureError`` where the model is of a kind that perdure does not load."""
    if cell["method"] not in (*LOOKED_AT, "evaluation"):
        return training(place, cell)
    clip = CLIP.load(place, cell.get("device", "cpu"))
    clip.evaluation_batch = cell["batch"]
    return evaluation(clip, cell) if cell["method"] == "evaluation" else features(clip, cell)


def features(clip: CLIP, cell: Cell) -> dict[str, float]:
    """Seconds for 1,000 images, from those that are looked at."""
    pixels, asked = drawn(cell["images"], clip.size), LOOKED_AT[cell["method"]]
    return looking(clip, cell, lambda count: clip.features(pixels[:count], **asked), 1000)


def evaluation(clip: CLIP, cell: Cell) -> dict[str, float]:
    """Seconds an image among 400 classes, and, apart from it, for their texts, which are embedded once for all images."""
    pixels, names = drawn(cell["images"], clip.size), classes(CLASSES)
    method = launch.build("zero_shot", {})
    method.bind(clip)
    start = now(clip.device)
    clip.class_texts([one.prompts() for one in names])
    texts = now(clip.device) - start
    return {**looking(clip, cell, lambda count: method.answer([Query(pixels[:count], names)]), 1), "texts": texts}


def looking(clip: CLIP, cell: Cell, look: Any, count: int) -> dict[str, float]:
    """Seconds for ``count`` images, from ``look`` at those there are, after one batch."""
    with FlopCounterMode(display=False) as counter:
        look(1)
    look(min(cell["batch"], cell["images"]))
    forget(clip.device)
    start = now(clip.device)
    look(cell["images"])
    seconds = (now(clip.device) - start) / cell["images"] * count
    return costs(seconds, counter.get_total_flops() * count, "fp32", clip.device)


# ---- the table


def cells(options: argparse.Namespace) -> list[Cell]:
    """Every cell that was asked for."""
    out = []
    for model, method in itertools.product(options.models, options.methods):
        base = {"model": model, "method": method, "batch": options.batch, "threads": torch.get_num_threads()}
        base |= {"device": options.device} if options.device != "cpu" else {}
        if method in (*LOOKED_AT, "evaluation"):
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
        time_of |= dict.fromkeys(LOOKED_AT, f"{cost['seconds']:.2f} s for 1,000")
        took = time_of.get(cell["method"], f"{cost['seconds']:.2f} s a step")
        share = f"{cost['gflop'] / cost['seconds'] / cost['peak_gflop_s']:.0%}" if cell["saving"] == "none" else "–"
        saving = cell["saving"] + (f" ({cell['parts']})" if cell.get("parts", 1) > 1 else "")
        lines.append(
            f"| {cell['model']} | {cell['method']} | {cell['precision']} | {cell['batch']} | {saving} | {took} | "
            f"{cost['peak_mb'] / 1000:.2f} GB | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual, native = (*TRAINED, *LOOKED_AT, "evaluation"), precision_of("auto", "cpu") == "bf16"
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vit-b-16"])
    parser.add_argument("--methods", nargs="+", choices=[*ROWS, "evaluation"], default=usual, metavar="METHOD")
    precisions = ("fp32", *HALF)
    parser.add_argument("--precisions", nargs="+", choices=precisions, default=["fp32", "bf16"][: 1 + native])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
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
