"""Rotations of weights inside the towers (orthogonal fine-tuning, Qiu et al., NeurIPS 2023, arXiv:2306.07280).

    W' = W Rᵀ,    R = (I + Q)⁻¹(I - Q),    Q = U - Uᵀ,    U strictly upper triangular: Cayley's form of an orthogonal matrix

W (out, in), R (in, in), or of blocks on its diagonal. The rows of W' have the norms and the angles of W's: W'W'ᵀ = WWᵀ. At
U = 0 the model is the one it was, to the bit. R is solved for exactly: a series for the inverse is not orthogonal once Q grows.
It is the same for all of a batch, so that it is folded into W once a forward pass, and the plain layer is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.models.beside import linears


class Rotation(nn.Module):
    """R of a layer's input, of ``size`` dimensions in blocks of ``block``. ``upper``: U's entries, (blocks, b(b - 1)/2)."""

    def __init__(self, size: int, block: int, device: torch.device):
        super().__init__()
        self.block = block
        self.upper = nn.Parameter(torch.zeros(size // block, block * (block - 1) // 2, device=device))
        self.on = True

    def matrices(self) -> Tensor:
        """R, (blocks, b, b), in fp32."""
        with torch.autocast(self.upper.device.type, enabled=False):
            rows, columns = torch.triu_indices(self.block, self.block, 1, device=self.upper.device)
            half = self.upper.new_zeros(len(self.upper), self.block, self.block)
            half = half.index_put((torch.arange(len(half), device=half.device)[:, None], rows, columns), self.upper)
            skew, one = half - half.mT, torch.eye(self.block, device=half.device)
            return torch.linalg.solve(one + skew, one - skew)

    def turned(self, weight: Tensor) -> Tensor:
        """W (out, in) → W Rᵀ."""
        with torch.autocast(weight.device.type, enabled=False):
            parts = weight.unflatten(1, (-1, self.block))
            return torch.einsum("okb,kcb->okc", parts, self.matrices()).flatten(1)


class RotatedLinear(nn.Linear):
    """A linear layer with a ``rotation`` of its weight."""

    rotation: Rotation

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rotation.turned(self.weight) if self.rotation.on else self.weight, self.bias)


def attach(backbone: nn.Module, block: int, layers: Sequence[str], towers: str) -> None:
    """Freeze ``backbone`` and let the weights of the named linear layers of the towers be rotated; ``block``: the dimensions
    of a block, 0: all of a layer's input. ``PerdureError`` where no layer has such a name, or blocks do not fit."""
    found = linears(backbone, layers, towers)
    for name, layer in found.items():
        if block and layer.in_features % block:
            raise PerdureError(
                f"rotation_block={block}: {name} has {layer.in_features} inputs, which are not so many blocks whole. Set a "
                "divisor, or 0 for one block."
            )
    backbone.requires_grad_(False)
    for layer in found.values():
        layer.__class__ = RotatedLinear  # the same parameters under the same names
        layer.rotation = Rotation(layer.in_features, block or layer.in_features, layer.weight.device)


def rotated(module: nn.Module) -> Iterator[tuple[str, RotatedLinear]]:
    """The layers whose weight is rotated, by name."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, RotatedLinear))


@torch.no_grad()
def reset(module: nn.Module) -> None:
    """Start all rotations anew, turning nothing."""
    for _, layer in rotated(module):
        layer.rotation.upper.zero_()


@torch.no_grad()
def folded(module: nn.Module) -> dict[str, Tensor]:
    """W Rᵀ of every rotated layer, under its name in a plain checkpoint."""
    return {f"{name}.weight": layer.rotation.turned(layer.weight) for name, layer in rotated(module)}
