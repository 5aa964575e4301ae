"""Where a checkpoint lies: a folder, or a Hub id that is brought into one. The network is asked for such ids alone."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from perdure.core.errors import PerdureError
from perdure.core.paths import expanded

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
KINDS = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}  # model_type → transformers' class
WANTED = f"Give a folder or a Hub id that transformers' {', '.join(KINDS.values())} load with from_pretrained."
FILES, OLDER = ("*.json", "*.txt", "*.model", "model*.safetensors"), ("pytorch_model*",)
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
OPEN_CLIP = ("open_clip_config.json", "open_clip_pytorch_model.bin", "open_clip_model.safetensors")


@dataclass(frozen=True)
class Place:
    """A checkpoint's name as it was given, the folder its files lie in, its architecture, and of a Hub id the commit."""

    path: str
    folder: Path
    kind: str
    revision: str = ""


def locate(path: str) -> Place:
    """Find a checkpoint. ``PerdureError`` where there is none, or none of an architecture that is read here."""
    folder = expanded(path)
    if path and folder.is_dir():
        return Place(str(folder), folder, kind_of(path, folder))
    if not HUB_ID.fullmatch(path):
        raise refused(path, "there is no such folder")
    folder = snapshot(path)
    return Place(path, folder, kind_of(path, folder), folder.name)


def stamp(folder: Path) -> list[tuple[str, int, int]]:
    """What tells whether a checkpoint's files are still those that were read: names, sizes, when they were changed."""
    found = [(path.name, path.stat()) for path in sorted(folder.glob("*")) if path.is_file()]
    return [(name, about.st_size, about.st_mtime_ns) for name, about in found]


def refused(path: str, reason: str) -> PerdureError:
    return PerdureError(f"No CLIP model could be loaded from '{path}': {reason}. {WANTED}")


def kind_of(path: str, folder: Path) -> str:
    """The architecture, by the configuration file alone; refused where it is none of ``KINDS``."""
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        if any((folder / name).exists() for name in OPEN_CLIP):
            raise refused(path, open_clip("it holds")) from None
        raise refused(path, "it has no config.json") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise refused(path, f"its config.json is damaged ({error})") from None
    kind = about.get("model_type") if isinstance(about, dict) else None
    if kind not in KINDS:
        raise refused(
            path, f"its config.json says it is a '{kind}' model, and what is read here is {', '.join(map(repr, KINDS))}"
        )
    return str(kind)


def open_clip(where: str) -> str:
    return (
        f"{where} an open_clip checkpoint and no config.json of transformers. Give its transformers conversion: many "
        "repositories hold both forms, and SigLIP's is Google's own (see docs/models.md)"
    )


# ---- the Hub


def snapshot(name: str) -> Path:
    """The folder in the cache that holds a Hub id's files: fetched where it lacks any that are needed."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    here = Path(found).parent if isinstance(found, str) else None
    if here is not None and whole(here):
        return here
    try:
        return fetched(name)
    except PerdureError:
        if here is None:
            raise
        return here  # what it lacks is named when it is read


def whole(folder: Path) -> bool:
    """Whether weights (every shard), a tokenizer and the preprocessing lie in a folder."""
    weights = [p for pattern in ("model*.safetensors", "pytorch_model*.bin") for p in folder.glob(pattern)]
    shards = [int(p.stem.rsplit("-", 1)[1]) for p in weights if "-of-" in p.stem]  # model-00001-of-00003.safetensors
    return (
        len(weights) > 0
        and all(len(shards) == of for of in shards)
        and any((folder / one).exists() for one in TOKENIZERS)
        and any((folder / one).exists() for one in ("preprocessor_config.json", "processor_config.json"))
    )


def fetched(name: str) -> Path:
    """The files of a Hub id, from the network; whether it answers at all is asked once."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import EntryNotFoundError

    if HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise refused(name, "it is no folder, it is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub")
    failures: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *unreachable())
    try:
        with contextlib.suppress(EntryNotFoundError):
            # a download would try a dead line again and again
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=3)
            folder = snapshot_download(name, allow_patterns=[*FILES], ignore_patterns=["*/*"], etag_timeout=3)
            if not list(Path(folder).glob("model*.safetensors")):
                snapshot_download(name, allow_patterns=[*OLDER], ignore_patterns=["*/*"], etag_timeout=3)
            return Path(folder)
        get_hf_file_metadata(hf_hub_url(name, OPEN_CLIP[0]), timeout=3)
    except failures as error:
        if isinstance(error, OSError) and error.filename:  # of the line nothing has a file's name
            raise PerdureError(
                f"'{name}' was found on the Hub, and could not be kept here: {error.strerror} ({error.filename}). Give the "
                "Hub's files another place: HF_HOME=FOLDER."
            ) from error
        raise refused(
            name,
            f"it is no folder, it is not in the cache, and the Hub did not give it ({type(error).__name__}). Check the name "
            "and the connection",
        ) from error
    raise refused(name, open_clip("on the Hub lies"))


def unreachable() -> tuple[type[Exception], ...]:
    """What the Hub's client raises where there is no connection: another library's error in each of its versions."""
    kinds = []
    for name in ("httpx", "httpx2", "requests"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            kinds.append(module.RequestException if name == "requests" else module.HTTPError)
    return tuple(kinds)
