"""Where models are looked for: nothing asks the network that was not told to, and nothing asks it twice."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from perdure.benchmarks import mini

FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Loads what is named, counts how often the process connects or waits, and prints what came of it in one line.
LOAD = """
import socket, sys, time
from perdure.core.errors import PerdureError
from perdure.models.clip import CLIP
tried, waits = [], []
connect, sleep = socket.socket.connect, time.sleep
socket.socket.connect = lambda self, where: (tried.append(where), connect(self, where))[1]
time.sleep = lambda seconds: (waits.append(seconds), sleep(0))[1]
for name in sys.argv[1:]:
    tried.clear(), waits.clear()
    try:
        clip = CLIP.load(name)
        said = f"loaded a {clip.kind} at {clip.revision}, {clip.note or 'no note'}"
    except PerdureError as error:
        said = str(error).replace("\\n", " ")
    print(len([w for w in tried if isinstance(w, tuple)]), sum(waits), said, flush=True)
"""


def loaded(tmp: Path, *names: str, endpoint: str = "http://127.0.0.1:9", **more: str) -> list[tuple[int, float, str]]:
    """For each name, by a process of its own with its own cache: connections tried, seconds waited, and what came of it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    env = {**kept, "HF_HOME": str(tmp / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **more}
    done = subprocess.run([sys.executable, "-c", LOAD, *names], env=env, cwd=tmp, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "etry" not in done.stderr, done.stderr
    parts = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert len(parts) == len(names), done.stdout
    return [(int(tried), float(waited), said) for tried, waited, said in parts]


def cached(tmp: Path, name: str, leave_out: tuple[str, ...] = ()) -> None:
    """Put the small model into the cache as if it had been fetched."""
    home = tmp / "hf" / "hub" / f"models--{name.replace('/', '--')}"
    folder = home / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for file in FILES:
        if file not in leave_out:
            shutil.copy(mini.MODEL / file, folder / file)


@pytest.mark.slow
def test_without_a_network_it_is_one_sentence_and_no_second_try(tmp_path: Path) -> None:
    cached(tmp_path, "here/whole")
    cached(tmp_path, "here/half", leave_out=("model.safetensors",))
    names = (str(mini.MODEL), "opnai/clip", "openai-clip", "here/whole", "here/half")
    folder, mistyped, no_id, whole, half = loaded(tmp_path, *names)
    assert folder == (0, 0, "loaded a clip at , no note")
    assert 1 <= mistyped[0] <= 2 and not mistyped[1] and "the Hub did not give it (ConnectError)" in mistyped[2]
    assert no_id[:2] == (0, 0) and "'openai-clip': there is no such folder" in no_id[2]
    assert whole == (0, 0, f"loaded a clip at {COMMIT}, no note")
    assert 1 <= half[0] <= 2 and not half[1] and "No CLIP model could be loaded from 'here/half'" in half[2]
    (forbidden,) = loaded(tmp_path, "opnai/clip", HF_HUB_OFFLINE="1")
    assert forbidden[:2] == (0, 0) and "HF_HUB_OFFLINE forbids to ask the Hub" in forbidden[2]


class Hub(BaseHTTPRequestHandler):
    """Serves two repositories: a transformers checkpoint with much beside it, and one that is open_clip's alone."""

    asked: list[str] = []
    listed = (*FILES, "open_clip_model.safetensors", "onnx/model.safetensors", "tf_model.h5")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api" and len(parts) > 3:
            files = self.listed if parts[3] == "whole" else ("open_clip_config.json",)
            tree = [{"type": "file", "path": f, "size": 1, "oid": COMMIT} for f in files]
            siblings = [{"rfilename": f} for f in files]
            about = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings}
            return self.give(json.dumps(tree if "tree" in parts else about).encode())
        name, file = parts[1], "/".join(parts[4:])
        if name == "whole" and file in FILES:
            return self.give((mini.MODEL / file).read_bytes())
        if name == "other" and file == "open_clip_config.json":
            return self.give(b"{}")
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound" if name in ("whole", "other") else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def give(self, body: bytes) -> None:
        self.send_response(200)
        for key, value in (("Content-Length", len(body)), ("ETag", f'"{hash(body)}"'), ("X-Repo-Commit", COMMIT)):
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *about: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_of_a_hub_id_what_is_needed_is_fetched_once_and_kept(hub: str, tmp_path: Path) -> None:
    first, again, other, missing = loaded(
        tmp_path, "some/whole", "some/whole", "some/other", "some/missing", endpoint=hub
    )
    assert first[2] == f"loaded a clip at {COMMIT}, no note"
    assert again == (0, 0, first[2])  # from the cache, without a word to the network
    assert "on the Hub lies an open_clip checkpoint" in other[2]
    assert "the Hub did not give it (RepositoryNotFoundError)" in missing[2]
    (nowhere,) = loaded(tmp_path, "some/whole", endpoint=hub, HF_HOME="/proc/nowhere")
    assert "found on the Hub, and could not be kept here" in nowhere[2] and "HF_HOME=FOLDER" in nowhere[2]
    gets = [line for line in Hub.asked if line.startswith("GET /some/whole/")]
    assert sorted(line.split("/")[-1] for line in gets) == sorted(FILES)
