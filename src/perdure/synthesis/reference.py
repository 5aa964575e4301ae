"""Reference images and texts: unlabelled and no pairs, only diverse. On them a model is held to what another one sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.paths import expanded, placed
from perdure.core.seeding import derive
from perdure.data.files import Files, Pixels, cannot_be_read
from perdure.data.folders import pictures
from perdure.data.task import Context, Task
from perdure.models.clip import CLIP
from perdure.synthesis.prompts import IMAGENET_TEMPLATE, vocabulary
from perdure.synthesis.replay import Replay, Synthesis, check_generator

NAMED = ("synthetic", "drawings", "own")
WORDS = 10  # in a random sentence


def folder(text: str) -> str:
    """A word for references as it is; a folder so that it means the same in another working directory."""
    return text if text in (*NAMED, "auto", "none") else placed(text)


@dataclass(frozen=True)
class ReferenceRecipe(Synthesis):
    """Which references. Those of the paper, ImageNet and captions of Conceptual Captions, cannot ship."""

    reference: Annotated[
        str,
        AfterValidator(folder),
        Field(
            description="reference images: synthetic | drawings (real ones of the stream's world) | own (the task's) | a "
            "folder of pictures"
        ),
    ] = "synthetic"
    texts: Annotated[
        Literal["vocabulary", "reference", "own", "random"],
        Field(
            description="reference texts: the vocabulary, the captions or class names of the reference images, the task's "
            "own classes, or random sentences"
        ),
    ] = "vocabulary"
    sentences: Annotated[int, Field(ge=1, le=10**6, description="texts=random: so many, drawn once a task")] = 1000


class Reference:
    """The references of a run; what is wrong with them is said when it is made."""

    def __init__(self, config: ReferenceRecipe, context: Context, clip: CLIP):
        self.config, self.context, self.clip = config, context, clip
        self.paths: list[Path] = []
        if config.reference == "synthetic":
            check_generator(config, context, "reference=synthetic", "reference to a folder of pictures or to own")
            self.replay = Replay(config, context, clip.size, clip.device.type, clip.tokens)
        elif config.reference == "drawings" and context.drawings is None:
            raise PerdureError(
                f"reference=drawings: {context.stream or 'this stream'} has no drawings beside its tasks. Set "
                "reference=synthetic, own, or a folder of pictures."
            )
        elif config.reference not in NAMED:
            self.paths = self.listed(expanded(config.reference))
        if self.outlives:
            self.prompts = self.fixed_prompts()
            clip.tokens(self.prompts)  # a text that is too long is refused before any work

    @property
    def outlives(self) -> bool:
        """Whether the texts are the same at every task, and known before any image is."""
        return self.config.texts == "vocabulary" or (self.config.texts == "reference" and bool(self.paths))

    def listed(self, folder: Path) -> list[Path]:
        """The pictures below a folder. ``PerdureError`` where it is none, holds none, or some cannot be read."""
        if not self.config.reference or not folder.is_dir():
            raise PerdureError(
                f"reference={self.config.reference}: there is no such folder. Give a folder of pictures, or one of "
                f"{', '.join(NAMED)}."
            )
        return readable(folder, self.clip.size)

    def fixed_prompts(self) -> list[str]:
        """The vocabulary, or the names of the folders that the reference pictures lie in."""
        if self.config.texts == "vocabulary":
            return vocabulary(self.config.vocabulary, self.context.vocabulary)
        base = expanded(self.config.reference)
        names = sorted({p.parent.name for p in self.paths if p.parent != base})
        if not names:
            raise PerdureError(
                f"texts=reference: the pictures in {base} lie in no folders of classes. Lay them out as {base}/CLASS/*, or set "
                "texts=vocabulary."
            )
        return [IMAGENET_TEMPLATE.format(name) for name in names]

    @cached_property
    def shown(self) -> tuple[Pixels, list[str]]:
        """The reference images that stay through a run, and what is written under them."""
        if self.paths:
            return Files(tuple(self.paths), self.clip.size), []
        if self.context.drawings is not None and self.config.reference == "drawings":
            images = self.context.drawings()
            return images.pixels, list(images.captions or ())
        first = self.context.tasks[0].name if self.context.tasks else ""  # the pairs that GIFT draws for it
        pairs = self.replay.pairs(first, [])
        return pairs.images, pairs.prompts

    def pixels(self, task: Task) -> Pixels:
        """The reference images (N, 3, H, W) for learning ``task``; where they stay, the same object each time."""
        return task.train.pixels if self.config.reference == "own" else self.shown[0]

    @cached_property
    def ids(self) -> Tensor:
        """Token ids (M, L) of texts that stay through a run."""
        return self.clip.tokens(self.prompts if self.outlives else list(dict.fromkeys(self.shown[1])))

    def texts(self, task: Task) -> Tensor:
        """Token ids (M, L) of the reference texts for learning ``task``; where they stay, the same object each time."""
        if self.config.texts == "random":
            return random_sentences(self.clip, self.config.sentences, derive(self.context.seed, task.name, "sentences"))
        own = self.config.texts == "own" or self.config.reference == "own"
        return self.clip.tokens(task.prompts()) if own and self.config.texts != "vocabulary" else self.ids


def readable(folder: Path, size: int) -> list[Path]:
    """The pictures below a folder. ``PerdureError`` where it holds none, or some cannot be read."""
    paths = pictures(folder)
    if bad := cannot_be_read(Files(tuple(paths), size)):
        raise PerdureError(
            f"reference={folder}: {len(bad)} of its pictures cannot be read, {bad[0]} the first. Put them right or take them "
            "away."
        )
    return paths


def random_sentences(clip: CLIP, count: int, seed: int) -> Tensor:
    """Token ids (count, 12): start, ten drawn uniformly from the whole vocabulary, end; fewer where the text tower reads fewer,
    and as a SigLIP has its texts.

    The vocabulary holds the end token too: where it is drawn the sentence ends, as CLIP reads a text at its first one.
    """
    text = clip.backbone.config.text_config
    words = min(WORDS, text.max_position_embeddings - 2)
    draws = torch.Generator().manual_seed(seed)
    inside = torch.randint(text.vocab_size, (count, words), generator=draws)
    return clip.framed(inside)


def strangers(config: Any, context: Context, clip: CLIP) -> Replay | Pixels | None:
    """What images of no task are drawn by, or pictures of them (``config.reference``: auto, synthetic, drawings, none, or a
    folder); None: there are none. ``PerdureError`` where the folder or drawings are not there."""
    drawable = bool(context.generator) or config.generator != "stream"
    if config.reference == "none" or (config.reference == "auto" and not drawable):
        return None
    if config.reference in ("auto", "synthetic"):
        return Replay(config, context, clip.size, clip.device.type, clip.tokens)
    if config.reference == "drawings" and context.drawings is not None:
        return context.drawings().pixels
    folder = expanded(config.reference)
    if config.reference == "drawings" or not folder.is_dir():
        here = "this stream has no drawings" if config.reference == "drawings" else "no such folder"
        raise PerdureError(
            f"reference={config.reference}: {here}. Known: auto, synthetic, drawings, none, or a folder."
        )
    return Files(tuple(readable(folder, clip.size)), clip.size)
