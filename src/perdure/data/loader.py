"""Batches read ahead of whoever trains, in order: what a batch holds depends on the generator alone, not on who reads it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Read = TypeVar("Read")


def ahead(
    jobs: Iterator[Job], read: Callable[[Job], Read], workers: int, generator: torch.Generator
) -> Iterator[tuple[Job, Read]]:
    """Each job with what ``read`` makes of it, in order. ``jobs`` draws from ``generator`` and is drawn from here alone;
    ``workers`` threads (0: none) read as many jobs and one ahead. When the caller stops, the generator is where it would be
    had nothing been read ahead."""
    if not workers:
        for job in jobs:
            yield job, read(job)
        return
    waiting: deque[tuple[Job, Future[Read], torch.Tensor]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="perdure-loads") as pool:
        try:
            while True:
                while len(waiting) <= workers:
                    try:
                        new = next(jobs)
                    except StopIteration:
                        break
                    waiting.append((new, pool.submit(read, new), generator.get_state()))
                if not waiting:
                    return
                job, made, state = waiting.popleft()
                yield job, made.result()
        finally:
            if waiting:
                generator.set_state(state)
            for _, other, _ in waiting:
                other.cancel()
