"""Files that survive: written beside and renamed, with a checksum; one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from perdure.core import processes
from perdure.core.errors import DamagedFile, PerdureError


def digest(data: bytes) -> str:
    """The sha256 of ``data``, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def write_through(path: Path) -> Iterator[BinaryIO]:
    """A file to write, so that ``path`` holds the old content or, once all is on the disk, all of the new; never a part."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> str:
    """Write ``data`` so that ``path`` holds the old content or all of the new, never a part. Returns the sha256."""
    with write_through(path) as file:
        file.write(data)
    return digest(data)


def sync_folder(folder: Path) -> None:
    """Have the system write down which files a folder holds: a rename must outlive a power cut."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # systems that do not open folders write renames down by themselves
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> str:
    """Write ``value`` as JSON (no NaN), atomically. Returns the sha256."""
    return write_bytes(path, as_json(value))


def as_json(value: Any) -> bytes:
    """``value`` as the JSON that ``write_json`` writes."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_json(path: Path) -> Any:
    """The content of a JSON file; ``DamagedFile`` if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedFile(f"{path} is damaged: {error}.") from None


def inside(folder: Path, path: str) -> Path:
    """A recorded path below ``folder``; ``DamagedFile`` for one that points elsewhere."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise DamagedFile(f"{folder} names a file outside itself: {path}.")
    return folder / path


def read_bytes(path: Path, sha256: str) -> bytes:
    """The content of a file whose sha256 is known; ``DamagedFile`` if it is missing or another."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing.") from None
    if digest(data) != sha256:
        raise DamagedFile(f"{path} is damaged: its checksum is not the one recorded when it was written.")
    return data


@contextlib.contextmanager
def only_one(folder: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a folder: a second process that writes to it is refused, or waits, once it has said so through ``wait``. The
    system frees a dead one's hold. Of processes that share a run the main one holds it, for all."""
    if not processes.main():
        yield
        return
    try:
        import fcntl
    except ImportError:  # no such lock on this system
        yield
        return
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise PerdureError(
                    f"{folder} is being written by another process. Wait for it, or stop it first."
                ) from None
            wait(f"{folder} is being written by another process; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
