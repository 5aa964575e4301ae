"""What the house offers a method beyond the papers: phases, modules, material, gradients, answers that leave no trace."""

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same_bits
from torch import Tensor, nn

from perdure.core.caller import undisturbed
from perdure.core.errors import PerdureError
from perdure.core.packing import Frozen, pack, unpack
from perdure.data.task import Batch, Query, Stream
from perdure.engine.evaluate import Protocol, evaluate, for_gap, gap
from perdure.methods.base import Expert, Method, Recipe, State
from perdure.methods.compose import Compose
from perdure.models.clip import CLIP
from perdure.ops.losses import classification
from perdure.training.fit import Backward, Losses, Stepper, fit, optimise
from perdure.training.schedule import Schedule

CPU = torch.device("cpu")


def endless(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


class Line(Stepper):
    """Learns w and b of y = w·x + b."""

    def __init__(self) -> None:
        self.w, self.b = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor(0.5))
        self.heard: list[int] = []

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {"head.w": self.w, "head.b": self.b}

    def step(self, batch: Batch, backward: Backward) -> None:
        backward(error=(batch.images @ self.w + self.b - batch.labels).square().mean())

    def stepped(self, step: int) -> None:
        self.heard.append(step)


DATA = Batch(torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]]), torch.tensor([1, 0, 2]))


def plan(**values: Any) -> Schedule:
    return Schedule(**{"steps": 6, "lr": 0.05, "warmup": 0, "batch_size": 3, **values})


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", lambda g: torch.optim.AdamW(g, betas=(0.8, 0.95), weight_decay=0.3)),
        ("adam", lambda g: torch.optim.Adam(g, betas=(0.8, 0.95), weight_decay=0.3)),
        ("sgd", lambda g: torch.optim.SGD(g, lr=1.0, momentum=0.7, weight_decay=0.3)),
    ],
)
def test_every_optimiser_with_rates_by_group_and_milestones(name: Any, make: Any) -> None:
    mine, theirs = Line(), Line()
    optimise(
        mine,
        plan(
            optimizer=name, betas=(0.8, 0.95), momentum=0.7, weight_decay=0.3, milestones=(2, 4), gamma=0.2,
            rates={"head": 0.5, "head.b": 3.0},
        ),
        endless(DATA), CPU,
    )  # fmt: skip
    optimizer = make([{"params": [theirs.w]}, {"params": [theirs.b]}])
    for rate in (0.05, 0.05, 0.01, 0.01, 0.002, 0.002):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate * 0.5, rate * 3.0
        optimizer.zero_grad()
        (DATA.images @ theirs.w + theirs.b - DATA.labels).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(mine.w, theirs.w)
    torch.testing.assert_close(mine.b, theirs.b)
    assert mine.heard == [1, 2, 3, 4, 5, 6]


def test_epochs_are_steps_over_the_images_there_are() -> None:
    given = plan(steps=99, epochs=3, milestones=(1, 2), batch_size=4).over(10)
    assert (given.steps, given.stride, given.milestones, given.epochs) == (9, 3, (3, 6), 0)
    assert given.over(1000) == given and plan().over(10) == plan()
    assert [given.rate(k) for k in (2, 3, 6)] == pytest.approx([0.05, 0.005, 0.0005])


def test_a_gradient_put_in_the_place_of_others_is_the_one_that_is_used() -> None:
    class Straight(Line):
        def step(self, batch: Batch, backward: Backward) -> None:
            super().step(batch, backward)
            backward.add("head.w", torch.ones(2))
            backward.replace("head.w", torch.tensor([0.0, 4.0]))

    line = Straight()
    optimise(line, plan(optimizer="sgd", momentum=0.0, steps=1, lr=0.5), endless(DATA), CPU)
    assert torch.equal(line.w, torch.tensor([1.0, -4.0]))


def test_a_step_counts_because_it_was_taken() -> None:
    class Silent(Line):
        def step(self, batch: Batch, backward: Backward) -> None:
            backward.add("head.w", torch.ones(2))

    losses = optimise(Silent(), plan(), endless(DATA), CPU)
    assert losses == {} and losses.steps == 6


def test_gradients_switched_off_outside_change_nothing(clip: CLIP, stream: Stream) -> None:
    inside, outside = Line(), Line()
    optimise(outside, plan(), endless(DATA), CPU)
    with torch.no_grad():
        optimise(inside, plan(), endless(DATA), CPU)
        assert not torch.is_grad_enabled()
    assert torch.equal(inside.w, outside.w)


def test_a_training_that_reaches_nothing_is_said_so() -> None:
    class Deaf(Line):
        def step(self, batch: Batch, backward: Backward) -> None:
            backward(error=(batch.images @ self.w).detach().sum())

    with pytest.raises(PerdureError, match="Training on toys: in 50 steps no loss reached"):
        optimise(Deaf(), plan(steps=500), endless(DATA), CPU, name="toys")


