"""The synthetic pairs of a run: for each task the ones it asks for, drawn where they are missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator, Field

from perdure.core import processes, stopping
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.core.pixels import CENTRE, Fit
from perdure.core.seeding import derive
from perdure.core.state import only_one, read_json
from perdure.data.task import Context, silent
from perdure.synthesis.generator import Generator
from perdure.synthesis.prompts import Request, requests, vocabulary
from perdure.synthesis.store import COLLECTED, Pairs, Store, seal


def absolute(path: str) -> str:
    """``path`` so that it means the same in another working directory; names of what is no file stay."""
    named, place = not path or path in ("stream", "imagenet"), expanded(path)
    return path if named or not place.exists() else str(place.resolve())


Local = AfterValidator(absolute)
Folder = AfterValidator(lambda path: str(expanded(path).resolve()) if path else path)


@dataclass(frozen=True)
class Drawing:
    """With what is drawn, and where it is kept. The defaults are GIFT's: Stable Diffusion v1.5, 50 steps."""

    generator: Annotated[
        str,
        Local,
        Field(description="text-to-image model: folder or Hub id that diffusers loads; stream: the stream's own"),
    ] = "stream"
    sampling_steps: Annotated[int, Field(ge=1, le=1000, description="denoising steps; below 50: DPM-Solver++")] = 50
    guidance: Annotated[float, Field(ge=0, description="classifier-free guidance scale")] = 7.5
    sampling_batch: Annotated[int, Field(ge=1, le=10**4, description="images drawn at once")] = 8
    pairs: Annotated[str, Folder, Field(description="folder of the pairs; empty: 'pairs' in the run's folder")] = ""


@dataclass(frozen=True)
class Synthesis(Drawing):
    """What is drawn for a task: so many pairs of what was learned and of the world beside."""

    synthetic: Annotated[int, Field(ge=1, le=10**7, description="synthetic image-text pairs a task")] = 1000
    vocabulary: Annotated[
        str,
        Local,
        Field(description="prompts beside those of learned tasks: stream | imagenet | a text file, a prompt a line"),
    ] = "stream"


def check_generator(config: Drawing, context: Context, asked: str, instead: str) -> None:
    """Refuse synthetic images, which ``asked`` asks for, where there is nothing to draw them and none are given."""
    if config.generator == "stream" and not (context.generator or config.pairs):
        raise PerdureError(
            f"{asked}: this stream has no generator to draw images. Set {instead}, generator to a text-to-image model, or "
            "pairs to a folder of pairs."
        )


