"""Concepts of classes: phrases that a language model or a person wrote, read from a file ``{class: [concept, …]}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perdure.core.errors import PerdureError, nearest
from perdure.core.paths import expanded
from perdure.core.state import read_json

Concepts = Mapping[str, tuple[str, ...]]


def read_concepts(path: str, names: str = "") -> Concepts:
    """The concepts of each class by its name.

    ``names``: a JSON file of the classes' names by the ids that ``path`` has in their place; empty: it has the names.
    ``PerdureError`` for a file that is not there, or of another form.
    """
    found = of_json("concepts", path)
    for key, phrases in found.items():
        if not isinstance(phrases, list) or not phrases or not all(isinstance(p, str) and p.strip() for p in phrases):
            raise PerdureError(
                f"concepts={path}: '{key}' should have a list of phrases, none empty, as {{'fox': ['a bushy tail', …]}}."
            )
    if names:
        known = of_json("concept_names", names)
        lacking = sorted(key for key in found if not isinstance(known.get(key), str))
        if lacking:
            raise PerdureError(f"concept_names={names} has no name for '{lacking[0]}', which concepts={path} lists.")
        found = {known[key]: phrases for key, phrases in found.items()}
    return {name: tuple(phrases) for name, phrases in found.items()}


def of_json(key: str, path: str) -> dict[str, Any]:
    """A JSON file's mapping; ``key``: the option that names it."""
    place = expanded(path)
    if not place.is_file():
        raise PerdureError(
            f"{key}={path}: there is no such file. Give a JSON file of the form {{class: [concept, …]}}."
        )
    found = read_json(place)
    if not isinstance(found, dict) or not found:
        raise PerdureError(f"{key}={path} should hold one JSON object with an entry a class.")
    return found


def lists_of(found: Concepts, classes: Sequence[str], per_class: int, path: str, where: str) -> list[list[str]]:
    """The phrases of each class of ``where``. ``PerdureError`` where the file lacks classes, or has too few to choose from."""
    lacking = [name for name in classes if name not in found]
    if lacking:
        few = ", ".join(lacking[:5]) + (", …" if len(lacking) > 5 else "")
        raise PerdureError(
            f"concepts={path} lacks {len(lacking)} of the {len(classes)} classes of {where}: {few}."
            f"{nearest(lacking[0], found)} Give each class a list of phrases under the name that it is asked by."
        )
    out = [list(found[name]) for name in classes]
    check_enough(sum(map(len, out)), per_class, len(classes), where)
    return out


def check_enough(there: int, per_class: int, classes: int, where: str) -> None:
    """Refuse fewer candidates than are to be chosen."""
    if there < per_class * classes:
        raise PerdureError(
            f"{where} has {there} candidate concepts, and per_class={per_class} for {classes} classes takes "
            f"{per_class * classes}. Give more, or a smaller per_class."
        )
