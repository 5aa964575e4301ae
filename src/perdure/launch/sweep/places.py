"""Where the runs of a sweep are done: on Ray, which packs them onto cores and GPUs, or here, one after another."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.core.errors import PerdureError
from perdure.launch.sweep.job import STOPPING, claim, work
from perdure.launch.sweep.plan import Cell

ABSENT = "Ray is not installed (pip install 'perdure[ray]')"
SHORT = 300  # characters of what a process said last
LEAST = 1e-4  # of a core or a GPU, as Ray counts


@dataclass(frozen=True)
class End:
    """How a run ended: ``said`` is empty where it is finished; ``again``: whether it may go better another time."""

    run: Path
    said: str = ""
    again: bool = False


class Place:
    """Takes runs, and hands them back when they have ended."""

    room = ""  # what is there, in words

    def claims(self, cells: Sequence[Cell]) -> list[tuple[str, list[str]]]:
        """Claim the folders of settings: for each what is wrong, and warnings."""
        return [claim(*asked(cell)) for cell in cells]

    def start(self, run: Path) -> None:
        """Take a run, which is done when there is room."""
        raise NotImplementedError

    def ended(self, seconds: float) -> list[End]:
        """The runs that have ended since; waits at most so long for one."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop whatever is being done; it can be gone on with."""


def asked(cell: Cell) -> tuple[str, str, str, tuple[str, ...], int, int]:
    return cell.method, cell.stream, str(cell.folder), cell.words, cell.seed, cell.seeds


class InTurn(Place):
    """Here, one after another, each in a process of its own: none can take another down, or leave it less memory. A run
    computes on so many ``threads``; 0: as it was begun."""

    room = "One run after another"

    def __init__(self, report_to: str = "", threads: int = 0):
        self.words = report_to, str(threads)
        self.waiting: deque[Path] = deque()
        self.now: tuple[Path, subprocess.Popen[str]] | None = None

    def start(self, run: Path) -> None:
        self.waiting.append(run)

    def ended(self, seconds: float) -> list[End]:
        if self.now is None and self.waiting:
            run = self.waiting.popleft()
            words = [sys.executable, "-m", "perdure.launch.sweep.job", str(os.getpid()), str(run), *self.words]
            pipe = subprocess.PIPE  # in a session of its own: Ctrl-C reaches the sweep alone, which tells it
            self.now = run, subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        if self.now is None:
            return []
        run, process = self.now
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return []
        self.now = None
        if process.returncode < 0:
            return [End(run, f"its process was ended by {signal.Signals(-process.returncode).name}", again=True)]
        if process.returncode or not out:
            return [End(run, last_line(err) or f"its process ended with {process.returncode}", again=True)]
        return [End(run, json.loads(out))]

    def close(self) -> None:
        if self.now is None:
            return
        (_, process), self.now = self.now, None
        process.terminate()  # it saves the task at hand
        try:
            process.communicate(timeout=STOPPING)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.communicate()


