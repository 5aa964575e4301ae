"""A model in use is put on the Hub: what is sent, to a server here that answers as the Hub does."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from albums import tasks, write

from perdure import Learner

pytestmark = pytest.mark.slow
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD = ("README.md", "notes.txt", "experts/01_gone/config.json")


class Hub(BaseHTTPRequestHandler):
    """One repository, ``ann/pets``, which holds ``OLD``: keeps what is asked and sent. Weights go by LFS."""

    protocol_version = "HTTP/1.1"
    token, public = "good", False
    asked: list[str]
    made: dict[str, object]
    files: dict[str, bytes]
    lfs: dict[str, bytes]
    gone: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "/tree/" in self.path:
            return self.give([{"type": "file", "path": f, "size": 1, "oid": COMMIT} for f in OLD])
        siblings = [{"rfilename": f} for f in OLD]
        self.give({"id": "ann/pets", "sha": COMMIT, "private": not self.public, "siblings": siblings})

    def do_POST(self) -> None:
        self.asked.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {self.token}":
            return self.give({"error": "Invalid credentials"}, 401)
        here = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self.made.update(json.loads(body))
            return self.give({"url": f"{here}/ann/pets", "id": "ann/pets"})
        if self.path == "/api/validate-yaml":
            return self.give({"errors": [], "warnings": []})
        if self.path.startswith("/api/models/ann/pets/preupload/"):
            paths = [one["path"] for one in json.loads(body)["files"]]
            modes = [(p, "lfs" if p.endswith(".safetensors") else "regular") for p in paths]
            return self.give({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        if self.path == "/ann/pets.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            return self.give({"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{here}/lfs/{one['oid']}"}}} for one in objects
            ]})  # fmt: skip
        if self.path.startswith("/api/models/ann/pets/commit/"):
            self.commit([json.loads(line) for line in body.splitlines()])
            return self.give({"commitUrl": f"{here}/ann/pets/commit/{COMMIT}", "commitOid": COMMIT})
        self.give({"error": self.path}, 404)

    def do_PUT(self) -> None:
        self.lfs[self.path.split("/")[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.give({})

    def commit(self, lines: list[dict[str, dict[str, str]]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                self.gone.append(value["path"])

    def give(self, what: object, code: int = 200) -> None:
        body = json.dumps(what).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *about: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.asked, Hub.made, Hub.files, Hub.lfs, Hub.gone, Hub.public = [], {}, {}, {}, [], False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HOME that learned some digits."""
    base = tmp_path_factory.mktemp("pushed")
    (digits,) = tasks("digits")
    write(digits, base / "digits", 3, 8)
    Learner(base / "HOME", method="ridge", features=32).learn(base / "digits", max_loss=100)
    return base / "HOME"


def push(tmp: Path, home: Path, endpoint: str, *more: str, **env: str) -> tuple[int, str, str]:
    """The exit code, standard output and error of a push by a process of its own, with no login but the one given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env = {**kept, **quiet, "HF_HOME": str(tmp / "hf"), "TMPDIR": str(tmp), "HF_ENDPOINT": endpoint, **env}
    call = [sys.executable, "-m", "perdure", "push", str(home), *(more or ("ann/pets",))]
    done = subprocess.run(call, env=env, cwd=tmp, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    assert not list(tmp.glob("perdure-*"))  # nothing is left behind
    return done.returncode, done.stdout, done.stderr


def test_what_is_sent_is_an_export(hub: str, home: Path, tmp_path: Path) -> None:
    code, out, err = push(tmp_path, home, hub, "ann/pets", "--private", HF_TOKEN="good")
    assert (code, err) == (0, "") and f"{hub}/ann/pets" in out
    assert {"name": "pets", "organization": "ann"}.items() <= Hub.made.items()
    assert Hub.made.get("visibility") == "private" or Hub.made.get("private") is True
    Learner(home).export(tmp_path / "export")
    whole = {p.relative_to(tmp_path / "export").as_posix(): p for p in (tmp_path / "export").rglob("*") if p.is_file()}
    assert {"README.md", "config.json", "model.safetensors", "perdure.json", "perdure.safetensors"} <= set(whole)
    assert Hub.files == {name: path.read_bytes() for name, path in whole.items()}
    assert Hub.gone == ["experts/01_gone/config.json"]  # an expert that is known no more; notes are somebody's
    assert len(Hub.lfs) == sum(name.endswith(".safetensors") for name in whole)


def test_what_the_hub_refuses_is_one_sentence(hub: str, home: Path, tmp_path: Path) -> None:
    code, out, err = push(tmp_path, home, hub, HF_TOKEN="bad")
    assert code == 2 and out == "" and err.count("\n") == 1 and "refused the login (401)" in err
    Hub.public = True
    code, _, err = push(tmp_path, home, hub, "ann/pets", "--private", HF_TOKEN="good")
    assert code == 2 and "is there already, and public" in err
    assert not Hub.files and not Hub.lfs
    code, _, err = push(tmp_path, home, "http://127.0.0.1:9", HF_TOKEN="good")
    assert code == 2 and "The Hub could not be reached (ConnectError)" in err and err.count("\n") == 1


def test_what_can_be_seen_before_is_said_before(hub: str, home: Path, tmp_path: Path) -> None:
    for given, said in (
        (("ann/pets",), "Set HF_TOKEN"), (("pets",), "as user/name"), (("ann/my pets",), "as user/name"),
    ):  # fmt: skip
        code, out, err = push(tmp_path, home, hub, *given, **({} if "HF" in said else {"HF_TOKEN": "good"}))
        assert code == 2 and out == "" and err.count("\n") == 1 and said in err
    code, _, err = push(tmp_path, tmp_path / "nothing", hub, HF_TOKEN="good")
    assert code == 2 and "has learned nothing yet" in err
    assert Hub.asked == []
