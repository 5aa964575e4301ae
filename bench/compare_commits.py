"""Where the numbers of two commits part: the golden curves (``bench/curves.py``) of both, side by side.

    python bench/compare_commits.py A B [--methods NAME …] [--repository FOLDER] [--keep FOLDER]

Each commit is checked out into a temporary worktree and computes the curves with the ``curves.py`` beside this file, so that a
commit older than the curves can be compared too. A line a method: how many numbers differ, the first step that does, by how
much. Exit status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from curves import Curve, numbers, read

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Parted:
    """How two curves differ: of so many numbers how many, where first in the order of training, the values there, and the
    largest relative difference."""

    count: int
    differ: int
    place: str
    values: tuple[float, float]
    largest: float


def part(a: Curve, b: Curve) -> Parted | None:
    """Where two curves of a method part; None: nowhere. A number that only one of them has is NaN in the other."""
    ours, theirs = numbers(a), numbers(b)
    places = sorted(dict.fromkeys([*ours, *theirs]), key=lambda place: order(place, a))
    pairs = {p: (ours.get(p, math.nan), theirs.get(p, math.nan)) for p in places}
    differ = [p for p, (x, y) in pairs.items() if x != y and not (math.isnan(x) and math.isnan(y))]
    if not differ:
        return None
    return Parted(len(places), len(differ), differ[0], pairs[differ[0]], max(relative(*pairs[p]) for p in differ))


def order(place: str, curve: Curve) -> tuple[int, int, int]:
    """When a number came about: by task, the training before a method's own phases; logits last."""
    kind, task, *_, last = place.split("/")
    tasks = list(curve["losses"])
    index = tasks.index(task) if task in tasks else len(tasks)
    kinds = ("losses", "phases", "logits")
    return (len(tasks) if kind == "logits" else index, kinds.index(kind), int(last))


def relative(x: float, y: float) -> float:
    """|x − y| as a share of the larger; infinite where one is missing or no number."""
    size = max(abs(x), abs(y))
    return abs(x - y) / size if size < math.inf and not math.isnan(x - y) else math.inf


def computed(repository: Path, commit: str, out: Path, methods: Sequence[str]) -> dict[str, Curve]:
    """The curves of a commit, into the file ``out``."""
    out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git(repository, "worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            words = [sys.executable, str(HERE / "curves.py"), str(out), *(["--methods", *methods] if methods else [])]
            env = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
            print(f"{commit}:", flush=True)
            if subprocess.run(words, env=env, check=False).returncode:
                raise SystemExit(f"{commit} could not compute its curves (see above).")
        finally:
            git(repository, "worktree", "remove", "--force", str(tree))
    return read(out)


def git(repository: Path, *words: str) -> None:
    done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {words[0]} {words[1]}: {done.stderr.strip()}")


def table(a: dict[str, Curve], b: dict[str, Curve], names: tuple[str, str]) -> list[str]:
    """A line a method that differs, and one for all that do not."""
    lines, same = [], 0
    for name in sorted({*a, *b}):
        if name not in a or name not in b:
            lines.append(f"{name}: only at {names[0] if name in a else names[1]}")
        elif found := part(a[name], b[name]):
            x, y = found.values
            lines.append(
                f"{name}: {found.differ} of {found.count} numbers differ, first {found.place}: {x:.9g} at {names[0]}, "
                f"{y:.9g} at {names[1]}; at most by a share of {found.largest:.2g}"
            )
        else:
            same += 1
    return [*lines, f"{same} methods have the same numbers, bit for bit."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--repository", type=Path, default=HERE.parent)
    parser.add_argument("--keep", type=Path, help="a folder that keeps both files of curves")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = asked.keep or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        found = [
            computed(asked.repository, commit, place / f"{which}.json", asked.methods)
            for which, commit in (("a", asked.a), ("b", asked.b))
        ]
    lines = table(found[0], found[1], (asked.a, asked.b))
    print("\n".join(lines))
    raise SystemExit(1 if len(lines) > 1 else 0)


if __name__ == "__main__":
    main()
