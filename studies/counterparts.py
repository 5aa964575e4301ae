"""Each regulariser against its plain counterpart on the small world: TD-VCL, TAALM, PFR, VCReg, and the pull on pairs.

    python studies/counterparts.py [td_vcl taalm pfr vcreg finetune] [--seeds 3] [--jobs 2] [--out runs/counterparts]

The first four tasks of ``mini-mtil``, 200 images a side, 40 steps of 32 a task, fp32. Rows are settings of one method, the
first its counterpart; all else is alike, the seed too. In per cent: mean ± standard deviation over the seeds, and under
"gain" what the setting has more than its counterpart, seed by seed, of Average, Last and the probe. Broken off, it goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import command, do, read, short, spread

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "td_vcl": [
        {"beta": 0},  # draws, and nothing held
        {"n": 1, "beta": 2e-4},  # VCL
        {"n": 4, "lam": 0.5, "beta": 2e-4},
        {"n": 4, "lam": 1, "beta": 2e-4},  # n-step
        {"n": 1, "beta": 1e-3},
        {"n": 4, "lam": 0.5, "beta": 1e-3},
    ],
    "taalm": [{"importance": "uniform"}, {"importance": "learned"}, {"importance": "shuffled"}],
    "pfr": [{"distil": "none"}, {"distil": "direct"}, {"distil": "projected"}, {"distil_on": "synthetic"}],
    "vcreg": [{"vcreg": "none"}, {}, {"vcreg_var": 1, "vcreg_cov": 0.05}],
    "finetune": [{"positive_pull": 0}, {"positive_pull": 0.1}],
}
FIGURES = ("transfer", "average", "last", "forgetting")
GAINS = ("average", "last", "probe")


def named(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items()) or "as it is"


def figures(folder: Path) -> dict[str, float]:
    metrics = read(folder)
    return {**{name: metrics[name] for name in FIGURES}, "probe": metrics["probe"][-1]}


def row(values: dict[str, Any], found: Sequence[dict[str, float]], plain: Sequence[dict[str, float]]) -> str:
    cells = [spread([one[name] for one in found]) for name in (*FIGURES, "probe")]
    gains = [
        spread([one[name] - other[name] for one, other in zip(found, plain, strict=True)])
        if found is not plain
        else "–"
        for name in GAINS
    ]
    return f"| `{named(values)}` | {' | '.join([*cells, *gains])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "methods", nargs="*", default=list(SETTINGS), help=f"{', '.join(SETTINGS)}; all, if none is named"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of a thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/counterparts"))
    asked = parser.parse_args()
    seeds = range(asked.seeds)
    for method in asked.methods:
        places = [[asked.out / f"{method}, {named(values)}, {seed}" for seed in seeds] for values in SETTINGS[method]]
        jobs = zip(SETTINGS[method], places, strict=True)
        do(
            [command(p, method, "mini-mtil", s, {**short(method), **v}) for v, ps in jobs for s, p in enumerate(ps)],
            asked.jobs,
        )
        found = [[figures(place) for place in each] for each in places]
        gains = " | ".join(f"gain, {name}" for name in GAINS)
        print(f"\n| `{method}` | {' | '.join(FIGURES)} | probe, after | {gains} |\n|{'---|' * 9}", flush=True)
        for values, each in zip(SETTINGS[method], found, strict=True):
            print(row(values, each, found[0]), flush=True)


if __name__ == "__main__":
    main()
