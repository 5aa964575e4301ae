"""The loop over tasks: learn, fuse, calibrate, evaluate, save; again from the last good task after an interruption."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from perdure.core import processes, stopping
from perdure.core.caller import undisturbed
from perdure.core.errors import PerdureError
from perdure.core.seeding import reseed
from perdure.core.state import as_json, digest, only_one, write_json
from perdure.data.task import Context, Stream, Task
from perdure.engine.alike import check_folder, settle
from perdure.engine.checkpoint import Saved, folder_name, good_tasks, let_go, save_task
from perdure.engine.environment import forget_peak_memory, peak_memory_mb
from perdure.engine.evaluate import Protocol, evaluate, for_gap, gap, per_cent
from perdure.engine.explained import explanations
from perdure.engine.online import Between
from perdure.engine.settings import ELSEWHERE, Settings, load_clip
from perdure.engine.steps import Every, Steps, forget
from perdure.engine.summary import summary
from perdure.engine.teach import Teacher
from perdure.engine.watcher import Watcher
from perdure.methods.base import Method
from perdure.models.clip import CLIP
from perdure.training.fit import Losses


def run(method: Method, stream: Stream, config: dict[str, Any], folder: Path, watcher: Watcher) -> dict[str, Any]:
    """Run, or go on with, the run whose ``config.json`` (``config``, as it was written) lies in ``folder``; return the
    metrics, which it writes too.

    Killed at any moment and called again, it ends with the same bits as an undisturbed run on the same machine. What it
    changes of the process, random states and threads among it, is put back.
    """
    settings = Settings.recorded(config["settings"])
    with undisturbed(), only_one(folder):
        check_folder(folder)
        settings.take_effect()
        forget_peak_memory()
        clip = load_clip(config, stream.model)
        stream = stream.at(clip.size, clip.fit)
        stream.check(clip)
        done = all_good_tasks(folder, [t.name for t in stream.tasks], watcher.warn)
        for saved in done:
            if saved.record["config"] not in identities(config):
                raise PerdureError(
                    f"{folder}/config.json was changed after {saved.folder.name} was run. Start a new run."
                )
        if processes.main():
            forget(folder, [saved.folder.name for saved in done])
        loop = Loop(method, stream, config, settings, folder, watcher, done)
        with stopping.together():
            loop.begin(clip, done)
            while loop.next_task():
                pass
        metrics = loop.metrics()
        path = folder / "metrics.json"
        if processes.main() and (not path.exists() or path.read_bytes() != as_json(metrics)):
            write_json(path, metrics)  # a run killed just before it wrote them
        return processes.from_main(metrics)


def all_good_tasks(folder: Path, tasks: Sequence[str], warn: Callable[[str], None]) -> list[Saved]:
    """``good_tasks``, once the main process has set the others aside."""
    if processes.main():
        done = good_tasks(folder, tasks, warn)
    processes.barrier()
    return done if processes.main() else good_tasks(folder, tasks, warn)


DECIDES = ("method", "stream", "seed", "options", "settings", "split", "weights")


def identity(config: Mapping[str, Any]) -> str:
    """A digest of everything in a configuration, as it was written, that decides the result: where it is computed does not."""
    parts = {key: config[key] for key in DECIDES}
    parts["settings"] = {key: value for key, value in config["settings"].items() if key not in ELSEWHERE}
    # of a method or stream that was read from a file, its content: where it lies does not decide anything
    parts["source"] = {kind: about.get("sha256") for kind, about in config.get("source", {}).items()}
    return digest(json.dumps(json.loads(as_json(parts)), sort_keys=True).encode())


def identities(config: Mapping[str, Any]) -> tuple[str, str]:
    """The identity, and the one that runs were given before the device was left out."""
    parts = {key: config[key] for key in DECIDES}
    return identity(config), digest(as_json(json.loads(as_json(parts))))


class Loop:
    """The tasks of one run, and the rows they leave."""

    def __init__(
        self, method: Method, stream: Stream, config: dict[str, Any], settings: Settings, folder: Path, watcher: Watcher,
        done: list[Saved],
    ):  # fmt: skip
        self.method, self.stream, self.config, self.folder, self.watcher = method, stream, config, folder, watcher
        self.settings = settings
        self.protocol = Protocol(settings.labels, settings.task_id)  # type: ignore[arg-type]
        self.rows = [saved.files["hits"] for saved in done]
        self.records = [saved.record for saved in done]
        self.teacher = Teacher(method, config["seed"], settings, watcher)
        self.between = Between(method, stream, self.protocol, settings.evaluate_every)
        self.teacher.stepped = self.stepped
        self.gap_images = for_gap(stream)
        shown = [self.shown(hits) for hits in self.rows]
        watcher.begins([t.name for t in stream.tasks], [a for a, _ in shown], [p for _, p in shown if p is not None])

    def begin(self, clip: CLIP, done: list[Saved]) -> None:
        """Bind the method, at the last task that is done; row 0 is the model before the method has touched it."""
        start = time.perf_counter()
        if not done:
            self.watcher.learns("before", 0)
            self.watcher.evaluates()
            born = Method()
            born.join(clip, Context())
            hits, found = self.evaluated(born, 0)
        reseed(self.config["seed"], "bind")
        heard = self.watcher.draws, self.watcher.warn
        self.method.bind(clip, self.stream.context(self.config["seed"], self.folder, *heard, self.protocol.labels))
        self.method.lend(self.teacher.train)
        if done:
            done[-1].restore(self.method)
            done[-1].files = {}  # no second copy while the rest is learned
        else:
            self.keep(0, "before", hits, found, Losses(), (start, start))

    def shown(self, hits: dict[str, Tensor]) -> tuple[list[float], float | None]:
        """A row as accuracies in per cent, and the probe's."""
        return [per_cent(hits[t.name]) for t in self.stream.tasks], per_cent(hits["probe"]) if "probe" in hits else None

    def next_task(self) -> bool:
        """Do the next task; False when all are done."""
        number = len(self.rows)
        stopping.stop_together()
        if number > len(self.stream.tasks):
            return False
        name = self.stream.tasks[number - 1].name
        self.watcher.learns(name, number)
        task, steps = self.to_learn(number), self.steps(number, name)
        self.between.begins(number, task)
        start = time.perf_counter() - steps.spent
        losses = self.teacher.learn(task, number, None if self.settings.evaluate_every else steps)
        settle(self.method, name)
        trained = time.perf_counter()
        stopping.stop_together()
        self.watcher.evaluates()
        held = self.method.clip.holds
        hits, found = self.evaluated(self.method, number)
        assert self.method.clip.holds == held, "an evaluation must leave the model as it was"
        with stopping.held():
            self.keep(number, name, hits, found, losses, (start, trained))
            steps.done()
        return True

    def stepped(self, step: int, total: int, losses: Mapping[str, Tensor]) -> None:
        """A step of a task is done."""
        self.watcher.step(step, total, losses)
        self.between.taken(step, total, losses)

    def steps(self, number: int, name: str) -> Steps:
        """Where a task's trainings are saved until it is done; one that is asked about while it learns is learned anew."""
        files = self.records[-1].get("files", {})  # which the main process alone has written
        after = processes.from_main(digest(as_json({key: about["sha256"] for key, about in sorted(files.items())})))
        every = Every.read(self.settings.save_every)
        return Steps(self.folder, folder_name(number, name), identities(self.config), after, every, self.watcher.warn)

    def keep(
        self, number: int, name: str, hits: dict[str, Tensor], found: dict[str, float], losses: Losses,
        times: tuple[float, float],
    ) -> None:  # fmt: skip
        """Write a row and all that belongs to it. ``times``: when the task began, and when it was learned."""
        start, trained = times
        method = self.method
        why = (
            {"explained": explanations(method, self.stream, self.protocol, number)}
            if number and method.explains()
            else {}
        )
        asked = self.between
        if number and (self.settings.online or self.settings.evaluate_every):
            asked.add(hits)
        record = {
            "task": name,
            "number": number,
            "losses": losses,
            "phases": self.teacher.phases,
            "remarks": finite(self.method.remarks()) if number else {},
            "gap": found,
            "seconds": {
                "train": round(trained - start - asked.seconds, 3),
                "evaluate": round(time.perf_counter() - trained + asked.seconds, 3),
            },
            **({"online": {"points": asked.points, "images": asked.shown()}} if asked.points else {}),
            "peak_memory_mb": peak_memory_mb(),
            "config": identity(self.config),
            **why,
        }
        if processes.main():
            kept = self.records[-1]["files"] if self.records else {}
            record = save_task(self.folder, folder_name(number, name), self.method, hits, record, kept)
        self.records.append(record)
        self.rows.append(hits)
        if processes.main():
            if self.settings.keep == "last":
                earlier = [folder_name(k, one["task"]) for k, one in enumerate(self.records[:-1])]
                let_go(self.folder, earlier, self.records[-1])
            write_json(self.folder / "metrics.json", self.metrics())
        self.watcher.row(*self.shown(hits))

    def evaluated(self, method: Method, number: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """A row's hits and modality gap. What weights that never change make of the stream is worked out once a run; modules
        of a method's own may act on the towers, so there it is not."""
        with method.clip.remembering(method.steady()):
            same = number > 0 and self.same_as_before(number)
            hits = self.rows[-1] if same else evaluate(method, self.stream, self.protocol, number)
            return hits, gap(method, self.gap_images)

    def same_as_before(self, number: int) -> bool:
        """Whether a row must equal the one above: nothing was learned since, and nothing else is asked."""
        unchanged = not self.method.learns or self.to_learn(number) is None
        return unchanged and self.protocol.labels != "seen"

    def to_learn(self, number: int) -> Task | None:
        """The task that a row stands for; a method that sees the whole stream learns it all before row 1."""
        if self.method.scope == "task":
            return self.stream.tasks[number - 1]
        return self.stream.joined(grouped=self.protocol.labels == "task") if number == 1 else None

    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``."""
        return summary(self.config, self.settings, self.method, self.stream, self.protocol, self.rows, self.records)


def finite(remarks: Any) -> Any:
    """What a method says of itself. ``PerdureError`` for a value that is no number."""
    for key, value in remarks.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise PerdureError(f"What the method says of itself holds a value that is no number: '{key}' is {value}.")
    return remarks
