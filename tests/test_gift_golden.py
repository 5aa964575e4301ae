"""GIFT against the numbers of the paper's own released code, on a tiny CLIP, through the method and ``fit``."""

import copy
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
        if h["load"]:  # a later task: the model before it is not the pre-trained one
            self.clip.pretrained = moved(self.clip.weights(), 0)
            self.clip.holds, self.clip.rebased = "previous", True
        monkeypatch.setattr(training, "batches", in_order)
        monkeypatch.setattr(gift, "batches", in_order)
        monkeypatch.setattr(training, "crops", lambda pixels, index, size, numbers: pixels[index])
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
                return super().consolidate(gradients, backward)

            def importance(self, gradients: Any) -> Any:
                weigh = super().importance(gradients)
                trial.steps.append({k: torch.as_tensor(weigh(k)) for k in self.anchor})
                return weigh

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
        self.method.start(self.task)
        self.method.begin_task(self.task)
        losses = fit(self.method, self.task, torch.Generator(), self.clip.size, self.clip.device)
        self.method.fuse(self.task)
        return losses


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


# ---- against the equations, written out: what the release's cases leave at its default, or cannot tell apart

UNLIKE_DEFAULTS: dict[str, Any] = dict(
    iterations=6, warmup=2, lr=2e-3, alpha=0.7, beta=0.4, lam=2.5, weight_decay=0.1, temperature=1.5, label_smoothing=0.1,
    batch_size=5, synthetic_batch=7, beta1=0.85, beta2=0.98, static_steps=3,
)  # fmt: skip


