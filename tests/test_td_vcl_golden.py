"""TD-VCL against the numbers of the paper's own released code: posteriors in memory, divergences, a drawn pass, losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import case, part
from torch import Tensor, nn

from perdure.methods.td_vcl import TDVCL
from perdure.models.drawn import Drawn
from perdure.ops import variational


def flat(posterior: dict[str, Tensor], what: str) -> Tensor:
    return torch.cat([posterior[f"weight_{what}"], posterior[f"bias_{what}"]])


def ready(about: dict[str, Any], kind: str, **values: Any) -> TDVCL:
    """The method on one linear layer."""
    h = about["hyper_parameters"]
    lam = 1.0 if kind == "n_step" else h["lambda"]
    method = TDVCL(n=h["n"], lam=lam, beta=h["beta"], reach="release", **values)
    method.drawn = Drawn({"layer": nn.Linear(h["in"], h["out"])})
    method.logvar = nn.Parameter(torch.full((h["out"] * (h["in"] + 1),), h["initial_logvar"]))
    return method


def become(method: TDVCL, posterior: dict[str, Tensor]) -> None:
    """Be where training has led."""
    with torch.no_grad():
        for name, p in method.drawn.layers["layer"].named_parameters():
            p.copy_(posterior[f"{name}_mean"].view(p.shape))
        method.logvar.copy_(flat(posterior, "logvar"))


@pytest.mark.parametrize("name", ["td_vcl_a"])
@pytest.mark.parametrize("kind", ["n_step", "td"])
@pytest.mark.parametrize("memory", ["queue", "release"])
def test_divergences_from_what_is_in_memory_and_their_gradients(
    name: str, kind: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    about, t = case(name)
    method, n = ready(about, kind, memory=memory), about["hyper_parameters"]["n"]
    born = [part(t, f"slot_start{k}/") for k in range(n)]
    slots = [{"mean": flat(slot, "mean"), "logvar": flat(slot, "logvar")} for slot in born]
    monkeypatch.setattr(method, "random_slots", lambda: slots)
    wanted = [k for k in about["kl"] if k["kind"] == kind and k["memory"] == memory]
    become(method, part(t, "posterior0/"))
    for step, expected in enumerate(wanted):
        method.recall()
        become(method, part(t, f"posterior{step + 1}/"))
        divergence = method.divergence()
        assert divergence.item() == pytest.approx(expected["kl"], rel=about["tolerance"]["kl_relative"])
        own = method.drawn.layers["layer"].weight
        found = torch.autograd.grad(divergence, [own, method.logvar])
        for what, gradient in zip(("mean", "logvar"), found, strict=True):
            theirs = t[f"expected/{kind}/{memory}/t{step}/grad_weight_{what}"]
            far = (gradient.flatten()[: len(theirs)] - theirs).norm() / theirs.norm()
            assert far < about["tolerance"]["gradients_relative_l2"], (step, what)
        method.remember()


@pytest.mark.parametrize("name", ["td_vcl_a"])
def test_a_drawn_pass_and_one_by_the_means(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    about, t = case(name)
    method, own = ready(about, "td"), part(t, "forward/")
    become(method, part(t, "posterior1/"))
    layer, allowed = method.drawn.layers["layer"], about["tolerance"]["outputs_abs"]
    monkeypatch.setattr(variational, "normal", lambda like: torch.cat([own["eps_weight"], own["eps_bias"]]))
    method.drawn.deviate(variational.deviation(method.logvar))
    torch.testing.assert_close(layer(own["x"]), own["y"], rtol=0, atol=allowed)
    method.drawn.deviate(None)
    torch.testing.assert_close(layer(own["x"]), own["y_mean"], rtol=0, atol=allowed)


@pytest.mark.parametrize("name", ["td_vcl_a"])
def test_losses_of_samples_of_all_ages(name: str) -> None:
    about, t = case(name)
    for expected in about["losses"]:
        weights = "sample" if expected["shape"] == "per_sample" else "release"
        method = ready(about, expected["kind"], weights=weights)
        each = nn.functional.cross_entropy(t["loss/logits"], t["loss/labels"], reduction="none")
        ages = (expected["timestep"] - t["loss/task_of_sample"].squeeze(1)).long()
        found = method.likelihood(each, ages) + method.config.beta * expected["kl_given"] / len(each)
        assert found.item() == pytest.approx(expected["loss"], rel=about["tolerance"]["losses_relative"])
        only = [method.likelihood(torch.eye(len(each))[k], ages).item() * len(each) for k in range(len(each))]
        if weights == "sample":
            assert only == pytest.approx(expected["weights"], rel=about["tolerance"]["losses_relative"])
