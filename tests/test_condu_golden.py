"""ConDU against the numbers of the paper's own released code, on tiny CLIPs, through the method and ``fit``."""

import functools
import math
import re
from typing import Any

import pytest
import torch
from cases import case, in_order, part, tiny_clip
from torch import Tensor

from perdure.data.task import Class, Images, Query, Task
from perdure.methods.condu import ConDU
from perdure.models.clip import CLIP
from perdure.ops import fusion
from perdure.ops.prototypes import best_similarity
from perdure.training import fit as training
from perdure.training.fit import fit


def masks_of(method: ConDU, task: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
    bits = method.state.trigger[task]
    return {n: fusion.unpacked(bits[n], t.numel()).view(t.shape) for n, t in like.items()}


def test_unifying_session_after_session_is_the_release_s() -> None:
    about, t = case("condu_unify_a")
    clip = tiny_clip(about, part(t, "pretrained/"), {"class 0": torch.tensor([1, 2, 3])})
    clip.tokenizer.eos_token_id = 3
    method = ConDU()
    method.bind(clip)
    allowed = about["tolerance"]
    image = Images(torch.zeros(1, 3, clip.size, clip.size), torch.zeros(1, dtype=torch.long))
    for session in range(3):
        task = Task(f"Task{session}", (Class("0", ("class {}",)),), image, image)
        method.start(task)
        clip.load_weights("tuned", part(t, f"finetuned{session}/"))
        method.fuse(task)
        if not session:
            for name, weight in method.decoupled(0).items():
                assert torch.allclose(weight, t[f"finetuned0/{name}"], rtol=0, atol=1e-6), name
            continue
        unified = part(t, f"session{session}/unified/")
        assert method.state.rescaler == pytest.approx(
            t[f"session{session}/rescalers"].tolist(), rel=allowed["rescalers_relative"]
        )
        for name, delta in unified.items():
            assert torch.allclose(method.state.unified[name], delta, rtol=0, atol=allowed["unified_recon_abs"]), name
        for k in range(session + 1):
            wanted = part(t, f"session{session}/mask{k}/")
            mine = masks_of(method, f"Task{k}", wanted)
            assert all(torch.equal(mine[n], m) for n, m in wanted.items()), (session, k)
    origin = part(t, "pretrained/")
    for k in range(3):
        weights = method.decoupled(k)
        for name, delta in part(t, f"session2/recon_delta{k}/").items():
            assert torch.allclose(weights[name] - origin[name], delta, rtol=0, atol=allowed["unified_recon_abs"]), name


def test_the_hand_made_deltas_and_the_ones_that_break_the_release() -> None:
    _, t = case("condu_unify_a")
    for made, allowed in (("toy/", True), ("toy_nan/", False)):
        deltas = part(t, f"{made}deltas") if not allowed else part(t, f"{made}deltas/")
        means = fusion.Means(3)
        for name, delta in deltas.items():
            unified, agree = fusion.elect(delta.reshape(3, -1))
            place = f"{made}unified/{name}" if allowed else f"{made}unified"
            assert torch.equal(unified, t[place].reshape(-1))
            assert torch.equal(agree, t[place.replace("unified", "masks")].reshape(3, -1))
            means.add(name, delta.reshape(3, -1).abs().sum(1), agree.float() @ unified.abs(), unified.numel())
        found = means.rescalers()
        assert all(math.isfinite(r) for r in found)
        wanted = t[f"{made}rescalers"].tolist()
        assert found == pytest.approx(wanted if allowed else [wanted[0], 1, 1], rel=1e-5)


@functools.cache
def learned(train: bool) -> tuple[ConDU, list[dict[str, list[float]]]]:
    """The release's three tasks; ``train``: with perdure's loop, or with the weights that the release's left behind."""
    about, t = case("condu_aggregate_a")
    h = about["hyper_parameters"]
    ids = {f"test {k} {i}": row for i in (1, 2) for k, row in enumerate(t[f"test_tokens_template{i}"])}
    for n in range(3):
        ids |= {f"{n} {k} {i}": row for i in (1, 2) for k, row in enumerate(t[f"task{n}/tokens_template{i}"])}
    clip = tiny_clip(about, part(t, "pretrained/"), ids)
    method = ConDU(
        iterations=h["iterations"], lr=h["lr"], warmup=h["warmup_length"], label_smoothing=h["ls"],
        batch_size=h["batch_size"], beta2=h["beta2"], weight_decay=h["wd"],
    )  # fmt: skip
    method.bind(clip)
    losses: list[dict[str, list[float]]] = []
    for n in range(3):
        count = len(t[f"task{n}/tokens_template1"])
        classes = tuple(Class(f"{n} {k}", ("{} 1", "{} 2")) for k in range(count))
        images = Images(t[f"task{n}/images"], t[f"task{n}/labels"])
        task = Task(f"Task{n}", classes, images, images, n)
        method.start(task)
        method.begin_task(task)
        if train:
            losses.append(fit(method, task, torch.Generator(), clip.size, clip.device))
            clip.trained(f"trained {n}")
        else:
            clip.load_weights(f"trained {n}", part(t, f"finetuned{n}/"))
        method.fuse(task)
    return method, losses


def query(method: ConDU, clip: CLIP, **options: object) -> Query:
    _, t = case("condu_aggregate_a")
    clip.backbone.logit_scale.data.fill_(math.log(100))  # the release's constant
    clip.pretrained["logit_scale"].fill_(math.log(100))
    classes = [Class(f"test {k}", ("{} 1", "{} 2")) for k in range(6)]
    return Query(t["test_images"], classes, **options)  # type: ignore[arg-type]


def test_training_is_the_release_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "batches", in_order)
    monkeypatch.setattr(training, "crops", lambda pixels, index, size, numbers: pixels[index])
    _, losses = learned(train=True)
    about, _ = case("condu_aggregate_a")
    for n in range(3):
        wanted = about["finetune_trajectories"][f"Task{n}"]["loss"][:-1]  # the last step is taken at rate 0
        assert losses[n]["task"] == pytest.approx(wanted, rel=about["tolerance"]["finetune_loss_relative"])


