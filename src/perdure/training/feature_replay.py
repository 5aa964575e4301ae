"""A generator of features a class, of many classes side by side: what replays features that nobody keeps.

``vae``: scaled to mean 0 and deviation 1 a dimension, encoded and decoded; a draw is a decoded N(0, I), scaled back.
``gauss``: mean and deviation a dimension. ``full``: mean and covariance, shrunk. ``mixture``: some diagonal Gaussians, by EM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perdure.core.seeding import derive
from perdure.data.task import Batch
from perdure.models.vae import VAE, decoded
from perdure.ops import gaussians
from perdure.training.fit import Backward, Losses, Stepper
from perdure.training.schedule import Schedule

EM = 100  # steps
BATCH = 64  # features a step of a VAE
Trainer = Callable[[Stepper, Schedule, Iterator[Batch], str], Losses]


@dataclass(frozen=True)
class ReplayOptions:
    """Which generator a class gets, and how a VAE is fitted."""

    replay: Annotated[
        Literal["vae", "gauss", "full", "mixture"],
        Field(
            description="the generator a class: a VAE; a Gaussian, diagonal or full and shrunk; a mixture of diagonal ones"
        ),
    ] = "vae"
    draws: Annotated[int, Field(ge=1, le=10**6, description="a generator and epoch")] = 256
    components: Annotated[int, Field(ge=1, le=1000, description="of a mixture")] = 5
    vae_passes: Annotated[int, Field(ge=10, le=10**6, description="over a class")] = 500
    vae_lr: Annotated[float, Field(ge=0, description="of a VAE, by Adam")] = 2e-4
    vae_hidden: Annotated[int, Field(ge=1, le=10**5, description="H, width of its layers")] = 512
    vae_latent: Annotated[int, Field(ge=1, le=10**5, description="Z, numbers of a latent")] = 256
    noise: Annotated[
        Literal["release", "standard"], Field(description="of a latent: exp(log variance), or its root")
    ] = "release"


def fitted(
    x: Tensor, rows: Tensor, names: Sequence[str], options: ReplayOptions, train: Trainer, seed: int, task: str
) -> dict[str, Tensor]:
    """A generator for each class that features x (N, D) are of: their tensors side by side, (C', …), and ``rows`` (C',).

    ``rows`` (N,): the number of each feature's class in ``names``; ``train`` takes the steps of a VAE.
    """
    draw = torch.Generator().manual_seed(derive(seed, task, "generators of features"))
    there = rows.unique()
    found = [one_of(x[rows == row], names[row], options, train, seed, draw) for row in there.tolist()]
    return {"rows": there, **{name: torch.stack([one[name] for one in found]) for name in found[0]}}


def one_of(
    x: Tensor, name: str, options: ReplayOptions, train: Trainer, seed: int, draw: torch.Generator
) -> dict[str, Tensor]:
    """What draws features like x (n, D) of the class ``name``."""
    if options.replay == "mixture":
        return gaussians.mixture(x, options.components, EM, draw)
    mean, covariance = gaussians.moments(x)
    if options.replay == "full":
        covariance.diagonal().add_(gaussians.RIDGE)
        return {"mean": mean.float(), "factor": gaussians.factor(gaussians.shrunk(covariance))}
    moments = {"mean": mean.float(), "deviation": covariance.diagonal().sqrt().float()}
    if options.replay == "gauss":
        return moments
    spread = moments["deviation"]
    scaled = (x - moments["mean"]) / torch.where(spread > 0, spread, 1)
    vae = new_vae(x.shape[1], options, derive(seed, name, "VAE of features")).to(x.device)
    fit_vae(vae, scaled, options, train, f"VAE of {name}", draw)
    return {**moments, **{key: p.detach() for key, p in vae.decoder.named_parameters()}}


def new_vae(width: int, options: ReplayOptions, seed: int) -> VAE:
    """A VAE at birth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VAE(width, options.vae_hidden, options.vae_latent)


def fit_vae(vae: VAE, x: Tensor, options: ReplayOptions, train: Trainer, name: str, draw: torch.Generator) -> None:
    """Fit a VAE to x (n, D); a last batch of one is left out, as batch norm can do nothing with it."""
    c, per_pass = options, len([part for part in x.split(BATCH) if len(part) > 1])
    plan = Schedule(
        c.vae_passes * per_pass, c.vae_lr, 0, BATCH, optimizer="adam", stride=per_pass,
        restart=c.vae_passes // 10 * per_pass,
    )  # fmt: skip

    def batches() -> Iterator[Batch]:
        while True:
            for some in gaussians.shuffled(len(x), draw).split(BATCH):
                if len(some) > 1:
                    yield Batch(x[some], some, noise=gaussians.normal(len(some), c.vae_latent, draw))

    train(VAELearner(vae, 1.0 if c.noise == "release" else 0.5), plan, batches(), name)


class VAELearner(Stepper):
    """Fits a VAE."""

    def __init__(self, vae: VAE, exponent: float):
        self.vae, self.exponent = vae, exponent

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.vae.named_parameters())

    def step(self, batch: Batch, backward: Backward) -> None:
        reconstruction, divergence = self.vae.losses(batch.images, batch.noise, self.exponent)
        backward(reconstruction=reconstruction, divergence=divergence)


def drawn(kept: Mapping[str, Tensor], each: int, draw: torch.Generator) -> Tensor:
    """(C', each, D): draws of each of the generators that stand side by side in ``kept``."""
    if "weights" in kept:
        pick = torch.multinomial(kept["weights"].cpu(), each, replacement=True, generator=draw).to(kept["means"].device)
        pick = pick[..., None].expand(-1, -1, kept["means"].shape[2])
        mean, deviation = (kept[name].gather(1, pick) for name in ("means", "deviations"))
        return mean + deviation * gaussians.normal(mean.shape[:2].numel(), mean.shape[2], draw).to(mean).view_as(mean)
    mean = kept["mean"].unsqueeze(1)
    width = kept["0.weight"].shape[2] if "0.weight" in kept else mean.shape[2]
    noise = gaussians.normal(len(mean) * each, width, draw).to(mean).view(len(mean), each, width)
    if "factor" in kept:
        return mean + noise @ kept["factor"].mT
    return mean + kept["deviation"].unsqueeze(1) * (decoded(kept, noise) if "0.weight" in kept else noise)
