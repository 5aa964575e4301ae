"""What a tracker is, and what it is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from perdure.core.registry import Registry


@dataclass(frozen=True)
class Record:
    """Figures by name, of a training step or of a row. ``number``: of the task (0: before any); ``step``: of the task's
    training; ``at``: training steps since the run began."""

    kind: Literal["step", "row"]
    number: int
    task: str
    at: int
    figures: Mapping[str, float]
    step: int = 0


@dataclass(frozen=True)
class Begun:
    """What a tracker is opened with: the run, and how many of its ``rows`` (0: it is new) and steps (``at``) were kept."""

    folder: Path
    about: Mapping[str, Any]
    identity: str
    rows: int = 0
    at: int = 0


@dataclass
class Tracker:
    """Takes the records of one run."""

    packages: ClassVar[Sequence[str]] = ()
    begun: Begun
    own: Any = field(default=None, init=False)

    @classmethod
    def check(cls) -> None:
        """Refuse, before the work, what could not be written to."""

    def open(self) -> None:
        """Begin, or go on."""

    def write(self, record: Record) -> None:
        """Take a record."""

    def close(self) -> None:
        """No more will come."""


TRACKERS: Registry[type[Tracker]] = Registry("tracker")


def flat(about: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as ``outer/inner`` → value."""
    for key, value in about.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", value
