"""Commands about data sets: ``data check``, ``data fetch``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.terminal import console

if TYPE_CHECKING:
    from perdure.data.task import Task

app = typer.Typer(help="Which data sets are there, and how to get the others.", rich_markup_mode="rich")
ImageKey = Annotated[str, typer.Option(help="Of a table or data set: the column of the pictures (default: file_name).")]
LabelKey = Annotated[str, typer.Option(help="Of a table or data set: the column of the classes (default: label).")]
SplitKey = Annotated[str, typer.Option(help="Of a table: the column that says train, test or val.")]
TaskKey = Annotated[str, typer.Option(help="Of a table: the column of the tasks.")]
TextKey = Annotated[str, typer.Option(help="Of a table or data set: the column of captions (of a table: text).")]
Root = Annotated[Path | None, typer.Option(help="Where data sets lie (default: $PERDURE_DATA, else data).")]


def base_of(root: Path | None) -> Path:
    from perdure.benchmarks import class_incremental

    return expanded(root).resolve() if root is not None else class_incremental.root()


@app.command()
def check(
    folder: Annotated[
        str | None,
        typer.Argument(metavar="[PICTURES]", help="Pictures of your own, as --stream takes them, to be read whole."),
    ] = None,
    root: Root = None,
    read: Annotated[bool, typer.Option("--read", help="Decode every picture, not the lists alone.")] = False,
    keep_splits: Annotated[
        bool,
        typer.Option("--keep-splits", help="Write down, in ROOT/splits, the splits that are drawn: then they stay."),
    ] = False,
    image_key: ImageKey = "",
    label_key: LabelKey = "",
    split_key: SplitKey = "",
    task_key: TaskKey = "",
    text_key: TextKey = "",
    model: Annotated[
        str,
        typer.Option(
            help="Of your own pictures: the CLIP that is to learn them; whether it can be asked for the classes."
        ),
    ] = "",
) -> None:
    """Say which of MTIL's data sets are found, where they were looked for, their sizes, and how to get the others; or read
    every picture of your own, and what else would stop a run of them. Exit code 1 if something is missing or damaged."""
    keys = dict(image_key=image_key, label_key=label_key, split_key=split_key, task_key=task_key, text_key=text_key)
    if folder is not None:
        refuse("is of the data sets of MTIL, not of your own pictures", keep_splits=keep_splits, root=root)
        wrong = check_own(folder, keys, model)
    else:
        refuse("is of pictures of your own: name their folder or table", **keys, model=model)
        wrong = check_sets(base_of(root), read, keep_splits)
    raise typer.Exit(1 if wrong else 0)


def refuse(why: str, **given: object) -> None:
    """Refuse options that would change nothing."""
    if odd := [name for name, value in given.items() if value]:
        raise PerdureError(f"--{odd[0].replace('_', '-')} {why}. Leave it out.")


def say(text: str) -> None:
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def look(task: Task, decode: bool, more: str = "") -> int:
    """Say what a task holds; how many of its pictures cannot be read."""
    from perdure.data.files import unreadable

    bad = [why for side in (task.train, task.test) for why in unreadable(side.pixels).values()] if decode else []
    sizes = f"{len(task.classes)} classes, {len(task.train)} training and {len(task.test)} test images"
    say(f"{task.name}: found, {sizes}{more}")
    for line in bad:
        say(f"  {line}")
    return len(bad)


def check_own(folder: str, keys: Mapping[str, str], model: str) -> int:
    """Read every picture of one's own; how many cannot be. ``PerdureError`` for whatever else would stop a run."""
    from perdure.benchmarks.own.pictures import Pictures

    pictures = Pictures(folder, **keys).settled()
    if not pictures.kind:
        raise PerdureError(f"There are no pictures at {folder}. Give a folder, a CSV file or a YAML file.")
    stream = pictures.load()
    wrong = sum(look(task, decode=True) for task in stream.tasks)
    total = sum(len(side) for task in stream.tasks for side in (task.train, task.test))
    say(f"{wrong} pictures cannot be read, of {total}." if wrong else "Every picture can be read.")
    if not wrong and model:
        from perdure.models.clip import CLIP  # which takes seconds to import

        stream.check(CLIP.load(model))
        say(f"{model} can be asked for every class.")
    elif not wrong:
        stream.check_images()
    return wrong


def check_sets(base: Path, read: bool, keep_splits: bool) -> int:
    """Look for MTIL's data sets below ``base``; how many are missing, and pictures damaged."""
    from perdure.benchmarks import mtil

    wrong = 0
    for name, one in mtil.SETS.items():
        try:
            task = mtil.load(name, base)
        except PerdureError as error:
            say(f"{name}: {'missing' if not (base / one.home).exists() else 'not as it should be'}. {error}")
            wrong += 1
            continue
        kept = f", kept in {mtil.keep(name, base)}" if keep_splits and name in mtil.DRAWN else ""
        wrong += look(task, read, f"; split {mtil.mark(name, base)[:12]}{kept}; in {base / one.home}")
    return wrong


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="Data sets, as 'perdure data check' names them.")],
    root: Root = None,
) -> None:
    """Download data sets with torchvision. Nothing else in perdure downloads data."""
    from perdure.benchmarks import mtil
    from perdure.core.errors import unknown

    for name in names:
        if name not in mtil.SETS:
            raise unknown("data set", name, mtil.SETS)
    base = base_of(root)
    base.mkdir(parents=True, exist_ok=True)
    for name in names:
        task = mtil.load(name, base, fetch=True)
        mtil.keep(name, base)
        console().print(f"{name}: {len(task.train)} training and {len(task.test)} test images in {base}", markup=False)
