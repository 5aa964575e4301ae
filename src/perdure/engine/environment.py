"""Versions, machine, memory: what a run notes down about where it was done."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from perdure.engine.settings import Settings


def environment(settings: Settings) -> dict[str, Any]:
    """Versions and machine: what may change a result's bits."""
    packages = ("torch", "transformers", "diffusers", "peft", "safetensors", "numpy", "perdure")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpu": cpu(),
        "gpu": torch.cuda.get_device_name(settings.device) if settings.device.startswith("cuda") else None,
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "device": settings.device,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def cpu() -> str:
    """The processor's name, and the vectors that torch uses of it: both decide the last bits."""
    name = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{name or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is another now and may change the last bits, in words; what was not noted before cannot be compared."""
    compared = [key for key in now if key in before and key not in ("cores", "platform")]  # a kernel changes no bit
    return [f"{key}: {before[key]}, now {now[key]}" for key in compared if now[key] != before[key]]


def forget_peak_memory() -> None:
    """Start measuring the peak anew, where the system can: a process may do several runs."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """The most memory this process has held since ``forget_peak_memory`` (elsewhere than on Linux: ever), in MB."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1.024e-3, 1)
    try:
        import resource
    except ImportError:  # not on this system
        return 0.0
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 976.6), 1)
