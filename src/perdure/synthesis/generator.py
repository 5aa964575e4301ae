"""A text-to-image model over ``diffusers``: Stable Diffusion, the small one that ships, or any other pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.precision import precision_of
from perdure.core.state import digest
from perdure.models.loading import quiet
from perdure.synthesis.prompts import Request

CONTENTS: dict[tuple[str, int, int], str] = {}
SOLVER_BELOW = 50  # fewer steps than that need a faster solver than the one the pipeline came with (GIFT)


class Generator:
    """Draws images from prompts, each from its own seed.

    ``path`` is a folder or Hub id that ``DiffusionPipeline.from_pretrained`` loads. With fewer than 50 ``steps`` the
    scheduler is DPM-Solver++ (multistep), else the pipeline's own. Batches always have ``batch_size`` images (the last is
    filled up), so that on a processor an image has the same bits alone and among others.
    """

    def __init__(self, path: str, steps: int, guidance: float, batch_size: int, device: str = "cpu"):
        self.path, self.steps, self.guidance, self.batch_size, self.device = path, steps, guidance, batch_size, device
        check(path)

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline, loaded when the first image is drawn."""
        return load(self.path, self.device, self.steps)

    @cached_property
    def identity(self) -> str:
        """A digest of what the model is: of the names and contents of a folder's files, or a Hub id with its commit."""
        folder = Path(self.path)
        if not folder.is_dir():
            return hub_identity(self.path)
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        shown = [(p.relative_to(folder), p) for p in files if not hidden(p.relative_to(folder))]
        return digest(json.dumps([(name.as_posix(), contents(p)) for name, p in shown]).encode())

    @cached_property
    def former(self) -> str:
        """What earlier versions had for an identity: the configuration and the sizes of the weights, or a Hub id alone."""
        folder = Path(self.path)
        if not folder.is_dir():
            return self.path
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        told = [(str(p.relative_to(folder)), p.read_text() if p.suffix == ".json" else p.stat().st_size) for p in files]
        return digest(json.dumps(told).encode())

    def release(self) -> None:
        """Free the memory of the pipeline, until the next image is drawn."""
        if vars(self).pop("pipeline", None) is not None and self.device == "cuda":
            torch.cuda.empty_cache()

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that are empty or that the text encoder would cut off."""
        tokenizer = self.pipeline.tokenizer
        for prompt in dict.fromkeys(prompts):
            if not prompt.strip():
                raise PerdureError("A prompt is empty: there is nothing to draw. Take it out of the vocabulary.")
            length = len(tokenizer(prompt, truncation=False).input_ids)
            if length > tokenizer.model_max_length:
                raise PerdureError(
                    f"The prompt '{prompt[:80]}' is {length} tokens long; the text encoder of {self.path} reads "
                    f"{tokenizer.model_max_length}. Shorten it, or take it out of the vocabulary."
                )

    def draw(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Tensor]]:
        """Each request with its image, (3, H, W) uint8, a batch at a time; see ``check_prompts``."""
        for first in range(0, len(requests), self.batch_size):
            asked = requests[first : first + self.batch_size]
            yield from zip(asked, self.batch(asked), strict=True)

    @torch.no_grad()
    def batch(self, asked: Sequence[Request]) -> Tensor:
        """(n, 3, H, W) uint8 for at most ``batch_size`` requests."""
        full = [*asked, *[asked[-1]] * (self.batch_size - len(asked))]
        generators = [torch.Generator().manual_seed(r.seed) for r in full]
        bf16 = self.device == "cpu" and precision_of("auto", "cpu") == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            images = self.pipeline(
                [r.prompt for r in full], num_inference_steps=self.steps, guidance_scale=self.guidance,
                generator=generators, output_type="pt",
            ).images  # fmt: skip
        return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()[: len(asked)]


def hidden(path: Path) -> bool:
    """Whether a path is one that programs keep beside a model's files, as downloaders do."""
    return any(part.startswith(".") for part in path.parts)


def contents(path: Path) -> str:
    """The sha256 of a file, taken once in a process while its size and time stay."""
    about = path.stat()
    key = (str(path), about.st_size, about.st_mtime_ns)
    if key not in CONTENTS:
        whole = hashlib.sha256()
        with open(path, "rb") as file:
            while part := file.read(1 << 22):
                whole.update(part)
        CONTENTS[key] = whole.hexdigest()
    return CONTENTS[key]


def hub_identity(name: str) -> str:
    """A Hub id and the commit of it that lies here; the id alone, where none does."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "model_index.json") if name.count("/") == 1 else None
    return f"{name}@{Path(found).parent.name}" if isinstance(found, str) else name


def check(path: str) -> None:
    """Refuse what can be seen to be no generator without loading it."""
    folder = Path(path)
    if not path or (folder.exists() and not (folder / "model_index.json").is_file()):
        given = f"'{path}' has no model_index.json: it" if path else "No generator is given: this stream has none. It"
        raise PerdureError(
            f"{given} should be a folder or Hub id that diffusers' DiffusionPipeline.from_pretrained loads."
        )


def load(path: str, device: str, steps: int) -> Any:
    """The pipeline, silent, on its device, with the solver that suits the number of steps."""
    import diffusers
    from safetensors import SafetensorError

    dtype = torch.float16 if device == "cuda" else torch.float32
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # it warns of every component that is not Stable Diffusion's own
    try:
        with quiet():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtype)
        if steps < SOLVER_BELOW and not isinstance(pipeline.scheduler, diffusers.DPMSolverMultistepScheduler):
            pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PerdureError(
            f"No text-to-image model could be loaded from '{path}': {reason} "
            "Give a folder or Hub id that diffusers' DiffusionPipeline.from_pretrained loads."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
