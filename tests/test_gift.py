"""GIFT as a method: its exact shortcuts, its variants, what it refuses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from gift_step import Given, PlainGIFT
from plane import inner, plane
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.seeding import reseed
from perdure.data.task import Stream
from perdure.methods.gift import GIFT, mean_squares
from perdure.models.clip import CLIP
from perdure.synthesis.store import Pairs
from perdure.training.fit import fit


def some_pairs(stream: Stream) -> Pairs:
    """Real drawings in the place of synthetic ones; every prompt occurs several times."""
    task = stream.tasks[2]
    return Pairs(task.train.pixels, [task.prompts()[k] for k in task.train.labels.tolist()])


def learn(
    clip: CLIP, stream: Stream, rule: type[GIFT] = GIFT, precision: str = "fp32", **values: Any
) -> tuple[GIFT, Any]:
    """A few steps on the first task from the pre-trained weights, on the pairs above."""
    settings = {"iterations": 5, "warmup": 1, "lr": 1e-3, "batch_size": 16, "synthetic_batch": 24, **values}
    clip.load_weights("pretrained", clip.pretrained)
    method = rule(**settings)
    method.bind(clip, stream.context())
    method.replay = Given(some_pairs(stream))  # type: ignore[assignment]
    generator = reseed(0, 1)
    method.begin_task(stream.tasks[0])
    losses = fit(method, stream.tasks[0], generator, clip.size, clip.device, precision)
    clip.trained("t")
    return method, losses


@pytest.mark.slow
def test_the_shortcuts_change_no_loss(clip: CLIP, stream: Stream) -> None:
    """Cached teacher, trimmed context, texts encoded once, penalty in closed form: 1e-5 relative against none of them."""
    _, short = learn(clip, stream)
    mine = clip.weights()
    _, plain = learn(clip, stream, PlainGIFT)
    assert set(short) == set(plain) and len(short) == 6
    for name in plain:
        assert short[name] == pytest.approx(plain[name], rel=1e-5, abs=1e-7), name
    theirs, start = clip.weights(), clip.pretrained
    for key in (k for k in mine if "k_proj.bias" not in k and not torch.equal(mine[k], start[k])):
        assert (mine[key] - theirs[key]).norm() < 1e-2 * (mine[key] - start[key]).norm(), key


class Recorder(GIFT):
    """Keeps F at every step, and the gradient that each step ends with."""

    def begin_task(self, task: Any) -> None:
        super().begin_task(task)
        self.importances: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []

    def importance(self, gradients: Any) -> Any:
        weigh = super().importance(gradients)
        self.importances.append({k: torch.as_tensor(weigh(k)).clone() for k in self.anchor})
        self.replayed = {k: g for k, g in gradients.items() if g is not None}
        return weigh

    def step(self, batch: Any, backward: Any) -> None:
        super().step(batch, backward)
        self.ends.append({k: p.grad.clone() for k, p in self.parameters().items() if p.grad is not None})


def test_adaptive_importance_has_mean_one_a_tensor_of_the_original(clip: CLIP, stream: Stream) -> None:
    method, _ = learn(clip, stream, Recorder)
    importance = method.importances[2]  # type: ignore[attr-defined]
    means = {k: float(f.mean()) for k, f in importance.items() if f.ndim}
    joined = [k for k in means if "_proj.weight" in k and ".self_attn." in k and "out_proj" not in k]
    others = [k for k in means if not any(p in k for p in (".q_proj.", ".k_proj.", ".v_proj."))]
    assert max(abs(means[k] - 1) for k in others) < 1e-4
    for layer, group in itertools.groupby(sorted(joined), key=lambda k: k.split(".self_attn.")[0]):
        assert sum(means[k] for k in group) / 3 == pytest.approx(1, abs=1e-4), layer
    assert any(abs(means[k] - 1) > 0.05 for k in joined)  # together, not each alone


@pytest.mark.slow
def test_static_importance_is_the_mean_of_the_first_steps_then_stays(clip: CLIP, stream: Stream) -> None:
    method, losses = learn(clip, stream, Recorder, consolidation="static", static_steps=2)
    first, second, *later = method.importances  # type: ignore[attr-defined]
    key = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert all(torch.equal(f[key], second[key]) for f in later) and not torch.equal(first[key], second[key])
    assert float(second[key].mean()) == pytest.approx(1, abs=1e-4)
    assert method.replayed  # type: ignore[attr-defined]  # distillation goes on
    assert losses["distil_image"][-1] > 0


@pytest.mark.slow
def test_the_release_s_static_stops_distilling_and_piles_gradients_up(clip: CLIP, stream: Stream) -> None:
    """From the step after the last one that F is made at, each step's gradient is the one before plus its own."""

    class Parts(Recorder):
        """Keeps what each step hands over besides: the gradient of the task's loss, and of the penalty."""

        def step(self, batch: Any, backward: Any) -> None:
            self.own: dict[str, Tensor] = {}
            (g,) = torch.autograd.grad(self.task_loss(batch), [self.parameters()[key]], retain_graph=True)
            before = self.parameters()[key].detach().clone()
            super().step(batch, backward)
            penalty = 2 * self.config.lam * torch.as_tensor(self.importances[-1][key]) * (before - self.anchor[key])
            self.alone.append(g + penalty)

        def begin_task(self, task: Any) -> None:
            super().begin_task(task)
            self.alone: list[Tensor] = []

    key = "vision_model.encoder.layers.3.mlp.fc2.weight"
    method, losses = learn(clip, stream, Parts, consolidation="static_release", static_steps=2)
    assert not method.replayed  # type: ignore[attr-defined]
    assert len(losses["distil_image"]) == 6 and losses["distil_image"][-1] > 0  # shown all the same
    ends, alone = [e[key] for e in method.ends], method.alone  # type: ignore[attr-defined]
    for step in range(2, 6):
        torch.testing.assert_close(ends[step], ends[step - 1] + alone[step], rtol=1e-4, atol=1e-6)
        assert (ends[step] - alone[step]).norm() > 0.1 * alone[step].norm()  # the pile is no small thing
    assert not torch.allclose(ends[1], ends[0] + alone[1], rtol=1e-2, atol=1e-6)  # nothing piles up before


