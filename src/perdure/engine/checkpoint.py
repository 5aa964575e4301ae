"""A run's folder: one folder a task, complete or absent, every file with its checksum.

``config.json``            what was asked for, the split, the environment
``task_03_food/``          ``weights.safetensors``, the method's state files, ``hits.safetensors``, ``state.json``
``metrics.json``           the figures so far
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.core import packing
from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.packing import Frozen, Packed
from perdure.core.state import digest, inside, read_json, sync_folder, write_json
from perdure.core.tensors import REMOVED, Onto, Stored, read_tensors, stored, write_tensors
from perdure.methods.base import Method

LONG = 100  # characters of a name
SMALL = 1 << 16  # bytes: a file that is no larger is never worth removing
WHY = (
    "it was removed when the next task was safe (keep=last), so that this one can be neither exported nor gone back to; the "
    "last one can"
)
OWN = ("weights", "modules", "hits", "hits_of_all", "pictures")  # files of a task that are not the method's state


@dataclass
class Saved:
    """A task folder read back: which files hold what, and the record of the task."""

    folder: Path
    record: dict[str, Any]
    files: dict[str, dict[str, Tensor]]

    def packed(self) -> Packed:
        """The method's state as ``pack_state`` gave it."""
        return {name: tensors for name, tensors in self.files.items() if name not in OWN}, self.record["values"]

    def restore(self, method: Method) -> None:
        """Put state, modules (which may be made from the state) and weights back into a bound method."""
        device, (state, values) = method.clip.device, self.packed()
        here = {name: brought(own, device) for name, own in state.items()}
        method.unpack_state(here, values)
        load_modules(method, self.files.get("modules", {}))
        if "weights" in self.files:
            method.clip.load_own_state(self.files["weights"], f"saved {self.folder.name}")


