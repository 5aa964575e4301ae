"""MoE-Adapters against the numbers of the paper's own released code, through the method and ``fit``."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import case, in_order, part, tiny_clip
from torch import Tensor

from perdure.data.task import Class, Images, Query, Task
from perdure.methods import moe_adapters
from perdure.methods.moe_adapters import MoEAdapters
from perdure.models import selector
from perdure.models.experts import Mixture
from perdure.training import fit as training
from perdure.training.fit import fit, optimise


class Trial:
    """The production method, model and loop on a case's inputs; noise, orders and starts are the case's."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, **values: Any):
        self.about, self.t = about, t = case(name)
        self.h = h = about["hyper_parameters"]
        monkeypatch.setattr(training, "batches", in_order)
        monkeypatch.setattr(training, "crops", lambda pixels, index, size, numbers: pixels[index])
        monkeypatch.setattr(selector, "alexnet", lambda clip: self.raw)
        self.clip = tiny_clip(about, part(t, "pretrained/"), {f"class {k}": r for k, r in enumerate(t["class_tokens"])})
        settings = dict(
            experts=h["experts"], top_k=h["top_k"], bottleneck=h["bottleneck"], dropout=h["dropout"],
            freeze=h["freeze_per_task"], label_smoothing=h["ls"], weight_decay=h["wd"], beta2=h["beta2"],
            iterations=h["iterations"], warmup=h["warmup_length"], batch_size=h["batch_size"],
            lr_by_task={f"task{r['task']}": r["lr"] for r in about["runs"]},
            selector_features="alexnet", reference="none", threshold=h["threshold"], select="batch",
            selector_code=h["selector_code"], selector_steps=h["selector_iterations"], selector_lr=h["selector_lr"],
            reference_steps=h["selector_iterations"], selector_decay=h["selector_weight_decay"], selector_batch=h["batch_size"],
        )  # fmt: skip
        self.method = MoEAdapters(**settings | values)
        self.method.bind(self.clip)
        for n, tensor in part(t, "experts_start/").items():
            self.tensor(n).data.copy_(tensor)
        self.log: list[dict[str, Tensor]] = []
        self.losses: dict[str, list[float]] = {}
        self.method.lend(self.train)

    def raw(self, images: Tensor) -> Tensor:
        w = part(self.t, "feature/")
        hidden = F.relu(F.conv2d(images, w["conv0.weight"], w["conv0.bias"], stride=2, padding=1))
        return F.conv2d(hidden, w["conv1.weight"], w["conv1.bias"], stride=2, padding=1).flatten(1)

    def train(self, learner: Any, schedule: Any, draws: Any, name: str) -> Any:
        """A phase, from the case's start."""
        number = next(k for k, one in self.method.selector.autoencoders.items() if one is learner.one)
        start = {n.replace(".0.", "."): w for n, w in part(self.t, f"selector_start/{number}.").items()}
        learner.one.load_state_dict(start)
        found = optimise(learner, schedule, draws, self.clip.device, name=name)
        self.losses[str(number)] = found["selector"]
        return found

    def tensor(self, name: str) -> Tensor:
        """One of the case's tensors: ``vision.0.expert1.down.weight``, ``text.1.router2``."""
        tower, block, what, *rest = name.split(".")
        mixture = self.method.mixtures[f"{tower}.{block}"]
        if what.startswith("expert"):
            return mixture.experts[int(what.removeprefix("expert"))].get_parameter(".".join(rest))
        kind = mixture.routers if what.startswith("router") else mixture.noises
        return kind[int(what[-1])]

    def names(self) -> list[str]:
        return [
            f"{block}.expert{e}.{n}"
            for block, mixture in self.method.mixtures.items()
            for e, expert in enumerate(mixture.experts)
            for n, _ in expert.named_parameters()
        ]

    def task(self, number: int) -> Task:
        count = self.h["classes_per_task"]
        classes = tuple(Class(f"class {k}", ("{}",)) for k in range(number * count, (number + 1) * count))
        images = Images(self.t[f"task{number}/images"], self.t[f"task{number}/labels"])
        return Task(f"task{number}", classes, images, images, number)

    def learn(self, number: int) -> Any:
        task, method = self.task(number), self.method
        calls = dict.fromkeys(method.mixtures, 0)
        self.log = []
        self.gates: dict[str, Any] = {}

        def watch(name: str, mixture: Mixture) -> None:
            def noise(z: Tensor) -> Tensor:
                calls[name] += 1
                return self.t[f"noise{number}/{calls[name] - 1}.{name}"]

            routed = Mixture.gates.__get__(mixture)

            def gates(first: Tensor, router: int) -> tuple[Tensor, Tensor]:
                found = routed(first, router)
                self.gates[name] = torch.zeros(len(first), self.h["experts"]).scatter(1, found[1], found[0].detach())
                return found

            mixture.noise, mixture.gates = noise, gates  # type: ignore[method-assign]

        for name, mixture in method.mixtures.items():
            watch(name, mixture)
        method.start(task)
        method.begin_task(task)
        trial, original = self, method.step

        def step(batch: Any, backward: Any) -> None:
            def heard(**losses: Tensor) -> Any:
                found = backward(**losses)
                trial.log.append({n: g.clone() for n, g in found.items() if g is not None})
                return found

            original(batch, heard)  # type: ignore[arg-type]

        method.step = step  # type: ignore[method-assign]
        losses = fit(method, task, torch.Generator(), self.clip.size, self.clip.device)
        del method.step
        self.clip.trained(f"trained {task.name}", method.parameters().values())
        for mixture in method.mixtures.values():
            del mixture.noise, mixture.gates
        return losses

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Of a step, under the case's names."""
        out = {}
        for n, g in self.log[step].items():
            tower, block, rest = n.split(".", 2)
            rest = rest.replace("experts.", "expert").replace("routers.", "router").replace("noises.", "noise")
            out[f"{tower}.{block}.{rest}"] = g
        return out


