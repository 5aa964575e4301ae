"""Who hears how a run goes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from torch import Tensor

from perdure.training.schedule import Schedule


class Watcher:
    """Hears how a run goes; the command line's draws it. The default is silent."""

    def begins(self, tasks: list[str], rows: list[list[float]], probe: list[float]) -> None:
        """A run begins or goes on, with the rows it has."""

    def learns(self, task: str, number: int) -> None:
        """Task ``number`` (1 … T) is being learned; 0: the model is looked at before any."""

    def draws(self, done: int, total: int, new: int) -> None:
        """Of ``total`` synthetic images for the task ``done`` are there, ``new`` of them since the last call."""

    def trains(self, name: str, schedule: Schedule) -> None:
        """Steps under this schedule are told from now on: of the task ``name``, or of a method's phase of that name."""

    def took_up(self, record: Sequence[Mapping[str, Tensor]]) -> None:
        """The first steps of the training that ``trains`` has told of were taken by an earlier process: the losses of each."""

    def step(self, step: int, total: int, losses: Mapping[str, Tensor]) -> None:
        """A training step is done."""

    def evaluates(self) -> None:
        """All tasks and the probe are being evaluated."""

    def row(self, accuracy: list[float], probe: float | None) -> None:
        """A row of the accuracy matrix is known and safe on disk."""

    def warn(self, text: str) -> None:
        """Something the user should know."""
        print(text, file=sys.stderr)


class Watchers(Watcher):
    """Several that listen: each hears all, in order; what one of them raises is not swallowed."""

    def __init__(self, watchers: Sequence[Watcher]):
        self.watchers = tuple(watchers)

    def begins(self, tasks: list[str], rows: list[list[float]], probe: list[float]) -> None:
        for watcher in self.watchers:
            watcher.begins(list(tasks), list(rows), list(probe))

    def learns(self, task: str, number: int) -> None:
        for watcher in self.watchers:
            watcher.learns(task, number)

    def draws(self, done: int, total: int, new: int) -> None:
        for watcher in self.watchers:
            watcher.draws(done, total, new)

    def trains(self, name: str, schedule: Schedule) -> None:
        for watcher in self.watchers:
            watcher.trains(name, schedule)

    def took_up(self, record: Sequence[Mapping[str, Tensor]]) -> None:
        for watcher in self.watchers:
            watcher.took_up(record)

    def step(self, step: int, total: int, losses: Mapping[str, Tensor]) -> None:
        for watcher in self.watchers:
            watcher.step(step, total, losses)

    def evaluates(self) -> None:
        for watcher in self.watchers:
            watcher.evaluates()

    def row(self, accuracy: list[float], probe: float | None) -> None:
        for watcher in self.watchers:
            watcher.row(list(accuracy), probe)

    def warn(self, text: str) -> None:
        for watcher in self.watchers:
            watcher.warn(text)
