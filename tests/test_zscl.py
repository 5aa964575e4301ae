"""ZSCL, LwF and their kin as methods: references, what is seen once, averaging under a fusion, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import SHORT
from torch import Tensor

from perdure import launch
from perdure.core.errors import PerdureError
from perdure.core.seeding import reseed
from perdure.data.task import Context, Stream, Task
from perdure.methods.base import Method
from perdure.methods.compose import Compose
from perdure.methods.condu import ConDU
from perdure.methods.finetune import FineTune
from perdure.methods.icarl import ICaRL
from perdure.methods.merge import Merge
from perdure.methods.zscl import LWF, LWF_VR, ZSCL
from perdure.models.clip import CLIP
from perdure.training.fit import fit

BRIEF: dict[str, Any] = dict(iterations=3, warmup=1, lr=1e-3, batch_size=8, reference_batch=8, reference="drawings")


def learn(method: Method, task: Task) -> dict[str, list[float]]:
    """A task, as the loop over tasks has it."""
    method.start(task)
    method.begin_task(method.material(task))
    losses = fit(method, method.material(task), reseed(0, 1), method.clip.size, method.clip.device)
    method.clip.trained(f"trained {task.name}")
    method.fuse(task)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("count", [20, 1853])
def test_the_teacher_sees_an_image_once_a_run_and_no_more_than_is_shown(count: int, clip: CLIP, stream: Stream) -> None:
    seen, context = list[int](), stream.context()
    assert context.drawings is not None
    images = context.drawings().take(torch.arange(count))
    method = ZSCL(**BRIEF)
    method.bind(clip, replace(context, drawings=lambda: images))
    embeddings = clip.embeddings

    def counted(pixels: Any) -> Tensor:
        seen.append(len(pixels))
        return embeddings(pixels)

    clip.embeddings = counted  # type: ignore[method-assign]
    learn(method, stream.tasks[0])
    texts = method.distiller.texts
    learn(method, stream.tasks[1])
    assert seen == ([20] if count == 20 else [32, 32]) and method.distiller.texts is texts  # four steps of eight
    shown = method.distiller.taught
    assert shown is not None
    index = (shown.place >= 0).nonzero().squeeze(1)
    clip.load_weights("pretrained", clip.pretrained)
    torch.testing.assert_close(
        shown[index], embeddings(shown.pixels[index])
    )  # by the pre-trained model, whatever moved


@pytest.mark.slow
@pytest.mark.parametrize("values", [LWF, LWF_VR, {"teacher": "mix"}])
def test_student_and_teacher_are_two(values: dict[str, Any], clip: CLIP, stream: Stream) -> None:
    """A release of LwF let them share their memory: the distance is 0 at the first step, and must not be at the next."""
    method = ZSCL(**{**BRIEF, **values, "sides": "none", "feature_mse": 1.0})
    method.bind(clip, stream.context())
    losses = learn(method, stream.tasks[0])["feature_mse"]
    assert losses[0] == pytest.approx(0, abs=1e-9) and min(losses[1:]) > 1e-5


@pytest.mark.slow
def test_what_a_fusion_gets_is_the_mean(clip: CLIP, stream: Stream) -> None:
    """The mean is put on by the learner: ConDU's first expert is what ZSCL alone ends with."""
    alone, task = ZSCL(**BRIEF, average_every=1), stream.tasks[0]
    alone.bind(clip, stream.context())
    learn(alone, task)
    mean = clip.weights()
    clip.load_weights("pretrained", clip.pretrained)
    plain = ZSCL(**BRIEF, average="none")
    plain.bind(clip, stream.context())
    learn(plain, task)
    last = clip.weights()
    clip.load_weights("pretrained", clip.pretrained)
    both = Compose(learn=ZSCL(**BRIEF, average_every=1), fuse=ConDU())
    both.bind(clip, stream.context())
    learn(both, task)
    assert isinstance(both.fuser, ConDU)
    name = "visual_projection.weight"
    torch.testing.assert_close(both.fuser.decoupled(0)[name], mean[name], rtol=0, atol=1e-6)
    assert (last[name] - mean[name]).norm() > 0.1 * (last[name] - clip.pretrained[name]).norm()


