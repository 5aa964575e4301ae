"""Each task reseeds from (seed, task), so that a run that was killed and resumed ends with the same bits."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def reseed(*parts: int | str) -> torch.Generator:
    """Seed Python, NumPy and torch, and return a generator of its own stream for the caller's draws."""
    seed = derive(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(derive(*parts, "draws"))
