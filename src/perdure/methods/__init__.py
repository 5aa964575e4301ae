"""Floor 3: one paper, one file. Every module in this folder registers itself when ``load_all`` imports it."""

from __future__ import annotations

import importlib
import pkgutil


def load_all() -> None:
    """Import every method, so that the registry knows them."""
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{module}")
