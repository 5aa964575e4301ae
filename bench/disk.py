"""What a run at real size leaves on the disk, and what its saves take of memory and time.

    python bench/disk.py [--model vit-b-16] [--tasks 11] [--methods finetune magmax condu individual]

A CLIP of a published shape with random weights. A task is "learned" by moving every weight a little; what the method then makes
of it, and how it is kept, is the run's own (``fuse``, ``save_task``, ``keep=last``). Each method in a process of its own.
Printed: bytes on the disk when all tasks are done; the most that a save took of memory above what was held before it, in parts
of the model; the peak of a fusion, after the second task and after the last; seconds of a save, and of one inside a task
(parameters and Adam's two moments).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_models import checkpoint

from perdure import launch
from perdure.core.seeding import reseed
from perdure.data.task import Class, Context, Images, Task
from perdure.engine.checkpoint import folder_name, let_go, save_task
from perdure.engine.environment import forget_peak_memory, peak_memory_mb
from perdure.engine.steps import Every, Steps
from perdure.methods.base import Method
from perdure.models.clip import CLIP
from perdure.training.schedule import Schedule

MODELS = Path(__file__).parents[1] / "build" / "models"


def held_mb() -> float:
    """What the process holds now, in MB."""
    forget_peak_memory()
    return peak_memory_mb()


def tasks(count: int) -> list[Task]:
    draw = torch.Generator().manual_seed(0)
    images = Images(torch.randint(0, 256, (2, 3, 224, 224), generator=draw, dtype=torch.uint8), torch.tensor([0, 1]))
    classes = [tuple(Class(f"{k} {kind}", ("a photo of a {}.",)) for kind in ("kind", "thing")) for k in range(count)]
    return [Task(f"task {k}", own, images, images, k) for k, own in enumerate(classes)]


def learn(method: Method, task: Task) -> float:
    """Move the weights, and let the method make of them what it does; the peak of that above what was held, in MB."""
    method.start(task)
    with torch.no_grad():
        for p in method.parameters().values():
            p.add_(torch.randn_like(p), alpha=1e-4)
    method.clip.trained(f"trained {task.name}", method.parameters().values())
    before = held_mb()
    method.fuse(task)
    return peak_memory_mb() - before


def inside(method: Method, folder: Path) -> tuple[float, float, int]:
    """A save inside a task: seconds, MB above what was held, bytes."""
    parameters = method.parameters()
    optimizer = Schedule(1, 0.0, 0, 1).optimizer_of(parameters)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    steps = Steps(folder, "inside", ("bench",), "", Every(steps=1), print)
    saver = steps.training("bench")
    saver.begin(method)
    place = saver.take_up(parameters, optimizer)
    place.step = 1
    before, start = held_mb(), time.perf_counter()
    saver.stepped(place)
    found = time.perf_counter() - start, peak_memory_mb() - before, on_disk(folder)
    steps.done()
    return found


def on_disk(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def measure(name: str, model: str, count: int, folder: Path) -> dict[str, Any]:
    clip = CLIP.load(str(checkpoint(model, MODELS)))
    size = sum(t.nbytes for t in clip.plain().values())
    values = {key: option.default for key, (_, option) in launch.method_options(launch.method_entry(name)).items()}
    reseed(0, "bind")
    method = launch.build(name, values)
    method.bind(clip, Context(tasks=tuple(tasks(count))))
    clip.pretrained  # noqa: B018 (a run has it too)
    out: dict[str, Any] = {"model": size / 1e6, "fuse": [], "save": [], "seconds": []}
    seconds, peak, bytes_inside = inside(method, folder / "inside")
    out["inside"] = {"seconds": seconds, "peak": peak, "bytes": bytes_inside}
    names, kept, run = list[str](), dict[str, Any](), folder / "run"
    run.mkdir()
    for number, task in enumerate(tasks(count), 1):
        out["fuse"].append(learn(method, task))
        names.append(folder_name(number, task.name))
        hits, record = {task.name: torch.zeros(2, dtype=torch.uint8)}, {"task": task.name, "config": "bench"}
        before, start = held_mb(), time.perf_counter()
        written = save_task(run, names[-1], method, hits, record, kept)
        out["seconds"].append(time.perf_counter() - start)
        out["save"].append(peak_memory_mb() - before)
        let_go(run, names[:-1], written)
        kept = written["files"]
    out["held"] = held_mb()
    out["disk"] = on_disk(run)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-b-16")
    parser.add_argument("--tasks", type=int, default=11)
    parser.add_argument("--methods", nargs="+", default=["finetune", "magmax", "condu"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one[0], asked.model, asked.tasks, Path(asked.one[1]))))
        return
    print(f"{asked.model}, {asked.tasks} tasks, keep=last, {torch.get_num_threads()} threads")
    print(
        f"{'method':11} {'disk, GB':>8} {'save: s':>8} {'peak/model':>10} {'fuse: MB, 2nd':>13} {'last':>6} {'held, MB':>8}"
    )
    for name in asked.methods:
        with tempfile.TemporaryDirectory(dir=Path(__file__).parents[1] / "build") as folder:
            (Path(folder) / "inside").mkdir()
            command = [
                sys.executable,
                __file__,
                "--one",
                name,
                folder,
                "--model",
                asked.model,
                "--tasks",
                str(asked.tasks),
            ]
            found = json.loads(subprocess.check_output(command))
        second = found["fuse"][min(1, len(found["fuse"]) - 1)]
        print(
            f"{name:11} {found['disk'] / 1e9:8.2f} {max(found['seconds']):8.1f} {max(found['save']) / found['model']:10.3f} "
            f"{second:13.0f} {found['fuse'][-1]:6.0f} {found['held']:8.0f}"
        )
        about = found["inside"]
        told = (
            f"{about['bytes'] / 1e9:.2f} GB, {about['seconds']:.1f} s, peak/model {about['peak'] / found['model']:.3f}"
        )
        print(f"{'':11} a save inside a task: {told}", flush=True)


if __name__ == "__main__":
    main()
