"""How a device computes: in half precision where it multiplies that natively."""

from __future__ import annotations

import torch

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(wanted: str, device: str) -> str:
    """``auto`` → ``bf16`` where the device multiplies it natively; else ``fp16`` on an accelerator, ``fp32`` on a processor."""
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if supported() else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Compute in ``precision``, with the weights as they are: ``fp32`` changes nothing."""
    return torch.autocast(device.type, HALF.get(precision, torch.bfloat16), enabled=precision in HALF)
