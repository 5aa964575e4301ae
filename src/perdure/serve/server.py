"""The server: a socket, the thread that answers, and a tidy end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import python_multipart  # noqa: F401  starlette asks for it only when the first form arrives
import uvicorn

from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.serve.app import application
from perdure.serve.course import opened
from perdure.serve.limits import Limits
from perdure.serve.worker import Worker

GRACE = 10  # seconds that answers under way are waited for at the end


def serve(folder: str | Path, host: str, port: int, limits: Limits, say: Callable[[str], None]) -> None:
    """Serve the model in use, or the export, in ``folder`` until a SIGINT or SIGTERM. ``say`` hears the address when it is
    open. ``PerdureError`` for a folder that holds no model and a port that cannot be had."""
    folder = expanded(folder)
    worker = Worker(opened(folder), limits)
    with listening(host, port) as place:
        worker.start()
        server = uvicorn.Server(configured(worker, limits, host))
        say(f"{folder} answers at {address(host, place)} (state {worker.state}). Ctrl-C ends it.")
        try:
            with ended_by_signals(server):
                server.run([place])
        finally:
            worker.stop()
        say("Ended.")


def configured(worker: Worker, limits: Limits, host: str) -> uvicorn.Config:
    """HTTP as plain as it comes, no one else's headers believed."""
    return uvicorn.Config(
        application(worker, limits, host), http="h11", ws="none", loop="asyncio", lifespan="off", log_level="warning",
        access_log=False, proxy_headers=False, server_header=False, timeout_graceful_shutdown=GRACE,
    )  # fmt: skip


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket of one's own, before a model is loaded for nothing."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        place = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise PerdureError(
            f"Port {port} of {host} cannot be had: {error.strerror or error}. Choose another, as --port {port + 1}, or 0 "
            "for any that is free."
        ) from None
    with place:
        yield place


@contextmanager
def ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Uvicorn ends when it hears of a signal, then raises it anew: here it has done its work by then."""

    def heard(number: int, frame: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def address(host: str, place: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{place.getsockname()[1]}/"
