"""The state of a model in use: a method with all it learned."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from perdure.benchmarks import mini
from perdure.core.errors import PerdureError, unknown
from perdure.core.seeding import reseed
from perdure.core.state import as_json, digest, write_json
from perdure.data.checks import check_texts
from perdure.data.task import Context, Images, Probe, Stream, Task
from perdure.engine.checkpoint import Saved, folder_name, read_task, save_task
from perdure.engine.environment import forget_peak_memory, peak_memory_mb
from perdure.engine.home import Hits, Learned, Measured, all_classes, measure
from perdure.engine.run import identity
from perdure.engine.settings import Settings, load_clip
from perdure.engine.steps import Every, Steps
from perdure.engine.teach import Teacher
from perdure.engine.watcher import Watcher
from perdure.launch.learner.comparison import Row, compared
from perdure.launch.learner.probe import keep_probe, probe_of
from perdure.launch.runs import built
from perdure.methods.base import Method


@dataclass
class Current:
    """The state that answers now: a method with all it learned, and what it can be measured on."""

    method: Method
    states: list[Saved]
    learned: list[Learned]
    probe: Probe | None

    @property
    def last(self) -> Saved:
        return self.states[-1]

    @property
    def tasks(self) -> list[Task]:
        return [one.task(k) for k, one in enumerate(self.learned)]

    def rows(self, *new: Task) -> list[str]:
        """What a table of accuracies has a row for: the tasks that have classes, ``new`` ones, and the probe."""
        return [*(task.name for task in (*self.tasks, *new) if task.labelled), "probe"]

    def tests(self) -> dict[str, Images]:
        """The test pictures that are kept and there, by task."""
        found = {one.name: one.tests(self.method.clip.view) for one in self.learned}
        return {name: images for name, images in found.items() if images is not None}

    def before(self, task: Task) -> Hits:
        """What is answered rightly before ``task`` is learned, of it too. What a method makes of the model before it has
        learned anything is no answer: there it is the model's own."""
        if not task.labelled:
            return self.hits()
        asked = self.method
        if not self.learned:
            asked = Method()
            asked.join(self.method.clip, Context())
        return {**self.hits(), **measure(asked, [task], {task.name: task.test}, None).own}

    def measure(self, *new: Task) -> Measured:
        """What is answered rightly now, of the tasks that can be measured, ``new`` ones and the probe."""
        tests = {**self.tests(), **{task.name: task.test for task in new if task.labelled}}
        return measure(self.method, [*self.tasks, *new], tests, self.probe)

    def teacher(self, config: Mapping[str, Any], watcher: Watcher) -> Teacher:
        """Who takes it through the next task."""
        forget_peak_memory()
        teacher = Teacher(self.method, config["seed"], Settings.recorded(config["settings"]), watcher)
        self.method.lend(teacher.train)
        return teacher

    def steps(self, folder: Path, config: Mapping[str, Any], task: Task, about: Any, watcher: Watcher) -> Steps:
        """Where the trainings of ``task`` are saved until it is learned: a stop costs no more than what came after the last.
        They belong to these pictures, after what is known now; ``about``: what the task's record says."""
        files = {key: one["sha256"] for key, one in sorted(self.last.record["files"].items())}
        after = digest(
            as_json(
                {"files": files, "about": about, "labels": task.train.labels.tolist(), "texts": task.train.captions}
            )
        )
        every = Every.read(Settings.recorded(config["settings"]).save_every)
        name = folder_name(len(self.states), task.name)
        return Steps(folder, name, [identity(config)], after, every, watcher.warn)

    def hits(self) -> Hits:
        """What was measured when the last task was learned."""
        return self.last.files["hits"]


def bound(folder: Path, config: Mapping[str, Any], tasks: Sequence[Task], watcher: Watcher) -> Method:
    """The method on the model it began with, before it is put where it was; it knows of ``tasks``."""
    Settings.recorded(config["settings"]).take_effect()
    clip = load_clip(config, str(mini.MODEL))
    reseed(config["seed"], "bind")
    method, heard = built(config), (watcher.draws, watcher.warn)
    offered = str(mini.GENERATOR), mini.vocabulary(), *heard, tuple(tasks), "seen"
    method.bind(clip, Context(config["seed"], folder, config["stream"], *offered))
    return method


