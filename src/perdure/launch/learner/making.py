"""What a model in use is made with, from what a person says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perdure.benchmarks import mini
from perdure.core.config import options, resolve
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.data.task import Stream
from perdure.engine.keeping import KEPT, Keep, check_kept
from perdure.engine.settings import Settings
from perdure.launch.configure import Warn, prepare
from perdure.launch.folders import ELSEWHERE, plain, read_config
from perdure.launch.learner.probe import PROBE, described
from perdure.launch.options import method_options
from perdure.launch.runs import built
from perdure.launch.sources import find_method, reopened
from perdure.methods.base import Method

METHOD, UNLABELLED = "ridge_patches", "pfr"  # where none is asked for, of pictures with labels and without
FOR_RUNS = (
    "tasks",
    "images",
    "shots",
    "class_order",
    "task_order",
    "labels",
    "task_id",
    "base",
    "increment",
    "shots_from",
    "shots_seed",
    "shots_file",
    "unreadable",
    "online",
    "evaluate_every",
    "keep",
)  # settings that a stream must be whole for, or that are of use where it is
GROWS = "grows"  # in the place of a run's split


@dataclass(frozen=True)
class Asked:
    """What a HOME is asked for with; empty: whatever it was made with, or the default."""

    model: str = ""
    method: str = ""
    probe: str = ""
    keep: Keep | None = None
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def read_home(folder: Path) -> dict[str, Any] | None:
    """The configuration of the HOME in ``folder``; None where there is none yet. ``PerdureError`` for anything else there."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise PerdureError(f"{folder} is a file. A HOME is a folder: give a new one, or one that 'perdure learn' made.")
    if not (folder / "config.json").exists():
        if any(p for p in folder.iterdir() if not p.name.startswith(".") and p.name != PROBE):  # which is written first
            raise PerdureError(f"{folder} holds other things. Give a new folder, or one that 'perdure learn' made.")
        return None
    config = read_config(folder)
    if "home" not in config:
        raise PerdureError(
            f"{folder} holds a run, which is finished with its stream. Give a new folder, or one that 'perdure learn' made."
        )
    return config


def find_again(config: Mapping[str, Any]) -> None:
    """Know the HOME's method by its name again: one of a file is read from there."""
    if source := config.get("source", {}).get("method"):
        find_method(reopened("method", config["method"], source))


def check_same(folder: Path, config: Mapping[str, Any], asked: Asked) -> None:
    """Refuse to use a HOME as another than it was made: a model, a method, options, what is kept."""
    made, about = {**config["options"], **config["settings"]}, config["home"]
    wrong = []
    if asked.method and find_method(asked.method)[0].name != config["method"]:
        wrong.append(("method", asked.method, config["method"]))
    if asked.model and model_of(asked.model) != config["settings"]["model"]:
        wrong.append(("model", asked.model, config["settings"]["model"].replace("stream", "the embedded CLIP")))
    if asked.keep and asked.keep != about["keep"]:
        wrong.append(("keep", asked.keep, about["keep"]))
    if asked.seed is not None and asked.seed != config["seed"]:
        wrong.append(("seed", str(asked.seed), str(config["seed"])))
    if asked.probe and str(expanded(asked.probe).resolve()) != about["probe"].get("folder"):
        wrong.append(("probe", asked.probe, about["probe"].get("folder", about["probe"]["kind"])))
    entry = find_method(config["method"])[0]
    known = {key: option for key, (_, option) in method_options(entry).items()} | options(Settings)
    for key, value in checked(asked).items():
        own = made.get(key, known[key].default)  # an option that came later has its default
        if key not in ELSEWHERE and plain(own) != plain(value):
            wrong.append((key, str(value), str(own)))
    if wrong:
        said = "; ".join(f"{key}: {given} was given, it was made with {own}" for key, given, own in wrong)
        nothing = all(p.name.startswith("task_00_") for p in folder.glob("*task_*"))
        more = " It has learned nothing yet: delete the folder to begin anew." if nothing else ""
        raise PerdureError(
            f"{folder} is another model in use. {said}. Leave that out, or learn into a new folder.{more}"
        )


