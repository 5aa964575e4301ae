"""A method in one file outside the package: a learned vector a task inside the vision tower, which stays frozen.

It uses every hook that the shipped methods leave alone: a module inside a tower that grows with the tasks, old images in what
is trained on, a projected gradient, a rate of its own, a change after each step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from perdure.data.files import joined
from perdure.data.task import Batch, Context, Images, Task
from perdure.methods.base import Method, Recipe, State, register
from perdure.models.clip import CLIP
from perdure.training.fit import Backward
from perdure.training.schedule import Schedule


@dataclass(frozen=True)
class Config(Recipe):
    kept: Annotated[int, Field(ge=0, description="images of each earlier task that are trained on again")] = 4
    longest: Annotated[float, Field(gt=0, description="largest norm of a task's vector")] = 1.0


@dataclass
class Learned(State):
    """The tasks in order, and the numbers of the images that are kept of each."""

    images: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Prompts(nn.Module):
    """A vector a task, all of them added to every embedded patch."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.vectors = nn.ParameterList()

    def grow(self, count: int) -> None:
        while len(self.vectors) < count:
            self.vectors.append(nn.Parameter(torch.zeros(self.width)))

    def forward(self, embedded: Tensor) -> Tensor:
        return embedded + sum(self.vectors, torch.zeros(self.width))


@register("prompt")
class Prompt(Method):
    """Learns a vector a task in the vision tower."""

    Config = Config
    State = Learned
    state: Learned

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        super().bind(clip, context)
        clip.backbone.requires_grad_(False)
        embeddings = clip.backbone.vision_model.embeddings
        self.prompts = embeddings.prompts = Prompts(clip.backbone.config.vision_config.hidden_size)
        embeddings.register_forward_hook(lambda module, given, out: module.prompts(out))

    def modules(self) -> Mapping[str, nn.Module]:
        return {"prompts": self.prompts}

    def unpack_state(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_state(files, values)
        self.prompts.grow(len(self.state.images))

    def start(self, task: Task) -> None:
        self.state.images[task.name] = tuple(range(min(self.config.kept, len(task.train))))
        self.prompts.grow(len(self.state.images))
        for number, vector in enumerate(self.prompts.vectors, 1):
            vector.requires_grad_(number == len(self.prompts.vectors))

    def material(self, task: Task) -> Task:
        """The task's images and those that are kept of the tasks before, with the classes of all."""
        parts, classes = [task.train], list(task.classes)
        for name, numbers in self.state.images.items():
            if name != task.name:
                old = self.context.images(name, torch.tensor(numbers, dtype=torch.long))
                parts.append(replace(old, labels=old.labels + len(classes)))
                classes += next(t.classes for t in self.context.tasks if t.name == name)
        pixels, labels = joined([p.pixels for p in parts]), torch.cat([p.labels for p in parts])
        return replace(task, classes=tuple(classes), train=Images(pixels, labels))

    def schedule(self, task: Task) -> Schedule:
        return replace(super().schedule(task), rates={"prompts.vectors.0": 0.5})

    def step(self, batch: Batch, backward: Backward) -> None:
        """Cross entropy; nothing is learned along the vectors of the tasks before."""
        gradients = backward(task=self.task_loss(batch))
        *old, (name, _) = [(f"prompts.vectors.{k}", v) for k, v in enumerate(self.prompts.vectors)]
        free = gradients[name]
        assert free is not None
        for _, vector in old:
            unit = nn.functional.normalize(vector.detach(), dim=0)
            free = free - (free @ unit) * unit
        backward.replace(name, free)

    @torch.no_grad()
    def stepped(self, step: int) -> None:
        vector = self.prompts.vectors[-1]
        vector.mul_((self.config.longest / vector.norm().clamp_min(1e-12)).clamp_max(1.0))
