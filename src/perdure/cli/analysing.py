"""The command ``analyse``: margins, modality gap, drift and agreement, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from perdure.terminal import console


def analyse(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    images: Annotated[int, typer.Option(min=2, help="At most so many test images a task.")] = 256,
) -> None:
    """Say what became of a run's model, task by task: margins, modality gap, how far weights and features moved, which
    experts agree. The report of the run shows it from then on."""
    from perdure.launch.analysing import analyse
    from perdure.launch.folders import ANALYSIS

    found = analyse(run, images, lambda name: say(f"Looking at {name} …"))
    say(f"{found['method']} on {found['stream']}: class margins in cosine, τ = {found['tau']:.3g}")
    console().print(courses(found))
    if len(found["experts"]["names"]) > 1:
        say("Share of test images for which two experts give the same answer:")
        console().print(agreement(found["experts"]))
    for task, fell in found.get("fell", {}).items():
        say(
            f"{task}: since it was learned its median margin has fallen by {fell['median']:.3f}, its right answers by "
            f"{100 * fell['right']:.1f} points."
        )
    if found.get("correlation") is not None:
        say(f"Over the tasks the two falls correlate with {found['correlation']:.2f}.")
    say(f"Everything lies in {run / ANALYSIS}; perdure report {run} draws it.")


def say(text: str) -> None:
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def courses(found: dict[str, Any]) -> Any:
    """The stages as a table: means over the tasks, the probe, synthetic pairs, the gap, and the largest moves."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    table.add_column("", overflow="fold")
    paired = all(stage["synthetic_pairs"] for stage in found["stages"])
    more = ("pairs'",) if paired else ()
    for column in ("margin", "above τ", "probe's", *more, "image to text²", "gap", "weights moved", "least CKA"):
        table.add_column(column, justify="right")
    for stage in found["stages"]:
        by_task = [values for name, values in stage["margins"].items() if name != "probe"]
        probe, lost = stage["margins"].get("probe"), min(stage["cka"].items(), key=lambda one: one[1])
        table.add_row(
            escape(stage["task"]), mean(by_task, "median"), mean(by_task, "above_tau", "{:.0%}"),
            "–" if probe is None else f"{probe['median']:.3f}",
            *([f"{stage['synthetic_pairs']['median']:.3f}"] if paired else []),
            mean(by_task, "distance"), f"{stage['gap']['distance']:.3f}",
            f"{max(stage['weights'].values()):.2%}", f"{lost[1]:.3f} ({lost[0]})",
        )  # fmt: skip
    return table


def mean(rows: list[dict[str, Any]], key: str, form: str = "{:.3f}") -> str:
    return form.format(sum(row[key] for row in rows) / len(rows))


def agreement(experts: dict[str, Any]) -> Any:
    """Which experts give the same answers."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    table.add_column("", overflow="fold")
    for number in range(1, len(experts["names"]) + 1):
        table.add_column(str(number), justify="right")
    for number, (name, row) in enumerate(zip(experts["names"], experts["same"], strict=True), 1):
        table.add_row(f"{number} {escape(name)}", *(f"{share:.0%}" for share in row))
    return table
