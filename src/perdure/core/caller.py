"""What a run needs of the process it runs in, lent for as long as it lasts."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

from perdure.core.device import put_back
from perdure.core.errors import PerdureError

# Large tensors on huge pages: a tenth faster. torch reads it once, at the first large tensor of the process.
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Run with gradients as torch has them by default; put back what belongs to the caller, whatever happens.

    That is: the random states of Python, NumPy and torch (every CUDA device too), the number of threads, deterministic
    algorithms and TF32, the gradient mode, environment variables.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise PerdureError(
            "torch.autocast is on around this call, which would round answers and losses behind perdure's back. Call it "
            "outside, and say how training is to be computed with precision=bf16."
        )
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    variables = dict(os.environ)
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    try:
        with put_back(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if dict(os.environ) != variables:
            os.environ.clear()
            os.environ.update(variables)
