"""Every file operation of a run fails once, and once is the last before a kill: what a resumed run makes of it.

    python proofs/faults.py [--method finetune] [--every 1] [key=value …]

A short run on the small world, saved inside its tasks after every other step, is done undisturbed. Then, for each operation on
files in its folder (open for writing, write, fsync, rename, mkdir, unlink, rmdir), it is done again with that operation refused
(a full disk), and again with the process ended there: from then on no operation happens, so that nothing is tidied up. After
each the run is resumed, and must end with the same bits. Prints a table of the operations by kind; ends with 1 where bits
differ.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from safetensors.torch import load_file

import perdure
from perdure import launch
from perdure.engine.watcher import Watcher

Mode = Literal["fails", "ends"]
SHORT: dict[str, Any] = {
    "tasks": 2, "images": 6, "iterations": 3, "warmup": 0, "batch_size": 3, "precision": "fp32", "threads": 1,
    "save_every": "2",
}  # fmt: skip
CHANGING = ("seconds", "seconds_by_task", "peak_memory_mb", "environment", "config")


class Killed(BaseException):
    """In the place of a kill: nothing catches it."""


class Faults:
    """Counts the operations on files below ``folder``; number ``at`` (from 1) fails, or is where the process ends."""

    def __init__(self, folder: Path, at: int = 0, mode: Mode = "fails"):
        self.folder, self.at, self.mode = str(folder), at, mode
        self.seen: list[str] = []

    def meet(self, kind: str, path: Any) -> None:
        """An operation is about to happen."""
        if not isinstance(path, int) and not os.fspath(path).startswith(self.folder):
            return
        self.seen.append(kind)
        if self.at and len(self.seen) >= self.at and self.mode == "ends":
            raise Killed
        if self.at and len(self.seen) == self.at:
            raise OSError(errno.ENOSPC, "No space left on device", None if isinstance(path, int) else os.fspath(path))

    @contextlib.contextmanager
    def met(self) -> Iterator[None]:
        """Meanwhile, the operations are counted."""
        with contextlib.ExitStack() as stack:
            for kind in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
                stack.enter_context(mock.patch.object(os, kind, self.wrapped(kind, getattr(os, kind))))
            stack.enter_context(mock.patch.object(builtins, "open", self.opened(builtins.open)))
            yield

    def wrapped(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            inside = more.get("dir_fd") is None  # of a whole tree that is removed
            self.meet(kind, path if inside else Path(self.folder) / os.fspath(path))
            return real(path, *rest, **more)

        return call

    def opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if not set(mode) & set("wax") or isinstance(path, int) or Path(path).name == ".lock":
                return real(path, mode, *rest, **more)
            self.meet("open", path)
            file = real(path, mode, *rest, **more)
            if os.fspath(path).startswith(self.folder):
                return Writing(file, self, path)
            return file

        return call


class Writing:
    """A file whose writes are counted; a write that fails has written a part."""

    def __init__(self, file: Any, faults: Faults, path: Any):
        self.file, self.faults, self.path = file, faults, path

    def write(self, data: Any) -> int:
        try:
            self.faults.meet("write", self.path)
        except BaseException:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            raise
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()


class Silent(Watcher):
    def warn(self, text: str) -> None:
        """What is refused is said; here it is what is asked for."""


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on faults: figures, losses, and every tensor of the tasks."""
    metrics = json.loads((folder / "metrics.json").read_text())
    found: dict[str, Any] = {key: value for key, value in metrics.items() if key not in CHANGING}
    for file in sorted(folder.glob("task_*/*.safetensors")):
        found[str(file.relative_to(folder))] = load_file(file)
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    tensors = [key for key in a if key.endswith(".safetensors")]
    alike = all(
        a[key].keys() == b[key].keys() and all(torch.equal(a[key][n], b[key][n]) for n in a[key]) for key in tensors
    )
    return alike and all(a[key] == b[key] for key in a if key not in tensors)


def done(method: str, folder: Path, values: dict[str, Any], faults: Faults) -> str:
    """A run from its beginning, under ``faults``: what became of it."""
    launch.begin(method, "mini-mtil", folder, assignments=values)
    try:
        with faults.met():
            perdure.resume(folder, Silent())
    except OSError:
        return "refused"
    except Killed:
        return "ended"
    return "went on"


def tried(
    method: str, folder: Path, values: dict[str, Any], faults: Faults, expected: dict[str, Any]
) -> tuple[str, bool]:
    """A run under ``faults``, then resumed: what became of it, and whether its bits are the expected ones."""
    shutil.rmtree(folder, ignore_errors=True)
    became = done(method, folder, values, faults)
    perdure.resume(folder, Silent())
    left = [p.name for p in folder.iterdir() if p.name.startswith((".task", "begun_", "damaged_"))]
    return became, same(outcome(folder), expected) and not left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="finetune")
    parser.add_argument("--every", type=int, default=1, help="only each so-many-th operation")
    parser.add_argument("values", nargs="*", metavar="key=value")
    asked = parser.parse_args()
    values = {**SHORT, **dict(pair.split("=", 1) for pair in asked.values)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        whole = Faults(folder)
        done(asked.method, folder, values, whole)
        expected, table, wrong = outcome(folder), Counter[tuple[str, str, str]](), 0
        for number in range(1, len(whole.seen) + 1, asked.every):
            for mode in ("fails", "ends"):
                became, right = tried(asked.method, folder, values, Faults(folder, number, mode), expected)
                table[whole.seen[number - 1], mode, became] += 1
                wrong += not right
                if not right:
                    print(f"operation {number}, {whole.seen[number - 1]}, {mode}: other bits", flush=True)
    print(f"{len(whole.seen)} operations on files in a run of {asked.method} over {values['tasks']} tasks")
    print(f"{'operation':10} {'it':6} {'the run':8} {'times':>5}")
    for (kind, mode, became), count in sorted(table.items()):
        print(f"{kind:10} {mode:6} {became:8} {count:5}")
    print("resumed with the same bits after each" if not wrong else f"OTHER BITS after {wrong}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
