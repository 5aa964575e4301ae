"""Matplotlib figures as inline SVG whose colours are the page's CSS variables.

The charts then follow light and dark without a script, print sharply and need nothing from outside the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from perdure.report.palette import LIGHT_SERIES

_NAMES = ("ink", "quiet", "rule", "ground", "reference", *(f"series-{i}" for i in range(len(LIGHT_SERIES))))
# Matplotlib knows no CSS variables: every name gets a colour that nothing else uses, and is put back afterwards.
_STAND_IN = {name: f"#0000{place + 16:02x}" for place, name in enumerate(_NAMES)}
_NAMED = {colour: name for name, colour in _STAND_IN.items()}
_REFERENCE = re.compile(r"#([A-Za-z][\w.-]*)(?=\)|$)")


def colour(name: str) -> str:
    """The stand-in, for matplotlib, of the page's colour `name`. Raises KeyError for a name the page lacks."""
    return _STAND_IN[name]


@contextmanager
def settings() -> Iterator[None]:
    """Matplotlib settings for drawing and saving: text stays text, `$` stays `$`, ids are the same every time."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "perdure", "text.parse_math": False}):
        yield


def inline(figure: Figure, name: str, label: str, tips: Mapping[str, str] | None = None) -> str:
    """The figure as an `<svg>` element for an HTML page; its texts are escaped.

    name: unique in the page, prefixes the ids. label: what the chart shows, for those who cannot see it.
    tips: text shown over an artist, by the artist's gid.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        _clean(element)
    _add_tips(root, tips or {})
    _rename(root, name)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib.update({"class": "chart", "role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element) -> None:
    element.tag = element.tag.rsplit("}", 1)[-1]
    for child in list(element):
        # The style sheet that matplotlib writes would apply to the whole page; the page has its own.
        if child.tag.endswith("}metadata") or child.find("{http://www.w3.org/2000/svg}style") is not None:
            element.remove(child)
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        value = re.sub(r"#0000[0-9a-f]{2}", lambda hit: _variable(hit.group()), value)
        if key == "style":
            value = re.sub(r"\bfont(-size|-family|-weight)?:[^;]*;?\s*", "", value)
        element.attrib[key.rsplit("}", 1)[-1]] = value


def _variable(stand_in: str) -> str:
    return f"var(--{_NAMED[stand_in]})" if stand_in in _NAMED else stand_in


def _add_tips(root: ElementTree.Element, tips: Mapping[str, str]) -> None:
    for element in root.iter("g"):
        text = tips.get(element.get("id", ""))
        if text is not None:
            title = ElementTree.Element("title")
            title.text = text
            element.insert(0, title)


def _rename(root: ElementTree.Element, name: str) -> None:
    # Several charts share one page, so ids must differ between them; those that nothing refers to are dropped.
    used: set[str] = set()
    for element in root.iter():
        for key in ("href", "clip-path"):
            if key in element.attrib:
                used.update(_REFERENCE.findall(element.attrib[key]))
                element.attrib[key] = _REFERENCE.sub(rf"#{name}-\1", element.attrib[key])
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in used:
            element.attrib["id"] = f"{name}-{own}"
