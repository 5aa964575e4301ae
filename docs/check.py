"""Executes the examples of README.md and docs/*.md: every ```sh and ```python block, a page in a fresh folder of its own, where
bench, proofs, recipes and studies lie as in the sources.

    python docs/check.py [PAGE ...] [--jobs 2]

A block must end with exit code 0. HTML comments on the lines directly before it say otherwise, one a line:

    <!-- docs-check: skip: REASON -->             not executed: it needs a Hub, an accelerator, hours
    <!-- docs-check: without WORD: REASON -->     its lines that hold WORD are left out
    <!-- docs-check: short KEY=VALUE ... -->      appended to every ``perdure run``: for a quick look; --overwrite:
                                                  its lines are alternatives, each in the place of the one before
    <!-- docs-check: prints TEXT -->              what it prints must hold TEXT, however lines are broken
    <!-- docs-check: fails CODE -->               it must end with this exit code
    <!-- docs-check: file NAME -->                it is written as this file, whatever its language, not executed
    <!-- docs-check: pictures FOLDER=TASK,... --> drawings lie there first: CLASS/*, of several tasks TASK/CLASS/*;
                                                  TASK@N: those from number N on

The first block that does not do what it says ends it, with its place and output.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"<!-- docs-check: (\w+):? ?(.*?) -->")
SOURCES = ("bench", "proofs", "recipes", "studies")
KINDS = ("skip", "without", "short", "prints", "fails", "file", "pictures")
CLASSES, EACH = 4, 12  # of a task's drawings


@dataclass(frozen=True)
class Block:
    """A block of code: its page, line, language, text, and the marks before it as (kind, what it says)."""

    page: Path
    line: int
    language: str
    text: str
    marks: tuple[tuple[str, str], ...]

    def said(self, kind: str) -> list[str]:
        return [what for one, what in self.marks if one == kind]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page}:{self.line}"


class Wrong(Exception):
    """A block that does not do what it says."""


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page that are executed or written, in order."""
    marks: list[tuple[str, str]] = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if line.startswith("```"):
            text = []
            for _, inside in lines:
                if inside.startswith("```"):
                    break
                text.append(inside)
            block = Block(page, number, line[3:].strip(), "\n".join(text) + "\n", tuple(marks))
            marks = []
            if block.language in ("sh", "python") or block.said("file"):
                yield block
        elif line.startswith("<!-- docs-check:"):
            found = MARK.fullmatch(line)
            if not found or found[1] not in KINDS:
                raise Wrong(f"{page.name}:{number}: no such mark: {line}. Known: {', '.join(KINDS)}.")
            marks.append((found[1], found[2]))
        elif marks:
            raise Wrong(f"{page.name}:{number}: a docs-check mark stands directly before its block.")


def draw(folder: Path, tasks: Sequence[str]) -> None:
    """Some drawings of the small world as people have their pictures."""
    from PIL import Image

    from perdure.benchmarks import mini

    known = {task.name: task for task in mini.multi_domain("I").tasks}
    for word in tasks:
        name, _, start = word.partition("@")
        task, place, first = known[name], folder if len(tasks) == 1 else folder / name, int(start or 0)
        for k, one in enumerate(task.classes[:CLASSES]):
            (place / one.name).mkdir(parents=True, exist_ok=True)
            for n in (task.train.labels == k).nonzero().squeeze(1)[first : first + EACH].tolist():
                Image.fromarray(task.train.pixels[n].permute(1, 2, 0).numpy()).save(place / one.name / f"{n}.png")


def environment(tools: Path) -> dict[str, str]:
    """What blocks see: this Python, this perdure as a command, no network, wide and plain output."""
    tools.mkdir()
    short = '[ "$1" = run ] && set -- "$@" $DOCS_SHORT\n'
    for name, call in (
        ("perdure", f'{short}exec "{sys.executable}" -m perdure "$@"'),
        ("python", f'exec "{sys.executable}" "$@"'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{call}\n")
        (tools / name).chmod(0o755)
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160", "NO_COLOR": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }  # fmt: skip
    return {**os.environ, **more}


def script(block: Block) -> str:
    """What of a block is executed."""
    words = [what.split(": ")[0] for what in block.said("without")]
    lines = block.text.splitlines()
    if idle := [word for word in words if not any(word in line for line in lines)]:
        raise Wrong(f"{block}: no line holds '{idle[0]}', which a mark leaves out.")
    return "\n".join(line for line in lines if not any(word in line for word in words)) + "\n"


def execute(block: Block, folder: Path, env: dict[str, str]) -> None:
    """Do what a block says in ``folder``; raise ``Wrong`` where it does not come out as it says."""
    for what in block.said("pictures"):
        for one in what.split():
            place, _, tasks = one.partition("=")
            draw(folder / place, tasks.split(","))
    if names := block.said("file"):
        (folder / names[0]).write_text(block.text, encoding="utf-8")
        return
    if block.said("skip"):
        return
    env = {**env, "DOCS_SHORT": " ".join(block.said("short"))}
    call = ["sh", "-e"] if block.language == "sh" else [sys.executable, "-"]
    done = subprocess.run(
        call, input=script(block), cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    code, said = int((block.said("fails") or ["0"])[0]), " ".join(done.stdout.split())
    if done.returncode != code:
        raise Wrong(f"{block}: exit code {done.returncode}, not {code}.\n{block.text}\n{done.stdout}")
    if missing := [text for text in block.said("prints") if " ".join(text.split()) not in said]:
        raise Wrong(f"{block}: does not print: {missing[0]}\n{block.text}\n{done.stdout}")


def check(page: Path, stop: threading.Event | None = None) -> int:
    """Execute a page's blocks in order, in one fresh folder; return how many were."""
    found, count = list(blocks(page)), 0
    with tempfile.TemporaryDirectory(prefix="docs-check-") as scratch:
        folder = Path(scratch) / "here"
        folder.mkdir()
        for name in SOURCES:
            (folder / name).symlink_to(ROOT / name)
        env = environment(Path(scratch) / "tools")
        for block in found:
            if stop is not None and stop.is_set():
                break
            execute(block, folder, env)
            count += not block.said("skip")
            print(f"{block} {'skipped: ' + block.said('skip')[0] if block.said('skip') else 'ok'}", flush=True)
    return count


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument(
        "pages", nargs="*", type=Path, default=[ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    )
    words.add_argument("--jobs", type=int, default=2, help="pages at a time")
    given, stop = words.parse_args(), threading.Event()

    def one(page: Path) -> int:
        try:
            return check(page.resolve(), stop)
        except Wrong:
            stop.set()
            raise

    with ThreadPoolExecutor(given.jobs) as pool:
        try:
            print(f"{sum(pool.map(one, given.pages))} blocks do what they say.")
        except Wrong as wrong:
            sys.exit(str(wrong))


if __name__ == "__main__":
    main()
