"""RAPF, SLCA and CGIL on the small world: what replay of drawn features is worth, and what they do at the edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from perdure import launch
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.data.task import Context, Images, Query, Stream, Task
from perdure.engine.evaluate import Protocol, evaluate
from perdure.launch.configure import configure
from perdure.methods.base import Method
from perdure.methods.cgil import CGIL
from perdure.methods.compose import Compose
from perdure.methods.finetune import FineTune
from perdure.methods.rapf import RAPF, fused, near_pairs
from perdure.methods.slca import SLCA
from perdure.models.clip import CLIP
from perdure.training.fit import Losses, fit, optimise
from perdure.training.schedule import Schedule

FROZEN: dict[str, Any] = {"tower_lr_scale": 0.0, "augment": False}
KINDS: dict[str, Any] = {"rapf": RAPF, "slca": SLCA, "cgil": CGIL}
QUICK: dict[str, Any] = {"replay": "gauss", "epochs": 1, "draws": 16}


@pytest.fixture(scope="module")
def world() -> tuple[CLIP, Stream]:
    """Four steps of the small world, and a model that nothing trains: each image is encoded once for all tests."""
    return CLIP.load(str(mini.MODEL)), mini.class_incremental().shortened(4, 0)


def learned(name: str, world: tuple[CLIP, Stream], **values: Any) -> tuple[Method, list[float], Tensor]:
    """The method after all steps, with the values that suit the stream; its accuracies at the last one; the probe's hits."""
    clip, stream = world
    suits, _ = configure(name, stream, 0, {key: str(value) for key, value in values.items()}, {})
    method = launch.build(name, suits["options"])
    with clip.remembering():
        method.bind(clip, stream.context(0, labels="seen"))
        for task in stream.tasks:
            method.begin_task(task)
            method.calibrate(task)
        hits = evaluate(method, stream, Protocol("seen", "hidden"), len(stream.tasks))
        return method, [100 * hits[t.name].double().mean().item() for t in stream.tasks], hits["probe"]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def untaught(world: tuple[CLIP, Stream]) -> tuple[list[float], Tensor]:
    """What the model says before any task."""
    return learned("zero_shot", world)[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "values", "without"), [("rapf", {}, {"beta": 0}), ("slca", FROZEN, {**FROZEN, "align": False})]
)
def test_replay_carries_it(
    name: str, values: dict[str, Any], without: dict[str, Any], world: Any, untaught: Any
) -> None:
    """Better than class means, and far better than without draws; what was not learned is as it was, to the bit."""
    _, there, probe = learned(name, world, **values)
    _, gone, _ = learned(name, world, **without)
    means = learned("ncm", world)[1]
    assert mean(there) > max(mean(gone) + 5, mean(means))
    assert torch.equal(probe, untaught[1])


@pytest.mark.slow
def test_prompts_are_tuned_on_draws_of_all_classes(world: Any, untaught: Any) -> None:
    """With draws of the task's classes alone what came before is lost."""
    clip, stream = world
    few = clip, replace(stream, tasks=stream.tasks[:2])
    asked = {"replay": "full", "epochs": 4}
    method, both, probe = learned("cgil", few, **asked)
    first = method.state.replay.pop(few[1].tasks[0].name)
    last = few[1].tasks[1]
    with clip.remembering():
        method.state.tasks.pop()
        method.calibrate(last)
        hits = evaluate(method, few[1], Protocol("seen", "hidden"), 2)
    alone = [100 * hits[t.name].double().mean().item() for t in few[1].tasks]
    assert len(first["rows"]) == len(few[1].tasks[0].classes)
    assert both[0] > alone[0] + 5 and mean(both) > mean(untaught[0][:2]) - 5
    assert torch.equal(probe, untaught[1])


@pytest.mark.slow
def test_a_slow_tower_forgets_less(clip: CLIP, stream: Stream) -> None:
    """After one task at the full rate the zero-shot ability is gone, at a hundredth it is there."""
    probe, found = stream.probe, {}
    assert probe is not None
    for scale in (1.0, 0.01):
        clip.load_weights("pretrained", clip.pretrained)
        method = SLCA(lr=0.05, epochs=4, batch_size=16, milestones=(), tower_lr_scale=scale)
        method.bind(clip)
        task = stream.tasks[0]
        method.begin_task(task)
        losses = fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device)["task"]
        assert losses[-1] < losses[0]
        clip.trained(f"trained {task.name} {scale}")
        method.calibrate(task)
        own = method.predict(Query(task.test.pixels, task.classes)).argmax(1).eq(task.test.labels)
        answer = method.predict(Query(probe.test.pixels, probe.classes))
        found[scale] = answer.argmax(1).eq(probe.test.labels).double().mean().item(), own.double().mean().item()
    assert found[0.01][0] > found[1.0][0] + 0.1


