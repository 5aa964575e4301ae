"""What a training step costs: a second task's steps, taken as a run takes them, on pictures without meaning."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gift_step import product
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from perdure import launch
from perdure.benchmarks import mini
from perdure.core.caller import undisturbed
from perdure.core.errors import PerdureError
from perdure.core.precision import HALF
from perdure.data.task import Class, Images, Stream, Task
from perdure.engine.environment import forget_peak_memory, peak_memory_mb
from perdure.engine.settings import Settings, opened
from perdure.engine.teach import Teacher
from perdure.engine.watcher import Watcher
from perdure.methods.base import Method
from perdure.synthesis.store import collect

WARM, PAIRS = 2, 16  # steps that are not timed; pictures in the place of synthetic ones
Cell = dict[str, Any]


def training(place: str, cell: Cell) -> dict[str, float]:
    """The median of a second task's steps, taken as a run takes them. The first is left out, and one in which the arithmetic is
    counted."""
    settings = Settings(
        precision=cell["precision"], device=cell.get("device", "cpu"), threads=cell["threads"], workers=0,
        accumulate=cell["parts"] if cell["saving"] in ("parts", "both") else 1,
        gradient_checkpointing=cell["saving"] in ("checkpointing", "both"),
    )  # fmt: skip
    with undisturbed(), tempfile.TemporaryDirectory() as folder:
        settings.take_effect()
        clip, clock = opened(settings, place), Clock()
        stream = some_tasks(clip.size, cell)
        teacher = Teacher(made(cell), 0, settings, Watcher())
        teacher.stepped = clock.step  # of the towers' training, not of what a method trains beside
        keep_pairs(Path(folder) / "pairs", clip.size)
        teacher.method.bind(clip, stream.context(0, Path(folder)))
        teacher.method.lend(teacher.train)
        for number, task in enumerate(stream.tasks, 1):
            clock.begin(clip.device)
            teacher.learn(task, number)
        if not len(clock.stamps) > WARM:
            raise PerdureError(f"{cell['method']} trains no tower: what it costs are features, and little beside.")
        seconds = statistics.median(b - a for a, b in itertools.pairwise(clock.stamps[WARM - 1 :]))
        return costs(seconds, clock.counter.get_total_flops(), cell["precision"], clip.device)


class Clock:
    """The time after each step of a task, and the arithmetic of its second."""

    def begin(self, device: torch.device) -> None:
        forget(device)
        self.device, self.counter, self.stamps = device, FlopCounterMode(display=False), list[float]()

    def step(self, step: int, total: int, losses: Mapping[str, Tensor]) -> None:
        if len(self.stamps) == 1:
            self.counter.__exit__(None, None, None)
        self.stamps.append(now(self.device))
        if len(self.stamps) == 1:
            self.counter.__enter__()


def some_tasks(side: int, cell: Cell) -> Stream:
    """Two tasks of pictures without meaning."""
    count, own = max(cell["batch"], 4), classes(2 * cell["classes"])
    images = Images(drawn(count, side), torch.arange(count) // 2 % cell["classes"])
    halves = own[: cell["classes"]], own[cell["classes"] :]
    tasks = tuple(Task(f"task {k}", half, images, images, k) for k, half in enumerate(halves))
    world = Images(images.pixels, images.labels, tuple(f"a photo of a thing {k // 2}." for k in range(count)))
    return Stream(
        "bench", tasks, None, "", "bench", generator=str(mini.GENERATOR), vocabulary=own, drawings=lambda: world
    )


def keep_pairs(folder: Path, side: int) -> None:
    """Pictures in the place of synthetic ones, each with a text of its own."""
    collect(folder, drawn(PAIRS, side), [f"a photo of a thing {k}." for k in range(PAIRS)], "bench")


def made(cell: Cell) -> Method:
    """The method with as many steps as are timed; of its other options what a run would have, or what takes little beside."""
    about = launch.method_options(launch.method_entry(cell["method"]))
    values, batch = {key: option.default for key, (_, option) in about.items()}, cell["batch"]
    asked = {
        "iterations": cell["steps"] + WARM, "warmup": 0, "epochs": 0, "lr": 1e-6, "batch_size": batch, "synthetic": PAIRS,
        "synthetic_batch": batch, "reference_batch": batch, "most_epochs": 1, "selector_steps": 1, "reference_steps": 1,
        "align_draws": 1,
        "meta_source": "drawings", "meta_steps": 2, "meta_batch": 1,
    }  # fmt: skip
    return launch.build(cell["method"], {**values, **{key: one for key, one in asked.items() if key in values}})


def drawn(count: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def classes(count: int) -> tuple[Class, ...]:
    return tuple(Class(f"class {k}", ("a photo of a {}, of some kind.",)) for k in range(count))


def now(device: torch.device) -> float:
    """The time when all that was begun on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def forget(device: torch.device) -> None:
    """Measure the peak anew."""
    forget_peak_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def costs(seconds: float, work: float, precision: str, device: torch.device) -> dict[str, float]:
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else peak_memory_mb()  # before the product
    speed = device_product(precision) if cuda else product(precision)
    return {"seconds": seconds, "peak_mb": peak, "gflop": work / 1e9, "peak_gflop_s": speed}


def device_product(precision: str) -> float:
    """GFLOP/s of an 8192³ product on an accelerator."""
    a = torch.randn(8192, 8192, device="cuda", dtype=HALF.get(precision, torch.float32))
    best = float("inf")
    for _ in range(8):
        start = now(a.device)
        a @ a
        best = min(best, now(a.device) - start)
    return 2 * 8192**3 / best / 1e9
