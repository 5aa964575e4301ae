"""A run looked at again, stage by stage: ``perdure analyse RUN``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from perdure.core.caller import undisturbed
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.core.seeding import reseed
from perdure.core.state import only_one, write_json
from perdure.data.task import Context, Stream
from perdure.engine.analyse import agreement, asked, block_features, early_warning, measured
from perdure.engine.checkpoint import folder_names, read_task
from perdure.engine.evaluate import Protocol
from perdure.engine.settings import Settings, load_clip
from perdure.launch.folders import ANALYSIS
from perdure.launch.runs import built, reopen
from perdure.launch.sources import Asked
from perdure.methods.base import Method


def analyse(
    folder: str | Path, images: int = 256, on_stage: Callable[[str], None] | None = None, *,
    method: str | type[Method] | None = None, stream: Asked | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure every stage of a run that is kept, write ``analysis.json`` into its folder and return what it holds.

    ``images``: at most so many test images a task, and training images with captions. ``method`` and ``stream``: what a run
    of objects was begun with. Nothing of the run is changed.
    ``PerdureError`` where it has no finished task.
    """
    folder = expanded(folder)
    with undisturbed():
        config, data, first = reopen(folder, method, stream)
        settings = Settings.recorded(config["settings"])
        done = [folder / name for name in folder_names([t.name for t in data.tasks]) if (folder / name).exists()]
        if len(done) < 2:
            raise PerdureError(
                f"{folder} has no finished task yet, so there is nothing to compare. Go on: perdure resume {folder}"
            )
        torch.set_num_threads(settings.threads)
        clip = load_clip(config, data.model)
        data = data.at(*clip.view)
        protocol = Protocol(settings.labels, settings.task_id)  # type: ignore[arg-type]
        start, stages, tau = block_features(clip, data), [], 1 / clip.scale.item()
        for number, place in enumerate(done):
            if on_stage:
                on_stage(place.name)
            now = stage(config, data, place if number else None, method)
            seen = len(data.tasks) if now.scope == "stream" and number else number
            parts = asked(data, protocol, seen, images)
            stages.append({"task": place.name, **measured(now, data, parts, seen, start, images)})
        names = [task.name for task in data.tasks]
        found = {
            "format": 1, "method": config["method"], "stream": config["stream"], "seed": config["seed"], "tasks": names,
            "images": images, "tau": tau, "stages": stages, "experts": agreement(now, parts, seen),
            **(early_warning(stages, names) if first.scope == "task" else {}),
        }  # fmt: skip
        with only_one(folder):
            write_json(folder / ANALYSIS, found)
        return found


def stage(config: dict[str, Any], data: Stream, place: Path | None, kind: str | type[Method] | None) -> Method:
    """The method as it was when it wrote ``place``; None: the model before any."""
    clip = load_clip(config, data.model)
    method = built(config, kind) if place else Method()
    if place is None:
        method.join(clip, Context())
        return method
    reseed(config["seed"], "bind")
    method.bind(clip, data.context(config["seed"]))
    read_task(place, tensors=True).restore(method)
    return method
