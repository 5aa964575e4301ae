"""``perdure serve`` as people start, see and end it: the command in a process of its own, and the page in a browser."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from served import Served
from test_learner import drawings, learned  # noqa: F401  fixtures

from perdure import Learner

COMMAND = [sys.executable, "-m", "perdure", "serve"]


@pytest.mark.slow
def test_what_cannot_be_served_is_said_in_a_sentence(learned: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for folder, more, said in (
            (tmp_path / "nothing", [], "has learned nothing yet"),
            (learned, ["--port", str(port)], f"Port {port} of 127.0.0.1 cannot be had"),
            (learned, ["--host", "no.such.host.invalid"], "cannot be had"),
        ):  # fmt: skip
            done = subprocess.run([*COMMAND, str(folder), *more], capture_output=True, text=True)
            assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
            assert ("nobody has to log in" in done.stderr) == ("--host" in more)


def test_without_its_packages_it_says_what_to_install(learned: Path) -> None:
    script = (
        "import sys; sys.modules['uvicorn'] = None; from perdure.cli import main; sys.argv[1:] = sys.argv[1:]; main()"
    )
    done = subprocess.run([sys.executable, "-c", script, "serve", str(learned)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().endswith("pip install 'perdure[serve]'")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_tidily(end: signal.Signals, learned: Path) -> None:
    command = [*COMMAND, str(learned), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert address
        with urllib.request.urlopen(f"{address[0]}health") as answer:
            assert json.loads(answer.read())["status"] == "ok"
        process.send_signal(end)
        assert process.wait() == 0 and process.stdout.read() == "Ended.\n" and process.stderr.read() == ""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on the PATH")
def test_in_a_browser(learned: Path, drawings: Path, tmp_path: Path) -> None:
    learner = Learner(learned)
    picture, bad = sorted((drawings / "digits" / "zero").glob("*.png"))[0], tmp_path / "<b>bad.png"
    bad.write_bytes(b"no picture")
    (one,) = learner.predict([picture], topk=5)
    served = Served(Learner(learned))
    address = f"http://127.0.0.1:{served.port}/"
    with Browser(tmp_path / "profile") as browser:
        browser.look(1100, 1200, "light")
        browser.open(address)
        browser.choose("#files", picture, bad)
        browser.until("document.querySelectorAll('#answers > li').length === 2")
        lines = browser.run(
            "[...document.querySelectorAll('#answers ol li')].map(l => [...l.children].map(c => c.textContent))"
        )
        assert lines == [[x["label"], "", f"{100 * x['score']:.1f} %"] for x in one["top"]]
        said = browser.run("document.getElementById('answers').innerText")
        assert one["label"] in said and "expert “last”, whose weight is 100.0 %" in said and "Taught by digits" in said
        assert "<b>bad.png is no picture" in said and "state task_02_digits" in browser.run("document.body.innerText")
        colours = set()
        for width, scheme in ((1100, "light"), (1100, "dark"), (390, "light"), (390, "dark")):
            browser.look(width, 1200, scheme)
            with Image.open(browser.shot(tmp_path / f"{width}-{scheme}.png")) as shot:
                colours.add(shot.convert("RGB").getpixel((2, 2)))
                assert shot.width == width and len(shot.convert("RGB").getcolors(1 << 20) or []) > 60
            assert browser.run("document.documentElement.scrollWidth") == width  # nothing to scroll sideways
        assert len(colours) == 2
        browser.run(
            "document.getElementById('classes').value = 'cat, five, zero'; document.getElementById('ask').click()"
        )
        browser.until("document.querySelectorAll('#answers ol li').length === 3")
        browser.run("document.getElementById('classes').value = 'cat'; document.getElementById('ask').click()")
        browser.until("document.getElementById('said').textContent.includes('two or more classes')")
        assert all(one.startswith((address, "blob:" + address, "data:")) for one in browser.addresses())
        complaints = browser.complaints()  # of nothing but the answer 400
        assert all("400" in str(one) for one in complaints), complaints
    served.end()
