"""What the model in use knows and how it came to know it, as the page and the endpoint show it."""

from __future__ import annotations

from typing import Any

from perdure.launch.learner import Learner
from perdure.launch.learner.package import Exported, is_export

Entry = dict[str, Any]


def opened(folder: Any, method: str = "") -> Learner:
    """A HOME or an exported model; ``method``: of a method from a file, that file. ``PerdureError`` for anything else, and for
    a HOME that holds nothing yet."""
    learner = Learner.from_pretrained(folder, method) if is_export(folder) else Learner(folder, method=method)
    _ = learner.config  # says what to do where nothing is learned
    return learner


def course(learner: Learner) -> list[Entry]:
    """A task a dict: number, task, state, when, its classes, counts of pictures, accuracy before and after it was learned and
    now, and ``rows`` of all that was measured then. An export knows its tasks alone. Where pictures lie stays untold."""
    if isinstance(learner, Exported):
        return [entry({"number": k, **one}, {}) for k, one in enumerate(learner.about["learned"], 1)]
    records = learner.history()
    return [entry(one, latest(records)) for one in records]


def latest(records: list[Entry]) -> dict[str, float | None]:
    """What was measured when the last of the current states was learned, by task."""
    current = [one for one in records if one["state"] == "current"]
    return {row["name"]: row["after"] for row in current[-1]["rows"]} if current else {}


def probe(entries: list[Entry]) -> dict[str, float | None]:
    """The zero-shot probe before the first task and now, in per cent; None: not measured."""
    first: list[Entry] = next((one["rows"] for one in entries if one["state"] == "current"), [])
    before = next((row["before"] for row in first if row["name"] == "probe"), None)
    return {"before": before, "now": latest(entries).get("probe")}


def entry(record: Entry, now: dict[str, float | None]) -> Entry:
    about, rows = record.get("about", {}), record.get("rows", [])
    own: dict[str, Any] = next((row for row in rows if row["name"] == record["task"]), {})
    current = record.get("state", "current") == "current"
    return {
        "number": record["number"], "task": record["task"], "state": record.get("state", "current"), "when": record.get("when"),
        "classes": [name for name, *_ in about.get("classes", [])], "train": about.get("train"), "test": about.get("test"),
        "before": own.get("before"), "after": own.get("after"), "now": now.get(record["task"]) if current else None,
        "refused": record.get("refused", ""), "rows": rows,
    }  # fmt: skip


def classes(entries: list[Entry]) -> list[str]:
    """The names of all classes that are known now, each once."""
    return list(dict.fromkeys(name for one in entries if one["state"] == "current" for name in one["classes"]))
