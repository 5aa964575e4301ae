"""The command line: ``perdure run``, ``resume``, ``generate``, ``methods``, ``streams``, ``report``, ``export``, ``demo``."""

from __future__ import annotations

import contextlib
import errno
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perdure import __version__
from perdure.core.errors import PerdureError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Vision-language models that learn task after task and keep what they knew.",
)  # fmt: skip

Out = Annotated[Path | None, typer.Option(help="Folder of the run.")]


def console() -> Console:
    from rich.console import Console

    screen = Console()
    return screen if screen.is_terminal else Console(width=140)


@app.command()
def run(
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options; see 'perdure methods NAME'.")
    ] = None,
    method: Annotated[str, typer.Option(help="What learns; see 'perdure methods'.")] = "",
    stream: Annotated[str, typer.Option(help="What is learned; see 'perdure streams'.")] = "",
    preset: Annotated[str | None, typer.Option(help="A published setting by name, or a YAML file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The (first) seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, each a run in OUT/seed_N.")] = 1,
    out: Out = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that OUT holds.")] = False,
) -> None:
    """Learn the tasks of a stream one after another, and measure what was won and lost."""
    from perdure import launch

    settings = launch.read_preset(preset) if preset else {}
    method, stream = method or str(settings.get("method", "")), stream or str(settings.get("stream", ""))
    missing = [f"--{k}" for k, v in (("method", method), ("stream", stream)) if not v]
    if missing:
        raise PerdureError(f"{' and '.join(missing)} missing. See: perdure methods, perdure streams.")
    folder = out or Path("runs") / f"{method}-{stream}-{seed if seeds == 1 else f'{seeds}-seeds'}"
    launch.begin(
        method,
        stream,
        folder,
        seed=seed,
        seeds=seeds,
        overwrite=overwrite,
        preset=preset,
        assignments=assignments or [],
    )
    resume(folder)


@app.command()
def resume(run: Annotated[Path, typer.Argument(help="Folder of the run.")]) -> None:
    """Go on with a run that was stopped, after its last good task."""
    from perdure import launch
    from perdure.core.state import write_json

    several = launch.seed_folders(run)
    for one in several or [run]:
        watched(one)
    if several:
        write_json(run / "metrics.json", launch.over_seeds([read_metrics(one) for one in several]))
    finish([run])


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="Show one method's options.")] = None) -> None:
    """List the methods, or the options of one."""
    from rich.table import Table

    from perdure import launch
    from perdure.core.config import options
    from perdure.engine.settings import Settings

    screen = console()
    table = Table(box=None, pad_edge=False)
    if name is None:
        for column in ("method", "", "paper"):
            table.add_column(column)
        for entry in launch.methods():
            role = f" ({entry.about['role']} role, for combinations)" if "role" in entry.about else ""
            table.add_row(f"[bold]{entry.name}[/]", entry.summary + role, entry.paper)
        screen.print(table)
        return
    entry = launch.method_entry(name)
    screen.print(f"[bold]{name}[/]: {entry.summary} {entry.paper}\n")
    for column in ("key", "type", "default", "meaning"):
        table.add_column(column)
    for _, option in launch.method_options(entry).values():
        table.add_row(f"[bold]{option.key}[/]", option.kind, str(option.default), option.meaning)
    table.add_section()
    for option in options(Settings).values():
        table.add_row(f"[bold]{option.key}[/]", option.kind, str(option.default), option.meaning)
    screen.print(table)


