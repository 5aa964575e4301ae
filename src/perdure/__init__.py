"""perdure: vision-language models that learn task after task and keep what they knew.

>>> import perdure
>>> metrics = perdure.run("finetune", "mini-mtil", out="runs/first", iterations=50)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once: large tensors on huge pages, a tenth faster

__version__ = "0.1.0"
__all__ = ["__version__", "resume", "run"]

if TYPE_CHECKING:
    from perdure.launch import resume, run


def __getattr__(name: str) -> Any:
    """``run`` and ``resume`` on first use: torch takes seconds to import."""
    if name in ("run", "resume"):
        from perdure import launch

        return getattr(launch, name)
    raise AttributeError(f"module 'perdure' has no attribute '{name}'")
