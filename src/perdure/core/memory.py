"""What fits into memory."""

from __future__ import annotations

import psutil

from perdure.core.errors import PerdureError


def check_square(width: int, copies: int, what: str, key: str) -> None:
    """Refuse ``copies`` matrices (width, width) of fp64 that would not fit, before they are made. ``key``: the option."""
    need, there = copies * 8 * width**2, psutil.virtual_memory().available
    if need > there:
        most = int((there / (8 * copies)) ** 0.5)
        raise PerdureError(
            f"{what} of {width} features needs {in_words(need)} of memory, and {in_words(there)} are free. Set {key}={most} or "
            "less."
        )


def in_words(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