def task_of(stream: Stream, counts: dict[int, int], index: int = 0, of: int = 0) -> Task:
    """A task of the stream with so many training images of some of its classes, and none of the others."""
    task = stream.tasks[of]
    keep = torch.cat([(task.train.labels == k).nonzero().squeeze(1)[:n] for k, n in sorted(counts.items())])
    return replace(task, name=f"{task.name} {index}", train=task.train.take(keep), index=index)


def alone(name: str, **values: Any) -> dict[str, Any]:
    return {**(FROZEN if name == "slca" else QUICK if name == "cgil" else {}), **values}


@pytest.mark.parametrize("name", ["rapf", "slca", "cgil"])
def test_a_class_of_one_image_of_none_and_one_that_comes_again(name: str, clip: CLIP, stream: Stream) -> None:
    method = KINDS[name](**alone(name))
    method.bind(clip)
    with clip.remembering():
        method.calibrate(task_of(stream, {0: 5, 2: 1}))
        rows = list(method.state.classes)
        assert [row[0] for row in rows] == [stream.tasks[0].classes[k].name for k in (0, 2)]
        method.calibrate(task_of(stream, {1: 4, 2: 5}, 1))  # 2 again
        assert method.state.classes[:2] == rows and len(method.state.classes) == 3
        task = stream.tasks[0]
        answer = method.predict(Query(task.test.pixels, task.classes))
        before = Method()
        before.join(clip, Context())
        text = before.predict(Query(task.test.pixels, task.classes))
    assert answer.isfinite().all()
    unseen = range(3, len(task.classes))
    if name == "cgil":  # one scale for all
        assert torch.equal(answer[:, unseen], text[:, unseen])
    else:  # what was not learned keeps its probability
        torch.testing.assert_close(answer[:, unseen], text.softmax(1)[:, unseen])
        torch.testing.assert_close(answer.sum(1), torch.ones(len(answer)))
    if name != "cgil":
        assert method.state.gaussians["counts"].tolist() == [5, 6, 4]


@pytest.mark.parametrize("name", ["rapf", "slca", "cgil"])
def test_the_same_run_again_and_after_a_stop_has_the_same_bits(name: str, clip: CLIP, stream: Stream) -> None:
    tasks = [task_of(stream, {0: 5, 1: 6}), task_of(stream, {0: 4, 1: 5}, 1, of=1)]
    kept = []
    for stop in (False, True):
        method = KINDS[name](**alone(name))
        method.bind(clip, Context(seed=3))
        for number, task in enumerate(tasks):
            method.calibrate(task)
            if stop and not number:
                state = method.pack_state()
                method = KINDS[name](**alone(name))
                method.bind(clip, Context(seed=3))
                method.unpack_state(*state)
        kept.append(method.pack_state())
    (files, values), (again, values_again) = kept
    assert values == values_again and files.keys() == again.keys()
    for file, tensors in files.items():
        assert all(torch.equal(t, again[file][key]) for key, t in tensors.items())


def test_a_head_that_stands_on_features_that_move_says_so(clip: CLIP, stream: Stream) -> None:
    said: list[str] = []
    method = Compose(FineTune(), answer=RAPF(on="drifting"))
    method.bind(clip, Context(warn=said.append))
    for number, task in enumerate(stream.tasks[:2]):
        method.foresee(task)
        with torch.no_grad():
            clip.backbone.visual_projection.weight.mul_(-1)
        clip.trained(f"trained {number}")
        method.calibrate(task)
    assert len(said) == 1 and "RAPF stands on moved by 200%" in said[0] and "on=pretrained" in said[0]
    assert method.remarks()["features moved by"] == pytest.approx(2)
    assert not Compose(FineTune(), answer=RAPF(on="pretrained")).foresees()


