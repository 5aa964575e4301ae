"""ConDU in use: experts that come back, votes that ask only who is needed, states that last, input that is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

import perdure
from perdure import launch
from perdure.core.errors import PerdureError
from perdure.core.seeding import reseed
from perdure.core.weights import floating
from perdure.data.task import Context, Images, Query, Stream, Task
from perdure.engine.checkpoint import read_task
from perdure.methods.condu import ConDU
from perdure.methods.merge import Config, Merge, trimmed
from perdure.models import lora
from perdure.models.clip import CLIP

Run = Callable[..., dict[str, Any]]


def shaken(clip: CLIP, seed: int, size: float = 1e-3) -> dict[str, torch.Tensor]:
    """Weights near the pre-trained ones."""
    draw = torch.Generator().manual_seed(seed)
    changed = floating(clip.pretrained)
    return {
        n: t + size * torch.randn(t.shape, generator=draw) if n in changed and n != "logit_scale" else t
        for n, t in clip.pretrained.items()
    }


def taught(clip: CLIP, stream: Stream, **values: Any) -> ConDU:
    """ConDU after three tasks whose experts are shaken models."""
    method = ConDU(**values)
    method.bind(clip)
    for seed, task in enumerate(stream.tasks):
        method.start(task)
        clip.load_weights(f"shaken {seed}", shaken(clip, seed))
        method.fuse(task)
    return method


def test_a_single_task_s_expert_is_the_tuned_model(clip: CLIP, stream: Stream) -> None:
    method = ConDU()
    method.bind(clip)
    method.start(stream.tasks[0])
    wanted = shaken(clip, 0)
    clip.load_weights("tuned", wanted)
    method.fuse(stream.tasks[0])
    assert method.state.rescaler == [1.0]
    for name, weight in method.decoupled(0).items():
        assert torch.allclose(weight, wanted[name], rtol=0, atol=1e-7), name


def test_a_task_that_changed_nothing_answers_as_the_pretrained_model(clip: CLIP, stream: Stream) -> None:
    said: list[str] = []
    method = ConDU()
    method.bind(clip, Context(warn=said.append))
    for task in stream.tasks[:2]:
        method.start(task)
        if task is stream.tasks[0]:
            clip.load_weights("tuned", shaken(clip, 0))
        method.fuse(task)
    assert any(f"Nothing is left of task {stream.tasks[1].name}" in text for text in said)
    assert all(torch.equal(w, clip.pretrained[n]) for n, w in method.decoupled(1).items())
    assert torch.isfinite(method.predict(Query(stream.tasks[1].test.pixels[:4], stream.tasks[1].classes, 1))).all()


@pytest.mark.slow
def test_the_vote_is_the_weighted_sum_and_asks_only_who_is_needed(
    clip: CLIP, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = taught(clip, stream, experts=1)
    images = torch.cat([t.test.pixels[:6] for t in stream.tasks])
    query = Query(images, stream.tasks[0].classes)
    plan = method.experts(query)
    wanted = torch.zeros(len(images), len(query.classes))
    for expert in plan:
        assert expert.weights is not None
        clip.load_weights(expert.name, expert.weights)
        wanted += torch.as_tensor(expert.gate).unsqueeze(1) * method.logits(query)
    seen: list[int] = []
    prepare = CLIP.pixels

    def counted(self: CLIP, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return prepare(self, images)

    monkeypatch.setattr(CLIP, "pixels", counted)
    found = method.predict(query)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert sum(seen) == 2 * len(images)  # K + 1 passes an image: the pre-trained features serve the choice and the vote


def test_experts_are_put_on_once_for_all_queries(clip: CLIP, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    method = taught(clip, stream)
    queries = [Query(t.test.pixels[:8], t.classes) for t in stream.tasks]
    alone = [method.predict(q) for q in queries]
    worn: list[str] = []
    become = CLIP.load_weights

    def watched(self: CLIP, name: str, weights: dict[str, torch.Tensor]) -> None:
        if name != self.holds:
            worn.append(name)
        become(self, name, weights)

    monkeypatch.setattr(CLIP, "load_weights", watched)
    together = method.answer(queries)
    assert sorted(worn) == sorted(set(worn)) and len(worn) == len(stream.tasks) + 1
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_class_without_images_is_where_its_text_is(clip: CLIP, stream: Stream) -> None:
    said: list[str] = []
    task = stream.tasks[0]
    kept = task.train.labels != 1
    task = Task("thin", task.classes, Images(task.train.pixels[kept], task.train.labels[kept]), task.test)
    method = ConDU()
    method.bind(clip, Context(warn=said.append))
    prototypes = method.prototypes(task)
    text = clip.class_texts([task.classes[1].prompts()])
    torch.testing.assert_close(prototypes[1:2], text, atol=1e-5, rtol=1e-5)
    assert said == [f"thin: no training image of {task.classes[1].name}; the prototype is its text alone."]
    augmented = ConDU(prototype_images="augmented")
    augmented.bind(clip)
    assert not torch.allclose(augmented.prototypes(task)[0], prototypes[0])


@pytest.mark.parametrize("unified", ["products", "factors"])
def test_low_rank_experts(unified: str, clip: CLIP, stream: Stream) -> None:
    reseed(0)
    method = ConDU(adapt="lora", lora_unify=unified, lora_rank=2, lora_layers=("fc1", "fc2"), lora_init="random")
    method.bind(clip)
    task = stream.tasks[0]
    method.start(task)
    before = lora.factors(clip.backbone)
    assert all(torch.equal(before[n], t) for n, t in method.factors.items()) == (unified == "factors")
    for parameter in method.parameters().values():
        parameter.data.add_(0.05)
    clip.trained("tuned")
    wanted = clip.weights()
    method.fuse(task)
    assert set(method.state.unified) == (set(before) if unified == "factors" else set(floating(clip.pretrained)))
    decoupled = method.decoupled(0)
    assert set(decoupled) == set(clip.pretrained)
    for name, weight in decoupled.items():
        torch.testing.assert_close(weight, wanted[name], atol=1e-5, rtol=1e-4)
    probe = Query(task.test.pixels[:4], task.classes, None)
    assert method.experts(probe)[0].name == "pretrained"
    clip.load_weights("pretrained", clip.pretrained)
    assert torch.equal(clip.weights()["visual_projection.weight"], clip.pretrained["visual_projection.weight"])


def test_factors_without_adapters_are_refused() -> None:
    with pytest.raises(PerdureError, match="adapt=lora"):
        perdure.run("condu", "mini-mtil", "never", lora_unify="factors")


def test_nothing_left_of_random_factors_is_the_pretrained_model(clip: CLIP, stream: Stream) -> None:
    reseed(0)
    method = ConDU(adapt="lora", lora_unify="factors", lora_rank=2, lora_init="random")
    method.bind(clip)
    method.start(stream.tasks[0])
    method.fuse(stream.tasks[0])  # not trained: no factor has changed
    assert all(torch.equal(w, clip.pretrained[n]) for n, w in method.decoupled(0).items())
    with pytest.raises(PerdureError, match="unified already"):
        method.fuse(stream.tasks[0])


def test_random_adapters_are_not_the_pretrained_model(clip: CLIP) -> None:
    clip.adapt(4, 16.0, ("fc1",), "both", "random")
    assert clip.holds != "pretrained"
    moved = clip.weights()
    clip.load_weights("pretrained", clip.pretrained)
    assert not torch.equal(moved["text_model.encoder.layers.0.mlp.fc1.weight"],
                           clip.weights()["text_model.encoder.layers.0.mlp.fc1.weight"])  # fmt: skip


@pytest.mark.slow
def test_a_run_keeps_a_bit_a_parameter_and_hands_out_any_expert(short_run: Run, tmp_path: Path) -> None:
    m = short_run("condu", lr=5e-4, iterations=8)
    a = m["accuracy"]
    assert a[1][0] != a[0][0]  # the first task, too, is answered by its expert
    last = sorted(m["folder"].glob("task_*"))[-1]
    saved = read_task(last, tensors=True)
    parameters = sum(t.numel() for t in saved.files["state"].values())
    for name in m["tasks"]:
        bits = saved.files[f"trigger/{name}"]
        assert sum(t.numel() for t in bits.values()) <= parameters / 8 + len(bits)
    launch.export(m["folder"], tmp_path / "expert", 2)
    plain = CLIPModel.from_pretrained(tmp_path / "expert").state_dict()
    config, data, method = launch.reopen(m["folder"])
    assert isinstance(method, ConDU)
    method.bind(CLIP.load(data.model))
    saved.restore(method)
    for name, weight in method.decoupled(1).items():
        assert torch.equal(plain[name], weight), name
    with pytest.raises(PerdureError, match=r"Say which with --task: 1 \(animals\), 2 \(digits\), 3 \(food\)"):
        launch.export(m["folder"], tmp_path / "none")


@pytest.mark.slow
def test_a_damaged_trigger_is_named_and_its_task_learned_again(short_run: Run) -> None:
    m = short_run("condu")
    trigger = m["folder"] / "task_03_food" / "trigger_digits.safetensors"
    spoilt = bytearray(trigger.read_bytes())
    spoilt[-5] ^= 255
    trigger.write_bytes(bytes(spoilt))
    said: list[str] = []

    class Listener(launch.Watcher):
        def warn(self, text: str) -> None:
            said.append(text)

    again = launch.resume(m["folder"], Listener())
    assert any("trigger_digits.safetensors is damaged" in text for text in said)
    assert again["accuracy"] == m["accuracy"]
    trigger.unlink()
    launch.resume(m["folder"], Listener())
    assert any("trigger_digits.safetensors is missing" in text for text in said) and load_file(trigger)


def test_few_shots_are_drawn_by_the_seed(stream: Stream) -> None:
    few, again, other = stream.few_shot(2, 0), stream.few_shot(2, 0), stream.few_shot(2, 1)
    for task, same, else_, whole in zip(few.tasks, again.tasks, other.tasks, stream.tasks, strict=True):
        counts = torch.bincount(whole.train.labels).clamp_max(2)
        assert torch.equal(torch.bincount(task.train.labels), counts)
        assert torch.equal(task.train.pixels, same.train.pixels)
        assert not torch.equal(task.train.pixels, else_.train.pixels)
        assert task.test is whole.test
    assert few.digest != stream.digest == stream.few_shot(0, 0).digest


def test_two_tasks_of_one_name_are_refused(stream: Stream) -> None:
    with pytest.raises(PerdureError, match=r"two tasks of the name 'animals'"):
        Stream("twice", (stream.tasks[0], stream.tasks[0]), None, "", "")


# ---- the fusions that it is compared with


def merged_by(rule: str, clip: CLIP, tasks: list[Task], **values: Any) -> dict[str, torch.Tensor]:
    method = Merge(Config(rule=rule, **values))  # type: ignore[arg-type]
    method.join(clip, Context())
    for seed, task in enumerate(tasks):
        method.start(task)
        clip.load_weights(f"shaken {seed}", shaken(clip, seed))
        method.fuse(task)
    return clip.weights()


@pytest.mark.parametrize("rule", ["sum", "ties", "magmax"])
def test_merging_task_after_task_is_merging_all_at_once(rule: str, clip: CLIP, stream: Stream) -> None:
    found = merged_by(rule, clip, list(stream.tasks), scale=0.5, density=0.3)
    for name in ("visual_projection.weight", "text_model.final_layer_norm.bias", "logit_scale"):
        deltas = torch.stack([shaken(clip, seed)[name] - clip.pretrained[name] for seed in range(3)])
        if rule == "sum":
            joint = deltas.sum(0)
        elif rule == "magmax":
            joint = deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]
        else:
            kept = torch.stack([trimmed(d, 0.3) for d in deltas])
            agree = (kept * torch.where(kept.sum(0) > 0, 1, -1)) > 0
            joint = (kept * agree).sum(0) / agree.sum(0).clamp_min(1)
        torch.testing.assert_close(found[name], clip.pretrained[name] + 0.5 * joint, atol=1e-6, rtol=0)


def test_magmax_goes_on_from_the_weights_last_tuned(clip: CLIP, stream: Stream) -> None:
    method = Merge(Config(rule="magmax"))
    method.join(clip, Context())
    method.start(stream.tasks[0])
    wanted = shaken(clip, 0)
    clip.load_weights("tuned", wanted)
    method.fuse(stream.tasks[0])
    method.start(stream.tasks[1])
    assert all(torch.equal(w, wanted[n]) for n, w in clip.weights().items())


def test_trimming_keeps_the_largest() -> None:
    assert trimmed(torch.tensor([0.1, -3.0, 2.0, 0.0]), 0.5).tolist() == [0.0, -3.0, 2.0, 0.0]
