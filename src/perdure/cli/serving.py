"""The command that shows a model in use to a browser and to other programs: ``serve``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from perdure.cli.learner import Home, say
from perdure.core.errors import PerdureError

PACKAGES = ("python_multipart", "starlette", "uvicorn")


def serve(
    home: Home,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0: any port that is free.")] = 8000,
    host: Annotated[
        str, typer.Option(help="The address to listen on. Any other than the loopback lets others in, unasked.")
    ] = "127.0.0.1",
    max_upload: Annotated[float, typer.Option(min=0.001, max=2000, help="Megabytes of one request at most.")] = 20,
    max_pictures: Annotated[int, typer.Option(min=1, max=10_000, help="Pictures of one request at most.")] = 64,
    max_queue: Annotated[
        int, typer.Option(min=1, max=100_000, help="Requests that may wait; others are told to come again.")
    ] = 128,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Pictures that the model is shown at once.")] = 64,
    method: Annotated[str, typer.Option(help="Of an export of a method that was read from a file: that file.")] = "",
) -> None:
    """Open a page to drop pictures on, and a JSON endpoint beside it, for a model in use or an export."""
    try:
        from perdure.serve.server import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PACKAGES:
            raise
        raise PerdureError(f"perdure serve needs the package {error.name}: pip install 'perdure[serve]'") from None
    from perdure.serve.guard import LOOPBACK
    from perdure.serve.limits import MB, Limits

    if host not in LOOPBACK:
        print(
            f"Warning: whoever reaches {host} can ask this model; nobody has to log in, and nothing is encrypted.",
            file=sys.stderr,
        )
    limits = Limits(upload=int(max_upload * MB), pictures=max_pictures, queue=max_queue, batch=batch)

    def aloud(text: str) -> None:
        say(text)
        sys.stdout.flush()  # who reads a pipe waits for the address

    run(home, host, port, limits, aloud, method)
