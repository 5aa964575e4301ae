"""Pictures that a model in use is to learn: read, known again, without those that it was shown before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from perdure.benchmarks import STREAMS, mini
from perdure.benchmarks.folder import load_folder
from perdure.benchmarks.own.pictures import Pictures
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.core.state import as_json, digest
from perdure.data import folders
from perdure.data.files import Files
from perdure.data.places import mark
from perdure.data.task import Images, Stream, Task
from perdure.engine.home import Learned, known_as, written
from perdure.launch.learner.comparison import Outcome, Outcomes
from perdure.launch.sources import find_stream, plug_in


def pictures_of(what: str | Path | Pictures | Stream, name: str) -> tuple[Callable[[], Stream], Stream]:
    """How the pictures that somebody means are read, and the stream they make. A folder is a folder, whatever stream bears its
    name; ``name``: of the one task, in the place of its own."""
    given = Pictures(str(what)) if isinstance(what, str | Path) else what
    if isinstance(given, Pictures) and given.kind == "folder":  # which may be called what no task can be
        make: Callable[[], Stream] = partial(load_folder, given.settled().path, name)
    else:
        plug_in("perdure.streams")
        code = isinstance(given, Pictures) and given.where.partition(":")[0].endswith(".py")
        if isinstance(given, Pictures) and not given.kind and not code and any(mark in given.where for mark in "/\\."):
            there = "is a file" if expanded(given.where).exists() else "is not there"
            raise PerdureError(f"{what} {there}. Give a folder of pictures: CLASS/*, or TASK/CLASS/*.")
        if isinstance(given, Pictures) and not given.kind and not code and all(e.name != given.where for e in STREAMS):
            raise PerdureError(f"There is no folder {what}. Give a folder of pictures: CLASS/*, or TASK/CLASS/*.")
        find = find_stream(given.where if isinstance(given, Pictures) and not given.kind else given)[0]
        make = lambda: named(find(), name)  # noqa: E731
    return make, make()


def unlabelled_pictures(what: str | Path | Pictures | Stream, name: str) -> tuple[Callable[[], Stream], Stream]:
    """As ``pictures_of``, of all pictures below a folder, which are of no class: one task. ``PerdureError`` for what is no
    folder."""
    given = what.where if isinstance(what, Pictures) else what
    if isinstance(given, Stream) or not expanded(given).is_dir():
        shown = given.name if isinstance(given, Stream) else given
        raise PerdureError(f"{shown} is no folder. Pictures without labels are learned from a folder that holds them.")
    base = expanded(given).resolve()

    def make() -> Stream:
        found = folders.pictures(base)
        images = Images(Files(tuple(found), mini.SIDE), torch.zeros(len(found), dtype=torch.int64))
        task = Task(name or base.name, (), images, images.take(torch.arange(0)), labelled=False)
        whole = digest(as_json([[path.relative_to(base).as_posix(), mark(path)] for path in found]))
        notes = (f"Pictures of {base.name}: the user's own.",)
        return Stream(base.name, (task,), mini.probe(), str(mini.MODEL), whole, notes=notes)

    return make, make()


def named(stream: Stream, name: str) -> Stream:
    """A stream whose one task is called ``name``, where that is given."""
    if not name:
        return stream
    if len(stream.tasks) > 1:
        raise PerdureError(
            f"{stream.name} holds {len(stream.tasks)} tasks, which have names of their own: leave '{name}' out."
        )
    return replace(stream, tasks=(replace(stream.tasks[0], name=name),))


def check_apart(home: Path, pictures: object) -> None:
    """Refuse a HOME inside the folder that it learns from: what it keeps would be taken for pictures."""
    if (
        isinstance(pictures, str | Path)
        and expanded(pictures).is_dir()
        and home.resolve().is_relative_to(expanded(pictures).resolve())
    ):
        raise PerdureError(f"{home} would lie inside {pictures}, among the pictures. Give a HOME beside that folder.")


def check_unchanged(make: Callable[[], Stream], stream: Stream) -> None:
    """Refuse what was learned from a folder that has changed meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were given when it was read first
        now = make()
    if now.digest != stream.digest:
        raise PerdureError(
            f"The pictures of {stream.name} changed while they were being learned. Nothing was learned; do it again when all "
            "are there."
        )


