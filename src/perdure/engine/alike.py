"""Processes that share a run, and must not part: the same configuration, the same folder, the same weights and state."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.core import processes
from perdure.core.errors import PerdureError
from perdure.core.packing import Frozen
from perdure.core.state import write_bytes
from perdure.engine.checkpoint import module_state
from perdure.methods.base import Method

ROUNDING = 1e-3  # of a sum of magnitudes
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


@torch.no_grad()
def settle(method: Method, task: str) -> None:
    """Give all the main process's weights and state, where sums on an accelerator have come out otherwise in the last digits.

    ``PerdureError`` where they differ by more: then something was not the same in all.
    """
    if processes.count() == 1:
        return
    files, values = method.pack_state()
    tensors = kept(method, files)
    found = processes.everyone((sums(tensors), repr(values)))
    if all(own == found[0] for own in found):
        return
    first = found[0][0]
    for number, (own, _) in enumerate(found):
        if odd := [name for name in {**first, **own} if far(first.get(name), own.get(name))]:
            raise PerdureError(
                f"After {task}, process {number} holds another '{odd[0]}' than process 0. The processes of a run must compute "
                "alike: on machines of one kind, with the same versions. Tasks that were finished are kept."
            )
    for name, tensor in tensors.items():
        if any(own[name] != first[name] for own, _ in found):
            processes.total(tensor if processes.main() else tensor.zero_())
    method.clip.changed(method.clip.holds)
    values = processes.from_main(values)
    if not processes.main():
        method.unpack_state(files, values)


def kept(method: Method, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that a run keeps after a task, themselves; what never changes was settled when it was new."""
    own = {
        f"{file}/{key}": t for file, some in files.items() for key, t in some.items() if not isinstance(some, Frozen)
    }
    return {**method.clip.own_state(), **module_state(method), **own}


def sums(tensors: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Of each tensor the sum, and the sum of magnitudes."""
    wide = ((name, tensor.double()) for name, tensor in tensors.items())
    return {name: (x.sum().item(), x.abs().sum().item()) for name, x in wide}


def far(a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool:
    """Whether two tensors, by their ``sums``, differ by more than rounding does."""
    return a is None or b is None or max(abs(x - y) for x, y in zip(a, b, strict=True)) > ROUNDING * a[1]