def test_what_cannot_be_is_refused_before_the_work(clip: CLIP, stream: Stream) -> None:
    one = task_of(stream, {0: 3, 1: 1})
    with pytest.raises(PerdureError, match=f"one of {stream.tasks[0].classes[1].name}.*replay=gauss"):
        CGIL().bind(clip, Context(tasks=(one,)))
    CGIL(replay="full").bind(clip, Context(tasks=(one,)))
    with pytest.raises(PerdureError, match="tower_lr_scale=0"):
        SLCA(on="pretrained").bind(clip)
    black = replace(one, train=Images(torch.zeros_like(one.train.pixels), one.train.labels))
    with pytest.raises(PerdureError, match="all its images are 0"):
        method = RAPF()
        method.bind(clip)
        clip.backbone.visual_projection.weight.data.zero_()
        clip.changed("zero")
        method.calibrate(black)


def test_a_distance_or_a_quantile(stream: Stream) -> None:
    for given in ("0.03q", "0.55", "1q"):
        config, _ = configure("rapf", stream, 0, {"near": given}, {})
        assert config["options"]["near"] == (given if given.endswith("q") else 0.55)
    for given in ("3q", "-1", "near", "0.5qq"):
        with pytest.raises(PerdureError, match="near="):
            configure("rapf", stream, 0, {"near": given}, {})


def test_near_pairs_are_of_an_old_and_a_new_class() -> None:
    texts = torch.eye(6)[[0, 1, 2, 0, 1, 5]] + 0.01 * torch.arange(6)[:, None]
    assert near_pairs(texts, 3, [3, 4, 5], 0.5) == [(0, 3), (1, 4)]
    assert near_pairs(texts, 3, [3, 4, 5], "0.1q") == [
        (0, 3),
        (1, 4),
    ]  # of 15 pairs, those under the second nearest or so
    assert near_pairs(texts, 3, [], 0.5) == near_pairs(texts[:1], 0, [0], "0.5q") == []


def test_fusion_takes_what_moved_most() -> None:
    draw = torch.Generator().manual_seed(0)
    old, step = torch.randn(6, 6, generator=draw), torch.randn(6, 6, generator=draw)
    torch.testing.assert_close(fused(old, old + step, 1.0), old + step)
    assert torch.equal(fused(old, old, 0.5), old)
    half = fused(old, old + step, 0.0)
    u, s, v = torch.linalg.svd(old)
    before, after, now = (u.T @ w for w in (old, old + step, half))
    most = (after - before).abs().flatten().argmax()
    torch.testing.assert_close(now.flatten()[most], after.flatten()[most], rtol=1e-4, atol=1e-5)
    assert (half - old).norm() < step.norm()


def test_the_towers_rate_is_an_option_of_every_method(clip: CLIP, stream: Stream) -> None:
    method = FineTune(tower_lr_scale=0.25)
    method.bind(clip)
    plan = method.schedule(stream.tasks[0])
    assert {plan.factor(name) for name in method.parameters()} == {0.25} and plan.factor("head.weight") == 1
    slow = SLCA(epochs=1)
    slow.bind(clip)
    slow.begin_task(stream.tasks[0])
    factors = {name: slow.schedule(stream.tasks[0]).factor(name) for name in slow.parameters()}
    assert factors.pop("head.weight") == factors.pop("head.bias") == 1 and set(factors.values()) == {0.01}
    assert not any(name.startswith("text") for name in factors)


@pytest.mark.parametrize("milestones", [(), (2,)])
def test_without_a_milestone_the_rate_stays(milestones: tuple[int, ...], world: tuple[CLIP, Stream]) -> None:
    clip, stream = world
    plans: list[Schedule] = []

    def train(learner: Any, plan: Schedule, *rest: Any) -> Losses:
        plans.append(plan)
        return optimise(learner, plan, rest[0], clip.device)

    method, task = RAPF(milestones=milestones, epochs=4, lr=1e-3), stream.tasks[0]
    method.bind(clip, stream.context())
    method.lend(train)
    method.calibrate(task)
    slca = SLCA(milestones=milestones, epochs=4, lr=1e-3)
    slca.bind(CLIP.load(str(mini.MODEL)), stream.context())
    plans.append(slca.schedule(task))
    for plan in plans:
        assert plan.rate(0) == 1e-3 and plan.rate(plan.steps - 1) == pytest.approx(1e-4 if milestones else 1e-3)
