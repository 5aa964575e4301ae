"""What real sizes cost: training in parts and by recomputing, evaluation by the batch; the same gradients and answers."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT
from gift_step import Given
from test_gift import some_pairs
from test_resumed import Enough
from torch import Tensor

import perdure
from perdure import launch
from perdure.core.errors import PerdureError
from perdure.core.seeding import reseed
from perdure.data.task import Batch, Context, Query, Stream
from perdure.engine.run import identity
from perdure.methods.base import Row
from perdure.models.clip import CLIP
from perdure.models.recompute import by_blocks, in_parts
from perdure.training.fit import Accumulator

OWN = str(Path(__file__).parent / "own" / "prompt.py")  # a module inside a tower
# These take no steps on images. KeepLoRA begins where the singular vectors of a gradient point, and the last digits turn those;
# the noise of MoE-Adapters' routers is drawn a part at a time.
NO_STEPS = ("zero_shot", "ncm", "rapf", "cgil", "slca", "keep_lora", "moe_adapters", "clg_cbm")
LEARNERS = [
    e.name for e in launch.methods()
    if "role" not in e.about and "batch_size" in launch.method_options(e) and not isinstance(e.value, Row)
    and e.name not in NO_STEPS
]  # fmt: skip
# Of GIFT: F squares a gradient and divides by its mean; another number of threads, or another processor, moves it as much.
ROUNDING = {"gift": 3e-5, "codyra": 3e-6}
Step = tuple[dict[str, Tensor], dict[str, Tensor], int]  # losses, gradients, the most bytes of activations at a time


class Alive:
    """The most bytes that what goes into the towers' activation functions held at any time."""

    def __init__(self, clip: CLIP):
        self.seen: list[weakref.ref[Tensor]] = []
        self.most = 0
        for name, module in clip.backbone.named_modules():
            if name.endswith("activation_fn"):
                module.register_forward_pre_hook(self.made)

    def made(self, module: Any, inputs: tuple[Tensor]) -> None:
        self.seen.append(weakref.ref(inputs[0]))
        self.most = max(self.most, sum(t.nbytes for ref in self.seen if (t := ref()) is not None))


def step(clip: CLIP, stream: Stream, name: str, parts: int = 1, blocks: bool = False, **values: Any) -> Step:
    """A step on 8 images by a copy of ``clip``, some way from where the task began."""
    clip = copy.deepcopy(clip)
    clip.accumulate = parts
    if blocks:
        by_blocks(clip.backbone)
    known = {key: option.default for key, (_, option) in launch.method_options(launch.method_entry(name)).items()}
    asked = {
        "batch_size": 8,
        "synthetic_batch": 11,
        "label_smoothing": 0.1,
        "lora_init": "random",
        "reference": "drawings",
        "meta_steps": 0,
        **values,
    }
    reseed(0, "bind")
    learner = launch.build(name, {**known, **{key: value for key, value in asked.items() if key in known}})
    learner.bind(clip, stream.context())
    if name == "gift":
        learner.replay = Given(some_pairs(stream))  # type: ignore[attr-defined]
    task = stream.tasks[0] if learner.scope == "task" else stream.joined(grouped=True)
    learner.start(task)
    learner.begin_task(task)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in learner.parameters().values():
            p.add_(torch.randn(p.shape, generator=noise), alpha=1e-3)
    rows = torch.arange(8) * (len(task.train) // 8)
    losses: dict[str, Tensor] = {}
    alive = Alive(clip)
    learner.step(
        Batch(task.train.pixels[rows] / 255, task.train.labels[rows], index=rows),
        Accumulator(learner.parameters(), losses),
    )
    return losses, {n: p.grad for n, p in learner.parameters().items() if p.grad is not None}, alive.most


def far(mine: Step, whole: Step) -> float:
    """How far losses and gradients are from those of the undivided batch, as a share of the largest there."""
    assert mine[0].keys() == whole[0].keys() and mine[1].keys() == whole[1].keys() and whole[1]
    losses = [float((mine[0][k] - x).abs() / x.abs().clamp_min(1)) for k, x in whole[0].items()]
    most = max(float(g.abs().max()) for g in whole[1].values())
    return max(*losses, *(float((mine[1][k] - g).abs().max()) / most for k, g in whole[1].items()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LEARNERS, "finetune_lora", "condu_lora", OWN])
def test_parts_have_the_losses_and_gradients_of_the_whole_batch(name: str, clip: CLIP, stream: Stream) -> None:
    whole = step(clip, stream, name)
    parts = step(clip, stream, name, parts=3)  # 3, 3 and 2 images; of a task's texts as many parts
    assert far(parts, whole) < ROUNDING.get(name, 5e-6)
    assert parts[2] < whole[2] / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "finetune_lora", "gift", "mg_clip", OWN])