@app.command()
def streams() -> None:
    """List the streams."""
    from rich.table import Table

    from perdure.benchmarks import STREAMS

    table = Table(box=None, pad_edge=False)
    for column in ("stream", "tasks", "classes", "train", "test", "asked among", ""):
        table.add_column(column)
    for entry in STREAMS:
        if "home" in entry.about:  # not embedded: its data may be large, or not here
            table.add_row(f"[bold]{entry.name}[/]", *[""] * 5, f"{entry.summary} [dim]Data: {entry.about['home']}[/]")
            continue
        data = entry.value()
        classes = sum(len(t.classes) for t in data.tasks)
        sizes = [sum(len(getattr(t, side)) for t in data.tasks) for side in ("train", "test")]
        counts = map(str, (len(data.tasks), classes, *sizes))
        table.add_row(f"[bold]{entry.name}[/]", *counts, f"{data.labels}, task {data.task_id}", entry.summary)
    screen = console()
    screen.print(table)
    screen.print("\n[dim]Data that are not embedded lie under $PERDURE_DATA (default: data).[/]")


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(help="Folder for the pairs; a run takes them with pairs=FOLDER.")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="synthetic, generator, vocabulary, sampling_steps, guidance, …"),
    ] = None,
    stream: Annotated[str, typer.Option(help="The stream whose tasks they are for; see 'perdure streams'.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="The (first) seed of the runs they are for.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="For how many seeds.")] = 1,
) -> None:
    """Draw synthetic image-text pairs ahead of the runs that replay them; stopped, it goes on where it was."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from perdure import launch

    if not stream:
        raise PerdureError("--stream missing. See: perdure streams.")
    if "=" in out.name:
        raise PerdureError(
            f"'{out}' should be the folder for the pairs: perdure generate FOLDER --stream NAME KEY=VALUE"
        )
    screen, start, new = console(), time.monotonic(), [0]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=screen) as bar:
        shown = bar.add_task("loading", total=None, rate="")

        def drawn(task: str, done: int, total: int, count: int) -> None:
            new[0] += count
            rate = f"{new[0] / (time.monotonic() - start):.1f} images/s"
            bar.update(shown, description=task, total=total, completed=done, rate=rate)

        try:
            launch.generate(
                stream,
                out,
                seeds=range(seed, seed + seeds),
                assignments=assignments or [],
                drawn=drawn,
                warn=screen.print,
            )
        except KeyboardInterrupt:
            screen.print(f"\nStopped. The {new[0]} images drawn are kept; the same command goes on.", highlight=False)
            raise typer.Exit(130) from None
    said = f"{new[0]} images drawn in {time.monotonic() - start:.0f} s. They lie in {out}; a run takes them with pairs={out}"
    screen.print(said, markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or metrics.json files.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; the PNG lies beside it.")] = None,
) -> None:
    """Draw one HTML page and one PNG of one run or several."""
    finish(runs, out or (runs[0] if len(runs) == 1 and runs[0].is_dir() else Path()) / "report.html")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint.")],
    task: Annotated[
        int | None,
        typer.Option(
            min=0, help="After which task (0: before any; default: the last); or whose expert, where each has one."
        ),
    ] = None,
) -> None:
    """Write the model of a run as a plain transformers checkpoint."""
    from perdure import launch

    said = f"{launch.export(run, out, task)} lies in {out}. Load it with CLIPModel.from_pretrained."
    console().print(said, markup=False, highlight=False, soft_wrap=True)


@app.command()
def demo(out: Out = None) -> None:
    """Watch a small CLIP learn eight tasks in a row: what it forgot, and what it would have known."""
    from perdure import launch

    folder = out or launch.demo_folder(Path("runs"))
    runs = [folder / method for method in launch.DEMO]
    for one in runs:
        if not (one / "config.json").exists():
            launch.begin(one.name, "mini-mtil", one)
        elif launch.same_run(launch.read_config(one), launch.prepare(one.name, "mini-mtil", 0, [], {})):
            raise PerdureError(f"{one} holds a run that is not the demo's. Choose another folder with --out.")
    for one in runs:
        watched(one)
    finish(runs, folder / "report.html")


def watched(folder: Path) -> None:
    """Do the run in ``folder``, or go on with it, under a live view; Ctrl-C stops tidily."""
    from perdure import launch
    from perdure.view import Screen

    config = launch.read_config(folder)
    screen = Screen(console(), f"{config['method']} on {config['stream']}, seed {config['seed']}")
    try:
        with screen:
            launch.resume(folder, screen)
    except KeyboardInterrupt:
        said = f"\nStopped. Every task that was finished is kept. Go on with: {again(folder)}"
        screen.console.print(said, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def again(folder: Path) -> str:
    """The command that goes on with a run: with all of them, where it is one of several."""
    if folder.name.startswith("seed_"):
        return f"perdure resume {folder.parent}"
    from perdure.launch import DEMO

    siblings = all((folder.parent / name / "config.json").exists() for name in DEMO)
    return f"perdure demo --out {folder.parent}" if siblings else f"perdure resume {folder}"


def read_metrics(run: Path) -> dict[str, Any]:
    """The metrics of a run folder, or of a metrics.json file."""
    from perdure.core.state import read_json

    path = run / "metrics.json" if run.is_dir() else run
    if not path.exists():
        raise PerdureError(f"{run} holds no results yet (there is no {path}).")
    found = read_json(path)
    needed = {"method", "stream", "seed", "tasks", "accuracy", "seconds", "peak_memory_mb"}
    if not isinstance(found, dict) or not needed <= set(found) or not found["accuracy"]:
        raise PerdureError(f"{path} is not a metrics file of perdure.")
    return found


def finish(runs: list[Path], page: Path | None = None) -> None:
    """Print the table of the runs; write the page and the picture."""
    from perdure.report import figure, html
    from perdure.view import summary

    found = [read_metrics(run) for run in runs]
    screen = console()
    screen.print(summary(found))
    page = page or runs[0] / "report.html"
    if page.suffix != ".html" or page.is_dir():
        raise PerdureError(f"The report is an HTML file: {page} should be a name that ends in .html.")
    page.parent.mkdir(parents=True, exist_ok=True)
    try:
        html.write(found, page)
        picture = figure.draw(found, page.with_suffix(".png"))
    except ValueError as error:  # what the files say does not fit together
        raise PerdureError(f"No report can be drawn: {error}") from None
    screen.print(f"Report:  {page}\nPicture: {picture}", markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """What a user can put right ends with one message and exit code 2, not with a traceback."""
    try:
        yield
    except PerdureError as error:
        message = str(error)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        where = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror or error}{where}."
        if full:
            message += (
                " What was finished is kept. Make room, then go on: perdure resume RUN, or the same perdure generate."
            )
    else:
        return
    print(f"Error: {message}", file=sys.stderr)
    raise SystemExit(2)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if show:
        typer.echo(f"perdure {__version__}")
        raise typer.Exit


def main() -> None:
    """The entry point of the command ``perdure``."""
    with plainly():
        app()


if __name__ == "__main__":
    main()
