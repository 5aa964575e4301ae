"""Training a network that says how much a training pair counts, by what an update on so weighted pairs is good for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from perdure.core.errors import PerdureError
from perdure.data.files import Pixels
from perdure.data.task import Batch
from perdure.models.clip import CLIP
from perdure.models.importance import Importance
from perdure.ops.losses import classification, pairwise, weighted
from perdure.ops.meta import Inner, Theta, usefulness
from perdure.training.fit import Backward, Stepper

LOSSES = {"softmax": classification, "sigmoid": pairwise}


class Triple(NamedTuple):
    """Numbers of images: to learn from, to ask, and unrelated ones; the classes of the first two, and of the third."""

    data: Tensor
    query: Tensor
    unrelated: Tensor
    classes: Tensor
    others: Tensor


@dataclass(frozen=True)
class Pairs:
    """Images with the numbers (N,) of their classes, those classes' token ids (C, L), and unit embeddings of both."""

    pixels: Pixels
    labels: Tensor
    tokens: Tensor
    images: Tensor
    texts: Tensor


class Meta(Stepper):
    """φ, and the loss that it is trained by: over triples of ``pairs``, what ``usefulness`` says of θ, parameters of the
    model by name, that learned by the weighted loss. ``restrict``: weight of what changed of unrelated answers."""

    def __init__(
        self, clip: CLIP, theta: Theta, phi: Importance, pairs: Pairs, inner: Inner, restrict: float = 0.0,
        smoothing: float = 0.0, loss: str = "softmax",
    ):  # fmt: skip
        self.clip, self.phi, self.pairs, self.inner = clip, phi, pairs, inner
        self.restrict, self.smoothing, self.loss = restrict, smoothing, LOSSES[loss]
        self.model = Similarity(clip)
        self.theta = {f"clip.backbone.{name}": value.detach() for name, value in theta.items()}

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.phi.named_parameters())

    def step(self, batch: Batch, backward: Backward) -> None:
        """The mean over ``batch.triples``, one after another."""
        found = []
        for triple in batch.triples:
            objective = self.objective(triple)
            backward(importance=objective / len(batch.triples))
            found.append(objective.detach())
        backward(importance=torch.stack(found).mean())  # for the record

    def objective(self, triple: Triple) -> Tensor:
        """How badly the query of a triple is answered once its data were learned, weighed by φ."""
        own = self.pairs.labels[triple.data]
        weights = self.phi(self.pairs.images[triple.data], self.pairs.texts[own])

        def learn(theta: Theta) -> Tensor:
            return weighted(self.losses(triple.data, triple.classes, theta, self.smoothing), weights)

        def query(theta: Theta) -> Tensor:
            return self.losses(triple.query, triple.classes, theta).mean()

        asked = partial(self.losses, triple.unrelated, triple.others)
        wanted = self.restrict > 0 and len(triple.unrelated) > 0
        with torch.autocast(weights.device.type, enabled=False):
            return usefulness(self.theta, learn, query, self.inner, asked if wanted else None, self.restrict)

    def losses(self, index: Tensor, classes: Tensor, theta: Theta, smoothing: float = 0.0) -> Tensor:
        """(B,) of the images ``index``, among ``classes``, by θ."""
        shown, tokens = self.clip.sized(self.pairs.pixels[index]), self.pairs.tokens
        logits = functional_call(self.model, dict(theta), (shown, tokens[classes.to(tokens.device)]))
        place = (self.pairs.labels[index][:, None] == classes).long().argmax(1)
        return self.loss(logits, place.to(logits.device), smoothing, reduction="none")


class Similarity(nn.Module):
    """A CLIP as a function from images and token ids to logits, in which parameters can be exchanged."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        return self.clip.similarity(self.clip.encode_image(images), self.clip.encode_tokens(tokens))


def batches_of_triples(
    labels: Tensor, size: int, classes: int, images: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Batches of ``size`` triples without end, in the field ``triples``."""
    drawn = triples(labels, classes, images, generator)
    while True:
        yield Batch(labels[:0], labels[:0], triples=[next(drawn) for _ in range(size)])


def triples(labels: Tensor, classes: int, images: int, generator: torch.Generator) -> Iterator[Triple]:
    """Triples without end, of at most so many classes and images a part; a class needs two images.

    ``PerdureError`` where fewer than two classes (N,) have them.
    """
    usable = (labels.bincount() > 1).nonzero().squeeze(1)
    if len(usable) < 2:
        raise PerdureError(
            f"How much a pair counts is learned on two classes at least that have two images each; among {len(labels)} images "
            f"there are {len(usable)}. Set another meta_source, draw more synthetic pairs, or set importance=uniform."
        )
    count = max(2, min(classes, len(usable) // 2))
    while True:
        order = usable[torch.randperm(len(usable), generator=generator)]
        own, others = order[:count], order[count : 2 * count]
        halves = [halved(one, labels, generator) for one in own.tolist()]
        data, query = (mixed([half[k] for half in halves], images, generator) for k in range(2))
        rest = [half for one in others.tolist() for half in halved(one, labels, generator)]
        yield Triple(data, query, mixed(rest, images, generator) if len(others) > 1 else data[:0], own, others)


def halved(one: int, labels: Tensor, generator: torch.Generator) -> Sequence[Tensor]:
    """The images of a class in two random halves."""
    found = (labels == one).nonzero().squeeze(1)
    return found[torch.randperm(len(found), generator=generator)].tensor_split(2)


def mixed(parts: Sequence[Tensor], most: int, generator: torch.Generator) -> Tensor:
    """At most so many of all parts, in random order."""
    whole = torch.cat(list(parts))
    return whole[torch.randperm(len(whole), generator=generator)[:most]]
