"""What weights that never change make of images and texts is worked out once; everything else is asked anew."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import perdure
from perdure.benchmarks import mini
from perdure.core.features import Memory
from perdure.core.packing import Frozen
from perdure.data.task import Stream
from perdure.models.clip import CLIP


@pytest.mark.slow
def test_what_unchanged_weights_make_of_the_stream_is_worked_out_once_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    prepare = CLIP.pixels

    def counted(self: CLIP, images: Tensor) -> Tensor:
        seen[self.holds] = seen.get(self.holds, 0) + len(images)
        return prepare(self, images)

    monkeypatch.setattr(CLIP, "pixels", counted)
    values = dict(tasks=3, images=24, features=64)
    metrics = perdure.run("ridge", "mini-mtil", tmp_path / "once", **values)  # type: ignore[arg-type]
    asked = mini.multi_domain("I").shortened(3, 24)
    assert asked.probe is not None
    once = sum(len(t.test) + len(t.train) for t in asked.tasks) + len(
        asked.probe.test
    )  # the gap's images are the probe's
    assert seen == {"pretrained": once}

    monkeypatch.setattr(Memory, "recall", lambda self, question, about, compute: compute())
    anew = perdure.run("ridge", "mini-mtil", tmp_path / "anew", **values)  # type: ignore[arg-type]
    assert seen["pretrained"] > 2 * once
    for key in ("accuracy", "probe", "gap", "remarks"):
        assert anew[key] == metrics[key]


def test_weights_that_may_change_and_modules_are_asked_anew(clip: CLIP, stream: Stream) -> None:
    pixels = stream.tasks[0].test.pixels
    with clip.remembering():
        first = clip.embeddings(pixels)
        assert clip.embeddings(pixels) is first
        with torch.no_grad():
            clip.backbone.visual_projection.weight.mul_(-1)
        clip.trained("trained once")
        other = clip.embeddings(pixels)
        assert torch.allclose(other, -first) and clip.embeddings(pixels) is not other
        clip.load_weights("pretrained", clip.pretrained)
        assert clip.embeddings(pixels) is first
        kept = Frozen(clip.weights())
        clip.load_weights("an expert", kept)
        assert clip.embeddings(pixels) is not first and clip.embeddings(pixels) is clip.embeddings(pixels)
    assert clip.embeddings(pixels) is not clip.embeddings(pixels)


def test_what_is_remembered_has_an_end() -> None:
    memory, made = Memory(most=100), []

    def ask(question: str) -> Tensor:
        return memory.recall(question, None, lambda: made.append(question) or torch.zeros(10))  # type: ignore[func-returns-value]

    for question in ("a", "b", "b", "c", "a"):  # 40 bytes each: two are kept
        ask(question)
    assert made == ["a", "b", "c", "a"]
