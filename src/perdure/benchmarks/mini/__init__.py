"""The embedded small world: real drawings, a small CLIP that was pre-trained on others, and streams of tasks.

``recipes/mini`` makes what lies in ``assets``: sheets of 32x32 drawings (32 a row, in the order of the manifest), the
manifests, the sources with their licences, and the CLIP as ``transformers`` loads it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from perdure.benchmarks.few_shot import base_to_new
from perdure.core.errors import DamagedFile
from perdure.core.state import read_bytes, read_json
from perdure.data.splits import recut, split_classes
from perdure.data.task import Class, Images, Probe, Stream, Task

ASSETS = Path(__file__).parent / "assets"
MODEL, GENERATOR = ASSETS / "clip", ASSETS / "generator"
SIDE, PER_ROW = 32, 32
DOMAINS = ("animals", "digits", "food", "letters", "tools", "transport", "ui", "weather")


def read_side(part: Mapping[str, Any]) -> Images:
    """One side of a task: its sheet, cut into (N, 3, 32, 32) uint8, and labels in the order of the manifest's classes."""
    path = ASSETS / part["sheet"]
    with Image.open(io.BytesIO(read_bytes(path, part["sha256"]))) as sheet:
        picture = np.asarray(sheet)
    labels = torch.tensor([k for k, names in enumerate(part["drawings"].values()) for _ in names])
    tiles = picture.reshape(-1, SIDE, PER_ROW, SIDE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)
    return Images(torch.from_numpy(tiles[: len(labels)].copy()), labels)


def classes_of(part: Mapping[str, Any], templates: list[str]) -> tuple[Class, ...]:
    return tuple(Class(name, tuple(templates)) for name in part["drawings"])


@cache
def manifest(name: str) -> Any:
    try:
        return read_json(ASSETS / f"{name}.json")
    except DamagedFile as error:
        raise DamagedFile(f"{error} Install perdure again, or make the small world anew with recipes/mini.") from None


@cache
def probe() -> Probe:
    """Concepts of the pre-training vocabulary, drawn by hands that pre-training never saw."""
    about = manifest("probe")
    return Probe(classes_of(about["test"], about["templates"]), read_side(about["test"]))


@cache
def multi_domain(order: str) -> Stream:
    """Eight domains in order ``I`` (alphabetical) or ``II`` (drawn once)."""
    about = manifest("multi_domain")
    tasks = []
    for index, name in enumerate(about["orders"][order]):
        domain = about["domains"][name]
        classes = classes_of(domain["test"], domain["templates"])
        tasks.append(Task(name, classes, read_side(domain["train"]), read_side(domain["test"]), index))
    return stream(
        {"I": "mini-mtil", "II": "mini-mtil-2"}[order], tuple(tasks), "multi_domain", labels="task", task_id="known"
    )


@cache
def cross_domain() -> Stream:
    """X-TAIL's protocol (Xu et al., NeurIPS 2024, arXiv:2406.18868) on order I: 16 training images a class unless ``shots``
    says otherwise, all classes compete from the first evaluation on, the task is hidden."""
    whole = multi_domain("I")
    defaults = {**whole.defaults, "all": {**whole.defaults["all"], "shots": 16}}
    digest = hashlib.sha256(f"X-TAIL on {whole.digest}".encode()).hexdigest()
    return replace(whole, name="mini-xtail", digest=digest, labels="all", task_id="hidden", defaults=defaults)


@cache
def class_incremental() -> Stream:
    """Sixty classes in ten steps, in the order kept in the manifest; all classes seen so far compete."""
    about = manifest("class_incremental")
    train, test = read_side(about["train"]), read_side(about["test"])
    names = list(about["test"]["drawings"])
    order = [names.index(name) for name in about["order"]]
    sizes = [len(names) // about["steps"]] * about["steps"]
    tasks = split_classes(classes_of(about["test"], about["templates"]), train, test, order, sizes)
    return stream("mini-cil", tasks, "class_incremental", labels="seen", task_id="hidden")


@cache
def few_shot() -> Stream:
    """The same sixty classes: thirty with all their drawings, then six sessions of five with five drawings each, which are
    drawn once and for all."""
    whole = recut(class_incremental(), 30, 5).few_shot(5, 0, since=2)
    identity = hashlib.sha256(f"few-shot {whole.digest}".encode()).hexdigest()
    defaults = {**whole.defaults, "all": {**whole.defaults["all"], "shots_from": 2}}
    return replace(whole, name="mini-fscil", digest=identity, defaults=defaults)


@cache
def half_taught(domain: str) -> Stream:
    """Half of a domain's classes to be learned from sixteen drawings each, the other half asked for."""
    whole = multi_domain("I")
    task = next(t for t in whole.tasks if t.name == domain)
    return base_to_new(whole, task, f"mini-base-to-new-{domain}", 16)


@cache
def vocabulary() -> tuple[Class, ...]:
    """What the generator was taught beyond the streams' classes: the captions that pre-training saw most often."""
    about = manifest("vocabulary")
    return tuple(Class(name, (about["template"],)) for name in about["names"])


@cache
def check_models() -> None:
    """Refuse a CLIP or a generator whose files are not those that the recipe wrote."""
    for folder in (MODEL, GENERATOR):
        for name, sha256 in manifest(f"{folder.name}/checksums").items():
            read_bytes(folder / name, sha256)


def stream(name: str, tasks: tuple[Task, ...], source: str, labels: str, task_id: str) -> Stream:
    """A stream over ``tasks``, identified by the manifests' content."""
    check_models()
    files = [ASSETS / f"{part}.json" for part in (source, "probe", "clip/checksums")]
    identity = hashlib.sha256(name.encode() + b"".join(f.read_bytes() for f in files)).hexdigest()
    defaults = yaml.safe_load((Path(__file__).parent / "preset.yaml").read_text(encoding="utf-8"))
    return Stream(
        name, tasks, probe(), str(MODEL), identity, labels, task_id, defaults, notes(),
        generator=str(GENERATOR), vocabulary=vocabulary(),
        drawings=partial(beside, class_incremental if source == "multi_domain" else partial(multi_domain, "I")),
    )  # fmt: skip


def beside(other: Callable[[], Stream]) -> Images:
    """The training drawings of another stream of this world, with captions: real ones, of other concepts as a rule."""
    tasks = other().tasks
    captions = tuple(task.prompts()[k] for task in tasks for k in task.train.labels.tolist())
    return Images(torch.cat([t.train.pixels for t in tasks]), torch.cat([t.train.labels for t in tasks]), captions)


@cache
def notes() -> tuple[str, ...]:
    """The data's licences, a line a kind of source; ``assets/SOURCES.json`` names every set, author and licence."""
    sources = manifest("SOURCES")
    licences: dict[str, int] = {}
    for about in sources["sets"].values():
        licences[about["licence"]] = licences.get(about["licence"], 0) + 1
    counted = ", ".join(f"{n} under {licence}" for licence, n in sorted(licences.items(), key=lambda x: -x[1]))
    fonts = sorted({f["licence"] for f in sources["fonts"].values()})
    digits = sources["digits"]
    return (
        f"Drawings: {len(sources['sets'])} icon sets of @iconify/json 2.2.535 ({counted}), rendered and recoloured.",
        f"Printed letters: {len(sources['fonts'])} font families of Fontsource ({', '.join(fonts)}).",
        f"Handwritten digits: {digits['title']}, by {digits['author']} ({digits['licence']}; {digits['changes']}).",
        "Every set, author and licence: perdure/benchmarks/mini/assets/SOURCES.json.",
    )
