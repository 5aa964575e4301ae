"""Concepts of classes: phrases that a language model or a person wrote, read from a file ``{class: [concept, …]}``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from perdure.core.errors import PerdureError, nearest
from perdure.core.paths import expanded
from perdure.core.state import digest, read_json

Concepts = Mapping[str, tuple[str, ...]]


def read_concepts(path: str, names: str = "") -> tuple[dict[str, tuple[str, ...]], str]:
    """The concepts of each class by its name, and the sha256 of what was read.

    ``names``: a JSON file of the classes' names by the ids that ``path`` has in their place; empty: it has the names.
    ``PerdureError`` for a file that is not there, or of another form.
    """
    found, text = of_json("concepts", path)
    for key, phrases in found.items():
        if not isinstance(phrases, list) or not phrases or not all(isinstance(p, str) and p.strip() for p in phrases):
            raise PerdureError(
                f"concepts={path}: '{key}' should have a list of phrases, none empty, as {{'fox': ['a bushy tail', …]}}."
            )
    if names:
        known, more = of_json("concept_names", names)
        text += more
        lacking = sorted(key for key in found if not isinstance(known.get(key), str))
        if lacking:
            raise PerdureError(f"concept_names={names} has no name for '{lacking[0]}', which concepts={path} lists.")
        found = {known[key]: phrases for key, phrases in found.items()}
    return {name: tuple(phrases) for name, phrases in found.items()}, digest(text)


def of_json(key: str, path: str) -> tuple[dict[str, Any], bytes]:
    """A JSON file's mapping, and its bytes; ``key``: the option that names it."""
    place = expanded(path)
    if not place.is_file():
        raise PerdureError(
            f"{key}={path}: there is no such file. Give a JSON file of the form {{class: [concept, …]}}."
        )
    found = read_json(place)
    if not isinstance(found, dict) or not found:
        raise PerdureError(f"{key}={path} should hold one JSON object with an entry a class.")
    return found, place.read_bytes()


def check_lists(found: Concepts, classes: Iterable[str], path: str, where: str) -> None:
    """Refuse a concept file that lacks classes of ``where``."""
    asked = list(classes)
    lacking = [name for name in asked if name not in found]
    if lacking:
        few = ", ".join(lacking[:5]) + (", …" if len(lacking) > 5 else "")
        raise PerdureError(
            f"concepts={path} lacks {len(lacking)} of the {len(asked)} classes of {where}: {few}.{nearest(lacking[0], found)} "
            "Give each class a list of phrases under the name that it is asked by."
        )
