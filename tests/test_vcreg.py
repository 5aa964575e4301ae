"""VCReg against its definition (golden numbers), and as an option of whatever learns: what is collected, when it is added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import case
from torch import Tensor

from perdure import launch
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.data.task import Batch, Context, Stream, Task
from perdure.launch.options import build
from perdure.methods.base import Method
from perdure.models.clip import CLIP
from perdure.ops.losses import variance_covariance
from perdure.ops.redundancy import effective_rank, mean_correlation
from perdure.training.fit import Accumulator, fit


@pytest.mark.parametrize("name", ["vcreg_a"])
@pytest.mark.parametrize("form", ["plain", "smooth"])
def test_terms_and_gradient_are_the_definition_s(name: str, form: str) -> None:
    about, t = case(name)
    h, wanted = about["hyper_parameters"], about["values"][form]
    x = t["x"].double().requires_grad_()
    variance, covariance = variance_covariance(x, h["delta"] if form == "smooth" else None, h["eps"])
    loss = h["alpha"] * variance + h["beta"] * covariance
    (found,) = torch.autograd.grad(loss, x)
    allowed = about["tolerance"]
    assert [variance.item(), covariance.item(), loss.item()] == pytest.approx(
        [wanted[key] for key in ("variance", "covariance", "loss")], rel=allowed["values_relative"]
    )
    theirs = t[f"gradient/{form}"]
    assert (found - theirs).norm() / theirs.norm() < allowed["gradient_relative_l2"]


def test_the_port_s_covariance_gradient_is_n_minus_1_times_the_exact_one() -> None:
    """What the method's page says of whoever takes a β from it."""
    about, t = case("vcreg_a")
    h, x = about["hyper_parameters"], t["x"].double().requires_grad_()
    (found,) = torch.autograd.grad(h["beta"] * variance_covariance(x)[1], x)
    assert torch.allclose((h["batch"] * h["tokens"] - 1) * found, t["port/covariance_only"].double(), rtol=1e-4)


def learner(clip: CLIP, given: Stream | Sequence[Task], name: str = "vcreg", **values: Any) -> Method:
    known = {key: option.default for key, (_, option) in launch.method_options(launch.method_entry(name)).items()}
    method = build(name, {**known, **values})
    tasks = given.tasks if isinstance(given, Stream) else tuple(given)
    method.bind(clip, Context(tasks=tasks))
    method.begin_task(tasks[0])
    return method


def one_step(method: Method, stream: Stream, count: int = 8) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses and gradients of a step on the first images, through what ``fit`` does."""
    task, losses = stream.tasks[0], dict[str, Tensor]()
    parameters = dict(method.parameters())
    for p in parameters.values():
        p.grad = None
    with method.regularised() as more:
        batch = Batch(task.train.pixels[:count] / 255, task.train.labels[:count])
        method.step(batch, Accumulator(parameters, losses, more))
    return losses, {n: p.grad for n, p in parameters.items() if p.grad is not None}


def by_hand(clip: CLIP, images: Tensor, blocks: list[int]) -> tuple[Tensor, Tensor]:
    """The two terms of the image tower's blocks, from the hidden states that transformers gives."""
    hidden = clip.seen(images, hidden=True).hidden_states[1:]
    found = [variance_covariance(hidden[k]) for k in blocks]
    return torch.stack([v for v, _ in found]).sum(), torch.stack([c for _, c in found]).sum()


@pytest.mark.parametrize(("where", "blocks"), [("blocks", [0, 1, 2, 3]), ("last", [3])])
def test_every_block_or_the_last_is_regularised(where: str, blocks: list[int], clip: CLIP, stream: Stream) -> None:
    method = learner(clip, stream, vcreg=where, vcreg_var=0.3, vcreg_cov=0.02)
    losses, gradients = one_step(method, stream)
    assert not any(module._forward_hooks for module in clip.backbone.vision_model.encoder.layers)  # gone with the steps
    images = stream.tasks[0].train.pixels[:8] / 255
    variance, covariance = by_hand(clip, images, blocks)
    assert losses["vcreg_variance"].item() == pytest.approx(0.3 * variance.item(), rel=1e-5)
    assert losses["vcreg_covariance"].item() == pytest.approx(0.02 * covariance.item(), rel=1e-5)
    whole = method.task_loss(Batch(images, stream.tasks[0].train.labels[:8])) + 0.3 * variance + 0.02 * covariance
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    (wanted,) = torch.autograd.grad(whole, dict(method.parameters())[name])
    assert torch.allclose(gradients[name], wanted, atol=1e-6 * float(wanted.abs().max()))


