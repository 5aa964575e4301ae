"""Runs beside what papers and releases print for the same stream and protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

OF = "OpenAI's ViT-B/16"  # what all tables here were made with
# Rows that bear another name than the method, or stand for some of its settings alone: the first whose options are the run's.
# An empty name: none is meant.
ROWS: dict[str, tuple[tuple[str, Mapping[str, Any]], ...]] = {
    "ridge": (("RAIL, primal form", {}),),
    "ridge_patches": (("", {}),),
    "zscl": (("ZSCL*", {"lam": 0}), ("zscl", {})),
    "keep_lora": (("KeepLoRA+", {"head": True}), ("keep_lora", {})),
    "wise_ft": (("wise_ft", {"alpha": 0.8, "towards": "previous"}), ("", {})),
}
LABELS = {"mtil": "task", "mtil-2": "task", "x-tail": "all"}  # classes that compete; of the others: those seen


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
        """Whether a run was made under the table's protocol, on the whole stream."""
        c, protocol = run.get("config", {}), run.get("protocol", {})
        asked = run["stream"], c.get("shots", 0), protocol.get("task_id", c.get("task_id"))
        cut = any(c.get(key) for key in ("tasks", "images", "base", "increment", "online", "shots_file"))
        usual = LABELS.get(self.stream, "seen")
        return asked == (self.stream, self.shots, self.task_id) and not cut and protocol.get("labels", usual) == usual

    def row_of(self, run: Mapping[str, Any]) -> str:
        """The name of the row that stands for the run's method as it was set; empty: there is none."""
        c = run.get("config", {})
        known = ROWS.get(run["method"], ((run["method"], {}),))
        fitting = (name for name, options in known if all(c.get(key) == value for key, value in options.items()))
        name = next(fitting, "")
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