def moved(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights near others: the model before the one that a task begins with."""
    draw = torch.Generator().manual_seed(seed)
    return {k: v + 0.2 * v.std() * torch.randn(v.shape, generator=draw) if v.ndim else v for k, v in weights.items()}


class Equations:
    """GIFT's steps from its equations, with loops and autograd: none of the production's shortcuts, nor its loop."""

    def __init__(self, trial: Trial, config: gift.Config):
        self.t, self.c, self.student = trial.tensors, config, copy.deepcopy(trial.clip.backbone)
        self.end = trial.about["hf_config"]["text_config"]["eos_token_id"]
        towers = {"both": "", "image": "vis", "text": "text"}[config.towers]
        self.theta = {
            k: p for k, p in self.student.named_parameters() if k != "logit_scale" and k.startswith(towers)
        }  # fmt: skip
        self.anchor = {k: p.detach().clone() for k, p in self.theta.items()}
        self.teacher = copy.deepcopy(self.student)
        share = {"previous": 1.0, "initial": 0.0, "mix": config.teacher_mix}[config.teacher]
        origin = trial.clip.pretrained
        with torch.no_grad():
            for key, weight in self.teacher.named_parameters():
                weight.copy_((1 - share) * origin[key] + share * weight)

    def images(self, model: Any, pixels: Tensor) -> Tensor:
        hidden = model.vision_model(pixel_values=pixels).pooler_output @ model.visual_projection.weight.T
        return hidden / hidden.norm(dim=1, keepdim=True)

    def texts(self, model: Any, ids: Tensor) -> Tensor:
        states = model.text_model(input_ids=ids).last_hidden_state
        rows = [states[i, int((row == self.end).int().argmax())] for i, row in enumerate(ids)]
        hidden = torch.stack(rows) @ model.text_projection.weight.T
        return hidden / hidden.norm(dim=1, keepdim=True)

    def replayed(self, at: Tensor) -> dict[str, Tensor]:
        c, t, scale = self.c, self.t, self.student.logit_scale.exp().detach()
        pixels, number = t["ref_images"][at], t["ref_labels"][at]
        with torch.no_grad():
            i_t, t_t = self.images(self.teacher, pixels), self.texts(self.teacher, t["prompt_tokens"][number])
        i_s, t_s = self.images(self.student, pixels), self.texts(self.student, t["prompt_tokens"][number])
        used_i, used_t = (i_t if c.sides == "text" else i_s), (t_t if c.sides == "image" else t_s)
        wanted, found = scale * i_t @ t_t.T, scale * used_i @ used_t.T
        out = {}
        for side, a, b in (("image", found, wanted), ("text", found.T, wanted.T)):
            distilled, aligned = torch.zeros(()), torch.zeros(())
            for row in range(len(at)):
                p, q = (b[row] / c.temperature).softmax(0), (a[row] / c.temperature).softmax(0)
                term = {
                    "contrastive": -(p * q.log()).sum(), "kl": (p * (p / q).log()).sum(),
                    "reverse_kl": (q * (q / p).log()).sum(),
                }.get(c.distillation, torch.zeros(()))  # fmt: skip
                distilled = distilled + c.temperature**2 * term / len(at)
                same = (number == number[row]).float()
                target = (1 - c.label_smoothing) * same / same.sum() + c.label_smoothing / len(at)
                aligned = aligned - (target * a[row].log_softmax(0)).sum() / len(at)
            if c.distillation == "feature_mse":
                distilled = ((used_i - i_t) if side == "image" else (used_t - t_t)).pow(2).mean()
            if c.distillation == "feature_mse_release":
                distilled = ((i_s - i_t) if side == "image" else (t_s - t_t)).pow(2).mean()
            out[f"distil_{side}"], out[f"align_{side}"] = c.alpha * distilled, c.beta * aligned
        return out

    def weigh(self, gradients: dict[str, Tensor | None]) -> dict[str, Tensor | float]:
        """F of each parameter, whose mean is taken over the tensor that the original CLIP holds it in."""
        out: dict[str, Tensor | float] = {}
        for key, g in gradients.items():
            if g is None:
                out[key] = 1e-6
                continue
            group = [key]
            if any(p in key for p in (".q_proj.", ".k_proj.", ".v_proj.")):
                group = [key.replace(key.split(".")[-2], f"{x}_proj") for x in "qkv"]
            values = torch.cat([gradients[k].flatten() for k in group])  # type: ignore[union-attr]
            out[key] = g**2 / (values**2).mean().clamp_min(1e-38)  # at the start student and teacher are one
        return out

    def rate(self, step: int) -> float:
        c = self.c
        if step < c.warmup:
            return c.lr * (step + 1) / c.warmup
        return c.lr / 2 * (1 + math.cos(math.pi * (step - c.warmup) / (c.iterations - c.warmup)))

    def run(self) -> list[dict[str, float]]:
        c, t, shown = self.c, self.t, []
        adam = torch.optim.AdamW(
            self.theta.values(), lr=c.lr, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, foreach=False
        )
        tasks, pairs = (
            in_order(len(t[x]), n, torch.Generator())
            for x, n in (("labels", c.batch_size), ("ref_labels", c.synthetic_batch))
        )
        kept: list[dict[str, Tensor | float]] = []
        for step in range(c.iterations + 1):
            fixed = c.consolidation.startswith("static") and step >= c.static_steps
            piled = fixed and c.consolidation == "static_release"
            if not piled:
                adam.zero_grad()
            losses = self.replayed(next(pairs))
            replay = torch.stack(list(losses.values())).sum()
            found = (
                [None] * len(self.theta)
                if not replay.requires_grad
                else torch.autograd.grad(replay, list(self.theta.values()), allow_unused=True)
            )
            g = dict(zip(self.theta, found, strict=True))
            if not fixed:
                kept.append(self.weigh(g))
            if c.consolidation == "adaptive":
                weight = kept[-1]
            elif c.consolidation == "l2":
                weight = dict.fromkeys(self.theta, 1.0)
            else:
                weight = {k: sum(f[k] for f in kept) / len(kept) for k in self.theta}
            at = next(tasks)
            texts = self.texts(self.student, t["class_tokens"])
            logits = self.student.logit_scale.exp().detach() * self.images(self.student, t["images"][at]) @ texts.T
            log_p, hit = logits.log_softmax(1), torch.arange(len(at))
            smooth = c.label_smoothing
            task = -((1 - smooth) * log_p[hit, t["labels"][at]] + smooth * log_p.mean(1)).mean()
            penalty = torch.zeros(())
            if c.consolidation != "none":
                for k, p in self.theta.items():
                    penalty = penalty + c.lam * (torch.as_tensor(weight[k]) * (p - self.anchor[k]).pow(2)).sum()
            (task + penalty).backward()
            for k, p in self.theta.items():
                if not piled and g[k] is not None:
                    p.grad = g[k] if p.grad is None else p.grad + g[k]
            adam.param_groups[0]["lr"] = self.rate(step)
            adam.step()
            shown.append({k: v.item() for k, v in (losses | {"task": task, "consolidation": penalty}).items()})
        return shown


DEPARTURES: dict[str, dict[str, Any]] = {
    "none": {},
    "teacher initial": {"teacher": "initial"},
    "teacher mix": {"teacher": "mix", "teacher_mix": 0.3},
    "kl": {"distillation": "kl"},
    "reverse_kl": {"distillation": "reverse_kl"},
    "feature_mse": {"distillation": "feature_mse", "alpha": 40.0},
    "feature_mse image": {"distillation": "feature_mse", "sides": "image", "alpha": 40.0},
    "feature_mse_release image": {"distillation": "feature_mse_release", "sides": "image", "alpha": 40.0},
    "feature_mse_release text": {"distillation": "feature_mse_release", "sides": "text", "alpha": 40.0},
    "image": {"sides": "image"},
    "text": {"sides": "text"},
    "static": {"consolidation": "static"},
    "static_release": {"consolidation": "static_release"},
    "l2": {"consolidation": "l2"},
    "no consolidation": {"consolidation": "none"},
    # no pair reaches a text weight by the images alone: F is 1e-6 everywhere, and a penalty of a million times that is felt
    "no gradient": {"sides": "image", "towers": "text", "lam": 1e6},
}


@pytest.mark.slow
@pytest.mark.parametrize("departure", DEPARTURES)
def test_steps_are_the_equations_written_out(departure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("gift_train_a", monkeypatch, **UNLIKE_DEFAULTS | DEPARTURES[departure])
    plain = Equations(trial, trial.method.config)
    start, wanted, losses = trial.clip.weights(), plain.run(), trial.run()
    for name in wanted[0]:  # the penalty also counts the noise in the biases of keys, whose gradient is zero
        mine = losses.get(name, [0.0] * len(wanted))
        assert mine == pytest.approx([row[name] for row in wanted], rel=1e-3, abs=5e-5), name
    found = trial.clip.weights()
    compared = [k for k in plain.theta if not k.endswith(".k_proj.bias")]
    assert max(far(found[k], plain.theta[k].detach(), start[k]) for k in compared) < 1e-2
    assert all(torch.equal(found[k], w) for k, w in start.items() if k not in plain.theta)