def test_a_batch_in_parts_is_one_batch_and_texts_end_where_they_end(clip: CLIP, stream: Stream) -> None:
    method = learner(clip, stream, vcreg_towers="both", vcreg_delta=0.05)
    whole = one_step(method, stream)
    clip.accumulate = 3
    parts = one_step(method, stream)
    for key, loss in whole[0].items():
        assert parts[0][key].item() == pytest.approx(loss.item(), rel=1e-5), key
    most = max(float(gradient.abs().max()) for gradient in whole[1].values())
    for name, gradient in whole[1].items():
        assert torch.allclose(parts[1][name], gradient, rtol=0, atol=3e-6 * most), name
    clip.accumulate = 1
    with method.regularised() as more:
        clip.encode_tokens(method.tokens)
        rows = {name: torch.cat(seen).shape[0] for name, seen in more.seen.items()}  # type: ignore[union-attr]
    ids = method.tokens
    inside = int(((ids == clip.tokenizer.eos_token_id).int().argmax(1) + 1).sum())
    assert set(rows.values()) == {inside} and inside < ids.numel()


def test_only_a_task_s_own_loss_gets_the_terms_and_others_leave_it_alone(clip: CLIP, stream: Stream) -> None:
    """A method that back-propagates something else first: its blocks' outputs are no longer the task's."""
    method = learner(clip, stream)
    losses: dict[str, Tensor] = {}
    with method.regularised() as more:
        backward = Accumulator(method.parameters(), losses, more)
        images = stream.tasks[0].train.pixels[8:16] / 255
        backward(other=clip.encode_image(images).sum())
        assert set(losses) == {"other"}
        backward(task=method.task_loss(Batch(images[:4], stream.tasks[0].train.labels[8:12])))
    variance, _ = by_hand(clip, images[:4], [0, 1, 2, 3])
    assert losses["vcreg_variance"].item() == pytest.approx(0.16 * variance.item(), rel=1e-5)
    plain = learner(clip, stream, "finetune")
    assert set(one_step(plain, stream)[0]) == {"task"}


@pytest.mark.parametrize("name", ["lwf", "codyra", "finetune+ridge", "slca"])
def test_it_is_an_option_of_whatever_trains_towers(name: str, clip: CLIP, stream: Stream) -> None:
    values = {"reference_batch": 8} if name == "lwf" else {}
    method = learner(clip, stream, name, vcreg="last", **values)
    assert {"task", "vcreg_variance", "vcreg_covariance"} <= set(one_step(method, stream)[0])


def test_a_tower_that_does_not_learn_is_refused() -> None:
    with pytest.raises(PerdureError, match="vcreg_towers=text: that tower does not learn here"):
        launch.prepare("vcreg", "mini-mtil", 0, ["vcreg_towers=text", "towers=image"], {})


def test_effective_rank_and_correlation() -> None:
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    assert effective_rank(x) == pytest.approx(6, abs=0.05) and mean_correlation(x) < 0.03
    one = x[:, :1] * torch.arange(1.0, 7.0) + 3
    assert effective_rank(one) == pytest.approx(1, abs=1e-6) and mean_correlation(one) == pytest.approx(1)
    shares = torch.tensor([4.0, 1.0]).sqrt()  # of the variance 0.8 and 0.2
    assert effective_rank(x[:, :2] / x[:, :2].std(0) * shares) == pytest.approx(1.65, abs=0.02)


@pytest.mark.slow
def test_features_keep_more_directions_than_plain_fine_tuning_s(clip: CLIP) -> None:
    """Its claim, on what the image tower pools of a task's test images, at weights that can be seen in 20 steps."""
    task = next(t for t in mini.multi_domain("I").tasks if t.name == "digits")
    ranks, alike = {}, {}
    for kind in ("none", "blocks"):
        clip.load_weights("pretrained", clip.pretrained)
        method = learner(
            clip, (task,), vcreg=kind, vcreg_var=1.0, vcreg_cov=0.05, iterations=20, warmup=1, lr=1e-3, batch_size=32
        )
        fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device)
        clip.trained("taught")
        pooled = clip.features(task.test.pixels[::3]).pooled
        ranks[kind], alike[kind] = effective_rank(pooled), mean_correlation(pooled)
    assert ranks["blocks"] > 1.05 * ranks["none"] and alike["blocks"] < alike["none"]
