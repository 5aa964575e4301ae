"""A stream from a folder of one's own pictures, or from a YAML file that lists such folders.

    DIR/CLASS/*                          one task
    DIR/TASK/CLASS/*                     a task a folder, alphabetically
    …/train/CLASS/*, …/test/CLASS/*      either of them with a split of its own (val counts as test where there is no test;
                                         train alone is none)

In the place of CLASS/* there may be tars in WebDataset's form (``own/shards.py``) or pictures with a ``metadata.csv`` or
``.jsonl`` (``own/tables.py``). A class is asked for by its folder's name, or by what ``classes.json`` says
(``{folder: name}``), beside the classes or in DIR. ``stream.yaml`` in DIR may say more (``own/told.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.benchmarks.own import hub, tables
from perdure.benchmarks.own.names import as_names, given_names
from perdure.benchmarks.own.rows import Found, Row, side_of, stream_of
from perdure.benchmarks.own.shards import shard_rows, shards_of
from perdure.benchmarks.own.told import KEYS, Told, in_order, told_by
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.data.folders import PICTURES, folders, hidden, pictures
from perdure.data.task import Stream

WANTED = "{0}/CLASS/*, or {0}/TASK/CLASS/*"


def load_folder(base: Path, alone: str = "") -> Stream:
    """The stream of a folder; ``alone``: what its one task is called, in the place of the folder's name. ``PerdureError`` for
    one that is laid out in no known way, and for a name where there are several tasks."""
    told = told_by(base / "stream.yaml")
    if told.tasks:
        return load_listed(base / "stream.yaml", base.name)
    if is_task(base):
        homes = {alone or base.name: base}
    else:
        homes = {name: base / name for name in folders(base)}
        check_tasks(base, homes)
        if alone:
            raise PerdureError(f"{base} holds {len(homes)} tasks, which have names of their own: leave '{alone}' out.")
    names = in_order(list(homes), told, "stream.yaml")
    found = [found_in(name, homes[name], base, told.templates, given_names((base, homes[name]))) for name in names]
    return stream_of(base.name, found, told)


def load_listed(path: Path, name: str) -> Stream:
    """The stream that a YAML file lists, task by task; or of the folder that it lies in, where it lists none."""
    told = told_by(path)
    if not told.tasks:
        raise PerdureError(f"{path} lists no tasks. Say which: tasks: [{{folder: DIR}}, {{table: FILE.csv}}, …].")
    found = [listed(one, path, told) for one in told.tasks]
    places = {one.name: one for one in found}
    if len(places) < len(found):
        raise PerdureError(
            f"{path}: two tasks have one name ({', '.join(one.name for one in found)}). Give each its 'name'."
        )
    return stream_of(name, [places[one] for one in in_order(list(places), told, str(path))], told)


def listed(task: Mapping[str, Any], path: Path, told: Told) -> Found:
    """One task of a YAML file."""
    base, templates = path.parent, tuple(task.get("templates") or told.templates)
    names = as_names(task.get("classes", {}), f"{path}, classes")
    keys = {key: task[key] for key in KEYS if key in task}
    if "dataset" in task:
        where, what = hub.place_of(task["dataset"], base)
        return hub.found_in(where, task.get("name", what), keys, names, templates)
    place = base / expanded(task.get("folder") or task["table"])
    name, names = task.get("name", place.stem if "table" in task else place.name), given_names((base, place)) | names
    if "table" in task:
        if not place.is_file():
            raise PerdureError(f"{path}: there is no table {place}.")
        (found,) = tables.found_in(place, keys, given_names((place.parent,)) | names, templates)
        return Found(name, found.rows, found.names, templates, found.where)
    if keys:
        raise PerdureError(f"{path}: {next(iter(keys))} is for tables and data sets; {place} is a folder.")
    if not place.is_dir():
        raise PerdureError(f"{path}: there is no folder {place}.")
    if not is_task(place):
        raise PerdureError(f"{path}: {place} is no task: it holds no class folders, tars or metadata.csv.")
    return found_in(name, place, place, templates, names)


def found_in(name: str, home: Path, base: Path, templates: tuple[str, ...], names: Mapping[str, Any]) -> Found:
    """The pictures of a task's folder."""
    split = None if tables.metadata_of(home) else sides_of(home)
    if split is None:
        return Found(name, rows_in(home, base, ""), names, templates, str(home))
    say_left_out(home, split)
    rows = [row for side, folder in split.items() for row in rows_in(folder, base, side)]
    return Found(name, rows, names, templates, str(home))


def rows_in(home: Path, base: Path, side: str) -> list[Row]:
    """The pictures of a folder: those that a table in it lists, those in tars, or those in class folders."""
    table, shards, classes = tables.metadata_of(home), shards_of(home), folders(home)
    if table:
        return tables.metadata_rows(table, base, side)
    if shards:
        if any(has_pictures(home / name) for name in classes):
            raise PerdureError(f"{home} holds tars ({shards[0].name}) and class folders ({classes[0]}). Keep one kind.")
        return shard_rows(shards, base, side)
    return [
        Row(path, path.relative_to(base).as_posix(), name, side) for name in classes for path in pictures(home / name)
    ]


def has_pictures(folder: Path) -> bool:
    """Whether pictures lie in a folder itself."""
    return any(p.suffix.lower() in PICTURES and p.is_file() and not hidden(Path(p.name)) for p in folder.iterdir())


def sides_of(home: Path) -> dict[str, Path] | None:
    """Where a folder keeps the sides of a split of its own: the folders that are named so. A training side alone is no split:
    then pictures of it are held out."""
    subs = {side: home / name for name in reversed(folders(home)) if (side := side_of(name))}
    test = subs.get("test") or subs.get("val")
    if "train" not in subs or is_class(subs["train"]):
        return None
    if test:
        return {"train": subs["train"], "test": test}
    return {"": subs["train"]} if len(folders(home)) == 1 else None


def say_left_out(home: Path, sides: Mapping[str, Path]) -> None:
    """Say which folders beside those of a split are left out."""
    left = [name for name in folders(home) if home / name not in sides.values()]
    if left:
        warnings.warn(
            f"{home}: the folder '{left[0]}' is left out{f' and {len(left) - 1} more' if left[1:] else ''}: beside "
            f"{' and '.join(folder.name for folder in sides.values())} it is neither of the two sides.",
            stacklevel=2,
        )


def is_class(folder: Path) -> bool:
    """Whether a folder holds pictures and no folders: a class, whatever its name."""
    return has_pictures(folder) and not folders(folder) and not tables.metadata_of(folder)


def is_task(home: Path) -> bool:
    """Whether a folder is a task: class folders with pictures in them, tars, pictures in a table, or a split of such."""
    if tables.metadata_of(home) or shards_of(home) or sides_of(home):
        return True
    return any(has_pictures(home / name) for name in folders(home))


def check_tasks(base: Path, homes: Mapping[str, Path]) -> None:
    """Refuse folders that are no tasks, naming the first."""
    wanted = WANTED.format(base)
    if not homes:
        raise PerdureError(f"{base} holds no folders. Wanted: {wanted}, with pictures in them.")
    odd = [home for home in homes.values() if not is_task(home)]
    if odd and len(odd) < len(homes):
        raise PerdureError(
            f"{base} holds folders of two kinds: {next(h for h in homes.values() if h not in odd).name} holds class folders, "
            f"{odd[0].name} does not. Wanted: {wanted}."
        )
    if odd:
        raise PerdureError(
            f"{base} holds no pictures where they are looked for. Wanted: {wanted}; pictures end in {', '.join(PICTURES)}."
        )
