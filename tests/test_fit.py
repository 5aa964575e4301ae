"""The training loop: gradients, the schedule, precision, repeatability."""

import math

import pytest
import torch
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.seeding import reseed
from perdure.data.task import Batch, Stream
from perdure.data.transforms import random_resized_crop
from perdure.methods.base import Method, Recipe
from perdure.models.clip import CLIP
from perdure.ops.losses import classification
from perdure.training.fit import Accumulator, Backward, Schedule, fit


def test_backward_returns_its_own_gradients_and_accumulates() -> None:
    w = nn.Parameter(torch.tensor([2.0, 3.0]))
    unused = nn.Parameter(torch.zeros(1))
    losses: dict[str, Tensor] = {}
    backward = Accumulator({"w": w, "unused": unused}, losses)
    first = backward(square=(w**2).sum(), double=(2 * w).sum())
    kept = first["w"].clone()  # type: ignore[union-attr]
    second = backward(cube=(w**3).sum())
    torch.testing.assert_close(first["w"], 2 * w.detach() + 2)
    torch.testing.assert_close(second["w"], 3 * w.detach() ** 2)
    assert torch.equal(first["w"], kept)  # type: ignore[arg-type]
    torch.testing.assert_close(w.grad, first["w"] + second["w"])  # type: ignore[operator]
    assert first["unused"] is None and unused.grad is None
    assert {k: v.item() for k, v in losses.items()} == {"square": 13, "double": 10, "cube": 35}


def test_schedule_is_the_release_rule() -> None:
    """step < warmup: lr·(step + 1)/warmup; else ½(1 + cos(π(step - warmup)/(N - warmup)))·lr (GIFT and ZSCL)."""
    plan = Schedule(steps=1000, lr=1e-5, warmup=100, batch_size=64)
    assert plan.rate(0) == pytest.approx(1e-7)
    assert plan.rate(99) == plan.rate(100) == pytest.approx(1e-5)
    assert plan.rate(550) == pytest.approx(0.5e-5)
    assert plan.rate(1000) == 0
    assert plan.rate(325) == pytest.approx(1e-5 * 0.5 * (1 + math.cos(math.pi / 4)))


def trained(
    clip: CLIP, stream: Stream, precision: str = "fp32", **values: object
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    method = Method(Recipe(**{"iterations": 5, "warmup": 2, "lr": 1e-3, **values}))  # type: ignore[arg-type]
    clip.load_weights("pretrained", clip.pretrained)
    method.bind(clip)
    generator = reseed(0, 1)
    method.begin_task(stream.tasks[0])
    losses = fit(method, stream.tasks[0], generator, clip.size, clip.device, precision)
    clip.trained("t")
    return clip.weights(), losses


def test_same_seed_same_bits_and_frozen_scale(clip: CLIP, stream: Stream) -> None:
    a, losses = trained(clip, stream)
    b, again = trained(clip, stream)
    assert losses == again and len(losses["task"]) == 5
    assert all(torch.equal(a[k], b[k]) for k in a)
    pretrained = clip.pretrained
    still = [k for k in a if torch.equal(a[k], pretrained[k])]
    assert "logit_scale" in still
    assert all(k == "logit_scale" or "position_ids" in k for k in still)


@pytest.mark.parametrize(
    ("towers", "learns", "rests"), [("image", "vision_model", "text_model"), ("text", "text_model", "vision_model")]
)
def test_one_tower_alone(clip: CLIP, stream: Stream, towers: str, learns: str, rests: str) -> None:
    a, _ = trained(clip, stream, towers=towers)
    changed = {k for k in a if not torch.equal(a[k], clip.pretrained[k])}
    assert any(k.startswith(learns) for k in changed)
    assert not any(k.startswith(rests) for k in changed)


@pytest.mark.slow
def test_bf16_keeps_fp32_weights_and_similar_losses(clip: CLIP, stream: Stream) -> None:
    a, exact = trained(clip, stream, "fp32")
    b, rough = trained(clip, stream, "bf16")
    assert all(t.dtype == torch.float32 for t in b.values() if t.is_floating_point())
    assert exact != rough
    assert rough["task"] == pytest.approx(exact["task"], rel=0.05)


def test_clipping_bounds_the_gradient(stream: Stream, clip: CLIP) -> None:
    seen: list[float] = []

    class Watch(Method):
        def step(self, batch: Batch, backward: Backward) -> None:
            backward(task=1000 * self.task_loss(batch))
            seen.append(
                math.sqrt(sum(float((p.grad**2).sum()) for p in self.parameters().values() if p.grad is not None))
            )

    method = Watch(Recipe(iterations=1, warmup=0, clip_grad=1e-9, lr=1e-3))
    method.bind(clip)
    method.begin_task(stream.tasks[0])
    before = clip.weights()
    fit(method, stream.tasks[0], reseed(0), clip.size, clip.device)
    assert seen[0] > 1
    # with a gradient of norm 1e-9 Adam's eps of 1e-8 tames every step: far less than lr in any weight
    after = clip.weights()
    assert max(float((after[k] - before[k]).abs().max()) for k in after if after[k].is_floating_point()) < 2e-4


def test_random_crop_stays_in_range_and_moves() -> None:
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    crops = random_resized_crop(images, 32, torch.Generator().manual_seed(1))
    assert crops.shape == images.shape and crops.min() >= 0 and crops.max() <= 1
    assert not torch.allclose(crops, images, atol=0.05)
    whole = random_resized_crop(images, 32, torch.Generator().manual_seed(1), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    torch.testing.assert_close(whole, images, atol=1e-5, rtol=0)


def test_grouped_loss_is_each_task_alone() -> None:
    """Joint training under the task protocol: the loss of a mixed batch is the mean of the tasks' own losses."""
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([0, 0, 1, 1, 1])
    labels = torch.tensor([0, 1, 0, 2, 4, 3])
    own = [
        nn.functional.cross_entropy(logits[:3, :2], labels[:3], label_smoothing=0.2, reduction="sum"),
        nn.functional.cross_entropy(logits[3:, 2:], labels[3:] - 2, label_smoothing=0.2, reduction="sum"),
    ]
    torch.testing.assert_close(classification(logits, labels, 0.2, group), sum(own) / 6)


@pytest.mark.slow
def test_a_training_that_diverges_says_so(clip: CLIP, stream: Stream) -> None:
    with pytest.raises(PerdureError, match="diverged.*smaller lr"):
        trained(clip, stream, lr=1e6, warmup=0, iterations=8)
