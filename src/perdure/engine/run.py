"""The loop over tasks: learn, fuse, calibrate, evaluate, save; again from the last good task after an interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.seeding import reseed
from perdure.core.state import as_json, digest, only_one, write_json
from perdure.data.task import Stream, Task
from perdure.engine.checkpoint import Saved, folder_name, good_tasks, save_task
from perdure.engine.environment import forget_peak_memory, peak_memory_mb
from perdure.engine.evaluate import Protocol, evaluate, gap, per_cent, summarise
from perdure.engine.settings import Settings
from perdure.engine.watcher import Watcher
from perdure.methods.base import Method
from perdure.models.clip import CLIP
from perdure.training.fit import fit

FORMAT = 1


def run(method: Method, stream: Stream, config: dict[str, Any], folder: Path, watcher: Watcher) -> dict[str, Any]:
    """Run, or go on with, the run whose ``config.json`` lies in ``folder``; return the metrics, which it writes too.

    Killed at any moment and called again, it ends with the same bits as an undisturbed run on the same machine.
    """
    settings, seed = Settings(**config["settings"]), config["seed"]
    torch.set_num_threads(settings.threads)
    forget_peak_memory()
    with only_one(folder):
        clip = CLIP.load(stream.model if settings.model == "stream" else settings.model, settings.device)
        if clip.fingerprint() != config["weights"]:
            raise PerdureError(f"{clip.path} is not the CLIP that {folder} began with. Start a new run.")
        reseed(seed, "bind")
        method.bind(clip, stream.context(seed, folder, watcher.draws, watcher.warn))
        done = good_tasks(folder, [t.name for t in stream.tasks], watcher.warn)
        for saved in done:
            if saved.record["config"] != identity(config):
                raise PerdureError(
                    f"{folder}/config.json was changed after {saved.folder.name} was run. Start a new run."
                )
        if done:
            done[-1].restore(method)
        loop = Loop(method, stream, config, folder, watcher, done)
        while loop.next_task():
            pass
        metrics = loop.metrics()
        path = folder / "metrics.json"
        if not path.exists() or path.read_bytes() != as_json(metrics):
            write_json(path, metrics)  # a run killed just before it wrote them
        return metrics


def identity(config: Mapping[str, Any]) -> str:
    """A digest of everything in a configuration that decides the result."""
    parts = {key: config[key] for key in ("method", "stream", "seed", "options", "settings", "split", "weights")}
    return digest(as_json(json.loads(as_json(parts))))


class Loop:
    """The tasks of one run, and the rows they leave."""

    def __init__(
        self, method: Method, stream: Stream, config: dict[str, Any], folder: Path, watcher: Watcher, done: list[Saved]
    ):
        self.method, self.stream, self.config, self.folder, self.watcher = method, stream, config, folder, watcher
        self.settings = Settings(**config["settings"])
        self.protocol = Protocol(self.settings.labels, self.settings.task_id)  # type: ignore[arg-type]
        self.rows = [saved.files["hits"] for saved in done]
        self.records = [saved.record for saved in done]
        shown = [self.shown(hits) for hits in self.rows]
        watcher.begins([t.name for t in stream.tasks], [a for a, _ in shown], [p for _, p in shown if p is not None])

    def shown(self, hits: dict[str, Tensor]) -> tuple[list[float], float | None]:
        """A row as accuracies in per cent, and the probe's."""
        return [per_cent(hits[t.name]) for t in self.stream.tasks], per_cent(hits["probe"]) if "probe" in hits else None

    def next_task(self) -> bool:
        """Do the next task, row 0 first; False when all are done."""
        number = len(self.rows)
        if number > len(self.stream.tasks):
            return False
        name = self.stream.tasks[number - 1].name if number else "before"
        self.watcher.learns(name, number)
        start = time.perf_counter()
        losses = self.learn(number) if number else {}
        trained = time.perf_counter()
        self.watcher.evaluates()
        hits = (
            self.rows[-1] if self.same_as_before(number) else evaluate(self.method, self.stream, self.protocol, number)
        )
        record = {
            "task": name,
            "number": number,
            "losses": losses,
            "gap": gap(self.method, self.stream),
            "seconds": {"train": round(trained - start, 3), "evaluate": round(time.perf_counter() - trained, 3)},
            "peak_memory_mb": peak_memory_mb(),
            "config": identity(self.config),
        }
        kept = self.records[-1]["files"] if self.records else {}
        self.records.append(save_task(self.folder, folder_name(number, name), self.method, hits, record, kept))
        self.rows.append(hits)
        write_json(self.folder / "metrics.json", self.metrics())
        self.watcher.row(*self.shown(hits))
        return True

    def same_as_before(self, number: int) -> bool:
        """Whether a row must equal the one above: nothing was learned since, and nothing else is asked."""
        unchanged = number > 0 and (not self.method.learns or self.to_learn(number) is None)
        return unchanged and self.protocol.labels != "seen"

    def learn(self, number: int) -> dict[str, list[float]]:
        """Learn task ``number`` (1 …); return its losses, one value a step by name."""
        task = self.to_learn(number)
        generator = reseed(self.config["seed"], number)
        if task is None or not self.method.learns:
            return {}
        clip = self.method.clip
        self.method.start(task)
        self.method.begin_task(task)
        losses = fit(self.method, task, generator, clip.size, clip.device, self.settings.precision, self.watcher.step)
        if losses:
            clip.trained(f"trained {task.name}")
        self.method.fuse(task)
        self.method.calibrate(task)
        return losses

    def to_learn(self, number: int) -> Task | None:
        """The task that a row stands for; a method that sees the whole stream learns it all before row 1."""
        if self.method.scope == "task":
            return self.stream.tasks[number - 1]
        return self.stream.joined(grouped=self.protocol.labels == "task") if number == 1 else None

    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``."""
        tasks = [t.name for t in self.stream.tasks]
        figures = summarise(self.stream, self.rows, self.protocol, transfers=self.method.scope == "task")
        seconds = [r["seconds"] for r in self.records]
        c = self.config
        return {
            "format": FORMAT,
            "perdure": c["environment"]["perdure"],
            "finished": len(self.rows) == len(tasks) + 1,
            "method": c["method"],
            "stream": c["stream"],
            "seed": c["seed"],
            "tasks": tasks,
            **figures,
            "gap": [r.get("gap") for r in self.records],
            "seconds": round(sum(s["train"] + s["evaluate"] for s in seconds), 2),
            "seconds_by_task": [{"task": r["task"], **r["seconds"]} for r in self.records],
            "peak_memory_mb": max(r["peak_memory_mb"] for r in self.records),
            "losses": {r["task"]: thinned(r["losses"]) for r in self.records if r["losses"]},
            "protocol": {"labels": self.protocol.labels, "task_id": self.protocol.task_id},
            "config": {**c["options"], **asdict(self.settings)},
            "environment": c["environment"],
            "data": {"name": self.stream.name, "split": self.stream.digest, "notes": list(self.stream.notes)},
        }


def thinned(losses: dict[str, list[float]], points: int = 60) -> dict[str, list[float]]:
    """Losses as means over at most ``points`` stretches of steps, with the step at which each ends."""
    length = len(next(iter(losses.values())))
    size = -(-length // points)
    edges = range(0, length, size)
    means = {n: [round(sum(v[i : i + size]) / len(v[i : i + size]), 5) for i in edges] for n, v in losses.items()}
    return {"step": [min(i + size, length) for i in edges], **means}
