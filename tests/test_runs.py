"""Runs survive: a process killed for real, damaged files, full disks, folders that are taken."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT, same_bits
from safetensors.torch import load_file

import perdure
from perdure import launch
from perdure.core.errors import PerdureError
from perdure.core.state import only_one, write_bytes
from perdure.engine.watcher import Watcher

Run = Callable[..., dict[str, Any]]
WORDS = [f"{k}={v}" for k, v in SHORT.items()]


def start(*words: str | Path, **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "perdure.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def command(*words: str | Path, **options: Any) -> tuple[int, str, str]:
    process = start(*words, **options)
    out, err = process.communicate()
    return process.returncode, out, err


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions: figures and losses, not times and memory."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        k: v for k, v in metrics.items() if k not in ("seconds", "seconds_by_task", "peak_memory_mb", "environment")
    }


def assert_same_run(a: Path, b: Path) -> None:
    assert outcome(a) == outcome(b)
    files = sorted(p.relative_to(a) for p in a.rglob("*.safetensors") if "damaged" not in str(p))
    assert files == sorted(p.relative_to(b) for p in b.rglob("*.safetensors") if "damaged" not in str(p))
    for file in files:
        assert same_bits(load_file(a / file), load_file(b / file)), file


@pytest.mark.slow
@pytest.mark.parametrize("method", ["finetune", "condu+mg_clip", "gift synthetic=12 sampling_steps=2 sampling_batch=4"])
def test_killed_at_random_moments_ends_with_the_same_bits(method: str, tmp_path: Path) -> None:
    """A real process of a kind each: one model, experts fused under a head, synthetic pictures. Every method is ended inside
    its tasks by tests/test_inside.py."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    name, *more = method.split()
    words = [w for w in WORDS if not w.startswith("iterations")]
    begin: list[str | Path] = ["run", "--method", name, "--stream", "mini-mtil", *words, *more, "iterations=25"]
    assert command(*begin, "--out", whole)[0] == 0
    random.seed(method)
    kills = 0
    process = start(*begin, "--out", broken)
    while process.poll() is None and kills < 3:
        before = len(list(broken.glob("task_*")))
        while process.poll() is None and len(list(broken.glob("task_*"))) <= before:
            time.sleep(0.01)
        time.sleep(random.random() * 0.8)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            process = start("resume", broken)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert kills >= 1
    assert_same_run(whole, broken)


@pytest.mark.slow
def test_ctrl_c_stops_tidily_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("run", "--method", "finetune", "--stream", "mini-mtil", "tasks=2", "--out", folder)
    while not (folder / "task_00_before").exists():
        time.sleep(0.02)
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert f"perdure resume {folder}" in out and "Traceback" not in out + err
    assert not list(folder.glob(".task*"))


