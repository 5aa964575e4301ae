"""Commands about a model in use: ``learn``, ``predict``, ``evaluate``, ``history``, ``forget``, ``undo``."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perdure.cli.tables import Format, course_table, rows_table, write_rows
from perdure.core import stopping
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.terminal import console

if TYPE_CHECKING:
    from perdure.launch.learner.comparison import Outcome

Home = Annotated[Path, typer.Argument(metavar="HOME", help="Folder of the model in use.")]


class Keep(str, Enum):
    """What is kept of test pictures."""

    pictures = "pictures"
    paths = "paths"
    none = "none"


def say(text: str) -> None:
    """A line as it is, whatever brackets names hold."""
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def learn(
    home: Home,
    pictures: Annotated[str, typer.Argument(help="Folder of new pictures: CLASS/*, or TASK/CLASS/*.")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Options of the method; see 'perdure methods NAME'."),
    ] = None,
    model: Annotated[
        str, typer.Option("--from", "--model", help="Folder or Hub id of a CLIP; default: the embedded one.")
    ] = "",
    method: Annotated[str, typer.Option(help="What learns: a name (see 'perdure methods') or a Python file.")] = "",
    name: Annotated[str, typer.Option(help="What the task is called; default: as the folder.")] = "",
    max_loss: Annotated[
        float | None,
        typer.Option(
            min=0, help="Refuse what costs an earlier task or the probe more points; default: 2, beyond chance."
        ),
    ] = None,
    probe: Annotated[
        Path | None,
        typer.Option(help="Folder CLASS/* of pictures, or of synthetic pairs, to measure zero-shot ability on."),
    ] = None,
    keep: Annotated[
        Keep | None, typer.Option(help="What is kept of each task's test pictures; default: pictures.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The seed; default: 0.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be learned, and learn nothing.")] = False,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Learn all pictures below the folder without labels (pfr).")
    ] = False,
) -> None:
    """Teach a model in use what a folder of pictures shows, and say what was won and lost. Made on first use."""
    from perdure.core.config import pairs
    from perdure.launch.learner import Learner
    from perdure.launch.learner.making import UNLABELLED, read_home
    from perdure.view import Screen

    given, complaints = pairs(assignments or [])
    if complaints:
        raise PerdureError(" ".join(complaints))
    if unlabelled and not method and read_home(expanded(home)) is None:
        method = UNLABELLED  # whose options are given with it
    screen = Screen(console(), str(home))
    learner = Learner(
        home, model=model, method=method, probe=probe, keep=keep.value if keep else None, seed=seed, watcher=screen, **given
    )  # fmt: skip
    more: dict[str, Any] = dict(max_loss=max_loss, dry_run=dry_run, unlabelled=unlabelled)
    done: list[Outcome] = []
    with tidily(home), telling(done, home), screen:
        outcomes = learner.learn(pictures, name=name, told=done.append, **more)
        done[:] = outcomes  # of a dry run nobody is told
    if not outcomes.accepted:
        raise typer.Exit(1)


@contextlib.contextmanager
def tidily(home: Path) -> Iterator[None]:
    """Meanwhile, SIGTERM and Ctrl-C end this in order, and what is kept is said."""
    before = newest(home)
    try:
        with stopping.listening():
            yield
    except KeyboardInterrupt as stop:
        saved, code = (stop.saved, stop.code) if isinstance(stop, stopping.Stopped) else ("", 130)
        found = newest(home)
        now = "before" if found in (before, "before") else f"after {found}"
        kept = f", and the training at hand is kept up to {saved}" if saved else ""
        say(f"\nStopped. {home} is as it was {now}{kept}; the same command goes on from there.")
        raise typer.Exit(code) from None


def newest(home: Path) -> str:
    """What the current state was made by, by its folder's name; ``before`` where nothing was."""
    from perdure.engine.home import numbered

    folder = expanded(home)
    return numbered(folder)[-1].name.split("_", 2)[2] if any(folder.glob("task_*")) else "before"


@contextlib.contextmanager
def telling(done: Sequence[Outcome], home: Path) -> Iterator[None]:
    """Whatever ends this, what learning came to of the tasks that are ``done`` is shown."""
    try:
        yield
    finally:
        for one in done:
            show(one, home)


