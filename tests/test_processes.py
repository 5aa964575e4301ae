"""Several processes share a run: the losses, the state and the files of one. Most are threads that take turns."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import scaling
import several
import torch
import trees
from test_resumed import outcome
from test_scale import OWN, ROUNDING, far, step
from together import Together
from torch import Tensor, nn

import perdure
from perdure import launch
from perdure.core import meeting, processes, stopping
from perdure.core.errors import PerdureError
from perdure.core.processes import Membership
from perdure.data.files import Files, Joined
from perdure.data.task import Batch, Class, Images, Stream, Task
from perdure.engine import alike
from perdure.engine.watcher import Watcher
from perdure.models.clip import CLIP
from perdure.models.shared import shared
from perdure.training.fit import Stepper, drawn, fit, optimise
from perdure.training.processes import averaged, whole
from perdure.training.schedule import Schedule


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Together]:
    return lambda count: Together(count, monkeypatch)


# ---- one global order, sliced by rank


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_thing_is_one_process_s_and_shares_are_even(count: int) -> None:
    for total in range(12):
        own = [processes.rows(total, Membership(rank, count)) for rank in range(count)]
        assert [k for part in own for k in range(total)[part]] == list(range(total))
        sizes = [part.stop - part.start for part in own]
        assert max(sizes) - min(sizes) <= 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A task of 11 pictures in files, none square."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = tuple(folder / f"{k}.jpg" for k in range(11))
    for k, path in enumerate(paths):
        trees.jpeg(path, k, (40 + k, 30))
    images = Images(Files(paths, 16), torch.arange(11) % 2)
    return Task("pictures", (Class("a", ("{}",)), Class("b", ("{}",))), images, images)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_of_samples_is_the_same_for_any_number_of_processes_and_workers(
    workers: int, augment: bool, pictures: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process reads its rows of the batches that one would read; without starting any."""
    plan = Schedule(9, 0.1, 0, batch_size=4, augment=augment)

    def read(rank: int, count: int) -> list[tuple[Tensor, Tensor]]:
        monkeypatch.setattr(processes, "here", Membership(rank, count))
        draws = drawn(pictures, plan, torch.Generator().manual_seed(3), 16, workers)
        return [(batch.index, batch.images) for batch in itertools.islice(draws, 9)]

    alone = read(0, 1)
    assert sorted(torch.cat([index for index, _ in alone[:3]]).tolist()) == list(range(11))
    for count in (2, 3, 4):
        parts = [read(rank, count) for rank in range(count)]
        for k, (index, images) in enumerate(alone):
            assert all(torch.equal(part[k][0], index) for part in parts)
            own = [processes.rows(len(index), Membership(rank, count)) for rank in range(count)]
            seen = [part[k][1][: rows.stop - rows.start] for part, rows in zip(parts, own, strict=True)]
            assert torch.equal(torch.cat(seen), images)
            assert max(len(part[k][1]) for part in parts) == -(-len(index) // count)  # no more is read than that


def test_a_stretch_of_joined_images_is_that_of_the_whole(pictures: Task) -> None:
    both = Joined((pictures.train.pixels, torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))))
    for first, last in ((0, 16), (3, 9), (9, 13), (12, 16), (4, 4)):
        assert torch.equal(both.select(slice(first, last))[:], both[first:last][:] if first < last else both[0:0])


# ---- towers and gradients


