"""Turned images as classes of their own, and the memory that replays: the definition's numbers, and what switches do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import case
from conftest import same_bits
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_learner import drawings  # noqa: F401
from torch import Tensor

import perdure
from perdure import Learner, launch
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.data.task import Batch, Context, Query, Stream
from perdure.data.transforms import turned
from perdure.methods.experience_replay import ExperienceReplay
from perdure.methods.ocl_sda import OCLSDA, pseudo_labels
from perdure.models.clip import CLIP
from perdure.ops.losses import supervised_contrastive
from perdure.training.fit import Accumulator, fit
from perdure.training.reservoir import Remembered, Reservoir, balanced

BRIEF: dict[str, Any] = {"memory": 30, "replayed": 6, "batch_size": 5, "lr": 1e-4}


@pytest.mark.parametrize("name", ["ocl_sda_a"])
def test_turned_images_pseudo_labels_loss_and_gradient_are_the_definition_s(name: str) -> None:
    about, t = case(name)
    h, allowed = about["hyper_parameters"], about["tolerance"]["relative"]
    shown = turned(t["images"], range(h["rotations"]))
    assert torch.equal(shown, t["turned"])
    pseudo = pseudo_labels(t["labels"], h["classes"], h["rotations"])
    assert torch.equal(pseudo, t["pseudo_labels"])
    features = F.normalize(shown.flatten(1).double() @ t["projection"], dim=1)
    assert torch.allclose(features, t["features"], atol=1e-7)
    features = t["features"].requires_grad_()
    method = OCLSDA(temperature=h["tau"])
    method.projector = None
    loss = method.contrasted(features, pseudo)
    assert loss.item() == pytest.approx(about["values"]["loss"], rel=allowed)
    (gradient,) = torch.autograd.grad(loss, features)
    assert (gradient - t["gradient"]).norm() / t["gradient"].norm() < allowed


def test_the_contrastive_loss_by_loops() -> None:
    """Anchors without a positive, labels that are rare, one image: by the definition's own words."""
    x = F.normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    labels, t = torch.tensor([0, 1, 0, 2, 0, 1, 3]), 0.3
    anchors = []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        total = sum(torch.exp(x[i] @ x[a] / t) for a in others)
        terms = [-torch.log(torch.exp(x[i] @ x[j] / t) / total) for j in others if labels[j] == labels[i]]
        anchors += [torch.stack(terms).mean()] if terms else []
    assert len(anchors) == 5
    assert supervised_contrastive(x, labels, t).item() == pytest.approx(torch.stack(anchors).mean().item(), rel=1e-12)
    alone = x[:1].clone().requires_grad_()
    loss = supervised_contrastive(alone, labels[:1], t)
    assert loss.item() == 0 and torch.equal(torch.autograd.grad(loss, alone)[0], torch.zeros(1, 4, dtype=torch.float64))


# ---- the memory


def test_every_image_offered_is_kept_with_the_same_chance() -> None:
    kept = torch.zeros(40)
    for seed in range(400):
        memory = Reservoir(Remembered(), 10, torch.Generator().manual_seed(seed))
        for first in range(0, 40, 8):  # in batches, as a stream comes
            labels = torch.arange(first, first + 8)
            memory.reserve(8, 1)
            memory.offer((labels / 255).view(-1, 1, 1, 1).expand(-1, 3, 1, 1), labels)
        assert len(memory) == 10 and memory.kept.offered == 40 and len(memory.labels.unique()) == 10
        pixels, same = memory.taken(torch.arange(10))
        assert torch.equal(pixels[:, 0, 0, 0].long(), same)  # an image goes with its label
        kept[memory.labels] += 1
    share = kept / 400  # a quarter; the deviation of each is 0.022
    assert float(share.min()) > 0.15 and float(share.max()) < 0.35
    assert share[:10].mean() == pytest.approx(0.25, abs=0.03) and share[-10:].mean() == pytest.approx(0.25, abs=0.03)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 40), st.integers(0, 99))