def uncompiled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration to answer with: what is compiled answers the same, later."""
    return {**config, "settings": {**config["settings"], "compile": False}}


def begin(folder: Path, config: dict[str, Any], watcher: Watcher) -> None:
    """Make a HOME, or what a stop has left undone of it: its configuration, the probe's pictures, row 0."""
    path = folder / "config.json"
    if path.exists() and any(folder.glob("task_00_*")):
        return
    method = bound(folder, config, [], watcher)
    if not path.exists():
        keep_probe(folder, config, method.clip)
        write_json(path, config)
    born, start = Method(), time.perf_counter()
    born.join(load_clip(config, str(mini.MODEL)), Context())
    found = measure(born, [], {}, probe_of(folder, config, method.clip))
    row0, now = noted("before", 0, (start, start)), Current(method, [], [], None)
    write_state(folder / folder_name(0, "before"), config, now, found, row0)


def write_state(
    place: Path, config: Mapping[str, Any], now: Current, after: Measured, record: dict[str, Any], rows: Sequence[Row] = (),
    files: Mapping[str, dict[str, Tensor]] | None = None,
) -> None:  # fmt: skip
    """Write a state, whole or not at all. ``files``: more tensors, by the names of their files."""
    record |= {"config": identity(config), "rows": [row.as_json() for row in rows]}
    kept = now.last.record["files"] if now.states else {}
    more = {"hits_of_all": after.of_all, **(files or {})}
    save_task(place.parent, place.name, now.method, after.own, record, kept, more)


def forget(folder: Path, config: Mapping[str, Any], now: Current, name: str) -> list[Row]:
    """Write a state that knows all but task ``name``; what became of the others. ``PerdureError`` where it is not known."""
    start, place = time.perf_counter(), {one.name: now.states.index(one.saved) for one in now.learned}
    if name not in place:
        raise unknown("task", name, place) if place else PerdureError(f"{folder} has learned nothing yet.")
    old, then = (read_task(now.states[place[name] - back].folder, tensors=True) for back in (1, 0))
    now.method.forget(name, old.packed(), then.packed())
    rest = replace(now, learned=[one for one in now.learned if one.name != name])
    after, number = rest.measure(), len(now.states)
    rows = compared(rest.rows(), now.hits(), after.own, after.of_all)
    record = noted(f"without {name}", number, (start, time.perf_counter())) | {"forgot": name}
    write_state(folder / folder_name(number, f"without-{name}"), config, rest, after, record, rows)
    return rows


def noted(name: str, number: int, times: tuple[float, float]) -> dict[str, Any]:
    """What every state's record holds. ``times``: when it began, and when it was learned."""
    start, learned = times
    return {
        "task": name, "number": number, "losses": {}, "phases": {}, "remarks": {}, "gap": None,
        "seconds": {"train": round(learned - start, 3), "evaluate": round(time.perf_counter() - learned, 3)},
        "peak_memory_mb": peak_memory_mb(), "when": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
    }  # fmt: skip


def check_task(task: Task, now: Current) -> list[str]:
    """Refuse, before anything is computed, pictures and classes that the model cannot be shown or asked, among all that it
    knows too. What to say of the others."""
    clip = now.method.clip
    Stream(task.name, (replace(task, index=0),), None, "", "").check(clip)
    check_texts(all_classes([*now.tasks, task]), clip, f"{task.name}, beside what is known")
    born = {c.name.lower() for c in now.probe.classes} if now.probe else set()
    taught = sorted(born & {c.name.lower() for c in task.classes})
    return taught and [
        f"The probe holds classes that are taught here ({', '.join(taught[:3])}{', …' if taught[3:] else ''}): of them it says "
        "nothing of what the model could do before."
    ]
