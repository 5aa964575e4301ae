"""Pictures per second of perdure's loader against a bare pool of threads that decode alike; what a training step waits for.

    python bench/loader.py [--pictures 512] [--batch 64] [--batches 16] [--workers 4] [--repeats 3] [--steps 8]

JPEGs of 500×375, made here, become batches of 224×224. The bare pool opens, crops and resizes the same pictures by the same
boxes with Pillow, a picture a job, and makes no batches: what threads could do at most. ``tar`` reads the same pictures from a
plain tar; ``evaluation`` resizes and cuts out the centre, against nothing. The two of a pair are timed in turn, A B A B …; the
ratio is the median over the pairs. Then a vision tower of the size of ViT-B/16, untrained, takes steps on batches that are
read ahead: the share of a step in which it waits for one. ``--steps 0`` leaves that out.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from perdure.core.precision import precision_of
from perdure.data.files import Files
from perdure.data.places import index
from perdure.data.task import Class, Images, Task
from perdure.data.transforms import crop_box, some_numbers
from perdure.training.fit import drawn
from perdure.training.schedule import Schedule

SIZE, SIDE = (500, 375), 224


def make(folder: Path, count: int) -> list[Path]:
    """Pictures with as much detail as photographs have: waves of all lengths and a little noise."""
    draw, (wide, tall) = np.random.default_rng(0), SIZE
    paths = [folder / f"{k:05d}.jpg" for k in range(count)]
    for path in paths:
        coarse = [Image.fromarray(draw.integers(0, 256, (tall // n, wide // n, 3), np.uint8)) for n in (60, 20, 6)]
        smooth = np.mean([np.asarray(one.resize(SIZE, Image.Resampling.BICUBIC), np.float32) for one in coarse], axis=0)
        noisy = smooth + draw.normal(0, 4, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def packed(paths: list[Path], archive: Path) -> Files:
    """The same pictures in a plain tar."""
    with tarfile.open(archive, "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    return Files(tuple(index(archive)), SIDE)


def task_of(files: Files) -> Task:
    labels = torch.arange(len(files)) % 10
    images = Images(files, labels)
    return Task("bench", tuple(Class(f"class {k}", ("{}",)) for k in range(10)), images, images)


def bare(paths: list[Path], count: int, workers: int) -> None:
    """Decode, crop and resize ``count`` pictures, a job each."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(paths), (count,), generator=generator).tolist()
    boxes = [crop_box(SIZE, numbers) for numbers in some_numbers(count, generator).unbind(2)]

    def one(job: tuple[int, tuple[int, int, int, int]]) -> Image.Image:
        with Image.open(paths[job[0]]) as picture:
            return picture.convert("RGB").crop(job[1]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(one, zip(order, boxes, strict=True)):
            pass


def loaded(task: Task, batch: int, batches: int, workers: int) -> float:
    """Seconds that so many training batches take on the way, as ``fit`` draws them: as many are read ahead when the clock
    stops as when it starts."""
    plan, generator = Schedule(batches, 0.1, 0, batch), torch.Generator().manual_seed(0)
    with contextlib.closing(drawn(task, plan, generator, SIDE, workers)) as draws:
        for _ in range(2 * workers):
            next(draws)
        return seconds(lambda: [next(draws) for _ in range(batches)])


def evaluated(files: Files, batch: int) -> None:
    for _ in files.split(batch):
        pass


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def waiting(task: Task, batch: int, steps: int, workers: int) -> tuple[float, float]:
    """Milliseconds of a training step, and of it those in which it waits for its batch: medians."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower = CLIPVisionModel(CLIPVisionConfig(patch_size=16, image_size=SIDE)).to(device).train()
    head = torch.nn.Linear(tower.config.hidden_size, 10, device=device)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-5)
    bf16 = precision_of("auto", device.type) == "bf16"
    plan, took, waited = Schedule(steps + 1, 0.1, 0, batch), list[float](), list[float]()
    with contextlib.closing(drawn(task, plan, torch.Generator().manual_seed(0), SIDE, workers)) as draws:
        for _ in range(steps + 1):
            start = time.perf_counter()
            given = next(draws)
            waited.append(time.perf_counter() - start)
            images, labels = given.images.to(device), given.labels.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = torch.nn.functional.cross_entropy(head(tower(pixel_values=images).pooler_output).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # until the device is done
            took.append(time.perf_counter() - start)
    return statistics.median(took[1:]) * 1e3, statistics.median(waited[1:]) * 1e3  # the first step warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("pictures", 512),
        ("batch", 64),
        ("batches", 16),
        ("workers", 4),
        ("repeats", 3),
        ("steps", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    if asked.pictures % asked.batch:
        parser.error("--pictures must be a multiple of --batch: every batch counts alike.")
    with tempfile.TemporaryDirectory() as folder:
        paths = make(Path(folder), asked.pictures)
        files, tar = Files(tuple(paths), SIDE), packed(paths, Path(folder) / "all.tar")
        count = asked.batch * asked.batches
        jobs: dict[str, tuple[int, Callable[[], float]]] = {
            "bare pool": (count, lambda: seconds(lambda: bare(paths, count, asked.workers))),
            "loader": (count, lambda: loaded(task_of(files), asked.batch, asked.batches, asked.workers)),
            "loader, tar": (count, lambda: loaded(task_of(tar), asked.batch, asked.batches, asked.workers)),
            "evaluation": (asked.pictures, lambda: seconds(lambda: evaluated(files, asked.batch))),
        }
        rates: dict[str, list[float]] = {name: [] for name in jobs}
        for repeat in range(asked.repeats + 1):
            for name, (images, job) in jobs.items():
                took = job()
                if repeat:  # the first round warms up
                    rates[name].append(images / took)
        for name, found in rates.items():
            ratio = statistics.median(a / b for a, b in zip(found, rates["bare pool"], strict=True))
            print(f"{name:12s} {statistics.median(found):7.0f} images/s, {100 * ratio:4.0f} % of the bare pool")
        print(f"({asked.workers} threads; evaluation reads with one a core, median of {asked.repeats} pairs)")
        if asked.steps:
            step, wait = waiting(task_of(files), asked.batch, asked.steps, asked.workers)
            where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
            print(
                f"a step of ViT-B/16, batch {asked.batch}, on {where}: {step:.0f} ms, {100 * wait / step:.1f} % waiting"
            )


if __name__ == "__main__":
    main()
