"""MG-CLIP against the numbers of the paper's own released code, on tiny CLIPs, through the method and ``fit``."""

from typing import Any

import pytest
import torch
from cases import case, in_order, part, tiny_clip
from torch import Tensor

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
        method.begin_task(task)
        losses = fit(method, task, torch.Generator(), clip.size, clip.device)["task"]
        mine = [s for s in steps if s["task"] == number]
        assert losses == pytest.approx([s["loss"] for s in mine], rel=allowed["losses_relative"])
        rates = [method.schedule(task).rate(k) for k in range(len(mine))]
        assert rates == pytest.approx([s["lr"] for s in mine], rel=1e-6)
        for name, theirs in part(t, f"lora_after_task{number}/").items():
            assert far(parameter(method, name), theirs, before[name]) < allowed["lora_update_relative_l2"], name
        clip.trained(f"trained {number}")
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
