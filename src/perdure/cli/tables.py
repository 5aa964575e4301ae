"""How answers and measurements of a model in use are written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from perdure.terminal import console

if TYPE_CHECKING:
    from perdure.launch.learner.comparison import Row


class Format(str, Enum):
    """How answers are written."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


def rows_table(title: str, rows: Sequence[Row]) -> Any:
    """Tasks and the probe as a table, in per cent with 95 % intervals."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=None)
    table.add_column("", overflow="fold")
    compares = any(row.before is not None for row in rows)
    for column in (
        "images",
        *(("before",) if compares else ()),
        "after" if compares else "accuracy",
        *(("change",) if compares else ()),
        "among all names",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [str(row.images or "–")]
        if compares:
            cells.append(with_interval(row.before, row.before_interval))
        cells.append(with_interval(row.after, row.after_interval))
        if compares:
            cells.append(with_interval(row.change, row.change_interval, "+.1f"))
        cells.append("–" if row.of_all is None else f"{row.of_all:.1f}")
        table.add_row(escape(row.name), *cells)
    return table


def with_interval(value: float | None, interval: tuple[float, float] | None, form: str = ".1f") -> str:
    """``61.3 (59.8 to 62.9)``, or a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:{form}}" + (f" [dim]({interval[0]:{form}} to {interval[1]:{form}})[/]" if interval else "")


def course_table(entries: Sequence[dict[str, Any]]) -> Any:
    """What was learned, refused and undone, a line each."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    for column in ("", "task", "learned", "classes", "pictures", "before", "after", "state"):
        table.add_column(column, justify="left" if column in ("task", "learned", "state") else "right", overflow="fold")
    for one in entries:
        about: dict[str, Any] = one.get("about", {"classes": [], "train": 0, "test": 0})
        own: dict[str, Any] = next((r for r in one["rows"] if r["name"] == one["task"]), {})
        figures = ["–" if own.get(k) is None else f"{own[k]:.1f}" for k in ("before", "after")]
        table.add_row(
            str(one["number"]), escape(one["task"]), one["when"].replace("T", " ")[:19], str(len(about["classes"])),
            f"{about['train']} + {about['test']}", *figures, one["state"],
        )  # fmt: skip
    return table


FIELDS = ("path", "label", "score", "task", "expert")


def write_rows(rows: Sequence[dict[str, Any]], format: Format, topk: int) -> None:
    """Answers to standard output."""
    plain = [{**dict.fromkeys(FIELDS), **row} for row in rows]
    if format is Format.jsonl:
        for row in plain:
            print(json.dumps(row, ensure_ascii=False))
    elif format is Format.json:
        print(json.dumps(plain, ensure_ascii=False, indent=1))
    elif format is Format.csv:
        text = io.StringIO()
        more = [f"{what}_{k}" for k in range(2, topk + 1) for what in ("label", "score")]
        explained = ["why"] if any("why" in row for row in plain) else []
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*FIELDS, *more, *explained, "error"])
        for row in plain:
            rest = [x for one in row.get("top", [])[1:] for x in (one["label"], one["score"])]
            writer.writerow(
                [
                    *(row[f] for f in FIELDS),
                    *rest,
                    *[""] * (len(more) - len(rest)),
                    *[reasons(row, "; ")] * len(explained),
                    row.get("error", ""),
                ]
            )
        print(text.getvalue(), end="")
    else:
        table_of_answers(plain)


def reasons(row: dict[str, Any], between: str) -> str:
    """The concepts that decided, each with what it contributed."""
    return between.join(f"{one['concept']} ({one['contribution']:+.3f})" for one in row.get("why", []))


def table_of_answers(rows: Sequence[dict[str, Any]]) -> None:
    """Answers for people."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    explained = ("decided by",) if any("why" in row for row in rows) else ()
    for column in ("picture", "label", "score", "task", "expert", *explained):
        table.add_column(column, overflow="fold", justify="right" if column == "score" else "left")
    for row in rows:
        if "error" in row:
            table.add_row(escape(row["path"]), "[red]not read[/]", "", "", "", *[""] * len(explained))
            continue
        top = row.get("top") or [{"label": row["label"], "score": row["score"]}]
        labels, scores = "\n".join(escape(t["label"]) for t in top), "\n".join(f"{t['score']:.3f}" for t in top)
        why = [escape(reasons(row, "\n") or "–")] * len(explained)
        table.add_row(escape(row["path"]), labels, scores, escape(row["task"] or "–"), escape(row["expert"]), *why)
    console().print(table)
