"""Which prompts are drawn: an external vocabulary and the classes of the tasks learned before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from perdure.core.errors import PerdureError
from perdure.core.seeding import derive
from perdure.data.task import Class

IMAGENET_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Request:
    """An image to draw: together with the generator's settings, prompt and seed decide every pixel."""

    prompt: str
    seed: int


def vocabulary(name: str, own: Sequence[Class]) -> list[str]:
    """The prompts of an external vocabulary.

    ``stream``: the stream's ``own``; ``imagenet``: the 1,000 class names of ImageNet-1k as CLIP's authors curated them; else
    a UTF-8 text file with a prompt a line. Raises ``PerdureError`` where there is no such vocabulary, or nothing in it.
    """
    if name == "stream":
        if not own:
            raise PerdureError("This stream has no vocabulary of its own. Set vocabulary=imagenet, or to a text file.")
        return [c.prompts()[0] for c in own]
    if name == "imagenet":
        text = (files("perdure.synthesis") / "imagenet.txt").read_text(encoding="utf-8")
        return [IMAGENET_TEMPLATE.format(line) for line in text.splitlines()]
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PerdureError(
            f"vocabulary={name}: no such vocabulary, and no text file that can be read ({error}). "
            "Give 'stream', 'imagenet' or a UTF-8 text file with a prompt a line."
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise PerdureError(f"vocabulary={name}: the file is empty. It should hold a prompt a line.")
    return prompts


def requests(pool: Sequence[str], count: int, seed: int, task: str) -> list[Request]:
    """``count`` prompts drawn uniformly with replacement, a seed an image; fewer are the first of more."""
    distinct = list(dict.fromkeys(pool))
    picks = np.random.default_rng(derive(seed, task, "prompts")).random(count)
    return [
        Request(distinct[int(u * len(distinct))], derive(seed, task, "image", k) % 2**31) for k, u in enumerate(picks)
    ]
