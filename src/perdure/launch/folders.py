"""A run's folder: claimed for a new run, refused where it holds something else, replaced without a loss."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.core import processes
from perdure.core.config import options
from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.state import only_one, read_json, write_json
from perdure.engine.settings import ELSEWHERE, Settings
from perdure.engine.summary import FORMAT
from perdure.engine.watcher import Watcher

NEEDED = {"method", "stream", "seed", "options", "settings", "split", "weights", "environment"}
REPLACED, MOVING = ".replaced", ".moving"
ANALYSIS = "analysis.json"  # what ``perdure analyse`` found, beside a run's metrics


def same_run(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The keys in which two configurations differ; an option that one of them does not know is not among them."""
    others = ("method", "stream", "seed", "split", "weights")
    flat_a, flat_b = (
        {**c["options"], **c["settings"], **{k: c[k] for k in others}, "source": checksums(c)} for c in (a, b)
    )
    defaults = {key: option.default for key, option in options(Settings).items()}
    keys = {
        k for k in set(flat_a) | set(flat_b) if k not in ELSEWHERE and (k in defaults or (k in flat_a and k in flat_b))
    }
    return sorted(k for k in keys if plain(flat_a.get(k, defaults.get(k))) != plain(flat_b.get(k, defaults.get(k))))


def asked_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """``same_run``, but for what was left to the machine in both: another one may choose otherwise, and it is the same run."""
    left = set(a.get("auto", ())) & set(b.get("auto", ()))
    return [key for key in same_run(a, b) if key not in left]


def checksums(config: Mapping[str, Any]) -> dict[str, str | None]:
    """The checksums of the files that method and stream were read from."""
    return {kind: about.get("sha256") for kind, about in config.get("source", {}).items()}


def plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    return list(value) if isinstance(value, tuple) else value


def read_config(folder: Path) -> dict[str, Any]:
    """A run's ``config.json``, as it was written. ``PerdureError`` where the folder holds no run."""
    if processes.main() and (folder / MOVING).exists():
        with only_one(folder):
            recover(folder)
    if not (folder / "config.json").exists():
        raise PerdureError(f"{folder} holds no run (it has no config.json). Start one with: perdure run --out {folder}")
    config = read_json(folder / "config.json")
    if (folder / "perdure.json").exists():
        answers = "learned" in read_json(folder / "perdure.json")
        can = (
            f"it answers (perdure predict {folder} PICTURES)"
            if answers
            else "its weights can be begun with (--from, model=)"
        )
        raise PerdureError(f"{folder} is an export: {can}, and that is all. Give the folder that it was made from.")
    if isinstance(config, dict) and "format" not in config and "model_type" in config:
        raise PerdureError(
            f"{folder} holds a model as transformers keep it, not a run. Give it as a model: --from {folder} (learn), or "
            f"model={folder} (run)."
        )
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise PerdureError(f"{folder} was written by another version of perdure (format {FORMAT} is read here).")
    if lacking := sorted(NEEDED - set(config)):
        raise DamagedFile(f"{folder / 'config.json'} is damaged: it lacks {', '.join(lacking)}.")
    return config


def refuse_home(folder: Path) -> None:
    """Refuse to take a model in use for a run."""
    if (folder / "config.json").exists() and "home" in read_config(folder):
        raise PerdureError(
            f"{folder} is a model in use, not a run over a stream. See: perdure history {folder}; teach it more with: perdure "
            f"learn {folder} PICTURES"
        )


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
    refuse_home(folder)
    if content and not overwrite:
        raise PerdureError(refusal(folder, config))


def make_folder(folder: Path, config: Mapping[str, Any], overwrite: bool) -> None:
    """Claim a folder for a new run. What perdure did not write there stays, ``overwrite`` or not; a run that is replaced
    waits aside until the new one has its first row (see ``Replacing``)."""
    check_folder(folder, config, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        recover(folder)
        check_folder(folder, config, overwrite)  # another process may have come first
        if (folder / "config.json").exists():
            set_aside(folder)
        write_json(folder / "config.json", config)


def own_files(folder: Path) -> list[Path]:
    """What perdure wrote of a run into its folder, pairs and reports left out."""
    tasks = [
        p for p in folder.iterdir() if p.is_dir() and re.fullmatch(r"(damaged_)?(begun_)?(\.)?task_\d+_.*", p.name)
    ]
    return sorted([*tasks, *(p for n in ("config.json", "metrics.json", ANALYSIS) if (p := folder / n).exists())])


def set_aside(folder: Path) -> None:
    """Move a run aside inside its folder. One that waits there already is the older one, which has rows: it stays."""
    files = own_files(folder)
    if (folder / REPLACED).exists():
        remove(files)
        return
    moving = folder / MOVING
    moving.mkdir(exist_ok=True)
    for path in files:
        os.replace(path, moving / path.name)
    os.replace(moving, folder / REPLACED)  # only now is it aside; a move that was cut off is undone, see ``recover``


def bring_back(folder: Path) -> bool:
    """Put a run that waits aside back, where the one that was to replace it has no row; whether there was one."""
    if not processes.main() or not (folder / REPLACED).exists() or any(folder.glob("task_00_*")):
        return False
    os.replace(folder / REPLACED, folder / MOVING)
    recover(folder)
    return True


def recover(folder: Path) -> None:
    """Finish a move back, or undo a move aside, whatever cut it off: what is being moved belongs into the folder."""
    moving = folder / MOVING
    if not moving.exists():
        return
    for path in sorted(moving.iterdir()):
        place = folder / path.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(path, place)
    moving.rmdir()


def remove(paths: list[Path]) -> None:
    """Delete files and folders."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


class Replacing(Watcher):
    """Lets go of a run that was replaced, once the new one has a row that is safe on disk."""

    def __init__(self, folder: Path):
        self.folder = folder

    def row(self, accuracy: list[float], probe: float | None) -> None:
        shutil.rmtree(self.folder / REPLACED, ignore_errors=True)

    def warn(self, text: str) -> None:
        """Says nothing: the one beside it does."""


def refusal(folder: Path, config: Mapping[str, Any]) -> str:
    """Why a folder that holds a run is not written to."""
    differs = asked_alike(read_config(folder), config)
    if differs:
        said = f"{folder} holds a run with another configuration (it differs in {', '.join(differs)})."
        return f"{said} Choose another folder with --out, or replace it with --overwrite."
    if is_finished(folder):
        return f"{folder} holds this very run, finished. Look at it with: perdure report {folder}. Replace it with --overwrite."
    return (
        f"{folder} holds this very run, unfinished. Go on with: perdure resume {folder}. Replace it with --overwrite."
    )


def is_finished(folder: Path) -> bool:
    """Whether all tasks of the run in ``folder`` are done."""
    path = folder / "metrics.json"
    try:
        found = read_json(path) if path.exists() else None
    except DamagedFile:
        return False
    return isinstance(found, dict) and bool(found.get("finished"))


def seed_folders(folder: Path) -> list[Path]:
    """The folders of a run of several seeds, or nothing."""
    path = folder / "seeds.json"
    return [folder / f"seed_{number}" for number in read_json(path)] if path.exists() else []
