"""Checkpoints read: one clear sentence where what lies in a folder will not do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from perdure.core.errors import PerdureError
from perdure.core.pixels import CENTRE, Fit, Resample
from perdure.models.hub import KINDS, TOKENIZERS, Place, refused

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)  # what transformers raises
RESAMPLE: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which processors are written with
NUMBER = {name: number for number, name in RESAMPLE.items()}


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become a vision tower's input: made a square (``fit``), then (x - mean) / std, a channel, of x in 0 … 1."""

    mean: Sequence[float] = OPENAI_MEAN
    std: Sequence[float] = OPENAI_STD
    fit: Fit = CENTRE


# ---- the model


def backbone(place: Place) -> Any:
    """The model in fp32, whole and finite."""
    import transformers

    try:
        found, about = getattr(transformers, KINDS[place.kind]).from_pretrained(
            place.folder, dtype=torch.float32, weights_only=True, local_files_only=True, output_loading_info=True
        )  # safetensors where there are any; of older files (pickles) tensors alone are read, no code is run
    except (UnpicklingError, EOFError) as error:
        raise refused(
            place.path, "its pytorch_model.bin is damaged, or holds more than tensors, which is not read"
        ) from error
    except UNREADABLE as error:
        raise refused(place.path, str(error).strip().split("\n")[0]) from error
    if about["missing_keys"]:
        raise PerdureError(
            f"'{place.path}' is no CLIP model: it lacks {sorted(about['missing_keys'])[0]} and perhaps others."
        )
    check_finite(found, place)
    return found


def check_finite(model: nn.Module, place: Place) -> None:
    """Refuse weights that are no numbers."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PerdureError(
                f"The CLIP at '{place.path}' holds values in '{name}' that are no numbers (NaN or infinite): nothing could "
                "be learned or answered with it. Load it from where it was sound."
            )


# ---- the tokenizer


def tokenizer(place: Place) -> Any:
    """The tokenizer beside the model."""
    from transformers import AutoTokenizer

    if not any((place.folder / name).exists() for name in TOKENIZERS):  # else an empty one may be made up
        raise no_tokenizer(place, "there are no files of one")
    try:
        return AutoTokenizer.from_pretrained(place.folder, local_files_only=True)
    except ImportError as error:
        raise PerdureError(
            f"The tokenizer of '{place.path}' needs packages that are not installed: pip install sentencepiece protobuf."
        ) from error
    except UNREADABLE as error:
        raise no_tokenizer(place, str(error).strip().split("\n")[0]) from error


def no_tokenizer(place: Place, reason: str) -> PerdureError:
    return PerdureError(
        f"The CLIP at '{place.path}' has no tokenizer that can be read ({reason}). Put the files of its tokenizer beside it "
        "(tokenizer.json, or vocab.json and merges.txt)."
    )


# ---- the preprocessing


def preprocessing(place: Place, usual: Preprocessing, side: int) -> tuple[Preprocessing, str]:
    """How pictures are prepared for a tower that sees ``side`` pixels a side, from the model's preprocessor file; what is
    ``usual`` for its kind where it has none, and then a note that says so.

    transformers 5 writes those of a processor into ``processor_config.json``, under ``image_processor``.
    """
    about = {
        **(said_in(place, "processor_config.json").get("image_processor") or {}),
        **said_in(place, "preprocessor_config.json"),
    }
    found = about.get("image_mean"), about.get("image_std")
    if found == (None, None):
        whose = "OpenAI's" if usual.mean == OPENAI_MEAN else "SigLIP's"
        note = f"The CLIP at '{place.path}' does not say how its images are prepared; {whose} mean and deviation are taken."
        return Preprocessing(usual.mean, usual.std, fit_of(place, about, usual.fit, side)), note
    for values in found:
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(x, float | int) for x in values):
            raise PerdureError(
                f"The preprocessing of '{place.path}' is damaged: image_mean and image_std must be three numbers each, not "
                f"{found[0]} and {found[1]}."
            )
    mean, std = found if about.get("do_normalize", True) else ((0.0,) * 3, (1.0,) * 3)
    return Preprocessing(tuple(mean), tuple(std), fit_of(place, about, usual.fit, side)), ""  # type: ignore[arg-type]


def fit_of(place: Place, about: dict[str, Any], usual: Fit, side: int) -> Fit:
    """How its processor makes a square of a picture. Refused where it does otherwise than ``Fit`` can say, or makes a square
    of another size than the tower sees."""
    number, size = about.get("resample"), about.get("size")
    resample = usual.resample if number is None else RESAMPLE.get(number)
    size = {"shortest_edge": size} if isinstance(size, int) else size or {}
    edge, cut = size.get("shortest_edge", None if size or not usual.crop else side), about.get("crop_size")
    cut = cut.get("height") if isinstance(cut, dict) else cut
    cuts = usual.crop if about.get("do_center_crop") is None else bool(about["do_center_crop"])
    odd = [
        ("resample", number, resample is None),
        ("size", size, bool(size) and edge is None and not size.get("height") == size.get("width") == side),
        ("do_center_crop", cuts, edge is not None and not cuts),
        ("crop_size", cut, cuts and cut not in (None, side)),
        ("size", size, edge is not None and edge < side),
        ("do_resize", False, about.get("do_resize") is False),
        ("do_rescale", False, about.get("do_rescale") is False),
        ("rescale_factor", about.get("rescale_factor"), abs((about.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-3),
    ]
    for key, value, wrong in odd:
        if wrong:
            raise PerdureError(
                f"The preprocessing of '{place.path}' says {key}={value}, which is not done here: pictures are resized "
                f"(resample 2, bilinear, or 3, bicubic), the whole or its centre, to the {side} pixels a side that the tower "
                "sees, and divided by 255."
            )
    assert resample is not None
    return Fit(edge is not None, resample, 0 if edge in (None, side) else edge)


def said_in(place: Place, name: str) -> dict[str, Any]:
    """What a JSON file beside the model holds; nothing where there is none."""
    path = place.folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PerdureError(f"{name} of the CLIP at '{place.path}' is damaged: {error}.") from None
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no tables of transformers: perdure says what there is to say."""
    from transformers.utils import logging

    was, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if was:
            logging.enable_progress_bar()
