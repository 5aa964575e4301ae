"""KeepLoRA: what it promises, and what its switches do, on the small world."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import perdure
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.data.task import Query, Task
from perdure.methods.keep_lora import KeepLoRA
from perdure.models.clip import CLIP
from perdure.ops import subspace
from perdure.training.fit import fit


def some(*names: str) -> list[Task]:
    every = {task.name: task for task in mini.multi_domain("I").shortened(tasks=8, images=48).tasks}
    return [every[name] for name in names]


def learned(
    clip: CLIP, *names: str, **values: Any
) -> tuple[KeepLoRA, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Some tasks of the small world; the bases that each was learned with, and its change of the weights."""
    asked: dict[str, Any] = dict(epochs=2, lr=0.05, batch_size=16, rank=16)
    method = KeepLoRA(**{**asked, **values})
    method.bind(clip)
    torch.manual_seed(0)
    bases, changes = [], []
    for task in some(*names):
        before = clip.weights()
        method.begin_task(task)
        bases.append(dict(method.state.basis))
        fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device)
        clip.trained(task.name, method.parameters().values())
        changes.append({n: clip.weights()[f"{n}.weight"].double() - before[f"{n}.weight"].double() for n in bases[-1]})
    return method, bases, changes


def leak(bases: list[dict[str, Tensor]], changes: list[dict[str, Tensor]]) -> float:
    """The largest ‖ΔW·U‖ / ‖ΔW‖ of any layer and task."""
    return max(
        float((change[n] @ basis[n].double()).norm() / change[n].norm().clamp_min(1e-12))
        for basis, change in zip(bases, changes, strict=True)
        for n in change
    )


def test_nothing_is_learned_along_protected_directions(clip: CLIP) -> None:
    method, bases, changes = learned(clip, "animals", "digits")
    assert leak(bases, changes) < 1e-5
    assert all(change.any() for change in changes[1].values())
    for name, basis in method.state.basis.items():
        eye = torch.eye(basis.shape[1])
        assert torch.allclose(basis.T @ basis, eye, atol=1e-6), name
        assert bases[0][name].shape[1] < basis.shape[1] <= basis.shape[0]
        assert torch.equal(basis[:, : bases[1][name].shape[1]], bases[1][name])


@pytest.mark.slow
@pytest.mark.parametrize("oddity", [{"side": "release"}, {"rank_floor": 0.0}])
def test_the_release_s_oddities_let_protected_directions_be_learned(oddity: dict[str, Any], clip: CLIP) -> None:
    """Digits are ten classes: the gradients of the last text layer's q and o have ten directions, and there are 16 ranks."""
    _, bases, changes = learned(clip, "digits", **oddity)
    if "side" in oddity:  # against what should have been protected
        bases = [{n: subspace.of_weight(clip.pretrained[f"{n}.weight"], 0.85, "input", "at") for n in bases[0]}]
    assert leak(bases, changes) > 1e-2


def test_a_task_begins_where_the_last_one_ended(clip: CLIP) -> None:
    """B₀ is taken off B: the very same bits."""
    task = mini.multi_domain("I").shortened(tasks=1, images=32).tasks[0]
    method = KeepLoRA(batch_size=16)
    method.bind(clip)
    with torch.no_grad():
        before = clip.encode_image(task.test.pixels)
        method.begin_task(task)
        assert all(update.on and update.B.any() for update in method.updates.values())
        assert torch.equal(clip.encode_image(task.test.pixels), before)


def test_with_everything_protected_nothing_is_learned(clip: CLIP) -> None:
    _, _, changes = learned(clip, "digits", weight_energy_image=1.0, weight_energy_text=1.0)
    assert not any(change.any() for change in changes[0].values())


def test_the_order_of_the_images_does_not_matter_to_what_is_protected(clip: CLIP) -> None:
    task = mini.multi_domain("I").shortened(tasks=1, images=32).tasks[0]
    turned = Task(task.name, task.classes, task.train.take(torch.arange(31, -1, -1)), task.test)
    for features, alike in (("gram", True), ("release", False)):
        method = KeepLoRA(features=features, batch_size=8)
        method.bind(clip)
        one, other = (method_grams(method, t) for t in (task, turned))
        same = all(torch.allclose(one[n], other[n], rtol=1e-6, atol=1e-6) for n in one if n.startswith("vision"))
        assert same == alike, features


def method_grams(method: KeepLoRA, task: Task) -> dict[str, Tensor]:
    with torch.no_grad():
        method.tokens = method.clip.tokens(task.prompts())
        return method.grams(task)


def test_a_gram_matrix_gives_the_subspace_that_features_give() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 500) * torch.logspace(0, -3, 12)[:, None]
    first = subspace.grown(torch.zeros(12, 0), (x @ x.T).double(), 0.9)
    left, sigma, _ = torch.linalg.svd(x)
    share = sigma.square().cumsum(0) / sigma.square().sum()
    assert first.shape[1] == int((share < 0.9).sum()) + 1
    wanted = left[:, : first.shape[1]]
    torch.testing.assert_close(first @ first.T, wanted @ wanted.T, rtol=0, atol=1e-5)
    assert torch.equal(subspace.grown(first, (x @ x.T).double(), 0.5), first)  # holds enough
    whole = subspace.grown(first, (x @ x.T).double(), 1.0)
    assert whole.shape == (12, 12) and torch.allclose(whole.T @ whole, torch.eye(12), atol=1e-6)


@pytest.mark.slow
def test_the_classifier_answers_its_own_task_alone(clip: CLIP) -> None:
    method, _, _ = learned(clip, "animals", "digits", head=True, head_scale=20.0)
    (task,) = some("digits")
    query = Query(task.test.pixels, task.classes)
    with torch.no_grad():
        images = clip.encode_image(task.test.pixels)
        texts = clip.class_texts([c.prompts() for c in task.classes])
    rows = method.state.rows[task.name]
    cosines = images @ torch.nn.functional.normalize(rows, dim=1).T
    wanted = clip.similarity(images, texts) + 20.0 * cosines
    torch.testing.assert_close(method.predict(query), wanted.detach(), rtol=1e-5, atol=1e-4)
    few = Query(task.test.pixels, task.classes[:-1])  # not exactly one task's classes: the towers alone
    torch.testing.assert_close(method.predict(few), clip.similarity(images, texts[:-1]).detach(), rtol=1e-5, atol=1e-4)
    files, values = method.answer_state()
    assert values["classes"] and not any("basis" in key for file in files.values() for key in file)


def test_sides_that_only_square_layers_hide_are_refused(clip: CLIP) -> None:
    with pytest.raises(PerdureError, match="side=release .*fc1 is none"):
        KeepLoRA(side="release", layers=("q_proj", "fc1")).bind(clip)


@pytest.mark.slow
def test_what_is_protected_is_kept_and_new_things_are_learned(tmp_path: Path) -> None:
    """Digits are taught; where nothing is protected more of the probe is lost."""
    asked: dict[str, Any] = dict(tasks=2, images=300, epochs=0, iterations=40, lr=2e-2, batch_size=32, precision="fp32")
    nothing = dict(weight_energy_image=0.0, weight_energy_text=0.0, feature_energy=0.0)
    kept = perdure.run("keep_lora", "mini-mtil", tmp_path / "kept", **asked)
    lost = perdure.run("keep_lora", "mini-mtil", tmp_path / "lost", **{**asked, **nothing})
    assert kept["accuracy"][2][1] > kept["accuracy"][0][1] + 10
    assert kept["probe"][-1] > lost["probe"][-1] + 2
