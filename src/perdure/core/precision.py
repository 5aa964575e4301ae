"""How a device computes: in bf16 where it multiplies bf16 natively."""

from __future__ import annotations

import torch


def precision_of(wanted: str, device: str) -> str:
    """``auto`` → ``bf16`` where the device multiplies it natively, else ``fp32``."""
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if supported() else "fp32"
