"""Every file operation of a save fails once, and once is the last; full, damaged and read-only places; signals."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, same_bits
from faults import SHORT as SHORTEST
from faults import Faults, Killed, Mode, done, outcome, same, tried
from safetensors.torch import save
from test_runs import command, start
from torch import Tensor, nn
from typer.testing import CliRunner

import perdure
from perdure import launch
from perdure.cli import app
from perdure.core import stopping
from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.packing import Frozen
from perdure.core.seeding import random_states, reseed, set_random_states
from perdure.core.tensors import TYPES, Stored, read_tensors, stored, write_tensors
from perdure.data.task import Batch
from perdure.engine.checkpoint import Saved, folder_names, good_tasks, save_task
from perdure.engine.steps import Every, Steps
from perdure.engine.watcher import Watcher
from perdure.methods.base import Method, State
from perdure.training.fit import Backward, Losses, Stepper, optimise
from perdure.training.schedule import Schedule

CPU = torch.device("cpu")


@pytest.fixture
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for: what is tried is the order of operations."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# ---- saves inside a task


class Toy(Stepper):
    """A layer under dropout, whose steps count; ``ends``: the step at which the process ends."""

    def __init__(self, ends: int = 0):
        torch.manual_seed(1)
        self.layer, self.mean, self.taken, self.ends = nn.Linear(3, 2), torch.zeros(2), 0, ends

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {f"layer/{name}": parameter for name, parameter in self.layer.named_parameters()}

    def step(self, batch: Batch, backward: Backward) -> None:
        self.taken += 1
        if self.taken == self.ends:
            raise Killed
        out = nn.functional.dropout(self.layer(batch.images), 0.5)
        backward(fit=out.square().mean(), **({"odd": out.sum() * 0.1} if self.taken % 2 else {}))

    def stepped(self, step: int) -> None:
        self.mean = self.mean + self.layer.bias.detach() / step

    def pack_progress(self) -> Any:
        return {"mean": {"mean": self.mean}}, {"taken": self.taken}

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        self.mean, self.taken = files["mean"]["mean"], values["taken"]


def batches() -> Iterator[Batch]:
    draw = torch.Generator().manual_seed(2)
    while True:
        yield Batch(torch.randn(4, 3, generator=draw), torch.zeros(4, dtype=torch.int64))


class Counting(Toy):
    """Hands over a list that lives on."""

    def __init__(self, ends: int = 0):
        super().__init__(ends)
        self.seen: list[int] = []

    def stepped(self, step: int) -> None:
        super().stepped(step)
        self.seen.append(step)

    def pack_progress(self) -> Any:
        files, values = super().pack_progress()
        return files, {**values, "seen": self.seen}

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_progress(files, values)
        self.seen = values["seen"]


def life(folder: Path, ends: int = 0, every: str = "2", steps: int = 7) -> tuple[Toy, Losses, list[str]]:
    """A process that trains the toy, or goes on with it."""
    heard: list[str] = []
    reseed(5, "toy")
    kept, learner, draws = (
        Steps(folder, "task_01_toy", ("id",), "before", Every.read(every), heard.append),
        Toy(ends),
        batches(),
    )
    saver = kept.training("toy")
    for _ in range(saver.begin(learner)):
        next(draws)
    losses = optimise(learner, Schedule(steps, 0.1, 2, 4), draws, CPU, saver=saver)
    kept.done()
    return learner, losses, heard


def alike(a: tuple[Toy, Losses, list[str]], b: tuple[Toy, Losses, list[str]]) -> bool:
    mine, theirs = ({**one[0].layer.state_dict(), "mean": one[0].mean} for one in (a, b))
    return same_bits(mine, theirs) and a[1] == b[1] and list(a[1]) == list(b[1]) and a[1].steps == b[1].steps


@pytest.mark.parametrize("mode", ["fails", "ends"])
def test_each_file_operation_of_a_save_inside_a_task_may_fail_or_be_the_last(
    mode: Mode, tmp_path: Path, no_disk: None
) -> None:
    whole, seen = life(tmp_path, every="never"), 0
    for number in itertools.count(1):
        faults = Faults(tmp_path, number, mode)
        with faults.met(), pytest.raises(Killed):
            life(tmp_path, ends=6)
        again = life(tmp_path)
        assert alike(again, whole), number
        assert not list(tmp_path.iterdir())
        if len(faults.seen) < number:
            break
        seen = number
    assert seen > 20


def test_what_was_saved_is_not_trained_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        life(tmp_path, ends=6)
    (only,) = tmp_path.glob("begun_task_01_toy/*.safetensors")
    assert "step_000004" in only.name  # the save before it is gone
    learner = Toy()
    found = Steps(tmp_path, "task_01_toy", ("id",), "before", Every(), print).training("toy").begin(learner)
    assert found == 4 and learner.taken == 4


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("*.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 64]), "checksum"),
        ("*.safetensors", lambda b: b[: len(b) // 2], "damaged"),
        ("*.safetensors", lambda b: b[:5], "damaged"),
        ("*.safetensors", lambda b: b"\xff" * 8 + b[8:], "damaged"),
        ("*.safetensors", None, "missing"),
        ("state.json", lambda b: b.replace(b'"last": false', b'"last": true'), "not what was written"),
        ("state.json", lambda b: b[:-40], "Set aside as damaged_begun_task_01_toy. The task begins anew"),
    ],
)
def test_a_damaged_save_is_named_and_the_training_begins_anew(
    name: str, spoil: Callable[[bytes], bytes] | None, said: str, tmp_path: Path
) -> None:
    whole = life(tmp_path, every="never")
    with pytest.raises(Killed):
        life(tmp_path, ends=6)
    (file,) = tmp_path.glob(f"begun_*/{name}")
    if spoil is None:
        file.unlink()
    else:
        file.write_bytes(spoil(file.read_bytes()))
    again = life(tmp_path)
    assert alike(again, whole) and len(again[2]) == 1 and said in again[2][0] and file.name in again[2][0]


def test_a_save_of_another_beginning_is_of_no_use_and_one_of_another_configuration_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        life(tmp_path, ends=6)
    with pytest.raises(PerdureError, match="config.json was changed after begun_task_01_toy was saved"):
        Steps(tmp_path, "task_01_toy", ("other",), "before", Every(), print)
    assert Steps(tmp_path, "task_01_toy", ("x", "id"), "otherwise", Every(), print).training("toy").begin(Toy()) == 0
    assert not list(tmp_path.iterdir())


def test_a_clock_that_is_set_back_delays_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: -1e9)
    with pytest.raises(Killed):
        life(tmp_path, ends=4, every="0.000001s")
    assert list(tmp_path.glob("begun_*/*_step_000003.safetensors"))


@pytest.mark.parametrize("text", ["0", "-3", "10 minutes", "1.5", "often", "0s", ""])
def test_how_often_is_said_in_steps_or_time(text: str, tmp_path: Path) -> None:
    assert (
        Every.read("500") == Every(500) and Every.read("10min") == Every(0, 600) and Every.read("1.5h").seconds == 5400
    )
    with pytest.raises(PerdureError, match="save_every=.*steps as 500, a time as 10min, 30s or 2h, or never"):
        launch.begin("finetune", "mini-mtil", tmp_path / "run", assignments={**SHORT, "save_every": text})
    assert not (tmp_path / "run").exists()


def test_random_numbers_go_on_where_they_were() -> None:
    import random

    import numpy as np

    def some() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]

    reseed(1, "x")
    some()
    states = random_states()
    first = some()
    reseed(2, "y")
    set_random_states(states)
    assert some() == first


# ---- saves of a task


@dataclass
class Two(State):
    moves: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Holder(Method):
    """Holds a state, and no weights."""

    State = Two
    carries_weights = False

    def __init__(self, number: int):
        super().__init__()
        self.state = Two(
            {"t": torch.full((3,), float(number))}, {"a": Frozen(t=torch.ones(2)), "b": {"t": torch.zeros(number)}}
        )

    def keep(self, run: Path, number: int, kept: dict[str, Any]) -> dict[str, Any]:
        name, hits = folder_names(["one", "two"])[number], {"one": torch.tensor([number], dtype=torch.uint8)}
        return save_task(run, name, self, hits, {"task": name, "config": "id", "number": number}, kept)


@pytest.mark.parametrize("mode", ["fails", "ends"])
def test_each_file_operation_of_a_tasks_save_may_fail_or_be_the_last(mode: Mode, tmp_path: Path, no_disk: None) -> None:
    heard: list[str] = []

    def course(run: Path) -> list[Saved]:
        return good_tasks(run, ["one", "two"], heard.append)

    for at in itertools.count(1):
        run = tmp_path / str(at)
        run.mkdir()
        kept = Holder(1).keep(run, 0, {})["files"]
        faults = Faults(run, at, mode)
        try:
            with faults.met():
                Holder(2).keep(run, 1, kept)
        except (OSError, Killed):
            pass
        else:
            break
        found = course(run)
        if len(found) == 1:  # as it was before; or as it is after
            Holder(2).keep(run, 1, kept)
            found = course(run)
        assert [saved.record["number"] for saved in found] == [0, 1] and not heard
        assert found[1].files["state"]["moves/t"].tolist() == [2.0] * 3 and len(found[1].files["parts/b"]["t"]) == 2
        assert found[1].record["files"]["parts/a"]["path"].startswith("task_00")  # it never changes
        assert not list(run.glob(".*writing"))
    assert at > 25


# ---- tensors in files


def test_files_are_byte_by_byte_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in TYPES}
    tensors |= {'é\n\x01/"': torch.tensor(3.5), "empty": torch.zeros(0, 3), "turned": torch.arange(12.0).view(3, 4).T}
    path = tmp_path / "file"
    sha256, size = write_tensors(path, tensors)
    assert path.read_bytes() == save({name: t.contiguous() for name, t in tensors.items()}) and size == len(
        path.read_bytes()
    )
    for found in (read_tensors(path, sha256), dict(stored(path, sha256))):
        assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in tensors.items()}
        assert same_bits(found, tensors) and found["empty"].shape == (0, 3)
    assert Stored(path).shape("turned") == (torch.float32, [4, 3])
    with pytest.raises(DamagedFile, match="checksum"):
        read_tensors(path, "0" * 64)
    with pytest.raises(PerdureError, match="'odd' is of torch.complex128"):
        write_tensors(path, {"odd": torch.zeros(1, dtype=torch.complex128)})
    write_tensors(path, {})
    assert path.read_bytes() == save({})


# ---- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fails", "ends"])
def test_operations_all_along_a_run_may_fail_or_be_the_last(mode: Mode, tmp_path: Path) -> None:
    """A sample; ``python proofs/faults.py`` takes all."""
    folder = tmp_path / "run"
    whole = Faults(folder)
    assert done("finetune", folder, SHORTEST, whole) == "went on"
    expected, became = outcome(folder), set()
    for number in range(3 if mode == "fails" else 17, len(whole.seen), len(whole.seen) // 4):
        what, right = tried("finetune", folder, SHORTEST, Faults(folder, number, mode), expected)
        assert right, (number, whole.seen[number - 1])
        became.add(what)
    assert became <= {"refused", "went on"} if mode == "fails" else became == {"ended"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_inside_a_task_stops_nothing_and_one_that_is_full_after_it_says_so(
    small_disk: Path, tmp_path: Path
) -> None:
    """The weights take 13 MB: they fit, its optimiser beside them does not."""
    values = {**SHORTEST, "tasks": 2, "save_every": "1"}
    assert done("finetune", tmp_path / "whole", values, Faults(tmp_path / "whole")) == "went on"
    heard: list[str] = []

    class Ear(Watcher):
        def warn(self, text: str) -> None:
            heard.append(text)

    folder = small_disk / "run"
    launch.begin("finetune", "mini-mtil", folder, assignments=values)
    with pytest.raises(OSError, match="No space left"):
        perdure.resume(folder, Ear())
    assert any("could not be saved at step 1 of animals (No space left" in text for text in heard)
    assert [p.name for p in sorted(folder.glob("task_*"))] == ["task_00_before", "task_01_animals"]
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    perdure.resume(folder, Ear())
    assert same(outcome(folder), outcome(tmp_path / "whole"))


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(small_disk: Path) -> None:
    folder = small_disk / "run"
    launch.begin("ncm", "mini-mtil", folder, assignments={"tasks": 1, "images": 4})
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, _, err = command("resume", folder)
    assert code == 2 and "Read-only file system" in err and str(folder) in err and "Traceback" not in err


# ---- signals


def test_a_signal_waits_for_what_is_held_and_no_longer() -> None:
    def kill(number: int = signal.SIGTERM) -> None:
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(stopping.Stopped) as stop, stopping.listening():
        kill(signal.SIGINT)
    assert stop.value.code == 130
    with stopping.listening():
        with pytest.raises(stopping.Stopped) as stop, stopping.held():
            kill()
            assert stopping.asked() == signal.SIGTERM
        assert stop.value.code == 143
    with stopping.listening(), pytest.raises(stopping.Stopped), stopping.held():
        kill()
        kill()  # a second one does not wait
        raise AssertionError
    assert signal.getsignal(signal.SIGTERM) == before and not stopping.asked()


def test_a_step_that_does_not_end_is_broken_off_and_a_save_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "GRACE", 0.05)
    with stopping.listening(), pytest.raises(stopping.Stopped), stopping.held(working=True):
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(0.01)
    ended = False
    with stopping.listening(), pytest.raises(stopping.Stopped), stopping.held(working=True):
        with stopping.held():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            ended = True
        stopping.alarm(0.01)
        time.sleep(5)
    assert ended


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_inside_a_task_saves_it_and_a_scheduler_goes_on(number: int, code: int, tmp_path: Path) -> None:
    words = ["tasks=1", "images=24", "batch_size=8", "iterations=60", "warmup=1", "precision=fp32", "save_every=never"]
    folder = tmp_path / "run"
    asked = ["run", "--method", "finetune", "--stream", "mini-mtil", *words, "--resume", "--out", str(folder)]
    process = start(*asked)
    while not (folder / "task_00_before").exists():
        time.sleep(0.02)
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code and "Traceback" not in out + err, err
    assert "up to step" in out and out.count(f"Go on with: perdure resume {folder}") == 1
    assert len(list(folder.glob("begun_task_01_animals/*.safetensors"))) == 1
    if number == signal.SIGINT:
        return
    found = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert found.exit_code == 0 and "Report:" in found.output
    found = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert (
        found.exit_code == 0
        and f"{folder} holds this very run, done." in found.output
        and "Report:" not in found.output
    )
    launch.begin("finetune", "mini-mtil", tmp_path / "whole", assignments=words)
    perdure.resume(tmp_path / "whole")
    assert same(outcome(folder), outcome(tmp_path / "whole"))


def test_a_save_stays_as_it_was_when_a_later_training_is_saved(tmp_path: Path) -> None:
    kept, learner = Steps(tmp_path, "task_01_toy", ("id",), "before", Every(steps=2), print), Counting()
    for name in ("toy", "head"):
        saver = kept.training(name)
        saver.begin(learner)
        optimise(learner, Schedule(4, 0.1, 0, 4), batches(), CPU, saver=saver)
    found, again = Counting(), Steps(tmp_path, "task_01_toy", ("id",), "before", Every(), print)
    assert again.training("toy").begin(found) == 4 and found.seen == [1, 2, 3, 4]
    assert again.training("head").begin(found) == 4 and found.seen == [1, 2, 3, 4] * 2
