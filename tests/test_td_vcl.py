"""TD-VCL: what its weights, its memory, its old images and its draws come to; the release's numbers: test_td_vcl_golden.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_bits
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.packing import Frozen
from perdure.core.seeding import reseed
from perdure.data.task import Context, Query, Stream, Task
from perdure.engine.settings import Settings
from perdure.engine.teach import Teacher
from perdure.engine.watcher import Watcher
from perdure.methods.base import Method, Recipe
from perdure.methods.td_vcl import TDVCL
from perdure.models.clip import CLIP
from perdure.ops import variational
from perdure.synthesis.store import collect

FEW: dict[str, Any] = {
    "iterations": 2,
    "warmup": 0,
    "batch_size": 8,
    "lr": 2e-3,
    "lora_rank": 2,
    "lora_layers": ("q_proj",),
}


def taught(method: Method, clip: CLIP, tasks: Any, **context: Any) -> Method:
    """The method after some tasks, as a run teaches them."""
    reseed(0, "bind")
    method.bind(clip, Context(tasks=tuple(tasks), **context))
    teacher = Teacher(method, 0, Settings(precision="fp32"), Watcher())
    method.lend(teacher.train)
    for number, task in enumerate(tasks, 1):
        method.losses = teacher.learn(task, number)  # type: ignore[attr-defined]
    return method


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.9])
def test_weights_are_those_of_the_returns(lam: float) -> None:
    n = 5
    kls, likelihoods = variational.discounts(n, lam), variational.returns(n, lam)
    assert kls == pytest.approx([lam**i * (1 - lam) / (1 - lam**n) for i in range(n)])
    assert likelihoods == pytest.approx([lam**i * (1 - lam ** (n - i)) / (1 - lam**n) for i in range(n)])
    assert sum(kls) == pytest.approx(1) and likelihoods[0] == pytest.approx(1)


def test_the_ends_are_vcl_and_n_step() -> None:
    assert variational.discounts(4, 0.0) == variational.returns(4, 0.0) == [1, 0, 0, 0]
    assert variational.discounts(4, 1.0) == [0.25] * 4 and variational.returns(4, 1.0) == [1, 0.75, 0.5, 0.25]
    near = variational.returns(4, 1 - 1e-9)
    assert near == pytest.approx([1, 0.75, 0.5, 0.25], abs=1e-6)


def test_without_spread_and_divergence_it_is_fine_tuning_of_adapters(clip: CLIP, stream: Stream) -> None:
    values = {**FEW, "optimizer": "sgd", "lr": 0.1}  # Adam makes steps of gradients as small as the deviations
    plain = taught(Method(Recipe(adapt="lora", label_smoothing=0.0, **values)), CLIP.load(clip.path), stream.tasks[:2])
    method = taught(TDVCL(initial_logvar=-40.0, beta=0.0, **values), clip, stream.tasks[:2])
    assert method.losses["task"] == pytest.approx(plain.losses["task"], abs=1e-4)  # type: ignore[attr-defined]
    assert method.losses["divergence"] == [0, 0]  # type: ignore[attr-defined]
    other = plain.clip.weights()
    assert all(torch.allclose(t, other[n], atol=1e-5) for n, t in clip.weights().items())


def test_training_draws_and_answers_by_the_means(clip: CLIP, stream: Stream) -> None:
    method = taught(TDVCL(initial_logvar=-7.0, **FEW), clip, stream.tasks[:1])
    assert isinstance(method, TDVCL)
    images = stream.tasks[0].test.pixels[:4]
    with torch.no_grad():
        means = clip.encode_image(images)
        method.drawn.deviate(variational.deviation(method.logvar))
        assert (clip.encode_image(images) - means).abs().max() > 1e-3
        method.drawn.deviate(None)
        assert torch.equal(clip.encode_image(images), means)
    assert method.losses["divergence"][0] == 0 < method.losses["divergence"][1]  # type: ignore[attr-defined]
    moved = method.newest()["logvar"] + 7
    assert 0 < moved.abs().max() <= 2 * FEW["lr"] + 1e-6


def test_the_last_n_posteriors_are_kept_and_come_back(clip: CLIP, stream: Stream) -> None:
    method = taught(TDVCL(n=2, **FEW), clip, stream.tasks[:3])
    assert isinstance(method, TDVCL)
    state = method.state
    assert list(state.past) == ["after 2", "after 3"] and state.learned == 3
    assert torch.equal(state.past["after 3"]["mean"], method.drawn.means()) and isinstance(
        state.past["after 3"], Frozen
    )
    assert len(method.anchors) == 2 and method.anchors[0] is state.past["after 2"]
    again = TDVCL(n=2, **FEW)
    again.bind(CLIP.load(clip.path))
    again.unpack_state(*method.pack_state())
    assert list(again.state.past) == list(state.past) and again.state.shapes == state.shapes
    assert all(same_bits(dict(again.state.past[k]), dict(state.past[k])) for k in state.past)


def test_posteriors_of_another_architecture_are_refused_with_both_named(clip: CLIP, stream: Stream) -> None:
    found = taught(TDVCL(**FEW), clip, stream.tasks[:1]).pack_state()
    other = TDVCL(**{**FEW, "lora_rank": 3, "lora_layers": ("q_proj", "fc1")})
    other.bind(CLIP.load(clip.path))
    before = other.clip.own_state()
    with pytest.raises(PerdureError) as refused:
        other.unpack_state(*found)
    said = str(refused.value)
    assert "adapters of rank 2 beside 8 layers (q_proj)" in said
    assert "this model has adapters of rank 3 beside 16 layers (fc1, q_proj)" in said
    assert "[2, 128] in the posteriors, [3, 128] in the model" in said
    assert not other.state.past and same_bits(other.clip.own_state(), before)


def test_the_release_s_memory_holds_one_posterior_and_a_slot_that_trains(clip: CLIP, stream: Stream) -> None:
    method = taught(TDVCL(n=3, memory="release", beta=1.0, **FEW), clip, stream.tasks[:2])
    assert isinstance(method, TDVCL)
    born = method.random_slots()[1]["mean"]
    slots = list(method.state.past.values())
    assert torch.equal(slots[2]["mean"], method.drawn.means())
    moved = slots[1]["mean"] - born  # from the second task on it counts, and learns
    assert 0 < moved.abs().max() <= 2 * FEW["lr"] + 1e-6
    assert {"slot.mean", "slot.logvar"} < set(method.parameters())


@pytest.mark.parametrize("values", [{"memory": "release"}, {"reach": "release"}])
def test_n_minus_one_posteriors_of_one_are_refused(values: dict[str, Any], clip: CLIP) -> None:
    with pytest.raises(PerdureError, match="n=1: .* here none. Set n=2"):
        TDVCL(n=1, **values).bind(clip)


# ---- old likelihoods


class Watched(TDVCL):
    """Notes what is trained on, and what each sample's loss weighed."""

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.trained_on, self.ages_seen = task, self.ages

    def likelihood(self, each: Tensor, ages: Tensor) -> Tensor:
        self.weighed = torch.autograd.grad(super().likelihood(each, ages), each, retain_graph=True)[0] * len(each)
        self.aged = ages
        return super().likelihood(each, ages)


