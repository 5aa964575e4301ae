"""From names and ``key=value`` to a run on disk: what the command line and ``perdure.run`` share."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from perdure.benchmarks import STREAMS
from perdure.core.config import Option, options, pairs, resolve
from perdure.core.errors import DamagedFile, PerdureError, unknown
from perdure.core.registry import Entry
from perdure.core.seeding import reseed
from perdure.core.state import only_one, read_json, write_json
from perdure.data.task import Query, Stream, silent
from perdure.engine.checkpoint import folder_names, read_task
from perdure.engine.environment import environment
from perdure.engine.run import FORMAT
from perdure.engine.run import run as engine_run
from perdure.engine.settings import Settings
from perdure.engine.watcher import Watcher
from perdure.methods import load_all
from perdure.methods.base import METHODS, Method, Row
from perdure.methods.compose import Compose
from perdure.models.clip import CLIP
from perdure.ops.metrics import interval
from perdure.synthesis.replay import Replay, Synthesis

PRESETS = files("perdure") / "presets"


def methods() -> list[Entry[Any]]:
    """Every registered method and table row."""
    load_all()
    return list(METHODS)


def method_entry(name: str) -> Entry[Any]:
    """A method or row that can run by itself. ``PerdureError`` for any other name."""
    runnable = {e.name for e in methods() if "role" not in e.about}
    entry = METHODS[name]
    if name not in runnable:
        rows = sorted(e.name for e in METHODS if isinstance(e.value, Row) and name in dict(e.value.parts().values()))
        raise PerdureError(f"'{name}' plays the role {entry.about['role']} only. Rows that use it: {', '.join(rows)}.")
    return entry


def method_options(entry: Entry[Any]) -> dict[str, tuple[str, Option]]:
    """The options of a method, or of the parts of a row: key → (role, option); the first part that has a key owns it."""
    if not isinstance(entry.value, Row):
        return {key: ("learn", option) for key, option in options(entry.value.Config).items()}
    out: dict[str, tuple[str, Option]] = {}
    for role, (part, fixed) in entry.value.parts().items():
        kind = METHODS[part].value
        for key, option in options(kind.role_options.get(role, kind.Config)).items():
            default = fixed.get(key, option.default)
            out.setdefault(key, (role, dataclasses.replace(option, default=default)))
    return out


def build(name: str, values: Mapping[str, Any]) -> Method:
    """The method, or the composition that a row stands for, with resolved option values."""
    entry = method_entry(name)
    known = method_options(entry)
    if not isinstance(entry.value, Row):
        return entry.value(**values)
    parts = {
        role: METHODS[part].value(**{key: values[key] for key, (owner, _) in known.items() if owner == role})
        for role, (part, _) in entry.value.parts().items()
    }
    return Compose(**parts) if len(parts) > 1 else parts["learn"]


def read_preset(name: str) -> dict[str, Any]:
    """A preset by name, or from a YAML file: method, stream and option values."""
    named = PRESETS / f"{name}.yaml"
    path = Path(name)
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
    method: str, stream: str, seed: int, assignments: Iterable[str] | Mapping[str, Any], preset: Mapping[str, Any]
) -> tuple[dict[str, Any], Stream]:
    """The resolved configuration of a run, as ``config.json`` keeps it, and its stream. All errors come together."""
    entry, make = method_entry(method), STREAMS[stream].value
    known = {key: option for key, (_, option) in method_options(entry).items()}
    general = options(Settings)
    given, complaints = (dict(assignments), []) if isinstance(assignments, Mapping) else pairs(assignments)
    data = make()
    suits = {**data.defaults.get("all", {}), **data.defaults.get(method, {})}
    layer = {key: value for key, value in suits.items() if key in known}
    values = resolve({**known, **general}, layer, preset, given, complaints=complaints)
    tasks = [t.name for t in data.tasks]
    for name in sorted(set(values.get("lr_by_task", {})) - set(tasks)):
        raise unknown("task", name, tasks)
    settings = Settings(**{key: values[key] for key in general}).settled(data)
    data = settings.select(data, seed)
    config = {
        "format": FORMAT,
        "method": method,
        "stream": stream,
        "seed": seed,
        "options": {key: values[key] for key in known},
        "settings": dataclasses.asdict(settings),
        "split": data.digest,
        "environment": environment(settings),
    }
    return config, data


def prepare(*what: Any) -> dict[str, Any]:
    """``configure``, and what can only be checked with the model at hand: that it loads, and that the method can take it."""
    config, data = configure(*what)
    settings = config["settings"]
    clip = CLIP.load(data.model if settings["model"] == "stream" else settings["model"], settings["device"])
    fingerprint = clip.fingerprint()
    build(config["method"], config["options"]).bind(clip, data.context(config["seed"]))
    return {**config, "weights": fingerprint}


def same_run(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The keys in which two configurations differ (the environment may)."""
    others = ("method", "stream", "seed", "split", "weights")
    flat_a, flat_b = ({**c["options"], **c["settings"], **{k: c[k] for k in others}} for c in (a, b))
    return sorted(k for k in set(flat_a) | set(flat_b) if jsonable(flat_a.get(k)) != jsonable(flat_b.get(k)))


