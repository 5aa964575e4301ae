"""The towers' blocks, compiled by torch: the same arithmetic in fewer passes over memory."""

from __future__ import annotations

import os
from typing import Any

import torch

from perdure.core.errors import PerdureError
from perdure.models.recompute import blocks


def compiled(backbone: Any, device: torch.device) -> None:
    """Compile every block of a transformers model, when it is first used. ``PerdureError`` where nothing can be compiled here.

    What methods hang into a block (adapters, prompts, whoever listens) is compiled with it, and anew when it changes.
    """
    import torch._dynamo.config as dynamo

    check_compiler(device)
    dynamo.skip_nnmodule_hook_guards = False  # hooks come and go
    for block in blocks(backbone).values():
        block.compile()


def like(source: Any, copy: Any) -> None:
    """Compile those blocks of a copied model that are compiled in its source: a copy of a block is not."""
    for block, own in zip(source.modules(), copy.modules(), strict=True):
        if block._compiled_call_impl is not None:
            own.compile()


def check_compiler(device: torch.device) -> None:
    """Refuse what torch cannot do here: before the work, not at its first step."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:
        if isinstance(error, OSError) and os.sep in str(error.filename):  # no compiler has a path
            raise PerdureError(
                f"compile=true: what torch compiles could not be kept ({error.strerror}: {error.filename}). Give it another "
                "place: TORCHINDUCTOR_CACHE_DIR=FOLDER; or leave compile out: the run is the same."
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PerdureError(
            f"compile=true: torch cannot compile here ({reason}). It needs a C++ compiler (g++ or clang++; on an accelerator "
            "Triton). Install one, or leave compile out: the run is the same."
        ) from error
