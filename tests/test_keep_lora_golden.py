"""KeepLoRA against the numbers of the paper's own released code, through the method and ``fit``."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import case, part, tiny_clip
from torch import Tensor

from perdure.data.task import Class, Images, Query, Task
from perdure.methods import keep_lora
from perdure.methods.keep_lora import KeepLoRA
from perdure.training import fit as training
from perdure.training.fit import fit

RELEASE: dict[str, Any] = dict(side="release", weight_stop="before", features="release", rank_floor=0.0, augment=False)
KINDS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


class Trial:
    """The production method, model and loop on a case's inputs, its images in the case's orders."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, **values: Any):
        self.about, self.tensors = about, t = case(name)
        h = about["hyper_parameters"]
        ids = {f"class {k}": row for k, row in enumerate(t["tokens"])}
        self.clip = tiny_clip({"hf_config": about["config"]}, part(t, "clip/"), ids)
        self.method = KeepLoRA(
            **{
                **RELEASE, "rank": h["rank"], "alpha": h["alpha"], "lr": h["lr"], "weight_decay": h["weight_decay"],
                "epochs": h["epochs"], "batch_size": h["batch_size"], "feature_energy": h["feature_energy"],
                "weight_energy_image": h["weight_energy"]["vit"], "weight_energy_text": h["weight_energy"]["text"],
                "head": h["classifier"] is not None, "head_scale": h["classifier_scale"], **values,
            }
        )  # fmt: skip
        self.method.bind(self.clip)
        self.tasks = []
        first = 0
        for k, size in enumerate(h["task_sizes"]):
            classes = tuple(Class(f"class {c}", ("{}",)) for c in range(first, first + size))
            sides = [Images(t[f"task{k}/{s}images"], t[f"task{k}/{s}labels"]) for s in ("", "test_")]
            self.tasks.append(Task(f"task{k}", classes, sides[0], sides[1], k))
            first += size
        monkeypatch.setattr(training, "batches", self.epochs)
        monkeypatch.setattr(keep_lora, "batches", self.passes)

    def begin(self, task: Task) -> None:
        order = self.tensors[f"{task.name}/order"]
        self.order, self.other = order[:-3], iter(order[-3:] if self.method.config.head else order[[-3, -1]])
        self.method.start(task)
        self.method.begin_task(task)

    def epochs(self, count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        for epoch in self.order:
            yield from epoch.split(size)

    def passes(self, count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        yield from next(self.other).split(size)

    def update(self, name: str) -> Any:
        """The update of a layer by the case's name for it: ``vit_q/0``."""
        kind, layer = name.split("/")
        tower, which = kind.split("_")
        place = {"vit": "vision_model", "text": "text_model"}[tower]
        return self.method.updates[f"{place}.encoder.layers.{layer}.self_attn.{KINDS[which]}"]

    def check_bases(self, prefix: str) -> None:
        allowed = 1e-4
        for name, theirs in part(self.tensors, f"{prefix}/basis/").items():
            key = next(n for n, u in self.method.updates.items() if u is self.update(name))
            mine = self.method.state.basis[key]
            assert mine.shape == theirs.shape, (prefix, name)
            torch.testing.assert_close(mine @ mine.T, theirs @ theirs.T, rtol=0, atol=allowed)


def far(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.detach() - theirs).norm() / theirs.norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", ["keep_lora_a"])
def test_every_basis_factor_loss_and_logit_is_the_release_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(name, monkeypatch)
    method, t = trial.method, trial.tensors
    for task, wanted in zip(trial.tasks, trial.about["steps"], strict=True):
        trial.begin(task)
        trial.check_bases(f"before_{task.name}")
        for n, theirs in part(t, f"{task.name}/A/").items():
            update, b0 = trial.update(n), t[f"{task.name}/B0/{n}"]
            assert far(update.A.T @ update.B0.T, theirs @ b0) < 1e-4, n
            update.set(theirs.T, b0.T)  # signs, and directions that are rounding, are free
        losses = fit(method, task, torch.Generator(), trial.clip.size, trial.clip.device)
        assert losses["task"] == pytest.approx([s["loss"] for s in wanted["steps"]], rel=1e-5)
        plan = method.schedule(task)
        optimizer = plan.optimizer_of(method.parameters())
        for k, step in enumerate(wanted["steps"]):
            plan.set(optimizer, k)
            group = optimizer.param_groups[0]
            assert (group["lr"], group["betas"][0]) == pytest.approx((step["lr"], step["beta1"]), rel=1e-9)
        for n, theirs in part(t, f"{task.name}/B/").items():
            moved, b0 = trial.update(n).B.T, t[f"{task.name}/B0/{n}"]
            assert far(moved - b0, theirs - b0) < 2e-3, n
        trial.clip.trained(f"trained {task.name}", method.parameters().values())
        method.fuse(task)
        for k, other in enumerate(trial.tasks):
            found = method.predict(Query(other.test.pixels, other.classes))
            torch.testing.assert_close(found, t[f"after_{task.name}/logits_on{k}"], rtol=0, atol=1e-3)
    trial.check_bases("after_all")
