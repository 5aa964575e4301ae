"""Errors a user can cause. The command line prints them and exits with 2; nothing else is swallowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PerdureError(Exception):
    """Something the user can put right. The message says what was given, what is allowed and what to do next."""


class DamagedFile(PerdureError):
    """A file of a run or of the package is missing, cut short or altered."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'finetune'?`` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> PerdureError:
    """The error for a name that is not among the known ones."""
    names = sorted(known)
    return PerdureError(f"There is no {kind} '{name}'.{nearest(name, names)} Known: {', '.join(names)}.")
