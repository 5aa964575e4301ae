"""ZSCL and the baselines of its table against the numbers of the release's own code, through the methods and ``fit``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

import pytest
import torch
from cases import case, in_order, part, tiny_clip
from torch import Tensor

from perdure import launch
from perdure.data.task import Class, Context, Images, Task
from perdure.methods import zscl
from perdure.methods.base import Method
from perdure.methods.compose import Compose
from perdure.synthesis import reference
from perdure.training import fit as training
from perdure.training.fit import fit

LOSSES = {
    "ce": "task", "distil_image": "distil_image", "distil_text": "distil_text", "l2": "consolidation",
    "feature_mse": "feature_mse",
}  # fmt: skip
TOWARDS = {"n": "previous", "zeroshot": "initial", "t": "last"}
RUNS = ["lwf", "lwf_vr", "wise_ft", "wise_ft_zeroshot", "wc", "we", "we_wise", "moving_avg", "icarl"]


def options(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The release's flags in perdure's words."""
    f = {"we": False, "we_wise": False, "moving_avg": False, "l2": 0.0, "ref_wise": False, **flags}
    sides = {(True, True): "both", (True, False): "image", (False, True): "text", (False, False): "none"}
    average = next((a for a, on in (("we", "we"), ("we_wise", "we_wise"), ("moving", "moving_avg")) if f[on]), "none")
    return dict(
        sides=sides[bool(f.get("image_loss")), bool(f.get("text_loss"))], distil=0.5 if f.get("weight_adjust") else 1.0,
        feature_mse=float(f.get("feature_mse", False)), among_images=float(f.get("ablation_loss_2", False)),
        temperature=f["T"], lam=float(f["l2"]), average=average, average_every=f.get("avg_freq", 100),
        wise_alpha=f.get("we_wise_alpha", 0.98), moving_decay=f.get("mv_avg_decay", 0.999),
        moving_towards=TOWARDS[f.get("mv_avg_model", "n")], teacher="mix" if f["ref_wise"] else "initial",
        teacher_mix=f.get("ref_wise_alpha", 0.8), lr=f["lr"], iterations=f["iterations"], warmup=f["warmup_length"],
        batch_size=f["batch_size"], reference_batch=f["batch_size"], label_smoothing=f["ls"], weight_decay=f["wd"],
        beta2=f["beta2"],
    )  # fmt: skip


def chosen(run: str, flags: Mapping[str, Any], changed: Mapping[str, Any]) -> Method:
    """The method that a run of the release is, under its name in perdure. ``changed``: options that differ from it."""
    values, more = options(flags), dict[str, Any]()
    name = {"wise_ft_zeroshot": "wise_ft", "we_wise": "we", "moving_avg": "we"}.get(run, run)
    if name == "zscl":
        more = {"reference": "drawings"}
    elif name.startswith("lwf"):
        more = {"teacher": "previous"}
    elif name == "wise_ft":
        more = {"alpha": flags["wise_ft_alpha"], "towards": TOWARDS[flags["wise_ft_model"]]}
    elif name == "icarl":
        rates = {"Aircraft": 5e-5, "MNIST": 5e-5}
        more = {"memory": flags["memory_size"], "herding": "release", "memory_split": "release", "lr": 1e-5}
        more["lr_by_task"] = rates
    known = {key: option.default for key, (_, option) in launch.method_options(launch.method_entry(name)).items()}
    return launch.build(name, {**known, **{k: v for k, v in {**values, **more, **changed}.items() if k in known}})


