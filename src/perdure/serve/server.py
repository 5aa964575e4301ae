"""The server: a socket, the thread that answers, and a tidy end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import python_multipart  # noqa: F401  starlette asks for it only when the first form arrives
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.serve.app import application
from perdure.serve.course import opened
from perdure.serve.limits import Limits
from perdure.serve.worker import Worker

GRACE = 10  # seconds that answers under way are waited for at the end


def serve(
    folder: str | Path, host: str, port: int, limits: Limits, say: Callable[[str], None], method: str = ""
) -> None:
    """Serve the model in use, or the export, in ``folder`` until a SIGINT or SIGTERM. ``say`` hears the address when it is
    open. ``PerdureError`` for a folder that holds no model and a port that cannot be had."""
    folder = expanded(folder)
    worker = Worker(opened(folder, method), limits)
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


class Patient(H11Protocol):
    """A connection on which no request begins within ``patience`` seconds is closed: others need its place."""

    patience = Limits.patience
    given_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.wait()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.stop_waiting()

    def wait(self) -> None:
        """From here on a request must begin, unless one is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.stop_waiting()
        elif self.given_up is None:
            self.given_up = self.loop.call_later(self.patience, self.transport.close)

    def stop_waiting(self) -> None:
        if self.given_up is not None:
            self.given_up.cancel()
            self.given_up = None


def configured(worker: Worker, limits: Limits, host: str) -> uvicorn.Config:
    """HTTP as plain as it comes, no one else's headers believed."""
    protocol = type("Patient", (Patient,), {"patience": limits.patience})
    return uvicorn.Config(
        application(worker, limits, host), http=protocol, ws="none", loop="asyncio", lifespan="off", log_level="warning",
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
