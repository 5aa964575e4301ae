"""Checkpoints found and read: one clear sentence where a name, a folder or what is in it will not do."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from perdure.core.errors import PerdureError
from perdure.core.paths import expanded

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WANTED = "Give a folder or a Hub id that transformers' CLIPModel.from_pretrained loads."
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)  # what transformers raises


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies: a folder, or a Hub id at a commit."""

    path: str
    revision: str | None = None


def locate(path: str) -> Place:
    """Find a checkpoint by its configuration file alone; the network is asked only for names like ``owner/name``."""
    folder = expanded(path)
    if path and folder.is_dir():
        check_kind(path, folder / "config.json")
        return Place(str(folder))
    if not HUB_ID.fullmatch(path):
        raise PerdureError(f"No CLIP model could be loaded from '{path}': there is no such folder. {WANTED}")
    found = cached(path, "config.json") or fetched(path)
    check_kind(path, found)
    return Place(path, found.parent.name)


def cached(name: str, file: str) -> Path | None:
    """A file of a Hub id that lies in the cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def fetched(name: str) -> Path:
    """The configuration of a Hub id, from the network, asked once."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise PerdureError(
            f"No CLIP model could be loaded from '{name}': it is no folder, it is not in the cache, and HF_HUB_OFFLINE "
            f"forbids to ask the Hub. {WANTED}"
        )
    failures: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *unreachable())
    try:
        get_hf_file_metadata(
            hf_hub_url(name, "config.json"), timeout=3
        )  # a download would try a dead line again and again
        return Path(hf_hub_download(name, "config.json", etag_timeout=3))
    except failures as error:
        reason = type(error).__name__
        raise PerdureError(
            f"No CLIP model could be loaded from '{name}': it is no folder, it is not in the cache, and the Hub did not give "
            f"it ({reason}). Check the name and the connection. {WANTED}"
        ) from error


def unreachable() -> tuple[type[Exception], ...]:
    """What the Hub's client raises where there is no connection: another library's error in each of its versions."""
    import importlib

    kinds = []
    for name in ("httpx", "httpx2", "requests"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            kinds.append(module.RequestException if name == "requests" else module.HTTPError)
    return tuple(kinds)


def check_kind(path: str, config: Path) -> None:
    """Refuse what its configuration says is no CLIP."""
    try:
        about = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = "it has no config.json" if isinstance(error, OSError) else f"its config.json is damaged ({error})"
        raise PerdureError(f"No CLIP model could be loaded from '{path}': {reason}. {WANTED}") from None
    kind = about.get("model_type") if isinstance(about, dict) else None
    if kind != "clip":
        raise PerdureError(
            f"No CLIP model could be loaded from '{path}': its config.json says it is a '{kind}' model, and a 'clip' is read "
            f"here. {WANTED}"
        )


def backbone(place: Place) -> Any:
    """The ``CLIPModel`` in fp32, whole and finite."""
    from transformers import CLIPModel

    try:
        found, about = CLIPModel.from_pretrained(
            place.path, revision=place.revision, dtype=torch.float32, weights_only=True, output_loading_info=True
        )  # safetensors where there are any; of older files tensors alone are read, no code is run
    except UNREADABLE as error:
        raise unloadable(place, error) from error
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


def tokenizer(place: Place) -> Any:
    """The tokenizer beside the model."""
    from transformers import AutoTokenizer

    try:
        known = any(
            beside(place, name) for name in ("tokenizer.json", "vocab.json")
        )  # else an empty one may be made up
        found = AutoTokenizer.from_pretrained(place.path, revision=place.revision) if known else None
    except UNREADABLE as error:
        raise no_tokenizer(place, str(error).strip().split("\n")[0]) from error
    if found is None:
        raise no_tokenizer(place, "there are no files of one")
    if found.eos_token_id is None:
        raise PerdureError(f"The tokenizer of '{place.path}' has no end token, and CLIP's text is read there.")
    return found


def no_tokenizer(place: Place, reason: str) -> PerdureError:
    return PerdureError(
        f"The CLIP at '{place.path}' has no tokenizer that can be read ({reason}). Put the files of its tokenizer beside it "
        "(tokenizer.json, or vocab.json and merges.txt)."
    )


def unloadable(place: Place, error: Exception) -> PerdureError:
    """One sentence for whatever transformers says."""
    reason = str(error).strip().split("\n")[0]
    return PerdureError(f"No CLIP model could be loaded from '{place.path}': {reason} {WANTED}")


def preprocessing(place: Place) -> tuple[Sequence[float], Sequence[float], str]:
    """Mean and standard deviation of the pixels, from the model's preprocessor file; CLIP's own where it has none, and then
    a note that says so.

    transformers 5 writes those of a processor into ``processor_config.json``, under ``image_processor``.
    """
    about: dict[str, Any] = {}
    for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", "")):
        content = said_of(place, name)
        about |= content.get(part) or {} if part else content
    found = about.get("image_mean"), about.get("image_std")
    if found == (None, None):
        note = f"The CLIP at '{place.path}' does not say how its images are prepared; OpenAI's mean and deviation are taken."
        return OPENAI_MEAN, OPENAI_STD, note
    for values in found:
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(x, float | int) for x in values):
            raise PerdureError(
                f"The preprocessing of '{place.path}' is damaged: image_mean and image_std must be three numbers each, not "
                f"{found[0]} and {found[1]}."
            )
    return *found, ""  # type: ignore[return-value]


def said_of(place: Place, name: str) -> dict[str, Any]:
    """What a JSON file beside the model holds; nothing where there is none."""
    found = beside(place, name)
    try:
        content = json.loads(found.read_text(encoding="utf-8")) if found else {}
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PerdureError(f"{name} of the CLIP at '{place.path}' is damaged: {error}.") from None
    return content if isinstance(content, dict) else {}


def beside(place: Place, name: str) -> Path | None:
    """A file of the checkpoint, where it has one."""
    from transformers.utils import cached_file

    try:
        found = cached_file(place.path, name, revision=place.revision, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return Path(found) if found else None


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
