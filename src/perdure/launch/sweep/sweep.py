"""A sweep: its runs begun, done, tried again; what failed is named. Killed at any moment, it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.state import read_json, write_json
from perdure.launch.folders import is_finished
from perdure.launch.runs import over_seeds
from perdure.launch.sweep.job import MARK
from perdure.launch.sweep.places import End, Place
from perdure.launch.sweep.plan import FILE, Cell

State = Literal["waiting", "running", "finished", "failed"]
TICK = 0.5  # seconds between two looks at the folders


@dataclass
class Run:
    """One run of a sweep, as it stands."""

    cell: Cell
    folder: Path
    state: State = "waiting"
    tries: int = 0
    said: str = ""  # why it failed, the last time
    tasks: tuple[int, int] = (0, 0)  # learned, in all (0: not known yet)
    mean: float | None = None  # accuracy over all tasks, in per cent
    seconds: float = 0.0

    @property
    def name(self) -> str:
        one = f", seed {self.folder.name.removeprefix('seed_')}" if self.cell.seeds > 1 else ""
        return f"{self.cell.folder.name}{one}"

    def look(self) -> None:
        """Take in what its folder shows."""
        try:
            found = read_json(self.folder / "metrics.json") if (self.folder / "metrics.json").exists() else None
        except DamagedFile:  # the run itself will say so
            return
        if found:
            row = found["accuracy"][-1]
            self.tasks = len(found["accuracy"]) - 1, len(found["tasks"])
            self.mean, self.seconds = sum(row) / len(row), found["seconds"]
        if self.state in ("waiting", "running"):
            self.state = "running" if (self.folder / MARK).exists() else "waiting"


def runs_of(cells: Sequence[Cell]) -> list[Run]:
    """The runs of all settings; what is finished already is."""
    runs = [Run(cell, folder) for cell in cells for folder in cell.runs]
    for run in runs:
        run.state = "finished" if is_finished(run.folder) else "waiting"
        run.look()
    return runs


def take_over(cells: Sequence[Cell]) -> list[Run]:
    """The runs, by whoever alone holds the sweep's folder: none is being done, whatever a process that was killed has left."""
    for cell in cells:
        for folder in cell.runs:
            (folder / MARK).unlink(missing_ok=True)
    return runs_of(cells)


def check_out(out: Path) -> None:
    """Refuse a folder that holds anything but a sweep."""
    if out.is_file():
        raise PerdureError(f"{out} is a file. Choose another folder with --out.")
    if out.exists() and not (out / FILE).exists() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise PerdureError(f"{out} exists and is no sweep. Choose another folder with --out.")


def claim(cells: Sequence[Cell], place: Place, warn: Callable[[str], None]) -> None:
    """Claim the folders of all settings that were not begun yet, before any run is done; what is wrong is said together."""
    told: list[str] = []
    wrong = []
    new = [cell for cell in cells if not cell.claimed()]
    for cell, (said, warnings) in zip(new, place.claims(new), strict=True):
        wrong += [f"{cell.folder.name}: {said}"] if said else []
        for text in warnings:
            if text not in told:
                told.append(text)
                warn(text)
    if wrong:
        raise PerdureError("\n".join(wrong))


def sweep(
    cells: Sequence[Cell], place: Place, retries: int, draw: Callable[[list[Run]], Any], say: Callable[[str], None]
) -> list[Run]:
    """Do what is not finished of the claimed settings; ``draw`` sees all runs now and then, ``say`` hears of each that ended.

    A run whose process fails is tried again, ``retries`` times, from its last good task; what a person must put right is not.
    """
    runs = runs_of(cells)
    open_runs = {run.folder: run for run in runs if run.state != "finished"}
    for folder in open_runs:
        place.start(folder)
    while open_runs:
        for end in place.ended(TICK):
            run = open_runs[end.run]
            if settle(run, end, retries, say):
                del open_runs[end.run]
            else:
                place.start(run.folder)
        for run in open_runs.values():
            run.look()
        draw(runs)
    for cell in cells:
        if cell.seeds > 1 and all(is_finished(folder) for folder in cell.runs):
            write_json(cell.folder / "metrics.json", over_seeds([read_json(f / "metrics.json") for f in cell.runs]))
    return runs


def settle(run: Run, end: End, retries: int, say: Callable[[str], None]) -> bool:
    """Take in how a run ended; False where it is to be tried again."""
    run.tries, run.said = run.tries + 1, end.said
    (run.folder / MARK).unlink(missing_ok=True)
    if not end.said:
        run.state = "finished"
        run.look()
        mean = f"{run.mean:.1f} % over all tasks, " if run.mean is not None else ""
        say(f"{run.name}: finished; {mean}{run.seconds:.0f} s.")
    elif end.again and run.tries <= retries:
        run.state = "waiting"
        say(f"{run.name}: failed ({end.said}); it is tried again.")
        return False
    else:
        run.state = "failed"
        say(f"{run.name}: failed: {end.said}")
    return True
