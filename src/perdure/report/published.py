"""Runs beside what papers and releases print for the same stream and protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

OF = "OpenAI's ViT-B/16"  # what all tables here were made with
PUBLISHED = {"ridge": "RAIL, primal form", "ridge_patches": ""}  # rows that bear another name; empty: none is meant


@dataclass(frozen=True)
class Published:
    """A published table: its figures by method, in per cent; None where it prints none."""

    stream: str
    shots: int
    task_id: str
    figures: tuple[str, ...]
    source: str
    rows: Mapping[str, Sequence[float | None]]

    def fits(self, run: Mapping[str, Any]) -> bool:
        """Whether a run was made under the table's protocol."""
        c = run.get("config", {})
        asked = run["stream"], c.get("shots", 0), run.get("protocol", {}).get("task_id", c.get("task_id"))
        return asked == (self.stream, self.shots, self.task_id)

    def row_of(self, run: Mapping[str, Any]) -> str:
        """The name of the row that stands for the run's method; empty: there is none."""
        name = PUBLISHED.get(run["method"], run["method"])
        return name if name in self.rows else ""


def tables() -> list[Published]:
    """All published tables that are kept."""
    text = (files("perdure") / "benchmarks" / "facts" / "published.json").read_text(encoding="utf-8")
    return [Published(**{**one, "figures": tuple(one["figures"])}) for one in json.loads(text)["tables"]]


def differences(run: Mapping[str, Any], table: Published) -> list[float | None]:
    """Points by which a run's figures are above the published ones of its method; None where either is missing."""
    row = table.row_of(run)
    mine = [run.get(figure) for figure in table.figures]
    return (
        [None if a is None or b is None else a - b for a, b in zip(mine, table.rows[row], strict=True)] if row else []
    )