@pytest.mark.parametrize("labels", ["task", "all"])
def test_kept_images_are_learned_with_the_weights_of_their_age(labels: str, clip: CLIP, stream: Stream) -> None:
    values = {**FEW, "iterations": 1, "batch_size": 60}
    method = taught(Watched(n=3, lam=0.4, buffer=5, **values), clip, stream.tasks, labels=labels)
    assert isinstance(method, Watched)
    task, sizes = method.trained_on, [len(t.classes) for t in stream.tasks]
    assert [len(kept) for kept in method.state.buffer.values()] == [5, 5, 5]
    assert len(task.train) == 48 + 10 and len(task.classes) == sum(sizes)
    owner = method.ages_seen[task.train.labels]  # the newest old task first
    assert owner.tolist() == [0] * 48 + [1] * 5 + [2] * 5
    first = stream.tasks[0]
    kept = method.state.buffer[first.name]
    assert torch.equal(task.train.pixels[53:58], first.train.pixels[kept])
    names = [task.classes[k].name for k in task.train.labels[53:].tolist()]
    assert names == [first.classes[k].name for k in first.train.labels[kept].tolist()]
    assert (task.group is not None) == (labels == "task")
    expected = torch.tensor(variational.returns(3, 0.4))[method.aged]
    torch.testing.assert_close(method.weighed, expected)
    assert sorted(method.aged.unique().tolist()) == [0, 1, 2]


def test_synthetic_images_may_stand_for_kept_ones(clip: CLIP, stream: Stream, tmp_path: Path) -> None:
    """Of each old task as many as the buffer holds, of its own classes alone, with the weights of their age."""
    values = {**FEW, "iterations": 1, "batch_size": 60, "buffer_of": "synthetic", "pairs": str(tmp_path)}
    for task in stream.tasks[:2]:
        collect(tmp_path, task.train.pixels[:], [task.prompts()[k] for k in task.train.labels.tolist()], "drawings")
    method = taught(Watched(n=3, lam=0.4, buffer=5, **values), clip, stream.tasks)
    assert isinstance(method, Watched)
    whole, owner = method.trained_on, method.ages_seen[method.trained_on.train.labels]
    assert owner.tolist() == [0] * 48 + [1] * 5 + [2] * 5
    pictures = whole.train.pixels[48:58]
    for image, label in zip(pictures, whole.train.labels[48:].tolist(), strict=True):
        age = int(method.ages_seen[label])
        old = stream.tasks[2 - age]
        (found,) = [k for k in range(len(old.train)) if torch.equal(old.train.pixels[k], image)]
        assert whole.classes[label].prompts() == old.classes[int(old.train.labels[found])].prompts()
    assert len(torch.unique(pictures.flatten(1), dim=0)) == 10  # chosen without replacement
    torch.testing.assert_close(method.weighed, torch.tensor(variational.returns(3, 0.4))[method.aged])