def test_prototypes_and_rescalers_are_the_release_s() -> None:
    method, _ = learned(train=False)
    about, t = case("condu_aggregate_a")
    allowed = about["tolerance"]
    for n in range(3):
        prototypes = method.state.prototypes[f"Task{n}"]
        assert torch.allclose(prototypes, t[f"prototypes/{n}"], rtol=0, atol=allowed["prototypes_abs"])
    assert method.state.rescaler == pytest.approx(about["rescalers_session2"], rel=1e-5)
    features = method.clip.embeddings(t["test_images"])
    nearness = torch.stack([best_similarity(features, p) for p in method.state.prototypes.values()], 1)
    assert torch.allclose(nearness, t["similarities"], rtol=0, atol=allowed["similarities_abs"])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_vote_of_the_nearest_experts_is_the_release_s(k: int) -> None:
    method, _ = learned(train=False)
    about, t = case("condu_aggregate_a")
    object.__setattr__(method.config, "experts", k)
    asked = query(method, method.clip)
    chosen = torch.stack([torch.as_tensor(e.gate).expand(12) for e in method.experts(asked)], 1) > 0
    for image, order in enumerate(t["model_order"][:, : k + 1]):
        assert set(chosen[image].nonzero().flatten().tolist()) == set(order.tolist())
    logits = method.predict(asked)
    assert torch.allclose(logits, t[f"agg{k}/aggregated_logits"], rtol=0, atol=about["tolerance"]["logits_abs"])
    assert torch.equal(logits.argmax(1), t[f"agg{k}/predictions"])


