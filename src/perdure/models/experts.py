"""Mixtures of small experts beside the blocks of a tower (MoE-Adapters, arXiv:2403.11549, section 3).

    a      a block's state after attention and its residual; a₀: its first token (an image's class token, a text's START)
    out  = a + mlp(ln₂ a) + Σ_e g_e·f_e(a),    f_e(a) = 0.1·(U_e relu(D_e a + b_e) + c_e)
    z    = rᵀa₀, with noise z + n·(softplus(wᵀa₀) + 0.01);    g: softmax over the k largest of z, 0 elsewhere

One gate an image or text and block. Experts read a, not ln₂ a. Computed sparsely: an expert that nothing is sent to is not in
the graph, so that it has no gradient and an optimiser passes it over. Without noise all texts have the same a₀ (the tower is
causal), and are routed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE, LEAST_NOISE = 0.1, 0.01


class Expert(nn.Module):
    """f(x), x (…, width); starts as 0."""

    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor, dropout: float) -> Tensor:
        return SCALE * self.up(F.dropout(F.relu(self.down(x)), dropout, training=dropout > 0))


class Mixture(nn.Module):
    """One block's experts and routers. ``route()``: which router acts now; None: the block is as it was before.

    ``learning``: routing is noisy, and hidden units drop out. ``counting``: it is counted how often each expert is taken.
    ``noisy``: routing is noisy at other times too. ``alike``: all inputs have the same a₀, as texts do.
    """

    def __init__(
        self, width: int, experts: int, top: int, bottleneck: int, dropout: float, route: Callable[[], int | None],
        alike: bool,
    ):  # fmt: skip
        super().__init__()
        self.experts = nn.ModuleList(Expert(width, bottleneck) for _ in range(experts))
        self.routers, self.noises = nn.ParameterList(), nn.ParameterList()
        self.width, self.top, self.dropout, self.route, self.alike = width, top, dropout, route, alike
        self.learning = self.counting = self.noisy = False
        self.counts = [0] * experts
        self.given: Tensor | None = None

    def grow(self, routers: int) -> None:
        """Have so many routers; new ones are zero."""
        like = next(self.experts.parameters())
        while len(self.routers) < routers:
            for part in (self.routers, self.noises):
                part.append(nn.Parameter(like.new_zeros(self.width, len(self.experts))))

    def begin(self, router: int, live: list[int]) -> None:
        """Learn this router and the ``live`` experts, counting from 0."""
        self.learning, self.counts = True, [0] * len(self.experts)
        for number, expert in enumerate(self.experts):
            expert.requires_grad_(number in live)
        for part in (self.routers, self.noises):
            for number, parameter in enumerate(part):
                parameter.requires_grad_(number == router)

    def taken_most(self, count: int) -> list[int]:
        """The ``count`` experts that were taken most often, the first where several are equal."""
        return sorted(range(len(self.counts)), key=lambda e: -self.counts[e])[:count]

    def noise(self, z: Tensor) -> Tensor:
        """Standard normal, of the shape of z (N, E)."""
        return torch.randn_like(z)

    def gates(self, first: Tensor, router: int) -> tuple[Tensor, Tensor]:
        """a₀ (N, width) → the gates of the experts taken (N, k), and their numbers (N, k); in fp32."""
        with torch.autocast(first.device.type, enabled=False):
            first = first.float()
            z = first @ self.routers[router]
            if self.learning or self.noisy:
                z = z + self.noise(z) * (F.softplus(first @ self.noises[router]) + LEAST_NOISE)
            best, experts = z.topk(self.top, dim=1)
            return best.softmax(1), experts

    def forward(self, a: Tensor, router: int) -> Tensor:
        """Σ_e g_e·f_e(a) of a (N, tokens, width)."""
        dropout = self.dropout if self.learning else 0.0
        if self.alike and not (self.learning or self.noisy):
            gates, experts = self.gates(a[:1, 0], router)
            chosen = zip(gates[0], experts[0].tolist(), strict=True)
            return torch.stack([gate * self.experts[e](a, dropout) for gate, e in chosen]).sum(0)
        gates, experts = self.gates(a[:, 0], router)
        loads = torch.bincount(experts.flatten(), minlength=len(self.experts)).tolist()
        if self.counting:
            self.counts = [old + new for old, new in zip(self.counts, loads, strict=True)]
        order = experts.flatten().argsort(stable=True)
        out = torch.zeros_like(a)
        for e, places in enumerate(order.split(loads)):
            if len(places):
                rows = places // self.top
                part = gates.flatten()[places, None, None] * self.experts[e](a[rows], dropout)
                out = out.index_add(0, rows, part.to(out.dtype))
        return out

    def note(self, norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Before ln₂: this is a."""
        self.given = given[0]

    def beside(self, mlp: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """After the MLP: its output, with the experts' where a router acts."""
        a, self.given = self.given, None
        router = self.route()
        return out if router is None or a is None else out + self(a, router)


def attach(
    backbone: nn.Module, towers: str, experts: int, top: int, bottleneck: int, dropout: float,
    route: Callable[[], int | None],
) -> dict[str, Mixture]:  # fmt: skip
    """Put a mixture into every block of the towers (``both``, ``image`` or ``text``), by name: ``vision.0`` … ``text.0`` …"""
    found: dict[str, Mixture] = {}
    for tower, which in (("vision", "image"), ("text", "text")):
        for number, block in enumerate(getattr(backbone, f"{tower}_model").encoder.layers):
            if towers in ("both", which):
                weight = block.layer_norm2.weight
                mixture = Mixture(len(weight), experts, top, bottleneck, dropout, route, which == "text").to(
                    weight.device
                )
                block.layer_norm2.register_forward_pre_hook(mixture.note)
                block.mlp.register_forward_hook(mixture.beside)
                block.experts = found[f"{tower}.{number}"] = mixture
    return found
