"""TAALM (Seo et al., "Train-Attention: Meta-Learning Where to Focus in Continual Knowledge Learning", NeurIPS 2024,
arXiv:2407.16920): a small network φ says how much each training pair counts, and learned that from what learning is for.

    L_w(θ) = Σ w·CE / (Σ w + 1e-6),   w = sigmoid(φ(pair))
    θ' = θ after ``plain_steps`` AdamW steps on L_w, then one (``differentiable_steps``) through which gradients reach φ
    φ ← AdamW on  CE(query; θ') + r·mean |CE(unrelated; θ') - CE(unrelated; θ)|

Before the first task φ learns, over triples of a batch, a query (other images of the same classes) and what is unrelated (other
classes), each triple from the θ that the first task begins with; a step of φ is the mean over ``meta_batch`` triples. Then φ is
frozen, and every task is learned by L_w.

A transposition: the paper weighs the tokens of language models. CLIP's loss has no tokens, its terms are pairs of an image and
a class. φ is a linear layer (``hidden``: two) on the pre-trained embeddings of the image and of its class's text and on their
cosine; it begins with the same weight for all. Pairs are weighed once a task, as the pictures lie: both networks are frozen.

As in the release: θ's AdamW, whose epsilon stands three times; the query's loss is neither weighted nor smoothed. Of its
oddities none carries over (norms that are not squared, flags that are always true, a restriction over tokens, not predictions).
``importance=shuffled`` hands a task's weights out at random, ``uniform`` is plain training: what it must beat.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.seeding import derive
from perdure.data.files import Pixels
from perdure.data.task import Batch, Context, Task
from perdure.methods.base import Method, Recipe, State, register
from perdure.models.clip import CLIP
from perdure.models.importance import Importance
from perdure.models.recompute import differentiable_twice
from perdure.ops.losses import weighted
from perdure.ops.meta import Inner
from perdure.synthesis.replay import Replay, Synthesis, check_generator
from perdure.training.fit import Backward
from perdure.training.meta import Meta, Pairs, batches_of_triples
from perdure.training.schedule import Schedule


@dataclass(frozen=True)
class Config(Synthesis, Recipe):
    adapt: Annotated[Literal["full", "lora"], Field(description="train all weights, or low-rank adapters")] = "lora"
    lr: Annotated[float, Field(ge=0, description="peak learning rate, of θ")] = 1e-4
    importance: Annotated[
        Literal["learned", "shuffled", "uniform"],
        Field(description="weights of pairs: φ's, φ's handed out at random, 1"),
    ] = "learned"
    meta_source: Annotated[
        Literal["own", "drawings", "synthetic"],
        Field(description="φ learns on the first task's images, real ones of the stream's world, or synthetic pairs"),
    ] = "own"
    hidden: Annotated[int, Field(ge=0, le=10**5, description="units between in φ; 0: it is linear")] = 0
    meta_steps: Annotated[int, Field(ge=0, le=10**7, description="steps of φ; the rate falls by a cosine")] = 200
    meta_lr: Annotated[float, Field(ge=0, description="of φ, by AdamW")] = 1e-2
    meta_batch: Annotated[int, Field(ge=1, le=10**5, description="triples a step of φ")] = 16
    meta_classes: Annotated[int, Field(ge=2, le=10**5, description="classes of a triple's batch, and unrelated")] = 8
    meta_images: Annotated[int, Field(ge=2, le=10**6, description="images at most of each part of a triple")] = 32
    plain_steps: Annotated[int, Field(ge=0, le=1000, description="steps of θ whose gradients are constants")] = 1
    differentiable_steps: Annotated[int, Field(ge=1, le=100, description="steps of θ that φ is asked through")] = 1
    inner_lr: Annotated[float, Field(ge=0, description="of θ in these steps")] = 2e-4
    inner_weight_decay: Annotated[float, Field(ge=0, description="of θ in these steps")] = 0.01
    restrict: Annotated[float, Field(ge=0, description="r, weight of what changed of the unrelated; 0: none")] = 1.0


@dataclass
class Weigher(State):
    """φ's tensors, once it has learned."""

    phi: dict[str, Tensor] = field(default_factory=dict)