def test_synthetic_images_that_cannot_be_had_are_refused(clip: CLIP, stream: Stream, tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match="buffer_of=synthetic: this stream has no generator.*Set buffer_of=images"):
        TDVCL(buffer=5, buffer_of="synthetic", **FEW).bind(clip, Context())
    with pytest.raises(PerdureError, match="buffer=0 asks for no images"):
        TDVCL(buffer_of="synthetic", **FEW).bind(clip, stream.context())
    collect(tmp_path, stream.tasks[1].train.pixels[:2], ["a cloud", "a boat at sea"], "drawings")
    with pytest.raises(PerdureError, match="have none of the texts that are wanted, as"):
        taught(TDVCL(buffer=5, buffer_of="synthetic", pairs=str(tmp_path), **FEW), clip, stream.tasks[:2])


def test_images_that_are_not_at_hand_are_refused(clip: CLIP, stream: Stream) -> None:
    method = TDVCL(buffer=5, **FEW)
    method.bind(clip, Context(tasks=stream.tasks[1:2]))
    method.state.buffer = {stream.tasks[0].name: [0, 1]}
    with pytest.raises(PerdureError, match=f"images of {stream.tasks[0].name} are wanted again, and not at hand"):
        method.material(stream.tasks[1])


# ---- draws that answer


def test_draws_answer_with_their_mean_probabilities(clip: CLIP, stream: Stream) -> None:
    method = taught(TDVCL(initial_logvar=-6.5, samples=3, **FEW), clip, stream.tasks[:1])
    assert isinstance(method, TDVCL)
    task, held = stream.tasks[0], clip.holds
    query = Query(task.test.pixels[:6], task.classes, 0)
    found = method.predict(query)
    assert clip.holds == held
    probabilities = []
    for expert in method.experts(query):
        assert expert.weights is not None and expert.gate == pytest.approx(1 / 3)
        with clip.preserved(), torch.no_grad():
            clip.load_weights(expert.name, expert.weights)
            probabilities.append(Method.logits(method, query).softmax(1))
    torch.testing.assert_close(found, torch.stack(probabilities).mean(0).log(), rtol=1e-4, atol=1e-4)
    assert (probabilities[0] - probabilities[1]).abs().max() > 1e-3
    said = method.remarks()
    assert 0 < said["of it, between draws"] < said["entropy of an answer"]
    torch.testing.assert_close(method.predict(query), found, rtol=0, atol=0)  # the same draws each time


def test_draws_without_spread_are_the_means(clip: CLIP, stream: Stream) -> None:
    method = taught(TDVCL(initial_logvar=-40.0, samples=2, **FEW), clip, stream.tasks[:1])
    task = stream.tasks[0]
    query = Query(task.test.pixels[:6], task.classes, 0)
    means = Method.predict(taught(TDVCL(initial_logvar=-40.0, **FEW), CLIP.load(clip.path), stream.tasks[:1]), query)
    torch.testing.assert_close(method.predict(query), means.log_softmax(1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_several_posteriors_keep_nearer_to_the_oldest_than_the_last_alone(clip: CLIP, stream: Stream) -> None:
    """At equal β, over three tasks; both learn what they are taught."""
    values = {**FEW, "iterations": 20, "batch_size": 16, "lr": 5e-3, "beta": 5e-3, "lora_rank": 4}
    far = {}
    for n in (1, 4):
        method = taught(TDVCL(n=n, lam=1.0, **values), CLIP.load(clip.path), stream.tasks)
        assert isinstance(method, TDVCL)
        born = TDVCL(n=n, **values)
        reseed(0, "bind")
        born.bind(CLIP.load(clip.path))
        first, last = born.posterior(), method.newest()
        far[n] = variational.divergence(last["mean"], last["logvar"], first["mean"], first["logvar"]).item()
        losses = method.losses  # type: ignore[attr-defined]
        assert sum(losses["task"][-5:]) < 0.9 * sum(losses["task"][:5]) and losses["divergence"][-1] > 0
    assert 0 < far[4] < 0.9 * far[1], far