def test_a_balanced_draw_is_as_even_as_can_be(labels: list[int], count: int, seed: int) -> None:
    given_labels = torch.tensor(labels)
    index = balanced(given_labels, count, torch.Generator().manual_seed(seed))
    assert len(index) == min(count, len(labels)) == len(index.unique())
    drawn, there = (torch.bincount(x, minlength=5) for x in (given_labels[index], given_labels))
    most = int(drawn.max())
    assert all(int(d) >= most - 1 or int(d) == int(t) for d, t in zip(drawn, there, strict=True))


def taught(clip: CLIP, stream: Stream, kind: type = ExperienceReplay, **values: Any) -> Any:
    """A method that learned the stream's first two tasks."""
    method = kind(**{**BRIEF, **values})
    method.bind(clip, stream.context())
    for task in stream.tasks[:2]:
        method.begin_task(task)
        fit(method, task, torch.Generator().manual_seed(task.index), clip.size, clip.device)
        clip.trained(task.name, method.parameters().values())
    return method


@pytest.fixture
def classes() -> Stream:
    """Three steps of six classes, all classes seen competing."""
    return mini.class_incremental().shortened(tasks=3, images=18)


def test_the_memory_holds_the_images_as_they_are_and_comes_back(clip: CLIP, classes: Stream) -> None:
    method = taught(clip, classes)
    memory, images = Reservoir(method.state, 30, torch.Generator()), method.state.images["pixels"]
    assert len(memory) == 30 and method.state.offered == 36 and len(method.state.classes) == 12
    assert method.remarks() == {"images remembered": 30, "classes remembered": 12, "images offered": 36}
    for task, first in zip(classes.tasks[:2], (0, 6), strict=True):
        for image, label in zip(images, memory.labels.tolist(), strict=True):
            if first <= label < first + 6:
                same = (task.train.pixels == image).flatten(1).all(1).nonzero().squeeze(1)
                assert label - first in task.train.labels[same].tolist()
    again = ExperienceReplay(**BRIEF)
    again.unpack_state(*method.pack_state())
    assert again.state.classes == method.state.classes and same_bits(again.state.images, method.state.images)
    method.begin_task(classes.tasks[2])
    batch = Batch(classes.tasks[2].train.pixels[:4] / 255, classes.tasks[2].train.labels[:4], index=torch.arange(4))
    method.remember(batch)
    method.remember(batch)  # another pass is no other offer
    assert method.state.offered == 40


def test_a_step_sees_the_batch_and_the_memory_among_all_classes(clip: CLIP, classes: Stream) -> None:
    method = taught(clip, classes)
    third = classes.tasks[2]
    method.begin_task(third)
    assert len(method.tokens) == 18 and method.rows.tolist() == list(range(12, 18))
    batch = Batch(third.train.pixels[:5] / 255, third.train.labels[:5], index=torch.arange(5))
    images, labels = method.with_memory(batch)
    assert len(images) == 11 and labels[:5].tolist() == (third.train.labels[:5] + 12).tolist()
    assert set(labels[5:].tolist()) <= set(range(12)) and torch.equal(images[:5], batch.images)
    losses: dict[str, Tensor] = {}
    method.step(batch, Accumulator(method.parameters(), losses))
    assert set(losses) == {"task"} and method.state.offered == 41


def test_where_classes_compete_within_their_task_they_do_here(clip: CLIP, stream: Stream) -> None:
    stream = stream.shortened(tasks=3, images=15)
    method = taught(clip, stream, memory=60)
    assert method.group is not None and method.group.unique().tolist() == [0, 1]
    assert [name for _, name in method.state.classes] == ["animals"] * 16 + ["digits"] * 10
    free = ExperienceReplay(memory=60)
    free.bind(clip, replace(stream, labels="all").context())
    free.begin_task(stream.tasks[0])
    assert free.group is None


# ---- the method


