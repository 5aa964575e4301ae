"""Pictures listed in a table: ``metadata.csv`` or ``.jsonl`` beside them, or a CSV or JSON-lines file as a stream.

A row names a picture (``file_name``, as seen from the table) and its class (``label``); ``text`` is a caption that the picture
is trained with, beside its class or alone. A table as a stream may have other columns for them, and one for the split and one
for the task; tasks come in the order in which the table first names them.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perdure.benchmarks.own.rows import Found, Row, only_sides, side_of
from perdure.benchmarks.own.told import KEYS
from perdure.core.errors import PerdureError, nearest
from perdure.core.paths import expanded
from perdure.data.folders import PICTURES, hidden

TABLES = (".csv", ".tsv", ".jsonl")
METADATA = ("metadata.csv", "metadata.jsonl")
USUAL = {"image_key": "file_name", "label_key": "label", "text_key": "text"}  # as the imagefolder of datasets has them
Line = tuple[int, dict[str, str]]  # its number in the file, its cells by column


def metadata_of(folder: Path) -> Path | None:
    """The table that lies beside the pictures of a folder."""
    there = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(there) > 1:
        raise PerdureError(f"{folder} holds both {' and '.join(METADATA)}. Keep one.")
    return there[0] if there else None


def metadata_rows(table: Path, base: Path, side: str) -> list[Row]:
    """The pictures that a folder's table lists; those of a folder ``train`` or ``test`` beside it are in that split."""
    rows = [row for _, row in rows_in(table, {})]
    folder = table.parent
    unlisted = {p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and not hidden(p.relative_to(folder))}
    unlisted -= {row.source for row in rows if isinstance(row.source, Path)}
    if unlisted:
        warnings.warn(
            f"{table}: {len(unlisted)} pictures beside it are not in it and are left out: {min(unlisted).name}, …",
            stacklevel=2,
        )
    firsts = [side_of(Path(row.name).parts[0]) if len(Path(row.name).parts) > 1 else None for row in rows]
    split = not side and all(firsts)
    inside = folder.relative_to(base).as_posix()
    named = [
        Row(row.source, f"{inside}/{row.name}", row.label, (first or "") if split else side, row.caption)
        for row, first in zip(rows, firsts, strict=True)
    ]
    return only_sides(named, str(table)) if split else named


def found_in(table: Path, keys: Mapping[str, str], names: Mapping[str, Any], templates: tuple[str, ...]) -> list[Found]:
    """The tasks of a table: one of its name, or those that the column ``task_key`` names."""
    groups: dict[str, list[Row]] = {}
    for task, row in rows_in(table, keys):
        groups.setdefault(task or table.stem, []).append(row)
    several = len(groups) > 1
    return [
        Found(task, only_sides(rows, str(table)), names, templates, f"{table}, task {task}" if several else str(table))
        for task, rows in groups.items()
    ]


def rows_in(table: Path, keys: Mapping[str, str]) -> list[tuple[str, Row]]:
    """The pictures of a table, each with the name of its task (empty: the table has no column for it)."""
    lines = lines_of(table)
    columns = chosen(table, list(lines[0][1]), keys)
    told = "label_key" if "label_key" in columns else "text_key"
    for key in ("image_key", told, "split_key", "task_key"):
        empty = [number for number, cells in lines if key in columns and not cells[columns[key]]]
        if empty:
            raise PerdureError(
                f"{table}: {len(empty)} rows have nothing under '{columns[key]}', line {empty[0]} the first."
            )
    rows = [
        (cells.get(columns.get("task_key", ""), ""), row_of(table, number, cells, columns)) for number, cells in lines
    ]
    missing = [row.name for _, row in rows if isinstance(row.source, Path) and not row.source.is_file()]
    if missing:
        raise PerdureError(
            f"{table}: {len(missing)} of its {len(rows)} pictures are not there: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}. Paths are seen from {table.parent}."
        )
    seen: set[tuple[str, Any]] = set()
    for task, row in rows:
        if (task, row.source) in seen:
            raise PerdureError(f"{table} lists {row.name} twice. A picture has one class, and is in one split.")
        seen.add((task, row.source))
    return rows


