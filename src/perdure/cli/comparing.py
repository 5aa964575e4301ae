"""The command ``compare``: runs beside published tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from perdure.cli.results import read_metrics
from perdure.core.paths import expanded
from perdure.terminal import console

HEADS = {"incremental_average": "average over steps", "incremental_last": "last step"}


def compare(runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or metrics.json files.")]) -> None:
    """Set runs beside the published tables of the same stream and protocol, and say how far they are apart."""
    from perdure.report.published import OF, tables

    for run, found in [(run, read_metrics(expanded(run))) for run in runs]:
        fitting = [table for table in tables() if table.fits(found)]
        if not fitting:
            kept = ", ".join(dict.fromkeys(one.stream for one in tables()))
            say(
                f"{run}: no published table is kept for {found['stream']} as it was run here. There are tables for {kept}, "
                "of all images or so many shots, the task known or hidden as they were printed."
            )
            continue
        model = found.get("config", {}).get("model", "")
        what = f"{run}: {found['method']} on {found['stream']}"
        say(f"{what}. The published figures are of {OF}; this run's model: {named(model)}.")
        for table in fitting:
            console().print(beside(found, table))


def named(model: str) -> str:
    return "the stream's own" if model in ("", "stream") else model


def say(text: str) -> None:
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def beside(run: dict[str, Any], table: Any) -> Any:
    """A published table, the run's figures, and how far they are above those of its method."""
    from rich.markup import escape
    from rich.table import Table

    from perdure.report.published import differences

    drawn = Table(title=escape(table.source), title_justify="left", box=None)
    drawn.add_column("", overflow="fold")
    for figure in table.figures:
        drawn.add_column(HEADS.get(figure, figure.capitalize()), justify="right")
    own = table.row_of(run)
    for name, values in table.rows.items():
        drawn.add_row(escape(name), *(number(v) for v in values), style="bold" if name == own else None)
    drawn.add_row("this run", *(number(run.get(figure)) for figure in table.figures))
    if own:
        drawn.add_row(f"less {escape(own)}, published", *(number(v, "+.1f") for v in differences(run, table)))
    return drawn


def number(value: float | None, form: str = ".1f") -> str:
    return "–" if value is None else f"{value:{form}}"
