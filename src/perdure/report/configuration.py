"""What the runs were made with: where they differ, all of it, the protocol in words, the notes on the data."""

from __future__ import annotations

import json
from typing import Any

from perdure.report.entries import Entry, mapping

# The parts of a metrics file that say how a run was made, in the order in which they are shown.
PARTS = {"config": "", "model": "model.", "protocol": "protocol.", "data": "data.", "environment": "environment."}
LABELS = {
    "task": "An image is classified among the labels of its own task.",
    "seen": "An image is classified among the labels of the tasks learned so far and of its own.",
    "all": "An image is classified among the labels of all tasks of the stream.",
}
TASK_ID = {
    "known": "The model is told which task an image belongs to.",
    "hidden": "The model is not told which task an image belongs to.",
}


def written(value: object) -> str:
    """A setting as text: strings as they are, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def flat(part: object, prefix: str = "") -> dict[str, str]:
    """A nested dict as one level, keys joined by dots."""
    lines: dict[str, str] = {}
    for key, value in mapping(part).items():
        if isinstance(value, dict) and value:
            lines.update(flat(value, f"{prefix}{key}."))
        else:
            lines[f"{prefix}{key}"] = written(value)
    return lines


def settings(entry: Entry) -> dict[str, str]:
    """Everything that a run was made with, by dotted name; the notes on the data have their own place."""
    lines = {"stream": str(entry.run.get("stream", "")), "seed": entry.seeds}
    if entry.run.get("perdure") is not None:
        lines["perdure"] = str(entry.run["perdure"])
    for part, prefix in PARTS.items():
        found = {key: value for key, value in mapping(entry.run.get(part)).items() if key != "notes"}
        lines.update(flat(found, prefix))
    return lines


def table(entries: list[Entry]) -> list[tuple[str, list[str], bool]]:
    """Rows of (name, value a run, whether the runs differ), those that differ first."""
    found = [settings(entry) for entry in entries]
    names = list(dict.fromkeys(name for lines in found for name in lines))
    rows = [(name, [lines.get(name, "\u2013") for lines in found]) for name in names]
    marked = [(name, values, len(set(values)) > 1) for name, values in rows]
    return sorted(marked, key=lambda row: not row[2])


def protocol(entries: list[Entry]) -> list[tuple[str, list[str]]]:
    """The protocol in sentences, each with the labels of the runs it holds for."""
    sentences: dict[str, list[str]] = {}
    for entry in entries:
        for key, value in mapping(entry.run.get("protocol")).items():
            known: dict[str, str] = {"labels": LABELS, "task_id": TASK_ID}.get(key, {})
            sentence = known.get(written(value), f"{key}: {written(value)}")
            sentences.setdefault(sentence, []).append(entry.label)
    return list(sentences.items())


def notes(entries: list[Entry]) -> list[str]:
    """The licence notes on the data, each once."""
    found: list[Any] = []
    for entry in entries:
        lines = mapping(entry.run.get("data")).get("notes")
        found += lines if isinstance(lines, list) else [lines] if lines else []
    return list(dict.fromkeys(written(line) for line in found))
