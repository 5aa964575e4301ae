"""TAALM: an update that can be differentiated, triples, what weighs and what it does; test_taalm_golden.py has the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from conftest import same_bits
from torch import Tensor

from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.core.seeding import reseed
from perdure.data.task import Context, Stream, Task
from perdure.methods.base import Method, Recipe
from perdure.methods.taalm import TAALM
from perdure.models.clip import CLIP
from perdure.models.importance import Importance
from perdure.models.recompute import by_blocks, differentiable_twice
from perdure.ops.losses import classification, pairwise, weighted
from perdure.ops.meta import Inner, Moments, adamw, updated, usefulness
from perdure.training.fit import fit
from perdure.training.meta import Meta, Pairs, triples

FEW: dict[str, Any] = {
    "iterations": 2,
    "warmup": 0,
    "batch_size": 8,
    "lr": 2e-3,
    "lora_rank": 2,
    "lora_layers": ("v_proj",),
}
BRIEF: dict[str, Any] = {"meta_steps": 2, "meta_batch": 1, "meta_images": 8, "meta_classes": 4, "inner_lr": 2e-3}


def ready(method: Method, clip: CLIP, **context: Any) -> Any:
    reseed(0, "bind")
    method.bind(clip, Context(**context))
    return method


def test_steps_are_adamw_s() -> None:
    """Of torch's, but for the epsilons, on gradients that are large beside them."""
    torch.manual_seed(0)
    theta, wanted = {"w": torch.randn(5)}, torch.randn(5)
    own = torch.nn.Parameter(theta["w"].clone())
    optimizer = torch.optim.AdamW([own], lr=0.03, betas=(0.8, 0.95), weight_decay=0.1)
    inner, moments = Inner(lr=0.03, betas=(0.8, 0.95), weight_decay=0.1), Moments()
    for _ in range(3):
        gradient = own.detach() - wanted
        own.grad = gradient.clone()
        optimizer.step()
        theta = adamw(theta, {"w": gradient}, moments, inner)
        torch.testing.assert_close(theta["w"], own.detach(), rtol=1e-4, atol=1e-6)


def test_what_learning_is_worth_has_the_gradient_of_differences() -> None:
    """Against differences, in double precision, with steps to differentiate through and answers that should stay."""
    torch.manual_seed(0)
    theta = {"w": torch.randn(3, dtype=torch.float64)}
    x, y, asked = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))

    def worth(phi: Tensor) -> Tensor:
        def learn(now: Any) -> Tensor:
            return weighted((x @ now["w"] - y.sum(1)).square(), phi.sigmoid())

        def query(now: Any) -> Tensor:
            return (asked @ now["w"] - 1).square().mean()

        inner = Inner(plain=0, differentiable=3, lr=0.05)
        return usefulness(theta, learn, query, inner, lambda now: (y @ now["w"]).square(), restrict=0.7)

    assert torch.autograd.gradcheck(worth, torch.randn(4, dtype=torch.float64, requires_grad=True), atol=1e-6)


def test_plain_steps_are_constants_and_theta_stays() -> None:
    theta, phi = {"w": torch.ones(2), "idle": torch.ones(1)}, torch.tensor(2.0, requires_grad=True)
    after, losses = updated(theta, lambda now: phi * now["w"].square().sum(), Inner(plain=2, differentiable=1, lr=0.1))
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2] and torch.equal(theta["w"], torch.ones(2))
    assert torch.allclose(after["idle"], torch.ones(1), atol=0.01) and after["w"].requires_grad
    none, _ = updated(theta, lambda now: phi * now["w"].square().sum(), Inner(plain=3, differentiable=0, lr=0.1))
    torch.testing.assert_close(none["w"], after["w"])
    assert torch.autograd.grad(none["w"].sum(), phi, allow_unused=True) == (None,)


