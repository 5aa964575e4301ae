"""One run of a sweep, in a process of its own: begun, or gone on with. What it warns of stands in ``RUN/sweep.log``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from perdure.core import stopping
from perdure.core.errors import PerdureError
from perdure.core.state import only_one, read_json, write_json
from perdure.engine.settings import HANDED_OVER
from perdure.engine.watcher import Watcher
from perdure.launch.runs import begin, resume

LOG, MARK = "sweep.log", ".sweep"  # the mark says where a run is being done, while it is
STOPPING = 15.0  # seconds that a run has to save itself when it is asked to stop


def claim(method: str, stream: str, folder: str, words: Sequence[str], seed: int, seeds: int) -> tuple[str, list[str]]:
    """Claim the folders of a setting, where they are not there yet. What a person must put right, or nothing; and warnings."""
    warnings: list[str] = []
    try:
        begin(
            method, stream, Path(folder), seed=seed, seeds=seeds, assignments=list(words), go_on=True,
            warn=warnings.append,
        )  # fmt: skip
    except PerdureError as error:
        return str(error), warnings
    finally:
        HANDED_OVER.clear()  # the run is not done here
    return "", warnings


def work(folder: str, report_to: str = "", threads: int = 0) -> str:
    """Do the run in ``folder``, or go on with it, on so many ``threads`` (0: as it was begun). Returns what a person must put
    right, or nothing; raises anything else. SIGTERM and SIGINT save the task at hand and raise ``Stopped``."""
    run = Path(folder)
    if not run.is_dir():
        return f"{run} is not there. All machines of a cluster must see the sweep's folder under the same path."
    with open(run / LOG, "a", encoding="utf-8") as log, marked(run):
        ears = Noting(log)
        with only_one(run, ears.warn):  # whoever was killed a moment ago may still hold it
            pass
        try:
            compute_with(run, threads)
            with stopping.listening():
                resume(run, ears, report_to=report_to)
        except PerdureError as error:
            return str(error)
        except Exception:  # whatever it is: it is raised again
            log.write(traceback.format_exc())
            raise
    return ""


def compute_with(run: Path, threads: int) -> None:
    """Let a run compute on what it is given here, wherever it was begun: threads are no part of what it is."""
    config = read_json(run / "config.json")
    if threads and config["settings"]["threads"] != threads:
        config["settings"]["threads"] = threads
        write_json(run / "config.json", config)


class Noting(Watcher):
    """Writes warnings down."""

    def __init__(self, log: TextIO):
        self.log = log

    def warn(self, text: str) -> None:
        print(text, file=self.log, flush=True)


@contextlib.contextmanager
def marked(run: Path) -> Iterator[None]:
    """Say in the folder where the run is being done."""
    write_json(run / MARK, {"host": socket.gethostname(), "pid": os.getpid()})
    try:
        yield
    finally:
        (run / MARK).unlink(missing_ok=True)


def die_with(parent: int) -> None:
    """Stop this process when its parent is gone: a run that nobody waits for would hold its folder."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOPPING)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """``python -m perdure.launch.sweep.job PARENT FOLDER REPORT_TO THREADS``: prints what ``work`` returns, as JSON, and
    nothing else, whatever a method of one's own prints."""
    parent, folder, report_to, threads = sys.argv[1:]
    die_with(int(parent))
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        said = work(folder, report_to, int(threads))
    except stopping.Stopped as stop:
        sys.exit(stop.code)
    with answer:
        json.dump(said, answer)


if __name__ == "__main__":
    main()