def show(outcome: Outcome, home: Path) -> None:
    """What learning a task came to: its notes, the table, what to do next."""
    for note in outcome.notes:
        say(note)
    if outcome.planned or outcome.already:
        if outcome.already:
            say(f"{outcome.task} was learned before: nothing to do.")
        return
    console().print(rows_table(f"{outcome.task}, before and after", outcome.rows))
    if all(row.name != "probe" or row.after is None for row in outcome.rows):
        say("Zero-shot ability is not measured here: there is no probe (--probe FOLDER, when HOME is made).")
    if outcome.refused:
        say(f"Not taken: {outcome.refused} The state before stays current; this one lies in {outcome.folder}.")
    else:
        say(
            f"{outcome.task} is learned. Ask with: perdure predict {home} PICTURE; take it back with: perdure undo {home}"
        )


def predict(
    home: Annotated[Path, typer.Argument(metavar="HOME", help="Folder of the model in use, or of its export.")],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES...", help="Pictures, folders of them, or - for names on stdin.")
    ],
    classes: Annotated[
        str,
        typer.Option(help="Names to tell apart, with commas between ('cat,\"salt, pepper\"'); default: all learned."),
    ] = "",
    topk: Annotated[int, typer.Option(min=1, help="How many of the likeliest names.")] = 1,
    format: Annotated[Format, typer.Option(help="How answers are written.")] = Format.table,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say which concepts decided, where the method has any (clg_cbm).")
    ] = False,
    method: Annotated[str, typer.Option(help="Of an export of a method that was read from a file: that file.")] = "",
) -> None:
    """Say what pictures show. Exit code 1 if one could not be read; the others are answered."""
    from perdure.launch.learner import Learner
    from perdure.launch.learner.answers import names_in
    from perdure.launch.learner.package import is_export

    if "-" in images and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # names of files may be any bytes
    names = [n for one in images for n in (sys.stdin.read().splitlines() if one == "-" else [one]) if n]
    wanted = names_in(classes) if classes else None
    learner = Learner.from_pretrained(home, method) if is_export(home) else Learner(home, method=method)
    rows = learner.predict(names, classes=wanted, topk=topk, explain=explain)
    write_rows(rows, format, topk)
    bad = [row for row in rows if "error" in row]
    for row in bad:
        print(f"Error: {row['error']}", file=sys.stderr)
    if bad:
        raise typer.Exit(1)


def evaluate(home: Home) -> None:
    """Measure every task whose test pictures are kept, and the probe, anew."""
    from perdure.launch.learner import Learner

    rows = Learner(home).evaluate()
    console().print(rows_table(f"{home}: accuracy in per cent", rows))
    if gone := [row.name for row in rows if row.after is None]:
        say(f"Not measured, as no test pictures are there: {', '.join(gone)}.")


def history(
    home: Home, as_json: Annotated[bool, typer.Option("--json", help="As JSON, with everything noted.")] = False
) -> None:
    """What was learned, in order, and what was refused or taken back."""
    from perdure.launch.learner import Learner

    learner = Learner(home)
    entries = learner.history()
    if as_json:
        print(json.dumps(entries, ensure_ascii=False, indent=1))
        return
    config = learner.config
    say(
        f"{home}: {config['method']} on {config['settings']['model'].replace('stream', 'the embedded CLIP')}, {learner.kept()}"
    )
    console().print(course_table(entries))


def forget(
    home: Home, task: Annotated[str, typer.Argument(help="The task to unlearn; see 'perdure history HOME'.")]
) -> None:
    """Unlearn one task, as if it had never been learned, where the method can."""
    from perdure.launch.learner import Learner

    with tidily(home):
        rows = Learner(home).forget(task)
    console().print(rows_table(f"{home} without {task}", rows))
    say(f"{task} is forgotten. Earlier states, which know it, stay in {home}; take this back with: perdure undo {home}")


def undo(
    home: Home,
    to: Annotated[
        int | None, typer.Option(min=0, help="Go back to this task (0: before any); default: take back the last.")
    ] = None,
) -> None:
    """Take back what was learned last. Nothing is deleted."""
    from perdure.launch.learner import Learner

    learner = Learner(home)
    for name in learner.undo(to):
        say(f"Taken back: {name} (kept as undone_{name}).")
    left = [one["task"] for one in learner.history() if one["state"] == "current" and "forgot" not in one]
    say(f"Current is a state that knows: {', '.join(left)}." if left else "Current is the model as it was found.")
