"""Make the small world from nothing: ``python recipes/mini [--work DIR] [--assets DIR]``.

Sources are fetched, drawings rendered, streams built, the CLIP pre-trained, the generator trained. Each part is skipped
where its result lies in the work folder already, and training goes on from its checkpoints.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import drawings
import generator
import pretrain
import sources
import world

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "src" / "perdure" / "benchmarks" / "mini" / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=HERE / "build", help="for what is fetched and made on the way (3 GB)"
    )
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the small world goes")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    package, fonts = sources.main(options.work)
    if not (options.work / "drawings.jsonl").exists():
        drawings.main(package, options.work)
    if not (options.work / "pretrain.npz").exists():
        world.main(package, fonts, options.work, options.assets)
    pretrain.main(options.work, options.assets)
    generator.main(options.work, options.assets)


if __name__ == "__main__":
    main()