def test_a_loss_that_is_not_finite_stops_within_fifty_steps_and_is_named() -> None:
    class Breaks(Line):
        taken = 0

        def step(self, batch: Batch, backward: Backward) -> None:
            self.taken += 1
            good = (self.w**2).sum()
            backward(task=good, distil_text=good * (float("nan") if self.taken >= 57 else 1.0))

    line = Breaks()
    with pytest.raises(PerdureError, match="toys diverged: the loss 'distil_text' is not a number from step 57 on"):
        optimise(line, plan(steps=10_000), endless(DATA), CPU, name="toys")
    assert line.taken == 100


def test_what_follows_the_projections_is_fp32_under_autocast(clip: CLIP, stream: Stream) -> None:
    task = stream.tasks[0]
    method = Method(Recipe())
    method.bind(clip)
    method.begin_task(task)
    batch = Batch(task.train.pixels[:8].float() / 255, task.train.labels[:8])
    with torch.autocast("cpu", torch.bfloat16):
        query = Query(task.test.pixels[:16], task.classes)
        logits = method.logits(query)
        loss = method.task_loss(batch)
        images, texts = clip.encode_image(batch.images), clip.encode_tokens(method.tokens)
    assert logits.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, classification(clip.scale * images @ texts.T, batch.labels, 0.2), atol=1e-6, rtol=0
    )
    assert len(logits.unique()) > 0.9 * logits.numel()  # bf16 has some 250 values here


class Ensemble(Method):
    """The weights as training left them, and the pre-trained ones beside them."""

    order: tuple[str, ...] = ("last", "pretrained")

    def experts(self, query: Query) -> Sequence[Expert]:
        made = {
            "last": Expert("last", gate=0.3),
            "pretrained": Expert("pretrained", self.clip.pretrained, gate=0.7),
        }
        return [made[name] for name in self.order]


@pytest.mark.slow
@pytest.mark.parametrize("order", [("last", "pretrained"), ("pretrained", "last")])
@pytest.mark.parametrize("adapt", ["full", "lora"])
def test_an_expert_named_last_is_what_training_left_whoever_answered_before(
    clip: CLIP, stream: Stream, order: tuple[str, ...], adapt: Any
) -> None:
    task = stream.tasks[1]
    method = Ensemble(Recipe(iterations=8, warmup=1, lr=2e-3, adapt=adapt, lora_rank=2))
    method.order = order
    method.bind(clip)
    method.begin_task(task)
    fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device)
    clip.trained("trained", method.parameters().values())
    query = Query(task.test.pixels, task.classes)
    before = {k: v.clone() for k, v in clip.backbone.state_dict().items()}
    tuned = Method.logits(method, query)
    found = method.predict(query)
    assert clip.holds == "trained" and clip.rebased == (adapt == "full")
    assert same_bits(before, clip.backbone.state_dict())
    clip.load_weights("pretrained", clip.pretrained)
    born = Method.logits(method, query)
    assert (tuned - born).abs().max() > 0.5
    torch.testing.assert_close(found, 0.3 * tuned + 0.7 * born, atol=1e-4, rtol=1e-5)


def test_an_evaluation_leaves_the_model_as_it_was(clip: CLIP, stream: Stream) -> None:
    class Elsewhere(Method):
        def base_expert(self) -> Expert:
            return Expert("pretrained", self.clip.pretrained)

        def finalize(self, query: Query, logits: Tensor) -> Tensor:
            return logits

    method = Compose(learn=Method(Recipe()), fuse=Elsewhere(), answer=Elsewhere())
    method.bind(clip)
    moved = {k: v + 0.01 if v.is_floating_point() else v for k, v in clip.weights().items()}
    clip.load_weights("moved", moved)
    evaluate(method, stream, Protocol("task", "known"), 1)
    gap(method, for_gap(stream))
    assert clip.holds == "moved" and same_bits(clip.weights(), moved)