def brought(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors on a device; those that stay in a file are brought there one at a time."""
    if isinstance(tensors, Frozen) and tensors.file is not None:
        tensors.stay_in(Onto(tensors.file, device))
        return tensors
    return {key: tensor.to(device) for key, tensor in tensors.items()}


def module_state(method: Method) -> dict[str, Tensor]:
    """The tensors of a method's own modules, as ``MODULE/TENSOR``."""
    return {f"{name}/{key}": t for name, module in method.modules().items() for key, t in module.state_dict().items()}


def load_modules(method: Method, saved: Mapping[str, Tensor]) -> None:
    """Put saved tensors back into a method's own modules. ``PerdureError`` where they do not fit."""
    known = module_state(method)
    odd = sorted(
        k for k in set(known) | set(saved) if k not in known or k not in saved or known[k].shape != saved[k].shape
    )
    if odd:
        raise PerdureError(
            f"The saved modules of the method do not fit those it has now: '{odd[0]}'. A method must make its modules in "
            "'bind', or from its state in 'unpack_state', as they were when it was saved."
        )
    for name, module in method.modules().items():
        module.load_state_dict({key: saved[f"{name}/{key}"] for key in module.state_dict()})


def folder_name(index: int, task: str) -> str:
    """``task_03_food``; characters that a file system may refuse become ``-``, and of a long name the end a checksum."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", task)
    plain = plain if len(plain) <= LONG else f"{plain[: LONG - 9]}-{digest(task.encode())[:8]}"
    return f"task_{index:02d}_{plain}"


def folder_names(tasks: Sequence[str]) -> list[str]:
    """The folders of a complete run, row 0's first; any other folder beside them is nobody's business here."""
    return [folder_name(number, task) for number, task in enumerate(["before", *tasks])]


def save_task(
    run: Path, name: str, method: Method, hits: dict[str, Tensor], record: dict[str, Any], kept: dict[str, Any],
    more: Mapping[str, dict[str, Tensor]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a task's folder beside, then rename it: it exists whole or not at all. Returns the record as written.

    A file that the task before has too (named in ``kept``) is named again: one that never changes (an expert, say) is not
    written, a larger one not kept twice.
    ``more``: further files of tensors by name.
    """
    files, values = method.pack_state()
    if method.carries_weights:
        files["weights"] = method.clip.own_state()
    if modules := module_state(method):
        files["modules"] = modules
    files |= {"hits": hits, **(more or {})}
    beside = run / f".{name}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        written = {}
        for key, tensors in sorted(files.items()):
            if key in kept and isinstance(tensors, Frozen):
                written[key] = kept[key]
                continue
            plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", key.replace("/", "_"))
            plain = plain if len(plain) <= LONG else f"{plain[: LONG - 9]}-{digest(key.encode())[:8]}"
            path = f"{plain}.safetensors"
            path = free_name(beside / path).name  # two tasks' names may differ in such characters alone
            sha256, size = write_tensors(beside / path, tensors)
            written[key] = {"path": f"{name}/{path}", "sha256": sha256, "bytes": size}
            if size > SMALL and sha256 == kept.get(key, {}).get("sha256"):
                written[key] = kept[key]
                (beside / path).unlink()
        record = {**record, "values": values, "files": written}
        write_json(beside / "state.json", {**record, "sha256": seal(record)})
        sync_folder(beside)
        os.replace(beside, run / name)
        sync_folder(run)
        leave_in_files(run, files, written)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return record


def leave_in_files(run: Path, files: Mapping[str, dict[str, Tensor]], written: Mapping[str, Any]) -> None:
    """Let large tensors that never change stay in the files that were written of them."""
    for key, tensors in files.items():
        if isinstance(tensors, Frozen) and tensors.file is None and written[key]["bytes"] > packing.LARGE:
            device = next(iter(tensors.values())).device
            tensors.stay_in(Onto(Stored(run / written[key]["path"]), device))


def let_go(run: Path, earlier: Sequence[str], record: Mapping[str, Any]) -> None:
    """Remove the files of earlier tasks that the last one, whose ``record`` it is, does not name; hits, records and what is
    small stay, and it is noted first which files go."""
    named = {about["path"] for about in record["files"].values()}
    for name in earlier:
        files = [p for p in sorted((run / name).glob("*.safetensors")) if f"{name}/{p.name}" not in named]
        gone = [p for p in files if p.name != "hits.safetensors" and p.stat().st_size > SMALL]
        if gone:
            known = read_json(run / name / REMOVED)["files"] if (run / name / REMOVED).exists() else []
            write_json(run / name / REMOVED, {"files": sorted({*known, *(p.name for p in gone)}), "why": WHY})
        for path in gone:
            path.unlink()


def seal(record: dict[str, Any]) -> str:
    """The checksum of a record, of the form that it has when it is read back."""
    return digest(json.dumps(json.loads(json.dumps(record)), sort_keys=True).encode())


def read_record(folder: Path) -> dict[str, Any]:
    """A task's ``state.json``, its seal checked."""
    record = read_json(folder / "state.json")
    noted = record.pop("sha256", None) if isinstance(record, dict) else None
    if noted != seal(record):
        raise DamagedFile(f"{folder / 'state.json'} is damaged: its content is not what was written.")
    return record


def read_task(folder: Path, tensors: bool) -> Saved:
    """Read a task's folder and check what is read: its record and hits, and with ``tensors`` weights and state too.

    ``DamagedFile`` names the file that is missing or altered.
    """
    record = read_record(folder)
    names = record["files"] if tensors else {"hits": record["files"]["hits"]}
    lean = {key for key in packing.frozen_files(record["values"]) if names.get(key, {}).get("bytes", 0) > packing.LARGE}
    files: dict[str, dict[str, Tensor]] = {}
    for key, about in names.items():
        path, sha256 = inside(folder.parent, about["path"]), about["sha256"]
        files[key] = Frozen() if key in lean else read_tensors(path, sha256)
        if key in lean:
            files[key].stay_in(stored(path, sha256))  # type: ignore[attr-defined]
    return Saved(folder, record, files)


def good_tasks(run: Path, tasks: Sequence[str], warn: Callable[[str], None]) -> list[Saved]:
    """The longest unbroken course of good tasks, the last of them with all its tensors.

    A damaged task and those after it are set aside (renamed, not deleted) and named through ``warn``.
    """
    folders = [run / name for name in folder_names(tasks)]
    there = [number for number, folder in enumerate(folders) if folder.exists()]
    good: list[Saved] = []
    for folder in folders[: max(there, default=-1) + 1]:
        try:
            good.append(read_task(folder, tensors=False))
        except DamagedFile as error:
            set_aside([f for f in folders[len(good) :] if f.exists()], good, error, warn)
            break
    while good:
        try:
            return [*good[:-1], read_task(good[-1].folder, tensors=True)]
        except DamagedFile as error:
            set_aside([good.pop().folder], good, error, warn)
    return []


def set_aside(folders: list[Path], good: list[Saved], error: DamagedFile, warn: Callable[[str], None]) -> None:
    """Rename task folders that cannot be used, and say so."""
    for folder in folders:
        os.replace(folder, free_name(folder.with_name(f"damaged_{folder.name}")))
    names = ", ".join(f.name for f in folders)
    onward = f"goes on after {good[-1].folder.name}" if good else "starts anew"
    warn(f"{error} Set aside as damaged_…: {names}. The run {onward}.")


def free_name(path: Path) -> Path:
    """``path``, or ``path-2``, ``path-3`` … where it is taken."""
    tries = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in range(1, 10_000))
    return next(p for p in tries if not p.exists())