def kept(drawn: list[Any], draw: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
    """``draw``, which notes what it gives."""

    def noted(batch: Batch) -> Any:
        drawn.append(draw(batch))
        return drawn[-1]

    return noted


def test_a_step_s_losses_are_of_the_turned_and_of_an_even_batch(clip: CLIP, classes: Stream) -> None:
    """On features that say which image they are of."""
    method = taught(clip, classes, OCLSDA, contrast=0.4, temperature=0.2)
    third = classes.tasks[2]
    method.begin_task(third)
    shown: list[Tensor] = []
    encode = clip.encode_image

    def noted(images: Tensor) -> Tensor:
        shown.append(images)
        return encode(images)

    clip.encode_image = noted  # type: ignore[method-assign]
    batch = Batch(third.train.pixels[:5] / 255, third.train.labels[:5])
    drawn: list[tuple[Tensor, Tensor]] = []
    for name in ("with_memory", "even"):
        setattr(method, name, kept(drawn, getattr(method, name)))
    losses: dict[str, Tensor] = {}
    method.step(batch, Accumulator(method.parameters(), losses))
    (images, labels), (upright, own) = drawn
    assert torch.equal(shown[0], torch.cat([turned(images), upright]))
    counts = torch.bincount(own, minlength=18)
    assert len(own) == 11 and int(counts.max()) == 1  # 18 classes, 11 images: none twice
    with torch.no_grad():
        features = encode(turned(images))
        wanted = supervised_contrastive(features, pseudo_labels(labels, 18, 4), 0.2)
        task = method.classify(encode(upright), own)
    assert losses["contrast"].item() == pytest.approx(0.4 * wanted.item(), rel=1e-4)
    assert losses["task"].item() == pytest.approx(task.item(), rel=1e-4)


def test_turns_can_be_left_out_for_all_or_for_single_tasks(clip: CLIP, stream: Stream) -> None:
    method = OCLSDA(memory=60, replayed=6, rotations=(0, 90, 270), rotations_by_task={"digits": (0,)})
    method.bind(clip, stream.context())
    for task in stream.tasks[:2]:
        method.begin_task(task)
    assert method.turns == [0, 1, 3]
    assert method.allowed.tolist() == [[True] * 3] * 16 + [[True, False, False]] * 10
    sizes: list[int] = []
    method.contrasted = lambda features, labels: sizes.append(len(labels)) or features.sum() * 0  # type: ignore[method-assign,func-returns-value]
    task = stream.tasks[1]
    method.step(Batch(task.train.pixels[:5] / 255, task.train.labels[:5]), Accumulator(method.parameters(), {}))
    assert sizes == [5]  # of digits the upright ones alone
    for wrong in ({"rotations": (90, 180)}, {"rotations_by_task": {"digits": (0, 0)}}):
        with pytest.raises(PerdureError, match="must hold 0, the upright image, and each turn once"):
            OCLSDA(**BRIEF, **wrong).bind(clip, Context())


def test_a_turned_class_can_have_a_text(clip: CLIP, classes: Stream) -> None:
    method = taught(clip, classes, OCLSDA, term="texts", towers="image")
    assert method.turned_tokens.shape[0] == 4 * 12
    texts = clip.encode_tokens(method.turned_tokens)
    prompts = [prompt for prompt, _ in method.state.classes]
    assert torch.allclose(texts[:12], clip.encode_text(prompts), atol=1e-6)
    down = clip.encode_text([f"{prompt.rstrip('.')}, upside down" for prompt in prompts])
    assert torch.allclose(texts[24:36], down, atol=1e-6)
    images = classes.tasks[0].train.pixels[:3] / 255
    labels = torch.tensor([1, 25, 4])
    wanted = F.cross_entropy(clip.similarity(clip.encode_image(images), texts), labels)
    assert torch.allclose(method.contrasted(clip.encode_image(images), labels), wanted)


def test_a_head_of_rows_answers_beside_the_texts_and_comes_back(clip: CLIP, classes: Stream) -> None:
    method = taught(clip, classes, OCLSDA, classifier="cosine", projector="mlp", lr=1e-3)
    asked = tuple(c for task in classes.tasks for c in task.classes)
    query = Query(classes.tasks[0].test.pixels[:6], asked)
    found = method.predict(query)
    texts = clip.similarity(clip.encode_image(query.images), clip.class_texts([c.prompts() for c in asked]))
    assert torch.allclose(found[:, 12:], texts[:, 12:]) and not torch.allclose(found[:, :12], texts[:, :12], atol=1e-3)
    saved = {name: module.state_dict() for name, module in method.modules().items()}
    assert set(saved) == {"head", "projector"} and len(saved["head"]["rows"]) == 12
    again = OCLSDA(**BRIEF, classifier="cosine", projector="mlp")
    again.bind(clip, classes.context())
    again.unpack_state(*method.pack_state())
    for name, module in again.modules().items():
        module.load_state_dict(saved[name])
    assert torch.equal(again.predict(query), found)


def test_a_memory_smaller_than_the_classes_is_refused(clip: CLIP, classes: Stream) -> None:
    with pytest.raises(PerdureError, match="memory=17 is smaller than the classes: there are 18.*Give at least 18"):
        ExperienceReplay(memory=17).bind(clip, classes.context())
    with pytest.raises(PerdureError, match="memory=59 is smaller"):
        launch.prepare("ocl_sda", "mini-cil", 0, ["memory=59"], {})
    method = OCLSDA(memory=5)
    method.bind(clip, Context())  # whoever binds it says nothing of tasks
    with pytest.raises(PerdureError, match="memory=5 is smaller"):
        method.begin_task(classes.tasks[0])


@pytest.mark.slow
def test_remembered_pictures_stay_at_home(tmp_path: Path, drawings: Path) -> None:  # noqa: F811
    """A model in use goes on with its memory; what is exported has none, and answers the same."""
    quick: dict[str, Any] = {"memory": 40, "batch_size": 8, "replayed": 4, "precision": "fp32"}
    probe = drawings.parent / "probe"
    home = Learner(tmp_path / "HOME", method="ocl_sda", classifier="cosine", probe=probe, **quick)
    for name in ("animals", "digits"):
        assert home.learn(drawings / name, max_loss=100).accepted
    saved = load_file(next((tmp_path / "HOME").glob("task_02*")) / "state.safetensors")
    assert len(saved["images/pixels"]) == 40
    said = home.export(tmp_path / "out")
    assert said == ["its modules (head)"]
    public = load_file(tmp_path / "out" / "perdure.safetensors")
    assert not [name for name in public if "images" in name] and all(t.dtype != torch.uint8 for t in public.values())
    shown = sorted((drawings / "digits").rglob("*.png"))[:6]
    assert Learner.from_pretrained(tmp_path / "out").predict(shown) == home.predict(shown)


@pytest.mark.slow
def test_replay_keeps_what_plain_fine_tuning_loses(tmp_path: Path) -> None:
    """One pass over three steps of the small world, all classes competing: the memory is what keeps the earlier ones."""
    asked: dict[str, Any] = dict(lr=5e-4, epochs=1, warmup=0, precision="fp32", batch_size=10, online=True)
    stream = replace(mini.class_incremental().shortened(tasks=3, images=96), probe=None, defaults={})
    runs = {
        name: perdure.run(method, stream, tmp_path / name, **asked, **more)
        for name, method, more in (
            ("alone", "experience_replay", {"memory": 100, "replayed": 0}),
            ("replay", "experience_replay", {"memory": 100, "replayed": 20}),
            ("turned", "ocl_sda", {"memory": 100, "replayed": 10, "contrast": 0.5}),
        )
    }
    for name in ("replay", "turned"):
        assert runs[name]["incremental_last"] > runs["alone"]["incremental_last"] + 3
        assert runs[name]["forgetting"] < runs["alone"]["forgetting"] - 3