class OnRay(Place):
    """On a Ray cluster: the one at ``address``, or one of this machine's own, which ends with the sweep. A run takes ``cpus``
    cores and ``gpus`` GPUs; either may be a fraction. It computes on so many ``threads``; 0: as it was begun."""

    def __init__(
        self, address: str, cpus: float, gpus: float | None, cores: int = 0, report_to: str = "", threads: int = 0
    ):
        if cpus < LEAST and gpus is not None and gpus < LEAST:
            raise PerdureError("--cpus 0 --gpus 0: a run that takes nothing could not be packed. Say what one takes.")
        for name, share in (("cpus", cpus), ("gpus", gpus or 0)):
            if 0 < share < LEAST or (share > 1 and share % 1 and name == "gpus"):
                raise PerdureError(f"--{name} {share:g}: give a whole number, or a fraction of one from {LEAST} on.")
        self.ray, self.words = begun(address, cores), (report_to, threads)
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        some = any(node.get("GPU", 0) > 0 for node in nodes)
        self.needs = {"CPU": cpus, "GPU": (1.0 if some else 0.0) if gpus is None else gpus}
        if not any(self.needs.values()):
            self.needs["CPU"] = 1.0  # where there is no card
        self.pending: dict[Any, Path] = {}
        try:
            at_once = sum(room_on(node, self.needs) for node in nodes)
            self.room = described(nodes, self.needs, at_once)
            if not at_once:
                raise PerdureError(f"No machine has room for one run: {self.room}. Ask for less with --cpus or --gpus.")
        except PerdureError:
            self.close()
            raise

    def remote(self, function: Any, name: str) -> Any:
        options = {"num_cpus": self.needs["CPU"], "num_gpus": self.needs["GPU"], "max_retries": 0, "name": name}
        return self.ray.remote(function).options(**options)

    def claims(self, cells: Sequence[Cell]) -> list[tuple[str, list[str]]]:
        # there: whether a run computes on a GPU is decided where there may be one
        jobs = [self.remote(claim, f"begin {cell.folder.name}").remote(*asked(cell)) for cell in cells]
        try:
            found = self.ray.get(jobs)
        except self.ray.exceptions.RayError as error:
            raise PerdureError(
                f"No run could be begun on the cluster: {last_line(str(error))}. perdure must be installed on every machine, "
                "in the same version."
            ) from error
        return [(said, list(warnings)) for said, warnings in found]

    def start(self, run: Path) -> None:
        self.pending[self.remote(work, run.name).remote(str(run), *self.words)] = run

    def ended(self, seconds: float) -> list[End]:
        if not self.pending:
            return []
        done, _ = self.ray.wait(list(self.pending), num_returns=1, timeout=seconds)
        return [self.end(ref, self.pending.pop(ref)) for ref in done]

    def end(self, ref: Any, run: Path) -> End:
        errors = self.ray.exceptions
        try:
            return End(run, self.ray.get(ref))
        except errors.RayTaskError as error:
            return End(run, last_line(str(error)), again=True)
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError) as error:
            memory = isinstance(error, errors.OutOfMemoryError)
            return End(run, "its machine ran out of memory" if memory else "its worker was killed", again=True)
        except errors.RayError as error:
            return End(run, last_line(str(error)) or type(error).__name__, again=True)

    def close(self) -> None:
        refs, self.pending = list(self.pending), {}
        for ref in refs:
            self.ray.cancel(ref)  # which is a SIGINT: it saves the task at hand
        if refs:
            self.ray.wait(refs, num_returns=len(refs), timeout=STOPPING)
        self.ray.shutdown()


def begun(address: str, cores: int) -> Any:
    """Ray, connected to the cluster at ``address``, or with one begun here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told that it is used
    import ray

    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    if cores:
        own["num_cpus"] = cores
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **({} if address else own))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PerdureError(
            f"There is no Ray cluster at '{address}' ({str(error).splitlines()[0]:.{SHORT}}). Begin one with ray start --head, "
            "or leave --address out for one on this machine."
        ) from None
    return ray


def installed() -> bool:
    """Whether Ray is."""
    return importlib.util.find_spec("ray") is not None


def room_on(node: dict[str, float], needs: dict[str, float]) -> int:
    """How many runs a machine has room for at a time."""
    return min((math.floor(node.get(kind, 0) / need + 1e-9) for kind, need in needs.items() if need), default=1)


def described(nodes: Sequence[dict[str, float]], needs: dict[str, float], at_once: int) -> str:
    """What there is, and what a run takes of it, in words."""
    words = {"CPU": "core", "GPU": "GPU"}
    there = ", ".join(counted(sum(node.get(kind, 0) for node in nodes), words[kind]) for kind in needs)
    takes = ", ".join(counted(need, words[kind]) for kind, need in needs.items())
    return f"Ray on {counted(len(nodes), 'machine')} with {there}; a run takes {takes}: {at_once} at a time"


def counted(number: float, what: str) -> str:
    """``1 core``, ``0.5 cores``."""
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def last_line(text: str) -> str:
    """The last line of what a process said: of a traceback, the error."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:SHORT] if lines else ""
