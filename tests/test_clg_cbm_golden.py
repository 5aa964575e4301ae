"""CLG-CBM against the numbers of the paper's own released code, through the method; tables stand for the encoders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import case, part
from torch import Tensor, nn

from perdure.core.features import Features
from perdure.core.state import write_json
from perdure.data.task import Batch, Class, Images, Query, Task
from perdure.methods import clg_cbm
from perdure.methods.clg_cbm import CLGCBM
from perdure.ops import gaussians
from perdure.training.bottleneck import Bottleneck, Search
from perdure.training.fit import Losses, optimise
from perdure.training.schedule import Schedule

PROMPT = "A photo of a {}"


class Tables:
    """A CLIP whose texts and images are looked up: of an image, by the number that all its pixels hold."""

    device, holds, evaluation_batch, remembers = torch.device("cpu"), "pretrained", 256, False

    def __init__(self, texts: dict[str, Tensor], images: Tensor):
        self.texts, self.images, self.backbone, self.pretrained = texts, images, nn.Identity(), dict[str, Tensor]()

    def class_texts(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        return torch.stack([F.normalize(self.texts[own[0]], dim=0) for own in prompts])

    def features(self, pixels: Tensor) -> Features:
        raw = self.images[(pixels[:, 0, 0, 0] * 1000).round().long()]
        return Features(F.normalize(raw, dim=1), raw, raw[:, :0])

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        return images @ texts.T

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        yield

    def load_last(self) -> None:
        """There are no others."""

    def load_weights(self, name: str, weights: Any) -> None:
        assert name == "pretrained"


class Release:
    """A recorded run: the method, its tasks, and the draws that take the place of new ones."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.about, self.t = case(name)
        self.patch, self.h = monkeypatch, self.about["hyper_parameters"]
        order, self.tables = self.about["class_order"], [part(self.t, f"task{k}/") for k in range(99)]
        self.tables = [table for table in self.tables if table]
        self.classes = [Class(f"class {k}", (PROMPT,)) for k in order]
        listed = self.about["concept_file"]
        file, ids = folder / "concepts.json", folder / "names.json"
        write_json(file, listed)
        write_json(ids, {key: f"class {key}" for key in listed})
        texts: dict[str, Tensor] = {}
        rows: list[Tensor] = []
        first = 0
        self.tasks, self.sizes = [], [len(table["names"]) for table in self.tables]
        for number, (size, table) in enumerate(zip(self.sizes, self.tables, strict=True)):
            own = order[first : first + size]
            phrases = [phrase for k in own for phrase in listed[str(k)]]
            texts |= {self.about["concept_prefix"] + p: e for p, e in zip(phrases, table["candidates"], strict=True)}
            texts |= {PROMPT.format(f"class {k}"): e for k, e in zip(own, table["names"], strict=True)}
            sides = []
            for side in ("train", "test"):
                place = sum(len(one) for one in rows) + torch.arange(len(table[side]))
                rows.append(table[side])
                pixels = (place / 1000)[:, None, None, None].expand(-1, 3, 1, 1).contiguous()
                sides.append(Images(pixels, table[f"{side}_labels"] - first))
            self.tasks.append(
                Task(f"task {number}", tuple(self.classes[first : first + size]), sides[0], sides[1], number)
            )
            first += size
        self.method = self.ready(str(file), str(ids))
        self.method.bind(Tables(texts, torch.cat(rows)))  # type: ignore[arg-type]
        self.method.lend(self.train)
        self.phases: dict[str, Any] = {}

    def ready(self, file: str, names: str) -> CLGCBM:
        h = self.h
        return CLGCBM(
            concepts=file, concept_names=names, prefix=self.about["concept_prefix"], per_class=h["concepts_per_class"],
            search_epochs=h["epochs"], search_lr=h["lr"], search_bn="release", division_power=h["division_power"],
            ridge=0.0, lr=h["FB_lr_inc"], first_lr=h["FB_lr_init"], epochs=h["FB_epoch_inc"],
            first_epochs=h["FB_epoch"], milestones=tuple(h["milestones"]), gamma=h["lr_gamma"],
            batch_size=h["batch_size"], sg_num=h["sg_num"], sim=h["sim"], sparsity=h["lambda"],
            keep_weights="best_of_test", look_every=h["print_freq"],
        )  # fmt: skip

    def drawn(self, number: int) -> None:
        """Recorded orders, noise and weights at birth in the place of new ones."""
        search, own = part(self.t, f"search_task{number}/"), part(self.t, f"cbm_task{number}/")
        orders = iter([search["permutation"], own["permutation"]])

        def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
            order = next(orders)
            assert len(order) == count
            while True:
                yield from order.split(size)

        def new_gate(*asked: Any) -> nn.Sequential:
            first, last = search["gate_init/0.weight"], search["gate_init/2.weight"]
            gate = nn.Sequential(
                nn.Linear(first.shape[1], len(first), bias=False),
                nn.BatchNorm1d(len(first)),
                nn.Linear(last.shape[1], len(last)),
            )
            gate.load_state_dict(part(search, "gate_init/"), strict=False)
            return gate

        born = iter([own["init/explainer"], heads(own, "init")])
        noise: Iterator[Tensor] = iter(own.get("gauss_eps", torch.empty(0)))
        old = own.get("gauss_order", torch.empty(0, dtype=torch.int64))
        self.patch.setattr(clg_cbm, "batches", batches)
        self.patch.setattr(clg_cbm, "new_gate", new_gate)
        self.patch.setattr(clg_cbm, "grown", lambda kept, *asked: extended(kept, next(born)))
        self.patch.setattr(gaussians, "shuffled", lambda *asked: old)
        self.patch.setattr(gaussians, "normal", lambda *asked: next(noise))

    def train(self, learner: Any, plan: Schedule, draws: Iterator[Batch], name: str) -> Losses:
        losses = optimise(learner, plan, draws, torch.device("cpu"))
        self.phases[name] = (learner, losses, [plan.rate(k) for k in range(losses.steps)])
        return losses

    def check_losses(self, number: int, phase: str, where: str) -> None:
        _, losses, rates = self.phases[phase]
        theirs = [s for s in self.about[where] if s["task"] == number]
        total = [sum(step) for step in zip(*losses.values(), strict=True)]
        assert total == pytest.approx([s["loss"] for s in theirs], rel=self.about["tolerance"]["losses_relative"])
        assert rates == pytest.approx([s["lr"] for s in theirs])
        if "regularizer" in losses:
            power = [s["regularizer"] for s in theirs]
            assert losses["regularizer"] == pytest.approx(power, rel=self.about["tolerance"]["losses_relative"])


