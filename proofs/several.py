"""Every registered method, learned by several processes that share the run and by one: the same losses.

    python proofs/several.py [METHOD …] [--processes 2] [--keep FOLDER]

Two short tasks of the small world, three steps of 7 images (so that shares are uneven), in fp32 on one thread each. The
processes are started by ``torchrun``. Said is how far the losses of all phases lie apart at most, in shares of the larger of 1
and the loss; more than 1e-5, or another accuracy, is a failure. Whole towers learn at a fifth of the published rate: Adam moves
a weight by all of it, also where rounding decides which way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import perdure
from perdure import launch
from perdure.core import processes
from perdure.core.config import options
from perdure.engine.settings import Settings
from perdure.training.recipe import Training

CLOSE = 1e-5
# Draws by the factors of covariances that a few images leave singular; VAEs of two images.
ROUNDING = {"slca": 1e-4, "finetune+slca": 1e-4, "cgil": 1e-4}
SMALL: dict[str, Any] = {
    "tasks": 2, "images": 22, "iterations": 3, "warmup": 1, "batch_size": 7, "precision": "fp32", "threads": 1,
    "synthetic": 6, "synthetic_batch": 5, "sampling_steps": 2, "sampling_batch": 4, "reference_batch": 8,
    "selector_steps": 2, "reference_steps": 2, "selector_code": 8, "head_epochs": 1, "align_draws": 8, "judge": 16,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "mg_clip": {"iterations": 0, "warmup": 0, "most_epochs": 2},
    "keep_lora": {"epochs": 1, "head": True},
    "moe_adapters": {"experts": 3, "reference": "none", "task_id": "hidden"},
    "slca": {"epochs": 1},
    "rapf": {"epochs": 2},
    "cgil": {"images": 64, "epochs": 1, "draws": 2, "vae_passes": 10, "vae_hidden": 8, "vae_latent": 4},
    "icarl": {"images": 44, "memory": 40},
    "cpe_clip": {"epochs": 1, "later_epochs": 1, "warmup_epochs": 0},
    "clg_cbm": {"per_class": 2, "search_epochs": 1, "epochs": 2, "milestones": ()},
    "taalm": {"meta_steps": 2, "meta_batch": 2, "meta_images": 4},
}


def asked(method: str) -> dict[str, Any]:
    """The options of a short run, of those that it has."""
    own = {key: option.default for key, (_, option) in launch.method_options(launch.method_entry(method)).items()}
    known = {**own, **options(Settings)}
    more: dict[str, Any] = {"features": 48} if "ridge" in method else {}
    if own.get("lr") == Training().lr:
        more["lr"] = Training().lr / 5
    return {key: value for key, value in {**SMALL, **more}.items() if key in known} | OWN.get(method, {})


def every() -> list[str]:
    """All methods that can learn a stream by themselves."""
    return [entry.name for entry in launch.methods() if "role" not in entry.about]


def course(folder: Path) -> dict[str, list[float]]:
    """Every loss of a run, of every phase, step by step."""
    out: dict[str, list[float]] = {}
    for record in (json.loads(path.read_text()) for path in sorted(folder.glob("task_*/state.json"))):
        for phase, losses in {"": record["losses"], **record["phases"]}.items():
            out.update({f"{record['task']}/{phase}/{name}": values for name, values in losses.items()})
    return out


def apart(mine: Path, theirs: Path) -> float:
    """How far the losses of two runs lie apart at most; infinite where they are not of the same things."""
    a, b = course(mine), course(theirs)
    if {name: len(values) for name, values in a.items()} != {name: len(values) for name, values in b.items()}:
        return float("inf")
    return max((abs(x - y) / max(1, abs(y)) for name in a for x, y in zip(a[name], b[name], strict=True)), default=0.0)


def accuracy(folder: Path) -> Any:
    return json.loads((folder / "metrics.json").read_text())["accuracy"]


def learn(methods: list[str], folder: Path) -> None:
    """A run of each, by this process, or by all that were started with it."""
    for method in methods:
        perdure.run(method, "mini-mtil", folder / method, **asked(method))
        if processes.main():
            print(f"{method}: learned by {processes.count()}", flush=True)


def started(count: int, methods: list[str], folder: Path) -> None:
    """``learn`` in ``count`` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    worker = [__file__, *methods, "--worker", str(folder)]
    subprocess.run([*launcher, *worker], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for the runs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    methods = given.methods or every()
    if given.worker:
        learn(methods, given.worker)
        return
    with tempfile.TemporaryDirectory() as fresh:
        folder = given.keep or Path(fresh)
        learn(methods, folder / "one")
        started(given.processes, methods, folder / "several")
        failed = []
        for method in methods:
            pair = folder / "several" / method, folder / "one" / method
            far, same = apart(*pair), accuracy(pair[0]) == accuracy(pair[1])
            print(f"{method:24s} losses {far:.1e} apart, accuracies {'the same' if same else 'NOT the same'}")
            failed += [method] if far > ROUNDING.get(method, CLOSE) or not same else []
    if failed:
        raise SystemExit(f"Not the same: {', '.join(failed)}")


if __name__ == "__main__":
    main()
