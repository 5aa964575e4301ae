"""GIFT against the numbers of the paper's own released code, on a tiny CLIP, through the method and ``fit``."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import case, in_order, part, tiny_clip
from torch import Tensor

from perdure.data.task import Batch, Class, Images, Task
from perdure.methods import gift
from perdure.methods.gift import GIFT
from perdure.models.clip import CLIP
from perdure.ops.losses import alignment, alignment_targets, distillation
from perdure.synthesis.store import Pairs
from perdure.training import fit as training
from perdure.training.fit import Backward, fit

NAMES = {
    "ce": "task", "image_distill": "distil_image", "text_distill": "distil_text", "image_ita": "align_image",
    "text_ita": "align_text", "wc_loss": "consolidation",
}  # fmt: skip


class Trial:
    """The production method, model and loop on a case's inputs: only the order of the data and the crops are the case's."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, **values: Any):
        self.about, self.tensors = case(name)
        t, h = self.tensors, self.about["hyper_parameters"]
        ids = {f"class {k}": row for k, row in enumerate(t["class_tokens"])}
        ids |= {f"prompt {k}": row for k, row in enumerate(t["prompt_tokens"])}
        self.clip = tiny_clip(self.about, part(t, "start/"), ids)
        monkeypatch.setattr(training, "batches", in_order)
        monkeypatch.setattr(gift, "batches", in_order)
        monkeypatch.setattr(training, "random_resized_crop", lambda images, size, generator: images * 255)
        settings = dict(
            iterations=h["iterations"], warmup=h["warmup_length"], lr=h["lr"], alpha=h["distill"], beta=h["ita"],
            lam=h["l2"], label_smoothing=h["ls"], temperature=h["T"], batch_size=h["batch_size"],
            synthetic_batch=h["ref_batch_size"], beta2=h["beta2"], weight_decay=h["wd"],
        )  # fmt: skip
        monkeypatch.setattr(gift, "Replay", lambda *around: self)
        self.method = self.make(**settings | values)
        self.method.bind(self.clip)
        classes = tuple(Class(str(k), ("class {}",)) for k in range(len(t["class_tokens"])))
        images = Images(t["images"], t["labels"])
        self.task = Task("task", classes, images, images)
        self.steps: list[dict[str, Tensor]] = []
        self.first: dict[str, dict[str, Tensor]] = {}

    def make(self, **values: Any) -> GIFT:
        trial = self

        class Watched(GIFT):
            def consolidate(self, gradients: Any, backward: Backward) -> dict[str, Tensor]:
                if self.step_number == 0:
                    trial.first["grad_distill_ita"] = {k: g.clone() for k, g in gradients.items() if g is not None}
                weigh = self.importance(gradients)
                trial.steps.append({k: torch.as_tensor(weigh(k)) for k in self.anchor})
                return super().consolidate(gradients, backward)

            def step(self, batch: Batch, backward: Backward) -> None:
                if self.step_number == 1:
                    trial.first["weights"] = {k: p.detach().clone() for k, p in self.parameters().items()}
                super().step(batch, backward)
                if self.step_number == 1:
                    grads = {k: p.grad.clone() for k, p in self.parameters().items() if p.grad is not None}
                    trial.first["grad"] = grads

        return Watched(**values)

    def pairs(self, task: str, learned: list[str]) -> Pairs:
        return Pairs(self.tensors["ref_images"], [f"prompt {k}" for k in self.tensors["ref_labels"].tolist()])

    def run(self) -> dict[str, list[float]]:
        self.method.begin_task(self.task)
        return fit(self.method, self.task, torch.Generator(), self.clip.size, self.clip.device)


