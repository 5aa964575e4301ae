"""TAALM against the numbers of the paper's own released code: one step of what learns the weights, on tiny Llamas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import case, part
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from perdure.ops.losses import weighted
from perdure.ops.meta import Inner, Theta, updated, usefulness


def llama(about: dict[str, Any], weights: dict[str, Tensor]) -> LlamaForCausalLM:
    h = about["hyper_parameters"]
    config = LlamaConfig(
        vocab_size=h["vocab"], hidden_size=h["width"], num_attention_heads=h["heads"], num_hidden_layers=h["layers"],
        intermediate_size=h["intermediate"], rope_theta=h["rope_theta"], rms_norm_eps=h["rms_norm_eps"],
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head = nn.Linear(h["width"], len(weights["lm_head.weight"]), bias=False)
    model.load_state_dict(weights)
    return model.eval()


def nll(model: nn.Module, theta: Theta, tokens: Tensor) -> Tensor:
    """(1, L - 1): of each token given those before it."""
    logits = functional_call(model, dict(theta), (tokens,)).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.mark.parametrize("name", ["taalm_a"])
def test_weights_losses_updates_and_the_gradient_through_them(name: str) -> None:
    about, t = case(name)
    h, allowed = about["hyper_parameters"], about["tolerance"]
    theta_model, phi_model = llama(about, part(t, "theta_state/")), llama(about, part(t, "phi_state/"))
    phi = {n: p.detach().requires_grad_() for n, p in phi_model.named_parameters() if n in h["trainable_phi"]}
    theta = {n: p.detach() for n, p in theta_model.named_parameters() if n in h["trainable_theta"]}
    inner = Inner(h["plain_steps"], h["differentiable_steps"], h["lr"], weight_decay=h["weight_decay"])
    weights = functional_call(phi_model, phi, (t["data"],)).logits.squeeze(2)[:, 1:].sigmoid()
    torch.testing.assert_close(weights, t["weights"], rtol=0, atol=allowed["weights_abs"])
    mask = t["label_mask"] if h["labelled"] else torch.ones_like(t["query"][:, 1:])

    def learn(theta: Theta) -> Tensor:
        return weighted(nll(theta_model, theta, t["data"]), weights)

    def query(theta: Theta) -> Tensor:
        each = nll(theta_model, theta, t["query"])
        return weighted(each, mask) if h["labelled"] else each.mean()

    def unrelated(theta: Theta) -> Tensor:
        """Divided by tokens, not by predictions, as released."""
        each = nll(theta_model, theta, t["unrelated"])[0]
        return each * len(each) / (len(each) + 1)

    after, losses = updated(theta, learn, inner)
    found = [loss.item() for loss in losses] + [query(after).item()]
    assert found == pytest.approx(
        about["values"]["losses_in_order_of_call"][: len(found)], rel=allowed["losses_relative"]
    )
    for n, tensor in part(t, "theta_after/").items():
        torch.testing.assert_close(after[n], tensor, rtol=0, atol=allowed["theta_abs"])
    objective = usefulness(theta, learn, query, inner, unrelated if h["restrict"] else None)
    assert objective.item() == pytest.approx(about["values"]["outer_objective"], rel=allowed["losses_relative"])
    gradients = torch.autograd.grad(objective, list(phi.values()))
    for n, mine in zip(phi, gradients, strict=True):
        theirs = t[f"meta_gradient/{n}"]
        assert (mine - theirs).norm() / theirs.norm() < allowed["meta_gradient_relative_l2"], n