def test_wise_ft_goes_back_to_what_the_task_began_with(clip: CLIP, stream: Stream) -> None:
    method = Compose(learn=FineTune(iterations=0), fuse=Merge(alpha=0.25, towards="previous"))
    method.bind(clip, stream.context())
    bias, last, born = "text_model.final_layer_norm.bias", [], clip.pretrained
    for task in stream.tasks[:2]:
        method.start(task)
        before = clip.weights()
        clip.load_weights(f"tuned {task.name}", {**before, bias: before[bias] + 1})
        method.fuse(task)
        last.append(clip.weights()[bias] - born[bias])
    torch.testing.assert_close(last[0], torch.full_like(last[0], 0.25))
    torch.testing.assert_close(last[1], torch.full_like(last[1], 0.5))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"reference": "synthetic"}, "reference=synthetic.*no generator"),
        ({"reference": "no/such/folder"}, "no such folder.*synthetic, drawings, own"),
        ({"reference": ""}, "no such folder"),
        ({"reference": "drawings"}, "no drawings beside its tasks"),
        ({"reference": "own"}, "no vocabulary of its own"),
        ({"towers": "text", **LWF}, "embed_texts=student"),
        ({**LWF, "average": "moving", "moving_towards": "initial", "adapt": "lora"}, "adapters have no pre-trained"),
        ({**LWF, "average": "we", "average_every": 50, "iterations": 20}, "average_every=0, or lower"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(values: dict[str, Any], said: str, clip: CLIP) -> None:
    with pytest.raises(PerdureError, match=said):
        ZSCL(**values).bind(clip, Context())


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("zscl", "teacher=next", "initial"), ("lwf", "teacher_mix=1.5", "less than or equal to 1"),
        ("we", "wise_alpha=-0.1", "greater than or equal to 0"), ("wise_ft", "alpha=2", "less than or equal to 1"),
        ("wise_ft", "towards=last", "previous"), ("icarl", "herding=false", "release"), ("wc", "lam=-1", "greater"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(method: str, given: str, said: str) -> None:
    with pytest.raises(PerdureError, match=said):
        launch.configure(method, "mini-mtil", 0, [given], {})


@pytest.mark.parametrize("role", ["fuse", "answer"])
def test_a_way_to_learn_is_no_way_to_fuse_or_answer(role: str) -> None:
    for name in ("zscl", "codyra", "keep_lora", "td_vcl", "moe_adapters", "cpe_clip"):
        with pytest.raises(PerdureError, match=f"cannot be asked to {role}"):
            Compose(learn=FineTune(), **{role: launch.build(name, {})})


def test_what_is_protected_means_nothing_where_tasks_begin_from_the_first_weights() -> None:
    with pytest.raises(PerdureError, match="KeepLoRA goes on from .*; ConDU begins every task"):
        Compose(learn=launch.build("keep_lora", {}), fuse=ConDU())
    Compose(learn=launch.build("keep_lora", {}), fuse=Merge())


@pytest.mark.slow
def test_a_large_penalty_leaves_the_weights_where_they_were(clip: CLIP, stream: Stream) -> None:
    def moved(lam: float) -> float:
        clip.load_weights("pretrained", clip.pretrained)
        method = ZSCL(iterations=12, warmup=1, lr=1e-3, batch_size=8, sides="none", average="none", lam=lam)
        method.bind(clip, stream.context())
        learn(method, stream.tasks[0])
        return sum(float((w - clip.pretrained[k]).square().sum()) for k, w in clip.weights().items()) ** 0.5

    assert moved(1e4) < 0.3 * moved(0.0)


@pytest.mark.slow
def test_what_it_was_distilled_on_stands_in_the_record(short_run: Callable[..., dict[str, Any]]) -> None:
    drawn = short_run("zscl", synthetic=8, sampling_steps=2, sampling_batch=4, tasks=1)
    said = drawn["remarks"]["animals"]
    assert said == {"reference images, synthetic": 8.0, "reference texts, vocabulary": 400.0}
    pairs = drawn["folder"] / "pairs"
    again = short_run("gift", synthetic=8, sampling_steps=2, sampling_batch=4, tasks=1, pairs=str(pairs))
    assert again["finished"] and len((pairs / "manifest.jsonl").read_text().splitlines()) == 8  # GIFT's first pairs
    own = short_run("lwf", tasks=1)["remarks"]["animals"]
    assert own == {"reference images, own": float(SHORT["images"]), "reference texts, own": 16.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "values", [{"reference": "drawings"}, LWF, LWF_VR, {"icarl": True}], ids=["zscl", "lwf", "lwf_vr", "icarl"]
)
def test_distillation_alone_keeps_what_the_teacher_sees(values: dict[str, Any], clip: CLIP, stream: Stream) -> None:
    """Against the same steps in which it is only measured: closer to the teacher on its own references."""

    def ends(weight: float) -> float:
        clip.load_weights("pretrained", clip.pretrained)
        brief = dict(iterations=14, warmup=2, lr=1e-3, batch_size=16, reference_batch=32, distil=weight)
        rest = dict(teacher="initial", lam=0.0, average="none")
        method: Any = ICaRL(**brief) if "icarl" in values else ZSCL(**{**brief, **values, **rest})
        if "icarl" in values:
            method.state.memory = {stream.tasks[0].name: list(range(32))}
        method.bind(clip, stream.context())
        losses = learn(method, stream.tasks[1])
        return (losses["distil_image"][-1] + losses["distil_text"][-1]) / weight

    assert ends(1.0) < ends(1e-6) - 0.1


@pytest.mark.slow
def test_zscl_learns_and_keeps_what_fine_tuning_loses(short_run: Callable[..., dict[str, Any]]) -> None:
    brief = dict(tasks=3, images=128, iterations=24, warmup=3, lr=5e-4, batch_size=32)
    tuned = short_run("finetune", **brief)
    held = short_run("zscl", **brief, reference="drawings", reference_batch=32)
    assert held["accuracy"][2][1] > held["accuracy"][0][1] + 15  # digits are learned
    assert held["transfer"] > tuned["transfer"] + 3
    assert held["probe"][-1] > tuned["probe"][-1] + 8
