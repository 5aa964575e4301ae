"""safetensors files written and read a tensor at a time: neither costs a second copy of what they hold.

A file is 8 bytes (the header's length, little-endian), a JSON header (names, types, shapes, places) padded with spaces to a
multiple of 8, and the tensors' bytes one after another: the larger types first, then by name, as the safetensors library does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.state import read_json, write_through

PIECE = 1 << 22  # bytes hashed at a time
# In the library's order: larger types first, so that all lie where their size divides their place.
TYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
KINDS = {word: kind for kind, word in TYPES.items()}
RANK = {kind: rank for rank, kind in enumerate(TYPES)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Write a safetensors file, byte by byte what the library would write, so that ``path`` holds the old content or all of
    the new; return its sha256 and its size. Tensors may lie anywhere and share their memory; one at a time is looked at.

    ``PerdureError`` for a type that the format has not.
    """
    names, header = laid_out(tensors)
    whole, size = hashlib.sha256(header), len(header)
    with write_through(path) as file:
        file.write(header)
        for name in names:
            here = tensors[name].detach().cpu().contiguous()
            data = here.reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            whole.update(data)
            size += len(data)
    return whole.hexdigest(), size


def laid_out(tensors: Mapping[str, Tensor]) -> tuple[list[str], bytes]:
    """The order in which tensors stand in a file, and the file's header with its length before it."""
    about: dict[str, tuple[torch.dtype, list[int], int]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPES:
            raise PerdureError(f"The tensor '{name}' is of {tensor.dtype}, which a safetensors file cannot hold.")
        about[name] = tensor.dtype, list(tensor.shape), tensor.numel() * tensor.element_size()
    names = sorted(about, key=lambda name: (RANK[about[name][0]], name))
    told, at = {}, 0
    for name in names:
        kind, shape, size = about[name]
        told[name] = {"dtype": TYPES[kind], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return names, len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """What the safetensors library raises where the system refuses something is said as the system says it."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if not found:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from None


class Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read into memory of its own when it is asked for; the file must stay as it is.

    ``DamagedFile`` where it is missing, or its header is none.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = open(path, "rb")  # noqa: SIM115 (open as long as this is)
        except FileNotFoundError:
            raise DamagedFile(f"{path} is missing{let_go(path)}.") from None
        room = os.fstat(self.file.fileno()).st_size - 8
        length = int.from_bytes(self.file.read(8), "little")
        try:
            self.head = self.file.read(length) if length <= room else b""
            about = json.loads(self.head)
            about.pop("__metadata__", None)
            self.about = {name: place(one, room - length) for name, one in about.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedFile(
                f"{path} is damaged: it is cut short, or has not the header of a safetensors file."
            ) from None
        self.begin = 8 + length

    def __getitem__(self, name: str) -> Tensor:
        kind, shape, begin, end = self.about[name]
        self.file.seek(self.begin + begin)
        tensor = torch.empty(shape, dtype=kind)
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        if self.file.readinto(data) != end - begin:
            raise DamagedFile(f"{self.path} is damaged: it ends too early.")
        return tensor

    def __deepcopy__(self, memo: Any) -> Stored:
        return self  # nothing of it can change

    def shape(self, name: str) -> tuple[torch.dtype, list[int]]:
        """A tensor's type and shape; nothing is read for it."""
        return self.about[name][:2]

    def __iter__(self) -> Iterator[str]:
        return iter(self.about)

    def __len__(self) -> int:
        return len(self.about)


def place(about: Mapping[str, Any], room: int) -> tuple[torch.dtype, list[int], int, int]:
    """Type, shape and place of a tensor as a header has them; ``ValueError`` where they do not go together."""
    kind, shape, (begin, end) = KINDS[about["dtype"]], list(about["shape"]), about["data_offsets"]
    if not 0 <= begin <= end <= room or math.prod(shape) * kind.itemsize != end - begin:
        raise ValueError(about)
    return kind, shape, begin, end


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose sha256 is known; ``DamagedFile`` if it is missing or another."""
    stored = Stored(path)
    with stored.file:
        whole = hashlib.sha256((stored.begin - 8).to_bytes(8, "little") + stored.head)
        found = {}
        for name in sorted(stored, key=lambda name: stored.about[name][2:]):
            found[name] = stored[name]
            whole.update(found[name].reshape(-1).view(torch.uint8).numpy().data)
        whole.update(stored.file.read())
    if whole.hexdigest() != sha256:
        raise DamagedFile(f"{path} is damaged: its checksum is not the one recorded when it was written.")
    return found


def stored(path: Path, sha256: str) -> Stored:
    """As ``read_tensors``, but each tensor is read when it is asked for; the checksum is taken now."""
    found, whole = Stored(path), hashlib.sha256()
    found.file.seek(0)
    while piece := found.file.read(PIECE):
        whole.update(piece)
    if whole.hexdigest() != sha256:
        raise DamagedFile(f"{path} is damaged: its checksum is not the one recorded when it was written.")
    return found


class Onto(Mapping[str, Tensor]):
    """Tensors of a file, each brought to a device when it is asked for."""

    def __init__(self, file: Mapping[str, Tensor], device: torch.device):
        self.file, self.device = file, device

    def __getitem__(self, name: str) -> Tensor:
        return self.file[name].to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)

    def __len__(self) -> int:
        return len(self.file)


REMOVED = "removed.json"  # in a folder: which of its files were removed on purpose, and why


def let_go(path: Path) -> str:
    """Why a file is missing, where it was removed on purpose, as the end of a sentence; else nothing."""
    marked = path.parent / REMOVED
    known = read_json(marked) if marked.exists() else {}
    return f": {known['why']}" if path.name in known.get("files", []) else ""
