"""MG-CLIP in use: the gap as a measure, epochs that are found, heads on the features they answer on, combinations."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from perdure import launch
from perdure.core.errors import PerdureError
from perdure.data.task import Images, Query, Stream
from perdure.engine.evaluate import for_gap, gap
from perdure.methods.base import Method, Recipe
from perdure.methods.compose import Compose
from perdure.methods.condu import ConDU
from perdure.methods.mg_clip import MGCLIP
from perdure.methods.ncm import NearestClassMean
from perdure.models.clip import CLIP
from perdure.models.heads import CosineHead, mix, softmax
from perdure.ops.gap import logit_means, measure, relative_change
from perdure.ops.prototypes import class_means
from perdure.training.fit import fit

Run = Callable[..., dict[str, Any]]


def test_mean_logits_of_right_and_wrong_classes() -> None:
    logits = torch.tensor([[3.0, 1.0, -1.0], [0.0, 6.0, 2.0], [1.0, 1.0, 4.0]])
    labels = torch.tensor([0, 1, 2])
    assert logit_means(logits, labels) == pytest.approx((13 / 3, (0 + 1 + 1) / 3))
    assert logit_means(logits, labels, batch=2) == pytest.approx(((4.5 + 4) / 2, (0.5 + 1) / 2))
    assert logit_means(torch.ones(2, 1), torch.zeros(2, dtype=torch.long)) == (1.0, 0.0)  # one class: no wrong one


def test_the_change_is_relative_to_magnitude() -> None:
    assert relative_change(-2.0, -1.8) == relative_change(2.0, 1.8) == pytest.approx(0.1)
    assert relative_change(-2.0, -2.2) == pytest.approx(0.1)
    assert math.isfinite(relative_change(0.0, 1.0))


def test_angle_and_distance_between_the_cones() -> None:
    images, texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    found = measure(images, texts, torch.tensor([0, 1]), 10.0)
    assert found == pytest.approx({"positive": 0.0, "negative": 0.0, "distance": 2**0.5, "angle": 90.0})


def test_classes_without_a_row_keep_what_the_text_says() -> None:
    text = softmax(torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]]))
    visual = softmax(torch.tensor([[0.0, 5.0], [1.0, 0.0]]))
    mixed = mix(text, visual, [0, 2], 1.0, 4.0)
    assert torch.allclose(mixed.sum(1), torch.ones(2)) and torch.equal(mixed[:, 1], text[:, 1])
    every = mix(text[:, :2] / text[:, :2].sum(1, keepdim=True), visual, torch.arange(2), 1.0, 4.0)
    first = text[:, :2] / text[:, :2].sum(1, keepdim=True)
    assert torch.allclose(every, (first + 4 * visual) / 5)


def learned(clip: CLIP, stream: Stream, method: Method, tasks: int = 2) -> Method:
    method.bind(clip)
    for task in stream.tasks[:tasks]:
        method.start(task)
        method.begin_task(task)
        if fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device):
            clip.trained(f"trained {task.name}")
        method.fuse(task)
        with clip.preserved():
            method.load_expert(method.base_expert())
            method.calibrate(task)
    return method


def test_the_gap_decides_once_and_training_starts_anew(clip: CLIP, stream: Stream) -> None:
    method = MGCLIP(lr=2e-2, batch_size=24, most_epochs=4, gap_change=0.02, head_epochs=1)
    learned(clip, stream, method, tasks=1)
    state, per_epoch = method.state, method.per_epoch
    assert per_epoch == 2
    assert 1 <= state.epochs == max(1, len(state.changes) - 1) and state.changes[-1] > 0.02
    assert all(change <= 0.02 for change in state.changes[:-1])
    assert method.schedule(stream.tasks[0]).steps == state.epochs * per_epoch
    before = list(state.changes)
    method.begin_task(stream.tasks[1])
    assert not method.searching and method.state.changes == before  # once, on the first task


def test_only_keys_and_values_learn_and_epochs_can_be_given(clip: CLIP, stream: Stream) -> None:
    method = learned(clip, stream, MGCLIP(epochs=2, batch_size=24, head=False), tasks=1)
    assert isinstance(method, MGCLIP)
    layers = {n.split(".self_attn.")[1].split(".")[0] for n in method.parameters()}
    assert layers == {"k_proj", "v_proj"} and method.state.changes == [] and not method.state.head
    plan = method.schedule(stream.tasks[0])
    assert plan.steps == 4 and plan.rate(0) == plan.rate(1) == 1e-3 and plan.rate(2) == pytest.approx(0.505e-3)
    query = Query(stream.tasks[0].test.pixels[:3], stream.tasks[0].classes)
    assert torch.allclose(method.predict(query), Method.logits(method, query), atol=1e-5)


def test_old_rows_stay_and_a_class_has_one_row(clip: CLIP, stream: Stream) -> None:
    method = learned(clip, stream, MGCLIP(epochs=1, batch_size=24, head_lr=0.01))
    assert isinstance(method, MGCLIP)
    sizes = [len(t.classes) for t in stream.tasks[:2]]
    rows = method.state.head["rows"].clone()
    assert rows.shape[0] == len(method.state.classes) == sum(sizes)
    method.calibrate(stream.tasks[1])
    assert len(method.state.classes) == sum(sizes)
    assert torch.equal(method.state.head["rows"][: sizes[0]], rows[: sizes[0]])


def test_a_class_without_images_gets_no_row(clip: CLIP, stream: Stream) -> None:
    task = stream.tasks[0]
    kept = task.train.labels != 2
    thin = replace(task, train=Images(task.train.pixels[kept], task.train.labels[kept]))
    method = MGCLIP(epochs=1, head_lr=0.01)
    method.bind(clip)
    method.calibrate(thin)
    names = [name for name, _ in method.state.classes]
    assert names == [c.name for k, c in enumerate(task.classes) if k in task.train.labels[kept].tolist()]
    query = Query(task.test.pixels[:4], task.classes)
    text = softmax(Method.logits(method, query), 2)
    assert torch.allclose(method.predict(query)[:, 2], text[:, 2], atol=1e-6)


def test_a_search_that_diverges_is_said_so(clip: CLIP, stream: Stream) -> None:
    with pytest.raises(PerdureError, match="diverged"):
        learned(clip, stream, MGCLIP(lr=1e12, batch_size=8, most_epochs=2, head=False), tasks=1)


def test_a_composed_head_stands_on_the_features_it_answers_on(clip: CLIP, stream: Stream) -> None:
    head = MGCLIP(head_epochs=0)
    method = Compose(learn=Method(Recipe(iterations=2, warmup=1, lr=1e-4, batch_size=8)), fuse=ConDU(), answer=head)
    learned(clip, stream, method)
    assert clip.holds == "pretrained"
    task = stream.tasks[0]
    features = clip.encode_image(task.train.pixels)
    rows, _ = class_means(features, task.train.labels, len(task.classes))
    torch.testing.assert_close(head.state.head["rows"][: len(rows)], rows, atol=1e-5, rtol=1e-4)
    query = Query(task.test.pixels[:5], task.classes, 0)  # known: its expert's texts, the pre-trained features' head
    found = method.predict(query)
    (expert,) = method.experts(query)
    assert expert.weights is not None
    clip.load_weights(expert.name, expert.weights)
    text = softmax(Method.logits(method, query), 2)
    clip.load_weights("pretrained", clip.pretrained)
    cosines = CosineHead(rows)(clip.encode_image(query.images))
    wanted = mix(text, softmax(cosines), torch.arange(len(task.classes)), 1.0, 4.0)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_nearest_class_mean(clip: CLIP, stream: Stream) -> None:
    method = learned(clip, stream, NearestClassMean())
    task = stream.tasks[1]
    found = method.predict(Query(task.train.pixels, task.classes))
    features = clip.encode_image(task.train.pixels)
    means, _ = class_means(features, task.train.labels, len(task.classes))
    assert torch.equal(found.argmax(1), (features @ torch.nn.functional.normalize(means, dim=1).T).argmax(1))
    new = stream.tasks[2]
    query = Query(new.test.pixels[:4], new.classes)
    assert torch.allclose(method.predict(query), Method.logits(method, query), atol=1e-5)
    mixed = Query(task.test.pixels[:4], (*task.classes, *new.classes))
    assert bool((method.predict(mixed)[:, len(task.classes) :] == -1).all())


@pytest.mark.parametrize("name", ["gift+condu", "gift+mg_clip", "condu+mg_clip", "gift+condu+mg_clip"])
def test_combinations_are_methods_like_any_other(name: str) -> None:
    known = launch.method_options(launch.method_entry(name))
    method = launch.build(name, {key: option.default for key, (_, option) in known.items()})
    assert isinstance(method, Compose)
    assert ("synthetic" in known) == ("gift" in name) and ("experts" in known) == ("condu" in name)
    assert ("head_weight" in known) == ("mg_clip" in name) and "gap_change" not in known


@pytest.mark.slow
@pytest.mark.parametrize("stream_name", ["mini-mtil", "mini-cil"])
def test_all_three_together_on_both_streams(stream_name: str, short_run: Run) -> None:
    m = short_run("gift+condu+mg_clip", stream_name, synthetic=8, sampling_steps=2, sampling_batch=4)
    assert len(m["accuracy"]) == 4  # what it gains: tests/test_gains.py
    assert {"task", "distil_image", "consolidation"} <= set(m["losses"][m["tasks"][0]])


@pytest.mark.slow
def test_a_run_records_the_gap_of_any_method(short_run: Run, clip: CLIP, stream: Stream) -> None:
    m = short_run("finetune", lr=5e-4, iterations=12)
    assert [set(g) for g in m["gap"]] == [{"positive", "negative", "distance", "angle"}] * 4
    assert m["gap"][3] != m["gap"][0] == short_run("condu")["gap"][3]  # ConDU's home is the pre-trained model
    method = Method(Recipe())
    method.bind(clip)
    assert set(gap(method, for_gap(replace(stream, probe=None)))) == set(m["gap"][0])  # on the tasks' own images


def test_the_gate_and_what_the_head_stands_on_are_options(clip: CLIP, stream: Stream) -> None:
    """Behind RAIL's gate, an image whose likeliest class has no row keeps what the text says of it."""
    one, two = stream.tasks[:2]
    asked = Query(two.test.pixels, (*one.classes, *two.classes))
    found = {}
    for gate in ("mass", "argmax", "none"):
        method = MGCLIP(adapt="full", head_epochs=1, gate=gate, on="pretrained", softmax="single")
        method.bind(clip)
        method.calibrate(one)
        found[gate] = method.predict(asked)
    text = softmax(Method.logits(method, asked))
    outside = text.argmax(1) >= len(one.classes)
    assert bool(outside.any()) and not bool(outside.all())
    assert torch.equal(found["argmax"][outside], text[outside])
    assert not torch.equal(found["argmax"][~outside], text[~outside])
    assert not torch.equal(found["mass"], found["argmax"]) and not torch.equal(found["none"], found["argmax"])
    assert method.head_expert().name == "pretrained" and MGCLIP().head_expert().name == "last"
