"""Processes that share a run, and must not part: the same configuration, the same folder, the same weights and state."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from perdure.core import processes
from perdure.core.errors import PerdureError
from perdure.core.packing import Frozen
from perdure.core.state import write_bytes
from perdure.engine.checkpoint import module_state
from perdure.methods.base import Method

NOTE = ".processes"  # what the main process leaves in the folder for the others to see


def check_batch(options: Mapping[str, Any]) -> None:
    """Refuse a batch that has no image for some process."""
    count, batch = processes.count(), options.get("batch_size")
    if batch is not None and batch < count:
        raise PerdureError(
            f"batch_size={batch}: a batch of {batch} images, of all processes together, cannot be shared out to {count}. Start "
            f"{batch} or fewer, or set batch_size={count} or more."
        )


def check_config(
    folder: Path, config: Mapping[str, Any], differing: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]]
) -> None:
    """Refuse processes that were started for different runs; ``differing``: the keys in which two configurations differ."""
    found = processes.everyone((str(folder.resolve()), dict(config)))
    first = found[0]
    for number, own in enumerate(found):
        if odd := differing(first[1], own[1]):
            raise PerdureError(
                f"Process {number} was started for another run than process 0: they differ in {', '.join(odd)}. Start all "
                "processes with the same command, on the same data and model."
            )
        if own[0] != first[0]:
            raise PerdureError(
                f"Process {number} was started with another folder than process 0: {own[0]}, not {first[0]}. Give all "
                "processes the same --out, as an absolute path where they start in different places."
            )


def check_folder(folder: Path) -> None:
    """Refuse processes that do not see the same folder under its name, as on machines that share none."""
    if processes.count() == 1:
        return
    mark = processes.from_main(uuid.uuid4().hex)
    if processes.main():
        write_bytes(folder / NOTE, mark.encode())
    processes.barrier()
    path = folder / NOTE
    seen = processes.everyone(path.read_text() if path.exists() else "")
    if processes.main():
        path.unlink()
    if blind := [number for number, found in enumerate(seen) if found != mark]:
        raise PerdureError(
            f"Process {blind[0]} does not see what process 0 has written to {folder}. All processes of a run, on whichever "
            "machine, must see the same folder: give one on a disk that they share."
        )


def check_state(method: Method, task: str) -> None:
    """Refuse to go on where processes, which compute the same, have come to hold other weights or state."""
    if processes.count() == 1:
        return
    found = processes.everyone(sums(method))
    for number, own in enumerate(found):
        if odd := [name for name in {**found[0], **own} if found[0].get(name) != own.get(name)]:
            raise PerdureError(
                f"After {task}, process {number} holds another '{odd[0]}' than process 0. The processes of a run must compute "
                "alike, to the last bit: on machines of one kind, with the same versions. Tasks that were finished are kept."
            )


def sums(method: Method) -> dict[str, str]:
    """Of each tensor that a run keeps, its sum."""
    files, values = method.pack_state()
    tensors: dict[str, Tensor] = {**method.clip.own_state(), **module_state(method)}
    for file, own in files.items():
        tensors.update({} if isinstance(own, Frozen) else {f"{file}/{key}": tensor for key, tensor in own.items()})
    return {"values": repr(values), **{name: repr(t.double().sum().item()) for name, t in tensors.items()}}