@pytest.mark.slow
def test_calibrate_is_given_the_base_expert_s_weights_by_the_loop(
    short_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perdure.methods.finetune import Individual

    seen = []

    def calibrate(self: Method, task: Any) -> None:
        seen.append(self.clip.holds)

    monkeypatch.setattr(Individual, "calibrate", calibrate)
    short_run("individual", iterations=1, tasks=2, label_smoothing=0.11)
    assert seen == ["pretrained", "pretrained"]


@pytest.mark.slow
def test_row_zero_is_the_pretrained_model_whatever_the_adapters_do(short_run: Any) -> None:
    born = short_run("zero_shot")
    spoilt = short_run("finetune_lora", lora_init="random", lora_rank=4, iterations=1)
    assert spoilt["accuracy"][0] == born["accuracy"][0] and spoilt["probe"][0] == born["probe"][0]
    assert spoilt["gap"][0] == born["gap"][0]
    assert spoilt["probe"][1] < born["probe"][0]


@pytest.mark.slow
def test_a_phase_s_losses_stand_in_the_record(short_run: Any) -> None:
    m = short_run(
        "mg_clip", epochs=1, batch_size=16, iterations=0, warmup=0, head_epochs=2, head_batch=8, head_lr=0.02, images=32
    )
    assert set(m["phases"]) == {"animals", "digits", "food"} and set(m["phases"]["food"]) == {"head"}
    course = m["phases"]["food"]["head"]
    assert course["step"][-1] == 2 * 4 and len(course["head"]) == 8 and course["head"][-1] < course["head"][0]


# ---- state


@dataclass
class Kinds(State):
    count: int = 0
    shape: tuple[int, ...] = ()
    sizes: dict[int, int] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    means: dict[str, Tensor] = field(default_factory=dict)
    expert: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    expert_old: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def test_state_comes_back_by_value_and_by_type() -> None:
    import json

    state = Kinds(
        3, (1, 2), {4: 5}, {"a": {"b": 0.25}}, [("cat", ("a {}",))], {"z": torch.ones(2), "a": torch.zeros(1)},
        {"old_x": {"w": torch.ones(1)}, "e": Frozen()}, {"x": {"w": torch.zeros(1)}},
    )  # fmt: skip
    files, values = pack(state)
    again = unpack(Kinds, files, json.loads(json.dumps(values)))
    for name in ("count", "shape", "sizes", "figures", "rows"):
        assert getattr(again, name) == getattr(state, name) and type(getattr(again, name)) is type(getattr(state, name))
    assert type(again.rows[0]) is tuple and list(again.means) == ["z", "a"]
    assert again.expert["old_x"]["w"] == 1 and again.expert_old["x"]["w"] == 0
    assert type(again.expert["e"]) is Frozen and type(again.expert["old_x"]) is dict


@pytest.mark.parametrize(
    "kind", [Any, list, dict[int, Tensor], list[Tensor], Tensor, dict[str, Any], list[list[Any]], torch.Generator]
)
def test_a_state_that_could_not_come_back_is_refused_when_the_class_is_made(kind: Any) -> None:
    from dataclasses import make_dataclass

    made = make_dataclass("Strange", [("kept", kind, None)], bases=(State,))
    with pytest.raises(PerdureError, match="'kept: .*Strange could not be kept"):
        type("Refused", (Method,), {"State": made})


def test_a_value_that_is_not_of_its_type_is_refused() -> None:
    for spoilt in (Kinds(count="three"), Kinds(figures={"a": {"b": float("nan")}}), Kinds(shape=[1])):  # type: ignore[arg-type]
        with pytest.raises(PerdureError, match="of the State Kinds holds"):
            pack(spoilt)


# ---- the caller


def test_what_belongs_to_the_caller_is_put_back() -> None:
    def state() -> tuple[Any, ...]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    def seed() -> None:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    seed()
    wanted = state()
    seed()
    threads, variables = torch.get_num_threads(), dict(os.environ)
    with torch.no_grad(), pytest.raises(KeyError), undisturbed():
        assert torch.is_grad_enabled()
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        torch.set_num_threads(threads + 1)
        os.environ["PERDURE_TEST"] = "1"
        raise KeyError
    assert state() == wanted and torch.get_num_threads() == threads and dict(os.environ) == variables


def test_batches_are_records() -> None:
    batch = Batch(torch.zeros(2, 3), torch.tensor([0, 1]), index=torch.tensor([7, 9]), captions=("a", "b"))
    assert set(batch) == {"images", "labels", "index", "captions"} and batch["index"] is batch.index
    moved = batch.to(CPU)
    assert moved.captions == ("a", "b") and torch.equal(moved.index, batch.index)
    with pytest.raises(AttributeError, match="no 'depth'"):
        batch.depth  # noqa: B018


def test_a_method_hears_which_images_it_sees(clip: CLIP, stream: Stream) -> None:
    seen: list[int] = []

    class Watch(Method):
        def step(self, batch: Batch, backward: Backward) -> None:
            seen.extend(batch.index.tolist())
            super().step(batch, backward)

    method = Watch(Recipe(epochs=2, batch_size=20, warmup=0))
    method.bind(clip)
    method.begin_task(stream.tasks[0])
    losses = fit(method, stream.tasks[0], torch.Generator().manual_seed(0), clip.size, clip.device)
    assert isinstance(losses, Losses) and losses.steps == 2 * -(-48 // 20)
    assert sorted(seen) == sorted([*range(48)] * 2)
