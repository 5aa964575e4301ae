"""SLCA against the numbers of the paper's own released code, on a tiny CLIP's image tower, through ``fit`` and the method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import case, in_order, part, tiny_clip
from torch import Tensor

from perdure.data.task import Batch, Class, Images, Query, Task
from perdure.methods import slca
from perdure.methods.slca import SLCA
from perdure.ops import gaussians
from perdure.training import fit as training
from perdure.training.fit import Losses, fit, optimise
from perdure.training.schedule import Schedule


def ready(about: dict[str, Any], t: dict[str, Tensor], **values: Any) -> SLCA:
    h, count = about["hyper_parameters"], sum(about["hyper_parameters"]["task_sizes"])
    text = about["hf_config"]["text_config"]  # the text tower takes no part: any ids will do
    ids = torch.tensor([text["bos_token_id"], 1, text["eos_token_id"]])
    clip = tiny_clip(about, part(t, "pretrained/"), {f"class {k}": ids for k in range(count)})
    asked = dict(
        lr=h["lr"], tower_lr_scale=h["bcb_lrscale"], momentum=h["momentum"], weight_decay=h["weight_decay"],
        batch_size=h["batch_size"], epochs=h["epochs"], milestones=tuple(h["milestones"]), align_epochs=h["ca_epochs"],
        tau=h["ca_with_logit_norm"], align_draws=h["draws_per_class"], features=h["features"], task_of_class="release",
        augment=False,
    )  # fmt: skip
    method = SLCA(**{**asked, **values})
    method.bind(clip)
    return method


def task_of(t: dict[str, Tensor], number: int, sizes: list[int]) -> Task:
    first, last = sum(sizes[:number]), sum(sizes[: number + 1])
    sides = []
    for side in ("train", "test"):
        labels = t[f"{side}/labels"]
        own = (labels >= first) & (labels < last)
        sides.append(Images(t[f"{side}/images"][own].float(), labels[own] - first))
    classes = tuple(Class(f"class {k}", ("{}",)) for k in range(first, last))
    return Task(f"task{number}", classes, sides[0], sides[1], number)


def drawn_as(monkeypatch: pytest.MonkeyPatch, t: dict[str, Tensor], number: int) -> None:
    """The case's orders and noise: first that of the new head, then those of the alignment."""
    monkeypatch.setattr(training, "batches", in_order)
    monkeypatch.setattr(slca, "batches", in_order)
    born = t[f"head_init_task{number}"] / 0.02
    noise = iter([born, *(t[f"ca_noise/task{number}"].float() if number else [])])
    orders: Any = iter(t[f"ca_perm/task{number}"].long() if number else [])
    monkeypatch.setattr(gaussians, "normal", lambda *asked: next(noise))
    monkeypatch.setattr(gaussians, "shuffled", lambda *asked: next(orders))


def relative(mine: Tensor, theirs: Tensor, start: Tensor | float = 0.0) -> float:
    return ((mine - theirs).norm() / (theirs - start).norm().clamp_min(1e-30)).item()


def learned(method: SLCA, task: Task) -> dict[str, Losses]:
    """A task through every hook; the losses of its phases, the steps' own under ``task``."""
    phases: dict[str, Losses] = {}

    def train(learner: Any, plan: Schedule, draws: Iterator[Batch], name: str) -> Losses:
        phases[name] = optimise(learner, plan, draws, torch.device("cpu"))
        return phases[name]

    method.lend(train)
    method.start(task)
    method.begin_task(task)
    phases["task"] = fit(method, task, torch.Generator(), method.clip.size, method.clip.device)
    method.clip.trained(f"trained {task.name}", method.parameters().values())
    method.fuse(task)
    method.calibrate(task)
    return phases


@pytest.mark.parametrize("name", ["slca_a"])
def test_a_run_is_the_release_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    about, t = case(name)
    h, allowed = about["hyper_parameters"], about["tolerances"]["suggested"]
    method = ready(about, t)
    start = {n: p.clone() for n, p in method.clip.weights().items()}
    for number in range(len(h["task_sizes"])):
        task = task_of(t, number, h["task_sizes"])
        drawn_as(monkeypatch, t, number)
        phases = learned(method, task)
        first = phases["task"].get("task") or phases["head"]["head"]
        stage1 = [s["loss"] for s in about["stage1_steps"] if s["task"] == number]
        assert first == pytest.approx(stage1, rel=allowed["losses"])
        if number:
            aligned = [s["loss"] for s in about["alignment_steps"] if s["task"] == number]
            assert phases["alignment"]["alignment"] == pytest.approx(aligned, rel=allowed["losses"])
        for which, mine in (("", method.state.aligned), ("_kept", method.state.heads)):
            for part_of in ("weight", "bias"):
                theirs = t[f"head_{part_of}{which}_task{number}"]
                assert relative(mine[part_of], theirs) < allowed["head weights"], (which, part_of)
        for key, theirs in part(t, f"tower_after_task{number}/").items():
            if not key.endswith("k_proj.bias"):  # without effect: rounding alone moves it
                assert relative(method.clip.weights()[key], theirs, start[key]) < allowed["tower update"], key
        classes = [Class(f"class {k}", ("{}",)) for k in range(sum(h["task_sizes"][: number + 1]))]
        tests = t["test/images"][t["test/labels"] < len(classes)].float()
        answer, theirs = method.predict(Query(tests, classes)), t[f"eval_task{number}/logits"]
        assert torch.allclose(answer, theirs, rtol=0, atol=allowed["logits"])
        assert torch.equal(answer.argmax(1), theirs.argmax(1))
    kept: Any = method.state.gaussians
    torch.testing.assert_close(kept["means"], t["class_means"], rtol=1e-4, atol=1e-5)
    covariances = torch.stack([gaussians.covariance(kept, row) for row in range(len(t["class_covs"]))])
    torch.testing.assert_close(covariances, t["class_covs"], rtol=1e-3, atol=1e-5)


def test_a_frozen_tower_is_shown_its_images_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads on features that are encoded once end where heads end that encode them at every step."""
    about, t = case("slca_a")
    found = []
    for augment in (False, True):
        method = ready(about, t, tower_lr_scale=0.0, augment=False)
        method.config = replace(method.config, augment=augment)
        monkeypatch.setattr(training, "crops", lambda pixels, index, *rest: pixels[index])
        drawn_as(monkeypatch, t, 0)
        task = task_of(t, 0, about["hyper_parameters"]["task_sizes"])
        phases = learned(method, task)
        assert ("head" in phases) != augment and bool(phases["task"].steps) == augment
        found.append((method.state.heads["weight"], phases["task"].get("task") or phases["head"]["head"]))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
