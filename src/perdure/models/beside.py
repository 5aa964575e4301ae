"""Low-rank updates beside the linear layers of the towers, held by a method and merged into plain weights in the end.

peft's adapters (``lora.py``) know one factor on the whole product; here every rank has its own, and B may be counted from
where it started. Nothing is put into the towers: a forward hook adds what an update makes of a layer's input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.models.lora import TOWERS


class LowRank(nn.Module):
    """x (…, in) → ((x Aᵀ)·w) (B - B₀)ᵀ (…, out), added to a linear layer's output: ΔW = (B - B₀) diag(w) A.

    A (r, in), w (r,), B and B₀ (out, r). ``on``: whether it acts.
    """

    B0: Tensor

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        device = layer.weight.device
        self.A = nn.Parameter(torch.zeros(rank, layer.in_features, device=device))
        self.w = nn.Parameter(torch.ones(rank, device=device))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        self.register_buffer("B0", torch.zeros_like(self.B))
        self.on = False
        layer.register_forward_hook(self.beside)

    def beside(self, layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The layer's output, with the update's where it is on."""
        return out + self(given[0]) if self.on else out

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A) * self.w, self.B - self.B0)

    @torch.no_grad()
    def draw(self) -> None:
        """Begin as LoRA does, adding nothing yet: A uniform in ±1/√in, B = B₀ = 0."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B.zero_()
        self.on = True

    @torch.no_grad()
    def set(self, a: Tensor, b: Tensor) -> None:
        """Begin with this A and B = B₀, adding nothing yet."""
        self.A.copy_(a)
        self.B.copy_(b)
        self.B0.copy_(b)
        self.on = True

    @torch.no_grad()
    def product(self) -> Tensor:
        """ΔW (out, in), of the ranks whose w is not 0."""
        live = self.w != 0
        return ((self.B - self.B0) * self.w)[:, live] @ self.A[live]


def linears(backbone: nn.Module, kinds: Sequence[str], towers: str) -> dict[str, nn.Linear]:
    """The linear layers of these kinds (``q_proj``, ``fc1`` …) in the towers, by name: image tower first, block by block, in
    the order of the kinds. ``PerdureError`` where a kind names none."""
    pattern = re.compile(rf"{TOWERS[towers]}\..*\.\d+\..*\.({'|'.join(map(re.escape, kinds))})")
    found = {n: m for n, m in backbone.named_modules() if isinstance(m, nn.Linear) and pattern.fullmatch(n)}
    there = {name.rsplit(".", 1)[1] for name in found}
    if lacking := [kind for kind in kinds if kind not in there] or ([] if kinds else ["no layer"]):
        known = sorted(
            {n.rsplit(".", 1)[1] for n, m in backbone.named_modules() if isinstance(m, nn.Linear) and "." in n}
        )
        raise PerdureError(f"layers: the towers have no linear layer '{lacking[0]}'. They have: {', '.join(known)}.")

    def place(name: str) -> tuple[bool, int, int]:
        block, kind = re.fullmatch(r".*\.(\d+)\..*\.(\w+)", name).groups()  # type: ignore[union-attr]
        return name.startswith("text_model"), int(block), list(kinds).index(kind)

    return {name: found[name] for name in sorted(found, key=place)}
