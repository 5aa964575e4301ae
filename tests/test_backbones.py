"""CLIP and its kin, from checkpoints in the form of real ones: they answer what plain transformers does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import MEAN, STD, WORDS, checkpoint, plain_logits
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, SiglipModel

from perdure.core.errors import PerdureError
from perdure.core.pixels import Fit
from perdure.data.task import Class
from perdure.engine.settings import check_same
from perdure.methods.finetune import FineTune
from perdure.methods.mg_clip import MGCLIP
from perdure.models import lora
from perdure.models.clip import CLIP
from perdure.models.siglip import SigLIP, SigLIP2
from perdure.models.towers import Towers
from perdure.ops.losses import pairwise

KINDS = {"clip": CLIP, "siglip": SigLIP, "siglip2": SigLIP2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small random checkpoint of each kind, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = checkpoint(tmp_path_factory.mktemp("tiny") / kind, kind)
        return made[kind]

    return folder


def some_images(count: int = 3, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_plain_transformers_before_and_after_saving(kind: str, folders: Any, tmp_path: Path) -> None:
    clip, images = CLIP.load(str(folders(kind))), some_images()
    towers: Towers = clip
    assert type(clip) is KINDS[kind] and (towers.bias is None) == (kind == "clip")
    with torch.no_grad():
        mine = clip.similarity(clip.encode_image(images), clip.encode_text(WORDS))
    torch.testing.assert_close(mine, plain_logits(folders(kind), images, WORDS), atol=2e-5, rtol=0)
    clip.save(tmp_path / "out")
    torch.testing.assert_close(mine, plain_logits(tmp_path / "out", images, WORDS), atol=2e-5, rtol=0)
    assert CLIP.load(str(tmp_path / "out")).described() == clip.described()
    fit = {"clip": Fit(), "siglip": Fit(False, "bilinear"), "siglip2": Fit(False, "bilinear")}[kind]
    activation = "quick_gelu" if kind == "clip" else "gelu_pytorch_tanh"
    assert clip.described() == {
        "kind": kind,
        "activation": {"image": activation, "text": activation},
        "preprocessing": {"side": 32, "mean": MEAN, "std": STD, **vars(fit)},
    }


def test_clip_s_real_tokenizer_and_what_is_cut_of_its_context(folders: Any) -> None:
    clip = CLIP.load(str(folders("clip")))
    assert clip.tokens(["a photo of a cat"]).tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    ids = clip.tokens(WORDS)
    full = F.pad(ids, (0, 77 - ids.shape[1]), value=clip.tokenizer.pad_token_id)
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_tokens(ids), clip.encode_tokens(full), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_siglip_s_texts_are_padded_whole_as_they_were_trained(kind: str, folders: Any) -> None:
    clip = CLIP.load(str(folders(kind)))
    model, tokenizer = AutoModel.from_pretrained(folders(kind)), AutoTokenizer.from_pretrained(folders(kind))
    ids = tokenizer(WORDS, padding="max_length", max_length=64, return_tensors="pt").input_ids
    assert torch.equal(clip.tokens(WORDS), ids) and ids.shape == (len(WORDS), 64)
    with torch.no_grad():
        theirs = F.normalize(model.get_text_features(ids).pooler_output, dim=-1)
        torch.testing.assert_close(clip.encode_text(WORDS), theirs, atol=1e-6, rtol=0)
        trimmed = clip.encode_tokens(tokenizer(WORDS, padding=True, return_tensors="pt").input_ids)
    assert (trimmed - theirs).abs().max() > 0.02  # a shorter text is another text
    with pytest.raises(PerdureError, match="tokens long; the text tower of .* reads 64"):
        clip.tokens(["a", "xyz " * 40])


def test_each_parameter_belongs_to_a_tower_or_to_the_logits(folders: Any) -> None:
    clip = CLIP.load(str(folders("siglip")))
    parts = {n: clip.part_of(n) for n, _ in clip.backbone.named_parameters()}
    assert {n for n, part in parts.items() if part == "scale"} == {"logit_scale", "logit_bias"}
    assert {n.split(".")[0] for n, part in parts.items() if part == "image"} == {"vision_model"}
    FineTune(towers="image").bind(clip)
    assert {parts[n] for n, p in clip.backbone.named_parameters() if p.requires_grad} == {"image"}


@pytest.mark.parametrize("kind", KINDS)
def test_patches_lie_where_the_picture_has_them(kind: str, folders: Any) -> None:
    """A picture that is another one in its lower right quarter alone: there its first block's patches differ most."""
    clip = CLIP.load(str(folders(kind)))
    one = some_images(1).expand(2, -1, -1, -1).clone()
    one[1, :, 16:, 16:] = 255 - one[1, :, 16:, 16:]
    seen = clip.features(one, block=2, grid=2).patches.unflatten(1, (-1, 2, 2))
    moved = (seen[0] - seen[1]).norm(dim=0)
    assert moved.argmax() == 3 and seen.shape[1:] == (32, 2, 2) and moved[1, 1] > 3 * moved[0, 0]


def test_adapters_act_in_every_layer_that_has_one(folders: Any, tmp_path: Path) -> None:
    clip, images = CLIP.load(str(folders("siglip"))), some_images()
    clip.adapt(rank=2, alpha=4.0, targets=("q_proj", "out_proj", "fc1"), towers="both", init="random")
    names = [name for name, _ in lora.adapters(clip.backbone)]
    assert (
        len(names) == 2 * 2 * 3 + 1 and "vision_model.head.mlp.fc1" in names
    )  # its attention would pass by an adapter
    clip.encode_image(images).sum().backward()
    factors = [p for n, p in clip.backbone.named_parameters() if "vision_model" in n and "lora_" in n]
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in factors)
    clip.save(tmp_path / "merged")
    with torch.no_grad():
        mine = clip.similarity(clip.encode_image(images), clip.encode_text(WORDS))
    torch.testing.assert_close(mine, plain_logits(tmp_path / "merged", images, WORDS), atol=5e-5, rtol=0)


