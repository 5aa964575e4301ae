"""Paths as people type them."""

from __future__ import annotations

import os
from pathlib import Path

from perdure.core.errors import PerdureError


def placed(text: str) -> str:
    """A path so that it means the same in another working directory; a word that names nothing there stays."""
    return str(expanded(text).resolve()) if text and expanded(text).exists() else text


def expanded(path: str | Path) -> Path:
    """``path`` with ``~`` as the home folder; a name like ``~nobody`` that is nobody's home stays as it is. ``PerdureError``
    where no file could be called so."""
    if "\0" in str(path):
        raise PerdureError(f"{str(path)!r} is no path: it holds a NUL character. Give it without.")
    return Path(os.path.expanduser(path))
