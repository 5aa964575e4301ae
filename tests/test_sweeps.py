"""Many runs: which there are, on real Ray and without, killed and gone on with, failed and named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import perdure as command
from test_runs import assert_same_run

import perdure
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.data.splits import tasks_reordered
from perdure.launch.sweep.job import MARK
from perdure.launch.sweep.places import End, InTurn, OnRay, described, room_on
from perdure.launch.sweep.plan import Plan, choices, planned
from perdure.launch.sweep.sweep import Run, check_out, settle

BRIEF = ["tasks=2", "images=16", "iterations=4", "warmup=1", "batch_size=8", "precision=fp32"]
Words = list[str | Path]


def start(*words: str | Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "perdure", *map(str, words)]
    env = {**os.environ, "RAY_worker_niceness": "0"}  # else a busy machine leaves its workers nothing
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for(there: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    while not there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


# ---- the plan


def test_the_runs_of_a_sweep(tmp_path: Path) -> None:
    asked = planned(
        ["finetune", "ridge"], ["mini-mtil", "mini-cil"], ["lr=1e-4,2e-4", "lora_layers=[q_proj,k_proj]", "tasks=2"],
        seed=4, seeds=2, orders=2,
    )  # fmt: skip
    cells = asked.cells(tmp_path, threads=3)
    names = [cell.folder.name for cell in cells]
    assert len(names) == 12 and names[:3] == [
        "finetune-mini-mtil-lr=1e-4-order-0", "finetune-mini-mtil-lr=2e-4-order-0", "finetune-mini-mtil-lr=1e-4-order-1",
    ]  # fmt: skip
    assert "ridge-mini-cil-order-1" in names  # it has no rate
    by_name = {cell.folder.name: cell for cell in cells}
    words = by_name["finetune-mini-cil-lr=2e-4-order-1"].words
    assert words == ("lr=2e-4", "lora_layers=[q_proj,k_proj]", "tasks=2", "class_order=1", "threads=3")
    assert by_name["ridge-mini-mtil-order-1"].words == ("tasks=2", "task_order=1", "threads=3")
    assert by_name["ridge-mini-mtil-order-0"].label == "ridge on mini-mtil, order 0"
    assert [run.name for run in cells[0].runs] == ["seed_4", "seed_5"]
    own = replace(asked, seeds=1, values=("threads=1",), orders=1).cells(tmp_path, threads=3)
    assert own[0].words == ("threads=1",) and own[0].runs == [tmp_path / "finetune-mini-mtil"]
    asked.write(tmp_path)
    assert Plan.read(tmp_path) == asked


def test_values_with_commas_between() -> None:
    assert choices("1e-4,2e-4") == ["1e-4", "2e-4"] and choices("full") == ["full"]
    assert choices("[a,b],[c]") == ["[a,b]", "[c]"] and choices('{"x,y": 1}, "p,q"') == ['{"x,y": 1}', '"p,q"']


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    for values, said in (
        (["lrr=1"], "There is no key 'lrr'. Did you mean 'lr'"),
        (["lr=1e-4,fast"], "finetune, lr=fast, order 0: lr=fast: .*number"),
        (["lr=1,1"], "lr: a value is given twice"),
        (["task_order=1"], "--orders and task_order say the same twice"),
    ):
        with pytest.raises(PerdureError, match=said):
            planned(["finetune"], ["mini-mtil"], values, orders=2).cells(tmp_path)
    with pytest.raises(PerdureError, match="Did you mean 'finetune'"):
        planned(["finetun"], ["mini-mtil"]).cells(tmp_path)
    with pytest.raises(PerdureError, match="the setting finetune-mini-mtil twice"):
        planned(["finetune", "finetune"], ["mini-mtil"]).cells(tmp_path)
    with pytest.raises(PerdureError, match="holds no sweep"):
        Plan.read(tmp_path)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(PerdureError, match="exists and is no sweep"):
        check_out(tmp_path)


def test_files_are_named_by_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").touch()
    for name in ("finetune", "mini-mtil", "photos"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    asked = planned(["mine.py:prompt", "mine.py", "finetune"], ["mini-mtil", "photos/", "hf:some/one"])
    assert asked.methods == (f"{tmp_path}/mine.py:prompt", f"{tmp_path}/mine.py", "finetune")
    assert asked.streams == ("mini-mtil", f"{tmp_path}/photos", "hf:some/one")


def test_tasks_in_another_order() -> None:
    stream = mini.multi_domain("I")
    names = [t.name for t in stream.tasks]
    drawn = tasks_reordered(stream, "1")
    assert sorted(t.name for t in drawn.tasks) == sorted(names) != [t.name for t in drawn.tasks]
    assert [t.index for t in drawn.tasks] == list(range(8)) and drawn.digest != stream.digest
    assert tasks_reordered(stream, "1").digest == drawn.digest != tasks_reordered(stream, "2").digest
    assert [t.name for t in tasks_reordered(stream, json.dumps(names[::-1])).tasks] == names[::-1]
    with pytest.raises(PerdureError, match="There is no task 'fod'. Did you mean 'food'"):
        tasks_reordered(stream, json.dumps(["fod", *names[1:]]))
    with pytest.raises(PerdureError, match="lists 1 tasks, but the stream has 8"):
        tasks_reordered(stream, '["food"]')
    with pytest.raises(PerdureError, match="class-incremental stream, whose steps follow from class_order"):
        tasks_reordered(mini.class_incremental(), "1")


# ---- where they are done


def test_runs_are_packed_onto_what_a_machine_has() -> None:
    node = {"CPU": 8.0, "GPU": 2.0}
    assert room_on(node, {"CPU": 2, "GPU": 0}) == 4 and room_on(node, {"CPU": 1, "GPU": 0.5}) == 4
    assert room_on(node, {"CPU": 0.5, "GPU": 0}) == 16 and room_on({"CPU": 8.0}, {"CPU": 1, "GPU": 1}) == 0
    said = described([node, node], {"CPU": 1, "GPU": 0.5}, 8)
    assert said == "Ray on 2 machines with 16 cores, 4 GPUs; a run takes 1 core, 0.5 GPUs: 8 at a time"


def test_without_ray_they_are_done_one_after_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    words: Words = ["sweep", "--methods", "finetune,ncm", "--streams", "mini-mtil", "--plan", "--out", tmp_path / "out"]
    assert command(monkeypatch, *words, "tasks=1") == 0
    said = capsys.readouterr().out
    assert "Ray is not installed (pip install 'perdure[ray]'): the runs are done one after another." in said
    assert "ncm-mini-mtil" in said and "2 runs: 2 waiting" in said and not (tmp_path / "out").exists()
    assert command(monkeypatch, *words, "--address", "auto") == 2
    assert "no cluster at 'auto'" in capsys.readouterr().err
    assert command(monkeypatch, "sweep", "--methods", "finetune", "--out", tmp_path) == 2
    assert "--streams missing" in capsys.readouterr().err


def test_what_dies_is_tried_again_and_what_a_person_must_put_right_is_not(tmp_path: Path) -> None:
    (cell,) = planned(["finetune"], ["mini-mtil"]).cells(tmp_path)
    run, said = Run(cell, tmp_path), list[str]()
    assert not settle(run, End(tmp_path, "killed", again=True), 1, said.append) and run.state == "waiting"
    assert settle(run, End(tmp_path, "killed", again=True), 1, said.append) and run.state == "failed"
    assert said == ["finetune-mini-mtil: failed (killed); it is tried again.", "finetune-mini-mtil: failed: killed"]
    other = Run(cell, tmp_path)
    assert settle(other, End(tmp_path, "lr is too large"), 1, said.append) and other.state == "failed"


@pytest.mark.slow
def test_killed_and_gone_on_with_in_turn(tmp_path: Path) -> None:
    """Two settings, the second of which diverges; the sweep is killed for real in it, and then does not repeat the first."""
    out = tmp_path / "sweep"
    words: Words = ["--methods", "finetune", "--streams", "mini-mtil", *BRIEF, "lr=1e-4,1e30", "--in-turn"]
    process = start("sweep", *words, "--out", out)
    good, bad = out / "finetune-mini-mtil-lr=1e-4", out / "finetune-mini-mtil-lr=1e30"
    wait_for(lambda: list(bad.glob("task_00*")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in good.rglob("*") if path.is_file()}
    again = start("sweep", "--out", out, "--in-turn")
    said, wrong = again.communicate()
    assert again.returncode == 2 and "1 of 2 runs failed; the others are kept." in wrong
    assert "finetune-mini-mtil-lr=1e30: Training on" in wrong and "tried again" not in said
    assert "2 runs: 1 finished, 1 waiting" in said and "finetune, lr=1e-4" in said and (out / "report.html").exists()
    assert before == {path: path.stat().st_mtime_ns for path in before}  # a finished run is not touched
    asked: dict[str, Any] = dict(word.split("=") for word in BRIEF)
    perdure.run("finetune", "mini-mtil", tmp_path / "run", lr=1e-4, **asked)
    assert_same_run(good, tmp_path / "run")


@pytest.mark.slow
def test_on_ray_a_worker_is_killed_for_real(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    words: Words = ["--methods", "finetune", "--streams", "mini-mtil", *BRIEF, "iterations=12", "threads=1"]
    words.remove("iterations=4")
    process = start("sweep", *words, "--seeds", "2", "--cores", "2", "--report-to", "csv", "--out", out)
    folder = out / "finetune-mini-mtil" / "seed_1"
    wait_for(lambda: (folder / MARK).exists() and list(folder.glob("task_00*")), process)
    os.kill(json.loads((folder / MARK).read_text())["pid"], signal.SIGKILL)
    said, wrong = process.communicate()
    assert process.returncode == 0, said + wrong
    assert "2 cores, 0 GPUs; a run takes 1 core, 0 GPUs: 2 at a time" in said
    assert "finetune-mini-mtil, seed 1: failed (its worker was killed); it is tried again." in said
    assert "finetune (2 seeds)" in said and (out / "report.html").exists() and (folder / "track.csv").exists()
    alone: dict[str, Any] = dict(word.split("=") for word in map(str, words) if "=" in word)
    perdure.run("finetune", "mini-mtil", tmp_path / "run", seed=1, **alone)
    assert_same_run(folder, tmp_path / "run")
    assert json.loads((folder.parent / "metrics.json").read_text())["seed"] == [0, 1]


@pytest.mark.slow
def test_a_process_is_heard_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = InTurn()
    place.start(tmp_path / "nowhere")
    assert place.ended(0.0) == []  # it takes its time
    end = ended(place)
    assert "is not there. All machines of a cluster must see" in end.said and not end.again
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    place.start(tmp_path)
    assert ended(place) == End(tmp_path, "its process ended with 1", again=True)
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\necho 'warnings.warn(' >&2\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    place.start(tmp_path)
    assert ended(place) == End(tmp_path, "its process was ended by SIGKILL", again=True)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["--in-turn", "--cores"])
def test_asked_to_stop_its_runs_save_what_they_are_at(tmp_path: Path, where: str) -> None:
    out = tmp_path / "sweep"
    words: Words = ["--methods", "finetune", "--streams", "mini-mtil", *BRIEF, "iterations=4000", "threads=1"]
    words.remove("iterations=4")
    process = start("sweep", *words, where, *(["1"] if where == "--cores" else []), "--retries", "3", "--out", out)
    folder = out / "finetune-mini-mtil"
    wait_for(lambda: list(folder.glob("task_00*")), process)
    time.sleep(2)  # in the first task
    process.send_signal(signal.SIGTERM)
    said, wrong = process.communicate()
    assert process.returncode == 143 and "Stopped. Every task that was finished is kept." in said, said + wrong
    assert list(folder.glob("begun_*/state.json")) and not (folder / MARK).exists()
    assert Plan.read(out).how == {"retries": 3, **({"in_turn": True} if where == "--in-turn" else {"cores": 1})}


@pytest.mark.slow
def test_what_is_refused_replaces_no_plan_and_what_is_added_renames_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    words: Words = ["sweep", "--methods", "ncm", "--streams", "mini-mtil", "--in-turn", "--out", out, "images=8"]
    assert command(monkeypatch, *words, "tasks=1") == 0
    before = (out / "sweep.json").read_text()
    assert command(monkeypatch, *words, "tasks=2", "--seeds", "2") == 2  # into the folder of one seed
    assert (out / "sweep.json").read_text() == before
    capsys.readouterr()
    assert command(monkeypatch, *words, "tasks=1,2") == 0
    said = capsys.readouterr().out
    assert "2 runs: 1 finished, 1 waiting" in said and "earlier plans" not in said
    assert sorted(p.name for p in out.glob("ncm*")) == ["ncm-mini-mtil", "ncm-mini-mtil-tasks=2"]
    assert command(monkeypatch, *words, "tasks=2") == 0
    said = capsys.readouterr().out
    assert (
        "1 run: 1 finished" in said
        and "Of earlier plans, and left as they are, out of the report: ncm-mini-mtil." in said
    )


def test_a_run_takes_something(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, gpus, said in (
        (0, 0, "takes nothing"),
        (1e-5, None, "--cpus 1e-05"),
        (1, 1.5, "--gpus 1.5: give a whole"),
    ):
        with pytest.raises(PerdureError, match=said):
            OnRay("", cpus, gpus)


def ended(place: InTurn) -> End:
    while not (found := place.ended(0.1)):
        pass
    return found[0]
