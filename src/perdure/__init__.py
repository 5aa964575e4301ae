"""perdure: vision-language models that learn task after task and keep what they knew.

>>> import perdure
>>> metrics = perdure.run("finetune", "mini-mtil", out="runs/first", iterations=50)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from perdure.core.errors import PerdureError

__version__ = "0.1.0"
__all__ = ["CLIP", "Learner", "Method", "PerdureError", "Pictures", "Stream", "__version__", "resume", "run"]

if TYPE_CHECKING:
    from perdure.benchmarks.own.pictures import Pictures
    from perdure.data.task import Stream
    from perdure.launch import resume, run
    from perdure.launch.learner import Learner
    from perdure.methods.base import Method
    from perdure.models.clip import CLIP

# On first use: torch takes seconds to import.
HOMES = {
    "run": "perdure.launch", "resume": "perdure.launch", "Stream": "perdure.data.task", "CLIP": "perdure.models.clip",
    "Method": "perdure.methods.base", "Learner": "perdure.launch.learner",
    "Pictures": "perdure.benchmarks.own.pictures",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'perdure' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
