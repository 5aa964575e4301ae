"""What the ability that a model was born with is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from perdure.benchmarks import mini
from perdure.benchmarks.folder import load_folder
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.core.state import inside
from perdure.core.tensors import read_tensors, write_tensors
from perdure.data.files import Files
from perdure.data.task import Class, Images, Probe
from perdure.engine.home import read_classes, written
from perdure.models.clip import CLIP
from perdure.synthesis.store import Store

PROBE = "probe.safetensors"


def described(folder: str, embedded: bool) -> dict[str, Any]:
    """The probe as a configuration records it: a folder of somebody's, that of the embedded CLIP, or none."""
    if folder:
        base = expanded(folder).resolve()
        probe = read_probe(base)
        return {
            "kind": "pictures",
            "folder": str(base),
            "classes": [written(c) for c in probe.classes],
        }
    return {"kind": "embedded" if embedded else "none"}


def read_probe(base: Path) -> Probe:
    """All pictures of a folder ``CLASS/*`` as a probe, or those of a store of image-text pairs, whose texts compete."""
    if not base.is_dir():
        raise PerdureError(
            f"The probe {base} is no folder. Give one with CLASS/* of pictures that no task teaches, or one of synthetic pairs "
            "('perdure generate')."
        )
    if (base / "store.json").is_file():
        return of_pairs(base)
    tasks = load_folder(base, "the probe").tasks
    if len(tasks) > 1:
        raise PerdureError(f"The probe {base} holds {len(tasks)} tasks. Give a folder with CLASS/* in it.")
    task = tasks[0]
    pixels = Files(tuple(p for side in (task.train, task.test) for p in side.pixels.paths), task.train.pixels.side)
    return Probe(task.classes, Images(pixels, torch.cat([task.train.labels, task.test.labels])))


def of_pairs(base: Path) -> Probe:
    """Image-text pairs as a probe: which of all texts belongs to a picture. ``PerdureError`` where fewer than two have one."""
    entries = [e for e in Store(base, {}).entries.values() if e.file is not None]
    texts = sorted({e.prompt for e in entries})
    if len(texts) < 2:
        raise PerdureError(f"The pairs in {base} have pictures of {len(texts)} text(s); a probe needs two at least.")
    pictures = Files(tuple(inside(base, e.file) for e in entries if e.file), 1)  # the model says at which size
    labels = torch.tensor([texts.index(e.prompt) for e in entries])
    return Probe(tuple(Class(text, ("{}",)) for text in texts), Images(pictures, labels))


def keep_probe(folder: Path, config: dict[str, Any], clip: CLIP) -> None:
    """Keep the probe's pictures as those of tasks are kept, and note it in ``config``."""
    about, keep = config["home"]["probe"], config["home"]["keep"]
    if about["kind"] != "pictures" or keep != "pictures":
        return
    test = read_probe(Path(about["folder"])).test.at(*clip.view)
    about["sha256"], _ = write_tensors(folder / PROBE, {"pixels": test.pixels[:], "labels": test.labels})


def probe_of(folder: Path, config: Mapping[str, Any], clip: CLIP) -> Probe | None:
    """The probe of a HOME; None where there is none, or its pictures are gone."""
    about = config["home"]["probe"]
    if about["kind"] == "embedded":
        return mini.probe()
    if about["kind"] == "none":
        return None
    classes = read_classes(about["classes"])
    if "sha256" in about:
        found = read_tensors(folder / PROBE, about["sha256"])
        return Probe(classes, Images(found["pixels"], found["labels"]))
    base = Path(about["folder"])
    if not base.is_dir():
        return None
    probe = read_probe(base)
    return Probe(probe.classes, probe.test.at(*clip.view))
