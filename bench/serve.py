"""A served model under load: many clients at once on the loopback, each asking again as soon as it is answered.

    python bench/serve.py [--clients 100] [--seconds 60] [--home HOME] [--pictures 1]

``perdure serve`` runs in a process of its own, on a HOME that is made here (a ridge head, two small tasks) unless one is given.
Seen: requests answered, refused and lost; those a second; the median and the 99th percentile of the time to an answer; the
server's memory after a warm-up and at the end.
"""

from __future__ import annotations

import argparse
import http.client
import io
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from perdure import Learner
from perdure.benchmarks import mini

WARM = 5  # seconds that are not counted


def made(folder: Path) -> Path:
    """A HOME that knows two tasks of the small world."""
    learner = Learner(folder, method="ridge", features=256, choose="fixed", lam=0.01, temperature=8, weight=0.7)
    learner.learn(mini.multi_domain("I").shortened(tasks=2, images=64), max_loss=100)
    return folder


def form(pictures: int) -> bytes:
    """Some pictures of the small world as a browser sends them."""
    out = b""
    for k, pixels in enumerate(mini.multi_domain("I").tasks[0].test.pixels[:pictures]):
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
        out += f'--xYx\r\nContent-Disposition: form-data; name="files"; filename="{k}.png"\r\n\r\n'.encode()
        out += file.getvalue() + b"\r\n"
    return out + b"--xYx--\r\n"


class Client(threading.Thread):
    """Asks until it is told to stop; a connection that breaks is an answer lost."""

    def __init__(self, port: int, body: bytes, stop: threading.Event):
        super().__init__()
        self.port, self.body, self.stop = port, body, stop
        self.seen: list[tuple[float, float, str]] = []  # when it asked, seconds, status

    def run(self) -> None:
        kind = {"Content-Type": "multipart/form-data; boundary=xYx"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        while not self.stop.is_set():
            start = time.perf_counter()
            try:
                connection.request("POST", "/predict", self.body, kind)
                answer = connection.getresponse()
                answer.read()
                status = str(answer.status)
            except (OSError, http.client.HTTPException) as error:
                status = f"lost ({type(error).__name__})"
                connection.close()
            self.seen.append((start, time.perf_counter() - start, status))
        connection.close()


def loaded(port: int, process: psutil.Process, options: argparse.Namespace) -> dict[str, Any]:
    """What clients see, and the server's memory, while all of them ask."""
    stop, body = threading.Event(), form(options.pictures)
    clients = [Client(port, body, stop) for _ in range(options.clients)]
    for client in clients:
        client.start()
    time.sleep(WARM)
    start, before = time.perf_counter(), process.memory_info().rss
    time.sleep(options.seconds)
    end, after = time.perf_counter(), process.memory_info().rss
    stop.set()
    for client in clients:
        client.join()
    every = [one for client in clients for one in client.seen]
    counted = [(took, status) for began, took, status in every if start <= began + took <= end]
    took = np.array([seconds for seconds, status in counted if status == "200"])
    return {
        "answers": dict(sorted(Counter(status for *_, status in every).items())),
        "per second": len(took) / (end - start), "seconds": np.percentile(took, (50, 99)) if len(took) else (0, 0),
        "memory": (before / 1e6, after / 1e6),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pictures", type=int, default=1, help="of one request")
    parser.add_argument("--home", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = options.home or made(Path(scratch) / "HOME")
        command = [sys.executable, "-m", "perdure", "serve", str(home), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            port = re.search(r":(\d+)/ ", server.stdout.readline())
            assert port, "the server did not start"
            seen = loaded(int(port[1]), psutil.Process(server.pid), options)
            server.terminate()
            assert server.wait() == 0
    print(f"{options.clients} clients, {options.seconds:g} s, {options.pictures} picture(s) a request")
    print("answers: " + ", ".join(f"{count} × {status}" for status, count in seen["answers"].items()))
    print(
        "{:.0f} requests/s; p50 {:.0f} ms, p99 {:.0f} ms".format(
            seen["per second"], *(1e3 * x for x in seen["seconds"])
        )
    )
    print("memory of the server: {:.0f} MB, then {:.0f} MB".format(*seen["memory"]))


if __name__ == "__main__":
    main()
