"""Paths as people type them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """``path`` with ``~`` as the home folder; a name like ``~nobody`` that is nobody's home stays as it is."""
    return Path(os.path.expanduser(path))
