"""The command ``sweep``: many runs, packed onto what there is, and one report of them."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perdure.cli.comparing import compare
from perdure.cli.results import check_page, finish, read_metrics
from perdure.cli.runs import ReportTo
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.terminal import console

if TYPE_CHECKING:
    from perdure.launch.sweep.places import Place
    from perdure.launch.sweep.plan import Cell, Plan
    from perdure.launch.sweep.sweep import Run

SHOWN = 24  # runs in the live table
# How runs are done where nobody says; what was said is kept, for who goes on with the folder alone.
HOW: dict[str, Any] = {
    "cpus": 1.0, "gpus": None, "cores": 0, "address": "", "in_turn": False, "retries": 1, "report_to": "",
}  # fmt: skip


def sweep(
    values: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=V1,V2]...", help="Options, each with one value or several.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Names or Python files, with commas between.")] = "",
    streams: Annotated[
        str, typer.Option(help="Names or places, as 'perdure run' takes them, with commas between.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="The (first) seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of each setting.")] = 1,
    orders: Annotated[
        int, typer.Option(min=1, help="How many orders of tasks or classes: the stream's own, then others by seed.")
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep; alone, that sweep is gone on with.")] = None,
    plan: Annotated[bool, typer.Option("--plan", "--dry-run", help="Show what would be run, and do nothing.")] = False,
    cpus: Annotated[
        float | None, typer.Option(min=0, help="Cores that a run takes, or a fraction of one; 1 without a word.")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs that a run takes, or a fraction; 1 where there are any.")
    ] = None,
    cores: Annotated[int | None, typer.Option(min=0, help="Cores of this machine used in all; 0: all.")] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster that is there; 'auto': this machine's.")] = None,
    in_turn: Annotated[bool, typer.Option("--in-turn", help="One run after another, without Ray.")] = False,
    retries: Annotated[
        int | None, typer.Option(min=0, help="How often a run whose process dies is tried again; 1 without a word.")
    ] = None,
    report_to: ReportTo = "",
) -> None:
    """Do many runs, methods × streams × values × orders × seeds, each a folder like any other, on Ray where it is installed."""
    from perdure.engine.settings import THREADS
    from perdure.launch.sweep.plan import Plan, planned
    from perdure.launch.sweep.sweep import check_out
    from perdure.launch.trackers import checked

    out = named(out).resolve()
    check_out(out)
    given = split(methods), split(streams)
    asked_how = {
        "cpus": cpus, "gpus": gpus, "cores": cores, "address": address, "in_turn": in_turn or None, "retries": retries,
        "report_to": report_to or None,
    }  # fmt: skip
    said = {key: value for key, value in asked_how.items() if value is not None}
    if values or any(given):
        if missing := [k for k, v in zip(("--methods", "--streams"), given, strict=True) if not v]:
            raise PerdureError(f"{' and '.join(missing)} missing. See: perdure methods, perdure streams.")
        asked = planned(*given, values or [], seed=seed, seeds=seeds, orders=orders, how=said)
    else:
        asked = Plan.read(out)
        asked = replace(asked, how={**asked.how, **said})
    how = {**HOW, **asked.how}
    checked(how["report_to"])
    alone = how["in_turn"] or not ray_is_there(how["address"])
    threads = THREADS if alone else max(1, int(how["cpus"]))
    own = "threads" in asked.grid()[0]  # as the values say
    cells = asked.cells(out, threads=0 if alone else threads)
    if plan:
        show(cells, "One run after another." if alone else f"On Ray, {how['cpus']:g} of its cores a run.")
        return
    check_page(out / "report.html")
    report(out, carried_out(out, asked, cells, place_of(alone, how, 0 if own else threads), how["retries"]))


def named(out: Path | None) -> Path:
    if out is None:
        raise PerdureError("--out missing: the folder of the sweep, new or to be gone on with.")
    return expanded(out)


def split(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def ray_is_there(address: str) -> bool:
    """Whether Ray can be used; refused where it is asked for and is not installed."""
    from perdure.launch.sweep.places import ABSENT, installed

    if installed():
        return True
    if address:
        raise PerdureError(
            f"{ABSENT}, so there is no cluster at '{address}' to be reached. Leave --address out to run here."
        )
    say(f"{ABSENT}: the runs are done one after another.")
    return False


def place_of(alone: bool, how: Mapping[str, Any], threads: int) -> Place:
    from perdure.launch.sweep.places import InTurn, OnRay

    if alone:
        return InTurn(how["report_to"], threads)
    return OnRay(how["address"], how["cpus"], how["gpus"], how["cores"], how["report_to"], threads)


def carried_out(out: Path, asked: Plan, cells: list[Cell], place: Place, retries: int) -> list[Run]:
    """Claim and do the runs; SIGTERM and Ctrl-C stop tidily."""
    from perdure.core import stopping
    from perdure.core.state import only_one

    out.mkdir(parents=True, exist_ok=True)
    code = 0
    try:
        with stopping.listening(), only_one(out):
            try:
                return under_a_table(out, asked, cells, place, retries)
            finally:  # Ray makes of what interrupts it an interrupt of its own
                code = 128 + (stopping.asked() or signal.SIGINT)
    except KeyboardInterrupt:
        say("\nStopping: runs save what they are at.")
        place.close()
        say(f"Stopped. Every task that was finished is kept. Go on with: perdure sweep --out {out}")
        raise typer.Exit(code) from None
    finally:
        place.close()


def under_a_table(out: Path, asked: Plan, cells: list[Cell], place: Place, retries: int) -> list[Run]:
    """Claim and do the runs under a live table."""
    from rich.live import Live

    from perdure.launch.sweep.plan import FILE, names_in
    from perdure.launch.sweep.sweep import claim, take_over
    from perdure.launch.sweep.sweep import sweep as do

    screen = console()
    say(f"{counted(take_over(cells))}. {place.room}.")
    earlier = set(names_in(out).values()) - {cell.folder.name for cell in cells}
    if not (out / FILE).exists():
        asked.write(out)
    claim(cells, place, lambda text: say(f"Warning: {text}"))
    asked.write(out, cells)  # only now: what is refused replaces no plan that is good
    if earlier:
        say(f"Of earlier plans, and left as they are, out of the report: {', '.join(sorted(earlier))}.")
    with Live(console=screen, transient=True, auto_refresh=False) as live:

        def draw(runs: list[Run]) -> None:
            if screen.is_terminal:
                live.update(table(runs), refresh=True)

        return do(cells, place, retries, draw, lambda text: live.console.print(text, markup=False, highlight=False))


def report(out: Path, runs: Sequence[Run]) -> None:
    """One report of the settings that are done, published tables where there are any, and the names of what failed."""
    from perdure.report.published import tables

    cells = list(dict.fromkeys(run.cell for run in runs))
    unfinished = {run.cell for run in runs if run.state != "finished"}
    done = [cell for cell in cells if cell not in unfinished]
    if done:
        finish([cell.folder for cell in done], out / "report.html", labels=[cell.label for cell in done])
        fitting = [c.folder for c in done if any(t.fits(read_metrics(c.folder)) for t in tables())]
        if fitting:
            compare(fitting)
    failed = [run for run in runs if run.state == "failed"]
    if failed:
        lines = "\n".join(f"{run.name}: {run.said}" for run in failed)
        raise PerdureError(
            f"{len(failed)} of {len(runs)} runs failed; the others are kept.\n{lines}\nTheir warnings stand in sweep.log in "
            f"their folders. Go on with: perdure sweep --out {out}"
        )


# ---- what is shown


def say(text: str) -> None:
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def counted(runs: Sequence[Run]) -> str:
    """``12 runs: 3 finished, 9 waiting``."""
    states = Counter(run.state for run in runs)
    named = [f"{states[s]} {s}" for s in ("finished", "running", "waiting", "failed") if states[s]]
    return f"{len(runs)} run{'s' if len(runs) != 1 else ''}: {', '.join(named)}"


def show(cells: list[Cell], where: str) -> None:
    """The plan as a table."""
    from rich.markup import escape
    from rich.table import Table

    from perdure.launch.sweep.sweep import runs_of

    drawn = Table(box=None)
    for column in ("folder", "stream", "options", "seeds", "state"):
        drawn.add_column(column, overflow="fold")
    for cell in cells:
        runs = runs_of([cell])
        finished = sum(run.state == "finished" for run in runs)
        begun = any(run.tasks[1] for run in runs)
        state = "finished" if finished == len(runs) else f"{finished} of {len(runs)} finished" if begun else "new"
        seeds = f"{cell.seed} … {cell.seed + cell.seeds - 1}" if cell.seeds > 1 else str(cell.seed)
        drawn.add_row(escape(cell.folder.name), escape(cell.stream), escape(" ".join(cell.words)), seeds, state)
    console().print(drawn)
    say(f"{counted(runs_of(cells))}. {where}")


def table(runs: Sequence[Run]) -> Any:
    """The runs as they stand: those that run first, then what failed or ended last, then what waits."""
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(title=counted(runs), title_justify="left", box=None)
    for column in ("run", "state", "tasks", "accuracy", "seconds"):
        drawn.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    places = {"running": 0, "failed": 1, "waiting": 2, "finished": 3}
    for run in sorted(runs, key=lambda run: places[run.state])[:SHOWN]:
        learned, total = run.tasks
        again = f", try {run.tries + 1}" if run.tries and run.state in ("running", "waiting") else ""
        drawn.add_row(
            escape(run.name), f"{run.state}{again}", f"{max(learned, 0)}/{total}" if total else "–",
            "–" if run.mean is None else f"{run.mean:.1f} %", f"{run.seconds:.0f}" if run.seconds else "–",
        )  # fmt: skip
    if len(runs) > SHOWN:
        drawn.caption = f"{len(runs) - SHOWN} more"
    return drawn
