"""What methods share that replay real images from a memory (``training/reservoir.py``) while they learn: which classes there
were, what a step sees beside the task's own images, what is put into the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.packing import Packed
from perdure.core.seeding import derive
from perdure.data.files import crops, take
from perdure.data.task import Batch, Class, Context, Task
from perdure.data.transforms import some_numbers
from perdure.methods.base import Method, Recipe, State
from perdure.models.clip import CLIP
from perdure.training.fit import Backward
from perdure.training.reservoir import MemoryOptions, Remembered, Reservoir

Known = tuple[str, str]  # a class's prompt, and the task that brought it


@dataclass(frozen=True)
class ReplayRecipe(MemoryOptions, Recipe):
    """One pass over small batches, as online learning has it."""

    epochs: Annotated[
        int, Field(ge=0, le=10**6, description="passes over a task's images, in place of iterations; 0: iterations")
    ] = 1
    batch_size: Annotated[int, Field(ge=1, le=10**6, description="images of the task a step")] = 10
    warmup: Annotated[int, Field(ge=0, le=10**9, description="steps of linear warm-up, then a cosine to 0")] = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="of the classification loss")] = 0.0


@dataclass
class Replayed(Remembered, State):
    """The memory, whose labels are places in ``classes``: all that were learned, each once."""

    classes: list[Known] = field(default_factory=list)


class ReplayMethod(Method):
    """Classifies the task's images and as many of the memory as are asked for, among all classes learned so far.

    Where classes compete within their own task only (``labels=task``), they do here too.
    """

    Config = ReplayRecipe
    State = Replayed
    state: Replayed
    plays: ClassVar[Sequence[str]] = ("learn",)
    keeps_captions = False

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        super().bind(clip, context)
        self.check_memory(sum(len(t.classes) for t in self.context.tasks))

    def check_memory(self, classes: int) -> None:
        """Refuse a memory that cannot hold an image a class."""
        if self.config.memory < classes:
            raise PerdureError(
                f"memory={self.config.memory} is smaller than the classes: there are {classes}, and each needs an image of its "
                f"own in the memory. Give at least {classes}, better {10 * classes}."
            )

    @property
    def apart(self) -> bool:
        """Whether classes compete within their own task only."""
        return self.context.labels == "task" and bool(self.context.tasks)

    def begin_task(self, task: Task) -> None:
        place = {self.key(*one): number for number, one in enumerate(self.state.classes)}
        known, rows = list(self.state.classes), []
        for prompt in task.prompts():
            key = self.key(prompt, task.name)
            if key not in place:
                place[key] = len(known)
                known.append((prompt, task.name))
            rows.append(place[key])
        self.check_memory(len(known))
        self.state.classes, self.rows = known, torch.tensor(rows)
        tasks = list(dict.fromkeys(name for _, name in known))
        group = torch.tensor([tasks.index(name) for _, name in known]) if self.apart else None
        super().begin_task(replace(task, classes=tuple(Class(prompt, ("{}",)) for prompt, _ in known), group=group))
        self.task, self.unseen = task, torch.ones(len(task.train), dtype=torch.bool)
        self.draws = torch.Generator().manual_seed(derive(self.context.seed, task.name, "memory"))
        self.memory = Reservoir(self.state, self.config.memory, self.draws)
        self.memory.reserve(len(task.train), self.clip.size)

    def key(self, prompt: str, task: str) -> Known:
        """What makes a class: its prompt, and where tasks stand apart its task."""
        return prompt, task if self.apart else ""

    def step(self, batch: Batch, backward: Backward) -> None:
        images, labels = self.with_memory(batch)
        backward(task=self.classify(self.clip.encode_image(images), labels))
        self.remember(batch)

    def with_memory(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch and images of the memory: (B', 3, S, S) in 0 … 1, cropped at random, and their classes (B',)."""
        own, labels = self.clip.sized(batch.images), self.rows.to(batch.labels.device)[batch.labels]
        drawn = self.memory.drawn(self.config.replayed, self.config.draw)
        return self.joined(own, labels, drawn)

    def joined(self, images: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels, and after them those of the memory of these numbers, cropped as the task's are."""
        if not len(numbers):
            return images, labels
        pixels, classes = self.memory.taken(numbers)
        old = crops(pixels, torch.arange(len(pixels)), self.clip.size, some_numbers(len(pixels), self.draws))
        return torch.cat([images, old.to(images)]), torch.cat([labels, classes.to(labels)])

    def remember(self, batch: Batch) -> None:
        """Offer the batch's images to the memory, uncropped; each once, whatever the number of passes."""
        index = batch.get("index")
        if index is None:  # whoever made the batch keeps no count of images: they are not the task's
            return
        new = index[self.unseen[index]]
        self.unseen[new] = False
        if len(new):
            images = self.clip.sized(take(self.task.train.pixels, new)[:])
            self.memory.offer(images, self.rows[self.task.train.labels[new]])

    def pack_progress(self) -> Packed:
        files, values = super().pack_progress()
        draws = {"unseen": self.unseen, "state": self.draws.get_state()}
        return {**files, "memory": self.state.images, "draws": draws}, values

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_progress(files, values)
        self.state.images = {name: tensor.clone() for name, tensor in files["memory"].items()}
        self.unseen = files["draws"]["unseen"].clone()
        self.draws.set_state(files["draws"]["state"])
        self.memory = Reservoir(self.state, self.config.memory, self.draws)

    def publish(self) -> None:
        self.state.images, self.state.offered = {}, 0

    def remarks(self) -> dict[str, float]:
        """What the memory holds."""
        memory = Reservoir(self.state, self.config.memory, torch.Generator())
        return {
            "images remembered": float(len(memory)),
            "classes remembered": float(len(memory.labels.unique())),
            "images offered": float(self.state.offered),
        }
