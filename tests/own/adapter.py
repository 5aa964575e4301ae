"""A method in one file outside the package: a small residual network beside frozen towers, trained in a phase of its own."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from perdure.data.task import Batch, Context, Query, Task
from perdure.methods.base import Method, register
from perdure.models.clip import CLIP
from perdure.ops.losses import classification
from perdure.training.fit import Backward, Stepper
from perdure.training.schedule import Schedule


class Residual(nn.Module):
    """Unit features (N, D) → unit features (N, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.change = nn.Linear(width, width)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(features + self.change(features), dim=1)


@register("adapter")
class Adapter(Method):
    """Learns a residual network on the image features."""

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        super().bind(clip, context)
        clip.backbone.requires_grad_(False)
        self.residual = Residual(clip.backbone.config.projection_dim).to(clip.device)

    def modules(self) -> Mapping[str, nn.Module]:
        return {"residual": self.residual}

    def schedule(self, task: Task) -> Schedule:
        return Schedule(steps=0, lr=0.0, warmup=0, batch_size=1)  # the towers learn nothing

    def calibrate(self, task: Task) -> None:
        features, labels = self.clip.embeddings(task.train.pixels), task.train.labels.to(self.clip.device)
        texts = self.clip.class_texts([[p] for p in task.prompts()])
        plan = Schedule(
            steps=0, epochs=6, lr=self.config.lr, warmup=0, batch_size=16, optimizer="sgd", milestones=(2, 4)
        )
        order = torch.Generator().manual_seed(self.context.seed)
        self.train(Phase(self, texts), plan.over(len(labels)), draws(features, labels, order), "residual")

    def embed(self, query: Query) -> Tensor:
        return self.residual(super().embed(query))


class Phase(Stepper):
    """Cross entropy of what the residual network makes of kept features."""

    def __init__(self, method: Adapter, texts: Tensor):
        self.method, self.texts = method, texts

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.method.residual.named_parameters())

    def step(self, batch: Batch, backward: Backward) -> None:
        logits = self.method.clip.similarity(self.method.residual(batch.images), self.texts)
        backward(residual=classification(logits, batch.labels))


def draws(features: Tensor, labels: Tensor, order: torch.Generator) -> Iterator[Batch]:
    while True:
        for index in torch.randperm(len(labels), generator=order).split(16):
            yield Batch(features[index], labels[index], index=index)