def test_recomputed_blocks_have_the_same_gradients(name: str, clip: CLIP, stream: Stream) -> None:
    whole = step(clip, stream, name)
    blocks = step(clip, stream, name, blocks=True)
    assert far(blocks, whole) < 5e-6
    assert blocks[2] < whole[2] / 3
    both = step(clip, stream, name, parts=4, blocks=True)
    assert far(both, whole) < ROUNDING.get(name, 5e-6)
    assert both[2] < blocks[2] / 2


def test_what_is_taken_over_the_batch_of_pairs_is_exact_before_it_is_squared(clip: CLIP, stream: Stream) -> None:
    """GIFT without its penalty: matrices over the pairs, 5 parts of 11 images and of their texts."""
    values: dict[str, Any] = {"consolidation": "none", "distillation": "kl"}
    assert far(step(clip, stream, "gift", parts=5, **values), step(clip, stream, "gift", **values)) < 5e-6


@pytest.mark.slow
def test_under_autocast_what_is_computed_again_is_rounded_alike(clip: CLIP, stream: Stream) -> None:
    exact = step(clip, stream, "finetune")
    with torch.autocast("cpu", torch.bfloat16):
        whole, both = step(clip, stream, "finetune"), step(clip, stream, "finetune", parts=3, blocks=True)
    assert far(both, whole) < 5e-3 < far(whole, exact)


def test_parts_are_even_and_none_is_empty() -> None:
    seen: list[int] = []

    def tower(x: Tensor) -> Tensor:
        seen.append(len(x))
        return 2 * x

    x = torch.arange(9.0, requires_grad=True)
    assert torch.equal(in_parts(tower, x, 4), 2 * x) and seen == [3, 2, 2, 2]
    in_parts(tower, x[:2], 4)
    with torch.no_grad():
        in_parts(tower, x, 4)
    assert seen[4:] == [1, 1, 9]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero_shot", "ridge_patches", "mg_clip", "condu"])
def test_answers_are_the_same_however_many_images_are_seen_at_a_time(
    name: str, clip: CLIP, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    prepare = CLIP.pixels
    monkeypatch.setattr(CLIP, "pixels", lambda self, x: sizes.append(len(x)) or prepare(self, x))  # type: ignore[func-returns-value]
    clip.backbone.text_model.register_forward_pre_hook(
        lambda module, inputs, values: texts.append(len(values["input_ids"])), with_kwargs=True
    )
    answers = {}
    for size in (256, 5):
        sizes.clear()
        texts: list[int] = []
        own = copy.deepcopy(clip)
        own.evaluation_batch = size
        known = {key: option.default for key, (_, option) in launch.method_options(launch.method_entry(name)).items()}
        method = launch.build(name, {**known, **({"features": 64} if "features" in known else {})})
        method.bind(own, Context(tasks=stream.tasks))
        for task in stream.tasks[:2]:
            method.start(task)
            own.trained(task.name)
            method.fuse(task)
            with own.preserved():
                method.load_expert(method.head_expert())
                method.calibrate(task)
        query = Query(stream.tasks[0].test.pixels, [c for t in stream.tasks for c in t.classes])
        answers[size] = method.answer([query])[0]
        assert max(sizes) == min(size, 48) and (name == "condu" or max(texts) <= 2 * size)
    torch.testing.assert_close(answers[5], answers[256], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_other_portions_and_is_the_same_run(tmp_path: Path) -> None:
    asked = {**SHORT, "tasks": 2, "images": 24}
    whole = perdure.run("finetune", "mini-mtil", tmp_path / "whole", **asked)
    with pytest.raises(KeyboardInterrupt):
        perdure.run("finetune", "mini-mtil", tmp_path / "cut", watcher=Enough(), **asked)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    was = identity(config)
    config["settings"] |= {"accumulate": 4, "gradient_checkpointing": True, "evaluation_batch": 5}
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config))
    assert identity(config) == was
    found = launch.resume(tmp_path / "cut")
    losses = [
        json.loads(next((tmp_path / run).glob("task_02*/state.json")).read_text())["losses"]["task"]
        for run in ("whole", "cut")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] != losses[1]  # it did train in parts
    assert found["finished"] and found["accuracy"][:2] == whole["accuracy"][:2]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["accumulate=9"], "accumulate=9: a batch of 8 images .* Set accumulate=8 or less"),
        (["accumulate=0"], "accumulate"),
        (["accumulate=-2"], "accumulate"),
        (["accumulate=1.5"], "accumulate"),
        (["evaluation_batch=0"], "evaluation_batch"),
        (["gradient_checkpointing=perhaps"], "gradient_checkpointing"),
    ],
)
def test_portions_that_cannot_be_are_refused_before_anything_is_done(given: list[str], said: str) -> None:
    with pytest.raises(PerdureError, match=said):
        launch.configure("finetune", "mini-mtil", 0, ["batch_size=8", *given], {})