def test_embeddings_are_not_rounded_under_autocast(folders: Any) -> None:
    clip = CLIP.load(str(folders("siglip")))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for found in (clip.encode_image(some_images()), clip.encode_text(WORDS)):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)), atol=1e-6, rtol=0)
        pooled = clip.pooled(clip.seen(some_images()))
    assert not torch.equal(pooled, pooled.bfloat16().float())


# ---- scores


def test_the_sigmoid_loss_is_siglip_s_own(folders: Any) -> None:
    model, clip = SiglipModel.from_pretrained(folders("siglip")).eval(), CLIP.load(str(folders("siglip")))
    images, ids = some_images(5), clip.tokens(WORDS)
    with torch.no_grad():
        theirs = model(input_ids=ids, pixel_values=clip.pixels(images), return_loss=True).loss
        logits = clip.similarity(clip.encode_image(images), clip.encode_tokens(ids))
    torch.testing.assert_close(pairwise(logits, torch.arange(5)), theirs, atol=1e-5, rtol=0)
    assert torch.equal(clip.probabilities(logits, "sigmoid"), logits.sigmoid())
    torch.testing.assert_close(clip.probabilities(logits), (logits + 7).softmax(1))  # the bias cancels there


def test_only_the_group_s_classes_are_paired_and_smoothing_spreads_over_them() -> None:
    logits, labels = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 4])
    group = torch.tensor([0, 0, 1, 1, 1])
    by_hand = []
    for row, label in zip(logits, labels.tolist(), strict=True):
        own = [k for k in range(5) if group[k] == group[label]]
        targets = torch.tensor([0.1 / len(own) + 0.9 * (k == label) for k in own])
        by_hand.append(-(targets * F.logsigmoid(row[own]) + (1 - targets) * F.logsigmoid(-row[own])).sum())
    torch.testing.assert_close(pairwise(logits, labels, 0.1, group), torch.stack(by_hand).mean())


def test_sigmoids_are_for_models_with_a_bias(clip: CLIP, folders: Any) -> None:
    with pytest.raises(PerdureError, match="loss=sigmoid: .* is a 'clip' model, whose logits have no bias"):
        FineTune(loss="sigmoid").bind(clip)
    with pytest.raises(PerdureError, match="sigmoid scores: .* is a 'clip' model"):
        clip.probabilities(torch.zeros(1, 2), "sigmoid")
    FineTune(loss="sigmoid").bind(CLIP.load(str(folders("siglip"))))


def test_the_gap_that_decides_on_epochs_knows_no_bias(folders: Any) -> None:
    clip = CLIP.load(str(folders("siglip")))
    method = MGCLIP()
    method.bind(clip)
    classes = tuple(Class(word, ("{}",)) for word in WORDS)
    before = method.means(some_images(5), torch.arange(5), classes)
    with torch.no_grad():
        clip.backbone.logit_bias.fill_(-50.0)
    assert method.means(some_images(5), torch.arange(5), classes) == pytest.approx(before, abs=1e-4)


# ---- what is refused


def spoilt(folder: Path, out: Path, **processor: Any) -> str:
    shutil.copytree(folder, out)
    path = out / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **processor}))
    return str(out)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"resample": 0}, "resample=0"),
        ({"size": {"height": 64, "width": 64}}, "size={'height': 64"),
        ({"size": {"shortest_edge": 32}}, "do_center_crop=False"),
        ({"size": 24, "do_center_crop": True}, "size={'shortest_edge': 24}"),
        ({"size": 40, "do_center_crop": True, "crop_size": 40}, "crop_size=40"),
        ({"do_rescale": False}, "do_rescale=False"),
        ({"rescale_factor": 1.0}, r"rescale_factor=1\.0"),
    ],
)
def test_preprocessing_that_is_not_done_here_is_said(
    values: dict[str, Any], said: str, folders: Any, tmp_path: Path
) -> None:
    with pytest.raises(PerdureError, match=f"The preprocessing of .* says {said}.*which is not done here"):
        CLIP.load(spoilt(folders("siglip"), tmp_path / "odd", **values))


def test_another_model_under_a_run_is_refused_with_both_named(folders: Any, tmp_path: Path) -> None:
    clip, other = CLIP.load(str(folders("siglip"))), CLIP.load(str(folders("clip")))
    config = {"weights": clip.fingerprint(), "backbone": json.loads(json.dumps(clip.described()))}
    check_same(clip, config)
    with pytest.raises(PerdureError, match="it is a 'clip' of fingerprint .*the run's a 'siglip' of"):
        check_same(other, config)
    squashed = CLIP.load(spoilt(folders("siglip"), tmp_path / "other", resample=3))
    with pytest.raises(PerdureError, match="has the weights that the run began with, but another preprocessing"):
        check_same(squashed, config)
    assert squashed.fit == replace(clip.fit, resample="bicubic")


def test_an_open_clip_folder_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(PerdureError, match=r"holds an open_clip checkpoint .* its transformers conversion"):
        CLIP.load(str(tmp_path))


def test_of_a_pickle_tensors_alone_are_read(folders: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("siglip"), tmp_path / "older"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert CLIP.load(str(folder)).fingerprint() == CLIP.load(str(folders("siglip"))).fingerprint()
    torch.save({**weights, "logit_scale": print}, folder / "pytorch_model.bin")
    with pytest.raises(PerdureError, match="holds more than tensors, which is not read"):
        CLIP.load(str(folder))