def row_of(table: Path, number: int, cells: Mapping[str, str], columns: Mapping[str, str]) -> Row:
    """One line as a picture."""
    side, name = "", cells[columns["image_key"]]
    if "split_key" in columns:
        word = cells[columns["split_key"]]
        side = side_of(word) or ""
        if not side:
            raise PerdureError(f"{table}, line {number}: the split is 'train', 'test' or 'val', not '{word}'.")
    caption = cells.get(columns.get("text_key", ""), "")
    label = cells[columns["label_key"]] if "label_key" in columns else ""
    return Row(table.parent / expanded(name), name, label, side, caption)


def chosen(table: Path, columns: Sequence[str], keys: Mapping[str, str]) -> dict[str, str]:
    """Which column holds what: as was asked, else by its usual name."""
    out = {}
    for key in KEYS:
        asked = keys.get(key, "")
        column = asked or USUAL.get(key, "")
        if column in columns:
            out[key] = column
        elif asked:
            raise PerdureError(
                f"{table} has no column '{asked}'.{nearest(asked, columns)} Columns: {', '.join(columns)}."
            )
    for key in ("image_key", "label_key"):
        if key not in out and not (key == "label_key" and "text_key" in out):  # captions alone are trained with, too
            raise PerdureError(
                f"{table} has no column '{USUAL[key]}'.{nearest(USUAL[key], columns)} Columns: {', '.join(columns)}. Say which "
                f"it is, of a table as a stream with --{key.replace('_', '-')}."
            )
    for key, column in (("split_key", "split"), ("task_key", "task")):
        if key not in out and column in columns:
            option = f"--{key.replace('_', '-')}"
            warnings.warn(
                f"{table}: its column '{column}' is not used; {option} {column} would, of a table as a stream.",
                stacklevel=2,
            )
    return out


def lines_of(table: Path) -> list[Line]:
    """The lines of a table. ``PerdureError`` for one that is empty or cannot be read as one."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PerdureError(f"{table} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    lines = json_lines(table, text) if table.suffix.lower() == ".jsonl" else csv_lines(table, text)
    if not lines:
        raise PerdureError(f"{table} is empty: it lists no pictures.")
    return lines


def csv_lines(table: Path, text: str) -> list[Line]:
    """Lines with commas, tabs or semicolons, whichever the head holds most of."""
    head = text.partition("\n")[0]
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=max(",\t;", key=head.count), skipinitialspace=True, strict=True
    )
    lines = []
    try:
        names = list(reader.fieldnames or [])
        if twice := [name for name in names if names.count(name) > 1]:
            raise PerdureError(f"{table} has two columns '{twice[0]}'.")
        for cells in reader:
            if None in cells or None in cells.values():
                count = "more" if None in cells else "fewer"
                raise PerdureError(
                    f"{table}, line {reader.line_num}: there are {count} cells than columns ({len(names)})."
                )
            lines.append((reader.line_num, {name: cell.strip() for name, cell in cells.items()}))
    except csv.Error as error:
        raise PerdureError(f"{table}, line {reader.line_num}, cannot be read: {error}.") from None
    return lines


def json_lines(table: Path, text: str) -> list[Line]:
    """A JSON object a line; what is text or a whole number in it, under the first line's keys."""
    lines: list[Line] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except json.JSONDecodeError as error:
            raise PerdureError(f"{table}, line {number}, is no JSON: {error}.") from None
        if not isinstance(cells, dict):
            raise PerdureError(f"{table}, line {number}, must be {{column: value, …}}.")
        plain = {k: str(v).strip() for k, v in cells.items() if isinstance(v, str | int) and not isinstance(v, bool)}
        lines.append((number, plain))
    names = dict.fromkeys(name for _, cells in lines for name in cells)
    return [(number, {name: cells.get(name, "") for name in names}) for number, cells in lines]
