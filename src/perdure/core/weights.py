"""Algebra on weights: a θ is a mapping from parameter names to tensors of one shape each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from perdure.core.errors import PerdureError

Weights = Mapping[str, Tensor]


def check_alike(a: Weights, b: Weights) -> None:
    """Refuse weights of different architectures, naming the first difference."""
    for name in sorted(set(a) ^ set(b)):
        raise PerdureError(f"The weights differ: only one of the two has a tensor '{name}'.")
    for name in a:
        if a[name].shape != b[name].shape:
            shapes = f"{tuple(a[name].shape)} and {tuple(b[name].shape)}"
            raise PerdureError(f"The weights differ: '{name}' has the shapes {shapes}.")


def interpolate(a: Weights, b: Weights, share: float) -> dict[str, Tensor]:
    """(1 - share)·a + share·b, tensor by tensor."""
    check_alike(a, b)
    return {name: a[name].lerp(b[name], share) for name in a}
