"""What the classes of one's own pictures are called: by their folders, by ``classes.json``, by WordNet."""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from perdure.core.errors import PerdureError
from perdure.core.state import read_json
from perdure.data.task import Class, Task

WORDLESS = re.compile(r"(class|label|category|n)?[ _]*\d+")
BELOW = re.compile(r"-\d+")
FORM = "{label: name}, {label: [name, other words for it]}, or of numbered classes a list of names"


@cache
def wordnet() -> dict[str, str]:
    """ImageNet's names by WordNet id."""
    path = files("perdure") / "benchmarks" / "facts" / "imagenet.json"
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["classnames"]
    return found


def plain(word: str) -> str:
    """A name without what makes no difference to a person: case, spaces, underscores, hyphens."""
    return " ".join(re.split(r"[\s_-]+", word.lower())).strip()


def spoken(label: str) -> str:
    """A folder's name as words."""
    return wordnet().get(label) or label.replace("_", " ").replace("-", " ").strip()


def given_names(places: Sequence[Path]) -> dict[str, Any]:
    """What the files ``classes.json`` in these folders say, the later ones over the earlier."""
    given: dict[str, Any] = {}
    for path in (folder / "classes.json" for folder in dict.fromkeys(places)):
        if path.exists():
            given |= as_names(read_json(path), str(path))
    return given


def as_names(content: Any, where: str) -> dict[str, Any]:
    """Names by label; of a list, by number."""
    if isinstance(content, list) and content and all(isinstance(one, str) for one in content):
        return {str(number): one for number, one in enumerate(content)}
    if not isinstance(content, dict):
        raise PerdureError(f"{where} must say what each class is called, as {{folder: name}}: {FORM}.")
    return {str(label): name for label, name in content.items()}


def words_of(label: str, given: Mapping[str, Any]) -> tuple[str, ...]:
    """A class's name and the other words for it."""
    said = given.get(label, spoken(label))
    words = said if isinstance(said, list) else [said]
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise PerdureError(
            f"classes.json: the class '{label}' must be given one name, or a list of words for it, not {said!r}. "
            f"Wanted: {FORM}."
        )
    return tuple(
        dict.fromkeys(unicodedata.normalize("NFC", word) for word in words)
    )  # as some systems name files: in parts


def classes_of(
    labels: Sequence[str], given: Mapping[str, Any], templates: tuple[str, ...], where: str
) -> tuple[Class, ...]:
    """The classes of a task. ``PerdureError`` for one alone, for two of one name, and for a number that has none."""
    if len(labels) < 2:
        raise PerdureError(f"{where} holds one class only ('{labels[0]}'): there is nothing to tell apart.")
    check_numbers(labels, given, where)
    words = [words_of(label, given) for label in labels]
    taken: dict[str, str] = {}
    for label, own in zip(labels, words, strict=True):
        for word in dict.fromkeys(map(plain, own)):
            if word in taken:
                raise PerdureError(
                    f"{where}: '{taken[word]}' and '{label}' are both called '{word}'. Put their pictures together, or give "
                    "one of them another name in classes.json."
                )
            taken[word] = label
    say_wordless(labels, [own[0] for own in words], where)
    return tuple(Class(name, templates, tuple(also)) for name, *also in words)


def check_numbers(labels: Sequence[str], given: Mapping[str, Any], where: str) -> None:
    """Refuse numbers that go beyond the names for numbers, and those below 0 that have no name."""
    known = [int(label) for label in given if label.isdecimal()]
    beyond = [label for label in labels if label.isdecimal() and label not in given]
    below = [label for label in labels if BELOW.fullmatch(label) and label not in given]
    if below:
        raise PerdureError(
            f"{where}: the label {below[0]} has no name. Labels are numbered from 0; where it means that nobody knows the "
            "class, leave these pictures out, else name it in classes.json."
        )
    if known and beyond:
        raise PerdureError(
            f"{where}: the label {beyond[0]} has no name; there are names for {min(known)} … {max(known)}. Labels are "
            "numbered from 0."
        )


def say_wordless(labels: Sequence[str], names: Sequence[str], where: str) -> None:
    """Say which names no model could know."""
    odd = [k for k, name in enumerate(names) if WORDLESS.fullmatch(name.lower())]
    if odd:
        warnings.warn(
            f"{where}: '{names[odd[0]]}' is no word that a model could know ({len(odd)} of {len(names)} classes). Say what the "
            f'classes are in classes.json beside the pictures: {{"{labels[odd[0]]}": "its name", …}}.',
            stacklevel=2,
        )


def say_shared(tasks: Sequence[Task]) -> None:
    """Say which classes are in several tasks, and what that means."""
    homes: dict[str, list[str]] = {}
    for task in tasks:
        for one in task.classes:
            homes.setdefault(plain(one.name), []).append(task.name)
    shared = {name: own for name, own in homes.items() if len(own) > 1}
    if shared:
        name, own = next(iter(shared.items()))
        warnings.warn(
            f"{len(shared)} classes are in several tasks ('{name}' in {' and '.join(own)}). With labels=task an image competes "
            "with the classes of its own task, and a head learns one row for both; with labels=all both compete, and an image "
            "that is answered by the other task's is counted as wrong; labels=seen refuses them.",
            stacklevel=2,
        )
