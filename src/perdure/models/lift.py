"""A wide random layer that is never trained."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.state import digest

Draw = Literal["normal", "uniform"]


class RandomLayer:
    """φ(x) = relu(xW), W (width, M) drawn once; M = 0: φ(x) = x. ``weights``: W itself, where it is known from elsewhere."""

    def __init__(self, features: int, draw: Draw, seed: int, weights: Tensor | None = None):
        self.features, self.draw, self.seed, self.weights = features, draw, seed, weights

    def __call__(self, x: Tensor, first: int | None = None) -> Tensor:
        """x (N, width) → φ (N, M), in fp64; or the ``first`` of its M columns alone."""
        if not self.features:
            return x[:, :first].double()
        if self.weights is None:
            self.weights = self.drawn(x.shape[1]).to(x.device)
        return torch.relu(x @ self.weights[:, :first]).double()

    def drawn(self, width: int) -> Tensor:
        """W by the seed: standard normal, or uniform in ±1/√width."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.draw == "normal":
            return torch.randn(width, self.features, generator=generator)
        return (2 * torch.rand(width, self.features, generator=generator) - 1) / width**0.5

    def mark(self) -> str:
        """A sha256 of W; empty: there is none yet."""
        return "" if self.weights is None else digest(self.weights.cpu().numpy().tobytes())

    def check(self, mark: str) -> None:
        """Refuse another W than the one with this mark: what was summed up with that cannot be read with this."""
        if mark and self.weights is not None and self.mark() != mark:
            raise PerdureError(
                "The random layer that the ridge head was learned with cannot be drawn again: the seed or this version of "
                "torch draws another. Go on with the version that the run began with (see its config.json)."
            )
