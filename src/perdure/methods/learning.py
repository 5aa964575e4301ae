"""How a method learns where it says nothing else: the published recipe, cross entropy of the logits over the task's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perdure.data.checks import say_alone
from perdure.data.task import Batch, Context, Task
from perdure.models.clip import CLIP
from perdure.training.contrastive import of_captions, of_classes
from perdure.training.fit import Backward, Learner
from perdure.training.schedule import Schedule


class Learning(Learner):
    """The learn role's hooks, as every method has them."""

    clip: CLIP
    config: Any
    context: Context

    def trains_on(self, task: Task) -> bool:
        """Whether a task is trained on at all; where it is not, it is fused, calibrated and asked all the same."""
        return task.index == 0 or not getattr(self.config, "first_only", False)

    def begin_task(self, task: Task) -> None:
        """Prepare for the task: what is made here can be made again, and is not state."""
        self.tokens = self.clip.tokens(task.prompts())
        if getattr(self.config, "loss", "softmax") == "softmax":
            say_alone(task, self.context.warn)
        self.group = task.group.to(self.clip.device) if task.group is not None else None
        self.frozen_texts = None
        if self.config.towers == "image":  # the texts cannot change: once is enough
            with torch.no_grad():
                self.frozen_texts = self.clip.encode_tokens(self.tokens)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What learns, by name: what may in the towers, and all of its own modules' parameters."""
        own = {f"{n}.{k}": p for n, module in self.modules().items() for k, p in module.named_parameters()}
        inside = set(map(id, own.values()))
        towers = {n: p for n, p in self.clip.backbone.named_parameters() if id(p) not in inside}
        return {n: p for n, p in {**towers, **own}.items() if p.requires_grad}

    def schedule(self, task: Task) -> Schedule:
        c = self.config
        return Schedule(
            steps=c.iterations * task.parts, epochs=c.epochs, lr=c.lr_by_task.get(task.name, c.lr), warmup=c.warmup,
            batch_size=c.batch_size, optimizer=c.optimizer, momentum=c.momentum, weight_decay=c.weight_decay,
            betas=(c.beta1, c.beta2), clip=c.clip_grad, milestones=c.milestones or None, gamma=c.gamma,
            rates=self.tower_rates(),
        ).over(len(task.train))  # fmt: skip

    def tower_rates(self) -> dict[str, float]:
        """The factor on the rate of all that stands in the towers, by how its names begin."""
        scale = self.config.tower_lr_scale
        return {} if scale == 1 else {f"{name}.": scale for name, _ in self.clip.backbone.named_children()}

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch: the loss of the logits over the task's classes, cross entropy as a rule."""
        backward(task=self.task_loss(batch))

    def task_loss(self, batch: Batch) -> Tensor:
        """The classification loss of the task at hand."""
        return self.classify(self.clip.encode_image(batch.images), batch.labels, batch.get("captions"))

    def classify(
        self, images: Tensor, labels: Tensor, captions: Sequence[str] | None = None, reduction: str = "mean"
    ) -> Tensor:
        """``task_loss`` of images that are embedded already, (B, D), against labels (B,), or with a caption each; reduction
        "none": of each, (B,)."""
        if getattr(self.config, "loss", "softmax") == "contrastive":
            return of_captions(self.config, self.clip, images, captions, reduction)
        texts = self.frozen_texts if self.frozen_texts is not None else self.clip.encode_tokens(self.tokens)
        return of_classes(self.config, self.clip, images, texts, labels, self.group, reduction)

    # ---- a method's

    def modules(self) -> Mapping[str, nn.Module]:
        """As ``Method`` has it."""
        raise NotImplementedError
