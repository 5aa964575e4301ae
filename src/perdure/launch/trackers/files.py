"""Trackers that write lines into files of the run's folder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from perdure.core.state import write_bytes
from perdure.launch.trackers.base import TRACKERS, Record, Tracker, flat


class Lines(Tracker):
    """A text file of lines, each of a task's number."""

    name: ClassVar[str]
    head, fresh = "", True

    def number(self, line: str) -> int:
        """The number of the task that a line is of; -1 of the first. ``ValueError`` for half a line."""
        raise NotImplementedError

    def open(self) -> None:
        path = self.begun.folder / self.name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and self.begun.rows else []
        kept = "".join(f"{line}\n" for line in lines[1:] if self.kept(line))
        self.fresh = not kept
        write_bytes(path, f"{self.head}\n{kept}".encode())
        self.own = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def kept(self, line: str) -> bool:
        """Whether a line is of a row that was kept."""
        try:
            return self.number(line) < self.begun.rows
        except (ValueError, LookupError, TypeError):
            return False  # cut off by a kill

    def say(self, text: str) -> None:
        self.own.write(text)
        self.own.flush()

    def close(self) -> None:
        self.own.close()


@TRACKERS.register("jsonl")
class JSONLines(Lines):
    """A JSON object a line."""

    name = "track.jsonl"

    def open(self) -> None:
        self.head = json.dumps({"kind": "config", **self.begun.about}, ensure_ascii=False)
        super().open()

    def number(self, line: str) -> int:
        return int(json.loads(line)["number"])

    def write(self, record: Record) -> None:
        place = {
            "kind": record.kind,
            "number": record.number,
            "task": record.task,
            "step": record.step,
            "at": record.at,
        }
        self.say(json.dumps({**place, **finite(record.figures)}, ensure_ascii=False) + "\n")


@TRACKERS.register("csv")
class CSV(Lines):
    """A figure a line: a table that any program reads."""

    name = "track.csv"
    head = "kind,number,task,step,at,figure,value"

    def open(self) -> None:
        super().open()
        if self.fresh:  # the run may be older than that it is tracked
            self.rows(["config", 0, "", 0, 0, key, value] for key, value in flat(self.begun.about))

    def number(self, line: str) -> int:
        cells = next(csv.reader([line]))
        return int(cells[1]) if len(cells) == 7 else int("")

    def write(self, record: Record) -> None:
        place = (record.kind, record.number, record.task, record.step, record.at)
        self.rows([*place, name, value] for name, value in finite(record.figures).items())

    def rows(self, rows: Iterator[list[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self.say(text.getvalue())


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Figures as JSON has them: what is no number is null."""
    return {name: value if abs(value) < float("inf") else None for name, value in figures.items()}
