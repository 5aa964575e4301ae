"""CGIL against the numbers of its authors' own released code, on tiny CLIPs, through the method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import case, part, tiny_clip
from torch import Tensor

from perdure.data.task import Batch, Class, Images, Query, Task
from perdure.methods.cgil import CGIL
from perdure.models.vae import VAE
from perdure.ops import gaussians
from perdure.training import feature_replay
from perdure.training.fit import Losses, Stepper, optimise
from perdure.training.schedule import Schedule

PHOTO = "a photo of a {}"


def ready(about: dict[str, Any], t: dict[str, Tensor], **values: Any) -> CGIL:
    """The method on a case's model; its tokens are without the placeholders that the release puts where vectors stand."""
    h = about["hyper_parameters"]
    gap = h["context_vectors"]
    ids = {PHOTO.format(k): row for k, row in enumerate(t["photo_tokens"].tolist())}
    ids |= {f"{k}.": [row[0], *row[1 + gap :], *[0] * gap] for k, row in enumerate(t["prompt_tokens"].tolist())}
    start = t["photo_tokens"][0, 0].item()
    ids[""] = [start, about["hf_config"]["text_config"]["eos_token_id"]]
    clip = tiny_clip(about, part(t, "pretrained/"), {text: torch.tensor(row) for text, row in ids.items()})
    asked = dict(
        lr=h["learning_rate_alignment"], weight_decay=h["optim_alignment_wd"], epochs=h["num_epochs_alignment"],
        batch_size=h["batch_size_alignment"], vae_hidden=h["gr_vae_hidden_dim"], vae_latent=h["gr_vae_latent_dim"],
        vae_passes=h["gr_vae_n_iters"], vae_lr=h["lr_vae"], replay=h["g_models"], vectors=h["n_context"],
        context="both" if h["combo_context"] else "own", trained="task" if h["train_only_current_prompts"] else "seen",
        draws=h["draws_per_class"], prompt="name", unseen="release",
    )  # fmt: skip
    method = CGIL(**{**asked, **values})
    method.bind(clip)
    for name, own in part(t, "generator_init/").items():
        method.network.get_parameter(name).data.copy_(own)
    return method


def classes_of(numbers: range) -> tuple[Class, ...]:
    return tuple(Class(str(k), (PHOTO,)) for k in numbers)


def task_of(t: dict[str, Tensor], number: int, sizes: list[int]) -> Task:
    first, last = sum(sizes[:number]), sum(sizes[: number + 1])
    own = (t["train/labels"] >= first) & (t["train/labels"] < last)
    images = Images(t["train/images"][own].float(), t["train/labels"][own] - first)
    return Task(f"task {number}", classes_of(range(first, last)), images, images, index=number)


