"""What is said about pictures in words: ``stream.yaml`` beside them, or a YAML file that lists tasks.

order: [winter, summer]             tasks; those not named follow
templates: ["a photo of a {}."]     the first is the one that is trained with
labels: task                        or seen, all: which classes compete
task_id: known                      or hidden
tasks:                              each a folder, a table or a data set; paths are seen from the file
  - folder: photos/winter
    name: winter                    else the folder's name
    classes: {n01440764: tench}     as classes.json
    templates: ["a photo of a {} in winter."]
  - table: summer.csv
    image_key: filepath             also label_key, split_key, text_key
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perdure.core.errors import PerdureError, unknown
from perdure.data.checks import places_in

TEMPLATES = ("a photo of a {}.",)
CHOICES = {"labels": ("task", "seen", "all"), "task_id": ("known", "hidden")}
KINDS = ("folder", "table", "dataset")  # what a task's pictures may lie in
KEYS = ("image_key", "label_key", "split_key", "task_key", "text_key")
KNOWN = ("order", "templates", "labels", "task_id", "tasks")
KNOWN_OF_TASK = (*KINDS, "name", "classes", "templates", *(key for key in KEYS if key != "task_key"))


@dataclass(frozen=True)
class Told:
    """A stream in words, checked. ``tasks``: as the file has them; empty: the folder's own."""

    order: tuple[str, ...] = ()
    templates: tuple[str, ...] = TEMPLATES
    labels: str = "task"
    task_id: str = "known"
    tasks: tuple[Mapping[str, Any], ...] = ()


def told_by(path: Path) -> Told:
    """What a YAML file says, checked; nothing where it is not there."""
    if not path.exists():
        return Told()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PerdureError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise PerdureError(f"{path} must hold 'key: value' lines. Keys: {', '.join(KNOWN)}.")
    check_keys(content, KNOWN, str(path))
    lists = {key: words(content, key, str(path)) for key in ("order", "templates")}
    for key, allowed in CHOICES.items():
        if key in content and content[key] not in allowed:
            raise PerdureError(f"{path}: {key} is one of {', '.join(allowed)}, not {content[key]!r}.")
    said = {key: content[key] for key in CHOICES if key in content} | {key: some for key, some in lists.items() if some}
    return Told(**said, tasks=listed_tasks(content.get("tasks", []), str(path)))


def listed_tasks(tasks: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """The tasks that a file lists, each checked."""
    if not isinstance(tasks, list) or not all(isinstance(one, dict) for one in tasks):
        raise PerdureError(f"{where}: tasks must be a list, each with one of {', '.join(KINDS)}, not {tasks!r}.")
    for number, one in enumerate(tasks, 1):
        here = f"{where}, task {number}"
        check_keys(one, KNOWN_OF_TASK, here)
        if sum(kind in one for kind in KINDS) != 1:
            raise PerdureError(f"{here} must say where its pictures lie with one of {', '.join(KINDS)}.")
        for key in set(one) - {"classes", "templates"}:
            if not isinstance(one[key], str) or not one[key].strip():
                raise PerdureError(f"{here}: {key} must be a word, not {one[key]!r}.")
        words(one, "templates", here)
    return tuple(tasks)


def check_keys(content: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse keys that are not known, naming the nearest."""
    if strange := [key for key in content if key not in known]:
        raise unknown(f"key in {where}", str(strange[0]), known)


def words(content: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of words; templates with one place each."""
    given = content.get(key, [])
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise PerdureError(f"{where}: {key} must be a list of words, not {given!r}.")
    if wrong := [one for one in given if key == "templates" and places_in(one) != [""]]:
        raise PerdureError(
            f"{where}: the template '{wrong[0]}' must hold exactly one {{}}, where the class's name goes."
        )
    return tuple(given)


def in_order(names: list[str], told: Told, where: str) -> list[str]:
    """Tasks in the order that was given; those not named follow as they came."""
    if strange := [name for name in told.order if name not in names]:
        raise unknown(f"task in the order of {where}", strange[0], names)
    if twice := [name for name in told.order if told.order.count(name) > 1]:
        raise PerdureError(f"{where}: the order names '{twice[0]}' twice.")
    return [*told.order, *(name for name in names if name not in told.order)]