def jsonable(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    return list(value) if isinstance(value, tuple) else value


def read_config(folder: Path) -> dict[str, Any]:
    """A run's ``config.json``. ``PerdureError`` where the folder holds no run."""
    if not (folder / "config.json").exists():
        raise PerdureError(f"{folder} holds no run (it has no config.json). Start one with: perdure run --out {folder}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise PerdureError(f"{folder} was written by another version of perdure (format {FORMAT} is read here).")
    lacking = sorted(
        {"method", "stream", "seed", "options", "settings", "split", "weights", "environment"} - set(config)
    )
    if lacking:
        raise DamagedFile(f"{folder / 'config.json'} is damaged: it lacks {', '.join(lacking)}.")
    return config


def check_folder(folder: Path, config: Mapping[str, Any], overwrite: bool) -> None:
    """Refuse a folder that holds anything: a run unless ``overwrite`` is asked for, other things always."""
    try:
        content = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise PerdureError(f"{folder} is a file. Choose another folder with --out.") from None
    if content and not (folder / "config.json").exists():
        raise PerdureError(f"{folder} exists and is not a run. Choose another folder with --out.")
    if content and not overwrite:
        raise PerdureError(refusal(folder, config))


def make_folder(folder: Path, config: Mapping[str, Any], overwrite: bool) -> None:
    """Claim a folder for a new run. What perdure did not write there stays, ``overwrite`` or not."""
    check_folder(folder, config, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        check_folder(folder, config, overwrite)  # another process may have come first
        (folder / "metrics.json").unlink(missing_ok=True)
        for old in sorted(folder.glob("*task_*"), reverse=True):
            if re.fullmatch(r"(damaged_|\.)?task_\d+_.*", old.name) and old.is_dir():
                shutil.rmtree(old)
        write_json(folder / "config.json", config)


def refusal(folder: Path, config: Mapping[str, Any]) -> str:
    """Why a folder that holds a run is not written to."""
    differs = same_run(read_config(folder), config)
    if differs:
        said = f"{folder} holds a run with another configuration (it differs in {', '.join(differs)})."
        return f"{said} Choose another folder with --out, or replace it with --overwrite."
    if is_finished(folder):
        return f"{folder} holds this very run, finished. Look at it with: perdure report {folder}. Replace it with --overwrite."
    return (
        f"{folder} holds this very run, unfinished. Go on with: perdure resume {folder}. Replace it with --overwrite."
    )


def is_finished(folder: Path) -> bool:
    path = folder / "metrics.json"
    try:
        found = read_json(path) if path.exists() else None
    except DamagedFile:
        return False
    return isinstance(found, dict) and bool(found.get("finished"))


def begin(
    method: str, stream: str, folder: Path, *, seed: int = 0, seeds: int = 1, overwrite: bool = False,
    preset: str | None = None, assignments: Iterable[str] | Mapping[str, Any] = (),
) -> None:  # fmt: skip
    """Check everything and claim ``folder`` for a run that ``resume`` then does; with several seeds, ``folder/seed_N``."""
    layer = read_preset(preset) if preset else {}
    layer = {k: v for k, v in layer.items() if k not in ("method", "stream", "about")}
    config = prepare(method, stream, seed, assignments, layer)
    if seeds == 1:
        if (folder / "seeds.json").exists():
            raise PerdureError(f"{folder} holds a run of several seeds. Choose another folder with --out.")
        make_folder(folder, config, overwrite)
        return
    if (folder / "config.json").exists():
        raise PerdureError(f"{folder} holds a run of one seed. Choose another folder with --out.")
    configs = {folder / f"seed_{n}": {**config, "seed": n} for n in range(seed, seed + seeds)}
    others = [p for p in seed_folders(folder) if p not in configs]
    if others:
        raise PerdureError(
            f"{folder} holds other seeds ({', '.join(p.name for p in others)}). Choose another folder with --out."
        )
    for one, its_config in configs.items():  # all are checked before any is touched
        check_folder(one, its_config, overwrite)
    for one, its_config in configs.items():
        make_folder(one, its_config, overwrite)
    write_json(folder / "seeds.json", [its_config["seed"] for its_config in configs.values()])


def seed_folders(folder: Path) -> list[Path]:
    """The folders of a run of several seeds, or nothing."""
    path = folder / "seeds.json"
    return [folder / f"seed_{number}" for number in read_json(path)] if path.exists() else []


def run(
    method: str, stream: str, out: str | Path | None = None, *, seed: int = 0, overwrite: bool = False,
    preset: str | None = None, watcher: Watcher | None = None, **values: Any,
) -> dict[str, Any]:  # fmt: skip
    """Run ``method`` on ``stream`` and return the metrics (the content of ``out/metrics.json``).

    ``values`` are options of the method or the run, as ``key=value`` is on the command line. ``out`` defaults to
    ``runs/METHOD-STREAM-SEED``. Raises ``PerdureError`` for anything the caller can put right.
    """
    folder = Path(out) if out else Path("runs") / f"{method}-{stream}-{seed}"
    begin(method, stream, folder, seed=seed, overwrite=overwrite, preset=preset, assignments=values)
    return resume(folder, watcher)


def reopen(folder: Path) -> tuple[dict[str, Any], Stream, Method]:
    """The configuration, stream and unbound method of the run in ``folder``, checked against what is installed."""
    config = read_config(folder)
    known = {key: option for key, (_, option) in method_options(method_entry(config["method"])).items()}
    config["options"] = resolve(known, config["options"])
    settings = Settings(**resolve(options(Settings), config["settings"]))
    data = settings.select(STREAMS[config["stream"]].value(), config["seed"])
    if data.digest != config["split"]:
        raise PerdureError(
            f"{folder} was run on another version of the stream {data.name} (its split differs). "
            "Its results stay as they are; start a new run."
        )
    return config, data, build(config["method"], config["options"])


def resume(folder: str | Path, watcher: Watcher | None = None) -> dict[str, Any]:
    """Go on with the run in ``folder`` after its last good task; return the metrics."""
    folder, watcher = Path(folder), watcher or Watcher()
    config, data, method = reopen(folder)
    now = environment(Settings(**config["settings"]))
    changed = [k for k in now if now[k] != config["environment"].get(k) and k != "cores"]
    if changed and not is_finished(folder):
        watcher.warn(f"The environment has changed ({', '.join(changed)}): the last bits may differ.")
    return engine_run(method, data, config, folder, watcher)


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of several seeds' metrics, with standard deviations and bootstrap intervals over the seeds."""
    first = runs[0]
    scalars = [k for k, v in first.items() if isinstance(v, float) and all(r[k] is not None for r in runs)]
    values = {k: np.array([r[k] for r in runs], dtype=np.float64) for k in scalars}
    picks = np.random.default_rng(0).integers(len(runs), size=(1000, len(runs)))
    matrices = {
        k: np.mean([r[k] for r in runs], axis=0).tolist() for k in ("accuracy", "probe", "incremental") if first[k]
    }
    dropped = ("accuracy_interval", "probe_interval", "losses", "seconds_by_task")
    return {
        **{k: v for k, v in first.items() if k not in dropped},
        **{k: float(v.mean()) for k, v in values.items()},
        **matrices,
        "gap": mean_gaps([r.get("gap") or [] for r in runs]),
        "seed": [r["seed"] for r in runs],
        "std": {k: float(v.std(ddof=1)) for k, v in values.items()} if len(runs) > 1 else {},
        "intervals": {k: interval(v[picks].mean(1)) for k, v in values.items() if k in first["intervals"]},
        "peak_memory_mb": max(r["peak_memory_mb"] for r in runs),
        "runs": runs,
    }


def mean_gaps(courses: list[list[dict[str, float] | None]]) -> list[dict[str, float] | None]:
    """The modality gap after each task, as means over the seeds; None where a seed did not measure it."""
    return [
        {key: float(np.mean([g[key] for g in stage if g])) for key in stage[0]} if all(stage) and stage[0] else None
        for stage in zip(*courses, strict=False)
    ]


def generate(
    stream: str, out: Path, *, seeds: Iterable[int] = (0,), assignments: Iterable[str] = (),
    drawn: Callable[[str, int, int, int], None] = silent, warn: Callable[[str], None] = silent,
) -> int:  # fmt: skip
    """Draw the synthetic pairs that runs of ``stream`` will ask for, into ``out``; return how many were drawn now.

    What lies there already is kept. ``drawn(task, done, total, new)`` hears how it goes. A run takes them with ``pairs=out``.
    """
    known = {
        **options(Synthesis),
        **{k: o for k, o in options(Settings).items() if k in ("device", "tasks", "threads")},
    }
    del known["pairs"]
    given, complaints = pairs(assignments)
    data = STREAMS[stream].value()
    suits = {key: value for key, value in data.defaults.get("all", {}).items() if key in known}
    values = resolve(known, suits, given, complaints=complaints)
    settings = Settings(**{k: values.pop(k) for k in ("device", "tasks", "threads")}).settled(data)
    torch.set_num_threads(settings.threads)
    total = 0
    for seed in seeds:
        learned: list[str] = []
        for task in data.shortened(settings.tasks, 0).tasks:
            context = data.context(seed, None, partial(drawn, task.name), warn)
            replay = Replay(Synthesis(**values, pairs=str(out)), context, 0, settings.device)
            if replay.collected:
                raise PerdureError(f"{out} holds collected pairs; nothing is to be drawn there. Choose another folder.")
            total += replay.draw(replay.store(), replay.wanted(task.name, learned))
            learned += task.prompts()
    return total


DEMO = ("zero_shot", "finetune", "individual")


def demo_folder(runs: Path) -> Path:
    """The latest demo that was stopped, to go on with; else the next free name."""
    number = 1
    while True:
        folder = runs / ("demo" if number == 1 else f"demo-{number}")
        if not folder.exists() or any(demo_goes_on(folder / method) for method in DEMO):
            return folder
        number += 1


def demo_goes_on(folder: Path) -> bool:
    """Whether a demo's run was begun, with what is installed now, and not finished."""
    try:
        config = read_config(folder)
        return not same_run(config, prepare(folder.name, "mini-mtil", 0, [], {})) and not is_finished(folder)
    except PerdureError:
        return False


def export(folder: Path, out: Path, task: int | None = None) -> str:
    """Write the weights of a run after ``task`` tasks (default: the last) as a ``transformers`` checkpoint; where the
    method keeps an expert a task, that of task number ``task``, as it is after the last task learned.

    Returns what was written, in words.
    """
    config, data, method = reopen(folder)
    names = [t.name for t in data.tasks]
    folders = [folder / name for name in folder_names(names) if (folder / name).exists()]
    if not folders or (task is not None and task >= len(folders)):
        raise PerdureError(f"{folder} has {max(0, len(folders) - 1)} finished tasks.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PerdureError(f"{out} exists. Choose a new folder.")
    if not method.carries_weights and task is None:
        known = ", ".join(f"{n} ({name})" for n, name in enumerate(names[: len(folders) - 1], 1))
        raise PerdureError(f"{config['method']} keeps an expert a task. Say which with --task: {known or 0}.")
    source = config["settings"]["model"]
    clip = CLIP.load(data.model if source == "stream" else source)
    reseed(config["seed"], "bind")
    method.bind(clip, data.context(config["seed"]))
    one_of_many = bool(task) and not method.carries_weights
    saved = read_task(folders[-1 if task is None or one_of_many else task], tensors=True)
    saved.restore(method)
    if not one_of_many:
        method.load_expert(method.base_expert())
        clip.save(out)
        return f"The model after {saved.record['task']}"
    assert task is not None
    (expert,) = method.experts(Query(data.tasks[task - 1].test.pixels[:0], (), task - 1))
    assert expert.weights is not None
    clip.load_weights(expert.name, expert.weights)
    clip.save(out)
    return f"The expert of {names[task - 1]}, after {saved.record['task']},"
