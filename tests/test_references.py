"""Reference images and texts: every kind, and those that are refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.data.task import Stream
from perdure.methods.zscl import ZSCL
from perdure.models.clip import CLIP
from perdure.synthesis.reference import Reference, ReferenceRecipe, random_sentences


def folder_of(base: Path, stream: Stream) -> Path:
    """A few pictures, a folder a class."""
    task = stream.tasks[0]
    for k in range(0, 48, 6):
        name = task.classes[int(task.train.labels[k])].name
        (base / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(task.train.pixels[k].permute(1, 2, 0).numpy()).save(base / name / f"{k}.png")
    return base


def test_every_kind_of_reference(clip: CLIP, stream: Stream, tmp_path: Path) -> None:
    task, context = stream.tasks[1], stream.context()
    base = folder_of(tmp_path / "pictures", stream)

    def found(**values: Any) -> tuple[Any, Tensor, Reference]:
        made = Reference(ReferenceRecipe(**values), context, clip)
        return made.pixels(task), made.texts(task), made

    pixels, texts, made = found(reference="drawings")
    assert len(pixels) == 1853 and torch.equal(texts, clip.tokens([c.prompts()[0] for c in mini.vocabulary()]))
    assert made.pixels(stream.tasks[0]) is pixels and made.texts(stream.tasks[0]) is texts  # as the shortcuts need it
    assert len(found(reference="drawings", texts="reference")[1]) == 60  # the classes of mini-cil
    pixels, texts, _ = found(reference=str(base), texts="reference")
    assert len(pixels) == 8 and pixels[torch.tensor([0, 1])].shape == (2, 3, 32, 32)
    names = sorted(p.name for p in base.iterdir())
    assert len(names) > 1 and torch.equal(texts, clip.tokens([f"a photo of a {n}." for n in names]))
    for kind in ("own", "reference"):
        pixels, texts, made = found(reference="own", texts=kind)
        assert pixels is task.train.pixels and torch.equal(texts, clip.tokens(task.prompts()))
    (tmp_path / "captions.txt").write_text("a bird on a wire\n\ntwo boats\n")
    _, texts, _ = found(reference="drawings", vocabulary=str(tmp_path / "captions.txt"))
    assert torch.equal(texts, clip.tokens(["a bird on a wire", "two boats"]))


def test_random_sentences_are_start_ten_of_all_tokens_end(clip: CLIP, stream: Stream) -> None:
    ids = random_sentences(clip, 1000, 3)
    assert ids.shape == (1000, 12)
    assert bool((ids[:, 0] == clip.tokenizer.bos_token_id).all() and (ids[:, -1] == clip.tokenizer.eos_token_id).all())
    inside = ids[:, 1:-1]
    assert int(inside.min()) < 10 and int(inside.max()) > 4085 and abs(float(inside.double().mean()) - 2047.5) < 60
    assert torch.equal(ids, random_sentences(clip, 1000, 3)) and not torch.equal(ids, random_sentences(clip, 1000, 4))
    made = Reference(ReferenceRecipe(reference="own", texts="random", sentences=5), stream.context(), clip)
    first, second = (made.texts(task) for task in stream.tasks[:2])
    assert len(first) == 5 and not torch.equal(first, second)  # drawn once a task
    cut = ids[:1].clone()
    cut[0, 4] = clip.tokenizer.eos_token_id
    torch.testing.assert_close(
        clip.encode_tokens(cut), clip.encode_tokens(cut[:, :5])
    )  # it ends at the first end token


def test_a_folder_without_pictures_or_classes_is_refused(clip: CLIP, stream: Stream, tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match="holds no picture"):
        ZSCL(reference=str(tmp_path)).bind(clip, stream.context())
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    ZSCL(reference=str(tmp_path)).bind(clip, stream.context())
    with pytest.raises(PerdureError, match="in no folders of classes"):
        ZSCL(reference=str(tmp_path), texts="reference").bind(clip, stream.context())
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(PerdureError, match="cannot be read.*b.png"):
        ZSCL(reference=str(tmp_path)).bind(clip, stream.context())
