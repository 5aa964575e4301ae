"""RAPF against the numbers of the paper's own released code, on a tiny CLIP, through the method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import case, in_order, part, tiny_clip
from torch import Tensor

from perdure.data.task import Class, Images, Query, Task
from perdure.methods import rapf
from perdure.methods.rapf import RAPF
from perdure.ops import gaussians
from perdure.training import fit as training


def recorded(rows: Iterator[Tensor]) -> Any:
    """Hands out recorded draws in the place of new ones, in their order."""
    return lambda *asked: next(rows)


def ready(about: dict[str, Any], t: dict[str, Tensor], **values: Any) -> RAPF:
    h = about["hyper_parameters"]
    clip = tiny_clip(about, part(t, "pretrained/"), {f"class {k}": ids for k, ids in enumerate(t["class_tokens"])})
    asked = dict(
        lr=h["lr"], epochs=h["epochs"], batch_size=h["train_batch_size"], milestones=tuple(h["milestones"]),
        beta=h["beta"], replayed=h["classes_per_batch"], shrink=h["shrinkage"], near=h["threshold"], margin=h["margin"],
        fusion=h["mix_bias"], init="random", features="raw",
    )  # fmt: skip
    method = RAPF(**{**asked, **values})
    method.bind(clip)
    return method


def task_of(t: dict[str, Tensor], number: int, sizes: list[int]) -> Task:
    first = sum(sizes[:number])
    classes = tuple(Class(f"class {k}", ("{}",)) for k in range(first, first + sizes[number]))
    own = part(t, f"task{number}/")
    sides = [Images(own[f"{s}_images"].float(), own[f"{s}_labels"] - first) for s in ("train", "test")]
    return Task(f"task {number}", classes, sides[0], sides[1], number)


def drawn_as(monkeypatch: pytest.MonkeyPatch, t: dict[str, Tensor], number: int) -> None:
    """The case's order of images, of old classes, and its noise."""
    monkeypatch.setattr(rapf, "batches", in_order)
    if number:
        orders, noise, place = iter(t[f"replay_order/task{number}"]), t[f"noise/task{number}"], [0]

        def normal(rows: int, width: int, generator: torch.Generator) -> Tensor:
            place.append(place[-1] + rows)
            return noise[place[-2] : place[-1]]

        monkeypatch.setattr(gaussians, "shuffled", lambda count, generator: next(orders))
        monkeypatch.setattr(gaussians, "normal", normal)


def relative(mine: Tensor, theirs: Tensor, start: Tensor | None = None) -> float:
    start = torch.zeros_like(theirs) if start is None else start
    return ((mine - theirs).norm() / (theirs - start).norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("name", ["rapf_a"])
def test_a_run_is_the_release_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    about, t = case(name)
    h, allowed = about["hyper_parameters"], about["tolerances"]["suggested"]
    method = ready(about, t)
    monkeypatch.setattr(method, "born", lambda width: t["adapter_start_task0"])
    phases: dict[str, Any] = {}
    near: list[Any] = []
    found = rapf.near_pairs
    monkeypatch.setattr(rapf, "near_pairs", lambda *asked: near.append(found(*asked)) or near[-1])  # type: ignore[func-returns-value]
    adapters: list[rapf.Adapter] = []

    def train(learner: rapf.Adapter, plan: Any, draws: Any, name: str) -> Any:
        adapters.append(learner)
        phases[name] = training.optimise(learner, plan, draws, torch.device("cpu"))
        rates.extend(plan.rate(k) for k in range(plan.steps))
        return phases[name]

    method.lend(train)  # type: ignore[arg-type]
    for number in range(len(h["task_sizes"])):
        rates: list[float] = []
        task = task_of(t, number, h["task_sizes"])
        drawn_as(monkeypatch, t, number)
        method.begin_task(task)
        method.calibrate(task)
        steps = [s for s in about["steps"] if s["task"] == number]
        assert phases["map"]["map"] == pytest.approx([s["cross_entropy"] for s in steps], rel=allowed["losses"])
        if number:
            assert phases["map"]["hinge"] == pytest.approx([s["hinge"] for s in steps], rel=allowed["losses"])
        assert rates == pytest.approx([s["lr"] for s in steps])
        assert near[-1] == [tuple(pair) for pair in t[f"hard_pairs_task{number}"].tolist()]
        start, trained = t[f"adapter_start_task{number}"], t[f"adapter_trained_task{number}"]
        assert relative(adapters[-1].weight.detach(), trained, start) < allowed["adapter"]
        assert relative(method.state.map["weight"], t[f"adapter_task{number}"]) < allowed["adapter"]
        seen = sum(h["task_sizes"][: number + 1])
        classes = [Class(f"class {k}", ("{}",)) for k in range(seen)]
        images = torch.cat([t[f"task{k}/test_images"].float() for k in range(number + 1)])
        answer, theirs = method.predict(Query(images, classes)), t[f"eval_task{number}/logits"]
        assert torch.allclose(answer, theirs, rtol=0, atol=allowed["logits"])
        assert torch.equal(answer.argmax(1), theirs.argmax(1))
    kept = method.state.gaussians
    torch.testing.assert_close(kept["means"].float(), t["class_means"], rtol=1e-5, atol=1e-6)
    mine = torch.stack([gaussians.covariance(kept, row) for row in range(len(t["class_covs"]))])
    torch.testing.assert_close(mine, t["class_covs"], rtol=1e-4, atol=1e-6)
    assert method.remarks()["near pairs"] == about["evaluation"][-1]["hard_pairs"]
