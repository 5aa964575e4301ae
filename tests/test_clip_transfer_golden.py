"""The contrastive loss with its pull on positive pairs, and margins, against the recorded definition, through the method."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import case
from torch import Tensor

from perdure.methods.finetune import FineTune
from perdure.ops.margins import class_margins, described, pair_margins

NAME = "clip_transfer_a"


def near(allowed: float) -> dict[str, Any]:
    return {"rtol": allowed, "atol": allowed}


@pytest.mark.parametrize("name", [NAME])
def test_losses_and_gradients(name: str) -> None:
    about, t = case(name)
    h, allowed = about["hyper_parameters"], about["tolerance"]["relative"]
    image, text = t["image"].clone().requires_grad_(), t["text"].clone().requires_grad_()
    captions = [f"caption {k}" for k in range(len(text))]

    def encode_text(prompts: list[str]) -> Tensor:
        assert prompts == captions
        return text

    found = {}
    for pull in (0.0, h["lambda"]):
        method = FineTune(loss="contrastive", positive_pull=pull)
        method.clip = SimpleNamespace(encode_text=encode_text, scaled=lambda x, y: x @ y.T / h["tau"])  # type: ignore[assignment]
        found[pull] = method.classify(image, torch.zeros(0), captions)
    values = about["values"]
    assert found[0.0].item() == pytest.approx(values["contrastive"], rel=allowed)
    assert found[h["lambda"]].item() == pytest.approx(values["loss"], rel=allowed)
    both = torch.autograd.grad(found[h["lambda"]], [image, text])
    torch.testing.assert_close(both[0], t["gradient_image"], **near(allowed))
    torch.testing.assert_close(both[1], t["gradient_text"], **near(allowed))


@pytest.mark.parametrize("name", [NAME])
def test_margins(name: str) -> None:
    about, t = case(name)
    values, allowed = about["values"], about["tolerance"]["relative"]
    mine = class_margins(t["image"] @ t["class_text"].T, t["labels"])
    torch.testing.assert_close(mine, t["class_margin"], **near(allowed))
    torch.testing.assert_close(pair_margins(t["image"], t["text"]), t["pair_margin"], **near(allowed))
    figures = described(mine, about["hyper_parameters"]["tau"])
    assert figures["median"] == pytest.approx(values["median_class_margin"], rel=allowed)
    assert figures["above_tau"] == pytest.approx(values["share_of_class_margins_above_tau"], rel=allowed)
    assert pair_margins(t["image"], t["text"]).mean().item() == pytest.approx(values["mean_pair_margin"], rel=allowed)
