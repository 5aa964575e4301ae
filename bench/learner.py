"""A model in use: seconds to learn a folder of 1,000 pictures, to answer one picture, and 1,000 against a bare loop.

    python bench/learner.py [--pictures 1000] [--method ridge_patches] [--repeats 5]

The pictures are the small world's. ``learn`` and ``predict`` of one picture run as commands, each a process of its own.
From the latter's time that of a process is taken which does nothing but import the same modules. The bare loop decodes a batch
in a pool of threads, shows it to the tower, and puts the head on top, with nothing read ahead, named, or written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from perdure import Learner
from perdure.benchmarks import mini
from perdure.data.task import Query
from perdure.engine.home import all_classes
from perdure.launch.learner.answers import BATCH

MODULES = "import sys; from perdure.cli import main; print(*sys.modules)"


def pictures(folder: Path, count: int) -> list[Path]:
    """So many training pictures of the small world, a folder a class."""
    out: list[Path] = []
    for task in mini.multi_domain("I").tasks:
        for pixels, label in zip(task.train.pixels, task.train.labels.tolist(), strict=True):
            if len(out) == count:
                return out
            path = folder / task.classes[label].name / f"{task.name}-{len(out):05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
            out.append(path)
    return out


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "perdure", *words], check=True, capture_output=True)


def imported(home: Path, picture: Path) -> list[str]:
    """The modules that ``perdure predict`` has imported when it is done."""
    with contextlib.redirect_stdout(io.StringIO()):
        Learner(home).predict(picture)
    return [name for name in sys.modules if name.partition(".")[0] not in ("__main__", "__mp_main__")]


def importing(names: list[str]) -> None:
    """A process that imports these modules, those that can be imported so, and ends."""
    text = (
        "import contextlib, importlib\n"
        f"for name in {names!r}:\n"
        "    with contextlib.suppress(Exception): importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-c", text], check=True, capture_output=True)


def bare(learner: Learner, paths: list[Path]) -> Callable[[], None]:
    """What cannot be left out of the answers."""
    ready = learner.loaded()
    classes = all_classes(ready.tasks)

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))

    def loop() -> None:
        with ThreadPoolExecutor() as pool, torch.no_grad():
            for start in range(0, len(paths), BATCH):
                pixels = torch.from_numpy(np.stack(list(pool.map(read, paths[start : start + BATCH])))).permute(
                    0, 3, 1, 2
                )
                query = Query(pixels, classes, features=ready.method.look(pixels))
                ready.method.finalize(query, ready.method.logits(query))

    return loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--method", default="ridge_patches")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, home = Path(scratch) / "pictures", Path(scratch) / "HOME"
        paths = pictures(folder, asked.pictures)
        learned = seconds(lambda: command("learn", str(home), str(folder), "--method", asked.method))
        print(f"perdure learn, {asked.pictures} pictures, {asked.method}: {learned:.1f} s, imports and all")
        names = imported(home, paths[0])
        beyond = [
            seconds(lambda: command("predict", str(home), str(paths[0]))) - seconds(lambda: importing(names))
            for _ in range(asked.repeats + 1)
        ]
        print(f"perdure predict, one picture: {statistics.median(beyond[1:]):.2f} s beyond its imports")
        learner = Learner(home)
        loop = bare(learner, paths)
        pairs = [(seconds(lambda: learner.predict(paths)), seconds(loop)) for _ in range(asked.repeats + 1)][1:]
        share = statistics.median(plain / own for own, plain in pairs)
        own = statistics.median(own for own, _ in pairs)
        print(
            f"Learner.predict, {len(paths)} pictures: {len(paths) / own:.0f} a second, {100 * share:.0f} % of a bare loop"
        )


if __name__ == "__main__":
    main()
