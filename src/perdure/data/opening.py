"""One picture opened as RGB, whatever kind of file it is, or said to be none."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from perdure.core.errors import DamagedFile
from perdure.data.places import Source, readable

# What Pillow raises for damaged files.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # modes of 16-bit grey pictures
OF_16_BITS = (
    "PNG",
    "PPM",
)  # kinds of files that Pillow may open as "I" though they have no more; in others that is 32 bits


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """A picture as RGB, the right way up. Of several frames the first; transparency is dropped, as image processors do; grey of
    16 bits keeps its range (processors cut it off at 255). ``DamagedFile`` for what cannot be read, and for grey of which
    nobody can say what is white."""
    try:
        with LongTexts(), Image.open(readable(source)) as picture:
            check_range(picture)
            ImageOps.exif_transpose(picture, in_place=True)
            picture.load()
            whole: Image.Image = picture
            if picture.mode in DEEP:
                whole = Image.fromarray((np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8))
            whole = whole if whole.mode == "RGB" else whole.convert("RGB")
    except UNREADABLE as error:
        why = "its first bytes are no picture's" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DamagedFile(f"{source} is no image that can be read: {why.rstrip('.')}.") from None
    yield whole  # outside: what goes wrong with a picture that was read is not the picture's fault


def check_range(picture: Image.Image) -> None:
    """Refuse floats and whole numbers of 32 bits: what is black and white in them no file says."""
    if picture.mode == "F" or picture.mode == "I" and picture.format not in OF_16_BITS:
        kind = "floats" if picture.mode == "F" else "numbers of 32 bits"
        raise ValueError(f"it holds {kind}, of which nobody knows what is white; save it with 8 or 16 bits a channel")


def looks_wrong(source: Source) -> bool:
    """Whether a picture is gone, none by its first bytes, or of a kind that is not read: nothing is decoded."""
    try:
        with LongTexts(), Image.open(readable(source)) as picture:
            check_range(picture)
            return False
    except UNREADABLE:
        return True


def trouble(source: Source) -> str:
    """What is wrong with a picture, which is decoded whole; empty: nothing."""
    try:
        with opened(source):
            return ""
    except DamagedFile as error:
        return str(error)


class LongTexts(contextlib.AbstractContextManager[None]):
    """Lets Pillow read sound PNGs that carry long notes: only their pixels are wanted. Its limits are put back when the
    last of several threads is done."""

    lock, inside, limits = threading.Lock(), 0, (0, 0)

    def __enter__(self) -> None:
        with self.lock:
            if not LongTexts.inside:
                LongTexts.limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
                PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 24
            LongTexts.inside += 1

    def __exit__(self, *failure: object) -> None:
        with self.lock:
            LongTexts.inside -= 1
            if not LongTexts.inside:
                PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = LongTexts.limits
