"""Where a picture's bytes lie: in a file of its own, inside a plain tar, in a row of a table, or in memory."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from perdure.core.errors import DamagedFile

BLOCK = 512  # bytes: what a tar is made of


@dataclass(frozen=True)
class Place:
    """A file inside a tar that is not compressed, read where it lies: nothing is unpacked, any number of threads may read."""

    archive: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def read_bytes(self) -> bytes:
        """The file. ``OSError`` where the archive has become shorter."""
        with self.archive.open("rb") as archive:
            archive.seek(self.offset)
            data = archive.read(self.size)
        if len(data) < self.size:
            raise OSError("the archive ends within it")
        return data


@dataclass(frozen=True)
class Cell:
    """An encoded picture in a row of a ``datasets`` table whose ``column`` is not decoded."""

    rows: Any
    column: str
    number: int
    where: str

    def __str__(self) -> str:
        return f"{self.where}, row {self.number}"

    @property
    def suffix(self) -> str:
        return ""  # not known before the row is read

    def read_bytes(self) -> bytes:
        """The picture. ``OSError`` where the row holds none."""
        held = self.rows[self.number][self.column]
        if not held or (held["bytes"] is None and not held["path"]):
            raise OSError("the row holds no picture")
        return held["bytes"] if held["bytes"] is not None else Path(held["path"]).read_bytes()


@dataclass(frozen=True)
class InMemory:
    """An encoded picture that somebody handed over; its name is what they call it, and no path."""

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def read_bytes(self) -> bytes:
        return self.data


Source = Path | Place | Cell | InMemory


def readable(source: Source) -> Path | io.BytesIO:
    """What Pillow opens."""
    return source if isinstance(source, Path) else io.BytesIO(source.read_bytes())


def mark(source: Source) -> str:
    """The sha256 of a picture's bytes, worked out again only where the file that holds them has changed."""
    if isinstance(source, Cell | InMemory):
        return hashlib.sha256(source.read_bytes()).hexdigest()
    about = (source.archive if isinstance(source, Place) else source).stat()
    return mark_of(source, about.st_mtime_ns, about.st_size)


@cache
def mark_of(source: Path | Place, changed: int, size: int) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


def index(archive: Path) -> list[Place]:
    """The files in a plain tar, in its order. ``DamagedFile`` for one that is cut short, damaged, compressed or no tar, and for
    a name that is in it twice. Only heads are read, and the end."""
    found: dict[str, Place] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if not member.isreg() or member.issparse():
                    continue  # folders, links: they hold no bytes of their own
                if member.name in found:
                    raise DamagedFile(f"{archive} holds {member.name} twice. Pack it again.")
                found[member.name] = Place(archive, member.offset_data, member.size, member.name)
            end = tar.offset
        with archive.open("rb") as file:
            file.seek(end)
            whole = file.read(BLOCK) == bytes(BLOCK)  # where the files end there are blocks of noughts
    except tarfile.TarError as error:
        raise DamagedFile(
            f"{archive} is no tar that can be read in place ({error}): it is cut short, damaged or compressed. Copy it anew; "
            "unpack a compressed one with gunzip."
        ) from None
    if not whole:
        raise DamagedFile(
            f"{archive} is cut short or damaged after {len(found)} files: it lacks the mark that ends a tar. Copy it anew."
        )
    return list(found.values())
