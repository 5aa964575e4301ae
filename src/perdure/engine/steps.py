"""What a task that is being learned leaves in the run's folder until it is done: ``begun_task_03_food/``.

Each of its trainings, the task's own and the phases that its method is lent, is kept at the last step that was saved: a file
of tensors, and ``state.json``, which names it with its checksum. That is replaced last, so that a save is there whole or not at
all; then the file of the save before it goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from perdure.core import processes, stopping
from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.state import inside, write_json
from perdure.core.tensors import read_tensors, write_tensors
from perdure.data.context import silent
from perdure.engine.checkpoint import free_name, read_record, seal
from perdure.training.progress import Keeper, Place, Saver, Snapshot

BEGUN, INSIDE = "begun_", "//"
WORTH = 30.0  # seconds of training that are kept at its end, however seldom it is saved
UNITS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Every:
    """How often a task is saved inside: after so many steps, or seconds; 0 and 0: only when the process is asked to stop."""

    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def read(cls, text: str) -> Every:
        """``500`` (steps), ``10min``, ``30s``, ``2h`` or ``never``. ``ValueError`` for anything else."""
        if text == "never":
            return cls()
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)?", text)
        if not found or float(found[1]) == 0 or (not found[2] and "." in found[1]):
            raise ValueError("give steps as 500, a time as 10min, 30s or 2h, or never")
        return cls(seconds=float(found[1]) * UNITS[found[2]]) if found[2] else cls(steps=int(found[1]))

    @classmethod
    def checked(cls, text: str) -> str:
        """``text``, where ``read`` can read it."""
        cls.read(text)
        return text


class Steps:
    """The trainings of one task, saved as they go; those of an earlier process are gone on with. Of processes that share a run
    the main one writes, and all read.

    ``ours``: the identities that the run may have; ``after``: what the task begins with, a digest: a save that began with
    anything else is of no use. ``PerdureError`` where the run's configuration is another than the save's.
    """

    def __init__(
        self, run: Path, name: str, ours: Sequence[str], after: str, every: Every, warn: Callable[[str], None]
    ):  # fmt: skip
        self.folder, self.name, self.ours, self.after = run / f"{BEGUN}{name}", name, ours, after
        self.every, self.warn = every, warn
        self.told = 0  # the signal that has asked all processes to stop
        self.count, self.spent = 0, 0.0  # trainings so far; seconds that the task had taken before this process
        self.entries: dict[str, dict[str, Any]] = {}  # as the file on the disk has them, by the training's number
        self.read()
        self.began = self.saved = time.monotonic()  # no clock that can be set

    def training(self, name: str, told: Callable[[Place], None] = silent) -> Saver:
        """Who keeps the next training of the task; ``told`` hears of what an earlier process had done of it."""
        key, self.count = str(self.count), self.count + 1
        found = self.snapshot(key, name)

        def due(place: Place) -> bool:
            self.told = stopping.agreed()
            if self.told:
                return True
            if place.last:  # a stop may come while it is fused, or evaluated
                return key in self.entries or self.costly()
            if self.every.steps:
                return place.step % self.every.steps == 0
            return bool(self.every.seconds) and time.monotonic() - self.saved >= self.every.seconds

        return Keeper(found, due, lambda snapshot: self.keep(key, name, snapshot), told)

    def costly(self) -> bool:
        """Whether much was trained since the last save, of a task that is to be saved at all."""
        return (self.every.steps > 0 or self.every.seconds > 0) and time.monotonic() - self.saved >= WORTH

    def keep(self, key: str, name: str, snapshot: Snapshot) -> None:
        """Save; where the disk refuses, the training goes on. A process that was asked to stop does so now."""
        said = f"step {snapshot.step} of {name}"
        try:
            if processes.main():
                with stopping.held():
                    self.write(key, name, snapshot)
        except OSError as error:
            reason = error.strerror or error
            self.warn(f"The training could not be saved at {said} ({reason}: {self.folder}). It goes on.")
            said = ""
        self.saved = time.monotonic()
        if number := self.told or (stopping.asked() if processes.count() == 1 else 0):
            if self.told:
                processes.barrier()  # a launcher ends all as soon as one has ended, in the midst of a save too
            raise stopping.Stopped(number, said, bool(self.told))

    def write(self, key: str, name: str, snapshot: Snapshot) -> None:
        """Write a snapshot in the place of the training's last one."""
        self.folder.mkdir(exist_ok=True)
        path = free_name(self.folder / f"training_{key}_step_{snapshot.step:06d}.safetensors")
        tensors = {f"{file}{INSIDE}{n}": t for file, own in snapshot.files.items() for n, t in own.items()}
        try:
            sha256, size = write_tensors(path, tensors)
            values = json.loads(json.dumps(snapshot.values))  # as they are now: a later save writes them again
            about = {"name": name, "step": snapshot.step, "last": snapshot.last, "values": values}
            entries = {**self.entries, key: {**about, "path": path.name, "sha256": sha256, "bytes": size}}
            seconds = round(self.spent + time.monotonic() - self.began, 3)
            record = {"config": self.ours[0], "after": self.after, "seconds": seconds, "trainings": entries}
            write_json(self.folder / "state.json", {**record, "sha256": seal(record)})
            self.entries = entries
        except OSError:
            with contextlib.suppress(DamagedFile):  # it may have come as far as that
                self.entries = read_record(self.folder)["trainings"]
            raise
        finally:
            self.tidy()

    def tidy(self) -> None:
        """Remove what no training is kept in; what cannot be removed stays until the task is done."""
        named = {"state.json", *(entry["path"] for entry in self.entries.values())}
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.iterdir()):
                if path.name not in named:
                    path.unlink()

    # ---- going on

    def read(self) -> None:
        """Find what an earlier process has left; set it aside where it is damaged."""
        if not (self.folder / "state.json").exists():
            self.done()  # stopped before its first save was whole
            return
        try:
            record = read_record(self.folder)
            if record["config"] not in self.ours:
                raise PerdureError(
                    f"{self.folder.parent}/config.json was changed after {self.folder.name} was saved. Start a new run."
                )
            if record["after"] != self.after:  # the task before it was learned anew, or it is taught other pictures
                self.warn(
                    f"What was saved of {self.name} began with something else: it is left out, and training begins anew."
                )
                self.done()
                return
            self.entries, self.spent = record["trainings"], record["seconds"]
        except DamagedFile as error:
            if not processes.main():
                return
            aside = free_name(self.folder.with_name(f"damaged_{self.folder.name}"))
            os.replace(self.folder, aside)
            self.warn(f"{error} Set aside as {aside.name}. The task begins anew.")

    def snapshot(self, key: str, name: str) -> Snapshot | None:
        """A training as it was saved; None where it was not, or the file is damaged."""
        entry, files = self.entries.get(key), dict[str, dict[str, Tensor]]()
        if entry is None or entry["name"] != name:
            return None
        try:
            tensors = read_tensors(inside(self.folder, entry["path"]), entry["sha256"])
        except DamagedFile as error:
            del self.entries[key]
            self.warn(f"{error} What was trained there, {name}, begins anew.")
            return None
        for full, tensor in tensors.items():
            file, _, own = full.partition(INSIDE)
            files.setdefault(file, {})[own] = tensor
        return Snapshot(entry["step"], entry["last"], files, entry["values"])

    def done(self) -> None:
        """The task is safe: nothing of this is needed any more."""
        if not processes.main():
            return
        shutil.rmtree(self.folder, ignore_errors=True)


def forget(run: Path, names: Sequence[str]) -> None:
    """Remove what a kill has left of tasks that are done."""
    for name in names:
        shutil.rmtree(run / f"{BEGUN}{name}", ignore_errors=True)
