"""Checkpoints: found, read and refused in one sentence; written so that they load anywhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, same_bits
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPProcessor

import perdure
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.core.precision import precision_of
from perdure.engine.settings import hand_over, load_clip
from perdure.engine.watcher import Watcher
from perdure.models import loading
from perdure.models.clip import CLIP
from perdure.models.towers import Towers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The small model, to spoil."""
    return Path(shutil.copytree(mini.MODEL, tmp_path / "clip"))


def without(folder: Path, *patterns: str) -> Path:
    for path in [p for pattern in patterns for p in folder.glob(pattern)]:
        path.unlink()
    return folder


def test_clip_is_two_towers(clip: CLIP) -> None:
    towers: Towers = clip
    assert towers.bias is None and float(towers.scale.detach()) > 1
    parts: dict[str, set[str]] = {"image": set(), "text": set(), "scale": set()}
    clip.adapt(rank=2, alpha=2.0, targets=("q_proj",), towers="both")
    for name, _ in clip.backbone.named_parameters():
        parts[clip.part_of(name)].add(name.split(".")[0])
    assert parts == {
        "image": {"vision_model", "visual_projection"},
        "text": {"text_model", "text_projection"},
        "scale": {"logit_scale"},
    }


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c", "open ai/clip", ""])
def test_names_of_no_folder_never_ask_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: pytest.fail("asked the network"))
    with pytest.raises(PerdureError, match="No CLIP model could be loaded.*there is no such folder"):
        CLIP.load(name)


def test_a_hub_id_without_a_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    asked: list[Any] = []

    def no_network(*where: Any, **_: Any) -> None:
        asked.append(where)
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    with pytest.raises(PerdureError, match="'some/clip-b16'.*the Hub did not give it"):
        CLIP.load("some/clip-b16")
    assert len(asked) <= 2  # one try looks the name up twice; retries would be many
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked.clear()
    with pytest.raises(PerdureError, match="HF_HUB_OFFLINE forbids"):
        CLIP.load("some/clip-b16")
    assert not asked and capfd.readouterr() == ("", "")


def test_another_architecture_is_named(folder: Path, capfd: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "blip"}))
    with pytest.raises(
        PerdureError, match="says it is a 'blip' model, and what is read here is 'clip', 'siglip', 'siglip2'"
    ):
        CLIP.load(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(PerdureError, match=r"its config\.json is damaged"):
        CLIP.load(str(folder))
    without(folder, "config.json")
    with pytest.raises(PerdureError, match=r"it has no config\.json"):
        CLIP.load(str(folder))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(folder: Path, value: float) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["visual_projection.weight"][0, 0] = value
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(PerdureError, match=r"'visual_projection\.weight' that are no numbers"):
        CLIP.load(str(folder))


def test_a_tower_that_is_missing_is_named(folder: Path, capfd: Any) -> None:
    path = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if not n.startswith("text_")}, path, {"format": "pt"})
    with pytest.raises(PerdureError, match=r"is no CLIP model: it lacks text_model"):
        CLIP.load(str(folder))
    without(folder, "*.safetensors")
    with pytest.raises(PerdureError, match="No CLIP model could be loaded"):
        CLIP.load(str(folder))
    assert capfd.readouterr() == ("", "")


def test_a_model_without_its_tokenizer(folder: Path) -> None:
    without(folder, "*token*", "vocab*", "merges*", "special*")
    with pytest.raises(PerdureError, match="has no tokenizer that can be read.*tokenizer.json"):
        CLIP.load(str(folder))


def test_a_tokenizer_that_adds_no_end_token_is_refused(clip: CLIP) -> None:
    class Bare:
        eos_token_id = 4095

        def __call__(self, texts: list[str], **_: object) -> Any:
            return type("Encoded", (), {"input_ids": torch.tensor([[1, 2, 3]] * len(texts))})

    clip.tokenizer = Bare()
    with pytest.raises(PerdureError, match="puts no end token after 'a cat'"):
        clip.tokens(["a cat"])


def test_without_preprocessing_openai_s_is_taken_said_and_written(folder: Path, tmp_path: Path) -> None:
    clip = CLIP.load(str(without(folder, "*processor_config.json")))
    assert "OpenAI's mean" in clip.note and not CLIP.load(str(mini.MODEL)).note
    assert clip.mean.flatten().tolist() == pytest.approx(list(loading.OPENAI_MEAN))
    clip.save(tmp_path / "out")
    again = CLIP.load(str(tmp_path / "out"))
    assert not again.note and torch.equal(again.mean, clip.mean) and torch.equal(again.std, clip.std)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.crop_size["height"] == clip.size


def test_preprocessing_inside_a_processor_is_read(folder: Path, tmp_path: Path) -> None:
    """As transformers 5 writes it; with values that are no default of anything."""
    images = AutoImageProcessor.from_pretrained(folder, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    processor = CLIPProcessor(images, AutoTokenizer.from_pretrained(folder))
    processor.save_pretrained(without(folder, "*processor_config.json"))
    assert (folder / "processor_config.json").exists()
    clip = CLIP.load(str(folder))
    assert clip.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert clip.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.parametrize(
    "content", ["{", '{"image_mean": [0.5], "image_std": [0.5, 0.5, 0.5]}', '{"image_mean": "0.5"}']
)
def test_damaged_preprocessing_is_said(folder: Path, content: str) -> None:
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(PerdureError, match="is damaged"):
        CLIP.load(str(folder))


def test_what_cannot_be_saved_is_refused_before_anything_is_written(clip: CLIP, tmp_path: Path) -> None:
    clip.tokenizer = object()
    with pytest.raises(PerdureError, match="tokenizer .* cannot be saved"):
        clip.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bf16_that_is_emulated_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert precision_of("auto", "cuda") == "fp16" and precision_of("bf16", "cuda") == "bf16"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zscl", "finetune"])
def test_before_the_first_step_a_model_is_read_once(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, steps, load = list[str](), list[int](), loading.backbone

    def counted(place: Any) -> Any:
        read.append(place.path)
        return load(place)

    class Counted(Watcher):
        def step(self, *heard: Any) -> None:
            steps.append(len(read))

    monkeypatch.setattr(loading, "backbone", counted)
    values = {**SHORT, "tasks": 1, **({"reference": "drawings", "reference_batch": 4} if method == "zscl" else {})}
    perdure.run(method, "mini-mtil", tmp_path / "run", watcher=Counted(), **values)
    assert read and set(steps) == {1}


def test_what_is_kept_of_the_pretrained_weights_is_not_what_was_learned_since(clip: CLIP, tmp_path: Path) -> None:
    born = {name: tensor.clone() for name, tensor in clip.plain().items()}
    clip.fingerprint()
    with torch.no_grad():  # as a step does, before training is over
        clip.plain()["visual_projection.weight"].add_(1)
    assert same_bits(clip.pretrained, born)


def test_a_model_that_was_handed_over_is_taken_once_and_only_as_it_lies_there(tmp_path: Path) -> None:
    place = shutil.copytree(mini.MODEL, tmp_path / "clip")
    config = {"settings": {"model": str(place), "device": "cpu", "evaluation_batch": 16}}
    first = load_clip(config, "")
    hand_over(first, config, "")
    assert load_clip(config, "") is first and load_clip(config, "") is not first
    hand_over(first, config, "")
    assert load_clip({"settings": {"model": str(place), "device": "cpu"}}, "") is not first
    hand_over(first, config, "")
    (place / "model.safetensors").touch()
    assert load_clip(config, "") is not first
