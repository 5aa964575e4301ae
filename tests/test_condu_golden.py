"""ConDU against the numbers of the paper's own released code, on tiny CLIPs, through the method and ``fit``."""

import functools
import math

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
    monkeypatch.setattr(training, "random_resized_crop", lambda images, size, generator: images)
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
    features = method.clip.features(t["test_images"])
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
