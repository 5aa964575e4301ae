"""Pictures in tars in WebDataset's form: what belongs together has one name up to the first dot.

``0001.jpg`` is a picture, ``0001.cls`` its class (a number or a name) or ``0001.json`` with the key ``label``, ``0001.txt`` a
text that it is trained with. The tars are read where they lie; nothing is unpacked.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from perdure.benchmarks.own.rows import Row
from perdure.core.errors import DamagedFile, PerdureError
from perdure.data.folders import PICTURES, hidden
from perdure.data.places import Place, index

COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
BESIDE = (".cls", ".json", ".txt")


def shards_of(folder: Path) -> list[Path]:
    """The tars in a folder, sorted. ``PerdureError`` for compressed ones, which cannot be read in place."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not hidden(Path(p.name)))
    packed = [p for p in files if p.name.lower().endswith(COMPRESSED)]
    if packed:
        raise PerdureError(
            f"{packed[0]} is compressed, so that no picture in it can be read by itself. Unpack it into a plain .tar (as "
            "with gunzip), or into folders."
        )
    return [p for p in files if p.suffix.lower() == ".tar"]


def shard_rows(shards: list[Path], base: Path, side: str) -> list[Row]:
    """The pictures of some tars. ``PerdureError`` for those that have neither class nor text."""
    rows, odd, unlabelled = list[Row](), list[str](), list[str]()
    for shard in shards:
        for key, parts in samples(shard).items():
            seen = [kind for kind in parts if kind in PICTURES]
            if len(seen) > 1:
                raise PerdureError(f"{shard}: {key} is several pictures ({', '.join(seen)}); there must be one.")
            odd += [str(place) for kind, place in parts.items() if not seen or kind not in (*seen, *BESIDE)]
            if not seen:
                continue
            picture, label = parts[seen[0]], label_of(parts)
            text = text_of(parts[".txt"]) if ".txt" in parts else ""
            if not label and not text:
                unlabelled.append(str(picture))
            name = f"{shard.relative_to(base).as_posix()}/{picture.name}"
            rows.append(Row(picture, name, label, side, text))
    if unlabelled:
        raise PerdureError(
            f"{len(unlabelled)} of {len(rows)} pictures have no class and no text, {unlabelled[0]} the first. Each needs a "
            ".cls, a .json with the key 'label', or a caption as .txt, under its own name."
        )
    if odd:
        warnings.warn(f"{len(odd)} files in tars belong to no picture and are left out: {odd[0]}, …", stacklevel=2)
    return rows


def samples(shard: Path) -> dict[str, dict[str, Place]]:
    """What belongs together in a tar, by name and by ending."""
    out: dict[str, dict[str, Place]] = {}
    for place in index(shard):
        folder, _, file = place.name.rpartition("/")
        if hidden(Path(place.name)):
            continue
        stem, _, ending = file.partition(".")
        out.setdefault(f"{folder}/{stem}", {})[f".{ending.lower()}"] = place
    return out


def label_of(parts: Mapping[str, Place]) -> str:
    """A picture's class as it is written; empty: there is none."""
    if ".cls" in parts:
        return text_of(parts[".cls"])
    if ".json" not in parts:
        return ""
    try:
        content = json.loads(text_of(parts[".json"]))
    except json.JSONDecodeError as error:
        raise DamagedFile(f"{parts['.json']} is damaged: {error}.") from None
    label = content.get("label") if isinstance(content, dict) else None
    return str(label).strip() if isinstance(label, str | int) and not isinstance(label, bool) else ""


def text_of(place: Place) -> str:
    """A small text in a tar."""
    try:
        return place.read_bytes().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{place} is no text: {error}.") from None
