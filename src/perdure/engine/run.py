"""The loop over tasks: learn, fuse, calibrate, evaluate, save; again from the last good task after an interruption."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.precision import precision_of
from perdure.core.seeding import reseed
from perdure.core.state import as_json, digest, only_one, write_json
from perdure.data.splits import reordered
from perdure.data.task import Stream, Task
from perdure.engine.checkpoint import Saved, folder_name, good_tasks, save_task
from perdure.engine.evaluate import Protocol, evaluate, gap, per_cent, summarise
from perdure.methods.base import Method
from perdure.models.clip import CLIP
from perdure.training.fit import fit

FORMAT = 1
THREADS = torch.get_num_threads()  # before any run changes it


@dataclass(frozen=True)
class Settings:
    """What a run needs beyond the method's options."""

    model: Annotated[str, Field(description="folder or Hub id of a CLIP; empty: the stream's own")] = ""
    labels: Annotated[
        Literal["stream", "task", "seen", "all"], Field(description="classes that compete; stream: as is usual there")
    ] = "stream"
    task_id: Annotated[
        Literal["stream", "known", "hidden"], Field(description="whether the task is told; stream: as is usual there")
    ] = "stream"
    precision: Annotated[
        Literal["auto", "bf16", "fp32"], Field(description="of training; auto: bf16 where the processor has it")
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="auto: an accelerator if there is one")] = (
        "auto"
    )
    threads: Annotated[int, Field(ge=0, le=1024, description="processor threads; 0: as torch chooses")] = 0
    tasks: Annotated[int, Field(ge=0, description="only the first tasks, for a quick look; 0: all")] = 0
    images: Annotated[
        int, Field(ge=0, description="at most so many images a task and side, for a quick look; 0: all")
    ] = 0

    shots: Annotated[int, Field(ge=0, description="training images a class, drawn by the seed (few-shot); 0: all")] = 0

    class_order: Annotated[
        str,
        BeforeValidator(str),
        Field(description="class-incremental: a seed, or a JSON file of class names; empty: the stream's own"),
    ] = ""

    def cut(self, stream: Stream, seed: int) -> Stream:
        """The part of ``stream`` that a run is to see."""
        stream = reordered(stream, self.class_order) if self.class_order else stream
        return stream.shortened(self.tasks, self.images).few_shot(self.shots, seed)

    def settled(self, stream: Stream) -> Settings:
        """With every choice made, as a run records it."""
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise PerdureError("device=cuda: torch finds no CUDA device here. Use device=cpu.")
        return replace(
            self,
            model=str(Path(self.model).resolve())
            if Path(self.model).is_dir() and self.model
            else self.model or "stream",
            class_order=str(Path(self.class_order).resolve()) if Path(self.class_order).is_file() else self.class_order,
            labels=stream.labels if self.labels == "stream" else self.labels,  # type: ignore[arg-type]
            task_id=stream.task_id if self.task_id == "stream" else self.task_id,  # type: ignore[arg-type]
            precision=precision_of(self.precision, device),  # type: ignore[arg-type]
            device=device,
            threads=self.threads or THREADS,
        )


class Watcher:
    """Hears how a run goes; the command line's draws it. The default is silent."""

    def begins(self, tasks: list[str], rows: list[list[float]], probe: list[float]) -> None:
        """A run begins or goes on, with the rows it has."""

    def learns(self, task: str, number: int) -> None:
        """Task ``number`` (1 … T) is being learned; 0: the model is looked at before any."""

    def draws(self, done: int, total: int, new: int) -> None:
        """Of ``total`` synthetic images for the task ``done`` are there, ``new`` of them since the last call."""

    def step(self, step: int, total: int, losses: Mapping[str, Tensor]) -> None:
        """A training step is done."""

    def evaluates(self) -> None:
        """All tasks and the probe are being evaluated."""

    def row(self, accuracy: list[float], probe: float | None) -> None:
        """A row of the accuracy matrix is known and safe on disk."""

    def warn(self, text: str) -> None:
        """Something the user should know."""
        print(text, file=sys.stderr)


def environment(settings: Settings) -> dict[str, Any]:
    """Versions and machine: what may change a result's bits."""
    packages = ("torch", "transformers", "diffusers", "peft", "safetensors", "numpy", "perdure")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "device": settings.device,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def forget_peak_memory() -> None:
    """Start measuring the peak anew, where the system can: a process may do several runs."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """The most memory this process has held since ``forget_peak_memory`` (elsewhere than on Linux: ever), in MB."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1.024e-3, 1)
    try:
        import resource
    except ImportError:  # not on this system
        return 0.0
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 976.6), 1)


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
        method.bind(clip, stream.surroundings(seed, folder, watcher.draws, watcher.warn))
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