def test_a_known_task_is_answered_by_its_expert_alone() -> None:
    method, _ = learned(train=False)
    about, t = case("condu_aggregate_a")
    for number in range(3):
        logits = method.predict(query(method, method.clip, task=number))
        assert torch.allclose(logits, t["expert_logits"][number + 1], rtol=0, atol=about["tolerance"]["logits_abs"])


def by_hand(deltas: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[float]]:
    """Unified delta, masks and rescalers of deltas, element by element and tensor by tensor, as the paper has them."""
    unified: dict[str, Tensor] = {}
    masks: list[dict[str, Tensor]] = [{} for _ in deltas]
    means: dict[str, list[list[Tensor]]] = {}
    for name in deltas[0]:
        stack = torch.stack([d[name].flatten() for d in deltas])
        column = []
        for values in stack.T:
            sign = 1.0 if values.sum() > 0 else -1.0
            agreeing = [abs(v) for v in values.tolist() if v * sign > 0]
            column.append(sign * max(agreeing, default=0.0))
        unified[name] = torch.tensor(column).view(deltas[0][name].shape)
        whole = re.sub(r"[qkv]_proj", "qkv", name)
        for k, delta in enumerate(deltas):
            elected = torch.where(stack.sum(0) > 0, 1.0, -1.0).view(delta[name].shape)
            masks[k][name] = delta[name] * elected > 0
            pair = [delta[name].abs().flatten(), (unified[name] * masks[k][name]).abs().flatten()]
            means.setdefault(whole, [[] for _ in range(2 * len(deltas))])
            for which in (0, 1):
                means[whole][2 * k + which].append(pair[which])
    total = [sum(torch.cat(m[k]).double().mean() for m in means.values()) for k in range(2 * len(deltas))]
    return unified, masks, [float(total[2 * k] / total[2 * k + 1]) for k in range(len(deltas))]


