"""Linear layers whose weights are drawn: forward hooks add what a draw's deviation from the means makes of their inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.models import lora


class Drawn:
    """Layers whose parameters are the means of Gaussians, all of them as one vector (P,), layer by layer.

    ``shapes``: of each parameter, by name. Nothing is put into the layers, so that without a deviation they are what they were.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]):
        self.layers = dict(layers)
        own = {f"{n}.{k}": p for n, layer in self.layers.items() for k, p in layer.named_parameters()}
        self.shapes = {name: list(p.shape) for name, p in own.items()}
        self.deviations: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            layer.register_forward_hook(partial(self.beside, name))

    def means(self) -> Tensor:
        """The parameters (P,), with their graph."""
        return torch.cat([p.flatten() for layer in self.layers.values() for p in layer.parameters()])

    def apart(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (P,) as the parameters' shapes, by name."""
        parts = vector.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def check(self, found: Mapping[str, Sequence[int]]) -> None:
        """Refuse posteriors of parameters that have other names or ``found`` shapes, naming both architectures."""
        here = self.shapes
        if odd := [n for n in {**found, **here} if list(found.get(n, [])) != here.get(n)]:
            there, own = (known.get(odd[0], "not there") for known in (found, here))
            raise PerdureError(
                f"The posteriors are of another architecture: {described(found)}, and this model has {described(here)}. The "
                f"first difference is {odd[0]}: {there} in the posteriors, {own} in the model. Give model, towers, lora_rank "
                "and lora_layers as they were learned with."
            )

    def deviate(self, vector: Tensor | None) -> None:
        """From now on act as the means and this deviation (P,); None: as the means."""
        self.deviations = {} if vector is None else self.apart(vector)

    def beside(self, name: str, layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The layer's output, with the deviation's where there is one."""
        if not self.deviations:
            return out
        return out + F.linear(given[0], self.deviations[f"{name}.weight"], self.deviations.get(f"{name}.bias"))


def factors(backbone: nn.Module) -> dict[str, nn.Linear]:
    """The two linear layers of each adapter in ``backbone``, A's and B's, by name."""
    kinds = ("lora_A", "lora_B")
    return {
        f"{n}.{kind}.default": getattr(layer, kind)["default"] for n, layer in lora.adapters(backbone) for kind in kinds
    }


def described(shapes: Mapping[str, Sequence[int]]) -> str:
    """Adapters in words, by the shapes of their factors."""
    rank = next(iter(shapes.values()), [0])[0]
    kinds = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in shapes})
    return f"adapters of rank {rank} beside {len(shapes) // 2} layers ({', '.join(kinds)})"
