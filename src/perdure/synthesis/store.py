"""Image-text pairs on disk: one PNG an image, a manifest in JSON lines, and what they were made for.

    store.json        generator, settings, stream, vocabulary
    manifest.jsonl    {"prompt", "seed", "file", "sha256"} an image; file null: it came back black, and is left out
    images/a1b2….png

A line is written after its image is safe on disk, so the manifest never names a half image; where writing was cut off,
drawing goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.pixels import resized
from perdure.core.state import digest, inside, read_bytes, read_json, sync_folder, write_bytes, write_json
from perdure.data.task import silent
from perdure.synthesis.prompts import Request

COLLECTED = "collected"


@dataclass(frozen=True)
class Pairs:
    """Images (N, 3, S, S) uint8 with the prompt of each."""

    images: Tensor
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Entry:
    """A line of the manifest."""

    prompt: str
    seed: int
    file: str | None
    sha256: str

    @property
    def request(self) -> Request:
        return Request(self.prompt, self.seed)


class Store:
    """A folder of pairs that were drawn with certain settings for a certain stream.

    ``made_for`` is what must agree for its images to be the ones that are wanted; a folder made for anything else is refused,
    naming what differs. ``former``: what earlier versions noted in place of some of it, which is taken with a word.
    """

    def __init__(
        self, folder: Path, made_for: Mapping[str, Any], warn: Callable[[str], None] = silent,
        former: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.folder, self.made_for, self.warn, self.former = folder, dict(made_for), warn, dict(former or {})
        self.entries: dict[Request, Entry] = {}
        about = folder / "store.json"
        if about.exists():
            self.agree(read_json(about))
            self.read_manifest()
        elif folder.exists() and any(p for p in folder.iterdir() if not p.name.startswith(".")):
            raise PerdureError(f"{folder} exists and holds no image-text pairs of perdure. Choose another folder.")

    def agree(self, kept: Any) -> None:
        """Refuse a store whose images are not the ones that are wanted."""
        if not isinstance(kept, dict):
            raise DamagedFile(f"{self.folder / 'store.json'} is damaged: it should hold one object.")
        differs = [
            f"{key}: {kept.get(key)!r}, wanted {value!r}"
            for key, value in self.made_for.items()
            if kept.get(key) not in (value, self.former.get(key, value))
        ]
        if differs:
            raise PerdureError(
                f"The pairs in {self.folder} were made for something else ({'; '.join(differs)}). "
                "Choose another folder with pairs=DIR, or delete this one."
            )
        if old := [key for key in self.former if kept.get(key) != self.made_for[key]]:
            self.warn(
                f"The pairs in {self.folder} are an earlier version's, which noted less of their {old[0]} than is known now; "
                "it is taken for the same."
            )

    def read_manifest(self) -> None:
        """Take in every whole line; later lines replace earlier ones of the same request."""
        path = self.folder / "manifest.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut off while it was written
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):
                self.warn(f"{path}, line {number}, is damaged; its image will be drawn again.")
                continue
            self.entries[entry.request] = entry

    # ---- writing

    def open(self) -> None:
        """Make the folder, and cut off a half line that an interruption left."""
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        if not (self.folder / "store.json").exists():
            write_json(self.folder / "store.json", self.made_for)
        else:
            self.agree(read_json(self.folder / "store.json"))  # another process may have made it since
        manifest = self.folder / "manifest.jsonl"
        if manifest.exists():
            whole = manifest.read_bytes().rpartition(b"\n")
            if whole[2]:
                os.truncate(manifest, len(whole[0]) + len(whole[1]))

    def add(self, drawn: Sequence[tuple[Request, Tensor]]) -> None:
        """Keep images, (3, H, W) uint8 each: first the files, then their lines."""
        entries = [self.keep(request, image) for request, image in drawn]
        lines = "".join(json.dumps(vars(e), ensure_ascii=False) + "\n" for e in entries)
        with open(self.folder / "manifest.jsonl", "ab") as manifest:
            manifest.write(lines.encode())
            manifest.flush()
            os.fsync(manifest.fileno())
        sync_folder(self.folder)
        self.entries.update({e.request: e for e in entries})

    def keep(self, request: Request, image: Tensor) -> Entry:
        if not image.any():  # a safety filter blacks out what it rejects
            return Entry(request.prompt, request.seed, None, "")
        name = f"images/{hashlib.sha256(f'{request.seed} {request.prompt}'.encode()).hexdigest()[:20]}.png"
        data = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, "png")
        return Entry(request.prompt, request.seed, name, write_bytes(self.folder / name, data.getvalue()))

    # ---- reading

    def missing(self, wanted: Sequence[Request]) -> list[Request]:
        """The requests whose image was never drawn, each once."""
        return [r for r in dict.fromkeys(wanted) if r not in self.entries]

    def damaged(self, wanted: Sequence[Request]) -> list[Entry]:
        """The entries among ``wanted`` whose image is not the one that was written."""
        found = []
        for request in dict.fromkeys(wanted):
            entry = self.entries.get(request)
            if entry is not None and entry.file is not None:
                try:
                    read_bytes(inside(self.folder, entry.file), entry.sha256)
                except DamagedFile:
                    found.append(entry)
        return found

    def black(self, wanted: Sequence[Request]) -> int:
        """How many of ``wanted`` came back black."""
        return sum(r in self.entries and self.entries[r].file is None for r in wanted)

    def read(self, wanted: Sequence[Request], size: int) -> Pairs:
        """The pairs that were drawn and are not black, resized and cropped to (size, size) as for evaluation.

        Raises ``PerdureError`` where none is left, ``DamagedFile`` where an image is not the one that was written.
        """
        entries = [self.entries[r] for r in wanted if r in self.entries and self.entries[r].file is not None]
        if not entries:
            black = self.black(wanted)
            raise PerdureError(
                f"There is no usable image-text pair in {self.folder}: of {len(wanted)} that were asked for, {black} came "
                "back black. Use another generator or other prompts (see: perdure generate --help)."
            )
        images = [self.image(entry, size) for entry in entries]
        return Pairs(torch.stack(images), [e.prompt for e in entries])

    def image(self, entry: Entry, size: int) -> Tensor:
        """One image, (3, size, size) uint8."""
        assert entry.file is not None
        with Image.open(io.BytesIO(read_bytes(inside(self.folder, entry.file), entry.sha256))) as picture:
            pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)
        if pixels.shape[-2:] == (size, size):
            return pixels
        return (resized(pixels[None].float() / 255, size)[0] * 255).round().to(torch.uint8)


def collect(folder: Path, images: Tensor, captions: Sequence[str], source: str) -> Store:
    """Make a store of images that exist, (N, 3, H, W) uint8, with a caption each: replay then takes its pairs from there."""
    store = Store(folder, {"kind": COLLECTED, "source": source})
    store.open()
    wanted = [Request(caption, number) for number, caption in enumerate(captions)]
    missing = set(store.missing(wanted))
    store.add([(r, image) for r, image in zip(wanted, images, strict=True) if r in missing])
    return store


def seal(prompts: Sequence[str]) -> str:
    """A short digest of a list of prompts."""
    return digest("\n".join(prompts).encode())[:16]
