"""The ridge head: its algebra against brute force, and the head in runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

import perdure
from perdure.core.errors import PerdureError
from perdure.data.copies import copies
from perdure.data.task import Class, Context, Images, Query, Stream, Task
from perdure.engine.watcher import Watcher
from perdure.methods.base import Method
from perdure.methods.compose import Compose
from perdure.methods.condu import ConDU
from perdure.methods.finetune import FineTune
from perdure.methods.mg_clip import MGCLIP
from perdure.methods.ridge import Ridge
from perdure.models.clip import CLIP
from perdure.models.heads import mix
from perdure.ops import ridge
from perdure.training.closed_form import LAMBDAS, TEMPERATURES

Run = Callable[..., dict[str, Any]]


def world(width: int, images: int = 60, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Lifted images Φ (n, M), their classes (n,) and targets Y (n, C), fp64; images of three tasks."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 12, generator=draw).double() + 0.5
    phi = torch.relu(x @ torch.randn(12, width, generator=draw).double())
    labels = torch.randint(classes, (images,), generator=draw)
    return phi, labels, F.one_hot(labels, classes).double()


def sums(phi: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (phi.T @ phi).tril(), phi.T @ y


def refitted(phi: Tensor, y: Tensor, lam: float, left: list[int]) -> Tensor:
    """The scores of the images ``left`` by a head that was fitted without them."""
    rest = [k for k in range(len(phi)) if k not in left]
    gram = phi[rest].T @ phi[rest] + lam * torch.eye(phi.shape[1], dtype=phi.dtype)
    return phi[left] @ torch.linalg.solve(gram, phi[rest].T @ y[rest])


def close(a: Tensor, b: Tensor, most: float) -> bool:
    return ((a - b).abs().max() / b.abs().max()).item() < most


# ---- sums and solutions


@given(some.integers(1, 40), some.integers(0, 1000))
def test_packed_sums_come_back_to_the_bit(width: int, seed: int) -> None:
    gram = torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double()
    packed = ridge.pack(gram)
    assert packed.numel() == width * (width + 1) // 2
    assert torch.equal(ridge.unpack(packed), gram.tril())


@pytest.mark.parametrize("lam", [1e-3, 1.0, 100.0])
def test_a_solution_reads_the_lower_triangle_alone_and_is_the_ridge_regression(lam: float) -> None:
    phi, _, y = world(32)
    gram, cross = sums(phi, y)
    factor, jitter = ridge.cholesky(gram + torch.randn(32, 32).double().triu(1), lam)
    wanted = torch.linalg.solve(phi.T @ phi + lam * torch.eye(32).double(), cross)
    assert jitter == 0 and close(ridge.solve(factor, cross), wanted, 1e-9)


def test_without_lambda_it_is_least_squares_and_singular_sums_are_refused() -> None:
    phi, _, y = world(16)
    factor, _ = ridge.cholesky(sums(phi, y)[0], 0.0)
    assert close(ridge.solve(factor, phi.T @ y), torch.linalg.lstsq(phi, y).solution, 1e-9)
    wide, _, _ = world(96)
    with pytest.raises(PerdureError, match=r"singular.*lam"):
        ridge.cholesky((wide.T @ wide).tril(), 0.0)


def test_a_jitter_is_reported_where_rounding_has_made_the_sums_indefinite() -> None:
    gram = torch.diag(torch.tensor([1e16, 1.0, -1e-3]).double())
    factor, jitter = ridge.cholesky(gram, 1e-9)
    assert jitter > 0 and torch.isfinite(factor).all()


@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_the_recursion_of_the_papers_ends_at_the_same_solution(lam: float) -> None:
    """Woodbury, seven images at a time, in a shuffled order (RAIL, eq. of the primal form), in fp64."""
    phi, _, y = world(32)
    inverse, solution = torch.eye(32).double() / lam, torch.zeros(32, 7).double()
    for some_ in torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(7):
        batch = phi[some_]
        gain = inverse @ batch.T @ torch.linalg.inv(torch.eye(len(some_)).double() + batch @ inverse @ batch.T)
        inverse = inverse - gain @ batch @ inverse
        solution = solution + inverse @ batch.T @ (y[some_] - batch @ solution)
    assert close(ridge.solve(ridge.cholesky(sums(phi, y)[0], lam)[0], phi.T @ y), solution, 1e-9)


def test_a_large_lambda_leaves_class_sums() -> None:
    phi, _, y = world(32)
    gram, cross = sums(phi, y)
    assert close(1e12 * ridge.solve(ridge.cholesky(gram, 1e12)[0], cross), cross, 1e-6)


# ---- leaving out


@pytest.mark.parametrize(("width", "lam"), [(32, 1e-3), (32, 1.0), (32, 100.0), (256, 1.0)])
@pytest.mark.parametrize("form", ["cholesky", "before", "spectrum"])
def test_leaving_an_image_out_is_refitting_without_it(form: str, width: int, lam: float) -> None:
    phi, _, y = world(width)
    newest = slice(40, 60)  # the images of the last of three tasks; the sums hold all
    if form == "before":
        gram, cross = sums(phi[:40], y[:40])
        found = ridge.leave_one_out_before(ridge.cholesky(gram, lam)[0], cross, phi[newest], y[newest])
    else:
        gram, cross = sums(phi, y)
        factor = ridge.cholesky(gram, lam)[0]
        half = torch.linalg.solve_triangular(factor, cross, upper=False)
        found = (
            ridge.leave_one_out(factor, half, phi[newest], y[newest])
            if form == "cholesky"
            else ridge.Spectrum(gram, cross).leave_one_out(lam, phi[newest], y[newest])
        )
    wanted = torch.cat([refitted(phi, y, lam, [k]) for k in range(40, 60)])
    assert close(found, wanted, 1e-9)


@pytest.mark.parametrize("width", [32, ridge.NARROW + 8])
def test_copies_are_left_out_together(width: int) -> None:
    phi, _, y = world(width)
    phi[[5, 9]], y[[5, 9]] = phi[2].clone(), y[2].clone()
    gram, cross = sums(phi, y)
    parts = ridge.whole_groups(60, [torch.tensor([2, 5, 9])], size=16)
    assert sorted(torch.cat([index for index, _ in parts]).tolist()) == list(range(60))
    course = ridge.left_out_course(
        gram, cross, [0.5, 2.0], lambda: ((i, phi[i], y[i], groups) for i, groups in parts), 60
    )
    for lam, found in zip([0.5, 2.0], course, strict=True):
        assert close(found[[2, 5, 9]], refitted(phi, y, lam, [2, 5, 9]), 1e-8)
        assert close(found[[3]], refitted(phi, y, lam, [3]), 1e-8)


def test_leverages_are_those_of_a_ridge_regression() -> None:
    phi, _, y = world(96)
    factor, _ = ridge.cholesky(sums(phi, y)[0], 0.3)
    leverage = torch.linalg.solve_triangular(factor, phi.T, upper=False).square().sum(0)
    whole = phi.T @ phi
    trace = torch.linalg.solve(whole + 0.3 * torch.eye(96).double(), whole).trace()
    assert bool((leverage >= 0).all()) and bool((leverage < 1).all())
    assert leverage.sum().item() == pytest.approx(trace.item()) and trace < 60


def test_one_image_of_a_class_knows_nothing_of_it_once_left_out() -> None:
    phi, labels, y = world(96)
    labels[:] = labels.clamp_max(5)
    labels[7] = 6
    y = F.one_hot(labels, 7).double()
    gram, cross = sums(phi, y)
    found = ridge.Spectrum(gram, cross).leave_one_out(0.5, phi, y)
    assert found[7, 6].abs() < 1e-12 and found.isfinite().all()


def test_the_best_share_is_the_likeliest() -> None:
    draw = torch.Generator().manual_seed(0)
    text, head = torch.rand(2, 200, generator=draw).double()
    best = ridge.best_share(text, head, rounds=400)

    def likelihood(share: float) -> float:
        return ((1 - share) * text + share * head).log().sum().item()

    assert 0 < best < 1
    assert likelihood(best) >= max(likelihood(k / 100) for k in range(101)) - 1e-6


# ---- the head


def small(**values: Any) -> Ridge:
    return Ridge(**{"features": 64, **values})


def learned(clip: CLIP, tasks: list[Task], method: Method | None = None, **values: Any) -> Any:
    method = method or small(**values)
    method.bind(clip, Context(seed=3, tasks=tuple(tasks)))
    for task in tasks:
        clip.load_weights("pretrained", clip.pretrained)
        method.calibrate(task)
    return method


def by_class(method: Ridge) -> dict[str, Tensor]:
    return {name: method.head.solved()[:, row] for row, (name, _) in enumerate(method.state.classes)}


def test_the_order_of_tasks_and_a_class_in_two_of_them_do_not_matter(clip: CLIP, stream: Stream) -> None:
    fixed: dict[str, Any] = dict(lam=0.5, temperature=10.0, weight=0.7, choose="fixed")
    one, two, three = stream.tasks
    half = torch.arange(len(three.train))
    first, second = (replace(three, name=n, train=three.train.take(half[k::2])) for k, n in enumerate("ab"))
    wanted = by_class(learned(clip, [one, two, three], **fixed))
    for tasks in ([three, one, two], [second, two, first, one]):
        found = by_class(learned(clip, tasks, **fixed))
        assert found.keys() == wanted.keys()
        assert all(close(found[name], wanted[name], 1e-9) for name in wanted)


def test_the_sums_are_those_of_all_images_at_once(clip: CLIP, stream: Stream) -> None:
    method = learned(clip, list(stream.tasks), lam=0.5, temperature=10.0, weight=0.7, choose="fixed")
    x = torch.cat([method.inputs(clip.features(t.train.pixels)) for t in stream.tasks])
    phi, names = torch.relu(x @ method.head.lift.weights).double(), [c.name for t in stream.tasks for c in t.classes]
    shift = torch.tensor([0, *(len(t.classes) for t in stream.tasks)]).cumsum(0).tolist()
    labels = torch.cat([t.train.labels + s for t, s in zip(stream.tasks, shift, strict=False)])
    y = F.one_hot(labels, len(names)).double()
    wanted = torch.linalg.solve(phi.T @ phi + 0.5 * torch.eye(64).double(), phi.T @ y)
    found = by_class(method)
    assert all(close(column, wanted[:, names.index(name)], 1e-9) for name, column in found.items())


def test_a_class_without_images_gets_no_row_and_keeps_its_text(clip: CLIP, stream: Stream) -> None:
    task = stream.tasks[1]
    kept = task.train.labels != 2
    method = learned(clip, [replace(task, train=task.train.take(kept.nonzero().squeeze(1)))])
    assert len(method.state.classes) == len(task.classes) - 1 and 0 not in method.state.counts
    query = Query(task.test.pixels, task.classes)
    text = Method.logits(method, query).softmax(1)
    assert torch.equal(method.predict(query)[:, 2], text[:, 2])
    assert not torch.equal(method.predict(query)[:, 3], text[:, 3])


def test_a_class_asked_twice_has_equal_scores(clip: CLIP, stream: Stream) -> None:
    task = stream.tasks[0]
    answer = learned(clip, [task]).predict(Query(task.test.pixels, (*task.classes, task.classes[1])))
    torch.testing.assert_close(answer[:, 1], answer[:, -1], atol=1e-6, rtol=0)


def test_a_share_of_nothing_is_zero_shot_to_the_bit(clip: CLIP, stream: Stream) -> None:
    method = learned(clip, [stream.tasks[0]], weight=0.0)
    query = Query(stream.tasks[0].test.pixels, stream.tasks[0].classes)
    assert torch.equal(method.predict(query), Method.logits(method, query).softmax(1))


def test_removing_images_is_never_having_seen_them(clip: CLIP, stream: Stream) -> None:
    one, two = stream.tasks[:2]
    fixed: dict[str, Any] = dict(lam=0.5, temperature=10.0, weight=0.7, choose="fixed")
    both, alone = learned(clip, [one, two], **fixed), learned(clip, [one], **fixed)
    phi = both.head.lift(both.inputs(clip.features(two.train.pixels)))
    less = ridge.unpack(both.state.sums["gram"]) - (phi.T @ phi).tril()
    assert close(less, ridge.unpack(alone.state.sums["gram"]), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["task", "all"])
def test_what_is_chosen_is_the_likeliest_by_brute_force(clip: CLIP, stream: Stream, chosen: str) -> None:
    """λ, τ and w of a run of two tasks, from heads that were fitted again without each image."""
    tasks = [replace(t, train=t.train.spread(24)) for t in stream.tasks[:2]]
    method = small(features=16)
    method.bind(clip, Context(seed=3, labels=chosen))
    table = torch.zeros(len(LAMBDAS), len(TEMPERATURES)).double()
    phis, ys, scale = [], [], 0.0
    for task in tasks:
        method.calibrate(task)
        seen = clip.features(task.train.pixels)
        phis.append(method.head.lift(method.inputs(seen)))
        rows = [method.state.classes.index((c.name, c.templates)) if (c.name, c.templates) in method.state.classes else -1
                for c in task.classes]  # fmt: skip
        ys.append(torch.tensor(rows)[task.train.labels])
        scale = scale or phis[0].square().sum(1).mean().item()
        phi, y = torch.cat(phis), F.one_hot(torch.cat(ys), len(method.state.classes)).double()
        asked = [Class(*row) for row in method.state.classes] if chosen == "all" else list(task.classes)
        columns = [k for k, c in enumerate(asked) if (c.name, c.templates) in method.state.classes]
        own = [method.state.classes.index((asked[k].name, asked[k].templates)) for k in columns]
        text = (
            clip.similarity(seen.embedded, clip.class_texts([c.prompts() for c in asked]))
            .softmax(1)
            .double()[:, columns]
        )
        mass = text.sum(1)
        start = sum(len(p) for p in phis[:-1])
        for i, share in enumerate(LAMBDAS):
            scores = torch.cat([refitted(phi, y, share * scale, [k]) for k in range(start, len(phi))])[:, own]
            true = [own.index(row) for row in ys[-1].tolist()]
            for j, tau in enumerate(TEMPERATURES):
                head = mass * (tau * scores).softmax(1)[range(len(true)), true]
                mine = text[range(len(true)), true]
                w = ridge.best_share(mine, head)
                table[i, j] += ((1 - w) * mine + w * head).log().sum()
        found = torch.tensor(method.state.evidence, dtype=torch.float64)[..., 0]
        torch.testing.assert_close(found, table, rtol=1e-6, atol=1e-6)
        i, j = divmod(int(table.argmax()), len(TEMPERATURES))
        assert method.state.lam == pytest.approx(LAMBDAS[i] * scale) and method.state.temperature == TEMPERATURES[j]
        assert 0 < method.state.weight <= 1


@pytest.mark.parametrize("inputs", ["hidden", "projected", "patches"])
def test_inputs_are_what_they_are_called(clip: CLIP, stream: Stream, inputs: str) -> None:
    pixels = stream.tasks[0].test.pixels[:5]
    method = small(input=inputs, block=1, grid=4)
    method.bind(clip)
    x = method.inputs(method.look(pixels))
    with torch.no_grad():
        out = clip.backbone.vision_model(pixel_values=clip.pixels(pixels), output_hidden_states=True)
    if inputs == "projected":
        wanted = clip.encode_image(pixels).detach()
    elif inputs == "hidden":
        wanted = F.normalize(out.pooler_output, dim=1)
    else:  # as many fields as patches: every patch of the last block
        patches = out.hidden_states[-1][:, 1:].transpose(1, 2).flatten(1)
        wanted = torch.cat([F.normalize(out.pooler_output, dim=1), F.normalize(patches, dim=1)], 1) / 2**0.5
    torch.testing.assert_close(x, wanted, atol=1e-5, rtol=0)
    with pytest.raises(PerdureError, match="4 blocks"):
        clip.features(pixels, block=9)


def test_an_image_of_no_learned_class_is_answered_no_worse_behind_the_gate(clip: CLIP, stream: Stream) -> None:
    method = learned(clip, list(stream.tasks[:2]), gate="argmax")
    classes = tuple(c for t in stream.tasks for c in t.classes)
    query = Query(stream.tasks[2].test.pixels, classes)
    text = Method.logits(method, query)
    labels = stream.tasks[2].test.labels + sum(len(t.classes) for t in stream.tasks[:2])
    right = text.argmax(1) == labels
    assert bool(right.any()) and torch.equal(method.predict(query).argmax(1)[right], labels[right])


def test_a_twin_of_a_learned_class_is_inside_the_gate() -> None:
    text, visual = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[1.0]])
    twins = [Class("x", ("{}",)), Class("y", ("{}",)), Class("x", ("a {}",))]
    assert mix(text, visual, [2], 0.2, 0.8, "argmax", twins)[0, 2] > 0.8
    others = [Class("z", ("{}",)), *twins[1:]]
    assert torch.equal(mix(text, visual, [2], 0.2, 0.8, "argmax", others), text)


def test_copies_are_found(stream: Stream) -> None:
    pixels = stream.tasks[0].train.pixels[:4]
    assert [g.tolist() for g in copies(torch.cat([pixels, pixels[1:2], pixels[1:2]]))] == [[1, 4, 5]]
    assert copies(pixels) == []


# ---- what cannot be


def test_bad_input_is_said(clip: CLIP, stream: Stream) -> None:
    task = stream.tasks[0]
    for values, said in (
        (dict(choose="fixed"), "lam, temperature, weight"),
        (dict(choose="holdout"), "temperature, weight"),
        (dict(score="raw"), "weight a number"),
    ):
        with pytest.raises(PerdureError, match=said):
            small(**values).bind(clip)
    with pytest.raises(PerdureError, match=r"1000000 features needs \d+\.\d GB.*features=\d+ or"):
        learned(clip, [replace(task, train=task.train.spread(2))], features=10**6)
    with pytest.raises(PerdureError, match="grid=5: the image tower of .* has 4 blocks and 4 × 4 patches"):
        small(input="patches", grid=5).bind(clip)
    dark = Images(torch.zeros_like(task.train.pixels), task.train.labels)
    method = small()
    method.bind(clip)
    method.look = lambda images: replace(  # type: ignore[method-assign]
        clip.features(images), pooled=torch.zeros(len(images), 192)
    )
    with pytest.raises(PerdureError, match="images are 0"):
        method.calibrate(replace(task, train=dark))


def test_another_layer_or_width_than_the_state_s_is_refused(clip: CLIP, stream: Stream) -> None:
    method = learned(clip, [stream.tasks[0]])
    query = Query(stream.tasks[0].test.pixels, stream.tasks[0].classes)
    for other, said in ((small(features=32), "64 features, and is asked with 32"), (small(), "cannot be drawn again")):
        other.bind(clip, Context(seed=4))
        other.unpack_state(*method.pack_state())
        with pytest.raises(PerdureError, match=said):
            other.predict(query)
    same = small()
    same.bind(clip, Context(seed=3))
    same.unpack_state(*method.pack_state())
    assert torch.equal(same.predict(query), method.predict(query))


# ---- composed


def test_a_head_stands_on_the_pretrained_weights_whatever_learns(clip: CLIP, stream: Stream) -> None:
    for learner, base in ((FineTune(), "last"), (ConDU(), "pretrained")):
        for head, wanted in (
            (small(), "pretrained"),
            (MGCLIP(on="pretrained"), "pretrained"),
            (small(on="drifting"), base),
        ):
            method = Compose(learn=learner, answer=head)
            method.bind(clip)
            assert method.head_expert().name == wanted


@pytest.mark.slow
def test_a_drifting_head_says_so_and_can_be_made_again(tmp_path: Any) -> None:
    said: list[str] = []

    class Ears(Watcher):
        def warn(self, text: str) -> None:
            said.append(text)

    values: dict[str, Any] = dict(tasks=2, images=32, iterations=6, warmup=0, lr=3e-3, features=64, precision="fp32")
    found = {
        key: perdure.run("finetune+ridge", "mini-mtil", tmp_path / key, watcher=Ears(), **values, **more)
        for key, more in dict[str, dict[str, Any]]({
            "exact": {}, "drifting": {"on": "drifting"}, "again": {"on": "drifting", "reencode": True},
        }).items()
    }  # fmt: skip
    assert any("moved by" in text and "reencode=true" in text for text in said)
    assert "features moved by" not in found["exact"]["remarks"]["digits"]
    assert found["drifting"]["remarks"]["digits"]["features moved by"] > 0.02
    assert len({str(m["accuracy"][2]) for m in found.values()}) == 3


# ---- in runs


def test_transfer_and_probe_are_zero_shot_s_to_the_bit(short_run: Run) -> None:
    mine, plain = short_run("ridge", features=128), short_run("zero_shot")
    assert mine["transfer"] == plain["transfer"] and mine["probe"] == plain["probe"]
    for row, (found, before) in enumerate(zip(mine["accuracy"], plain["accuracy"], strict=True)):
        assert found[row:] == before[row:]
    assert mine["accuracy"][1:] != plain["accuracy"][1:] and mine["last"] > plain["last"]
    assert mine["remarks"]["digits"]["λ"] > 0
