"""Folders of real photographs, to try the guide on: ``PHOTOS/surfaces/CLASS/*`` and ``PHOTOS/things/CLASS/*``.

    pip install scikit-image
    python recipes/photographs.py photos

The photographs are those that come in scikit-image's package. No package under a free licence was found that brings many
labelled ones, so each class is **one photograph cut into tiles** of 64 pixels, none overlapping. Tiles of one photograph are
alike, so what is held out is easier than new photographs would be: this shows that all works, not how well it would work.
``LICENCES.txt`` beside the folders says whose the photographs are.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from PIL import Image

SIDE, MOST = 64, 40
# task, class, file, whose and under what, as scikit-image's documentation of each says
PHOTOGRAPHS = (
    ("surfaces", "brick", "brick.png", "CC0Textures, Bricks25; CC0 1.0"),
    ("surfaces", "grass", "grass.png", "DeviantArt, linolafett, Grass 01; CC0 1.0"),
    ("surfaces", "gravel", "gravel.png", "CC0Textures, Gravel04; CC0 1.0"),
    ("things", "cat", "chelsea.png", "Stefan van der Walt; CC0"),
    ("things", "cup of coffee", "coffee.png", "Rachel Michetti, courtesy of Pikolo Espresso Bar; CC0"),
    ("things", "coins", "coins.png", "Brooklyn Museum Collection, coins from Pompeii; no known copyright restrictions"),
    ("things", "stars", "hubble_deep_field.jpg", "NASA, Hubble eXtreme Deep Field; public domain"),
)


def folder() -> Path:
    """Where scikit-image keeps its photographs."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        sys.exit("scikit-image is not installed: pip install scikit-image")
    return Path(found.submodule_search_locations[0]) / "data"


def tiles(photograph: Image.Image) -> list[Image.Image]:
    """Squares that do not overlap, at most ``MOST``, evenly over the photograph."""
    across, down = photograph.width // SIDE, photograph.height // SIDE
    places = [(SIDE * x, SIDE * y) for y in range(down) for x in range(across)]
    some = [places[k * len(places) // MOST] for k in range(MOST)] if len(places) > MOST else places
    return [photograph.crop((x, y, x + SIDE, y + SIDE)) for x, y in some]


def main(out: Path) -> None:
    if out.exists():
        sys.exit(f"{out} exists. Name a new folder.")
    for task, name, file, _ in PHOTOGRAPHS:
        place = out / task / name
        place.mkdir(parents=True)
        with Image.open(folder() / file) as photograph:
            for number, tile in enumerate(tiles(photograph.convert("RGB"))):
                tile.save(place / f"{number:02d}.png")
    lines = [f"{task}/{name}: {file} of scikit-image. {whose}." for task, name, file, whose in PHOTOGRAPHS]
    (out / "LICENCES.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(PHOTOGRAPHS)} photographs, as tiles, lie in {out}.")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Say where the folders go: python recipes/photographs.py photos")
    main(Path(sys.argv[1]))
