"""MoE-Adapters: what it promises, and what its switches do, on the small world."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import perdure
from perdure import launch
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.data.task import Context, Query, Task
from perdure.engine.checkpoint import module_state
from perdure.methods import moe_adapters
from perdure.methods.base import Method
from perdure.methods.compose import Compose
from perdure.methods.moe_adapters import MoEAdapters
from perdure.models import selector
from perdure.models.clip import CLIP
from perdure.models.experts import Mixture
from perdure.models.recompute import by_blocks
from perdure.training import selecting
from perdure.training.fit import fit

SMALL: dict[str, Any] = dict(
    experts=4, bottleneck=8, iterations=2, warmup=0, batch_size=8, lr=0.01, selector_steps=4, reference="none",
    selector_code=8,
)  # fmt: skip


def learned(clip: CLIP, *names: str, **values: Any) -> tuple[MoEAdapters, list[Task]]:
    """Some tasks of the small world, one after another."""
    stream = mini.multi_domain("I").shortened(tasks=8, images=24)
    every = {task.name: task for task in stream.tasks}
    method = MoEAdapters(**{**SMALL, **values})
    torch.manual_seed(0)
    method.bind(clip, stream.context(seed=1))
    for name in names:
        teach(method, every[name])
    return method, [every[name] for name in names]


def teach(method: MoEAdapters, task: Task) -> None:
    method.start(task)
    method.begin_task(task)
    fit(method, task, torch.Generator().manual_seed(0), method.clip.size, method.clip.device)
    method.clip.trained(f"trained {task.name}", method.parameters().values())
    method.fuse(task)


def plain(clip: CLIP, query: Query) -> Tensor:
    """What the pre-trained model answers."""
    born = Method()
    born.join(CLIP.load(str(mini.MODEL)), Context())
    return born.predict(query)


def test_a_task_that_was_not_learned_is_clip_s_own_bit_for_bit(clip: CLIP) -> None:
    method, tasks = learned(clip, "digits")
    other = mini.multi_domain("I").shortened(tasks=1, images=8).tasks[0]
    unseen = Query(other.test.pixels, other.classes, task=1)
    assert torch.equal(method.predict(unseen), plain(clip, unseen))
    own = Query(tasks[0].test.pixels, tasks[0].classes, task=0)
    assert not torch.allclose(method.predict(own), plain(clip, own), atol=1e-2)
    method.state.thresholds = [1e-9]  # nothing looks like digits
    hidden = Query(tasks[0].test.pixels, tasks[0].classes)
    assert torch.equal(method.predict(hidden), plain(clip, hidden))
    method.state.thresholds = [1e9]  # everything does
    assert torch.equal(method.predict(hidden), method.predict(own))


def test_before_any_task_it_is_the_pre_trained_model(clip: CLIP) -> None:
    method, _ = learned(clip)
    task = mini.multi_domain("I").shortened(tasks=1, images=8).tasks[0]
    for number in (0, None):
        query = Query(task.test.pixels, task.classes, number)
        assert torch.equal(method.predict(query), plain(clip, query))


def test_frozen_experts_and_old_routers_stay_as_they_are(clip: CLIP) -> None:
    method, (digits,) = learned(clip, "digits")
    state = {n: t.clone() for n, t in module_state(method).items()}
    frozen = {name: list(numbers) for name, numbers in method.state.frozen.items()}
    assert all(len(numbers) == 2 for numbers in frozen.values())
    letters = next(t for t in mini.multi_domain("I").shortened(tasks=8, images=24).tasks if t.name == "letters")
    teach(method, letters)
    now = module_state(method)
    for name, old in state.items():
        block, what = name.split("/")
        stays = what in ("routers.0", "noises.0") or int(what.split(".")[1]) in frozen[block]
        assert not stays or torch.equal(now[name], old), name
    assert any(not torch.equal(now[n], t) for n, t in state.items())
    assert clip.own_state() == {} and not clip.rebased


@pytest.mark.slow
def test_texts_are_routed_once_and_as_one_by_one(clip: CLIP) -> None:
    method, (digits,) = learned(clip, "digits", top_k=3)
    with clip.preserved(), torch.no_grad():
        method.load_expert(moe_adapters.Expert(method.router_name(0), {}))
        once = clip.encode_text(digits.prompts())
        for mixture in method.mixtures.values():
            mixture.alike = False
        torch.testing.assert_close(clip.encode_text(digits.prompts()), once, rtol=0, atol=1e-6)
        assert not torch.allclose(once, CLIP.load(str(mini.MODEL)).encode_text(digits.prompts()), atol=1e-3)


@pytest.mark.slow
def test_towers_that_keep_less_learn_and_count_the_same() -> None:
    found = []
    for less in (False, True):
        clip = CLIP.load(str(mini.MODEL))
        if less:
            by_blocks(clip.backbone)
        method, _ = learned(clip, "digits")
        found.append((module_state(method), {n: m.counts for n, m in method.mixtures.items()}))
    assert found[0][1] == found[1][1] and all(sum(counts) == 2 * n for n, counts in sent(found[0][1]))
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], tensor, rtol=1e-4, atol=1e-5)


def sent(counts: dict[str, list[int]]) -> list[tuple[int, list[int]]]:
    """How many images (3 steps of 8) or texts (3 times ten digits) a block saw, and its counts."""
    return [(24 if name.startswith("vision") else 30, own) for name, own in counts.items()]


def test_sparse_and_dense_mixtures_answer_alike() -> None:
    torch.manual_seed(0)
    mixture = Mixture(6, experts=5, top=2, bottleneck=4, dropout=0.0, route=lambda: 0, alike=False)
    mixture.grow(1)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter)
    a = torch.randn(7, 3, 6)
    z = a[:, 0] @ mixture.routers[0]
    gates = torch.full_like(z, -torch.inf).scatter(1, z.topk(2).indices, z.topk(2).values).softmax(1)
    dense = sum(gates[:, e, None, None] * expert(a, 0.0) for e, expert in enumerate(mixture.experts))
    torch.testing.assert_close(mixture(a, 0), dense)


def test_one_router_for_all_tasks_goes_on_learning(clip: CLIP) -> None:
    values = dict(routers="one", experts=2, freeze=0, test_noise=True)
    method, tasks = learned(clip, "digits", "letters", **values)
    assert all(len(m.routers) == 1 for m in method.mixtures.values()) and not method.state.selector
    assert not any(method.state.frozen.values())
    query = Query(tasks[0].test.pixels, tasks[0].classes)
    assert not torch.equal(method.predict(query), method.predict(query))  # the noise stays on
    for mixture in method.mixtures.values():
        mixture.noisy = False
    assert torch.equal(method.predict(query), method.predict(replace(query, task=1)))


def test_features_that_are_kept_train_the_same_selector(clip: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kept in (1 << 30, 0):
        monkeypatch.setattr(selecting, "KEPT", kept)
        method, _ = learned(CLIP.load(str(mini.MODEL)), "digits", selector_augment=False)
        found.append(method.state.selector["1"])
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-5, atol=1e-6)


def test_batches_are_decided_by_their_mean_images_each_for_itself() -> None:
    losses = torch.tensor([[9.0, 1.0, 3.0], [9.0, 5.0, 3.5], [0.1, 1.0, 1.0], [9.0, 9.0, 2.0]])
    assert selector.choose(losses, [2.0, 4.0], 1).tolist() == [1, 2, 0, 2]
    assert selector.choose(losses, [2.0, 4.0], 2).tolist() == [0, 0, 2, 2]
    assert selector.choose(losses, [3.0, 4.0], 2).tolist() == [1, 1, 2, 2]
    assert selector.choose(losses, [2.0, 1.5], 1).tolist() == [1, 0, 0, 0]


def test_what_cannot_be_is_refused(clip: CLIP, tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match="top_k=3: a block has 2 experts"):
        MoEAdapters(experts=2, top_k=3).bind(clip)
    other = CLIP.load(str(mini.MODEL))
    other.kind = "siglip"  # type: ignore[misc]
    with pytest.raises(PerdureError, match="routes by a class token .* the siglip at"):
        MoEAdapters().bind(other)
    with pytest.raises(PerdureError, match="no such folder"):
        MoEAdapters(reference=str(tmp_path / "nowhere")).bind(CLIP.load(str(mini.MODEL)))
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(PerdureError, match="cannot be read.*b.png"):
        MoEAdapters(reference=str(tmp_path)).bind(CLIP.load(str(mini.MODEL)))
    with pytest.raises(PerdureError, match="reference=drawings: this stream has no drawings"):
        MoEAdapters(reference="drawings").bind(CLIP.load(str(mini.MODEL)))
    method = MoEAdapters(reference="drawings")
    method.bind(CLIP.load(str(mini.MODEL)), mini.multi_domain("I").context())
    pixels = method.reference_images()
    assert pixels is not None and len(pixels) == 1853


@pytest.mark.slow
def test_it_learns_and_what_it_was_born_with_stays(tmp_path: Path) -> None:
    """Known tasks are learned and not forgotten; those to come are answered as before any, bit for bit; no export."""
    asked: dict[str, Any] = dict(
        tasks=3, images=160, iterations=40, warmup=4, lr=5e-3, batch_size=32, experts=6, precision="fp32", synthetic=64,
        sampling_steps=2, reference_steps=100, selector_steps=100,
    )  # fmt: skip
    m = perdure.run("moe_adapters", "mini-mtil", tmp_path / "run", **asked)
    accuracy = m["accuracy"]
    assert accuracy[2][1] > accuracy[0][1] + 15
    assert all(accuracy[i][j] == accuracy[0][j] for i in range(3) for j in range(i, 3))
    assert m["forgetting"] < 3 and m["probe"][-1] > m["probe"][0] - 20
    with pytest.raises(PerdureError, match="has put modules of its own into the towers"):
        launch.export(tmp_path / "run", tmp_path / "out")


def test_under_another_fuser_its_experts_would_never_act_so_it_is_refused() -> None:
    with pytest.raises(PerdureError, match="which ConDU knows nothing of. Leave the role fuse out"):
        Compose(learn=launch.build("moe_adapters", {}), fuse=launch.build("condu", {}))
    Compose(learn=launch.build("finetune", {}), fuse=launch.build("condu", {}))
