"""The towers over transformers: exact shortcuts, plain checkpoints, adapters."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.models.clip import CLIP

PROMPTS = ["an icon of a cat", "the letter q", "a drawing of hot air balloon over the mountains at night", "sun"]


def test_trimmed_context_changes_nothing(clip: CLIP) -> None:
    context = clip.backbone.config.text_config.max_position_embeddings
    trimmed = clip.tokens(PROMPTS)
    full = F.pad(trimmed, (0, context - trimmed.shape[1]), value=clip.backbone.config.text_config.pad_token_id)
    assert trimmed.shape[1] < context == full.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_tokens(trimmed), clip.encode_tokens(full), atol=1e-6, rtol=0)


def test_tokens_after_the_end_change_nothing_whatever_they_are(clip: CLIP) -> None:
    trimmed = clip.tokens(PROMPTS)
    context = clip.backbone.config.text_config.max_position_embeddings
    junk = torch.randint(
        5, 4000, (len(trimmed), context - trimmed.shape[1]), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        other = clip.encode_tokens(torch.cat([trimmed, junk], 1))
        torch.testing.assert_close(clip.encode_tokens(trimmed), other, atol=1e-6, rtol=0)


def test_agrees_with_plain_transformers(clip: CLIP) -> None:
    """The shipped folder through transformers alone: processor, tokenizer with full padding, CLIPModel."""
    images = mini.multi_domain("I").tasks[0].test.pixels[:16]
    model = CLIPModel.from_pretrained(mini.MODEL, dtype=torch.float32).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(mini.MODEL), AutoTokenizer.from_pretrained(mini.MODEL)
    text = tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        plain = model(input_ids=text, pixel_values=processor(list(images), return_tensors="pt").pixel_values)
        ours = clip.scale * clip.encode_image(images) @ clip.encode_text(PROMPTS).T
    torch.testing.assert_close(ours, plain.logits_per_image, atol=2e-4, rtol=0)


def test_class_texts_average_templates_and_follow_the_weights(clip: CLIP) -> None:
    classes = [["a drawing of a cat", "an icon of a cat"], ["the sun"]]
    with torch.no_grad():
        texts = clip.class_texts(classes)
        by_hand = F.normalize(clip.encode_text(["a drawing of a cat", "an icon of a cat"]).mean(0), dim=-1)
        torch.testing.assert_close(texts[0], by_hand)
        assert clip.class_texts(classes) is texts  # kept while the weights stay
        other = {k: v + 0.01 for k, v in clip.weights().items() if v.is_floating_point()}
        clip.load_weights("other", other)
        assert not torch.allclose(clip.class_texts(classes), texts)
        clip.load_weights("pretrained", clip.pretrained)
        assert torch.equal(clip.class_texts(classes), texts)


def test_adapters_start_silent_merge_and_save(clip: CLIP, tmp_path: Path) -> None:
    images = mini.multi_domain("I").tasks[0].test.pixels[:8]
    with torch.no_grad():
        before = clip.encode_image(images)
        clip.adapt(rank=4, alpha=8.0, targets=("k_proj", "v_proj"), towers="image")
        assert torch.equal(clip.encode_image(images), before)
        trained = [n for n, p in clip.backbone.named_parameters() if p.requires_grad]
        assert trained and all(
            "lora_" in n and "vision_model" in n and ("k_proj" in n or "v_proj" in n) for n in trained
        )
        for name, parameter in clip.backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        after = clip.encode_image(images)
        assert not torch.allclose(after, before, atol=1e-2)
        clip.save(tmp_path / "plain")
        torch.testing.assert_close(CLIP.load(str(tmp_path / "plain")).encode_image(images), after, atol=1e-5, rtol=0)


def test_adapters_need_layers(clip: CLIP) -> None:
    with pytest.raises(PerdureError, match="nowhere"):
        clip.adapt(rank=4, alpha=8.0, targets=("nowhere",), towers="both")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match="No CLIP model could be loaded"):
        CLIP.load(str(tmp_path))


def test_other_image_sizes_are_resized(clip: CLIP) -> None:
    images = torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8)
    assert clip.pixels(images).shape == (2, 3, clip.size, clip.size)
