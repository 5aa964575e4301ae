"""Lists of which pictures a split consists of, kept as JSON beside the data sets: ``ROOT/splits/NAME.json``.

    {"name": "EuroSAT", "digest": "…", "train": [["eurosat/2750/Forest/Forest_1.jpg", 1], …], "test": […]}

A data set that comes without a split is split by the published rule, which draws from its sorted file list: a file more, and
other pictures are tested. Where there is a list, it says which they are, whatever else has come to lie beside them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perdure.core.errors import DamagedFile
from perdure.core.state import as_json, digest, read_json, write_json

Listed = Sequence[Sequence[Any]]  # [name, label] of each picture
SIDES = ("train", "test")


def place_of(base: Path, name: str) -> Path:
    """Where the list of a data set lies."""
    return base / "splits" / f"{name}.json"


def write(base: Path, name: str, sides: Sequence[Listed]) -> Path:
    """Keep the lists of both sides; return where. A list that is there is replaced."""
    path, lists = place_of(base, name), dict(zip(SIDES, sides, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"name": name, "digest": digest(as_json(lists)), **lists})
    return path


def read(base: Path, name: str, names: Sequence[str], labels: Sequence[int]) -> list[list[int]] | None:
    """For either side the places in ``names`` of the pictures that the list has; None: there is no list. ``DamagedFile`` where
    it is not what was written, or a picture is gone or has another label; what it does not list is said."""
    path = place_of(base, name)
    if not path.exists():
        return None
    content = read_json(path)
    lists: dict[str, Any] = {side: content.get(side) for side in SIDES} if isinstance(content, Mapping) else {}
    if not lists or content.get("digest") != digest(as_json(lists)):
        raise DamagedFile(
            f"{path} was changed since it was written. Take it away: then the published rule draws the split."
        )
    places = {one: number for number, one in enumerate(names)}
    gone = [one for side in SIDES for one, label in lists[side] if one not in places or labels[places[one]] != label]
    if gone:
        raise DamagedFile(
            f"{len(gone)} of the pictures that {path} lists are not there under their labels, {gone[0]} the first. Put them "
            "back, or take the list away: then the published rule draws another split."
        )
    if more := len(names) - sum(map(len, lists.values())):
        warnings.warn(f"{name}: {more} pictures are not in {path} and are left out.", stacklevel=2)
    return [[places[one] for one, _ in lists[side]] for side in SIDES]
