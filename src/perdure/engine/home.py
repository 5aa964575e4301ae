"""A model in use: a run whose stream grows by a task at a time.

``config.json``            as a run's; ``home``: what is kept of test pictures, and what the probe is
``task_00_before/``        the model as it was found, as a run's row 0
``task_01_pets/``          as a run's, and of the task: its classes, where it came from, its test pictures
``refused_task_02_…/``     learned, and not taken: it would have cost too much
``undone_task_02_…/``      taken back
``begun_task_02_…/``       stopped while it was learned: what was saved of its training, as a run's

What is current is the longest course task_00, task_01, …: a task is taken, refused or undone by one rename.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.pixels import Fit
from perdure.core.state import inside
from perdure.core.tensors import read_tensors
from perdure.data.files import Files
from perdure.data.places import mark
from perdure.data.task import Class, Images, Probe, Query, Task
from perdure.engine.checkpoint import Saved, free_name, read_record, read_task
from perdure.engine.evaluate import hits
from perdure.engine.steps import BEGUN
from perdure.methods.base import Method

REFUSED, UNDONE = "refused_", "undone_"
Hits = dict[str, Tensor]  # by task, and of the probe: which test images are answered rightly, (N,) uint8


@dataclass(frozen=True)
class Learned:
    """A task that the model in use has learned, as its folder keeps it."""

    saved: Saved

    @property
    def name(self) -> str:
        return str(self.saved.record["task"])

    @property
    def about(self) -> dict[str, Any]:
        """Classes, counts, where the pictures came from, what is kept of them."""
        return dict(self.saved.record.get("about", {}))

    @property
    def classes(self) -> tuple[Class, ...]:
        return read_classes(self.about["classes"])

    @property
    def marks(self) -> set[str]:
        """What its pictures are known by."""
        return set(self.about.get("marks", []))

    def task(self, index: int) -> Task:
        """The task without its pictures."""
        none = Images(torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
        return Task(self.name, self.classes, none, none, index, labelled=bool(self.classes))

    def tests(self, view: tuple[int, Fit]) -> Images | None:
        """Its test pictures, where they are kept and still there."""
        kept = self.saved.record["files"].get("pictures")
        if kept is not None:
            found = read_tensors(inside(self.saved.folder.parent, kept["path"]), kept["sha256"])
            return Images(found["pixels"], found["labels"])
        paths = [Path(p) for p in self.about.get("paths", [])]
        if not paths or not all(path.is_file() for path in paths):
            return None
        now = [mark(path)[:16] for path in paths]
        if now != self.about.get("test_marks", now) or not self.marks.issuperset(now):
            return None  # others than those that were held out
        return Images(Files(tuple(paths), *view), torch.tensor(self.about["labels"], dtype=torch.int64))


def written(one: Class) -> list[Any]:
    """A class as a record keeps it."""
    return [one.name, list(one.templates), list(one.also)]


def read_classes(kept: Sequence[Sequence[Any]]) -> tuple[Class, ...]:
    """The inverse of ``written``, for several."""
    return tuple(Class(name, tuple(templates), tuple(also)) for name, templates, also in kept)


def numbered(folder: Path) -> list[Path]:
    """The current course of task folders, from row 0 on. ``DamagedFile`` where there is none, or one is missing."""
    found = {int(m.group(1)): p for p in sorted(folder.glob("task_*")) if (m := re.match(r"task_(\d+)_", p.name))}
    if not found:
        raise DamagedFile(f"{folder} holds nothing that was learned.")
    course = [found[number] for number in range(len(found)) if number in found]
    if len(course) < len(found):
        raise DamagedFile(
            f"{folder} lacks task number {len(course)}, though later ones are there. Put its folder back."
        )
    return course


def course(folder: Path, tensors: bool = True) -> tuple[list[Saved], list[Learned]]:
    """The states of the model in ``folder``, row 0's first, and the tasks that it knows by now; ``tensors``: the last state
    with all it holds.

    ``DamagedFile`` where something is missing or altered; it says how to go back to what is sound.
    """
    folders = numbered(folder)
    read: list[Saved] = []
    for number, one in enumerate(folders):
        try:
            read.append(read_task(one, tensors=tensors and one == folders[-1]))
        except DamagedFile as error:
            back = max(0, number - 1)
            raise DamagedFile(
                f"{error} What was learned before it is sound: perdure undo {folder} --to {back}"
            ) from None
    known: list[Learned] = []
    for saved in read[1:]:
        gone = saved.record.get("forgot")
        known = [one for one in known if one.name != gone] + ([] if gone else [Learned(saved)])
    return read, known


def known(folder: Path) -> list[Learned]:
    """The tasks that the model in ``folder`` knows; none where it is still to be made."""
    return course(folder, tensors=False)[1] if any(folder.glob("task_*")) else []


def set_back(folder: Path, to: int | None) -> list[Path]:
    """Take back the last task, or all after number ``to``: their folders are renamed, the last one first. Returns the new
    names. ``PerdureError`` where there is no such number."""
    folders, gone = numbered(folder), []
    to = len(folders) - 2 if to is None else to
    if not 0 <= to < len(folders) - 1:
        way = f"Undo the last, or go back --to a number from 0 to {len(folders) - 2}."
        way = way if len(folders) > 1 else "Nothing is to undo."
        raise PerdureError(f"{folder} has {len(folders) - 1} states after the first. {way}")
    for one in reversed(folders[to + 1 :]):
        place = free_name(one.with_name(UNDONE + one.name))
        os.replace(one, place)
        gone.append(place)
    return gone


def let_go(folder: Path) -> None:
    """Remove what was saved of trainings that were stopped: they are of no use once something else was learned."""
    for one in folder.glob(f"{BEGUN}task_*"):
        shutil.rmtree(one, ignore_errors=True)


def set_beside(folder: Path) -> list[dict[str, Any]]:
    """The records of what was refused or undone, each with its ``folder``; damaged ones are left out."""
    out = []
    for aside in (REFUSED, UNDONE):
        for one in sorted(folder.glob(f"{aside}task_*")):
            try:
                out.append({**read_record(one), "folder": one.name})
            except DamagedFile:
                continue
    return out


def history(folder: Path) -> list[dict[str, Any]]:
    """The records of all that was learned, each with its ``folder`` and ``state``: current, forgotten, refused or undone."""
    states, learned = course(folder, tensors=False)
    known, out = {one.saved.folder for one in learned}, []
    for one in states[1:]:
        forgotten = "forgot" not in one.record and one.folder not in known
        out.append({**one.record, "folder": one.folder.name, "state": "forgotten" if forgotten else "current"})
    for aside in set_beside(folder):
        out.append({**aside, "state": "refused" if aside["folder"].startswith(REFUSED) else "undone"})
    return sorted(out, key=lambda one: (one["when"], one["number"]))


# ---- measuring


@dataclass(frozen=True)
class Measured:
    """Hits of each task among its own classes (``own``; the probe among its), and among all that were learned."""

    own: Hits
    of_all: Hits


def all_classes(tasks: Sequence[Task]) -> tuple[Class, ...]:
    """The classes of several tasks, each once, in the order in which they were learned."""
    return tuple(dict.fromkeys(c for task in tasks for c in task.classes))


def measure(method: Method, tasks: Sequence[Task], tests: Mapping[str, Images], probe: Probe | None) -> Measured:
    """Ask about the test images of those tasks that have any, and of the probe; no one tells which task an image is from."""
    queries, labels, everything = {}, {}, all_classes(tasks)
    place = {one: k for k, one in enumerate(everything)}
    for task in tasks:
        if task.name not in tests:
            continue
        images = tests[task.name]
        queries["own", task.name] = Query(images.pixels, task.classes)
        labels["own", task.name] = images.labels
        queries["of_all", task.name] = Query(images.pixels, everything)
        labels["of_all", task.name] = torch.tensor([place[c] for c in task.classes])[images.labels]
    if probe is not None:
        queries["own", "probe"] = Query(probe.test.pixels, probe.classes)
        labels["own", "probe"] = probe.test.labels
    with method.clip.remembering(method.steady()):
        answers = method.answer(list(queries.values()))
    found: dict[str, Hits] = {"own": {}, "of_all": {}}
    for (kind, name), answer in zip(queries, answers, strict=True):
        found[kind][name] = hits(answer, labels[kind, name], name)
    return Measured(found["own"], found["of_all"])


def known_as(task: Task, learned: Sequence[Task]) -> tuple[Task, list[str]]:
    """``task`` with those classes that were learned before as they were then, and the names of these."""
    before = {" ".join(c.name.lower().split()): c for c in reversed(all_classes(learned))}
    classes = tuple(before.get(" ".join(c.name.lower().split()), c) for c in task.classes)
    names = [c.name for c in classes if c in before.values()]
    return replace(task, classes=classes), names
