"""What is printed survives any terminal: narrow, piped, of another encoding, with brackets in names, with many tasks."""

from __future__ import annotations

import errno
import os
import pty
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT
from rich.console import Console

from perdure import launch
from perdure.core.config import in_words, options
from perdure.engine.settings import Settings
from perdure.engine.watcher import Watcher, Watchers
from perdure.view import Screen, matrix, summary

Run = Callable[..., dict[str, Any]]


def printed(what: Any, width: int) -> str:
    out = StringIO()
    Console(file=out, width=width, force_terminal=False).print(what)
    return out.getvalue()


def run_of(method: str, **changes: Any) -> dict[str, Any]:
    figures = {"transfer": 46.1, "average": 67.3, "last": 86.3, "forgetting": 7.0}
    run = {
        "method": method, "stream": "mini", "seed": 0, "seconds": 92.4, "probe": [62.0, 55.5],
        "intervals": {name: [value - 2.5, value + 2.5] for name, value in figures.items()}, **figures,
    }  # fmt: skip
    return {**run, **changes}


@pytest.mark.parametrize("width", [160, 100, 80, 40])
def test_methods_stay_apart_however_narrow_the_terminal(width: int) -> None:
    runs = [run_of("finetune"), run_of("finetune_lora"), run_of("gift+condu+mg_clip", transfer=None)]
    text = printed(summary(runs, Console(width=width, file=StringIO())), width)
    assert all(run["method"] in text for run in runs) and "86.3" in text and "62.0 → 55.5" in text
    assert max(map(len, text.splitlines())) <= width
    assert ("43.6 to 48.6" in text) == (width != 100)  # of 80 and less a block a run, with room to the right


def test_names_with_brackets_are_names() -> None:
    names = ["[/x] birds", "[red]fish", "plain"]
    rows = [[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]]
    text = printed(matrix(names, rows, [1.0, 2.0], "[bold]title"), 120)
    assert all(name in text for name in names) and "[bold]title" in text and "[40.0]" in text
    screen = Screen(Console(file=(out := StringIO()), width=120), "[/] on [x]")
    screen.begins(names, [], [])
    screen.learns(names[0], 1)
    screen.step(1, 1, {})
    screen.row(rows[0], 1.0)
    screen.warn("[/warn]")
    assert "[/] on [x]" in out.getvalue() and "[/warn]" in out.getvalue()


def test_of_fifty_tasks_those_that_fit_are_shown_and_the_rest_counted() -> None:
    names = [f"task {k}" for k in range(1, 51)]
    rows = [[float(k + j) for j in range(50)] for k in range(21)]
    text = printed(matrix(names, rows, [], "t", 80), 80)
    heads = text.splitlines()[1]
    assert "task 20" in heads and "task 1 " not in heads and "[39.0]" in text  # the one just learned, in row 20
    left = int(text.split("before. ")[1].split(" of 50")[0].replace("\n", " "))
    assert 30 < left < 50 and "not shown" in text


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_every_encoding_can_be_printed_to(encoding: str, short_run: Run) -> None:
    folder = short_run("finetune")["folder"]
    done = subprocess.run(
        [sys.executable, "-m", "perdure", "report", str(folder)],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, check=False,
    )  # fmt: skip
    out = done.stdout.decode(encoding)
    assert done.returncode == 0, done.stderr.decode(encoding)
    assert ("before → after" in out) == (encoding == "utf-8") and ("before -> after" in out) == (encoding != "utf-8")
    assert (folder / "report.html").exists()


def test_types_are_words() -> None:
    inner = ("Ellipsis", "str", "int", "float", "tuple", "dict", "NoneType", "bool")
    everything = [o for e in launch.methods() if "role" not in e.about for _, o in launch.method_options(e).values()]
    for option in [*everything, *options(Settings).values()]:
        assert not any(word in option.kind.replace("|", " ").split() for word in inner), option
        assert not option.shown.startswith("("), option
    assert in_words(tuple[str, ...]) == "list of words" and in_words(float | None) == "number or none"
    kinds = {o.key: o.kind for o in everything}
    assert kinds["lr_by_task"] == "number by task name" and kinds["lora_layers"] == "list of words"
    assert (
        kinds["adapt"] == "full | lora | rotation"
        and kinds["head"] == "yes or no"
        and kinds["iterations"] == "whole number"
    )


@pytest.mark.slow
def test_several_may_listen(short_run: Run) -> None:
    class Ear(Watcher):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def row(self, accuracy: list[float], probe: float | None) -> None:
            self.heard.append(f"row of {len(accuracy)}")

        def learns(self, task: str, number: int) -> None:
            self.heard.append(task)

        def step(self, step: int, total: int, losses: Any) -> None:
            self.heard.append(f"{step}/{total}")

    one, two = Ear(), Ear()
    folder = short_run("finetune")["folder"]
    for old in [*folder.glob("task_03*"), folder / "metrics.json"]:
        os.replace(old, folder.parent / f"old {old.name}")
    launch.resume(folder, [one, two])
    assert one.heard == two.heard == ["food", "1/3", "2/3", "3/3", "row of 3"]

    class Breaks(Watcher):
        def evaluates(self) -> None:
            raise KeyError("not swallowed")

    with pytest.raises(KeyError, match="not swallowed"):
        Watchers([one, Breaks()]).evaluates()


def on_a_terminal(*words: str | Path, until: bytes = b"") -> tuple[int, str]:
    """The command line on a pseudo-terminal of 100 columns; interrupted as by Ctrl-C once ``until`` was seen."""
    ours, theirs = pty.openpty()
    import fcntl
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-m", "perdure", *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError as error:  # the other end is closed
            assert error.errno == errno.EIO
            break
        if not chunk:
            break
        seen += chunk
        if until and until in seen:
            process.send_signal(signal.SIGINT)
            until = b""
    os.close(ours)
    return process.wait(), seen.decode()


@pytest.mark.slow
def test_the_live_screen_on_a_terminal(tmp_path: Path) -> None:
    words = [f"{k}={v}" for k, v in {**SHORT, "tasks": 2, "iterations": 30}.items()]
    code, seen = on_a_terminal(
        "run", "--method", "finetune", "--stream", "mini-mtil", "--out", tmp_path / "run", *words
    )
    assert code == 0
    for piece in (
        "task 1/2: animals",
        "task 2/2: digits",
        "loss: task",
        "(before)",
        "just learned",
        "Report:",
        "\x1b[",
    ):
        assert piece in seen, piece


@pytest.mark.slow
def test_ctrl_c_on_a_terminal(tmp_path: Path) -> None:
    words = [f"{k}={v}" for k, v in {**SHORT, "iterations": 5000}.items()]
    folder = tmp_path / "run"
    code, seen = on_a_terminal(
        "run", "--method", "finetune", "--stream", "mini-mtil", "--out", folder, *words, until=b"loss: task"
    )
    assert code == 130 and "Traceback" not in seen and "Go on with: perdure resume" in seen
    assert [p.name for p in folder.glob("task_*")] == ["task_00_before"]
