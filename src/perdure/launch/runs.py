"""Runs: begun, gone on with, opened again; several seeds as one."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perdure.core import processes
from perdure.core.caller import undisturbed
from perdure.core.config import resolve
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.core.state import write_json
from perdure.data.task import Stream, silent
from perdure.data.tolerated import without
from perdure.engine.alike import check_batch, check_config
from perdure.engine.environment import differing, environment
from perdure.engine.run import run as engine_run
from perdure.engine.settings import Settings
from perdure.engine.watcher import Watcher, Watchers
from perdure.launch.configure import Given, Warn, prepare, read_preset, to_stderr
from perdure.launch.folders import (
    Replacing,
    asked_alike,
    bring_back,
    check_folder,
    is_finished,
    make_folder,
    read_config,
    refuse_home,
    same_run,
    seed_folders,
)
from perdure.launch.options import build_entry, method_options
from perdure.launch.sources import Asked, find_method, find_stream, reopened
from perdure.launch.trackers import checked
from perdure.launch.tracking import tracking
from perdure.methods.base import Method
from perdure.ops.metrics import interval


def begin(
    method: str | type[Method], stream: Asked, folder: Path, *, seed: int = 0, seeds: int = 1,
    overwrite: bool = False, preset: str | None = None, assignments: Given = (), go_on: bool = False,
    warn: Warn = to_stderr,
) -> None:  # fmt: skip
    """Check everything and claim ``folder`` for a run that ``resume`` then does; with several seeds, ``folder/seed_N``.

    ``go_on``: a folder that holds this very run already is left as it is.
    """
    warn = joined(warn)
    layer = read_preset(preset) if preset else {}
    layer = {k: v for k, v in layer.items() if k not in ("method", "stream", "about")}
    several = seeds > 1
    folders = {n: folder / f"seed_{n}" if several else folder for n in range(seed, seed + seeds)}
    check_kind(folder, list(folders.values()) if several else [])
    config = prepare(method, stream, seed, assignments, layer, folders[seed], warn)
    check_config(folder, config, same_run)
    if processes.main():
        claim({one: {**config, "seed": n} for n, one in folders.items()}, overwrite, go_on)
        if several:
            write_json(folder / "seeds.json", list(folders))
    processes.barrier()


def joined(warn: Warn) -> Warn:
    """Join the processes that a launcher started together; of these the main one warns."""
    if note := processes.join():
        warn(note)
    return warn if processes.main() else silent


def claim(configs: Mapping[Path, Mapping[str, Any]], overwrite: bool, go_on: bool) -> None:
    """Write the configuration of each run into its folder, once all folders have been looked at."""
    if go_on:  # those that are there stay; a kill may have come before all of several were
        kept = {
            one for one, c in configs.items() if (one / "config.json").exists() and not asked_alike(read_config(one), c)
        }
        configs = {one: c for one, c in configs.items() if one not in kept}
    for one, its_config in configs.items():  # all are checked before any is touched
        check_folder(one, its_config, overwrite)
    for one, its_config in configs.items():
        make_folder(one, its_config, overwrite)


def check_kind(folder: Path, several: list[Path]) -> None:
    """Refuse a folder of several seeds for one, of one for several, and one of other seeds."""
    if not several and (folder / "seeds.json").exists():
        raise PerdureError(f"{folder} holds a run of several seeds. Choose another folder with --out.")
    if several and (folder / "config.json").exists():
        raise PerdureError(f"{folder} holds a run of one seed. Choose another folder with --out.")
    others = [p.name for p in seed_folders(folder) if p not in several] if several else []
    if others:
        raise PerdureError(f"{folder} holds other seeds ({', '.join(others)}). Choose another folder with --out.")


def run(
    method: str | type[Method], stream: Asked, out: str | Path | None = None, *, seed: int = 0,
    overwrite: bool = False, preset: str | None = None, watcher: Watcher | Sequence[Watcher] | None = None,
    report_to: str | Sequence[str] = (), **values: Any,
) -> dict[str, Any]:  # fmt: skip
    """Run ``method`` on ``stream`` and return the metrics (the content of ``out/metrics.json``).

    ``method``: a name, a file (``path/to/mine.py``) or a subclass of ``perdure.Method``; ``stream``: a name, a file, a
    place of pictures (a path, or ``perdure.Pictures``) or a ``perdure.Stream``.
    ``values`` are options of the method or the run, as ``key=value`` is on the command line; those of a
    later role are written ``**{"fuse.alpha": 0.3}``. ``out`` defaults to ``runs/METHOD-STREAM-SEED``. ``watcher``: one or
    several that hear how it goes; ``report_to``: trackers by name (``jsonl``, ``csv``, ``tensorboard``, ``wandb``). Raises
    ``PerdureError`` for anything the caller can put right. Nothing that belongs to the caller (random states, threads, gradient
    mode, environment variables) is changed.
    """
    ears = listening(watcher)
    checked(report_to)
    with undisturbed():
        names = find_method(method)[0].name, find_stream(stream)[1]
        folder = expanded(out) if out else Path("runs") / f"{names[0]}-{names[1]}-{seed}"
        begin(
            method, stream, folder, seed=seed, overwrite=overwrite, preset=preset, assignments=values, warn=ears.warn
        )  # fmt: skip
        return resume(folder, ears, method=method, stream=stream, report_to=report_to)


def listening(watcher: Watcher | Sequence[Watcher] | None) -> Watcher:
    """One watcher for none, one or several; where processes share a run, those of the main one alone hear it."""
    if not processes.main():
        return Watchers(())
    if watcher is None:
        return Watcher()
    return watcher if isinstance(watcher, Watcher) else Watchers(watcher)


def reopen(
    folder: Path, method: str | type[Method] | None = None, stream: Asked | None = None
) -> tuple[dict[str, Any], Stream, Method]:
    """The configuration (as it was written), stream and unbound method of the run in ``folder``, checked against what is
    there now. ``method`` and ``stream``: what a run of objects was begun with."""
    config = read_config(folder)
    refuse_home(folder)
    sources = config.get("source", {})
    os.environ.setdefault("PERDURE_DATA", config.get("data_root", "data"))
    if not isinstance(stream, Stream):
        stream = reopened("stream", config["stream"], sources.get("stream", {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were given when the run began
        whole = without(find_stream(stream)[0](), config.get("left_out", []))
    data = Settings.recorded(config["settings"]).select(whole, config["seed"])
    if data.digest != config["split"]:
        raise PerdureError(
            f"{folder} was run on another version of the stream {data.name} (its split differs). "
            "Its results stay as they are; start a new run."
        )
    return config, data, built(config, method)


def built(config: Mapping[str, Any], method: str | type[Method] | None = None) -> Method:
    """The unbound method of a configuration; ``method``: what it was made of, where that was an object."""
    if not isinstance(method, type):
        method = reopened("method", config["method"], config.get("source", {}).get("method", {}))
    entry = find_method(method)[0]
    known = {key: option for key, (_, option) in method_options(entry).items()}
    return build_entry(entry, resolve(known, config["options"]))  # an option that came later has its default


def resume(
    folder: str | Path, watcher: Watcher | Sequence[Watcher] | None = None, *,
    method: str | type[Method] | None = None, stream: Asked | None = None, report_to: str | Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Go on with the run in ``folder`` after its last good task, and inside the next from its last save; return the metrics.

    ``method`` and ``stream``: what a run of objects was begun with; else they are found again. ``report_to``: trackers by name.
    """
    note = processes.join()
    folder, ears, kinds = expanded(folder), listening(watcher), checked(report_to)
    if note:
        ears.warn(note)
    with undisturbed(), coming_back(folder):
        config, data, built = reopen(folder, method, stream)
        check_batch(config["options"])
        check_config(folder, config, same_run)
        settings = Settings.recorded(config["settings"])
        changed = differing(config["environment"], environment(settings))
        if changed and not is_finished(folder):
            ears.warn(f"The environment has changed ({'; '.join(changed)}): the last bits may differ.")
        with tracking(folder, config, kinds if processes.main() else (), ears.warn) as tracked:
            heard = [ears, Replacing(folder), tracked] if processes.main() else []
            return engine_run(built, data, config, folder, Watchers(heard))


@contextlib.contextmanager
def coming_back(folder: Path) -> Iterator[None]:
    """A run that was to be replaced is put back, whatever ends the new one before it has a row."""
    try:
        yield
    except PerdureError as error:
        if bring_back(folder):
            raise PerdureError(f"{error} The run that was to be replaced is back in {folder}.") from error
        raise
    finally:
        bring_back(folder)


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of several seeds' metrics, with standard deviations and bootstrap intervals over the seeds."""
    first = runs[0]
    scalars = [k for k, v in first.items() if isinstance(v, float) and all(r[k] is not None for r in runs)]
    values = {k: np.array([r[k] for r in runs], dtype=np.float64) for k in scalars}
    picks = np.random.default_rng(0).integers(len(runs), size=(1000, len(runs)))
    matrices = {
        k: np.mean([r[k] for r in runs], axis=0).tolist() for k in ("accuracy", "probe", "incremental") if first[k]
    }
    dropped = ("accuracy_interval", "probe_interval", "losses", "phases", "seconds_by_task", "explained")
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