class Replay:
    """Draws, keeps and reads a run's pairs; bound to its seed, folder and stream.

    ``size`` and ``fit``: how the student sees pictures. ``read(prompts)`` is its tokenizer: a prompt that it refuses is
    refused before anything is drawn or trained.
    """

    def __init__(
        self, config: Drawing, context: Context, size: int, device: str,
        read: Callable[[Sequence[str]], object] = silent, fit: Fit = CENTRE,
    ):  # fmt: skip
        self.config, self.context, self.size, self.fit = config, context, size, fit
        own = context.folder / "pairs" if context.folder is not None else None
        self.folder = Path(config.pairs) if config.pairs else own
        self.collected = self.folder is not None and is_collected(self.folder)
        if self.collected:
            read([request.prompt for request in self.store().entries] or [""])
            return
        path = context.generator if config.generator == "stream" else config.generator
        c = config
        self.generator = Generator(path, c.sampling_steps, c.guidance, c.sampling_batch, device)
        self.vocabulary = vocabulary(c.vocabulary, context.vocabulary) if isinstance(c, Synthesis) else []
        read(self.vocabulary or [""])
        if self.folder is not None:
            self.store()  # refuses a folder that was made for something else before anything is trained

    def store(self) -> Store:
        """The store as it lies on disk now."""
        assert self.folder is not None
        if self.collected:
            return Store(self.folder, {"kind": COLLECTED}, self.context.warn)
        return Store(self.folder, self.made_for(), self.context.warn, {"generator": self.generator.former})

    def made_for(self) -> dict[str, object]:
        """What must agree for a kept image to be the one that is wanted."""
        c, beside = self.config, dict[str, object]()
        if self.vocabulary:
            beside["vocabulary"] = f"{self.vocabulary[0]} … ({len(self.vocabulary)} prompts, {seal(self.vocabulary)})"
        return {
            "stream": self.context.stream, **beside, "generator": self.generator.identity,
            "sampling_steps": c.sampling_steps, "guidance": c.guidance,
        }  # fmt: skip

    def pairs(self, task: str, learned: Sequence[str]) -> Pairs:
        """The pairs for learning ``task``; ``learned``: the prompts of the tasks before it."""
        store = self.store()
        wanted = self.some([*store.entries], task, self.count) if self.collected else self.wanted(task, learned)
        return self.read(store, wanted)

    def of(self, prompts: Sequence[str], count: int, name: str) -> Pairs:
        """``count`` pairs of these prompts alone; ``name`` is what they are drawn for."""
        store, there = self.store(), set(prompts)
        if not self.collected:
            return self.read(store, requests(prompts, count, self.context.seed, name))
        own = [request for request in store.entries if request.prompt in there]
        if not own:
            raise PerdureError(
                f"The pairs in {store.folder} have none of the texts that are wanted, as '{prompts[0]}'. Give others, or "
                "leave pairs empty and name a generator."
            )
        return self.read(store, self.some(own, name, count))

    def wanted(self, task: str, learned: Sequence[str]) -> list[Request]:
        """What is to be drawn for learning ``task``."""
        return requests([*self.vocabulary, *learned], self.count, self.context.seed, task)

    @property
    def count(self) -> int:
        """How many pairs a task has."""
        return self.config.synthetic if isinstance(self.config, Synthesis) else 0

    def some(self, collected: Sequence[Request], task: str, count: int) -> list[Request]:
        """``count`` of the collected pairs, or all there are, chosen without replacement."""
        rng = np.random.default_rng(derive(self.context.seed, task, "collected"))
        return [collected[k] for k in rng.permutation(len(collected))[:count]]

    def read(self, store: Store, wanted: Sequence[Request]) -> Pairs:
        """Pairs of the store, drawn before where it lacks them."""
        if not self.collected:
            self.draw(store, wanted)
        return store.read(wanted, self.size, self.fit)

    def draw(self, store: Store, wanted: Sequence[Request]) -> int:
        """Draw what the store lacks or what is damaged; return how many images that was."""
        damaged = store.damaged(wanted)
        for entry in damaged:
            store.warn(
                f"{store.folder / str(entry.file)} is damaged ('{entry.prompt}'); it is drawn again from its seed."
            )
        todo = processes.from_main([e.request for e in damaged] + store.missing(wanted))
        if not todo:
            return 0
        try:
            self.generator.check_prompts([r.prompt for r in todo])  # all of them, before any is drawn
            store.folder.mkdir(parents=True, exist_ok=True)
            with only_one(store.folder, self.context.warn):
                if processes.main():
                    store.open()
                    store.read_manifest()  # another process may have drawn some of it while this one waited
                todo = processes.from_main([e.request for e in damaged] + store.missing(wanted))
                self.fill(store, todo, len(wanted))
        finally:
            self.generator.release()
        black = store.black(wanted)
        if black:
            store.warn(f"{black} of {len(wanted)} images came back black and are left out.")
        return len(todo)

    def fill(self, store: Store, todo: Sequence[Request], total: int) -> None:
        """Draw ``todo`` into the store, a batch a process at a time."""
        size, done = self.generator.batch_size * processes.count(), total - len(todo)
        for first in range(0, len(todo), size):
            stopping.stop_together()
            asked = todo[first : first + size]
            own = torch.stack([image for _, image in self.generator.draw(asked[processes.worked(len(asked))])])
            images = processes.gathered(own, len(asked))
            if processes.main():
                store.add(list(zip(asked, images, strict=True)))
            self.context.drawn(done + first + len(asked), total, len(asked))
        processes.barrier()
        if not processes.main():
            store.read_manifest()


def is_collected(folder: Path) -> bool:
    """Whether a folder holds pairs that were collected, not drawn."""
    about = folder / "store.json"
    if not about.exists():
        return False
    kept = read_json(about)
    if not isinstance(kept, dict):
        raise PerdureError(f"{about} is damaged: it should hold one object.")
    return kept.get("kind") == COLLECTED
