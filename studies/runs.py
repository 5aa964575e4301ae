"""What the studies share: runs of the command line, resumed or left alone when they are finished, and cells of tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from perdure import launch

# The short protocol, of tables with many rows: four tasks, 200 images a side, 40 steps of 32 images a task, fp32.
SHORT: dict[str, Any] = {"tasks": 4, "images": 200, "precision": "fp32", "threads": 1}
STEPS = {"iterations": 40, "warmup": 4, "batch_size": 32}


def short(method: str) -> dict[str, Any]:
    """The short protocol's settings for a method. One that counts epochs, or none, keeps its own, over fewer images."""
    options = launch.configure(method, "mini-mtil", 0, {}, {})[0]["options"]
    by_steps = options.get("iterations") and not options.get("epochs")
    return {**SHORT, **{key: value for key, value in STEPS.items() if by_steps and options.get(key)}}


def command(folder: Path, method: str, stream: str, seed: int, values: Mapping[str, Any]) -> list[str]:
    """The command of one run, or of going on with it; nothing where it is finished."""
    if launch.is_finished(folder):
        return []
    start = [sys.executable, "-m", "perdure.cli"]
    if (folder / "config.json").exists():
        return [*start, "resume", str(folder)]
    words = [f"{k}={v}" for k, v in values.items()]
    return [*start, "run", "--method", method, "--stream", stream, "--seed", str(seed), "--out", str(folder), *words]


def do(commands: Sequence[list[str]], jobs: int) -> None:
    """Run commands, ``jobs`` at a time; stop at the first that fails."""
    wanted = [words for words in commands if words]
    with ThreadPoolExecutor(jobs) as pool:
        for done, words in zip(
            pool.map(lambda w: subprocess.run(w, capture_output=True, text=True), wanted), wanted, strict=True
        ):
            if done.returncode:
                raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
            print("done:", " ".join(words[3:]), flush=True)


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; of one value, the value."""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")
