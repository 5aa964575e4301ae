"""What the command line prints on, whatever it is: narrow, piped, or of an encoding that lacks arrows."""

from __future__ import annotations

import codecs
import io
import sys
import warnings
from typing import TYPE_CHECKING, Any

from perdure.core import processes

if TYPE_CHECKING:
    from rich.console import Console

PLAIN = {
    "→": "->", "–": "-", "—": "-", "−": "-", "…": "...", "·": "-", "±": "+-", "×": "x", "≤": "<=", "≥": ">=", "“": '"',
    "”": '"', "‘": "'", "’": "'", "•": "*", "━": "-", "╸": "-", "╺": "-", "√": "sqrt", "λ": "lambda", "θ": "theta", "Σ": "sum",
    "δ": "delta", "τ": "tau", "β": "beta", "α": "alpha",
}  # fmt: skip


def plain_characters() -> None:
    """Let everything be printed anywhere: what the terminal's or the file's encoding lacks is written in plain characters."""

    def instead(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        lacking = error.object[error.start : error.end]
        return "".join(PLAIN.get(c, "?") for c in lacking), error.end

    codecs.register_error("perdure.plain", instead)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="perdure.plain")


FOR_PROGRAMMERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)


def plain_warnings() -> None:
    """Let warnings of Python be one line for a person, not a place in the source."""

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if not issubclass(category, FOR_PROGRAMMERS):
            print(f"Warning: {message}", file=sys.stderr)

    warnings.showwarning = show  # type: ignore[assignment]


def console() -> Console:
    """Where the command line prints; what goes into a file or a pipe is not broken at 80 columns."""
    from rich.console import Console

    quiet = not processes.main()  # of processes that share a run one speaks
    screen = Console(quiet=quiet)
    return screen if screen.is_terminal else Console(width=140, quiet=quiet)