def shifts(origin: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A delta that moves every tensor, the logit scale too; a tenth of the positions not at all."""
    draw = torch.Generator().manual_seed(seed)
    out = {
        n: torch.randn(t.shape, generator=draw) * (torch.rand(t.shape, generator=draw) > 0.1) for n, t in origin.items()
    }
    return {n: (0.3 if n == "logit_scale" else 0.01) * d for n, d in out.items()} | {
        "logit_scale": torch.tensor([0.4, -0.1, 0.2][seed])
    }


def small(about: dict[str, Any], t: dict[str, Tensor]) -> CLIP:
    """The case's model with most of its tensors made small, so that loops over elements end."""
    clip = tiny_clip(about, part(t, "pretrained/"), {"class 0": torch.tensor([1, 2, 3])})
    clip.tokenizer.eos_token_id = 3
    return clip


def test_the_logit_scale_counts_in_the_rescaler_as_any_tensor() -> None:
    """Three sessions whose experts move it, against loops over elements; the first session's deltas are exact."""
    about, t = case("condu_unify_a")
    clip = small(about, t)
    origin = clip.pretrained
    names = ["logit_scale", "visual_projection.weight", *(n for n in origin if n.endswith("_proj.bias"))]
    method, image = ConDU(), Images(torch.zeros(1, 3, clip.size, clip.size), torch.zeros(1, dtype=torch.long))
    method.bind(clip)
    kept: list[dict[str, Tensor]] = []
    for session in range(3):
        task = Task(f"Task{session}", (Class("0", ("class {}",)),), image, image, session)
        shift = shifts({n: origin[n] for n in names}, session)
        method.start(task)
        clip.load_weights("tuned", origin | {n: origin[n] + d for n, d in shift.items()})
        method.fuse(task)
        kept.append({n: (origin[n] + d) - origin[n] for n, d in shift.items()})
        unified, masks, rescalers = by_hand(kept)
        assert method.state.rescaler == pytest.approx(rescalers, rel=1e-5)
        for name in names:
            assert torch.allclose(method.state.unified[name], unified[name], rtol=0, atol=1e-7), name
        for k in range(session + 1):
            mine = masks_of(method, f"Task{k}", {n: origin[n] for n in names})
            assert all(torch.equal(mine[n], masks[k][n]) for n in names), (session, k)
        kept = [
            {n: (origin[n] + rescalers[k] * m[n] * unified[n]) - origin[n] for n in names} for k, m in enumerate(masks)
        ]
        for k in range(session + 1):
            expert = method.decoupled(k)
            assert all(
                torch.allclose(expert[n], origin[n] + kept[k][n], rtol=0, atol=1e-6) for n in origin if n in names
            )


def test_every_task_is_learned_from_the_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the model holds when a task begins, ``start`` goes back to θ⁰, and training there is what θ⁰'s would be."""
    about, t = case("condu_aggregate_a")
    monkeypatch.setattr(training, "batches", in_order)
    monkeypatch.setattr(training, "crops", lambda pixels, index, size, numbers: pixels[index])
    ids = {f"0 {k} 1": row for k, row in enumerate(t["task0/tokens_template1"])}
    ends = []
    for moved in (False, True):
        clip = tiny_clip(about, part(t, "pretrained/"), ids)
        method = ConDU(iterations=2, lr=2e-3, warmup=1, batch_size=8)
        method.bind(clip)
        origin = clip.weights()
        if moved:
            clip.load_weights("another task's", part(t, "finetuned1/"))
        classes = tuple(Class(f"0 {k}", ("{} 1",)) for k in range(len(t["task0/tokens_template1"])))
        images = Images(t["task0/images"], t["task0/labels"])
        task = Task("Task0", classes, images, images)
        method.start(task)
        assert all(torch.equal(w, origin[n]) for n, w in clip.weights().items())
        method.begin_task(task)
        fit(method, task, torch.Generator(), clip.size, clip.device)
        ends.append(clip.weights())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    assert any(not torch.equal(ends[0][n], origin[n]) for n in origin)


def nearness() -> Tensor:
    """(4, 6): similarities of four images to six tasks, all different."""
    return torch.rand(4, 6, generator=torch.Generator().manual_seed(1))


def test_four_experts_and_the_pretrained_model_answer_unless_told_otherwise() -> None:
    about, t = case("condu_aggregate_a")
    clip = tiny_clip(about, part(t, "pretrained/"), {})
    method = ConDU()
    method.bind(clip)
    features = clip.embeddings(t["test_images"][:4])
    for number in range(6):  # prototypes of one class each
        name = f"Task{number}"
        method.state.order.append(name)
        draw = torch.randn(1, features.shape[1], generator=torch.Generator().manual_seed(number))
        method.state.prototypes[name] = torch.nn.functional.normalize(draw, dim=1)
        method.state.trigger[name] = {}
        method.state.rescaler.append(1.0)
    plan = method.experts(Query(t["test_images"][:4], (Class("x", ("{}",)),)))
    gates = torch.stack([torch.as_tensor(e.gate).expand(4) for e in plan], 1)
    near = torch.stack([(features @ p.T).amax(1) for p in method.state.prototypes.values()], 1)
    for image in range(4):
        best = sorted(range(6), key=lambda k, image=image: -near[image, k])[:4]  # type: ignore[misc]
        assert gates[image].nonzero().flatten().tolist() == [0, *sorted(k + 1 for k in best)]
        assert gates[image][gates[image] > 0].tolist() == pytest.approx([0.2] * 5)


def test_similarities_weigh_the_experts_in_the_paper_s_way() -> None:
    scores = nearness()
    gates = fusion.shares(scores, 2, "similarity")
    for row, gate in zip(scores, gates, strict=True):
        best = row.argsort(descending=True)[:2]
        weights = torch.zeros(7)
        weights[best + 1], weights[0] = row[best], row[best].mean()
        torch.testing.assert_close(gate, weights / weights.sum())