def born_as(method: CGIL, t: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors and VAEs begin as the case's."""
    born = iter(t["own_init"])
    monkeypatch.setattr(method, "born", lambda count, task: torch.stack([next(born) for _ in range(count)]))
    number = iter(range(len(t["own_init"])))

    def new_vae(width: int, options: Any, seed: int) -> VAE:
        vae = VAE(width, options.vae_hidden, options.vae_latent)
        own = part(t, f"vae_init/class{next(number)}/")
        vae.load_state_dict({name.split(".", 1)[1]: tensor for name, tensor in own.items()})
        return vae

    monkeypatch.setattr(feature_replay, "new_vae", new_vae)


def drawn_as(monkeypatch: pytest.MonkeyPatch, t: dict[str, Tensor], task: int, classes: range) -> None:
    """The case's orders and noise: of each VAE, then of the alignment."""
    orders = [*(t.get(f"vae_perm/class{k}", torch.empty(0, 0)) for k in classes), t[f"align_perm/task{task}"]]
    each_order = iter([row.long() for some in orders for row in some])
    whole = t[f"align_noise/task{task}"].float()
    noise = torch.cat([*(t.get(f"vae_noise/class{k}", whole.new_empty(0, whole.shape[-1])) for k in classes)]).float()
    noise, place = torch.cat([noise, whole.flatten(0, 2)]), [0]

    def normal(rows: int, width: int, generator: torch.Generator) -> Tensor:
        place.append(place[-1] + rows)
        return noise[place[-2] : place[-1]]

    monkeypatch.setattr(gaussians, "shuffled", lambda *asked: next(each_order))
    monkeypatch.setattr(gaussians, "normal", normal)


def far(mine: Tensor, theirs: Tensor, start: Tensor) -> float:
    return ((mine - theirs).norm() / (theirs - start).norm().clamp_min(1e-30)).item()


class Watched:
    """A trainer that keeps what it trained, and how it went."""

    def __init__(self) -> None:
        self.losses: dict[str, Losses] = {}
        self.learners: dict[str, Any] = {}
        self.rates: dict[str, list[float]] = {}

    def __call__(self, learner: Stepper, plan: Schedule, draws: Iterator[Batch], name: str) -> Losses:
        self.learners[name], self.rates[name] = learner, [plan.rate(k) for k in range(plan.steps)]
        self.losses[name] = optimise(learner, plan, draws, torch.device("cpu"))
        return self.losses[name]


def vaes_are(watched: Watched, about: dict[str, Any], t: dict[str, Tensor], classes: range) -> None:
    allowed = about["tolerances"]["suggested"]["losses"]
    for k in classes:
        steps = [s for s in about["vae_steps"] if s["class"] == k]
        own = watched.losses[f"VAE of {k}"]
        total = [a + b for a, b in zip(own["reconstruction"], own["divergence"], strict=True)]
        assert total == pytest.approx([s["loss"] for s in steps], rel=allowed)
        assert watched.rates[f"VAE of {k}"] == pytest.approx([s["lr"] for s in steps])
        weights = dict(watched.learners[f"VAE of {k}"].vae.named_parameters())
        for name, theirs in part(t, f"vae/class{k}/").items():
            plain = name.split(".", 1)[1]
            if plain not in ("encoder.0.bias", "encoder.3.bias"):  # before batch norm: without effect
                assert far(weights[plain], theirs, t[f"vae_init/class{k}/{name}"]) < 2e-3, name


@pytest.mark.parametrize("name", ["cgil_a", "cgil_gauss_a"])
def test_a_run_is_the_release_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    about, t = case(name)
    h, allowed = about["hyper_parameters"], about["tolerances"]["suggested"]
    method, watched = ready(about, t), Watched()
    born_as(method, t, monkeypatch)
    method.lend(watched)
    own, generator, before = t["own_init"], part(t, "generator_init/"), t["own_init"]
    for number in range(h["tasks_run"]):
        seen = sum(h["task_sizes"][: number + 1])
        new = range(sum(h["task_sizes"][:number]), seen)
        drawn_as(monkeypatch, t, number, new)
        method.begin_task(task_of(t, number, h["task_sizes"]))
        method.calibrate(task_of(t, number, h["task_sizes"]))
        if h["g_models"] == "vae":
            vaes_are(watched, about, t, new)
        steps = [s["loss"] for s in about["alignment_steps"] if s["task"] == number]
        assert watched.losses["alignment"]["alignment"] == pytest.approx(steps, rel=allowed["losses"])
        kept = method.state.prompts
        theirs = t[f"own_task{number}"][:seen]
        assert far(kept["own"], theirs, own[:seen]) < 5e-3
        for k in range(new.start):  # what did not learn has not moved, by decay either
            assert torch.equal(kept["own"][k], before[k]) == torch.equal(theirs[k], own[k])
        before = kept["own"]
        own = t[f"own_task{number}"]
        for key, start in generator.items():
            after = t[f"generator_task{number}/{key}"]
            assert far(kept[f"network/{key}"], after, start) < 5e-3, key
        generator = part(t, f"generator_task{number}/")
        assert torch.allclose(kept["keys"], t[f"keys_task{number}"], rtol=0, atol=allowed["keys"])
        every = range(len(t["photo_tokens"]))
        for which, classes, unseen in (
            ("logits", range(seen), "release"), ("future_logits", every, "release"), ("future_logits_unit", every, "unit"),
        ):  # fmt: skip
            method.config = replace(method.config, unseen=unseen)
            answer = method.predict(Query(t["test/images"].float(), classes_of(classes)))
            wanted = t[f"eval_task{number}/{which}"]
            assert torch.allclose(answer, wanted, rtol=0, atol=allowed["logits"]), which
            assert torch.equal(answer.argmax(1), wanted.argmax(1)), which
    for k, own_gauss in enumerate(part(t, "gauss/").values()):
        mine = method.state.replay["task 0" if k < h["task_sizes"][0] else "task 1"]
        place = k if k < h["task_sizes"][0] else k - h["task_sizes"][0]
        torch.testing.assert_close(torch.stack([mine["mean"][place], mine["deviation"][place]]), own_gauss)
