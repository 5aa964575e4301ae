"""Each baseline does what its name says, on three short tasks of the small world."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, same_bits
from safetensors.torch import load_file

from perdure import launch
from perdure.benchmarks import mini
from perdure.core.packing import pack, unpack
from perdure.core.weights import interpolate
from perdure.data.task import Query, Stream
from perdure.engine.checkpoint import read_task
from perdure.methods.base import Method, Recipe
from perdure.methods.compose import Compose
from perdure.methods.finetune import Individual
from perdure.methods.merge import Config, Merge
from perdure.models.clip import CLIP

Run = Callable[..., dict[str, Any]]


def weights(folder: Path, task: int) -> dict[str, torch.Tensor]:
    return load_file(folders(folder)[task] / "weights.safetensors")


def folders(run: Path) -> list[Path]:
    return sorted(run.glob("task_*"))


def test_zero_shot_never_moves(short_run: Run) -> None:
    m = short_run("zero_shot")
    assert all(row == m["accuracy"][0] for row in m["accuracy"])
    assert len(set(m["probe"])) == 1
    assert m["forgetting"] == 0 and m["backward_transfer"] == 0 and m["losses"] == {}
    assert not (m["folder"] / "task_01_animals" / "weights.safetensors").exists() or not weights(m["folder"], 1)


@pytest.mark.slow
def test_finetune_goes_on_from_the_last_weights(short_run: Run) -> None:
    m = short_run("finetune", lr=5e-4, iterations=12)
    assert len(m["accuracy"]) == 4 and all(len(row) == 3 for row in m["accuracy"])
    assert m["accuracy"][2][1] > m["accuracy"][0][1] + 15  # digits are learned
    assert m["accuracy"][3] != m["accuracy"][2]
    assert set(m["losses"]) == {"animals", "digits", "food"}
    assert m["losses"]["digits"]["task"][-1] < m["losses"]["digits"]["task"][0]


@pytest.mark.slow
def test_lora_changes_nothing_but_adapters(short_run: Run) -> None:
    m = short_run("finetune_lora", lora_rank=2, lora_layers=["k_proj", "v_proj"], lr=5e-3)
    saved = weights(m["folder"], 3)
    assert saved and all("lora_" in name for name in saved)
    assert any(saved[name].any() for name in saved if ".lora_B." in name)


@pytest.mark.slow
def test_wise_ft_between_its_ends(short_run: Run) -> None:
    still = short_run("wise_ft", alpha=0.0)
    zero = short_run("zero_shot")
    assert still["accuracy"] == zero["accuracy"]
    full = short_run("wise_ft", alpha=1.0)
    tuned = short_run("finetune")
    assert full["accuracy"] == tuned["accuracy"]
    half = short_run("wise_ft", alpha=0.5, tasks=1)
    ends = weights(tuned["folder"], 1), CLIP.load(launch.STREAMS["mini-mtil"].value().model).weights()
    for name, value in weights(half["folder"], 1).items():
        torch.testing.assert_close(value, (ends[0][name] + ends[1][name]) / 2, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_weight_average_is_the_mean_of_the_experts(short_run: Run) -> None:
    average, experts = short_run("weight_average"), short_run("individual")
    files = read_task(folders(experts["folder"])[-1], tensors=True).files
    tuned = [files[f"expert/{name}"] for name in ("animals", "digits", "food")]
    for name, value in weights(average["folder"], 3).items():
        torch.testing.assert_close(value, sum(t[name] for t in tuned) / 3, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_individual_experts(short_run: Run) -> None:
    m = short_run("individual", lr=5e-4, iterations=12)
    a = m["accuracy"]
    for j in range(3):
        assert all(a[i][j] == a[0][j] for i in range(j + 1))  # not learned yet: as pre-trained
        assert all(a[i][j] == a[j + 1][j] for i in range(j + 1, 4))  # learned: never changes again
    assert len(set(m["probe"])) == 1
    hidden = short_run("individual", task_id="hidden")
    assert all(row == hidden["accuracy"][0] for row in hidden["accuracy"])


@pytest.mark.slow
def test_an_expert_is_written_once(short_run: Run) -> None:
    m = short_run("individual")
    found = sorted(p.relative_to(m["folder"]).as_posix() for p in m["folder"].rglob("expert_*"))
    assert found == [f"task_0{i}_{n}/expert_{n}.safetensors" for i, n in ((1, "animals"), (2, "digits"), (3, "food"))]


@pytest.mark.slow
def test_joint_learns_all_before_row_one(short_run: Run) -> None:
    m = short_run("joint")
    assert m["transfer"] is None and m["forgetting"] is None and m["last"] is not None
    assert m["accuracy"][1] == m["accuracy"][2] == m["accuracy"][3] != m["accuracy"][0]
    assert m["losses"]["animals"]["step"][-1] == 3 * SHORT["iterations"]  # as many steps as three tasks take


@pytest.mark.slow
def test_joint_when_all_classes_compete(short_run: Run, stream: Stream) -> None:
    assert stream.joined(grouped=False).group is None
    grouped = stream.joined(grouped=True)
    assert grouped.group is not None and grouped.group.tolist()[-1] == 2
    assert int(grouped.train.labels.max()) == len(grouped.classes) - 1
    m = short_run("joint", "mini-cil", lr=5e-4)
    (losses,) = m["losses"].values()
    assert losses["step"][-1] == 3 * SHORT["iterations"] and losses["task"][-1] < losses["task"][0]
    assert m["incremental_last"] is not None


def test_compose_plays_each_role_and_keeps_its_state(clip: CLIP, stream: Stream) -> None:
    method = Compose(learn=Method(Recipe(iterations=0)), fuse=Merge(Config(rule="average")), answer=Individual())
    method.bind(clip)
    for task in stream.tasks[:2]:
        method.start(task)
        clip.trained(task.name)
        method.fuse(task)
    files, values = method.pack_state()
    assert values["fuse"]["count"] == 2 and values["answer"]["order"] == []
    again = Compose(learn=Method(Recipe()), fuse=Merge(Config(rule="average")), answer=Individual())
    again.bind(clip)
    again.unpack_state(files, values)
    assert again.fuser.state.count == 2
    for name, value in method.fuser.state.of("mean").items():
        assert torch.equal(value, again.fuser.state.of("mean")[name])
    old = {f"mean/{name}": value for name, value in method.fuser.state.of("mean").items()}
    again.unpack_state({**files, "fuse.state": old}, {**values, "fuse": {"count": 2, "mean": {"keys": list(old)}}})
    assert same_bits(dict(method.fuser.state.of("mean")), dict(again.fuser.state.of("mean")))  # as runs used to keep it
    query = Query(stream.tasks[0].test.pixels[:4], stream.tasks[0].classes, 0)
    assert method.predict(query).shape == (4, len(stream.tasks[0].classes))


def test_state_of_every_kind_survives_packing() -> None:
    state = Individual.State(expert={"a": {"w": torch.ones(2)}, "b": {"w": torch.zeros(2)}}, order=["a", "b"])
    again = unpack(Individual.State, *pack(state))
    assert again.order == ["a", "b"] and torch.equal(again.expert["a"]["w"], torch.ones(2))
    empty = unpack(Individual.State, *pack(Individual.State()))
    assert empty.expert == {} and empty.order == []


def test_algebra_on_weights() -> None:
    a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}
    assert torch.equal(interpolate(a, b, 0.5)["w"], torch.tensor([2.0, 4.0]))
    with pytest.raises(launch.PerdureError, match="'v'"):
        interpolate(a, {"w": b["w"], "v": b["w"]}, 0.5)
    with pytest.raises(launch.PerdureError, match="shapes"):
        interpolate(a, {"w": torch.ones(3)}, 0.5)


@pytest.mark.slow
def test_a_method_is_one_file(short_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's promise, with the README's code."""
    from perdure import methods

    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (tmp_path / "half.py").write_text(readme.split("```python\n# half.py\n")[1].split("```")[0])
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    none, some, all_of_it = (short_run("half", share=share) for share in (0.0, 0.5, 1.0))
    assert none["accuracy"] == short_run("zero_shot")["accuracy"]
    assert all_of_it["accuracy"] == short_run("finetune")["accuracy"]
    assert some["accuracy"] not in (none["accuracy"], all_of_it["accuracy"])