@pytest.mark.parametrize(
    ("values", "gone"),
    [
        ({"distillation": "none"}, {"distil_image", "distil_text"}),
        ({"beta": 0.0}, {"align_image", "align_text"}),
        ({"consolidation": "none"}, {"consolidation"}),
        (
            {"consolidation": "l2", "distillation": "none", "beta": 0.0},
            {"distil_image", "distil_text", "align_image", "align_text"},
        ),
    ],
)
def test_each_part_can_be_left_out(clip: CLIP, stream: Stream, values: dict[str, Any], gone: set[str]) -> None:
    _, losses = learn(clip, stream, **values)
    whole = {"distil_image", "distil_text", "align_image", "align_text", "consolidation", "task"}
    assert set(losses) == whole - gone


@pytest.mark.slow
def test_plain_l2_is_the_distance_to_the_previous_weights(clip: CLIP, stream: Stream) -> None:
    seen = []

    class Watch(GIFT):
        def step(self, batch: Any, backward: Any) -> None:
            seen.append(sum(float((p.detach() - self.anchor[n]).square().sum()) for n, p in self.parameters().items()))
            super().step(batch, backward)

    _, losses = learn(clip, stream, Watch, consolidation="l2", lam=3.0)
    assert losses["consolidation"] == pytest.approx([3 * x for x in seen], rel=1e-4)
    assert seen[0] == 0 < seen[-1]


@pytest.mark.slow
def test_kl_and_contrastive_learn_the_same(clip: CLIP, stream: Stream) -> None:
    """They differ by the teacher's entropy, a constant: the same gradients."""
    learn(clip, stream, distillation="contrastive")
    a = clip.weights()
    _, losses = learn(clip, stream, distillation="kl")
    b = clip.weights()
    assert losses["distil_image"][0] == pytest.approx(0, abs=1e-4)  # at first the student is the teacher
    moved = {k: (a[k] - clip.pretrained[k]).norm() for k in a if "k_proj.bias" not in k and a[k].is_floating_point()}
    assert all((a[k] - b[k]).norm() <= 1e-2 * n + 1e-7 for k, n in moved.items())


@pytest.mark.slow
@pytest.mark.parametrize(("side", "rests"), [("image", "text_model"), ("text", "vision_model")])
def test_one_side_alone_replays_through_that_tower(clip: CLIP, stream: Stream, side: str, rests: str) -> None:
    method, _ = learn(clip, stream, Recorder, sides=side)
    assert not any(name.startswith(rests) for name in method.replayed)  # type: ignore[attr-defined]
    constant = method.importances[0][f"{rests}.encoder.layers.0.mlp.fc1.weight"]  # type: ignore[attr-defined]
    assert constant.item() == pytest.approx(1e-6)


