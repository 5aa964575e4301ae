"""The one page: it holds its script and its style, and asks nobody but this server."""

from __future__ import annotations

import secrets
from pathlib import Path

import jinja2

from perdure import __version__
from perdure.serve.course import Entry, classes, probe
from perdure.serve.limits import MB, Limits

TEMPLATE = Path(__file__).with_name("page.html.j2")
# Nothing from elsewhere, no script or style but the page's own, pictures that were chosen, no frames around it.
POLICY = (
    "default-src 'self'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def rendered(entries: list[Entry], state: str, method: str, limits: Limits) -> tuple[str, str]:
    """The page and its Content-Security-Policy, with a nonce of its own each time."""
    nonce = secrets.token_urlsafe(16)
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.filters.update(percent=percent)
    page = engine.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        nonce=nonce, entries=entries, known=sum(one["state"] == "current" for one in entries), probe=probe(entries),
        state=state, method=method, classes=classes(entries), version=__version__,
        pictures=limits.pictures, upload=limits.upload, megabytes=f"{limits.upload / MB:g}",
    )  # fmt: skip
    return page, POLICY.format(nonce)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
