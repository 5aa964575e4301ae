"""iCaRL: what is remembered, what outlives a task, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_zscl import learn
from torch import Tensor

from perdure import launch
from perdure.core.errors import PerdureError
from perdure.data.task import Context, Stream
from perdure.methods.icarl import ICaRL
from perdure.models.clip import CLIP
from perdure.ops.herding import herd

BRIEF: dict[str, Any] = dict(iterations=1, warmup=1, lr=1e-4, batch_size=8, reference_batch=16)


def unit(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + 0.5, dim=1)


def by_definition(x: Tensor, count: int) -> list[int]:
    """argmin ‖μ - (Σ chosen + f)/(k + 1)‖², one by one."""
    mean, found = x.mean(0), list[int]()
    for k in range(count):
        far = [float((mean - (x[found].sum(0) + f) / (k + 1)).norm()) for f in x]
        found.append(min((j for j in range(len(x)) if j not in found), key=far.__getitem__))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_herding_is_its_definition(seed: int) -> None:
    x = unit(23, seed)
    chosen = by_definition(x, 12)
    assert herd(x, 12) == chosen
    left, places = list(range(23)), list[int]()  # the release: places in a list that shrinks
    for j in chosen:
        places.append(left.index(j))
        left.remove(j)
    assert herd(x, 12, shifted=True) == places != chosen
    assert sorted(herd(x, 99)) == list(range(23))


def kept(clip: CLIP, stream: Stream, **values: Any) -> list[dict[str, list[int]]]:
    """The memory after each of three tasks."""
    method = ICaRL(**{**BRIEF, "memory": 31, **values})
    method.bind(clip, stream.context())
    out = []
    for task in stream.tasks:
        learn(method, task)
        out.append({name: list(numbers) for name, numbers in method.state.memory.items()})
    return out


@pytest.mark.slow
def test_the_memory_is_shared_evenly_and_the_release_s_outgrows_it(clip: CLIP, stream: Stream) -> None:
    even = kept(clip, stream)
    assert [[len(m) for m in after.values()] for after in even] == [[31], [15, 15], [10, 10, 10]]
    assert even[0]["animals"] == list(range(31))  # the first task's first
    assert even[2]["animals"] == list(range(10)) and even[2]["digits"] == even[1]["digits"][:10]
    assert len(set(even[1]["digits"])) == 15 and even[1]["digits"] != list(range(15))  # herded
    clip.load_weights("pretrained", clip.pretrained)
    released = kept(clip, stream, memory_split="release", candidates=20)
    assert [[len(m) for m in after.values()] for after in released] == [[20], [15, 16], [10, 10, 20]]
    assert max(released[1]["digits"]) < 20


def test_what_is_distilled_are_the_remembered_images_in_their_order(clip: CLIP, stream: Stream) -> None:
    said: list[str] = []
    method = ICaRL(**{**BRIEF, "memory": 31, "iterations": 3})
    method.bind(clip, replace(stream.context(), warn=said.append))
    assert said == ["memory=31 is less than an image for each of the 53 classes."]
    first = learn(method, stream.tasks[0])
    assert set(first) == {"task"}
    losses = learn(method, stream.tasks[1])
    assert set(losses) == {"task", "distil_image", "distil_text"}
    taught = method.distiller.taught
    assert taught is not None and torch.equal(taught.pixels, stream.tasks[0].train.pixels[:31])
    method.begin_task(stream.tasks[2])
    assert method.distiller.plan is not None
    assert [len(index) for index in method.distiller.plan] == [16, 14, 16, 14]  # 30 images, from the beginning again


def test_a_memory_comes_back_as_it_was(clip: CLIP, stream: Stream) -> None:
    method = ICaRL(**BRIEF, memory=40)
    method.state.memory = {"digits": [3, 1, 2], "animals": [5, 5]}  # in the order of learning
    again = ICaRL(**BRIEF, memory=40)
    again.unpack_state(*method.pack_state())
    assert list(again.state.memory.items()) == list(method.state.memory.items())
    again.bind(clip, Context())
    with pytest.raises(PerdureError, match="digits, animals are not at hand"):
        again.begin_task(stream.tasks[2])


def test_a_memory_that_is_too_small_is_refused(clip: CLIP, stream: Stream) -> None:
    with pytest.raises(PerdureError, match="memory=12 is smaller than the classes.*up to 27 classes.*at least 27"):
        ICaRL(memory=12).bind(clip, stream.context())
    with pytest.raises(PerdureError, match="memory=0"):
        launch.configure("icarl", "mini-mtil", 0, ["memory=0"], {})
    config, _ = launch.configure("icarl", "mini-mtil", 0, {}, {"herding": True})  # as YAML reads it
    assert config["options"]["herding"] == "true"
