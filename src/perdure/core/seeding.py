"""Each task reseeds from (seed, task), so that a run that was killed and resumed ends with the same bits; inside a task, the
states of all generators are kept and put back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

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


def random_states() -> dict[str, torch.Tensor]:
    """Where the random numbers of Python, NumPy and torch stand, as tensors; of the CUDA device in use too, where one is."""
    _, words, gauss = random.getstate()
    own: dict[str, Any] = np.random.get_state(legacy=False)
    found = {
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*own["state"]["key"].tolist(), own["state"]["pos"], own["has_gauss"]]),
        "numpy_gauss": torch.tensor([own["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return {**found, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else found


def set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """The inverse of ``random_states``; a CUDA state is left out where no device is in use."""
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    *keys, place, has = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has, states["numpy_gauss"].item()))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
