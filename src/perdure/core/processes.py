"""The processes that share a run: who is there, who writes and speaks, and what they hand each other.

Each does the same work in the same order; what costs time is shared out: of what is to be read, encoded or drawn, process r of
n does the r-th stretch, and all get the whole, with the same bits (``rows``, ``worked``, ``gathered``). What follows each
computes for itself, from the same numbers. Alone, which is how a process begins, it does all.

``torchrun``, ``accelerate launch`` and MPI start processes; ``join`` takes a process into their midst. gloo on processors, nccl
on accelerators.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from perdure.core.errors import PerdureError
from perdure.core.meeting import JOINING, coming_together

if TYPE_CHECKING:  # the command line asks who speaks long before torch is needed
    from torch import Tensor

T = TypeVar("T")
LAUNCHERS = (  # rank, number of processes, rank on this machine: torchrun and accelerate, Open MPI, other MPIs
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
PATIENCE = timedelta(hours=24)  # a dead process is noticed at once; one that works or writes is waited for
WHAT_IS_LEFT = "Every task that was finished is kept. Go on with: perdure resume RUN, with any number of processes."


@dataclass
class Membership:
    """Which process this is, of how many; ``store``: where they leave each other notes. ``sharing``: whether work is shared
    out now; ``warned``: that it was said what there is to say of the launcher; ``ending``: that this process fails already."""

    rank: int = 0
    count: int = 1
    store: Any = None
    sharing: bool = True
    warned: bool = False
    ending: bool = False


here = Membership()


def rank() -> int:
    """The number of this process, from 0."""
    return here.rank


def count() -> int:
    """How many processes share the run."""
    return here.count


def main() -> bool:
    """Whether this is the process that locks, writes and speaks."""
    return here.rank == 0


def sharing() -> bool:
    """Whether work is to be shared out now."""
    return here.count > 1 and here.sharing


@contextlib.contextmanager
def alone(on: bool = True) -> Iterator[None]:
    """Meanwhile, nothing is shared out: each process does all, as what is inside draws random numbers, say."""
    before, here.sharing = here.sharing, here.sharing and not on
    try:
        yield
    finally:
        here.sharing = before


# ---- joining


def launched(env: Mapping[str, str] = os.environ) -> tuple[int, int, int] | None:
    """Rank, number of processes and rank on this machine, as a launcher noted them; None: started by itself."""
    for names in LAUNCHERS:
        if names[0] in env and int(env.get(names[1], 1)) > 1:
            own, total = int(env[names[0]]), int(env[names[1]])
            return own, total, int(env.get(names[2], own))
    return None


def join() -> str:
    """Take this process in among those that a launcher started with it, once. Returns what a person should know of it."""
    found = launched()
    if here.count > 1 or found is None:
        lonely = here.count == 1 and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ
        said, here.warned = here.warned, here.warned or lonely
        return LONELY if lonely and not said else ""
    import torch
    import torch.distributed as dist

    own, total, local = found
    backend = "gloo"
    if torch.cuda.is_available() and int(os.environ.get("LOCAL_WORLD_SIZE", total)) <= torch.cuda.device_count():
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        os.environ.setdefault(name, value)
    with coming_together(own, total):
        store, own, total = next(dist.rendezvous(f"env://?rank={own}&world_size={total}", timeout=JOINING))
        dist.init_process_group(backend, store=store, rank=own, world_size=total, timeout=PATIENCE)
    store.set_timeout(PATIENCE)
    here.rank, here.count, here.store = own, total, store
    if main() and threading.current_thread() is threading.main_thread() and unheard():
        signal.signal(signal.SIGTERM, told_to_stop)
    return ""


def leave() -> None:
    """Part from the others when all is done: whoever ends first must not take away what another still waits on."""
    if here.count > 1:
        import torch.distributed as dist

        barrier()
        dist.destroy_process_group()


LONELY = (
    "accelerate launch started this process alone: on processors it starts several over MPI only (--mpirun_hostfile). Without, "
    "use: torchrun --nproc_per_node N -m perdure run …"
)


def unheard() -> bool:
    """Whether nobody hears when this process is told to stop."""
    return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def told_to_stop(*_: object) -> None:
    """The launcher ends all processes when one of them has ended."""
    if here.ending:
        return
    raise PerdureError(
        f"The run was told to stop, or one of its processes ended (killed, out of memory?). {WHAT_IS_LEFT}"
    )


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Say in a sentence that another process is gone, when that is noticed by what is asked of it."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise PerdureError(
            f"One of the processes of this run has ended (killed, out of memory?), or cannot be reached. {WHAT_IS_LEFT} "
            f"(process {here.rank} heard: {reason})"
        ) from error


def speaks() -> bool:
    """Whether this process, which fails, is the one to say what went wrong: the first that asks."""
    here.ending = True
    if here.store is None:
        found = launched()
        return found is None or found[0] == 0
    try:
        return here.store.add("perdure/said", 1) == 1
    except RuntimeError:  # the store went with the process that kept it
        return main()


# ---- sharing out


def rows(total: int, of: Membership | None = None) -> slice:
    """The stretch of ``total`` things that is this process's; empty where there are fewer things than processes."""
    m = of or here
    return slice(total * m.rank // m.count, total * (m.rank + 1) // m.count) if m.sharing else slice(0, total)


def worked(total: int) -> slice:
    """``rows``, or the first thing where that is empty: what comes of nothing has no shape, and no gradient."""
    own = rows(total)
    return own if own.start < own.stop else slice(0, 1)


def total(tensor: Tensor) -> Tensor:
    """The sum over the processes, in place; the same bits in each."""
    if sharing():
        import torch.distributed as dist

        with connected():
            dist.all_reduce(tensor)
    return tensor


def most(number: int) -> int:
    """The largest of the numbers that the processes have."""
    if here.count == 1:
        return number
    import torch
    import torch.distributed as dist

    found = torch.tensor(number)
    with connected():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gathered(part: Tensor, length: int) -> Tensor:
    """(length, …): what each process made of its ``worked(length)`` rows, put together in order."""
    if not sharing():
        return part
    own = rows(length)
    whole = part.new_zeros((length, *part.shape[1:]))
    whole[own] = part[: own.stop - own.start]
    return total(whole)


# ---- telling


def barrier() -> None:
    """Wait until all are here."""
    everyone(None)


def everyone(value: T) -> list[T]:
    """What each process says, in their order."""
    if here.count == 1:
        return [value]
    import torch.distributed as dist

    said: list[Any] = [None] * here.count
    with connected():
        dist.all_gather_object(said, value)
    return said


def from_main(value: T) -> T:
    """What the main process says; the others' own is dropped."""
    return everyone(value if main() else None)[0]  # type: ignore[return-value]
