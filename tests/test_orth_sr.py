"""Rotations of weights, and OrthSR's regularisation and CutOut: what they promise exactly; what the KL keeps of new classes."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel

import perdure
from perdure import launch
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.data.task import Context, Query, Task
from perdure.methods.finetune import FineTune
from perdure.methods.orth_sr import OrthSR
from perdure.models import rotation
from perdure.models.attending import class_attention
from perdure.models.clip import CLIP
from perdure.models.rotation import Rotation
from perdure.training.fit import fit

QUICK: dict[str, Any] = dict(
    iterations=2,
    warmup=0,
    batch_size=8,
    lr=6e-3,
    rotation_block=32,
    rotation_layers=("v_proj", "out_proj"),
    towers="image",
)


def two_tasks(images: int = 16) -> tuple[Task, ...]:
    return mini.multi_domain("I").shortened(tasks=2, images=images).tasks


def learn(method: Any, task: Task) -> Any:
    method.start(task)
    method.begin_task(task)
    losses = fit(method, task, torch.Generator().manual_seed(0), method.clip.size, method.clip.device)
    method.clip.trained(f"trained {task.name}", method.parameters().values())
    return losses


def bound(clip: CLIP, **values: Any) -> OrthSR:
    method = OrthSR(**{**QUICK, **values})
    method.bind(clip, Context(seed=3))
    return method


def turn(clip: CLIP, scale: float) -> None:
    noise = torch.Generator().manual_seed(1)
    for _, layer in rotation.rotated(clip.backbone):
        layer.rotation.upper.data.copy_(scale * torch.randn(layer.rotation.upper.shape, generator=noise))


def seen(clip: CLIP, task: Task) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return clip.encode_image(task.test.pixels[:8]), clip.encode_text(task.prompts())


# ---- the rotation


@pytest.mark.parametrize(("size", "block"), [(48, 48), (48, 16), (6, 2)])
def test_a_rotation_is_orthogonal_however_far_it_turns(size: int, block: int) -> None:
    turns = Rotation(size, block, torch.device("cpu"))
    with torch.no_grad():
        turns.upper.normal_(generator=torch.Generator().manual_seed(0))
        found, weight = turns.matrices(), torch.randn(20, size, generator=torch.Generator().manual_seed(1))
        turned = turns.turned(weight)
    assert found.shape == (size // block, block, block)
    torch.testing.assert_close(found @ found.mT, torch.eye(block).expand_as(found), rtol=0, atol=1e-5)
    assert torch.linalg.det(found).tolist() == pytest.approx([1] * len(found), abs=1e-4)
    torch.testing.assert_close(turned, weight @ torch.block_diag(*found).T, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned @ turned.T, weight @ weight.T, rtol=0, atol=1e-4)
    assert float((turned - weight).abs().max()) > 0.1


def test_two_dimensions_turn_by_cayley_s_angle() -> None:
    turns = Rotation(2, 2, torch.device("cpu"))
    with torch.no_grad():
        turns.upper.fill_(math.tan(math.pi / 6 / 2))
        (found,) = turns.matrices()
    wanted = torch.tensor(
        [[math.cos(math.pi / 6), -math.sin(math.pi / 6)], [math.sin(math.pi / 6), math.cos(math.pi / 6)]]
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_unturned_it_is_zero_shot_to_the_bit_and_folded_it_is_what_it_was_unfolded(clip: CLIP) -> None:
    task = two_tasks()[0]
    before, names = seen(clip, task), set(clip.weights())
    FineTune(adapt="rotation", rotation_block=32, rotation_layers=("v_proj", "fc1")).bind(clip)
    assert all(torch.equal(a, b) for a, b in zip(seen(clip, task), before, strict=True))
    learns = {
        n.rsplit(".rotation", 1)[0].rsplit(".", 1)[1] for n, p in clip.backbone.named_parameters() if p.requires_grad
    }
    assert learns == {"v_proj", "fc1"}
    turn(clip, 0.05)
    turned, weights = seen(clip, task), clip.weights()
    assert set(weights) == names and not torch.allclose(turned[0], before[0], atol=1e-3)
    plain = CLIP.load(str(mini.MODEL))
    plain.load_weights("folded", weights)
    for a, b in zip(seen(plain, task), turned, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    clip.load_weights("folded", weights)  # into the same model: the rotations turn nothing again
    for a, b in zip(seen(clip, task), turned, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rotation_block": 48}, "rotation_block=48: .* has 128 inputs"),
        ({"rotation_layers": ("q_proj", "query")}, "no linear layer 'query'. They have: fc1"),
    ],
)
def test_rotations_that_do_not_fit(values: dict[str, Any], said: str, clip: CLIP) -> None:
    with pytest.raises(PerdureError, match=said):
        FineTune(adapt="rotation", towers="text", **values).bind(clip)


# ---- the regularisation


class Noting(OrthSR):
    """Notes the gradients of each loss by itself, at the first step."""

    def step(self, batch: Any, backward: Any) -> None:
        def each(**losses: Tensor) -> Any:
            self.apart = {
                name: torch.autograd.grad(loss, list(self.parameters().values()), retain_graph=True, allow_unused=True)
                for name, loss in losses.items()
            }
            return backward(**losses)

        super().step(batch, each if not hasattr(self, "apart") else backward)  # type: ignore[arg-type]


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_the_divergence_begins_at_nothing_and_pulls_nowhere(kl: str, clip: CLIP) -> None:
    method = Noting(**QUICK, kl=kl, kl_weight=0.7)
    method.bind(clip)
    losses = learn(method, two_tasks()[0])
    assert losses["kl"][0] == pytest.approx(0, abs=1e-6) and losses["kl"][-1] > 1e-4
    sizes = {name: max(float(g.abs().max()) for g in found if g is not None) for name, found in method.apart.items()}
    assert sizes["kl"] < 1e-4 * sizes["task"]


def test_the_divergence_is_the_one_asked_for(clip: CLIP) -> None:
    """At rate 0 the model stays where it is put: the loss is λ·KL, in the direction asked for, the mean over images."""
    task = two_tasks()[0]
    found = {}
    for kl in ("forward", "reverse"):
        method = bound(
            CLIP.load(str(mini.MODEL)), kl=kl, kl_weight=0.5, lr=0.0, augment=False, batch_size=24, iterations=1
        )
        images, texts = (method.clip.encode_image(task.train.pixels), method.clip.encode_text(task.prompts()))
        born = method.clip.similarity(images, texts).detach().log_softmax(1)
        method.start(task)
        method.begin_task(task)
        turn(method.clip, 0.02)
        with torch.no_grad():
            own = method.clip.similarity(
                method.clip.encode_image(task.train.pixels), method.clip.encode_text(task.prompts())
            ).log_softmax(1)
        losses = fit(method, task, torch.Generator(), method.clip.size, method.clip.device)
        p, q = (born, own) if kl == "forward" else (own, born)
        assert losses["kl"][0] == pytest.approx(0.5 * float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
        found[kl] = losses["kl"][0]
    assert found["forward"] != pytest.approx(found["reverse"], rel=0.01)


@pytest.mark.slow
def test_held_fast_the_answers_stay() -> None:
    task, moved = two_tasks()[0], {}
    asked: dict[str, Any] = dict(iterations=14, lr=1e-3, rotation_layers=("v_proj",), augment=False)
    for weight in (0.0, 100.0):
        method = bound(CLIP.load(str(mini.MODEL)), kl_weight=weight, **asked)
        query = Query(task.test.pixels[:16], task.classes)
        before = method.predict(query)
        learn(method, task)
        moved[weight] = float((method.predict(query).softmax(1) - before.softmax(1)).abs().mean())
    assert moved[100.0] < moved[0.0] / 3


class Forgetful(OrthSR):
    """Keeps nothing of what the bypass makes of images."""

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        assert self.shown is not None and len(self.shown) == len(task.train)
        self.shown = None


@pytest.mark.slow
def test_images_that_are_not_cropped_are_seen_by_the_anchor_once() -> None:
    """The same losses, whether the bypass has kept what it made of the images or not."""
    task, found = two_tasks()[0], []
    for kind in (OrthSR, Forgetful):
        method = kind(**QUICK, augment=False)
        method.bind(CLIP.load(str(mini.MODEL)))
        found.append(learn(method, task)["kl"])
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0][-1] > 1e-4


@pytest.mark.slow
def test_the_anchor_is_the_pre_trained_model_or_that_before_the_task() -> None:
    first, second = two_tasks()
    found = {}
    for anchor in ("initial", "previous"):
        method = bound(CLIP.load(str(mini.MODEL)), anchor=anchor, lr=2e-2)
        learn(method, first)
        found[anchor] = learn(method, second)["kl"]
    assert found["previous"][0] == pytest.approx(0, abs=1e-6) and found["initial"][0] > 1e-3


def test_after_a_whole_stream_the_weights_are_turned_and_nothing_else(clip: CLIP) -> None:
    born = {n: w.clone() for n, w in clip.weights().items()}
    method = bound(clip, rotation_block=64, iterations=3, lr=2e-2)
    for task in two_tasks():
        learn(method, task)
        assert method.remarks()["drift of W Wᵀ, largest"] < 1e-5
        assert method.remarks()["change of the rotated weights, mean share"] > 0.01
    assert all(not layer.rotation.upper.any() for _, layer in rotation.rotated(clip.backbone))
    moved = {name for name, weight in clip.weights().items() if not torch.equal(weight, born[name])}
    assert moved == {f"{name}.weight" for name, _ in rotation.rotated(clip.backbone)}
    assert all(n.startswith("vision_model") and n.endswith("proj.weight") for n in moved) and len(moved) == 8
    for name in moved:
        torch.testing.assert_close(clip.weights()[name].norm(dim=1), born[name].norm(dim=1), rtol=1e-5, atol=0)


def test_all_weights_under_the_same_loss(clip: CLIP) -> None:
    method = bound(clip, adapt="full", lr=1e-4)
    first, second = two_tasks()
    assert learn(method, first)["kl"][0] == pytest.approx(0, abs=1e-6)
    now = clip.weights()
    assert learn(method, second)["kl"][0] > 1e-5  # the bypass is the pre-trained model; and the model is itself again
    assert any(not torch.equal(w, now[n]) for n, w in clip.weights().items()) and method.remarks() == {}


# ---- the CutOut


def test_attention_is_what_transformers_says(clip: CLIP) -> None:
    images = two_tasks()[0].test.pixels[:4]
    found = class_attention(clip, images)
    clip.backbone.set_attn_implementation("eager")
    with torch.no_grad():
        seen = clip.backbone.vision_model(pixel_values=clip.pixels(images), output_attentions=True)
    wanted = seen.attentions[-1].mean(1)[:, 0, 1:].unflatten(1, (clip.patches, clip.patches))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("cutout", "at"), [("attentive", "peak"), ("attentive", "drawn"), ("random", "peak")])
def test_squares_lie_where_they_should(cutout: str, at: str, clip: CLIP) -> None:
    method = bound(clip, cutout=cutout, cutout_at=at, cutout_side=0.25, cutout_share=1.0, kl_weight=0.0)
    task = two_tasks()[0]
    method.begin_task(task)
    images = clip.sized(task.train.pixels)
    cut = method.cut(images)
    gone = (cut != images).any(1)
    side, patches = clip.size, clip.patches
    assert torch.allclose(cut.movedim(1, -1)[gone], clip.mean.flatten().expand(int(gone.sum()), -1))
    peaks = class_attention(clip, images).flatten(1).argmax(1)
    at_peak = []
    for one, peak in zip(gone, peaks.tolist(), strict=True):
        rows, columns = one.nonzero().unbind(1)
        assert 0 < len(rows) <= (0.25 * side) ** 2 and rows.max() - rows.min() < 0.25 * side
        middle = [(peak // patches + 0.5) * side / patches, (peak % patches + 0.5) * side / patches]
        spans = [(float(x.min()), float(x.max()) + 1) for x in (rows, columns)]
        at_peak.append(all(low <= m <= high for m, (low, high) in zip(middle, spans, strict=True)))
    assert all(at_peak) if (cutout, at) == ("attentive", "peak") else not all(at_peak)
    method.config = OrthSR.Config(**{**vars(method.config), "cutout_share": 0.0})
    assert torch.equal(method.cut(images), images)


def test_the_answers_to_cut_images_are_held_to_those_of_the_bypass(clip: CLIP) -> None:
    method = bound(clip, cutout="attentive", cutout_share=1.0, lr=0.0, iterations=2)
    assert learn(method, two_tasks()[0])["kl"] == pytest.approx([0, 0], abs=1e-6)  # both see the same squares


def test_attention_needs_a_class_token(tmp_path: Path) -> None:
    clip = CLIP.load(str(tiny.checkpoint(tmp_path / "siglip", "siglip", side=32, patch=16)))
    with pytest.raises(PerdureError, match="cutout=attentive follows the attention of a class token"):
        bound(clip, cutout="attentive")


# ---- on the small world


@pytest.mark.slow
def test_what_is_learned_is_a_plain_checkpoint(tmp_path: Path) -> None:
    asked: dict[str, Any] = dict(
        tasks=2, images=48, iterations=20, warmup=2, lr=6e-3, batch_size=24, precision="fp32", rotation_block=32
    )
    run = perdure.run("orth_sr", "mini-mtil", tmp_path / "run", **asked)
    assert run["accuracy"][2][1] > run["accuracy"][0][1] + 5 and set(run["remarks"]) == set(run["tasks"])
    launch.export(tmp_path / "run", tmp_path / "out")
    plain = CLIPModel.from_pretrained(tmp_path / "out").state_dict()
    saved = load_file(next((tmp_path / "run").glob("task_02*")) / "weights.safetensors")
    kept = {n: t for n, t in saved.items() if "rotation" not in n}
    assert kept and all(torch.equal(plain[name], tensor) for name, tensor in kept.items())


@pytest.mark.slow
def test_held_near_the_bypass_new_classes_lose_less(tmp_path: Path) -> None:
    """Base to new on two domains: fast rotations cost the classes that nobody teaches; with the KL they cost less."""
    asked: dict[str, Any] = dict(iterations=20, warmup=2, lr=4e-3, batch_size=32, precision="fp32", rotation_block=32)
    lost: dict[float, list[float]] = {0.0: [], 4.0: []}
    for domain in ("food", "tools"):
        for weight, found in lost.items():
            run = perdure.run(
                "orth_sr", f"mini-base-to-new-{domain}", tmp_path / f"{domain}-{weight}", kl_weight=weight, **asked
            )
            assert run["new"] == run["probe"][-1] and run["base"] == run["accuracy"][-1][0]
            found.append(run["probe"][0] - run["new"])
    assert sum(lost[4.0]) < sum(lost[0.0]) - 4
