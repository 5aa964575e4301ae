"""Golden curves: ten fp32 steps of every registered method; what a change of a number looks like between two commits."""

from __future__ import annotations

import copy
import math
import shutil
import subprocess
import sys
from pathlib import Path

import compare_commits
import curves
import pytest

ROOT = Path(__file__).parents[1]
KNOWN = curves.read(curves.FILE)
# Between the instruction sets of one processor losses differ by up to 8e-5 (of a VAE; else 1e-5), logits by 2e-4 (ConDU's
# votes): five steps of Adam, which divides by small numbers, carry the last digits on.
LOSSES, LOGITS = 1e-3, 2e-3


def test_every_method_has_a_curve() -> None:
    assert sorted(KNOWN) == curves.names(), "make them anew: python bench/curves.py --missing"


@pytest.mark.slow
@pytest.mark.parametrize("name", curves.names())
def test_a_method_computes_what_it_computed(name: str) -> None:
    found, wanted = curves.curve(name), KNOWN[name]
    mine, theirs = curves.numbers(found), curves.numbers(wanted)
    assert mine.keys() == theirs.keys() and all(map(math.isfinite, mine.values()))
    for place, value in theirs.items():
        tolerance = LOGITS if place.startswith("logits") else LOSSES
        assert mine[place] == pytest.approx(value, rel=tolerance, abs=tolerance), place


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gift", "zscl+condu", "moe_adapters", "cgil"])
def test_twice_on_one_machine_it_computes_the_same_bits(name: str) -> None:
    assert curves.curve(name) == curves.curve(name)


def test_where_numbers_part() -> None:
    before = KNOWN["gift"]
    after = copy.deepcopy(before)
    first, second = list(before["losses"])
    after["losses"][second]["task"][2] += 0.5
    after["logits"][first][0] *= 1 + 1e-7
    found = compare_commits.part(before, after)
    assert compare_commits.part(before, before) is None and found is not None
    assert (found.differ, found.place) == (2, f"losses/{second}/task/3")
    assert found.values[1] - found.values[0] == pytest.approx(0.5) and 0.01 < found.largest < 1
    del after["losses"][first]["task"][0]
    lines = compare_commits.table({"gift": before, "old": before}, {"gift": after, "new": after}, ("A", "B"))
    assert "only at B" in lines[1] and "only at A" in lines[2] and f"first losses/{first}/task/1" in lines[0]
    assert lines[-1] == "0 methods have the same numbers, bit for bit."


@pytest.mark.slow
def test_two_commits_are_set_side_by_side(tmp_path: Path) -> None:
    """The second commit of a clone warms up by a step more."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout")
    clone = tmp_path / "clone"
    git("clone", "-q", "--shared", str(ROOT), str(clone))
    schedule = clone / "src" / "perdure" / "training" / "schedule.py"
    schedule.write_text(
        schedule.read_text().replace("self.lr * (step + 1) / self.warmup", "self.lr * step / self.warmup")
    )
    git("-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qam", "a step later")
    words = ["HEAD~1", "HEAD", "--methods", "finetune", "zero_shot", "--repository", str(clone)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "compare_commits.py"), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert (
        said[-2].startswith("finetune: ") and "first losses/digits/task/2: " in said[-2]
    )  # the first is before any step
    assert said[-1] == "1 methods have the same numbers, bit for bit."
    assert not (clone / ".git" / "worktrees").exists() or not list((clone / ".git" / "worktrees").iterdir())


def git(*words: str) -> None:
    subprocess.run(["git", *words], check=True, capture_output=True)
