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