@pytest.mark.slow
def test_a_full_disk_costs_no_finished_task(tmp_path: Path) -> None:
    """Files are limited to 6 MB: the hits of row 0 fit, the weights of task 1 do not."""
    folder = tmp_path / "run"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000))

    words: list[str | Path] = ["run", "--method", "finetune", "--stream", "mini-mtil", *WORDS, "--out", folder]
    code, out, err = command(*words, preexec_fn=limit)
    assert code == 2 and "Error:" in err and "Traceback" not in err and "resume" in err
    assert [p.name for p in sorted(folder.glob("task_*"))] == ["task_00_before"]
    assert not list(folder.glob(".*writing"))
    assert command("resume", folder)[0] == 0
    assert outcome(folder)["finished"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


class Ear(Watcher):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def warn(self, text: str) -> None:
        self.heard.append(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("task_02_digits/weights.safetensors", lambda b: b[: len(b) // 2]),
        ("task_02_digits/hits.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        ("task_02_digits/state.json", lambda b: b.replace(b'"number": 2', b'"number": 7')),
        ("task_02_digits/state.json", lambda b: b"{"),
    ],
)
def test_a_damaged_file_is_named_and_the_last_good_task_used(
    short_run: Run, file: str, spoil: Callable[[bytes], bytes]
) -> None:
    folder = short_run("finetune")["folder"]
    before = outcome(folder)
    (folder / file).write_bytes(spoil((folder / file).read_bytes()))
    if "weights" in file:  # matters for going on only while it is the last
        for later in folder.glob("task_03*"):
            later.rename(folder / "elsewhere")
    ear = Ear()
    perdure.resume(folder, ear)
    assert file in ear.heard[0] and "after task_01_animals" in ear.heard[0]
    assert list(folder.glob("damaged_task_02_digits"))  # kept, not deleted
    assert outcome(folder) == before


@pytest.mark.slow
def test_an_expert_that_is_missing_sends_the_run_back_to_before_it(short_run: Run) -> None:
    folder = short_run("individual")["folder"]
    before = outcome(folder)
    (folder / "task_02_digits" / "expert_digits.safetensors").unlink()
    ear = Ear()
    perdure.resume(folder, ear)
    assert "expert_digits.safetensors is missing" in ear.heard[0]
    assert outcome(folder) == before


@pytest.mark.slow
def test_a_finished_run_is_left_alone(short_run: Run, tmp_path: Path) -> None:
    m = short_run("finetune")
    folder, before = m["folder"], outcome(m["folder"])
    stamp = (folder / "task_03_food" / "state.json").stat().st_mtime_ns
    with pytest.raises(PerdureError, match="finished.*--overwrite"):
        perdure.run("finetune", "mini-mtil", folder, **SHORT)
    with pytest.raises(PerdureError, match=r"another configuration \(it differs in lr, seed\)"):
        perdure.run("finetune", "mini-mtil", folder, seed=1, **{**SHORT, "lr": 0.5})
    assert perdure.resume(folder)["last"] == m["last"]
    assert outcome(folder) == before and (folder / "task_03_food" / "state.json").stat().st_mtime_ns == stamp
    again = perdure.run("finetune", "mini-mtil", folder, overwrite=True, **{**SHORT, "iterations": 1})
    assert again["finished"] and outcome(folder) != before


@pytest.mark.slow
def test_overwriting_leaves_what_perdure_did_not_write(short_run: Run) -> None:
    folder = short_run("finetune")["folder"]
    (folder / "notes.txt").write_text("mine")
    (folder / "task_notes").mkdir()
    perdure.run("zero_shot", "mini-mtil", folder, overwrite=True, **SHORT)
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "task_notes").is_dir()
    assert outcome(folder)["method"] == "zero_shot"


@pytest.mark.slow
def test_a_run_killed_before_its_metrics_were_written_writes_them(short_run: Run) -> None:
    folder = short_run("finetune")["folder"]
    before = outcome(folder)
    (folder / "metrics.json").unlink()
    perdure.resume(folder)
    assert outcome(folder) == before


def test_a_changed_configuration_is_noticed(short_run: Run) -> None:
    folder = short_run("finetune")["folder"]
    config = json.loads((folder / "config.json").read_text())
    config["options"]["lr"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PerdureError, match="was changed after"):
        perdure.resume(folder)


def test_a_configuration_that_lacks_something_is_named(short_run: Run) -> None:
    folder = short_run("finetune")["folder"]
    config = json.loads((folder / "config.json").read_text())
    del config["weights"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PerdureError, match="lacks weights"):
        perdure.resume(folder)


def test_several_seeds_are_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "seeds"
    launch.begin("zero_shot", "mini-mtil", folder, seeds=2, assignments=SHORT)
    assert launch.seed_folders(folder) == [folder / "seed_0", folder / "seed_1"]
    with pytest.raises(PerdureError, match="other seeds .seed_0"):
        launch.begin("zero_shot", "mini-mtil", folder, seed=1, seeds=2, assignments=SHORT)
    with pytest.raises(PerdureError, match="very run, unfinished"):
        launch.begin("zero_shot", "mini-mtil", folder, seeds=2, assignments=SHORT)
    with pytest.raises(PerdureError, match="several seeds"):
        launch.begin("zero_shot", "mini-mtil", folder, assignments=SHORT)


def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(PerdureError, match="is not a run"):
            perdure.run("finetune", "mini-mtil", tmp_path, overwrite=overwrite, **SHORT)
    with pytest.raises(PerdureError, match="holds no run"):
        perdure.resume(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_run_of_another_split_is_not_resumed(short_run: Run) -> None:
    folder = short_run("finetune")["folder"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "split": "another"}))
    with pytest.raises(PerdureError, match="split differs"):
        perdure.resume(folder)


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(PerdureError, match="another process"), only_one(tmp_path):
        pass
    with only_one(tmp_path):  # freed again
        pass


@pytest.mark.slow
def test_metrics_file_holds_what_others_read(short_run: Run) -> None:
    m = json.loads((short_run("finetune", seed=3)["folder"] / "metrics.json").read_text())
    assert m["method"] == "finetune" and m["stream"] == "mini-mtil" and m["seed"] == 3
    assert m["tasks"] == ["animals", "digits", "food"]
    assert len(m["accuracy"]) == len(m["probe"]) == 4 and all(0 <= x <= 100 for row in m["accuracy"] for x in row)
    for name in ("transfer", "average", "last", "forgetting", "seconds", "peak_memory_mb"):
        assert isinstance(m[name], float), name
    for name in ("transfer", "average", "last", "forgetting"):
        low, high = m["intervals"][name]
        assert low <= m[name] <= high
    assert m["protocol"] == {"labels": "task", "task_id": "known"} and m["finished"]


@pytest.mark.slow
def test_class_incremental_accuracy_is_over_all_images_seen(short_run: Run) -> None:
    m = short_run("finetune", "mini-cil", lr=5e-4)
    sizes = [SHORT["images"]] * 3
    for i in range(1, 4):
        row = m["accuracy"][i][:i]
        assert m["incremental"][i - 1] == pytest.approx(
            sum(a * n for a, n in zip(row, sizes, strict=False)) / sum(sizes[:i])
        )
    assert m["incremental_last"] == m["incremental"][-1]
    assert m["incremental_average"] == pytest.approx(sum(m["incremental"]) / 3)


@pytest.mark.slow
def test_over_seeds(short_run: Run) -> None:
    runs = [short_run("finetune", seed=s) for s in (0, 1)]
    mean = launch.over_seeds(runs)
    assert mean["seed"] == [0, 1] and len(mean["runs"]) == 2
    assert mean["last"] == pytest.approx((runs[0]["last"] + runs[1]["last"]) / 2)
    assert mean["accuracy"][3][0] == pytest.approx((runs[0]["accuracy"][3][0] + runs[1]["accuracy"][3][0]) / 2)
    low, high = mean["intervals"]["last"]
    assert low == pytest.approx(min(r["last"] for r in runs), abs=0.01)
    assert high == pytest.approx(max(r["last"] for r in runs), abs=0.01)
    assert runs[0]["losses"] != runs[1]["losses"]