def checked(asked: Asked) -> dict[str, Any]:
    """The options that were given, read and checked."""
    if odd := [key for key in asked.options if key in FOR_RUNS]:
        raise PerdureError(
            f"{odd[0]} belongs to runs over a stream: a model in use learns all that it is shown. Leave it out."
        )
    entry = find_method(asked.method or METHOD)[0]
    known = {**{key: option for key, (_, option) in method_options(entry).items()}, **options(Settings)}
    return {key: value for key, value in resolve(known, asked.options).items() if key in asked.options}


def elsewhere(asked: Asked) -> dict[str, Any]:
    """Of the options that were given, those that say where and in what portions it is computed: they hold from case to case."""
    chosen = ("device", "auto"), ("threads", 0)  # as when it was made
    return {key: value for key, value in checked(asked).items() if key in ELSEWHERE and (key, value) not in chosen}


def check_learner(method: Method, name: str) -> None:
    """Refuse what learns nothing, and what must see all tasks at once."""
    if not method.learns:
        raise PerdureError(f"{name} learns nothing: there is nothing to teach it. Leave --method out, or name another.")
    if method.scope == "stream":
        raise PerdureError(
            f"{name} learns all tasks at once, and a model in use is shown them one after another. Leave --method out, or name "
            "another."
        )


def can_learn(config: Mapping[str, Any], stream: Stream, most: float | None) -> None:
    """Refuse pictures without labels to what learns from labels, to keep paths of pictures that have none, and a largest loss
    that is no number of points."""
    if most is not None and not 0 <= most <= 100:
        raise PerdureError(f"max_loss={most}: give the points that may be lost, from 0 to 100; 100 takes anything.")
    for task in stream.tasks:
        check_kept(config["home"]["keep"], task.test)
    if not all(task.labelled for task in stream.tasks) and built(config).needs_labels:
        raise PerdureError(
            f"{config['method']} learns from labels, and --unlabelled pictures have none. Make a HOME that can do without: "
            "perdure learn NEW_HOME PICTURES --unlabelled, which takes --method pfr."
        )


def model_of(word: str) -> str:
    """A model as a configuration records it."""
    place = expanded(word)
    if place.is_dir():
        own = place.resolve() == Path(mini.MODEL).resolve()
        return "stream" if own else str(place.resolve())
    return word


def configured(folder: Path, stream: Stream, asked: Asked, warn: Warn) -> dict[str, Any]:
    """The configuration of a new HOME, everything checked that can be before any work."""
    usual = METHOD if all(task.labelled for task in stream.tasks) else UNLABELLED
    asked = replace(asked, method=asked.method or usual)
    checked(asked)
    if asked.keep is not None and asked.keep not in KEPT:
        raise PerdureError(f"keep is one of {', '.join(KEPT)}, not {asked.keep!r}.")
    embedded = not asked.model or model_of(asked.model) == "stream"
    if embedded:
        warn(
            "The embedded CLIP reads pictures at 32 pixels and knows drawings. For photographs give one that knows more, as "
            "--from openai/clip-vit-base-patch16."
        )
    if asked.model and (expanded(asked.model) / "perdure.json").exists():
        warn(
            f"{asked.model} is an export of perdure: its weights are taken, what answers on top of them (heads, names of "
            "classes) is not."
        )
    values = {**asked.options, **({} if embedded else {"model": asked.model})}
    config = prepare(asked.method, stream, asked.seed or 0, values, {}, None, warn)
    check_learner(built(config), config["method"])
    source = {kind: about for kind, about in config.get("source", {}).items() if kind == "method"}
    return {
        **{key: value for key, value in config.items() if key not in ("source", "data_root")},
        **({"source": source} if source else {}),
        "stream": folder.resolve().name,
        "split": GROWS,
        "settings": {**config["settings"], "labels": "seen", "task_id": "hidden"},
        "home": {"keep": asked.keep or "pictures", "probe": described(asked.probe, embedded)},
    }