def heads(own: dict[str, Tensor], what: str) -> Tensor:
    """The heads of all tasks as one matrix."""
    return torch.cat([own[f"{what}/head{k}"] for k in range(99) if f"{what}/head{k}" in own])


def extended(kept: Tensor | None, born: Tensor) -> Tensor:
    """Their weights at birth, which must begin with what mine were before."""
    if kept is not None:
        torch.testing.assert_close(born[: kept.shape[0], : kept.shape[1]], kept, rtol=1e-4, atol=1e-5)
    return born


def relative(mine: Tensor, theirs: Tensor, start: Tensor | float = 0.0) -> float:
    return ((mine - theirs).norm() / (theirs - start).norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("name", ["clg_cbm_a"])
def test_a_run_is_the_release_s(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Release(name, tmp_path, monkeypatch)
    allowed, state = run.about["tolerance"], None
    for number, task in enumerate(run.tasks):
        run.drawn(number)
        run.method.calibrate(task)
        state = run.method.state
        search, own = part(run.t, f"search_task{number}/"), part(run.t, f"cbm_task{number}/")
        run.check_losses(number, "search", "search_trajectory")
        run.check_losses(number, "bottleneck", "train_trajectory")
        gate: Search = run.phases["search"][0]
        assert gate.space.typical == pytest.approx(search["mean_distance"].item(), rel=1e-5)
        for kind, mine in (("last", gate.gate.state_dict()), ("best", gate.judge.kept)):
            for key, theirs in part(search, f"gate_{kind}/").items():
                start = search.get(f"gate_init/{key}", torch.zeros(()))
                assert relative(mine[key], theirs, start) < allowed["search_weights_relative_l2"], (kind, key)
        new = state.phrases[-len(search["selected"]) :]
        listed = [p for one in task.classes for p in run.about["concept_file"][one.name.split()[1]]]
        assert new == [listed[k] for k in search["selected"].tolist()]
        learner: Bottleneck = run.phases["bottleneck"][0]
        for kind, (weight, head) in {
            "last": (learner.weight.detach(), learner.heads.detach()),
            "best": (state.bottleneck["weight"], state.bottleneck["heads"]),
        }.items():
            limit = allowed["updates_relative_l2"]
            assert relative(weight, own[f"{kind}/explainer"], own["init/explainer"]) < limit
            assert relative(head, heads(own, kind), heads(own, "init")) < limit
        for row in range(sum(run.sizes[:number]), len(state.classes)):
            torch.testing.assert_close(state.gaussians["means"][row].float(), own[f"proto{row}"])
            torch.testing.assert_close(gaussians.covariance(state.gaussians, row), own[f"cov{row}"])
        images = torch.cat([t.test.pixels for t in run.tasks[: number + 1]])
        classes = run.classes[: len(state.classes)]
        answer, theirs = run.method.predict(Query(images, classes)), run.t[f"eval_task{number}/logits"]
        assert torch.allclose(answer, theirs, rtol=0, atol=allowed["logits_abs"])
        told = run.method.explained(Query(images, classes), answer.argmax(1).tolist())
        for shares, logits in zip(told, answer, strict=True):  # all there are, or the five largest
            assert len(shares) <= 5 and (len(shares) == 5 or sum(s for _, s in shares) == pytest.approx(logits.max()))
    assert state is not None and state.phrases == run.about["selected_phrases"]
    evaluations = [(s["task"], s["stage"], s["accuracy"]) for s in run.about["evaluations"]]
    best = max(accuracy for task, stage, accuracy in evaluations if (task, stage) == (len(run.tasks) - 1, 1))
    assert 100 * run.phases["bottleneck"][0].judge.best == pytest.approx(best)
