"""What learning a task won and lost: every task and the probe, before and after, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perdure.engine.evaluate import bootstrap, per_cent
from perdure.engine.home import Hits
from perdure.ops.metrics import interval

Interval = tuple[float, float]
DEAR = 2.0  # points that a loss may come to, unless the caller says how many


@dataclass(frozen=True)
class Row:
    """One task or the probe, in per cent, with 95 % bootstrap intervals over its test images; None: not measured.

    ``before`` and ``after``: among its own classes; ``change`` with the interval of the difference on the same images;
    ``of_all``: after, among all classes learned.
    """

    name: str
    images: int
    before: float | None = None
    after: float | None = None
    change: float | None = None
    of_all: float | None = None
    before_interval: Interval | None = None
    after_interval: Interval | None = None
    change_interval: Interval | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.after is None:
            return f"  {self.name}: not measured"
        before = "" if self.before is None else f"{self.before:.1f} → "
        wide = "" if self.after_interval is None else " ({:.1f} to {:.1f})".format(*self.after_interval)
        of_all = "" if self.of_all is None else f"; among all names learned {self.of_all:.1f}"
        return f"  {self.name}: {before}{self.after:.1f} %{wide}{of_all}"


def compared(names: Sequence[str], before: Hits, after: Hits, of_all: Hits) -> list[Row]:
    """A row for each of ``names``, of what was measured of it."""
    return [row(name, before, after, of_all) for name in names]


def row(name: str, before: Hits, after: Hits, of_all: Hits) -> Row:
    """Hits (N,) of the same test images before and after, as a row."""
    sides = {key: hits[name] for key, hits in (("before", before), ("after", after)) if name in hits}
    if not sides:
        return Row(name, 0)
    if len({len(hits) for hits in sides.values()}) > 1:  # other pictures than before: there is nothing to compare
        sides = {"after": after[name]}
    draws = dict(zip(sides, bootstrap(list(sides.values()), name).T, strict=True))
    found: dict[str, Any] = {key: per_cent(hits) for key, hits in sides.items()}
    found |= {f"{key}_interval": ends(draws[key]) for key in sides}
    if len(sides) == 2:
        found |= {"change": found["after"] - found["before"], "change_interval": ends(draws["after"] - draws["before"])}
    if name in of_all:
        found["of_all"] = per_cent(of_all[name])
    return Row(name, len(next(iter(sides.values()))), **found)


def ends(draws: np.ndarray[Any, np.dtype[np.float64]]) -> Interval:
    low, high = interval(draws)
    return float(low), float(high)


def refusal(rows: Sequence[Row], new: str, limit: float | None) -> str:
    """Why a task is not to be taken: what lost more than ``limit`` points (None: more than 2, and more than chance takes from
    so few images); empty where nothing did."""
    lost = [
        f"{r.name} would lose {-r.change:.1f} points"
        for r in rows
        if r.name != new and r.change is not None and r.change_interval is not None
        and -r.change > (DEAR if limit is None else limit)
        and (limit is not None or r.change_interval[1] < 0)
    ]  # fmt: skip
    allowed = f"{DEAR if limit is None else limit:g}"
    return f"{', '.join(lost)}; allowed are {allowed} (--max-loss)." if lost else ""


@dataclass(frozen=True)
class Outcome:
    """What learning a task came to. ``folder``: where it lies; ``refused``: why it is not the current state; ``already``: it
    was learned before, and nothing was done; ``planned``: nothing was to be done."""

    task: str
    rows: tuple[Row, ...] = ()
    folder: Path | None = None
    refused: str = ""
    already: bool = False
    planned: bool = False
    notes: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return not self.refused

    def __str__(self) -> str:
        said = list(self.notes)
        if self.refused:
            said.append(f"{self.task} was learned, and is not taken: {self.refused} It lies in {self.folder}.")
        elif self.already:
            said.append(f"{self.task} was learned before: nothing to do.")
        elif not self.planned:
            said.append(f"{self.task} is learned.")
        return "\n".join([*said, *map(str, self.rows)])


class Outcomes(tuple[Outcome, ...]):
    """What learning came to, a task at a time."""

    @property
    def accepted(self) -> bool:
        return all(one.accepted for one in self)

    def __str__(self) -> str:
        return "\n".join(map(str, self))
