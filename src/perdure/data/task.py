"""What is learned and asked: classes, images, tasks, streams, queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.pixels import CENTRE, Fit
from perdure.core.seeding import derive
from perdure.data.batch import Batch
from perdure.data.checks import are_pixels, check_labels, check_range, check_texts, described
from perdure.data.classes import Class
from perdure.data.context import Context, OnDraw, silent
from perdure.data.files import Pixels, at, cannot_be_read, joined, take
from perdure.data.query import Query

__all__ = ["Batch", "Class", "Context", "Images", "OnDraw", "Probe", "Query", "Stream", "Task", "silent"]


@dataclass(frozen=True)
class Images:
    """Labelled images. pixels: (N, 3, H, W), uint8 or float in 0 … 1, in memory or in files; labels: (N,) int64, indices into
    the classes; captions: a text an image, where there are any."""

    pixels: Pixels
    labels: Tensor
    captions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        labels, pixels = self.labels, self.pixels
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
            raise PerdureError(f"Labels must be a tensor (N,) of int64, not {described(labels)}.")
        if not are_pixels(pixels):
            raise PerdureError(f"Images must be (N, 3, H, W), uint8 or float in 0 … 1, not {described(pixels)}.")
        if len(pixels) != len(labels):
            raise PerdureError(f"There are {len(labels)} labels for {described(pixels)}: there must be one an image.")
        if self.captions is not None and len(self.captions) != len(labels):
            raise PerdureError(
                f"There are {len(self.captions)} captions for {len(labels)} images: there must be one an image."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Images:
        """The images numbered ``index``."""
        captions = None if self.captions is None else tuple(self.captions[k] for k in index.tolist())
        return Images(take(self.pixels, index), self.labels[index], captions)

    def at(self, side: int, fit: Fit = CENTRE) -> Images:
        """The same images; those in files are read at another size and another way."""
        return replace(self, pixels=at(self.pixels, side, fit))

    def few(self, shots: int, generator: torch.Generator) -> Images:
        """``shots`` images a class, drawn; all of a class that has fewer."""
        order = torch.randperm(len(self), generator=generator)
        picks = [order[self.labels[order] == k][:shots] for k in self.labels.unique().tolist()]
        index = torch.cat(picks).sort().values
        return self.take(index)

    def spread(self, most: int) -> Images:
        """At most ``most`` images, evenly spread over the order they lie in (by class, as a rule); 0: all."""
        if not most or len(self) <= most:
            return self
        index = torch.linspace(0, len(self) - 1, most).round().long()
        return self.take(index)


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    ``group`` (C,) is set where several tasks are learned at once but classes compete within their own task only: it holds
    the number of each class's task. ``labelled``: false of a task that has no classes, whose labels mean nothing.
    """

    name: str
    classes: tuple[Class, ...]
    train: Images
    test: Images
    index: int = 0
    group: Tensor | None = None
    parts: int = 1
    labelled: bool = True

    def __post_init__(self) -> None:
        for images in (self.train, self.test) if self.labelled else ():
            check_labels(images.labels, self.classes, f"Task {self.name}")

    def prompts(self) -> list[str]:
        """One prompt a class, from its training template."""
        return [c.templates[0].format(c.name) for c in self.classes]


@dataclass(frozen=True)
class Probe:
    """Images of concepts that no task teaches: the ability a model was born with."""

    classes: tuple[Class, ...]
    test: Images

    def __post_init__(self) -> None:
        check_labels(self.test.labels, self.classes, "The probe")


