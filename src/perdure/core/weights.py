"""Algebra on weights: a θ is a mapping from parameter names to tensors of one shape each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from perdure.core.errors import PerdureError

Weights = Mapping[str, Tensor]
QKV = re.compile(r"\.[qkv]_proj\.(weight|bias)$")


class Lazy(Mapping[str, Tensor]):
    """Weights that are worked out tensor by tensor, when they are asked for: no second model in memory."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]):
        self.names, self.compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def original(name: str) -> str:
    """The tensor of the original CLIP that a parameter is part of: there, q, k and v of one attention are one tensor."""
    return QKV.sub(r".qkv.\1", name)


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


def floating(weights: Weights) -> list[str]:
    """The names of the floating-point tensors: what training can change."""
    return [name for name, tensor in weights.items() if tensor.is_floating_point()]
