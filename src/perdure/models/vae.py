"""A small variational auto-encoder of feature vectors, and decoders of many classes side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class VAE(nn.Module):
    """Features (n, D), standardised → latent means and log variances (n, Z) → features.

    Encoder: linear, batch norm, leaky ReLU, twice, and linear; the batch norm by the batch's own statistics always. Decoder:
    its mirror without batch norm.
    """

    def __init__(self, width: int, hidden: int, latent: int):
        super().__init__()

        def norm() -> nn.Module:
            return nn.BatchNorm1d(hidden, track_running_stats=False)

        self.encoder = nn.Sequential(
            nn.Linear(width, hidden), norm(), nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden), norm(), nn.LeakyReLU(0.2),
            nn.Linear(hidden, 2 * latent),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, width)
        )  # fmt: skip

    def losses(self, x: Tensor, noise: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
        """Reconstruction, ½‖x - x̂‖² + ½D·log 2π, and KL to N(0, I), each the mean over the batch; z = mean +
        exp(``exponent``·log variance)·noise: ½ is the standard deviation."""
        with torch.autocast(x.device.type, enabled=False):
            mean, log_variance = self.encoder(x).chunk(2, dim=1)
            again = self.decoder(mean + (exponent * log_variance).exp() * noise)
            constant = 0.5 * math.log(2 * math.pi) * x.shape[1]
            reconstruction = 0.5 * (x - again).square().sum() / len(x) + constant
            divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum() / len(x)
            return reconstruction, divergence


def decoded(weights: Mapping[str, Tensor], latent: Tensor) -> Tensor:
    """(C, n, D): latent (C, n, Z) through the decoders of C classes, whose weights are stacked: (C, …)."""
    x = latent
    for layer in (0, 2, 4):
        x = torch.baddbmm(weights[f"{layer}.bias"].unsqueeze(1), x, weights[f"{layer}.weight"].mT)
        x = nn.functional.leaky_relu(x, 0.2) if layer < 4 else x
    return x
