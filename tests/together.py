"""Processes without processes: threads that take turns, each with the membership and the random states of a process of its
own, and hand each other what torch.distributed would. One runs at a time, until it has to wait for the others."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from perdure.core import processes
from perdure.core.processes import Membership

T = TypeVar("T")
LONG = 300  # seconds: what waits longer waits for ever


class Together:
    """``count`` processes; ``run`` has each do the same. Numbers in ``sent`` are those that were summed over all."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch):
        self.count, self.sent = count, 0
        self.turn, self.told = threading.Lock(), threading.Condition()
        self.rounds: dict[int, dict[int, Any]] = {}  # what each has handed over, exchange by exchange
        self.at, self.failed = [0] * count, False
        monkeypatch.setattr(processes, "here", processes.here)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(dist, "all_gather_object", self.all_gather)

    def run(self, do: Callable[[int], T]) -> list[T]:
        """What each made of its number; the first failure that is no mere consequence of another is raised."""
        found: dict[int, Any] = {}
        self.rounds, self.at, self.failed = {}, [0] * self.count, False
        threads = [threading.Thread(target=self.one, args=(k, do, found)) for k in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failed = [e for e in found.values() if isinstance(e, BaseException)]
        if failed:
            raise next((e for e in failed if not isinstance(e.__cause__, threading.BrokenBarrierError)), failed[0])
        return [found[k] for k in range(self.count)]

    def one(self, number: int, do: Callable[[int], T], found: dict[int, Any]) -> None:
        member = Membership(number, self.count)
        with self.turn:
            processes.here = member
            try:
                found[number] = do(number)
            except BaseException as error:  # noqa: B902  whatever it was, the others must not wait for it
                found[number] = error
                with self.told:
                    self.failed = True
                    self.told.notify_all()

    def exchange(self, value: Any) -> list[Any]:
        """What each hands over, in order."""
        member, states = processes.here, (random.getstate(), np.random.get_state(), torch.get_rng_state())
        slots = self.rounds.setdefault(self.at[member.rank], {})
        self.at[member.rank] += 1
        self.turn.release()
        try:
            with self.told:
                slots[member.rank] = value
                self.told.notify_all()
                self.told.wait_for(lambda: self.failed or len(slots) == self.count, LONG)
            if len(slots) < self.count:
                raise threading.BrokenBarrierError
            said = [slots[rank] for rank in range(self.count)]
        finally:
            self.turn.acquire()
            processes.here = member
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
        return said

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        self.sent += tensor.numel()
        with torch.no_grad():
            parts = self.exchange(tensor.clone())
            assert len({(x.shape, x.dtype) for x in parts}) == 1, "processes sum what is not alike"
            whole = torch.stack(parts)
            tensor.copy_(whole.amax(0) if op == dist.ReduceOp.MAX else whole.sum(0, dtype=tensor.dtype))

    def all_gather(self, said: list[Any], value: Any) -> None:
        said[:] = self.exchange(value)