class Two(Stepper):
    """A tower of one layer, and one behind it, of what the first makes of the whole batch; a weight after both."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.weights = {
            name: nn.Parameter(torch.randn(4, 4, generator=draw)) for name in ("first", "second", "after", "idle")
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.weights

    def step(self, batch: Batch, backward: Any) -> None:
        w = self.weights
        x = shared(lambda some: torch.tanh(some @ w["first"]), batch.images)
        y = shared(lambda some: torch.tanh(some @ w["second"]), x * x.mean(0))
        among = x @ w["after"] @ y.T  # a matrix over the batch
        self.found = backward(matrix=among.log_softmax(1).diagonal().square().mean())
        backward(also=(w["after"] * y.detach().sum(0)).sin().mean())


@pytest.mark.parametrize(("count", "size"), [(2, 5), (3, 7), (3, 2)])
def test_gradients_are_those_of_the_whole_batch(count: int, size: int, together: Callable[[int], Together]) -> None:
    """Towers behind towers, weights after them, rows that are uneven, fewer rows than processes."""

    def learn(_: int = 0) -> tuple[Any, dict[str, Tensor | None], dict[str, nn.Parameter]]:
        learner, draw = Two(), torch.Generator().manual_seed(2)
        draws = (Batch(torch.randn(size, 4, generator=draw), torch.zeros(size)) for _ in range(3))
        losses = optimise(learner, Schedule(3, 0.1, 0, size, optimizer="sgd"), draws, torch.device("cpu"))
        return losses, learner.found, learner.weights

    losses, found, weights = learn()
    for own, own_found, own_weights in together(count).run(learn):
        assert own.keys() == losses.keys()
        assert all(own[name] == pytest.approx(losses[name], rel=1e-5) for name in losses)
        assert own_found["idle"] is None
        for name in ("first", "second", "after"):
            torch.testing.assert_close(own_found[name], found[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(own_weights[name], weights[name], rtol=1e-5, atol=1e-6)


def test_gradients_that_are_one_tensor_are_not_summed_twice(together: Callable[[int], Together]) -> None:
    def mean(rank: int) -> list[Tensor | None]:
        one = torch.full((3,), float(rank))
        return averaged([one, None, one, one.double()])

    for found in together(3).run(mean):
        assert found[1] is None
        assert [g.tolist() for g in found if g is not None] == [[1.0] * 3] * 3


def test_a_batch_from_files_is_put_together(together: Callable[[int], Together], pictures: Task) -> None:
    plan = Schedule(9, 0.1, 0, batch_size=4)

    def read(_: int = 0) -> list[Tensor]:
        draws = drawn(pictures, plan, torch.Generator().manual_seed(3), 16)
        return [whole(batch, torch.device("cpu")).images for batch in itertools.islice(draws, 3)]

    alone = read()
    for own in together(2).run(read):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(own, alone, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "gift", "codyra", OWN])
def test_a_step_of_three_has_the_losses_and_gradients_of_one(
    name: str, clip: CLIP, stream: Stream, together: Callable[[int], Together]
) -> None:
    """8 images to 3 processes; GIFT's matrices over 11 pairs, and F by the gradient of all."""
    alone = step(clip, stream, name)
    for own in together(3).run(lambda _: step(clip, stream, name)):
        assert far(own, alone) < ROUNDING.get(name, 2e-6)
        assert own[2] < alone[2] / 2  # activations: the towers are shared out


# ---- whole runs

CASES: list[tuple[str, dict[str, Any]]] = [  # all methods: python proofs/several.py
    ("gift", {"tasks": 1}),
    ("mg_clip", {"tasks": 1}),
    ("keep_lora", {}),
    ("moe_adapters", {}),
    ("moe_adapters", {"routers": "one", "test_noise": True, "tasks": 1}),
    ("ridge_patches", {"tasks": 1}),
    ("slca", {"tasks": 1}),
    ("cgil", {"tasks": 1}),
]


def alike_runs(shared_out: Path, alone: Path) -> None:
    """The losses of one process to 1e-5, and its figures."""
    assert several.apart(shared_out, alone) < several.ROUNDING.get(str(outcome(alone)["method"]), several.CLOSE)
    mine, theirs = outcome(shared_out), outcome(alone)
    assert mine.keys() == theirs.keys()
    for key in mine.keys() - {"gap", "losses", "phases", "remarks"}:
        assert mine[key] == theirs[key], key


@pytest.mark.slow
@pytest.mark.parametrize(("method", "values"), CASES, ids=[f"{k}-{name}" for k, (name, _) in enumerate(CASES)])
def test_a_run_of_two_is_the_run_of_one(
    method: str, values: dict[str, Any], tmp_path: Path, together: Callable[[int], Together]
) -> None:
    asked = {**several.asked(method), **values}
    alone = perdure.run(method, "mini-mtil", tmp_path / "one", **asked)
    folder = tmp_path / "two"
    heard: list[list[str]] = [[], []]

    class Ear(Watcher):
        def __init__(self, rank: int):
            self.rank = rank

        def learns(self, task: str, number: int) -> None:
            heard[self.rank].append(task)

    found = together(2).run(lambda rank: perdure.run(method, "mini-mtil", folder, watcher=Ear(rank), **asked))
    alike_runs(folder, tmp_path / "one")
    assert found[0] == found[1] and found[0]["accuracy"] == alone["accuracy"]
    assert heard[0] and not heard[1]  # one speaks
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


