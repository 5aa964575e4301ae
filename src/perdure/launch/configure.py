"""The resolved configuration of a run, as ``config.json`` keeps it; everything wrong with it is said before any work."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from perdure.benchmarks import STREAMS
from perdure.benchmarks.class_incremental import root
from perdure.core.caller import undisturbed
from perdure.core.config import options, pairs, resolve
from perdure.core.errors import PerdureError, unknown
from perdure.core.paths import expanded
from perdure.data.checks import say_alike
from perdure.data.task import Stream
from perdure.data.tolerated import find_unreadable, without
from perdure.engine.alike import check_batch
from perdure.engine.environment import environment
from perdure.engine.online import ONE_PASS, check_asked, check_one_pass
from perdure.engine.settings import Settings, hand_over, load_clip
from perdure.engine.summary import FORMAT
from perdure.launch.options import build_entry, method_options
from perdure.launch.sources import Asked, find_method, find_stream
from perdure.methods.base import Method

PRESETS = files("perdure") / "presets"
Given = Iterable[str] | Mapping[str, Any]
Warn = Callable[[str], None]


def to_stderr(text: str) -> None:
    """A warning for whoever has no better place for it."""
    print(f"Warning: {text}", file=sys.stderr)


def read_preset(name: str) -> dict[str, Any]:
    """A preset by name, or from a YAML file: method, stream and option values."""
    named, path = PRESETS / f"{name}.yaml", expanded(name)
    if not named.is_file() and not path.is_file():
        known = [p.name.removesuffix(".yaml") for p in PRESETS.iterdir() if p.name.endswith(".yaml")]
        raise unknown("preset or preset file", name, known)
    try:
        content = yaml.safe_load((named if named.is_file() else path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PerdureError(f"The preset '{name}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise PerdureError(f"The preset '{name}' must hold 'key: value' lines.")
    return content


def configure(
    method: str | type[Method], stream: Asked, seed: int, assignments: Given, preset: Mapping[str, Any],
    warn: Warn = to_stderr,
) -> tuple[dict[str, Any], Stream]:  # fmt: skip
    """The resolved configuration of a run, as ``config.json`` keeps it, and its stream. All errors come together."""
    entry, method_source = find_method(method)
    make, stream_name, stream_source = find_stream(stream)
    data = make()
    known, general = {key: option for key, (_, option) in method_options(entry).items()}, options(Settings)
    if clash := sorted(set(known) & set(general)):
        raise PerdureError(
            f"The method {entry.name} has an option '{clash[0]}', which every run has already with another meaning. Give the "
            "method's another name."
        )
    given, complaints = (dict(assignments), []) if isinstance(assignments, Mapping) else pairs(assignments)
    if "where" in stream_source and not {**preset, **given}.get("model"):
        warn(
            f"{stream_name} is learned by the embedded CLIP, which reads pictures at 32 pixels and knows drawings. For "
            "photographs give one that knows more, as model=openai/clip-vit-base-patch16."
        )
    suits = {**data.defaults.get("all", {}), **data.defaults.get(entry.name, {})}
    model = str({**preset, **given}.get("model") or "")
    own = (
        not model or expanded(model).resolve() == Path(data.model).resolve()
    )  # what suits a stream suits the CLIP it is for
    layer = {key: value for key, value in suits.items() if key in general or (own and key in known)}
    values = resolve({**known, **general}, layer, preset, given, complaints=complaints)
    if values["online"]:
        once = {key: value for key, value in ONE_PASS.items() if key in known}
        values = resolve({**known, **general}, layer, once, preset, given)
        check_one_pass(values)
    check_tasks(values, data, given, warn)
    check_parts(values)
    check_batch(values)
    settings = Settings(**{key: values[key] for key in general}).settled(data)
    left_out = find_unreadable(data, settings.unreadable, warn)
    data = settings.select(without(data, left_out), seed)
    sources = {kind: s for kind, s in (("method", method_source), ("stream", stream_source)) if s}
    config = {
        "format": FORMAT,
        "method": entry.name,
        "stream": stream_name,
        "seed": seed,
        "options": {key: values[key] for key in known},
        "settings": dataclasses.asdict(settings),
        "split": data.digest,
        **({"auto": ["precision"]} if values["precision"] == "auto" else {}),
        **({"left_out": left_out} if left_out else {}),
        **({"source": sources} if sources else {}),
        **({"data_root": str(root())} if stored(stream_name) else {}),
        "environment": environment(settings),
    }
    return config, data


def stored(stream: str) -> bool:
    """Whether a stream's data lie under ``PERDURE_DATA``."""
    return any(e.name == stream and "home" in e.about for e in STREAMS)


def check_tasks(values: Mapping[str, Any], data: Stream, given: Mapping[str, Any], warn: Warn) -> None:
    """Values of tasks that the stream lacks: a person who names them is wrong; a preset was written for another stream."""
    tasks = [t.name for t in data.tasks]
    for key in sorted(key for key in values if key.endswith("_by_task")):
        lacking = sorted(set(values[key]) - set(tasks))
        if lacking and key in given:
            raise unknown("task", lacking[0], tasks)
        if lacking:
            warn(f"The preset's {key} names tasks that {data.name} lacks: {', '.join(lacking)}.")


def check_parts(values: Mapping[str, Any]) -> None:
    """Refuse to cut a batch into more parts than it has images."""
    parts, batch = values["accumulate"], values.get("batch_size")
    if batch is not None and parts > batch:
        raise PerdureError(
            f"accumulate={parts}: a batch of {batch} images (batch_size={batch}) cannot be cut into so many parts. Set "
            f"accumulate={batch} or less."
        )


def prepare(
    method: str | type[Method], stream: Asked, seed: int, assignments: Given, preset: Mapping[str, Any],
    folder: Path | None = None, warn: Warn = to_stderr,
) -> dict[str, Any]:  # fmt: skip
    """``configure``, and what can only be checked with the model at hand: that it loads, and that the method can take it,
    with what lies in ``folder``."""
    with undisturbed():
        config, data = configure(method, stream, seed, assignments, preset, warn)
        clip = load_clip(config, data.model)
        data.check(clip)
        for said in (clip.note, say_alike(data.tasks) if data.labels == "all" else ""):
            if said:
                warn(said)
        found = {"weights": clip.fingerprint(), "backbone": clip.described(), "revision": clip.revision}
        learner = build_entry(find_method(method)[0], config["options"])
        learner.bind(copy.deepcopy(clip), data.context(seed, folder, labels=config["settings"]["labels"]))
        if config["settings"]["evaluate_every"]:
            check_asked(learner)
        hand_over(clip, config, data.model)
    return {**config, **{key: value for key, value in found.items() if value}}