def far(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.detach() - theirs).norm() / theirs.norm().clamp_min(1e-30))


def expert_of(name: str) -> str:
    return ".".join(name.split(".")[:3])


@pytest.mark.parametrize("name", ["moe_adapters_a"])
def test_every_gate_count_expert_and_answer_is_the_release_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(name, monkeypatch)
    method, t, about, allowed = trial.method, trial.t, trial.about, trial.about["tolerance"]
    for number, wanted in enumerate(about["runs"]):
        everything = {n: trial.tensor(n).detach().clone() for n in trial.names()}
        frozen = {f"{b}.expert{e}" for b, es in method.state.frozen.items() for e in es}
        assert sorted(frozen) == wanted["frozen_during_this_task"]
        losses = trial.learn(number)
        assert losses["task"] == pytest.approx([s["loss"] for s in wanted["steps"]], rel=allowed["losses_relative"])
        plan = method.schedule(trial.task(number))
        assert [plan.rate(k) for k in range(plan.steps)] == pytest.approx([s["lr"] for s in wanted["steps"]], rel=1e-6)
        for block, mixture in method.mixtures.items():
            torch.testing.assert_close(
                trial.gates[block], t[f"gates{number}/{block}"], rtol=0, atol=allowed["gates_abs"]
            )
            assert mixture.counts == wanted["counts"][block]
            assert {f"{block}.expert{e}" for e in mixture.taken_most(2)} <= set(wanted["frozen_by_this_task"])
        every = {expert_of(n) for n in trial.names()}
        for step, idle in enumerate(wanted["experts_without_gradient"]):
            assert sorted(every - {expert_of(n) for n in trial.gradients(step) if "expert" in n}) == idle
        for n, theirs in part(t, f"grad{number}/").items():
            assert far(trial.gradients(2)[n], theirs) < 1e-3, n
        for n, theirs in part(t, f"after{number}/").items():
            start = everything.get(n, torch.zeros_like(theirs))
            if expert_of(n) in frozen:
                assert torch.equal(trial.tensor(n), start), n
            else:
                allowed_far = allowed["update_relative_l2_per_tensor"]
                assert far(trial.tensor(n) - start, theirs - start) < allowed_far, n
        method.fuse(trial.task(number))


@pytest.mark.parametrize("name", ["moe_adapters_a"])
def test_the_selector_and_the_answers_are_the_release_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(name, monkeypatch)
    method, t, about, allowed = trial.method, trial.t, trial.about, trial.about["tolerance"]
    monkeypatch.setattr(method, "reference_images", lambda: t["selector/reference_images"])
    for number in range(trial.h["tasks"]):
        trial.learn(number)
        method.fuse(trial.task(number))
    for number, wanted in enumerate(about["selector_losses"]):
        assert trial.losses[str(number)] == pytest.approx(wanted, rel=allowed["selector_losses_relative"])
        for n, theirs in part(t, f"selector_end/{number}.").items():
            start = t[f"selector_start/{number}.{n}"]
            mine = method.state.selector[str(number)][n.replace(".0.", ".")]
            assert far(mine - start, theirs - start) < allowed["update_relative_l2_per_tensor"]
    for row in about["predictions"]:
        at = row["batch"]
        images, asked = t[f"test/{at}.images"], trial.task(row["class_names_of_task"]).classes
        losses = method.selector.losses(images)
        assert losses.mean(0).tolist() == pytest.approx(row["losses"], rel=allowed["selector_losses_relative"])
        torch.testing.assert_close(losses, t[f"test/{at}.single_losses"], rtol=1e-4, atol=1e-7)
        assert method.selector.choose(images).tolist() == [row["chosen_task"] + 1] * len(images)
        found = method.predict(Query(images, asked)) * 100 / trial.clip.scale.detach()
        torch.testing.assert_close(found, t[f"test/{at}.logits"], rtol=0, atol=allowed["logits_abs"])
        known = [(int(n.rsplit(".", 1)[1]), w) for n, w in part(t, f"test/{at}.text.").items() for n in [f".{n}"]]
        for router, theirs in known:
            with trial.clip.preserved(), torch.no_grad():
                expert = method.base_expert() if router < 0 else moe_adapters.Expert(method.router_name(router), {})
                method.load_expert(expert)
                assert method.route() == (None if router < 0 else router)
                mine = trial.clip.class_texts([c.prompts() for c in asked])
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)
