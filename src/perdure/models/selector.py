"""Which task an image looks like: an autoencoder a task on frozen features (DDAS, arXiv:2403.11549, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.models.clip import CLIP

Extract = Callable[[Tensor], Tensor]


class Autoencoder(nn.Module):
    """f (N, D) in 0 … 1 → sigmoid(W relu(V f + v) + w) (N, D), through ``code`` units."""

    def __init__(self, width: int, code: int):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, code), nn.Linear(code, width)

    def forward(self, f: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(F.relu(self.encoder(f))))

    def losses(self, f: Tensor) -> Tensor:
        """(N,): the mean squared error of each."""
        return (self(f) - f).square().mean(1)


def first_block(clip: CLIP) -> Extract:
    """(N, 3, H, W) images → (N, tokens·H): what the image tower's first block makes of them, by the weights it holds."""

    def extract(images: Tensor) -> Tensor:
        vision = clip.backbone.vision_model
        embedded = vision.pre_layrnorm(vision.embeddings(clip.pixels(images)))
        return vision.encoder.layers[0](embedded, None).float().flatten(1)

    return extract


def alexnet(clip: CLIP) -> Extract:
    """(N, 3, H, W) images → (N, 43264): AlexNet's last convolution before its ReLU, of pixels normalised as for CLIP.

    ``PerdureError`` where torchvision's ImageNet weights are not on this machine: nothing is fetched unasked.
    """
    from torchvision.models import AlexNet_Weights
    from torchvision.models import alexnet as make

    weights = AlexNet_Weights.IMAGENET1K_V1
    place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if not place.is_file():
        raise PerdureError(
            f"selector_features=alexnet: AlexNet's ImageNet weights are not at {place}. Fetch them once with torchvision "
            "(torchvision.models.alexnet(weights='IMAGENET1K_V1')), or set selector_features=clip."
        )
    network = make(weights=weights).features[:11].eval().requires_grad_(False).to(clip.device)

    def extract(images: Tensor) -> Tensor:
        return network(F.interpolate(clip.pixels(images), (224, 224), mode="bilinear", antialias=True)).flatten(1)

    return extract


def choose(losses: Tensor, thresholds: Sequence[float], together: int) -> Tensor:
    """(N,): the number of the task that each image looks like, 0 where it is none's.

    losses: (N, 1 + T), of the reference set's autoencoder (infinite where there is none) and of the tasks'. An image is none's
    where the reference is nearest, or where the nearest task's loss is above its threshold (T,). ``together``: so many in a row
    are decided by the mean of their losses; 1: each for itself.
    """
    if together > 1:
        losses = torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in losses.split(together)])
    least, place = losses.min(1)
    limit = torch.tensor([float("inf"), *thresholds], dtype=losses.dtype, device=losses.device)[place]
    return torch.where(least > limit, torch.zeros_like(place), place)
