"""MG-CLIP against the numbers of the paper's own released code, on tiny CLIPs, through the method and ``fit``."""

import copy
import math
from typing import Any

import pytest
import torch
from cases import case, in_order, part, tiny_clip
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.data.task import Class, Images, Query, Task
from perdure.methods import mg_clip
from perdure.methods.mg_clip import MGCLIP
from perdure.models.heads import CosineHead
from perdure.ops.losses import classification
from perdure.training import fit as training
from perdure.training.fit import fit


@pytest.fixture(autouse=True)
def orderly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "batches", in_order)
    monkeypatch.setattr(mg_clip, "batches", in_order)


def classes_of(numbers: Any) -> tuple[Class, ...]:
    return tuple(Class(f"class {k}", ("{}",)) for k in numbers)


def ready(about: dict[str, Any], t: dict[str, Tensor], **values: Any) -> MGCLIP:
    """The method on a case's model and adapters."""
    clip = tiny_clip(about, part(t, "pretrained/"), {f"class {k}": row for k, row in enumerate(t["class_tokens"])})
    h = about["hyper_parameters"]
    method = MGCLIP(lora_rank=h["lora_rank"], batch_size=h["train_batch_size"], gap_mean="batches", **values)
    method.bind(clip)
    for name, tensor in part(t, "lora_init/").items():
        parameter(method, name).data.copy_(tensor)
    return method


def parameter(method: MGCLIP, name: str) -> Tensor:
    """An adapter's factor by the case's name for it."""
    layer, which = name.rsplit(".", 1)
    return method.clip.backbone.get_parameter(f"{layer}.lora_{which}.default.weight")


def task_of(name: str, images: Tensor, labels: Tensor, classes: tuple[Class, ...]) -> Task:
    return Task(name, classes, Images(images, labels), Images(images, labels))


def far(mine: Tensor, theirs: Tensor, start: Tensor) -> float:
    return float((mine - theirs).norm() / (theirs - start).norm().clamp_min(1e-30))


def test_two_tasks_are_the_release_s() -> None:
    about, t = case("mgclip_a")
    h, allowed = about["hyper_parameters"], about["tolerance"]
    method = ready(
        about, t, epochs=h["epochs"], lr=h["lr"], head_lr=h["visual_agent_lr"], head_epochs=h["visual_agent_epochs"],
        head_batch=h["visual_agent_batch_size"], softmax="double",
    )  # fmt: skip
    clip, steps = method.clip, about["lora_trajectory"]
    assert {n.rsplit(".lora_", 1)[0] for n in method.parameters()} == {
        n.rsplit(".", 1)[0] for n in part(t, "lora_init/")
    }
    for number in range(2):
        pixels, labels = t[f"task{number}/train_images"], t[f"task{number}/train_labels"] - 3 * number
        own = classes_of(range(3 * number, 3 * number + 3))
        seen = classes_of(range(3 * number + 3))
        initial = ready(about, t)  # the reference is taken with the adapters as they began
        wanted = about["means_before_training"][number]
        assert initial.means(pixels, labels + 3 * number, seen) == pytest.approx(
            (wanted["positive_mean"], wanted["negative_mean"]), rel=allowed["means_relative"], abs=2e-6
        )  # of logits of 3 that cancel out
        before = {n: parameter(method, n).detach().clone() for n in part(t, f"lora_after_task{number}/")}
        task = task_of(f"task{number}", pixels, labels, own)
        method.start(task)
        method.begin_task(task)
        losses = fit(method, task, torch.Generator(), clip.size, clip.device)["task"]
        mine = [s for s in steps if s["task"] == number]
        assert losses == pytest.approx([s["loss"] for s in mine], rel=allowed["losses_relative"])
        rates = [method.schedule(task).rate(k) for k in range(len(mine))]
        assert rates == pytest.approx([s["lr"] for s in mine], rel=1e-6)
        for name, theirs in part(t, f"lora_after_task{number}/").items():
            assert far(parameter(method, name), theirs, before[name]) < allowed["lora_update_relative_l2"], name
        clip.trained(f"trained {number}")
        method.fuse(task)
        method.calibrate(task_of(f"task{number}", pixels, labels, own))
        rows = method.state.head["rows"]
        assert torch.allclose(rows, t[f"visual_final_task{number}"], rtol=0, atol=allowed["visual_abs"])
        evaluated = part(t, f"eval_task{number}/")
        images = torch.cat([t[f"task{k}/test_images"] for k in range(number + 1)])
        query = Query(images, seen)
        found = method.predict(query)
        assert torch.allclose(found, evaluated["combined"], rtol=0, atol=allowed["probabilities_abs"])
        assert torch.equal(found.argmax(1), evaluated["predictions"])
        object.__setattr__(method.config, "softmax", "single")
        single = method.predict(query)
        assert torch.allclose(single, evaluated["combined_single_softmax"], rtol=0, atol=allowed["probabilities_abs"])
        object.__setattr__(method.config, "softmax", "double")


