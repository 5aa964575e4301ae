"""A model in use, served in a thread, and what is asked of it over HTTP."""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from test_learner import drawings, learned  # noqa: F401  fixtures

from perdure import Learner
from perdure.serve.limits import Limits
from perdure.serve.server import configured
from perdure.serve.worker import Worker

Sent = list[tuple[str, str | None, bytes]]  # field, file name, content


class Served:
    """A server in a thread, and what it is asked."""

    def __init__(self, learner: Learner, limits: Limits = Limits()):  # noqa: B008  frozen
        self.worker = Worker(learner, limits)
        self.worker.start()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.server = uvicorn.Server(configured(self.worker, limits, "127.0.0.1"))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.worker.stop()
        self.socket.close()

    def get(self, path: str, data: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers, and the JSON or text of an answer."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, named)
        try:
            with urllib.request.urlopen(request) as answer:
                status, about, text = answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, about, text = error.code, error.headers, error.read().decode()
        return status, about, json.loads(text) if "json" in about["content-type"] else text

    def predict(self, fields: Sent, **headers: str) -> tuple[int, Any]:
        status, _, answer = self.get(
            "/predict", form(fields), Content_Type="multipart/form-data; boundary=xYx", **headers
        )
        return status, answer

    def raw(self, data: bytes) -> bytes:
        """All that comes back for some bytes."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(4096), b""))


def form(fields: Sent) -> bytes:
    out = b""
    for field, name, content in fields:
        file = "" if name is None else f'; filename="{name}"'
        out += f'--xYx\r\nContent-Disposition: form-data; name="{field}"{file}\r\n\r\n'.encode() + content + b"\r\n"
    return out + b"--xYx--\r\n"


def files(*paths: Path) -> Sent:
    return [("files", str(path), path.read_bytes()) for path in paths]


@pytest.fixture(scope="module")
def server(learned: Path) -> Iterator[Served]:
    served = Served(Learner(learned), Limits(upload=200_000, pictures=8))
    yield served
    served.end()


@pytest.fixture
def pictures(drawings: Path) -> list[Path]:
    return sorted((drawings / "digits").rglob("*.png"))[::6][:8]
