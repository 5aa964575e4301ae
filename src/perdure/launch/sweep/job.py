"""One run of a sweep, in a process of its own: begun, or gone on with. What it warns of stands in ``RUN/sweep.log``."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from perdure.core.errors import PerdureError
from perdure.core.state import only_one, write_json
from perdure.engine.settings import HANDED_OVER
from perdure.engine.watcher import Watcher
from perdure.launch.runs import begin, resume

LOG, MARK = "sweep.log", ".sweep"  # the mark says where a run is being done, while it is


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


def work(folder: str, report_to: str = "") -> str:
    """Do the run in ``folder``, or go on with it. Returns what a person must put right, or nothing; raises anything else."""
    run = Path(folder)
    if not run.is_dir():
        return f"{run} is not there. All machines of a cluster must see the sweep's folder under the same path."
    with open(run / LOG, "a", encoding="utf-8") as log, marked(run):
        ears = Noting(log)
        with only_one(run, ears.warn):  # whoever was killed a moment ago may still hold it
            pass
        try:
            resume(run, ears, report_to=report_to)
        except PerdureError as error:
            return str(error)
        except Exception:  # whatever it is: it is raised again
            log.write(traceback.format_exc())
            raise
    return ""


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
    """End this process when its parent is gone: a run that nobody waits for would hold its folder."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """``python -m perdure.launch.sweep.job PARENT FOLDER REPORT_TO``: prints what ``work`` returns, as JSON."""
    parent, folder, report_to = sys.argv[1:]
    die_with(int(parent))
    print(json.dumps(work(folder, report_to)))


if __name__ == "__main__":
    main()