@pytest.mark.parametrize("loss", [classification, pairwise])
@pytest.mark.parametrize("group", [None, torch.tensor([0, 0, 1, 1])])
def test_the_mean_of_single_losses_is_the_loss(loss: Callable[..., Tensor], group: Tensor | None) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 3, 2, 0])
    each = loss(logits, labels, 0.1, group, "none")
    assert each.shape == (5,)
    torch.testing.assert_close(each.mean(), loss(logits, labels, 0.1, group))
    torch.testing.assert_close(weighted(each, torch.ones(5)), each.mean(), rtol=1e-5, atol=1e-5)


def test_triples_ask_other_images_of_the_same_classes_and_unrelated_ones() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4] * 6 + [5])  # of class 5 there is but one
    for triple in islice(triples(labels, 2, 5, torch.Generator().manual_seed(0)), 20):
        assert not set(triple.data.tolist()) & set(triple.query.tolist())
        assert len(triple.data) == len(triple.query) == 5 == len(triple.unrelated)
        for index, classes in (
            (triple.data, triple.classes),
            (triple.query, triple.classes),
            (triple.unrelated, triple.others),
        ):
            assert set(labels[index].tolist()) <= set(classes.tolist())
        assert len(triple.classes) == len(triple.others) == 2
        assert not set(triple.classes.tolist()) & {*triple.others.tolist(), 5}
    few = next(triples(labels[:15] % 3, 8, 5, torch.Generator()))
    assert len(few.classes) == 2 and len(few.unrelated) == 0  # one class is left, and one is nothing to choose among


# ---- the method


def meta(clip: CLIP, task: Task, phi: Importance, **values: Any) -> Meta:
    ids = clip.tokens(task.prompts())
    with torch.no_grad():
        pairs = Pairs(
            task.train.pixels, task.train.labels, ids, clip.encode_image(task.train.pixels), clip.encode_tokens(ids)
        )
    theta = {n: p for n, p in clip.backbone.named_parameters() if p.requires_grad}
    return Meta(clip, theta, phi, pairs, Inner(lr=2e-3), **values)


def test_recomputation_does_not_change_what_is_differentiated(clip: CLIP, stream: Stream) -> None:
    """In parts or by blocks a tower would be computed again by the weights that it holds then, which are not θ'."""
    ready(TAALM(**FEW), clip)
    torch.manual_seed(1)
    phi, task = Importance(128, hidden=4), stream.tasks[1]
    torch.nn.init.normal_(list(phi.parameters())[-2])
    learner = meta(clip, task, phi, restrict=0.5)
    triple = next(triples(task.train.labels, 4, 6, torch.Generator().manual_seed(0)))
    found = []
    for parts in (1, 3):
        clip.accumulate = parts
        if parts > 1:
            by_blocks(clip.backbone)
        with differentiable_twice(clip):
            found.append(torch.autograd.grad(learner.objective(triple), list(phi.parameters())))
        assert clip.accumulate == parts
    blocks = [b for b in clip.backbone.modules() if type(b).__name__ == "CLIPEncoderLayer"]
    assert blocks and all(block.training for block in blocks)
    for a, b in zip(*found, strict=True):
        assert a.any() and torch.allclose(a, b, rtol=1e-4, atol=1e-9)


def test_what_weighs_learns_and_the_model_stays(clip: CLIP, stream: Stream) -> None:
    method, task = ready(TAALM(**FEW, **BRIEF), clip, tasks=stream.tasks), stream.tasks[1]
    before = clip.own_state()
    before = {n: t.clone() for n, t in before.items()}
    method.begin_task(task)
    assert same_bits(clip.own_state(), before) and clip.holds == "pretrained"
    assert {n: tuple(t.shape) for n, t in method.state.phi.items()} == {
        "layers.0.weight": (1, 257),
        "layers.0.bias": (1,),
    }
    assert method.weights.shape == (48,) and method.weights.std() > 1e-4 and method.weights.min() > 0
    phi, weights = {n: t.clone() for n, t in method.state.phi.items()}, method.weights
    again = ready(TAALM(**FEW, **BRIEF), CLIP.load(clip.path), tasks=stream.tasks)
    again.unpack_state(*method.pack_state())
    again.begin_task(stream.tasks[0])  # φ is frozen: nothing is learned but the weights are another task's
    assert same_bits(again.state.phi, phi) and again.weights.shape == (48,)
    again.begin_task(task)
    assert torch.equal(again.weights, weights)
    said = method.remarks()
    assert said["weight of a pair, mean"] == pytest.approx(weights.mean().item()) and said["its deviation"] > 0


