"""How a process computes: threads, algorithms; and how numbers get to a device."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

DYNAMO = "torch._dynamo.config"
PRODUCTS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
Rounding = tuple[Sequence[str], tuple[str, bool] | None]


def products() -> list[Any]:
    """What of torch multiplies, and says in which precision of fp32; nothing in releases before it could be said."""
    found: list[Any] = []
    for at in PRODUCTS:
        place: Any = torch.backends
        for name in at.split("."):
            place = getattr(place, name, None)
        found += [place] if hasattr(place, "fp32_precision") else []
    return found


def rounding() -> Rounding:
    """How products of fp32 are rounded, by torch's newer names and by its older ones; of these None where a caller used the
    newer alone: torch then refuses to tell."""
    try:
        older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        older = None
    return [place.fp32_precision for place in products()], older


def round_products(newer: Sequence[str], older: tuple[str, bool] | None) -> None:
    """Round as ``rounding`` has it."""
    if older is not None:
        torch.set_float32_matmul_precision(older[0])
        torch.backends.cudnn.allow_tf32 = older[1]
    for place, kind in zip(products(), newer, strict=True):
        place.fp32_precision = kind


def compute_with(threads: int, deterministic: bool) -> None:
    """Let this process compute so, and in fp32 where fp32 is asked for: no TF32, no bf16. ``deterministic``: by algorithms
    that give the same bits twice, on an accelerator too, which takes longer there; ``RuntimeError`` where torch has none."""
    torch.set_num_threads(threads)
    round_products(["ieee"] * len(products()), ("highest", False))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's products are first used
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


def hook_guards() -> bool | None:
    """Whether compiled modules take it that their hooks stay; None: nothing was compiled in this process."""
    return getattr(sys.modules.get(DYNAMO), "skip_nnmodule_hook_guards", None)


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Undo ``compute_with`` at the end, environment variables aside."""
    guards = hook_guards()
    rounded, searches = rounding(), torch.backends.cudnn.benchmark
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.backends.cudnn.benchmark = searches
        if hook_guards() is not None:  # which compiled blocks change
            sys.modules[DYNAMO].skip_nnmodule_hook_guards = guards is None or guards  # type: ignore[attr-defined]
        round_products(*rounded)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on a device. To an accelerator it goes from pinned memory, so that nobody waits for it to arrive."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
