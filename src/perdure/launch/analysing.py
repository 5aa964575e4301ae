"""A run looked at again, stage by stage: ``perdure analyse RUN``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from perdure.core.caller import undisturbed
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.core.seeding import reseed
from perdure.core.state import inside, only_one, write_json
from perdure.data.files import Files
from perdure.data.task import Context, Images, Stream
from perdure.engine.analyse import agreement, asked, block_features, early_warning, measured
from perdure.engine.checkpoint import folder_names, read_task
from perdure.engine.evaluate import Protocol
from perdure.engine.settings import Settings, load_clip
from perdure.launch.folders import ANALYSIS
from perdure.launch.runs import built, reopen
from perdure.launch.sources import Asked
from perdure.methods.base import Method
from perdure.models.clip import CLIP
from perdure.synthesis.store import Store


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
        settings.take_effect()
        again = Again(folder, config, data, method)
        stages = [again.stage(k, place, images, on_stage or str) for k, place in enumerate(done)]
        names = [task.name for task in data.tasks]
        found = {
            "format": 1, "method": config["method"], "stream": config["stream"], "seed": config["seed"], "tasks": names,
            "images": images, "tau": 1 / again.clip.scale.item(), "stages": stages, "experts": again.agreement(),
            **(early_warning(stages, names) if first.scope == "task" else {}),
        }  # fmt: skip
        with only_one(folder):
            write_json(folder / ANALYSIS, found)
        return found


def replayed(folder: Path, options: Mapping[str, Any], clip: CLIP) -> Images | None:
    """The synthetic pairs of a run, one a text: between texts that are alike there is no margin. None where there are none, or
    they are gone."""
    base = Path(options.get("pairs") or folder / "pairs")
    if not (base / "store.json").is_file():
        return None
    file_of = {e.prompt: inside(base, e.file) for e in Store(base, {}).entries.values() if e.file}
    pictures = Files(tuple(file_of.values()), *clip.view)
    return Images(pictures, torch.zeros(len(file_of), dtype=torch.int64), tuple(file_of))


class Again:
    """A run's model put together again, stage by stage. ``kind``: its method, where that was handed over as an object."""

    def __init__(self, folder: Path, config: dict[str, Any], data: Stream, kind: str | type[Method] | None):
        self.config, self.kind = config, kind
        settings = Settings.recorded(config["settings"])
        self.clip = load_clip(config, data.model)
        self.data = data.at(*self.clip.view)
        self.protocol = Protocol(settings.labels, settings.task_id)  # type: ignore[arg-type]
        self.start, _ = block_features(self.clip, self.data)
        self.synthetic = replayed(folder, config["options"], self.clip)

    def method(self, place: Path | None) -> Method:
        """As it was when it wrote ``place``; None: the model before any task."""
        clip = load_clip(self.config, self.data.model)
        clip.pretrained = self.clip.pretrained  # read once, whatever the number of stages
        method = built(self.config, self.kind) if place else Method()
        if place is None:
            method.join(clip, Context())
            return method
        reseed(self.config["seed"], "bind")
        method.bind(clip, self.data.context(self.config["seed"]))
        read_task(place, tensors=True).restore(method)
        return method

    def stage(self, number: int, place: Path, images: int, say: Callable[[str], object]) -> dict[str, Any]:
        """The stage that lies in ``place``, in figures."""
        say(place.name)
        self.now = self.method(place if number else None)
        self.seen = len(self.data.tasks) if self.now.scope == "stream" and number else number
        self.parts = asked(self.data, self.protocol, self.seen, images)
        given = self.parts, self.seen, self.start, images, self.synthetic
        return {"task": place.name, **measured(self.now, self.data, *given)}

    def agreement(self) -> dict[str, Any]:
        """Which experts agree, at the stage that was looked at last."""
        return agreement(self.now, self.parts, self.seen)
