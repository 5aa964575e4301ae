"""Folders of pictures listed: sorted, without what programs leave in them, and whatever is left out is said."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from perdure.core.errors import PerdureError
from perdure.data.places import Source

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pnm", ".jp2", ".avif")
LISTS = (".txt", ".csv", ".json", ".jsonl", ".xml", ".md", ".db", ".ini", ".mat")  # what lies beside pictures


def pictures(folder: Path) -> list[Path]:
    """The image files below a folder, sorted, hidden ones not; what else is left out is said. ``PerdureError`` for none."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not hidden(p.relative_to(folder)))
    found = [p for p in files if p.suffix.lower() in PICTURES]
    odd = [p for p in files if p.suffix.lower() not in (*PICTURES, *LISTS)]
    if not found:
        more = f" ({len(files)} other files, {files[0].name} among them)" if files else ""
        raise PerdureError(f"{folder} holds no picture{more}. Pictures end in {', '.join(PICTURES)}.")
    if odd:
        warnings.warn(
            f"{folder}: {len(odd)} files are no pictures by their names and are left out: {odd[0].name}, …",
            stacklevel=2,
        )
    return found


def hidden(path: Path) -> bool:
    """Whether a path is one that programs keep beside people's files: ``._0.png``, ``.ipynb_checkpoints/…``."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def folders(base: Path) -> list[str]:
    """The names of the folders in a folder, sorted, hidden ones not."""
    return sorted(p.name for p in base.iterdir() if p.is_dir() and not hidden(Path(p.name)))


def say_odd_kinds(base: Path | str, names: Sequence[str], listed: Sequence[tuple[Source, int]]) -> None:
    """Say which classes come in another kind of file than most: a model may learn the kind in place of the class."""
    kinds: list[set[str]] = [set() for _ in names]
    for path, label in listed:
        kinds[label].add(path.suffix.lower().replace(".jpeg", ".jpg").replace(".tiff", ".tif"))
    usual = Counter(kind for own in kinds for kind in own).most_common(1)[0][0]
    odd = [f"{name} ({', '.join(sorted(own))})" for name, own in zip(names, kinds, strict=True) if usual not in own]
    if odd:
        warnings.warn(
            f"{base}: most classes are {usual} files, but not {', '.join(odd)}. They are read (of several frames the first), "
            "but a model may learn the kind of file in place of the class.",
            stacklevel=2,
        )
