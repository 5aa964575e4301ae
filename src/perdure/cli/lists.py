"""Commands that list: ``methods``, ``streams``."""

from __future__ import annotations

from typing import Annotated

import typer

from perdure.terminal import console


def methods(name: Annotated[str | None, typer.Argument(help="Show one method's options.")] = None) -> None:
    """List the methods, or the options of one."""
    from rich.markup import escape
    from rich.table import Table

    from perdure import launch
    from perdure.core.config import options
    from perdure.engine.settings import Settings

    screen = console()
    table = Table(box=None, pad_edge=False)
    if name is None:
        for column in ("method", "", "paper"):
            table.add_column(column, overflow="fold")
        for entry in launch.methods():
            role = f" ({entry.about['role']} role, for combinations)" if "role" in entry.about else ""
            table.add_row(f"[bold]{escape(entry.name)}[/]", escape(entry.summary + role), escape(entry.paper))
        screen.print(table)
        return
    entry = launch.method_entry(name)
    screen.print(f"[bold]{escape(entry.name)}[/]: {escape(f'{entry.summary} {entry.paper}')}\n")
    for column in ("key", "type", "default", "meaning"):
        table.add_column(column, overflow="fold")
    parts = ([option for _, option in launch.method_options(entry).values()], options(Settings).values())
    for part in parts:
        for option in part:
            cells = (option.kind, option.shown, option.meaning)
            table.add_row(f"[bold]{escape(option.key)}[/]", *map(escape, cells))
        table.add_section()
    screen.print(table)


def streams() -> None:
    """List the streams."""
    from rich.markup import escape
    from rich.table import Table

    from perdure.benchmarks import STREAMS
    from perdure.launch.sources import plug_in

    plug_in("perdure.streams")
    table = Table(box=None, pad_edge=False)
    for column in ("stream", "tasks", "classes", "train", "test", "asked among", ""):
        table.add_column(column, overflow="fold")
    for entry in STREAMS:
        if "home" in entry.about:  # not embedded: its data may be large, or not here
            said = f"{escape(entry.summary)} [dim]Data: {escape(entry.about['home'])}[/]"
            table.add_row(f"[bold]{escape(entry.name)}[/]", *[""] * 5, said)
            continue
        data = entry.value()
        classes = sum(len(t.classes) for t in data.tasks)
        sizes = [sum(len(getattr(t, side)) for t in data.tasks) for side in ("train", "test")]
        counts = map(str, (len(data.tasks), classes, *sizes))
        asked = f"{data.labels}, task {data.task_id}"
        table.add_row(f"[bold]{escape(entry.name)}[/]", *counts, asked, escape(entry.summary))
    screen = console()
    screen.print(table)
    screen.print("\n[dim]Data that are not embedded lie under $PERDURE_DATA (default: data).[/]")
