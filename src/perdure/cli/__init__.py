"""The command line, ``perdure``: its commands, and how it ends when something is wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from perdure import __version__
from perdure.cli import analysing, comparing, data, learner, lists, results, runs, serving, sweeping
from perdure.core import processes
from perdure.core.errors import PerdureError
from perdure.terminal import plain_characters, plain_warnings

# What typer raises for wrong words, whether it stands on click or brings it: BadParameter, UsageError, ClickException.
Usage: Any = typer.BadParameter.__mro__[1]
Clicked: Any = typer.BadParameter.__mro__[2]
app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Vision-language models that learn task after task and keep what they knew.",
)  # fmt: skip
for command in (
    learner.learn, learner.predict, learner.evaluate, learner.history, learner.undo, learner.forget, results.export,
    results.push, serving.serve, runs.run, runs.resume, sweeping.sweep, runs.demo, results.report, comparing.compare,
    analysing.analyse, results.generate, lists.methods, lists.streams,
):  # fmt: skip
    app.command()(command)
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context, show: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    if show:
        typer.echo(f"perdure {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """What a user can put right ends with one message and exit code 2, not with a traceback."""
    try:
        yield
    except PerdureError as error:
        message = str(error)
    except Clicked as error:
        message = error.format_message()
        if isinstance(error, Usage) and error.ctx is not None:
            message = f"{message.rstrip('.')}. See: {error.ctx.command_path} --help."
    except BrokenPipeError:  # whoever read what is printed has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        where = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror or error}{where}."
        if full:
            message += (
                " What was finished is kept. Make room, then give the same command again (a run: perdure resume RUN)."
            )
    else:
        return
    if processes.speaks():
        print(f"Error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    """The entry point of the command ``perdure``."""
    plain_characters()
    plain_warnings()
    with plainly():
        try:
            code = app(standalone_mode=False)
            if not code:
                processes.leave()
            sys.stdout.flush()  # here, where it is known what to say if nobody reads it
        except (typer.Abort, KeyboardInterrupt):
            code = 130
    if (
        processes.count() > 1
    ):  # Python would tear down gloo's threads, which may abort: to the launcher a failure of the run
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code or 0)
    raise SystemExit(code or 0)
