"""Colours of the page and the figure: one sequential scale for accuracies, one colour and marker per run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# One hue from pale to deep, so that lightness alone carries the order (also without colour vision, also in print).
LIGHT_SCALE = ("#f3f7fa", "#d0e2ee", "#9dc4dc", "#5b99c0", "#28689a", "#0e3a5f")
# In the dark the order of lightness turns round: a high accuracy is bright, a low one sinks into the page.
DARK_SCALE = ("#18232d", "#1d3c53", "#26597b", "#3f86ad", "#83bdd6", "#d6edf4")

LIGHT_SERIES = ("#0b62a4", "#b84a00", "#14795a", "#84489b", "#8a6a00", "#a8295f", "#1d7f96", "#5a4fcf")
DARK_SERIES = ("#6bb1f0", "#f39a57", "#5dcaa0", "#c99ae2", "#dfbd4c", "#f184ac", "#6fcbe0", "#a9a2ff")
LIGHT_REFERENCE, DARK_REFERENCE = "#5d6873", "#a3aeb9"

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES: tuple[Any, ...] = ("-", (0, (6, 1.8)), (0, (2.2, 1.6)), (0, (6, 1.6, 1.5, 1.6)))


@dataclass(frozen=True)
class Style:
    """How the lines of one run are drawn: the name of a colour, a matplotlib dash pattern, a matplotlib marker."""

    colour: str
    dash: Any
    marker: str


def style(place: int, reference: bool) -> Style:
    """The style of the `place`-th run of its kind; references are grey so that they stay in the background."""
    if reference:
        return Style("reference", DASHES[1 + place % 3], ("d", "*", "h")[place % 3])
    return Style(f"series-{place % len(LIGHT_SERIES)}", DASHES[place % len(DASHES)], MARKERS[place % len(MARKERS)])


def light(colour: str) -> str:
    """The colour that a style's colour name stands for on a white ground, as `#rrggbb`."""
    return LIGHT_REFERENCE if colour == "reference" else LIGHT_SERIES[int(colour.rsplit("-", 1)[1])]


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def shade(value: float, scale: tuple[str, ...] = LIGHT_SCALE) -> str:
    """The colour, `#rrggbb`, of an accuracy in per cent; values outside 0 to 100 take the colour of the nearer end."""
    place = min(max(value, 0.0), 100.0) / 100 * (len(scale) - 1)
    left = min(int(place), len(scale) - 2)
    pairs = zip(_channels(scale[left]), _channels(scale[left + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - left)):02x}" for a, b in pairs)


def _luminance(colour: str) -> float:
    parts = [c / 255 for c in _channels(colour)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """The WCAG 2 contrast ratio of two `#rrggbb` colours, 1 to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def colours(value: float) -> str:
    """An accuracy in per cent as CSS variables: ground, ink and stripe in light (`--l`, `--li`, `--ls`) and dark."""
    parts = []
    for name, scale in (("l", LIGHT_SCALE), ("d", DARK_SCALE)):
        ground = shade(value, scale)
        parts += [f"--{name}:{ground}", f"--{name}i:{ink(ground)}", f"--{name}s:{_stripe(ground)}"]
    return ";".join(parts)


def _stripe(ground: str) -> str:
    # Stripes move the ground away from the ink, so that the text stays readable; only on the palest cells, where
    # white would not be seen, they go the other way, and there the contrast is far above what it needs.
    if ink(ground) == "#ffffff":
        return "rgb(0 0 0/.24)"
    return "rgb(0 0 0/.11)" if _luminance(ground) > 0.6 else "rgb(255 255 255/.2)"


def ink(ground: str) -> str:
    """Black or white, whichever reads better on `ground`; the contrast is never below 4.5 (AA)."""
    return max(("#000000", "#ffffff"), key=lambda text: contrast(text, ground))