def test_the_head_learns_as_the_release_s_does() -> None:
    about, t = case("mgclip_a")
    head = CosineHead(t["vc/weights"])
    assert torch.allclose(head(t["vc/x"]), t["vc/out"], atol=1e-6)
    logits, labels = t["intra/logits"][:, 3:], t["intra/labels"] - 3
    mine = torch.stack([classification(x[None], y[None]) for x, y in zip(logits, labels, strict=True)])
    assert torch.allclose(mine, t["intra/loss_per_sample_offset3"], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mgclip_epoch_a", "mgclip_epoch_neg_a"])
def test_the_gap_finds_the_epochs_that_the_release_s_script_prints(name: str) -> None:
    about, t = case(name)
    allowed = about["tolerance"]
    count = len(t["class_tokens"])
    for wanted in about["runs"]:
        method = ready(about, t, lr=wanted["lr"], gap_change=about["hyper_parameters"]["threshold"])
        task = task_of("first", t["train_images"], t["train_labels"], classes_of(range(count)))
        seen: list[float] = []

        def negative_mean(task: Task, method: MGCLIP = method, seen: list[float] = seen) -> float:
            seen.append(method.means(task.train.pixels, task.train.labels, task.classes)[1])
            return seen[-1]

        method.negative_mean = negative_mean  # type: ignore[method-assign]
        method.begin_task(task)
        fit(method, task, torch.Generator(), method.clip.size, method.clip.device)
        theirs = wanted["negative_mean_after_each_epoch"][: len(seen) - 1]
        assert seen[0] == pytest.approx(wanted["negative_mean_before"], rel=allowed["means_relative"])
        assert seen[1:] == pytest.approx(theirs, rel=allowed["means_relative"])
        if wanted["chosen_epochs"] is not None:
            assert method.state.epochs == wanted["chosen_epochs"]
        elif name == "mgclip_epoch_neg_a":  # there a negative mean never stops; here the fifth epoch is too far
            assert method.state.epochs == 4 and method.state.changes[-1] == pytest.approx(0.105, abs=1e-3)
        else:
            assert method.state.epochs == 10


def run_through(method: MGCLIP, t: dict[str, Tensor], tasks: int) -> dict[str, Tensor]:
    """The case's tasks through every hook; the adapters at the end."""
    for number in range(tasks):
        own, labels = classes_of(range(3 * number, 3 * number + 3)), t[f"task{number}/train_labels"] - 3 * number
        task = task_of(f"task{number}", t[f"task{number}/train_images"], labels, own)
        method.start(task)
        method.begin_task(task)
        fit(method, task, torch.Generator(), method.clip.size, method.clip.device)
        method.clip.trained(f"trained {number}")
        method.fuse(task)
        method.calibrate(task)
    return {n: p.detach().clone() for n, p in method.clip.backbone.named_parameters() if "lora_" in n}


def test_after_the_search_the_adapters_are_put_back_and_trained_anew() -> None:
    """A search that allows some epochs ends where training for so many, from the start, ends: to the bit."""
    about, t = case("mgclip_a")
    found = ready(about, t, lr=5e-4, gap_change=0.18, most_epochs=6)
    start = {n: p.detach().clone() for n, p in found.parameters().items()}
    searched = run_through(found, t, 1)
    epochs, changes = found.state.epochs, found.state.changes
    assert epochs == 2 and len(changes) == 3 and changes[1] <= 0.18 < changes[2]
    given = run_through(ready(about, t, lr=5e-4, epochs=epochs), t, 1)
    assert all(torch.equal(searched[n], given[n]) for n in given)
    assert all(not torch.equal(searched[n], start[n]) for n in given)


@pytest.mark.parametrize("rank", [2, 4, 16])
def test_a_is_drawn_as_xavier_has_it_and_b_is_zero(rank: int) -> None:
    about, t = case("mgclip_a")
    clip = tiny_clip(about, part(t, "pretrained/"), {})
    method = MGCLIP(lora_rank=rank)
    torch.manual_seed(0)
    method.bind(clip)
    for name, factor in method.parameters().items():
        if ".lora_B." in name:
            assert not factor.any()
            continue
        bound = (6 / sum(factor.shape)) ** 0.5
        assert factor.shape[0] == rank and 0.9 * bound < factor.abs().max() <= bound, name
        assert factor.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


@pytest.mark.parametrize("frozen", ["initial", "trained"])
def test_a_frozen_after_the_first_task(frozen: str) -> None:
    """The second task trains B alone; A stays as the first one left it, or, as in the release, falls back."""
    about, t = case("mgclip_a")
    h = about["hyper_parameters"]
    values = dict(epochs=h["epochs"], lr=h["lr"], freeze_A=True, frozen_A=frozen)
    method = ready(about, t, **values)
    start = {n: p.detach().clone() for n, p in method.parameters().items()}
    one = run_through(method, t, 1)
    for name, theirs in part(t, "lora_after_task0/").items():  # the first task is the release's, as ever
        layer, which = name.rsplit(".", 1)
        key = f"{layer}.lora_{which}.default.weight"
        assert far(one[key], theirs, start[key]) < about["tolerance"]["lora_update_relative_l2"]

    pixels, labels = t["task1/train_images"], t["task1/train_labels"] - 3
    task = task_of("task1", pixels, labels, classes_of(range(3, 6)))
    again = ready(about, t, **values)  # as after a resume
    again.unpack_state(*method.pack_state())
    again.clip.load_own_state(method.clip.own_state(), "trained 0")
    for one_of_them in (method, again):
        one_of_them.start(task)
        one_of_them.begin_task(task)
        assert all(".lora_B." in n for n in one_of_them.parameters())
        fit(one_of_them, task, torch.Generator(), method.clip.size, method.clip.device)
    origin = start if frozen == "initial" else one
    plain = by_hand(method, {n: origin[n] if ".lora_A." in n else w for n, w in one.items()}, task, h)
    for name, two in method.clip.backbone.named_parameters():
        if "lora_" in name:
            assert torch.equal(two, again.clip.backbone.get_parameter(name)), name
            if ".lora_A." in name:
                assert torch.equal(two, origin[name]), name
            else:
                assert far(two.detach(), plain[name], one[name]) < 1e-3, name


def by_hand(method: MGCLIP, adapters: dict[str, Tensor], task: Task, h: dict[str, Any]) -> dict[str, Tensor]:
    """B after epochs of Adam under a cosine by epochs to a hundredth, from these factors, A fixed: nothing of the loop."""
    backbone = copy.deepcopy(method.clip.backbone)
    backbone.load_state_dict(adapters, strict=False)
    b = {n: p.requires_grad_() for n, p in backbone.named_parameters() if ".lora_B." in n}
    adam = torch.optim.Adam(b.values(), lr=h["lr"])
    tokens = method.clip.tokens(task.prompts())
    for epoch in range(h["epochs"]):
        rate = h["lr"] * (0.01 + 0.99 * (1 + math.cos(math.pi * epoch / h["epochs"])) / 2)
        for at in torch.arange(len(task.train)).split(h["train_batch_size"]):
            hidden = backbone.vision_model(pixel_values=task.train.pixels[at]).pooler_output
            images = torch.nn.functional.normalize(backbone.visual_projection(hidden), dim=1)
            hidden = backbone.text_model(input_ids=tokens).pooler_output
            texts = torch.nn.functional.normalize(backbone.text_projection(hidden), dim=1)
            logits = backbone.logit_scale.exp() * images @ texts.T
            loss = -logits.log_softmax(1)[torch.arange(len(at)), task.train.labels[at]].mean()
            adam.zero_grad()
            loss.backward()
            adam.param_groups[0]["lr"] = rate
            adam.step()
    return {n: p.detach() for n, p in b.items()}


def test_freezing_needs_adapters() -> None:
    about, t = case("mgclip_a")
    with pytest.raises(PerdureError, match="freeze_A: no adapters"):
        MGCLIP(freeze_A=True, adapt="full").bind(tiny_clip(about, part(t, "pretrained/"), {}))


def test_the_mix_weighs_text_and_head_as_it_is_told() -> None:
    """(a·p_text + b·p_head) / (a + b), with a and b that are neither each other nor the defaults."""
    about, t = case("mgclip_a")
    method = ready(about, t, epochs=1, softmax="single", text_weight=3.0, head_weight=0.5, head_lr=0.02)
    run_through(method, t, 2)
    seen, images = classes_of(range(6)), t["task0/test_images"]
    clip = method.clip
    with torch.no_grad():
        features, texts = clip.encode_image(images), clip.encode_text([c.name for c in seen])
        rows = method.state.head["rows"]
        head = ((features / features.norm(dim=1, keepdim=True)) @ (rows / rows.norm(dim=1, keepdim=True)).T).softmax(1)
        text = (clip.scale * features @ texts.T).softmax(1)
    wanted = (3.0 * text + 0.5 * head) / 3.5
    torch.testing.assert_close(method.predict(Query(images, seen)), wanted, rtol=1e-5, atol=1e-6)