@register("taalm", paper="arXiv:2407.16920")
class TAALM(Method):
    """Pairs are weighed by how much learning them helps later answers, which a small network has learned beforehand."""

    Config = Config
    State = Weigher
    state: Weigher
    plays = ("learn",)

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        super().bind(clip, context)
        c, here = self.config, self.context
        self.said: dict[str, float] = {}
        if c.importance == "uniform" or c.meta_source == "own":
            return
        if c.meta_source == "drawings" and here.drawings is None:
            raise PerdureError(
                f"meta_source=drawings: {here.stream or 'this stream'} has no drawings beside its tasks. Set meta_source=own "
                "or synthetic."
            )
        if c.meta_source == "synthetic":
            check_generator(c, here, "meta_source=synthetic", "meta_source=own")
            self.replay = Replay(c, here, clip.size, clip.device.type, clip.tokens, clip.fit)

    # ---- learn

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if not self.state.phi and self.config.importance != "uniform":
            self.learn_importance(task)
        self.weights = self.weigh(task)
        self.said = {
            "weight of a pair, mean": self.weights.mean().item(),
            "its deviation": self.weights.std(correction=0).item(),
        }

    def weigh(self, task: Task) -> Tensor:
        """The weights (N,) of the task's training pairs."""
        if self.config.importance == "uniform":
            return torch.ones(len(task.train), device=self.clip.device)
        images, texts = self.embedded(task.train.pixels, self.tokens)
        phi = Importance(images.shape[1], self.config.hidden).to(images.device)
        phi.load_state_dict(self.state.phi)
        with torch.no_grad():
            weights = phi(images, texts[task.train.labels])
        if self.config.importance == "learned":
            return weights
        draw = torch.Generator().manual_seed(derive(self.context.seed, task.name, "weights of TAALM"))
        return weights[torch.randperm(len(weights), generator=draw)]

    @torch.no_grad()
    def embedded(self, pixels: Pixels, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of images and texts by the pre-trained model."""
        with self.clip.preserved():
            self.clip.load_weights("pretrained", self.clip.pretrained)
            return self.clip.embeddings(pixels), self.clip.encode_tokens(tokens)

    def step(self, batch: Batch, backward: Backward) -> None:
        each = self.classify(self.clip.encode_image(batch.images), batch.labels, batch.get("captions"), "none")
        backward(task=weighted(each, self.weights[batch.index]))

    def remarks(self) -> dict[str, float]:
        return self.said

    # ---- learn what to learn

    def learn_importance(self, task: Task) -> None:
        """Train φ; the model stays as it is."""
        c, (pixels, labels, prompts) = self.config, self.source(task)
        draw = torch.Generator().manual_seed(derive(self.context.seed, "triples of TAALM"))
        draws = batches_of_triples(labels, c.meta_batch, c.meta_classes, c.meta_images, draw)
        first = [next(draws)] if c.meta_steps else []  # refuses images of which no triples can be made
        tokens = self.clip.tokens(prompts)
        pairs = Pairs(pixels, labels, tokens, *self.embedded(pixels, tokens))
        phi = Importance(pairs.images.shape[1], c.hidden).to(self.clip.device)
        inner = Inner(c.plain_steps, c.differentiable_steps, c.inner_lr, weight_decay=c.inner_weight_decay)
        learner = Meta(self.clip, self.parameters(), phi, pairs, inner, c.restrict, c.label_smoothing, c.loss)
        plan = Schedule(c.meta_steps, c.meta_lr, warmup=0, batch_size=c.meta_batch)
        with differentiable_twice(self.clip):
            self.train(learner, plan, chain(first, draws), "importance")
        self.state.phi = {name: t.detach().clone() for name, t in phi.state_dict().items()}

    def source(self, task: Task) -> tuple[Pixels, Tensor, list[str]]:
        """What φ learns on: images, the numbers (N,) of their classes, and those classes' prompts."""
        if self.config.meta_source == "own":
            return task.train.pixels, task.train.labels, task.prompts()
        if self.config.meta_source == "drawings" and self.context.drawings is not None:
            found = self.context.drawings()
            pixels, captions = found.pixels, list(found.captions or ())
        else:
            pairs = self.replay.pairs(task.name, [])
            pixels, captions = pairs.images, pairs.prompts
        number = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
        labels = torch.tensor([number[caption] for caption in captions], dtype=torch.int64)
        return pixels, labels, list(number)
