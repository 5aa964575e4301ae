"""iCaRL on CLIP (Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017, arXiv:1611.07725), as
the release of ZSCL (arXiv:2303.06628) runs it.

    first task: CE;    task t: CE + D_image + D_text on remembered images        (D: see training/distillation.py)

The texts of D are the new task's class texts, by the pre-trained model (``teacher=previous``: by the model before the task).
Labels of remembered images are never used, and the answer is plain CLIP's: what is iCaRL's is the memory, K images in all.
After the first task it is that task's first K. After task t every older task keeps its first K // t, and the new one gets as
many (``memory_split=release``: K - K // t, so that the memory outgrows K) by herding over the whole task on the unit features
of the model just trained. Only the first ``candidates`` images of a task are ever taken.

A step shows remembered images in the order in which they are kept, from the beginning again after the last.

Deviation: the release's herding takes an index into a list that has shrunk for one into the whole list, and so stores other
images than it chose, some of them twice: ``herding=release``. By default those that were chosen are stored.

What is remembered is the numbers of images, which outlive a task and a resume; the images themselves come from the stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.packing import Packed
from perdure.data.files import Pixels, joined, take
from perdure.data.task import Batch, Context, Task
from perdure.methods.base import Method, Recipe, State, register
from perdure.models.clip import CLIP
from perdure.ops.herding import herd
from perdure.training.distillation import DistillationRecipe, Distiller
from perdure.training.fit import Backward
from perdure.training.schedule import Schedule


@dataclass(frozen=True)
class Config(DistillationRecipe, Recipe):
    memory: Annotated[int, Field(ge=1, le=10**8, description="K, images that are remembered in all")] = 10_000
    candidates: Annotated[
        int, Field(ge=1, le=10**8, description="images of a task that can be remembered, the first ones")
    ] = 30_000
    herding: Annotated[
        Literal["true", "release"],
        BeforeValidator(lambda value: "true" if value is True else value),  # as YAML reads it
        Field(description="store the images that were chosen, or those that the release stores in their place"),
    ] = "true"
    memory_split: Annotated[
        Literal["even", "release"], Field(description="the new task's share of K: K // t, or the rest, K - K // t")
    ] = "even"


@dataclass
class Remembered(State):
    """The numbers of the training images that are kept of each task learned, by its name, in order."""

    memory: dict[str, list[int]] = field(default_factory=dict)


@register("icarl", paper="arXiv:1611.07725")
class ICaRL(Method):
    """Distil the pre-trained model on a memory of old images, chosen by herding."""

    Config = Config
    State = Remembered
    state: Remembered
    plays = ("learn",)

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        super().bind(clip, context)
        self.config.check_reaches(self.config.towers)
        self.check_memory([len(t.classes) for t in self.context.tasks])
        self.distiller = Distiller(self.config, clip)

    def check_memory(self, classes: Sequence[int]) -> None:
        """Refuse a memory that cannot hold an image a task, or one a class of a single task; say where it is less than one a
        class. ``classes``: how many each task has."""
        least, most, k = max([0, len(classes), *classes]), sum(classes), self.config.memory
        if k < least:
            raise PerdureError(
                f"memory={k} is smaller than the classes: there are {len(classes)} tasks of up to {max(classes)} classes. Give "
                f"at least {least}, better {most}, an image a class."
            )
        if k < most:
            self.context.warn(f"memory={k} is less than an image for each of the {most} classes.")

    def schedule(self, task: Task) -> Schedule:
        plan = super().schedule(task)
        return replace(plan, steps=plan.steps + 1, horizon=plan.steps, stride=1) if plan.steps else plan

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.distiller.rest()
        if self.config.distils and self.state.memory:
            pixels = self.remembered()
            stored = torch.arange(len(pixels)).split(self.config.reference_batch)
            plan = [stored[k % len(stored)] for k in range(self.schedule(task).steps)]
            self.distiller.begin(pixels, self.tokens, plan)

    def remembered(self) -> Pixels:
        """The images of the memory, task by task."""
        here = {t.name for t in self.context.tasks}
        if gone := [name for name in self.state.memory if name not in here]:
            raise PerdureError(
                f"The images of {', '.join(gone)} are not at hand, and iCaRL distils on them. Learn a stream that holds all "
                "tasks, or bind the method with a context that has them."
            )
        kept = [(name, torch.tensor(numbers)) for name, numbers in self.state.memory.items() if numbers]
        return joined([self.context.images(name, numbers).pixels for name, numbers in kept])

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch of the task and one of the memory, through the image tower together."""
        images, losses = self.distiller.forward(batch.images)
        backward(task=self.classify(images, batch.labels, batch.get("captions")), **losses)

    def pack_progress(self) -> Packed:
        files, values = super().pack_progress()
        return files, {**values, "shown": self.distiller.shown}

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_progress(files, values)
        self.distiller.skip(values["shown"])

    def again(self, task: Task) -> bool:
        """After the last step, before the weights are fused: remember the task."""
        c, memory = self.config, self.state.memory
        share = c.memory // (len(memory) + 1)
        count = min(c.candidates, len(task.train))
        for name, numbers in memory.items():
            memory[name] = numbers[:share]
        if not memory:
            memory[task.name] = list(range(min(count, c.memory)))
            return False
        features = self.clip.embeddings(take(task.train.pixels, torch.arange(count)))
        own = share if c.memory_split == "even" else c.memory - share
        memory[task.name] = herd(features, own, shifted=c.herding == "release")
        return False

    def remarks(self) -> dict[str, float]:
        """How many images are remembered."""
        return {"images remembered": float(sum(map(len, self.state.memory.values())))}
