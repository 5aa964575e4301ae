"""Signals that ask a process to stop (SIGTERM, SIGINT): heard between two steps, not in the middle of one or of a save."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from perdure.core import processes

T = TypeVar("T")
GRACE = 5.0  # seconds that a step has to come to its end


class Stopped(KeyboardInterrupt):
    """A signal has asked to stop. ``saved``: what was kept inside the task at hand, in words; empty: nothing new. ``together``:
    whether all processes that share the run stop now."""

    def __init__(self, number: int = signal.SIGINT, saved: str = "", together: bool = False):
        super().__init__(signal.Signals(number).name)
        self.number, self.saved, self.together = number, saved, together

    @property
    def code(self) -> int:
        """What a process that is ended by it exits with."""
        return 128 + self.number


class Ear(threading.local):
    """What was heard, and whether it can wait. Of the main thread, which alone hears."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """As if nothing had been heard."""
        self.heard = 0  # the signal
        self.depth = 0  # of ``held``
        self.working = False  # whether the grace runs: a step may be broken off, a save may not


EAR = Ear()


def asked() -> int:
    """The number of the signal that has asked to stop; 0: none has."""
    return EAR.heard


def agreed() -> int:
    """What the processes that share a run were asked, each of which calls this at the same step: where one was told to stop all
    are, so that none waits for one that is gone."""
    found = processes.most(EAR.heard)
    EAR.heard = EAR.heard or found
    return found


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Meanwhile, SIGTERM and SIGINT raise ``Stopped``: at once, or where it is ``held`` when that is over. A second one does
    not wait. Only the main thread can listen; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    EAR.forget()
    kinds = (signal.SIGTERM, signal.SIGINT, *((signal.SIGALRM,) if hasattr(signal, "SIGALRM") else ()))
    before = {kind: signal.signal(kind, hear) for kind in kinds}
    try:
        yield
    finally:
        alarm(0)
        for kind, handler in before.items():
            signal.signal(kind, handler)
        EAR.forget()


def hear(number: int, frame: Any) -> None:
    """A signal has come, or the grace is over."""
    late = number not in (signal.SIGTERM, signal.SIGINT)
    if late and not (EAR.heard and EAR.working):
        return
    second, EAR.heard = bool(EAR.heard), EAR.heard or number
    if late or second or not EAR.depth:
        raise Stopped(EAR.heard)
    if processes.count() == 1:  # of several none breaks off alone
        alarm(GRACE)


def alarm(seconds: float) -> None:
    """Let the grace run for so long; 0: no more. Systems without it wait for the step."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def together() -> contextlib.AbstractContextManager[None]:
    """Meanwhile, of several processes that share a run none stops by itself: only where all do, by ``agreed``."""
    return held() if processes.count() > 1 else contextlib.nullcontext()


def stop_together() -> None:
    """Stop here, where any of several processes was told to. All come by here, but in a step or a save none stops."""
    if processes.sharing() and EAR.depth <= 1 and (number := agreed()):
        raise Stopped(number, together=True)


def in_turn(parts: Iterable[T], most: int = 0) -> Iterator[T]:
    """``parts`` of this process's share of a work, one after another; before each, all processes may ``stop_together``.
    ``most``: how many parts the largest share has, where they differ."""
    number = 0
    for part in parts:
        stop_together()
        number += 1
        yield part
    for _ in range(number, most):
        stop_together()


@contextlib.contextmanager
def held(working: bool = False) -> Iterator[None]:
    """Meanwhile, a signal waits; it is raised when this is over. ``working``: or when it has waited for ``GRACE``."""
    before, EAR.working = EAR.working, working
    EAR.depth += 1
    try:
        yield
    finally:
        EAR.depth -= 1
        EAR.working = before
    if EAR.heard and not EAR.depth:
        raise Stopped(EAR.heard)
