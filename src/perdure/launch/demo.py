"""The runs that the demo shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perdure.core.errors import PerdureError
from perdure.launch.configure import prepare
from perdure.launch.folders import is_finished, read_config, same_run

# Fine-tuning takes three tenths of the stream's own steps, so that all is over in four minutes on two cores.
DEMO: dict[str, dict[str, Any]] = {
    "zero_shot": {}, "finetune": {"iterations": 24, "warmup": 3}, "ridge_patches": {},
}  # fmt: skip
TRY_NEXT = (
    "perdure run --method ridge_patches --stream mini-xtail   # all names compete, 16 images a class, the task hidden",
    "perdure run --method condu --stream mini-mtil            # another way: experts, unified by a bit a parameter",
    "perdure methods ridge                                    # what can be set",
)


def demo_folder(runs: Path) -> Path:
    """The latest demo that was stopped, to go on with; else the next free name."""
    number = 1
    while True:
        folder = runs / ("demo" if number == 1 else f"demo-{number}")
        if not folder.exists() or any(demo_goes_on(folder / method) for method in DEMO):
            return folder
        number += 1


def demo_goes_on(folder: Path) -> bool:
    """Whether a demo's run was begun, with what is installed now, and not finished."""
    try:
        config = read_config(folder)
        return not same_run(config, prepare(folder.name, "mini-mtil", 0, DEMO[folder.name], {})) and not is_finished(
            folder
        )
    except PerdureError:
        return False
