"""Pictures that the package ``datasets`` reads: a folder that ``save_to_disk`` wrote, or a data set of the Hub.

The columns are found by their types (``Image``, ``ClassLabel``), or by name where several could be meant. The network is
asked only for a Hub id.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.benchmarks.own.rows import Found, Row, only_sides, side_of
from perdure.core.errors import PerdureError, nearest
from perdure.core.paths import expanded
from perdure.data.places import Cell

HUB = "hf:"
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return any((folder / name).is_file() for name in SAVED)


def package() -> Any:
    """``datasets``, which takes a second to import."""
    try:
        import datasets
    except ImportError as error:
        raise PerdureError(f"This needs the package datasets ({error}): pip install 'perdure[datasets]'") from None
    return datasets


def opened(what: str) -> Mapping[str, Any]:
    """The tables of a data set by split; under the empty word, where it has none."""
    datasets, (name, _, kind) = package(), what.removeprefix(HUB).partition(":")
    try:
        found = datasets.load_dataset(name, kind or None) if what.startswith(HUB) else datasets.load_from_disk(what)
    except (OSError, ValueError, RuntimeError) as error:
        raise PerdureError(f"{what} cannot be loaded: {' '.join(str(error).split())}") from None
    return found if isinstance(found, dict) else {"": found}


def found_in(
    what: str, name: str, keys: Mapping[str, str], names: Mapping[str, Any], templates: tuple[str, ...]
) -> Found:
    """A data set as a task."""
    if wrong := [key for key in ("split_key", "task_key") if keys.get(key)]:
        option = wrong[0].replace("_", "-")
        raise PerdureError(f"--{option} is for tables: {what} says itself what its splits are, and is one task.")
    rows = []
    for split, table in opened(what).items():
        side = side_of(split) if split else ""
        if side is None:
            warnings.warn(f"{what}: its split '{split}' ({len(table)} rows) is left out.", stacklevel=2)
            continue
        rows += rows_of(table, keys, side, f"{what}, split {split}" if split else what)
    sides = {row.side for row in rows}
    if sides in ({"train"}, {"test"}):  # one split is no split
        rows = [Row(row.source, row.name, row.label, "", row.caption) for row in rows]
    return Found(name, only_sides(rows, what), names, templates, what)


def rows_of(table: Any, keys: Mapping[str, str], side: str, where: str) -> list[Row]:
    """The pictures of one split."""
    datasets = package()
    image = column(table, keys.get("image_key", ""), datasets.Image, "image", where)
    text, asked = keys.get("text_key", ""), keys.get("label_key", "")
    if text and text not in table.features:
        raise PerdureError(f"{where} has no column '{text}'.{nearest(text, table.features)}")
    texts = [str(one or "").strip() for one in table[text]] if text else [""] * len(table)
    if text and not asked and not any(isinstance(one, datasets.ClassLabel) for one in table.features.values()):
        labels = [""] * len(table)
        if lacking := [number for number, one in enumerate(texts) if not one]:
            raise PerdureError(
                f"{where}: {len(lacking)} of {len(texts)} rows have no text under '{text}', row {lacking[0]} the first."
            )
    else:
        labels = labels_of(table, column(table, asked, datasets.ClassLabel, "label", where), where)
    if not isinstance(table.features[image], datasets.Image):
        raise PerdureError(f"{where}: the column '{image}' holds no pictures, but {table.features[image]}.")
    kept = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return [
        Row(Cell(kept, image, number, where), f"{side}/{number}", name, side, caption)
        for number, (name, caption) in enumerate(zip(labels, texts, strict=True))
    ]


def column(table: Any, asked: str, kind: type, role: str, where: str) -> str:
    """The column of a type, or that which was asked for. ``PerdureError`` where it is not clear which is meant."""
    known = table.features
    if asked:
        if asked not in known:
            raise PerdureError(f"{where} has no column '{asked}'.{nearest(asked, known)} Columns: {', '.join(known)}.")
        return asked
    fitting = [name for name, feature in known.items() if isinstance(feature, kind)]
    if len(fitting) != 1:
        many = f"several columns of the type {kind.__name__}: {', '.join(fitting)}"
        none = f"no column of the type {kind.__name__}. Columns: {', '.join(known)}"
        raise PerdureError(f"{where} has {many if fitting else none}. Say which one to take with --{role}-key.")
    return fitting[0]


def labels_of(table: Any, label: str, where: str) -> list[str]:
    """The classes of all rows as words, or as the numbers that they are."""
    feature, values = table.features[label], list(table[label])
    if not all(isinstance(value, str | int) and not isinstance(value, bool) for value in values if value is not None):
        raise PerdureError(f"{where}: the column '{label}' holds no classes, but {feature}.")
    lacking = [number for number, value in enumerate(values) if value is None or value in (-1, "")]
    if lacking:
        raise PerdureError(
            f"{where}: {len(lacking)} of {len(values)} rows have no class under '{label}', row {lacking[0]} the first. "
            "Leave out what has none: table.filter(…)."
        )
    names = getattr(feature, "names", None)
    if names and not all(0 <= value < len(names) for value in values):
        raise PerdureError(f"{where}: labels must lie in 0 … {len(names) - 1}, these go up to {max(values)}.")
    return [names[value] if names else str(value).strip() for value in values]


def place_of(what: str, base: Path) -> tuple[str, str]:
    """Where a data set is, seen from a folder, and what it is called."""
    if what.startswith(HUB):
        return what, what.removeprefix(HUB).replace("/", "-").replace(":", "-")
    place = (base / expanded(what)).resolve()
    if not place.is_dir() or not is_saved(place):
        raise PerdureError(
            f"{place} is no folder that save_to_disk wrote. Of a data set of the Hub write {HUB}user/name."
        )
    return str(place), place.name