@pytest.mark.slow
def test_first_session_adaptation_trains_on_the_first_task_alone(short_run: Run) -> None:
    m = short_run("finetune", first_only=True)
    assert list(m["losses"]) == ["animals"]
    assert m["accuracy"][1] == m["accuracy"][2] == m["accuracy"][3] != m["accuracy"][0]
    headed = short_run("finetune+ridge", first_only=True, on="drifting", features=64)
    moved = [headed["remarks"][task]["features moved by"] for task in headed["tasks"]]
    assert moved[0] > 0 and moved[1:] == [0.0, 0.0]


@pytest.mark.parametrize("name", ["finetune", "codyra", "keep_lora", "slca", "moe_adapters"])
def test_a_task_of_one_class_teaches_nothing_and_it_is_said(name: str, stream: Stream) -> None:
    task = stream.tasks[0]
    rows = (task.train.labels == 0).nonzero().flatten()[:6]
    alone = replace(task, classes=task.classes[:1], train=task.train.take(rows), test=task.test.take(rows[:0]))
    heard: list[str] = []
    method = launch.build(name, {"reference": "none"} if name == "moe_adapters" else {})
    method.bind(CLIP.load(str(mini.MODEL)), stream.context(warn=heard.append))
    method.begin_task(alone)
    assert len([text for text in heard if f"animals has one class, {task.classes[0].name}" in text]) == 1
    method.begin_task(task)
    assert len([text for text in heard if "has one class" in text]) == 1