def far(mine: Tensor, theirs: Tensor, start: Tensor) -> float:
    """‖mine - theirs‖ / ‖theirs - start‖."""
    return float((mine - theirs).norm() / (theirs - start).norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", ["gift_train_a", "gift_first_task_a"])
def test_every_loss_gradient_and_update_is_the_release_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(name, monkeypatch)
    losses, t, allowed = trial.run(), trial.tensors, trial.about["tolerance"]
    relative, floor = allowed["trajectory_relative"], allowed["trajectory_absolute_floor"]
    for theirs, mine in NAMES.items():
        wanted = [row[theirs] for row in trial.about["trajectory"]]
        assert losses[mine] == pytest.approx(wanted, rel=relative, abs=floor), theirs
    total = [sum(column) for column in zip(*losses.values(), strict=True)]
    assert total == pytest.approx([row["loss"] for row in trial.about["trajectory"]], rel=relative)

    start, k_bias = part(t, "start/"), ".k_proj.bias"
    for prefix, mine_at, tolerance, least in (
        ("after_step0/", trial.first["weights"], allowed["after_step0_update_relative_l2_per_tensor"], 5),
        ("final/", trial.clip.weights(), allowed["final_update_relative_l2_per_tensor"], 50),
    ):
        theirs_at = {k: v for k, v in part(t, prefix).items() if not k.endswith(k_bias) and k in trial.method.anchor}
        assert len(theirs_at) > least
        assert max(far(mine_at[k], v, start[k]) for k, v in theirs_at.items()) < tolerance
    assert torch.equal(trial.clip.weights()["logit_scale"], start["logit_scale"])

    for prefix, mine_at in (
        ("grad_step0/", trial.first["grad"]),
        ("grad_distill_ita_step0/", trial.first["grad_distill_ita"]),
    ):
        for key, wanted_g in part(t, prefix).items():
            if key in mine_at and not key.endswith(k_bias):
                torch.testing.assert_close(mine_at[key], wanted_g, rtol=1e-3, atol=1e-4 * float(wanted_g.abs().max()))
    importance = trial.steps[trial.about["hyper_parameters"]["fisher_iteration"]]
    for key, wanted_f in part(t, "fisher/").items():
        if key in importance and not key.endswith(k_bias):
            torch.testing.assert_close(
                importance[key].expand_as(wanted_f), wanted_f, rtol=2e-2, atol=2e-3 * float(wanted_f.max())
            )


def test_rates_of_iterations_0_to_n_inclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("gift_train_a", monkeypatch)
    plan = trial.method.schedule(trial.task)
    rows = trial.about["trajectory"]
    assert plan.steps == len(rows)
    assert [plan.rate(k) for k in range(plan.steps)] == pytest.approx([r["lr"] for r in rows], rel=1e-9, abs=1e-15)


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {}, "kl_div": {"distillation": "reverse_kl"}, "feature_mse": {"distillation": "feature_mse"},
    "image_only": {"sides": "image"}, "text_only": {"sides": "text"}, "T1": {"temperature": 1.0},
    "ls0": {"label_smoothing": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_replay_losses_of_every_variant_are_the_release_s(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    about, t = case("gift_losses_a")

    class Recorded:
        """The features that the case records, in place of two towers."""

        scale, similarity = torch.tensor(about["logit_scale_log"]).exp(), CLIP.similarity

        def encode_image(self, images: Tensor) -> Tensor:
            return F.normalize(t["student_image_features"], dim=-1)

        def encode_text(self, prompts: list[str]) -> Tensor:
            return F.normalize(t["student_prompt_features"][[int(p) for p in prompts]], dim=-1)

    method = GIFT(**VARIANTS[variant])
    method.clip = Recorded()  # type: ignore[assignment]
    method.teacher_images = F.normalize(t["teacher_image_features"], dim=-1)
    method.teacher_texts = F.normalize(t["teacher_prompt_features"], dim=-1)
    method.prompts, method.prompt_of = [str(k) for k in range(len(method.teacher_texts))], t["ref_labels"]
    method.pairs = Pairs(t["student_image_features"], [])
    losses = method.replay_losses(torch.arange(len(t["ref_labels"])))
    for theirs, mine in list(NAMES.items())[1:5]:
        wanted = about["inline_values"][variant][theirs]
        assert losses[mine].item() == pytest.approx(wanted, rel=about["tolerance"]["relative"]), theirs


@pytest.mark.parametrize("temperature", [1, 2])
def test_distillation_on_random_logits_is_the_release_s(temperature: int) -> None:
    about, t = case("gift_losses_a")
    values, close = about["function_values_on_random_logits"], about["tolerance"]["relative"]
    for transposed, turn in (("", lambda x: x), ("_transposed", lambda x: x.T)):
        s, teacher = turn(t["student_logits"]), turn(t["teacher_logits"])
        for name, form in (("distillation", "contrastive"), ("kl_divergence", "reverse_kl")):
            mine = distillation(s, teacher, temperature, form).item()
            assert mine == pytest.approx(values[f"{name}{transposed}_T{temperature}"], rel=close)
    entropy = temperature**2 * torch.distributions.Categorical(logits=teacher / temperature).entropy().mean()
    kl = distillation(s, teacher, temperature, "kl")
    torch.testing.assert_close(kl, distillation(s, teacher, temperature) - entropy, rtol=1e-4, atol=1e-5)


def test_alignment_targets_share_the_mass_of_equal_prompts() -> None:
    _, t = case("gift_losses_a")
    targets = alignment_targets(t["ref_labels"])
    assert torch.equal(targets, t["ita_targets"])
    logits = torch.zeros(len(targets), len(targets))
    assert alignment(logits, targets, 0.2).item() == pytest.approx(math.log(len(targets)))