# ---- what is refused, and who says so


@pytest.mark.slow
def test_who_is_waited_for_in_vain_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "JOINING", timedelta(seconds=2))
    monkeypatch.setattr(meeting, "NOTICE", 0.2)
    with pytest.raises(PerdureError, match=f"this is process 0 of 2, which meet at 127.0.0.1:{port}.*unset RANK"):
        processes.join()
    assert processes.count() == 1 and "Waiting for the others: RANK, WORLD_SIZE" in capsys.readouterr().err


def test_a_batch_that_cannot_be_shared_out_is_refused_before_anything_is_done(
    tmp_path: Path, together: Callable[[int], Together]
) -> None:
    with pytest.raises(PerdureError, match="batch_size=2: .* cannot be shared out to 3. Start 2 or fewer, or set"):
        together(3).run(lambda _: perdure.run("finetune", "mini-mtil", tmp_path / "run", batch_size=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mine", "folder", "said"),
    [
        ({"lr": 1e-4}, "run", "Process 2 was started for another run than process 0: they differ in lr"),
        ({"seed": 3}, "run", "Process 2 was started for another run than process 0: they differ in seed"),
        ({}, "elsewhere", "Process 2 was started with another folder than process 0: .*elsewhere, not .*run"),
        ({"threads": 3}, "run", ""),
    ],
)
def test_processes_of_different_runs_are_refused(
    mine: dict[str, Any], folder: str, said: str, tmp_path: Path, together: Callable[[int], Together]
) -> None:
    def check(rank: int) -> None:
        asked = {"seed": 0, **(mine if rank == 2 else {})}
        config = launch.configure("finetune", "mini-mtil", asked.pop("seed"), asked, {})[0]
        place = tmp_path / (folder if rank == 2 else "run")
        alike.check_config(place, {**config, "weights": "the same"}, launch.same_run)

    with pytest.raises(PerdureError, match=said) if said else contextlib.nullcontext():
        together(3).run(check)


@pytest.mark.slow
def test_a_process_of_another_run_is_refused_before_anything_is_written(
    tmp_path: Path, together: Callable[[int], Together]
) -> None:
    with pytest.raises(PerdureError, match="Process 1 was started for another run"):
        together(2).run(lambda rank: perdure.run("finetune", "mini-mtil", tmp_path / "run", lr=1e-4 * (1 + rank)))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_does_not_see_the_folder_is_refused(tmp_path: Path, together: Callable[[int], Together]) -> None:
    folders = [tmp_path / "disk", tmp_path / "another"]
    for folder in folders:
        folder.mkdir()
    together(2).run(lambda rank: alike.check_folder(folders[0]))
    with pytest.raises(PerdureError, match="Process 1 does not see what process 0 has written"):
        together(2).run(lambda rank: alike.check_folder(folders[rank]))
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_what_rounding_has_parted_is_the_main_process_s_again_and_more_is_refused(
    clip: CLIP, stream: Stream, together: Callable[[int], Together]
) -> None:
    def compute(rank: int) -> tuple[Tensor, Tensor, list[float]]:
        method = launch.build("ncm", {})
        method.bind(copy.deepcopy(clip))
        method.calibrate(stream.tasks[0])
        method.state.means["means"][2, 3] += drift * rank
        method.clip.trained("trained food")
        weight = method.clip.backbone.text_projection.weight
        with torch.no_grad():
            weight[3, 5] += drift * rank
        alike.settle(method, "food")
        return weight.detach(), method.state.means["means"], method.state.classes

    drift = 1e-6
    (one, means, classes), (other, others, names) = together(2).run(compute)
    assert torch.equal(one, other) and torch.equal(means, others) and classes == names
    drift = 1e3
    with pytest.raises(
        PerdureError, match="After food, process 1 holds another 'text_projection.weight' than process 0"
    ):
        together(2).run(compute)


def test_what_waits_for_a_process_that_is_gone_says_what_is_left(together: Callable[[int], Together]) -> None:
    said: list[str] = []

    def work(rank: int) -> None:
        if rank == 1:
            raise KeyboardInterrupt
        try:
            processes.total(torch.ones(2))
        except PerdureError as error:
            said.append(str(error))

    with pytest.raises(KeyboardInterrupt):
        together(2).run(work)
    assert "One of the processes of this run has ended" in said[0] and "perdure resume RUN, with any number" in said[0]


@pytest.mark.parametrize("told", [0, 1])
@pytest.mark.parametrize("images", [4, 7, 9])  # shares that are even, end alike, or have another batch
def test_where_one_is_told_to_stop_all_do_between_two_batches_of_an_evaluation(
    told: int, images: int, together: Callable[[int], Together], clip: CLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.zeros(images, 3, clip.size, clip.size, dtype=torch.uint8)
    clip.evaluation_batch = 2 if images > 4 else 1

    def work(rank: int) -> tuple[int, bool]:
        own, looked = copy.copy(clip), []

        def seen(batch: Tensor, hidden: bool = False) -> Any:
            looked.append(len(batch))
            if rank == told and len(looked) == (2 if images > 7 else 1):
                stopping.EAR.heard = signal.SIGTERM
            return clip.seen(batch, hidden)

        monkeypatch.setattr(own, "seen", seen)
        try:
            with stopping.together():
                own.features(pixels)
        except stopping.Stopped as stop:
            return len(looked), stop.together and stop.number == signal.SIGTERM
        finally:
            stopping.EAR.forget()
        return len(looked), False

    assert together(2).run(work) == [(2 if images > 7 else 1, True)] * 2


@pytest.mark.parametrize("busy", [False, True])
def test_texts_are_no_place_to_stop_in_the_midst_of_a_step(
    busy: bool, together: Callable[[int], Together], clip: CLIP
) -> None:
    def work(rank: int) -> bool:
        own = copy.copy(clip)
        own._texts = {}
        with contextlib.suppress(stopping.Stopped), stopping.together():
            stopping.EAR.heard = signal.SIGTERM if rank else 0
            try:
                with stopping.held() if busy else contextlib.nullcontext():
                    own.class_texts([["a drawing of a cat"], ["a drawing of a dog"]])
                return True
            finally:
                stopping.EAR.forget()
        return False

    assert together(2).run(work) == [busy] * 2


def test_the_first_that_fails_says_it_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        asked = 0

        def add(self, key: str, amount: int) -> int:
            self.asked += amount
            return self.asked

    store = Store()
    spoken = []
    for rank in (2, 0, 1):
        monkeypatch.setattr(processes, "here", Membership(rank, 3, store))
        spoken.append(processes.speaks())
    assert spoken == [True, False, False]


def test_the_launchers_words_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.launched({}) is None
    assert processes.launched({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert processes.launched({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == (5, 8, 1)
    mpi = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert processes.launched(mpi) == (2, 3, 0)
    assert processes.launched({"PMI_RANK": "1", "PMI_SIZE": "2"}) == (1, 2, 1)
    monkeypatch.setattr(processes, "here", Membership())
    assert processes.join() == ""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "torchrun --nproc_per_node N" in processes.join() and processes.join() == ""


# ---- real ones


def torchrun(count: int, *words: str | Path) -> subprocess.Popen[str]:
    """``perdure WORDS`` in so many processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={count}",
        "-m",
        "perdure",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def words(values: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.slow
def test_three_started_by_torchrun_write_what_one_does(tmp_path: Path) -> None:
    asked = {**several.asked("finetune"), "iterations": 4}
    perdure.run("finetune", "mini-mtil", tmp_path / "one", **asked)
    run = torchrun(
        3, "run", "--method", "finetune", "--stream", "mini-mtil", "--out", tmp_path / "three", *words(asked)
    )
    said = run.communicate()[0]
    assert run.returncode == 0, said
    assert said.count("Report:") == said.count("2/2") == 1, said  # one speaks
    alike_runs(tmp_path / "three", tmp_path / "one")


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_and_another_number_goes_on_with_it(tmp_path: Path) -> None:
    asked = {**several.asked("finetune"), "iterations": 25, "save_every": "5"}
    whole = perdure.run("finetune", "mini-mtil", tmp_path / "one", **asked)
    folder = tmp_path / "two"
    run = torchrun(2, "run", "--method", "finetune", "--stream", "mini-mtil", "--out", folder, *words(asked))
    while not list(folder.glob("begun_task_02_*/state.json")):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    workers = [p for p in psutil.Process(run.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    os.kill(workers[0].pid, signal.SIGKILL)
    said = run.communicate()[0]
    assert run.returncode != 0
    messages = re.findall(r"^(?:Error: |Stopped\.).*", said, re.M)  # noticed by itself, or told by the launcher
    assert len(messages) == 1 and "perdure resume" in messages[0] and "is kept" in messages[0], said
    assert not list(folder.glob("task_02_*")) and not json.loads((folder / "metrics.json").read_text())["finished"]
    assert list(folder.glob("begun_task_02_*/state.json"))  # it goes on inside the task
    ended = launch.resume(folder)
    assert ended["finished"] and ended["accuracy"] == whole["accuracy"]
    alike_runs(folder, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["inside a task", "between tasks"])
def test_where_one_is_told_to_stop_all_do(moment: str, tmp_path: Path) -> None:
    inside = moment == "inside a task"
    asked = {**several.asked("finetune"), "iterations": 60, "save_every": "5" if inside else "never"}
    whole = perdure.run("finetune", "mini-mtil", tmp_path / "one", **asked)
    folder = tmp_path / "two"
    run = torchrun(2, "run", "--method", "finetune", "--stream", "mini-mtil", "--out", folder, *words(asked))
    while not list(folder.glob("begun_task_02_*/state.json" if inside else "task_01_*")):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    workers = [p for p in psutil.Process(run.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    workers[0].send_signal(signal.SIGTERM)  # the other must not wait for it in vain
    said = run.communicate()[0]
    assert run.returncode != 0
    found = re.findall(r"Stopped\. Every task that was finished is kept(.*?)\. Go on with", " ".join(said.split()))
    assert len(found) == 1 and not re.search("^Error:", said, re.M), said
    if inside:
        step = re.fullmatch(r", and the one at hand up to step (\d+) of digits", found[0])
        assert step and list(folder.glob(f"begun_task_02_*/training_0_step_{int(step[1]):06d}.safetensors")), said
    ended = launch.resume(folder)
    assert ended["finished"] and ended["accuracy"] == whole["accuracy"]
    alike_runs(folder, tmp_path / "one")


# ---- on paper


def test_the_messages_of_the_paper_are_those_that_are_sent(
    clip: CLIP, stream: Stream, together: Callable[[int], Together]
) -> None:
    """bench/scaling.py counts what a step of fine-tuning sends: gradients, embeddings there and back, pictures in files."""
    task, world = stream.tasks[0], together(2)

    def learn(_: int) -> int:
        method = launch.build("finetune", {"iterations": 1, "warmup": 0, "batch_size": 7})
        method.bind(copy.deepcopy(clip))
        method.begin_task(task)
        fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device)
        return sum(p.numel() for p in method.parameters().values())

    parameters = world.run(learn)[0]
    model = scaling.Model(1.0, 1.0, parameters, clip.backbone.config.projection_dim, clip.size)
    work = scaling.Work("finetune", 7, 0, len(task.classes), files=False)
    assert sum(scaling.messages(work, model)) / 4 == world.sent / 2
    read = scaling.Work("finetune", 7, 0, len(task.classes))
    assert sum(scaling.messages(read, model)) - sum(scaling.messages(work, model)) == 7 * 3 * clip.size**2


def test_a_device_that_is_waited_for_costs_what_it_says() -> None:
    model = scaling.Model(100e9, 4e9, 150_000_000, 512, 224)
    work = scaling.Work("gift", 64, 64, 164)
    fixed, growing = (scaling.course(work, model, scaling.Machine(), grows) for grows in (False, True))
    assert fixed[0].efficiency == growing[0].efficiency == 1 and fixed[0].sent == 0
    assert fixed[-1].efficiency < growing[-1].efficiency < 1
    assert [one.efficiency for one in fixed] == sorted((one.efficiency for one in fixed), reverse=True)
    measured = scaling.course(work, model, scaling.Machine(), False, measured=8.0)
    assert measured[3].seconds - measured[3].sent == pytest.approx(1.0)


# ---- on accelerators


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: nccl wants one a process")
@pytest.mark.parametrize("method", ["finetune", "gift", "ridge_patches"])
def test_two_accelerators_write_what_one_does(method: str, tmp_path: Path) -> None:
    asked = {**several.asked(method), "device": "cuda"}
    perdure.run(method, "mini-mtil", tmp_path / "one", **asked)
    run = torchrun(2, "run", "--method", method, "--stream", "mini-mtil", "--out", tmp_path / "two", *words(asked))
    said = run.communicate()[0]
    assert run.returncode == 0, said
    assert several.apart(tmp_path / "two", tmp_path / "one") < several.CLOSE