def marks(images: Images) -> list[str]:
    """What each picture is known by, wherever it lies: the first 16 digits of the sha256 of its file or pixels."""
    if isinstance(images.pixels, Files):
        return [mark(path)[:16] for path in images.pixels.paths]
    return [digest(image.contiguous().numpy().tobytes())[:16] for image in images.pixels[:]]


def new_among(task: Task, learned: Sequence[Learned]) -> tuple[Task, list[str], list[str]]:
    """The task without pictures that were learned or held out before; the marks of the rest; what to say."""
    before = {m: one.name for one in learned for m in sorted(one.marks)}
    sides, kept, old = [], [], []
    for images in (task.train, task.test):
        own = marks(images)
        index = [k for k, m in enumerate(own) if m not in before]
        old += [m for m in own if m in before]
        kept += [own[k] for k in index]
        sides.append(images if len(index) == len(own) else images.take(torch.tensor(index, dtype=torch.int64)))
    if not old:
        return task, kept, []
    where = ", ".join(dict.fromkeys(before[m] for m in old))
    said = f"{len(old)} of {len(old) + len(kept)} pictures were shown before ({where}): they are left out."
    return replace(task, train=sides[0], test=sides[1]), kept, [said]


def with_tests(task: Task) -> tuple[Task, int]:
    """The task with a picture held out of each class that has several to train on, or one of all: those whose bytes come
    first; and how many they are."""
    own, chosen = marks(task.train), list[int]()
    for label in task.train.labels.unique().tolist():
        several = (task.train.labels == label).nonzero().squeeze(1).tolist()
        chosen += [min(several, key=own.__getitem__)] if len(several) > 1 else []
    if not chosen and len(own) > 1:
        chosen = [min(range(len(own)), key=own.__getitem__)]
    rest = [k for k in range(len(own)) if k not in set(chosen)]
    train, test = (task.train.take(torch.tensor(part, dtype=torch.int64)) for part in (rest, chosen))
    return replace(task, train=train, test=test), len(chosen)


def prepared(task: Task, learned: Sequence[Learned]) -> tuple[Task | None, dict[str, Any], list[str]]:
    """The task as it is to be learned after others, what its record says, and what to tell. None: it was learned before.

    ``PerdureError`` where its name is taken, or nothing is left to learn or to measure.
    """
    task, own, said = new_among(task, learned)
    if not own:
        return None, {}, said
    if any(one.name == task.name for one in learned):
        raise PerdureError(
            f"A task '{task.name}' is learned already, of other pictures. Give this one a name of its own: --name "
            f"{task.name}-2; of several tasks its folder."
        )
    if task.labelled and len(task.train) and not len(task.test):
        task, some = with_tests(task)
        said += [f"No test picture is among the new ones: {some} of them are held out, by their bytes."] if some else []
    for side, images in (("training", task.train), ("test", task.test)):
        if not len(images) and (task.labelled or side == "training"):
            raise PerdureError(
                f"{task.name}: no {side} picture is left, as all of that side were shown before. Give it more pictures."
            )
    task, again = known_as(task, [one.task(k) for k, one in enumerate(learned)])
    if again:
        said.append(
            f"{len(again)} of its {len(task.classes)} classes are known already ({', '.join(again[:5])}"
            f"{', …' if len(again) > 5 else ''}): a head adds the new pictures to what it knows of them; an expert a task "
            "learns them anew."
        )
    about = {
        "classes": [written(c) for c in task.classes], "train": len(task.train), "test": len(task.test),
        "marks": own,
    }  # fmt: skip
    return task, about, said


def planned(stream: Stream, learned: Sequence[Learned]) -> Outcomes:
    """What would be learned, in words."""
    out = []
    for task in stream.tasks:
        ready, about, said = prepared(task, learned)
        if ready is not None:
            names = ", ".join(c.name for c in ready.classes)
            said.append(
                f"{ready.name} would be learned: {about['train']} training and {about['test']} test pictures of "
                f"{len(ready.classes)} classes ({names})."
                if ready.labelled
                else f"{ready.name} would be learned: {about['train']} pictures without labels."
            )
        out.append(Outcome(task.name, already=ready is None, planned=True, notes=tuple(said)))
    return Outcomes(out)