def all_captions(parts: Sequence[Images]) -> tuple[str, ...] | None:
    """The captions of several sets of images, where each has them."""
    found = [part.captions for part in parts]
    return tuple(c for part in found if part for c in part) if all(part is not None for part in found) else None


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned.

    ``labels`` and ``task_id`` are the protocol that the stream is usually evaluated under; ``model`` the CLIP that it was
    made for; ``defaults`` the option values that suit it; ``digest`` identifies the split; ``notes`` the data's licences.
    ``generator`` is the text-to-image model of its world and ``vocabulary`` what that model can be asked to draw, for
    methods that replay synthetic images; empty: there is none. ``drawings()`` are real pictures of that world beside the tasks.
    ``base_new``: which classes are new beside those of the first task: those of later ``sessions``, or the ``probe``'s.
    """

    name: str
    tasks: tuple[Task, ...]
    probe: Probe | None
    model: str
    digest: str
    labels: str = "task"
    task_id: str = "known"
    defaults: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    generator: str = ""
    vocabulary: tuple[Class, ...] = ()
    drawings: Callable[[], Images] | None = None
    base_new: Literal["", "sessions", "probe"] = ""

    def context(
        self, seed: int = 0, folder: Path | None = None, drawn: OnDraw = silent, warn: Callable[[str], None] = silent,
        labels: str = "",
    ) -> Context:  # fmt: skip
        """What a run of this stream offers its method."""
        offered = self.generator, self.vocabulary, drawn, warn, self.tasks, labels or self.labels, self.drawings
        return Context(seed, folder, self.name, *offered)

    def __post_init__(self) -> None:
        names = [t.name for t in self.tasks]
        if not names:
            raise PerdureError(f"The stream {self.name} has no tasks.")
        if taken := sorted({"probe", "before"} & set(names)):
            raise PerdureError(
                f"A task of {self.name} is called '{taken[0]}', which means something else in results: give it another name."
            )
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise PerdureError(f"The stream {self.name} has two tasks of the name '{twice[0]}'. Give each its own.")
        seen: set[Class] = set()
        for one in (c for t in self.tasks for c in t.classes if self.labels == "seen"):
            if one in seen:
                raise PerdureError(
                    f"The class '{one.name}' is in two steps of {self.name}: where the classes seen so far compete a class "
                    "belongs to one. Take labels=task, or give one of the two another name."
                )
            seen.add(one)

    def at(self, side: int, fit: Fit = CENTRE) -> Stream:
        """The same stream, whose pictures in files are read at the model's size, the model's way."""
        tasks = tuple(replace(t, train=t.train.at(side, fit), test=t.test.at(side, fit)) for t in self.tasks)
        return replace(self, tasks=tasks, probe=self.probe and replace(self.probe, test=self.probe.test.at(side, fit)))

    def check(self, clip: Any) -> None:
        """Refuse, before anything is computed, what ``clip`` cannot be asked or shown: what ``check_images`` refuses, classes
        of one task whose texts are one, prompts longer than its text tower reads."""
        self.check_images()
        for where, part in self.parts():
            if not isinstance(part, Task) or part.labelled:
                check_texts(part.classes, clip, f"{self.name}, {where}")
        if self.labels == "seen":  # there the classes of all tasks compete
            check_texts([c for t in self.tasks for c in t.classes], clip, self.name)

    def parts(self) -> list[tuple[str, Task | Probe]]:
        """The tasks and the probe, with what they are called in messages."""
        return [*((f"task {t.name}", t) for t in self.tasks), *([("the probe", self.probe)] if self.probe else [])]

    def check_images(self) -> None:
        """Refuse a side without images, floats that are no pixels, and pictures that cannot be read, as far as a cheap look
        (``cannot_be_read``) finds them."""
        for where, part in self.parts():
            sides = {"test": part.test, **({"training": part.train} if isinstance(part, Task) else {})}
            if isinstance(part, Task) and not part.labelled:
                del sides["test"]
            for side, images in sides.items():
                if not len(images):
                    raise PerdureError(f"{self.name}, {where}: there are no {side} images. Give at least one.")
                check_range(images.pixels, f"{self.name}, {where}, {side} images")
                if bad := cannot_be_read(images.pixels):
                    raise PerdureError(
                        f"{self.name}, {where}: {len(bad)} of its {side} pictures cannot be read, {bad[0]} the first. Put them "
                        "right or take them away; perdure data check FOLDER reads every picture and names all; "
                        "of a run unreadable=0.01 leaves out such pictures, up to that share of all."
                    )

    def few_shot(self, shots: int, seed: int, since: int = 1) -> Stream:
        """``shots`` training images a class, drawn by the seed; 0: all. ``since``: of the tasks from this one on, counted from
        1. Another split."""
        if not shots:
            return self
        draws = {t.name: torch.Generator().manual_seed(derive(seed, t.name, "few-shot")) for t in self.tasks}
        few = tuple(
            replace(t, train=t.train.few(shots, draws[t.name])) if number >= since else t
            for number, t in enumerate(self.tasks, 1)
        )
        later = f" from task {since}" if since > 1 else ""
        return replace(self, tasks=few, digest=f"{self.digest}/{shots} shots{later}")

    def shortened(self, tasks: int, images: int) -> Stream:
        """The first ``tasks`` tasks with at most ``images`` images a side, for a quick look; 0: all. Another split."""
        if not tasks and not images:
            return self
        kept = self.tasks[: tasks or None]
        probe = self.probe and replace(self.probe, test=self.probe.test.spread(images))
        short = tuple(replace(t, train=t.train.spread(images), test=t.test.spread(images)) for t in kept)
        return replace(self, tasks=short, probe=probe, digest=f"{self.digest}/{tasks}/{images}")

    def joined(self, grouped: bool) -> Task:
        """All tasks as one; ``grouped``: classes go on competing within their own task only."""
        sizes = [len(t.classes) for t in self.tasks]
        shift = torch.tensor([0, *sizes]).cumsum(0)
        sides = [
            Images(
                joined([getattr(t, side).pixels for t in self.tasks]),
                torch.cat([getattr(t, side).labels + shift[i] for i, t in enumerate(self.tasks)]),
                all_captions([getattr(t, side) for t in self.tasks]),
            )
            for side in ("train", "test")
        ]
        group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) if grouped else None
        classes = tuple(c for t in self.tasks for c in t.classes)
        return Task("all tasks", classes, sides[0], sides[1], index=0, group=group, parts=len(self.tasks))
