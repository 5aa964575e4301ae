"""ZSCL's steps against its equations, written out: what the release's cases leave at its default, or cannot tell apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import in_order
from test_gift_golden import Equations as Plain
from test_gift_golden import far, moved
from test_zscl_golden import Trial
from torch import Tensor

from perdure.methods.zscl import ZSCL, Config

UNLIKE_DEFAULTS: dict[str, Any] = dict(
    iterations=6, warmup=2, lr=2e-3, lam=0.7, weight_decay=0.1, temperature=1.5, label_smoothing=0.1, batch_size=5,
    reference_batch=7, beta1=0.85, beta2=0.98, distil=0.6, average_every=2,
)  # fmt: skip
DEPARTURES: dict[str, dict[str, Any]] = {
    "none": {},
    "teacher previous": {"teacher": "previous"},
    "teacher mix": {"teacher": "mix", "teacher_mix": 0.3},
    "image": {"sides": "image"},
    "text": {"sides": "text"},
    "among images": {"among_images": 0.4},
    "feature_mse": {"feature_mse": 30.0},
    "feature_mse alone": {"feature_mse": 30.0, "sides": "none"},
    "student's texts": {"embed_texts": "student"},
    "student's texts, text tower": {"embed_texts": "student", "towers": "text"},
    "image tower": {"towers": "image"},
    "own texts": {"texts": "own"},
    "own": {"reference": "own", "texts": "own"},
    "nothing distilled": {"sides": "none"},
    "no penalty": {"lam": 0.0},
    "no mean": {"average": "none"},
    "a tenth of the steps": {"average_every": 0},
    "we_wise": {"average": "we_wise", "wise_alpha": 0.8},
    "moving": {"average": "moving", "moving_decay": 0.7},
    "moving initial": {"average": "moving", "moving_decay": 0.7, "moving_towards": "initial"},
    "moving last": {"average": "moving", "moving_decay": 0.7, "moving_towards": "last"},
}


class Equations(Plain):
    """ZSCL's steps with loops and autograd: none of the production's shortcuts, nor its loop."""

    def __init__(self, trial: Trial, config: Config):
        super().__init__(trial, config)  # type: ignore[arg-type]
        self.config, self.origin = config, trial.clip.pretrained
        self.end = 63
        t, names = trial.tensors, [f"text {k}" for k in range(len(trial.tensors["reference_tokens"]))]
        own = [f"class {k}" for k in range(4)]
        self.class_ids = torch.stack([trial.texts[k] for k in own])
        self.ids = self.class_ids if config.texts == "own" else torch.stack([trial.texts[k] for k in names])
        self.pixels = t["task0/images"] if config.reference == "own" else t["reference_images"]

    def d(self, found: Tensor, wanted: Tensor) -> Tensor:
        tau = self.config.temperature
        rows = [-((b / tau).softmax(0) * (a / tau).log_softmax(0)).sum() for a, b in zip(found, wanted, strict=True)]
        return tau**2 * torch.stack(rows).mean()

    def distilled(self, at: Tensor) -> dict[str, Tensor]:
        c, s, pixels = self.config, self.student.logit_scale.exp().detach(), self.pixels[at]
        with torch.no_grad():
            r0, c0 = self.images(self.teacher, pixels), self.texts(self.teacher, self.ids)
        r = self.images(self.student, pixels)
        mine = self.texts(self.student, self.ids) if c.embed_texts == "student" else c0
        out = {}
        if c.sides in ("both", "image"):
            out["distil_image"] = c.distil * self.d(s * r @ mine.T, s * r0 @ c0.T)
        if c.sides in ("both", "text"):
            out["distil_text"] = c.distil * self.d(s * mine @ r.T, s * c0 @ r0.T)
        if c.among_images:
            others = [[k for k in range(len(at)) if k != i] for i in range(len(at))]
            found = [s * r[k] @ r[o].T for k, o in enumerate(others)]
            out["distil_among"] = c.among_images * self.d(
                torch.stack(found), torch.stack([s * r0[k] @ r0[o].T for k, o in enumerate(others)])
            )
        if c.feature_mse:
            out["feature_mse"] = c.feature_mse * ((r - r0) ** 2).mean()
        return out

    def averaged(self, step: int, state: dict[str, Any]) -> None:
        """After a step: the mean, or the pull."""
        c, every = self.config, self.config.average_every or max(1, self.config.iterations // 10)
        if step % every or c.average == "none":
            return
        n = state["n"] = state.get("n", 0) + 1
        now = {k: p.detach().clone() for k, p in self.theta.items()}
        if c.average == "moving":
            goal = {"previous": self.anchor, "initial": self.origin, "last": state.get("last", self.anchor)}
            for k, p in self.theta.items():
                p.data.copy_(c.moving_decay * now[k] + (1 - c.moving_decay) * goal[c.moving_towards][k])
            state["last"] = now
            return
        mean, share = state.get("mean", self.anchor), c.wise_alpha if c.average == "we_wise" else 1.0
        state["mean"] = {k: share * (mean[k] * n + w) / (n + 1) + (1 - share) * self.anchor[k] for k, w in now.items()}

    def trained(self, tasks: dict[str, Tensor]) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        c, shown, state = self.config, list[dict[str, float]](), dict[str, Any]()
        adam = torch.optim.AdamW(
            self.theta.values(), lr=c.lr, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, foreach=False
        )
        order, references = (
            in_order(n, size, torch.Generator())
            for n, size in ((len(tasks["labels"]), c.batch_size), (len(self.pixels), c.reference_batch))
        )
        for step in range(c.iterations + 1):
            adam.zero_grad()
            at = next(order)
            texts = self.texts(self.student, self.class_ids)
            images = self.images(self.student, tasks["images"][at])
            log_p = (self.student.logit_scale.exp().detach() * images @ texts.T).log_softmax(1)
            hit, smooth = torch.arange(len(at)), c.label_smoothing
            losses = {"task": -((1 - smooth) * log_p[hit, tasks["labels"][at]] + smooth * log_p.mean(1)).mean()}
            losses |= self.distilled(next(references)) if c.distils else {}
            if c.lam:
                apart = [(p - self.anchor[k]).pow(2).sum() for k, p in self.theta.items()]
                losses["consolidation"] = c.lam * torch.stack(apart).sum()
            torch.stack(list(losses.values())).sum().backward()
            warm = c.lr * (step + 1) / c.warmup
            cosine = c.lr / 2 * (1 + math.cos(math.pi * (step - c.warmup) / (c.iterations - c.warmup)))
            adam.param_groups[0]["lr"] = warm if step < c.warmup else cosine
            adam.step()
            self.averaged(step, state)
            shown.append({k: v.item() for k, v in losses.items()})
        return shown, state.get("mean", {k: p.detach() for k, p in self.theta.items()})


@pytest.mark.parametrize("departure", DEPARTURES)
def test_steps_are_the_equations_written_out(departure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("zscl_a", "zscl", monkeypatch, **UNLIKE_DEFAULTS | DEPARTURES[departure])
    trial.clip.load_weights("before", moved(trial.clip.weights(), 0))  # a later task: previous is not initial
    method = trial.learner
    assert isinstance(method, ZSCL)
    plain, start = Equations(trial, method.config), trial.clip.weights()
    wanted, left = plain.trained(part_of(trial))
    losses = trial.learn(0)
    assert set(losses) == set(wanted[0])
    for name in losses:
        assert losses[name] == pytest.approx([row[name] for row in wanted], rel=1e-3, abs=5e-5), name
    found = trial.clip.weights()
    assert all(torch.equal(found[k], w) for k, w in start.items() if k not in plain.theta)
    compared = [k for k in plain.theta if not k.endswith(".k_proj.bias")]
    assert max(far(found[k], left[k], start[k]) for k in compared) < 1e-2


def part_of(trial: Trial) -> dict[str, Tensor]:
    return {key: trial.tensors[f"task0/{key}"] for key in ("images", "labels")}
