"""What is looked at before an uploaded picture is decoded: its kind and its size, which stand in its first bytes."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from perdure.data.opening import UNREADABLE, LongTexts
from perdure.data.places import InMemory
from perdure.serve.limits import Limits

# Kinds that are nothing but pixels. Others that Pillow opens are handed to programs (PostScript) or are seldom pictures.
KINDS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def trouble(picture: InMemory, limits: Limits) -> str:
    """Why a picture is not decoded, in words; empty: nothing speaks against it."""
    Image.init()
    kinds = [kind for kind in KINDS if kind in Image.OPEN]  # Pillow may be built without one
    try:
        with LongTexts(), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(io.BytesIO(picture.data), formats=kinds) as opened:
                wide, tall = opened.size
    except Image.DecompressionBombError:
        return f"{picture} has far more than {limits.pixels:,} pixels, which are allowed. Make it smaller."
    except UNREADABLE:
        return f"{picture} is no picture that can be read. Give one of these kinds: {', '.join(kinds)}."
    if wide * tall > limits.pixels:
        return f"{picture} has {wide:,} × {tall:,} pixels; allowed are {limits.pixels:,} in all. Make it smaller."
    if max(wide, tall) > limits.slender * min(wide, tall):
        return (
            f"{picture} has {wide:,} × {tall:,} pixels: one side is more than {limits.slender} times the other. Cut it."
        )
    return ""
