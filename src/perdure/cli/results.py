"""Commands about what runs leave or take: ``report``, ``export``, ``push``, ``generate``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.terminal import console


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or metrics.json files.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; the PNG lies beside it.")] = None,
) -> None:
    """Draw one HTML page and one PNG of one run or several."""
    finish([expanded(run) for run in runs], expanded(out) if out else None)


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of a model in use.")],
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint.")],
    task: Annotated[
        int | None,
        typer.Option(
            min=0, help="After which task (0: before any; default: the last); or whose expert, where each has one."
        ),
    ] = None,
) -> None:
    """Write the model of a run, or a model in use, as a plain transformers checkpoint."""
    from perdure import launch

    if (run / "config.json").exists() and "home" in launch.read_config(run):
        from perdure.launch.learner import Learner

        if task is not None:
            raise PerdureError(
                "--task belongs to runs: of a model in use the current state is exported; go back with undo."
            )
        left = Learner(run).export(out)
        rest = f" {' and '.join(left).capitalize()}: only Learner.from_pretrained has that." if left else ""
        said = f"The model in use lies in {out}, with its card. AutoModel.from_pretrained loads its checkpoint.{rest}"
        console().print(said, markup=False, highlight=False, soft_wrap=True)
        return
    said = f"{launch.export(run, out, task)} lies in {out}. Load it with transformers' AutoModel.from_pretrained."
    console().print(said, markup=False, highlight=False, soft_wrap=True)


def push(
    home: Annotated[Path, typer.Argument(metavar="HOME", help="Folder of the model in use.")],
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository of the Hugging Face Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository, if it is new, a private one.")
    ] = False,
) -> None:
    """Put a model in use on the Hugging Face Hub, as export writes it, with its card. Needs HF_TOKEN or a login."""
    from perdure.launch.learner import Learner
    from perdure.launch.learner.hub import push_home

    url = push_home(Learner(home), name, private)
    console().print(f"The model in use lies at {url}", markup=False, highlight=False, soft_wrap=True)


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
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from perdure import launch

    if not stream:
        raise PerdureError("--stream missing. See: perdure streams.")
    if "=" in out.name:
        raise PerdureError(
            f"'{out}' should be the folder for the pairs: perdure generate FOLDER --stream NAME KEY=VALUE"
        )
    screen, start, new = console(), time.monotonic(), [0]

    def say(text: str) -> None:
        screen.print(text, markup=False, highlight=False, soft_wrap=True)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=screen) as bar:
        shown = bar.add_task("loading", total=None, rate="")

        def drawn(task: str, done: int, total: int, count: int) -> None:
            new[0] += count
            rate = f"{new[0] / (time.monotonic() - start):.1f} images/s"
            bar.update(shown, description=escape(task), total=total, completed=done, rate=rate)

        try:
            words, numbers = assignments or [], range(seed, seed + seeds)
            launch.generate(stream, out, seeds=numbers, assignments=words, drawn=drawn, warn=say)
        except KeyboardInterrupt:
            say(f"\nStopped. The {new[0]} images drawn are kept; the same command goes on.")
            raise typer.Exit(130) from None
    took = time.monotonic() - start
    say(f"{new[0]} images drawn in {took:.0f} s. They lie in {out}; a run takes them with pairs={out}")


def read_metrics(run: Path) -> dict[str, Any]:
    """The metrics of a run folder, or of a metrics.json file."""
    from perdure.core.state import read_json
    from perdure.launch.folders import ANALYSIS, refuse_home

    path = run / "metrics.json" if run.is_dir() else run
    if not run.exists():
        raise PerdureError(f"There is no {run}, so it holds no results. Give folders of runs, or metrics.json files.")
    if not path.exists():
        refuse_home(run)
        raise PerdureError(f"{run} holds no results yet (there is no {path}).")
    found = read_json(path)
    needed = {"method", "stream", "seed", "tasks", "accuracy", "seconds", "peak_memory_mb"}
    if not isinstance(found, dict) or not needed <= set(found) or not found["accuracy"]:
        raise PerdureError(f"{path} is not a metrics file of perdure.")
    beside = path.with_name(ANALYSIS)
    return {**found, "analysis": read_json(beside)} if beside.exists() else found


def page_of(runs: list[Path]) -> Path:
    """Where the report of these runs goes: into the one run's folder, or into the one that several lie in."""
    if len(runs) == 1:
        return (runs[0] if runs[0].is_dir() else runs[0].parent) / "report.html"
    parents = {run.resolve().parent for run in runs}
    names = "-".join(run.resolve().name if run.is_dir() else run.resolve().parent.name for run in runs)
    return runs[0].parent / f"report-{names[:80]}.html" if len(parents) == 1 else Path(f"report-{names[:80]}.html")


def check_page(page: Path) -> None:
    """Refuse a report's name that is none, or that belongs to something which perdure did not write."""
    from perdure.report import html

    if page.suffix != ".html" or page.is_dir():
        raise PerdureError(f"The report is an HTML file: {page} should be a name that ends in .html.")
    picture = page.with_suffix(".png")
    own = page.exists() and html.is_own(page)  # the pictures of 0.1.0 bear no mark; their pages do
    if (page.exists() and not own) or (picture.exists() and not own and not html.is_own(picture)):
        taken = picture if not page.exists() or own else page
        raise PerdureError(f"{taken} exists, and perdure did not write it. Choose another name with --out.")


def verdict_of(found: list[dict[str, Any]]) -> str:
    """The runs in a sentence; empty where they cannot be compared."""
    from perdure.report.entries import collect
    from perdure.report.verdict import verdict

    try:
        return verdict(collect(found))
    except ValueError:  # the report will say what does not fit together
        return ""


def finish(runs: list[Path], page: Path | None = None, labels: Sequence[str] = ()) -> None:
    """Print the table of the runs; write the page and the picture, over nothing that perdure did not write. ``labels``: what
    each run is called, where its method does not say it."""
    from perdure.report import figure, html
    from perdure.view import summary

    found = [read_metrics(run) for run in runs]
    found = [{**one, "label": label} for one, label in zip(found, labels, strict=True)] if labels else found
    page = page or page_of(runs)
    check_page(page)
    screen = console()
    screen.print(summary(found, screen))
    screen.print(verdict_of(found), markup=False, highlight=False)
    page.parent.mkdir(parents=True, exist_ok=True)
    try:
        html.write(found, page)
        picture = figure.draw(found, page.with_suffix(".png"))
    except ValueError as error:  # what the files say does not fit together
        raise PerdureError(f"No report can be drawn: {error}") from None
    screen.print(f"Report:  {page}\nPicture: {picture}", markup=False, highlight=False, soft_wrap=True)
