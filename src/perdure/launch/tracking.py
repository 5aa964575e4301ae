"""A run as trackers hear it: losses, rates and speed of its steps, figures and costs of its rows."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.state import read_json, write_json
from perdure.engine.watcher import Watcher
from perdure.launch.trackers import TRACKERS, Begun, Record, Tracker
from perdure.training.record import LOOK
from perdure.training.schedule import Schedule

WHERE = "tracked.json"  # the run's name for trackers, and the steps that had been taken at each row
ENDS = ("transfer", "average", "last", "forgetting", "backward_transfer", "incremental_average", "incremental_last")


@contextlib.contextmanager
def tracking(
    folder: Path, config: Mapping[str, Any], kinds: Sequence[type[Tracker]], warn: Callable[[str], None]
) -> Iterator[Watcher]:
    """A watcher that hands what it hears of the run in ``folder`` to trackers; silent where there are none. ``PerdureError``
    before the work where one cannot be begun; one that fails later is let go of, and ``warn`` hears of it: it costs no run."""
    if not kinds:
        yield Silent()
        return
    ears = Tracking(folder, config, kinds, warn)
    try:
        yield ears
        ears.tell()
    finally:
        ears.close()


class Silent(Watcher):
    """Says nothing at all: the one beside it warns."""

    def warn(self, text: str) -> None:
        pass


class Tracking(Silent):
    """Makes records of what it hears. Losses are read from the device ``LOOK`` steps at a time: each look waits for it."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], kinds: Sequence[type[Tracker]], say: Callable[[str], None]
    ):
        self.folder, self.config, self.kinds, self.say = folder, config, kinds, say
        self.open: list[Tracker] = []
        self.rows, self.at, self.number, self.task = 0, 0, 0, "before"
        self.reached: list[int] = []  # ``at`` of each row
        self.waiting: list[tuple[int, dict[str, Tensor]]] = []  # steps whose losses were not read yet
        self.plan, self.phase, self.since = Schedule(steps=0, lr=0, warmup=0, batch_size=0), "", 0.0

    def begins(self, tasks: list[str], rows: list[list[float]], probe: list[float]) -> None:
        self.tasks, self.rows = tasks, len(rows)
        try:
            noted = read_json(self.folder / WHERE) if rows else {}
        except DamagedFile:  # it was not tracked before
            noted = {}
        self.identity = noted.get("id") or uuid.uuid4().hex[:12]
        reached = noted.get("at", [])[: self.rows]
        self.reached = reached + [reached[-1] if reached else 0] * (self.rows - len(reached))
        self.at = self.reached[-1] if rows else 0
        if len(rows) <= len(tasks):  # else all is done
            self.begin()

    def begin(self) -> None:
        """Open all, before anything is computed."""
        keys = ("method", "stream", "seed", "options", "settings", "environment")
        begun = Begun(self.folder, {key: self.config[key] for key in keys}, self.identity, self.rows, self.at)
        for kind in self.kinds:
            tracker = kind(begun)
            try:
                tracker.open()
            except Exception as error:  # another library's, of whatever kind
                raise PerdureError(f"The tracker {named(kind)} cannot be begun: {reason(error)}") from error
            self.open.append(tracker)

    def learns(self, task: str, number: int) -> None:
        self.task, self.number = task, number

    def trains(self, name: str, schedule: Schedule) -> None:
        self.tell()
        self.plan, self.phase, self.since = schedule, "" if name == self.task else f"{name}/", 0.0

    def took_up(self, record: Sequence[Mapping[str, Tensor]]) -> None:
        self.waiting += [(step, dict(losses)) for step, losses in enumerate(record, 1)]
        self.tell()

    def step(self, step: int, total: int, losses: Mapping[str, Tensor]) -> None:
        self.waiting.append((step, dict(losses)))
        if len(self.waiting) == LOOK or not self.since:
            self.tell()

    def evaluates(self) -> None:
        self.tell()

    def row(self, accuracy: list[float], probe: float | None) -> None:
        self.tell()
        self.write(Record("row", self.number, self.task, self.at, self.figures(accuracy, probe)))
        self.reached.append(self.at)
        write_json(self.folder / WHERE, {"id": self.identity, "at": self.reached})

    def tell(self) -> None:
        """Write down the steps that wait. The first of a training is told by itself: what is made for it takes its time."""
        if not self.waiting:
            return
        names = list(dict.fromkeys(name for _, losses in self.waiting for name in losses))
        values = {n: torch.stack([ls[n] for _, ls in self.waiting if n in ls]).tolist() for n in names}
        now = time.perf_counter()
        speed = len(self.waiting) * self.plan.batch_size / (now - self.since) if self.since else None
        self.since = now
        for step, losses in self.waiting:
            self.at += 1
            figures = {f"{self.phase}loss/{name}": values[name].pop(0) for name in losses}
            figures[f"{self.phase}lr"] = self.plan.rate(step - 1)
            if speed and step == self.waiting[-1][0]:
                figures[f"{self.phase}images_per_second"] = round(speed, 2)
            self.write(Record("step", self.number, self.task, self.at, figures, step))
        self.waiting.clear()

    def figures(self, accuracy: list[float], probe: float | None) -> dict[str, float]:
        """What is known after a task: the row, and of ``metrics.json``, which lies there before a row is told, its costs."""
        found = read_json(self.folder / "metrics.json")
        out = {f"accuracy/{name}": value for name, value in zip(self.tasks, accuracy, strict=True)}
        out["accuracy/mean"] = sum(accuracy) / len(accuracy)
        if probe is not None:
            out["accuracy/probe"] = probe
        out |= {f"gap/{key}": value for key, value in (found["gap"][-1] or {}).items()}
        seconds = found["seconds_by_task"][-1]
        out |= {f"seconds/{key}": seconds[key] for key in ("train", "evaluate")}
        out["peak_memory_mb"] = found["peak_memory_mb"]
        if found["finished"]:
            out |= {f"figures/{key}": found[key] for key in ENDS if found.get(key) is not None}
        return out

    def write(self, record: Record) -> None:
        """Hand a record to all."""
        for tracker in list(self.open):
            self.tried(tracker, partial(tracker.write, record))

    def close(self) -> None:
        """No more will come."""
        for tracker in list(self.open):
            self.tried(tracker, tracker.close)

    def tried(self, tracker: Tracker, what: Callable[[], None]) -> None:
        """Do it; a tracker that fails is let go of."""
        try:
            what()
        except Exception as error:  # another library's, of whatever kind
            self.open.remove(tracker)
            self.say(f"The tracker {named(type(tracker))} failed ({reason(error)}): it hears no more. The run goes on.")


def named(kind: type[Tracker]) -> str:
    """What a tracker is asked for by."""
    return next(entry.name for entry in TRACKERS if entry.value is kind)


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
