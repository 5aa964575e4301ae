"""Commands that run: ``run``, ``resume``, ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perdure.cli.data import ImageKey, LabelKey, SplitKey, TaskKey, TextKey
from perdure.cli.results import check_page, finish, page_of, read_metrics
from perdure.core import processes, stopping
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.terminal import console

Out = Annotated[Path | None, typer.Option(help="Folder of the run.")]
ReportTo = Annotated[
    str, typer.Option(help="Trackers that hear of it too, with commas between: jsonl, csv, tensorboard, wandb.")
]


def run(
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options; see 'perdure methods NAME'.")
    ] = None,
    method: Annotated[str, typer.Option(help="What learns: a name (see 'perdure methods') or a Python file.")] = "",
    stream: Annotated[
        str,
        typer.Option(
            help="What is learned: a name (see 'perdure streams'), a folder of pictures, a CSV, YAML or Python file, hf:NAME"
        ),
    ] = "",
    image_key: ImageKey = "",
    label_key: LabelKey = "",
    split_key: SplitKey = "",
    task_key: TaskKey = "",
    text_key: TextKey = "",
    preset: Annotated[str | None, typer.Option(help="A published setting by name, or a YAML file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The (first) seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, each a run in OUT/seed_N.")] = 1,
    out: Out = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that OUT holds.")] = False,
    go_on: Annotated[
        bool, typer.Option("--resume", help="Go on with this very run if OUT holds it; if it is done, say so.")
    ] = False,
    report_to: ReportTo = "",
) -> None:
    """Learn the tasks of a stream one after another, and measure what was won and lost."""
    from perdure import launch
    from perdure.launch.sources import find_stream
    from perdure.launch.trackers import checked

    announce()
    checked(report_to)
    settings = launch.read_preset(preset) if preset else {}
    method, stream = method or str(settings.get("method", "")), stream or str(settings.get("stream", ""))
    missing = [f"--{k}" for k, v in (("method", method), ("stream", stream)) if not v]
    if missing:
        hint = (
            meant([a for a in assignments or [] if "=" not in a], method, stream)
            or "See: perdure methods, perdure streams."
        )
        raise PerdureError(f"{' and '.join(missing)} missing. {hint}")
    pictures = launch.Pictures(stream, image_key, label_key, split_key, task_key, text_key)
    asked = pictures if pictures.keys else stream
    names = f"{launch.method_entry(method).name}-{find_stream(asked)[1]}"
    folder = expanded(out or Path("runs") / f"{names}-{seed if seeds == 1 else f'{seeds}-seeds'}")
    launch.begin(
        method, asked, folder, seed=seed, seeds=seeds, overwrite=overwrite, preset=preset,
        assignments=assignments or [], go_on=go_on,
    )  # fmt: skip
    if go_on and done(folder):
        said = f"{folder} holds this very run, done. Look at it with: perdure report {folder}"
        console().print(said, markup=False, highlight=False, soft_wrap=True)
        return
    resume(folder, report_to)


def done(folder: Path) -> bool:
    """Whether nothing is left to do of a run, or of any of its seeds."""
    from perdure import launch

    several = launch.seed_folders(folder)
    written = not several or (folder / "metrics.json").exists()
    return written and all(launch.is_finished(one) for one in several or [folder])


def meant(words: list[str], method: str, stream: str) -> str:
    """What somebody meant who wrote names without their options; empty: nothing that is known."""
    from perdure import launch

    methods, streams = ({e.name for e in known} for known in (launch.methods(), launch.STREAMS))
    kinds = [(f"--{'stream' if word in streams else 'method'}", word) for word in words if word in streams | methods]
    given = [(kind, word) for kind, word in (("--method", method), ("--stream", stream)) if word]
    return f"Did you mean: perdure run {' '.join(f'{kind} {word}' for kind, word in given + kinds)}" if kinds else ""


def resume(
    run: Annotated[Path | None, typer.Argument(help="Folder of the run; none: list those in runs.")] = None,
    report_to: ReportTo = "",
) -> None:
    """Go on with a run that was stopped, after its last good task, and inside the next from its last save."""
    from perdure import launch
    from perdure.core.state import write_json

    if run is None:
        list_runs(Path("runs"))
        return
    announce()
    run = expanded(run)
    check_page(page_of([run]))  # before the work, not after it
    several = launch.seed_folders(run)
    for one in several or [run]:
        watched(one, report_to)
    if not processes.main():
        return
    if several:
        write_json(run / "metrics.json", launch.over_seeds([read_metrics(one) for one in several]))
    finish([run])


def announce() -> None:
    """Join the processes that a launcher started together, before anything can be said by several of them."""
    if note := processes.join():
        console().print(f"Warning: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def list_runs(base: Path) -> None:
    """The runs in a folder, how far each has come, and what to type."""
    from perdure import launch

    depths = ("*", "*/*")  # a demo's runs lie in a folder of their own
    found = {
        p.parent for depth in depths for name in ("config.json", "seeds.json") for p in base.glob(f"{depth}/{name}")
    }
    found = {folder for folder in found if not folder.name.startswith("seed_")}
    if not found:
        raise PerdureError(f"There are no runs in {base.resolve()}. Give the folder of a run: perdure resume RUN")
    for folder in sorted(found):
        parts = launch.seed_folders(folder) or [folder]
        done = all(launch.is_finished(part) for part in parts)
        tasks = sum(len(list(part.glob("task_*"))) - 1 for part in parts if any(part.glob("task_*")))
        state = "finished" if done else f"{tasks} tasks learned; go on with: perdure resume {folder}"
        console().print(f"{folder}: {state}", markup=False, highlight=False, soft_wrap=True)


def demo(out: Out = None) -> None:
    """Watch a small CLIP learn eight tasks in a row: what fine-tuning forgets, and what a ridge head keeps."""
    from perdure import launch

    folder = expanded(out) if out else launch.demo_folder(Path("runs"))
    runs = [folder / method for method in launch.DEMO]
    for one in runs:
        if not (one / "config.json").exists():
            launch.begin(one.name, "mini-mtil", one, assignments=launch.DEMO[one.name])
        elif launch.same_run(
            launch.read_config(one), launch.prepare(one.name, "mini-mtil", 0, launch.DEMO[one.name], {})
        ):
            raise PerdureError(f"{one} holds a run that is not the demo's. Choose another folder with --out.")
    for one in runs:
        watched(one)
    finish(runs, folder / "report.html")
    console().print(
        "\n".join(["Try next:", *(f"  {words}" for words in launch.TRY_NEXT)]), markup=False, highlight=False
    )


def watched(folder: Path, report_to: str = "") -> None:
    """Do the run in ``folder``, or go on with it, under a live view; SIGTERM and Ctrl-C stop tidily."""
    from perdure import launch
    from perdure.view import Screen

    config = launch.read_config(folder)
    screen = Screen(console(), f"{config['method']} on {config['stream']}, seed {config['seed']}")
    try:
        with stopping.listening(), screen:
            launch.resume(folder, screen, report_to=report_to)
    except stopping.Stopped as stop:
        kept = f", and the one at hand up to {stop.saved}" if stop.saved else ""
        screen.say(f"\nStopped. Every task that was finished is kept{kept}. Go on with: {again(folder)}")
        if stop.together:
            processes.leave()
        raise typer.Exit(stop.code) from None


def again(folder: Path) -> str:
    """The command that goes on with a run: with all of them, where it is one of several."""
    if folder.name.startswith("seed_"):
        return f"perdure resume {folder.parent}"
    from perdure.launch import DEMO

    siblings = all((folder.parent / name / "config.json").exists() for name in DEMO)
    return f"perdure demo --out {folder.parent}" if siblings else f"perdure resume {folder}"