def test_teachers(clip: CLIP, stream: Stream) -> None:
    """After weights were moved: the previous model, the initial one, and half of each."""
    rows = {}
    for teacher in ("previous", "initial", "mix"):
        clip.load_weights("pretrained", clip.pretrained)
        moved = {k: v + 0.02 * v.std() if v.ndim > 1 else v for k, v in clip.pretrained.items()}
        clip.load_weights("moved", moved)
        method = GIFT(teacher=teacher, iterations=1)
        method.bind(clip, stream.context())
        method.replay = Given(some_pairs(stream))  # type: ignore[assignment]
        method.begin_task(stream.tasks[0])
        rows[teacher] = method.teacher_images
        assert clip.holds == "moved" and torch.equal(
            clip.weights()["visual_projection.weight"], moved["visual_projection.weight"]
        )
    clip.load_weights("pretrained", clip.pretrained)
    with torch.no_grad():
        initial = torch.cat([clip.encode_image(x) for x in some_pairs(stream).images.split(64)])
    torch.testing.assert_close(rows["initial"], initial)
    assert not torch.allclose(rows["previous"], initial, atol=1e-3)
    for other in ("previous", "initial"):
        assert not torch.allclose(rows["mix"], rows[other], atol=1e-4)


@pytest.mark.slow
def test_bf16_is_close(clip: CLIP, stream: Stream) -> None:
    _, exact = learn(clip, stream)
    _, rough = learn(clip, stream, precision="bf16")
    assert rough["distil_image"] == pytest.approx(exact["distil_image"], rel=0.05)
    assert rough["task"] == pytest.approx(exact["task"], rel=0.05)


@pytest.mark.slow
def test_lora_can_learn_by_gift(clip: CLIP, stream: Stream) -> None:
    method, losses = learn(clip, stream, adapt="lora", lr=1e-2)
    assert method.anchor and all("lora_" in name for name in method.anchor)
    assert losses["consolidation"][-1] > 0


def test_adaptive_consolidation_needs_something_to_weigh_by(clip: CLIP, stream: Stream) -> None:
    with pytest.raises(PerdureError, match="consolidation=l2 or none"):
        GIFT(distillation="none", beta=0.0).bind(clip, stream.context())


def test_a_stream_without_generator_is_refused(clip: CLIP) -> None:
    with pytest.raises(PerdureError, match="No generator is given"):
        GIFT().bind(clip)


def test_mean_squares_take_q_k_and_v_together() -> None:
    g: dict[str, Tensor | None] = {
        "a.self_attn.q_proj.bias": torch.tensor([1.0, 1.0]), "a.self_attn.k_proj.bias": torch.tensor([0.0, 0.0]),
        "a.self_attn.v_proj.bias": torch.tensor([2.0, 2.0]), "a.fc.bias": torch.tensor([3.0]), "unused": None,
    }  # fmt: skip
    means = mean_squares(g)
    assert means["a.self_attn.q_proj.bias"] == means["a.self_attn.k_proj.bias"] == pytest.approx(10 / 6)
    assert means["a.fc.bias"] == 9 and "unused" not in means


def test_a_plane_goes_through_its_three_points(clip: CLIP) -> None:
    generator = torch.Generator().manual_seed(0)
    o = clip.pretrained
    a, b = ({k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in o.items()} for _ in range(2))
    p = plane(o, a, b)
    for (x, y), wanted in (((0, 0), o), ((p.reach, 0), a), (p.corner, b)):
        got = p.at(x, y)
        assert set(got) == set(o) and all(torch.allclose(got[k], wanted[k], atol=1e-5) for k in o)
    assert inner(p.u, p.v) == pytest.approx(0, abs=1e-5) and inner(p.u, p.u) == pytest.approx(1, abs=1e-4)
    with pytest.raises(PerdureError, match="on one line"):
        plane(o, a, {k: o[k] + 2 * (a[k] - o[k]) for k in o})


def test_a_run_remembers_the_prompts_of_learned_tasks(tmp_path: Path, clip: CLIP, stream: Stream) -> None:
    method, _ = learn(clip, stream, iterations=1)
    assert method.state.prompts == stream.tasks[0].prompts()
    files, values = method.pack_state()
    again = GIFT()
    again.unpack_state(files, values)
    assert again.state == method.state


def test_prompts_that_the_student_cannot_read_are_refused_before_anything_is_drawn(clip: CLIP, stream: Stream) -> None:
    with pytest.raises(PerdureError, match="Mexican hairless dog.*23 tokens long.*reads 16"):
        GIFT(vocabulary="imagenet").bind(clip, stream.context())
