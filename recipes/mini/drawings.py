"""Render every drawing whose licence allows it to 32x32 RGBA, and turn its name into a caption.

Reads the unpacked ``@iconify/json`` package; writes ``drawings.npy`` (N, 32, 32, 4, uint8) and ``drawings.jsonl``
(one line a drawing: set, name, family, licence, palette, caption). Exact duplicates and skin-tone variants are dropped.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

SIZE = 32
LICENCES = {"MIT", "Apache-2.0", "ISC", "CC0-1.0", "CC-BY-4.0", "OFL-1.1", "BSD-3-Clause", "Unlicense"}
# Logo and brand sets, programming-language marks, animations: not drawings of things.
SKIP_CATEGORIES = {"Logos", "Programming"}
SKIP_SETS = set(
    (
        "fa-brands fa6-brands fa7-brands svg-spinners ls academicons line-md meteocons thesvg thesvg-color selfhst"
    ).split()
)
# Sets by the same hand, or derived from one another: one family, never split between roles.
FAMILIES = {
    "fontawesome": "fa fa-regular fa-solid fa6-regular fa6-solid fa7-regular fa7-solid la",
    "google": "ic material-symbols material-symbols-light mdi mdi-light zmdi memory",
    "boxicons": "bx bxs boxicons",
    "ionic": "ion famicons",
    "hero": "heroicons heroicons-outline heroicons-solid sidekickicons",
    "feather": "feather fe lucide lucide-lab vadivam keyline-icons mynaui tabler iconmind",
    "iconpark": "icon-park icon-park-outline icon-park-solid icon-park-twotone",
    "fluent": "fluent fluent-color fluent-mdl2",
    "unicons": "uil uim uis uit",
    "pepicons": "pepicons pepicons-pencil pepicons-pop pepicons-print",
    "glyphs": "glyphs glyphs-poly",
    "icons8": "icons8 wpf flat-color-icons",
    "mono": "mi mono-icons",
    "streamline": "streamline streamline-color streamline-block",
    "streamline-flex": "streamline-flex streamline-flex-color",
    "streamline-plump": "streamline-plump streamline-plump-color",
    "streamline-sharp": "streamline-sharp streamline-sharp-color",
    "streamline-ultimate": "streamline-ultimate streamline-ultimate-color",
    "streamline-cyber": "streamline-cyber streamline-cyber-color",
    "streamline-freehand": "streamline-freehand streamline-freehand-color",
    "emojione": "emojione emojione-monotone",
    "noto": "noto noto-v1",
    "fluent-emoji": "fluent-emoji fluent-emoji-flat fluent-emoji-high-contrast",
    "oui": "ooui oui",
}
FAMILY_OF = {name: family for family, names in FAMILIES.items() for name in names.split()}

STYLE_WORDS = set(
    (
        "outline outlined outlines line linear filled fill solid bold thin light regular duotone duo twotone "
        "two-tone round rounded sharp baseline broken remix flat stroke stroked straight simple alt alternate "
        "color colour mini micro small large big medium variant bolded v1 v2 v3 12px 16px 20px 24px 28px 32px "
        "48px rtl ltr ol o s l xl sm lg md new fit basic"
    ).split()
)
NOT_STYLE_AFTER = set("traffic bulb flash day night moon sun red head tail street lamp beam high low".split())
ICON_PREFIXES = {"i", "ic", "icon", "outline", "baseline", "round", "sharp", "twotone", "bxs", "bx"}
NUMBERS = "zero one two three four five six seven eight nine ten".split()
NUMBER_WORDS = {str(i): word for i, word in enumerate(NUMBERS)}


def caption_of(name: str, prefixes: list[str], suffixes: list[str]) -> str:
    """``arrow-left-circle-bold`` → ``arrow left circle``: style words, sizes and counters dropped."""
    for prefix in prefixes:
        if name.startswith(prefix + "-"):
            name = name[len(prefix) + 1 :]
            break
    for suffix in suffixes:
        if name.endswith("-" + suffix) and len(name) > len(suffix) + 1:
            name = name[: -len(suffix) - 1]
            break
    words = [w for w in re.split(r"[-_ ]+", name.lower()) if w]
    while len(words) > 1:
        lit = len(words) == 2 and words[0] in NOT_STYLE_AFTER
        if (words[-1] in STYLE_WORDS and not lit) or re.fullmatch(r"0?\d{1,2}", words[-1]):
            words.pop()
        else:
            break
    while len(words) > 1 and words[0] in ICON_PREFIXES:
        words.pop(0)
    if words and re.fullmatch(r"[a-z]{3,}\d{1,2}", words[-1]):
        words[-1] = re.sub(r"\d+$", "", words[-1])
    out: list[str] = []
    for word in (NUMBER_WORDS.get(w, w) for w in words):
        if not (word in out and len(words) > 3):
            out.append(word)
    return " ".join(out[:7])


def render(job: tuple[str, float, float, float, float]) -> np.ndarray | None:
    """One SVG body to (32, 32, 4) uint8, or None where it is animated, needs a font, or shows next to nothing."""
    body, left, top, width, height = job
    if any(tag in body for tag in ("<animate", "<set ", "<text", "<image")):
        return None
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{box}" color="black">{body}</svg>'
    )
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    except ValueError:  # a malformed path: resvg says so
        return None
    image = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    return image if image.shape == (SIZE, SIZE, 4) and (image[..., 3] > 32).sum() >= 12 else None


def accepted_sets(package: Path) -> dict[str, dict[str, Any]]:
    """The sets that may be used, with what collections.json says of each."""
    sets = json.loads((package / "collections.json").read_text())
    return {
        name: info
        for name, info in sorted(sets.items())
        if info["license"].get("spdx") in LICENCES
        and info.get("category") not in SKIP_CATEGORIES
        and name not in SKIP_SETS
    }


def is_skin_variant(set_name: str, name: str) -> bool:
    tone = re.search(r"-(medium-light|medium-dark|medium|dark|light)$", name)
    return "skin" in name or (set_name.startswith("fluent-emoji") and tone is not None)


def jobs(package: Path) -> Iterator[tuple[dict[str, Any], tuple[str, float, float, float, float]]]:
    """Every drawing that may be used: its row, and what ``render`` takes."""
    for set_name, info in accepted_sets(package).items():
        data = json.loads((package / "json" / f"{set_name}.json").read_text())
        prefixes, suffixes = (
            sorted((a for a in data.get(key) or {} if a), key=lambda a: (-len(a), a))
            for key in ("prefixes", "suffixes")
        )
        for name, icon in sorted(data["icons"].items()):
            if icon.get("hidden") or is_skin_variant(set_name, name):
                continue
            row = dict(
                set=set_name, name=name, family=FAMILY_OF.get(set_name, set_name), licence=info["license"]["spdx"],
                palette=bool(info.get("palette")), caption=caption_of(name, prefixes, suffixes),
            )  # fmt: skip
            sizes = (icon.get(k, data.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16)))
            yield row, (icon["body"], *sizes)  # type: ignore[misc]


def main(package: Path, out: Path) -> None:
    rows, bodies = zip(*jobs(package), strict=True)
    print(f"{len(bodies):,} drawings in {len({r['set'] for r in rows})} sets may be used; rendering", flush=True)
    with Pool() as pool:
        images = pool.map(render, bodies, chunksize=256)
    seen: set[str] = set()
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    for index, image in enumerate(images):
        if image is None:
            dropped["cannot be drawn"] += 1
            continue
        digest = hashlib.md5((image >> 4).tobytes()).hexdigest()
        if digest in seen:
            dropped["exact duplicate"] += 1
            continue
        seen.add(digest)
        kept.append(index)
    np.save(out / "drawings.npy", np.stack([images[i] for i in kept]))
    beside = out / "drawings.jsonl.writing"
    beside.write_text("".join(json.dumps(rows[i]) + "\n" for i in kept))
    beside.rename(out / "drawings.jsonl")  # last: its presence says that rendering is done
    captions = {rows[i]["caption"] for i in kept}
    print(f"kept {len(kept):,} drawings with {len(captions):,} captions; dropped {dict(dropped)}", flush=True)
