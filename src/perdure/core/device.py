"""How a process computes: threads, algorithms; and how numbers get to a device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor


def compute_with(threads: int, deterministic: bool) -> None:
    """Let this process compute so, and in fp32 where fp32 is asked for: no TF32. ``deterministic``: by algorithms that give the
    same bits twice, on an accelerator too, which takes longer there; ``RuntimeError`` where torch has none."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's products are first used
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Undo ``compute_with`` at the end, environment variables aside."""
    products, others = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, others.allow_tf32, others.benchmark
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        products.allow_tf32, others.allow_tf32, others.benchmark = before


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on a device. To an accelerator it goes from pinned memory, so that nobody waits for it to arrive."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