class Trial:
    """The production method, model and loop on a case's inputs: only the order of the data and the crops are the case's."""

    def __init__(self, name: str, run: str, monkeypatch: pytest.MonkeyPatch, **values: Any):
        self.about, self.tensors = case(name)
        self.now, self.first = 0, dict[str, Tensor]()
        found = next((r for r in self.about["runs"] if r.get("run") == run), {"tasks": self.about["runs"], "flags": {}})
        self.rows, t = found["tasks"], self.tensors
        names = self.about.get("task_names", [f"task {k}" for k in range(len(self.rows))])
        a_task = self.about["hyper_parameters"]["classes_per_task"]
        ids = {f"class {k}": row.long() for k, row in enumerate(t["class_tokens"])}
        ids |= {f"text {k}": row.long() for k, row in enumerate(t.get("reference_tokens", []))}
        self.clip = tiny_clip(self.about, part(t, "pretrained/"), ids)
        self.tasks = []
        for k in range(len(self.rows)):
            classes = tuple(Class(str(a_task * k + c), ("class {}",)) for c in range(a_task))
            images = Images(t[f"task{k}/images"], t[f"task{k}/labels"])
            self.tasks.append(Task(names[k], classes, images, images, k))
        monkeypatch.setattr(training, "batches", in_order)
        monkeypatch.setattr(zscl, "batches", self.order)
        monkeypatch.setattr(training, "crops", lambda pixels, index, size, numbers: pixels[index])
        monkeypatch.setattr(reference, "random_sentences", lambda *_: t[f"{run}/sentences{self.now}"].long())
        self.method = chosen(run, {**self.about["hyper_parameters"], **found["flags"]}, values)
        shown = t.get("reference_images", torch.zeros(1, 3, 1, 1))
        drawings = Images(shown, torch.zeros(len(shown), dtype=torch.long))
        texts = tuple(Class(f"text {k}", ("{}",)) for k in range(len(t.get("reference_tokens", []))))
        context = Context(vocabulary=texts, tasks=tuple(self.tasks), drawings=lambda: drawings)
        self.method.bind(self.clip, context)
        self.texts = ids
        learner = self.method.learn if isinstance(self.method, Compose) else self.method
        self.learner, step = learner, learner.step

        def watched(batch: Any, backward: Any) -> None:
            step(batch, backward)
            if not self.first:
                self.first = {n: p.grad.clone() for n, p in learner.parameters().items() if p.grad is not None}

        monkeypatch.setattr(learner, "step", watched)

    def order(self, count: int, size: int, _: torch.Generator) -> Iterator[Tensor]:
        """The order in which the release took the references of the task at hand."""
        return cycle(self.tensors.get(f"task{self.now}/reference_order", torch.arange(count)).split(size))

    def learn(self, number: int) -> dict[str, list[float]]:
        self.now, self.first = number, {}
        task = self.tasks[number]
        self.method.start(task)
        material = self.method.material(task)
        self.method.begin_task(material)
        losses = fit(self.method, material, torch.Generator(), self.clip.size, self.clip.device)
        self.clip.trained(f"trained {task.name}")
        self.method.fuse(task)
        return losses

    def logits(self) -> Tensor:
        texts = self.clip.encode_text([k for k in self.texts if k.startswith("class")])
        return self.clip.similarity(self.clip.encode_image(self.tensors["test_images"]), texts).detach()


def check_task(trial: Trial, number: int, prefix: str = "") -> None:
    """Every loss, the first gradients, the weights and the logits that a task leaves."""
    start, losses, t = trial.clip.weights(), trial.learn(number), trial.tensors
    allowed, steps = trial.about["tolerance"], trial.rows[number]["steps"]
    found = next(iter(losses.values()))
    assert len(found) in (len(steps), len(steps) - 1)  # plain fine-tuning leaves out the last step, whose rate is 0
    for theirs, mine in LOSSES.items():
        if mine in losses:
            close = allowed["l2_relative" if theirs == "l2" else "losses_relative"]
            wanted = [row[theirs] for row in steps][: len(found)]
            assert losses[mine] == pytest.approx(wanted, rel=close, abs=2e-6), theirs
    total = [sum(column) for column in zip(*losses.values(), strict=True)]
    wanted = [row["loss"] for row in steps][: len(found)]
    assert total == pytest.approx(wanted, rel=2 * allowed["losses_relative"], abs=allowed["l2_relative"] * 0.3)
    for name, gradient in part(t, f"{prefix}grad{number}/").items():
        assert (trial.first[name] - gradient).norm() < allowed["gradients_relative_l2"] * gradient.norm(), name
    now, compared = trial.clip.weights(), part(t, f"{prefix}after{number}/")
    assert len(compared) >= 3
    for name, weight in compared.items():
        if not name.endswith(".k_proj.bias") and name != "logit_scale":
            moved = (weight - start[name]).norm()
            far = (now[name] - weight).norm()
            assert far < allowed["update_relative_l2_per_tensor"] * moved, (name, float(far / moved))
    assert torch.equal(now["logit_scale"], start["logit_scale"])
    torch.testing.assert_close(trial.logits(), t[f"{prefix}test_logits{number}"], rtol=0, atol=allowed["logits_abs"])


def test_zscl_over_two_tasks_is_the_release_s(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("zscl_a", "zscl", monkeypatch)
    for number in range(len(trial.tasks)):
        check_task(trial, number)


@pytest.mark.parametrize("run", RUNS)
def test_every_baseline_is_the_release_s(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("clip_baselines_a", run, monkeypatch)
    for number in range(len(trial.tasks)):
        check_task(trial, number, f"{run}/")
        if run == "icarl":
            assert trial.method.state.memory == trial.rows[number]["memory_after"]