class Free(torch.nn.Module):
    """A weight of its own for each pair of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(torch.zeros(20))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.scores[: len(images)].sigmoid()


def test_mislabelled_pairs_are_found_to_do_harm(clip: CLIP) -> None:
    """Where a quarter of the labels are wrong in what is learned from, and none in what is asked: their weights should fall."""
    ready(TAALM(**{**FEW, "lora_layers": ("q_proj", "v_proj", "fc1")}), clip)
    (letters,) = (t for t in mini.multi_domain("I").tasks if t.name == "letters")
    task = replace(letters, train=letters.train.spread(130))
    learner, right = meta(clip, task, Free()), task.train.labels  # type: ignore[arg-type]
    harm: dict[bool, list[float]] = {True: [], False: []}
    for triple in islice(triples(right, 6, 20, torch.Generator().manual_seed(0)), 4):
        wrong = torch.arange(len(triple.data)) % 4 == 0
        given = right.clone()
        given[triple.data[wrong]] = triple.classes[
            (right[triple.data[wrong]][:, None] == triple.classes).int().argmax(1) - 1
        ]
        learner.pairs = replace(learner.pairs, labels=given)
        (gradient,) = torch.autograd.grad(learner.objective(triple), [*learner.phi.parameters()])
        for k, bad in enumerate(wrong.tolist()):
            harm[bad].append(gradient[k].item())
    assert len(harm[True]) >= 12
    mean = {bad: sum(values) / len(values) for bad, values in harm.items()}
    assert mean[True] > 0 > mean[False]


def test_weights_are_learned_shuffled_or_all_alike(clip: CLIP, stream: Stream) -> None:
    method, task = ready(TAALM(importance="shuffled", **FEW, **BRIEF), clip, tasks=stream.tasks), stream.tasks[1]
    method.begin_task(task)
    for kind in ("learned", "uniform"):
        other = TAALM(importance=kind, **FEW, **BRIEF)
        other.clip, other.tokens, other.state = clip, method.tokens, method.state
        weights = other.weigh(task)
        if kind == "uniform":
            assert torch.equal(weights, torch.ones(48))
            continue
        assert not torch.equal(weights, method.weights)
        assert torch.equal(weights.sort().values, method.weights.sort().values)


def test_uniform_weights_are_fine_tuning_of_adapters_and_others_are_not(clip: CLIP, stream: Stream) -> None:
    task, losses = stream.tasks[1], []
    methods = [
        Method(Recipe(adapt="lora", **FEW)),
        TAALM(**FEW, meta_steps=0),
        TAALM(**FEW, **{**BRIEF, "meta_lr": 1.0}),
    ]
    for method in methods:
        ready(method, CLIP.load(clip.path), tasks=stream.tasks)
        method.begin_task(task)
        losses.append(fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device)["task"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2][0] != pytest.approx(losses[0][0], rel=1e-3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"meta_source": "drawings"}, "meta_source=drawings: a stream has no drawings .* Set meta_source=own"),
        ({"meta_source": "synthetic"}, "meta_source=synthetic: this stream has no generator .* Set meta_source=own"),
    ],
)
def test_a_source_that_is_not_there_is_refused_when_bound(values: dict[str, Any], said: str, clip: CLIP) -> None:
    with pytest.raises(PerdureError, match=said):
        TAALM(**values).bind(clip, Context(stream="a stream"))


def test_images_of_which_nothing_can_be_asked_are_refused(clip: CLIP, stream: Stream) -> None:
    task = stream.tasks[0]
    single = replace(task, train=task.train.few(1, torch.Generator()))
    method = ready(TAALM(**FEW, **BRIEF), clip, tasks=(single,))
    with pytest.raises(PerdureError, match="two classes at least that have two images each; .* there are 0"):
        method.begin_task(single)
    assert not method.state.phi
