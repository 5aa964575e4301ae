"""What a run needs beyond the method's options."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field

from perdure.core.config import options, resolve
from perdure.core.device import compute_with
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.core.precision import precision_of
from perdure.core.state import read_json
from perdure.data.shots import listed_shots
from perdure.data.splits import recut, reordered, tasks_reordered
from perdure.data.task import Stream
from perdure.engine.steps import Every
from perdure.models.clip import CLIP
from perdure.models.compiled import compiled
from perdure.models.recompute import by_blocks

THREADS = torch.get_num_threads()  # before any run changes it
# Where a run is computed, and how much of it at a time: no part of what it is, whatever that does to the last digits.
ELSEWHERE = (
    "device", "threads", "workers", "deterministic", "compile", "gradient_checkpointing", "accumulate", "evaluation_batch",
    "save_every", "keep",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a run needs beyond the method's options."""

    model: Annotated[str, Field(description="folder or Hub id of a CLIP or SigLIP; empty: the stream's own")] = ""
    labels: Annotated[
        Literal["stream", "task", "seen", "all"], Field(description="classes that compete; stream: as is usual there")
    ] = "stream"
    task_id: Annotated[
        Literal["stream", "known", "hidden"], Field(description="whether the task is told; stream: as is usual there")
    ] = "stream"
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        Field(description="of training; auto: bf16 where the device has it, else fp16 on an accelerator"),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="auto: an accelerator if there is one")] = (
        "auto"
    )
    threads: Annotated[int, Field(ge=0, le=1024, description="processor threads; 0: as torch chooses")] = 0
    workers: Annotated[
        int,
        Field(ge=0, le=256, description="threads that read pictures ahead of training; the same bits with any number"),
    ] = 4
    deterministic: Annotated[
        bool, Field(description="the same bits twice on an accelerator too, more slowly; a processor gives them anyway")
    ] = False
    compile: Annotated[
        bool, Field(description="compile the towers' blocks (torch.compile): the same losses up to rounding, sooner")
    ] = False
    gradient_checkpointing: Annotated[
        bool,
        Field(description="training in less memory: each block of the towers is computed twice; the same gradients"),
    ] = False
    accumulate: Annotated[
        int,
        Field(ge=1, le=10**6, description="parts that a batch is cut into to train in less memory; the same gradients"),
    ] = 1
    evaluation_batch: Annotated[
        int, Field(ge=1, le=10**6, description="images at a time in evaluation and for features; the same answers")
    ] = 256
    save_every: Annotated[
        str,
        BeforeValidator(str),
        AfterValidator(Every.checked),
        Field(description="how often a task is saved inside: steps (500), a time (10min, 30s, 2h), or never"),
    ] = "10min"
    keep: Annotated[
        Literal["all", "last"],
        Field(description="weights and states on the disk: of all tasks, or of the last that is safe alone"),
    ] = "all"
    tasks: Annotated[int, Field(ge=0, description="only the first tasks, for a quick look; 0: all")] = 0
    images: Annotated[
        int, Field(ge=0, description="at most so many images a task and side, for a quick look; 0: all")
    ] = 0

    online: Annotated[
        bool, Field(description="online learning: each task's images once, in small batches; more passes are refused")
    ] = False
    evaluate_every: Annotated[
        int,
        Field(
            ge=0, le=10**9, description="steps from one evaluation to the next while a task is learned; 0: none then"
        ),
    ] = 0

    shots: Annotated[int, Field(ge=0, description="training images a class, drawn by the seed (few-shot); 0: all")] = 0
    shots_from: Annotated[
        int,
        Field(ge=1, description="the first task with few shots; 2: the first session is a base that keeps all images"),
    ] = 1
    shots_seed: Annotated[
        int | None, Field(ge=0, description="draws the shots in the place of the run's seed; none: that draws them")
    ] = None
    shots_file: Annotated[
        str,
        BeforeValidator(str),
        Field(description="class-incremental: a JSON file of the images of each class, in the place of a draw"),
    ] = ""
    base: Annotated[
        int,
        Field(
            ge=0, description="class-incremental: classes of the first step, with increment; 0: as the stream has it"
        ),
    ] = 0
    increment: Annotated[int, Field(ge=0, description="class-incremental: classes of each further step, with base")] = 0

    unreadable: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of pictures that may be unreadable; all are then decoded first, those left out",
        ),
    ] = 0.0

    class_order: Annotated[
        str,
        BeforeValidator(str),
        Field(description="class-incremental: a seed, or a JSON file of class names; empty: the stream's own"),
    ] = ""
    task_order: Annotated[
        str,
        BeforeValidator(str),
        Field(description="tasks that are domains: a seed, or a JSON file of task names; empty: the stream's own"),
    ] = ""

    def select(self, stream: Stream, seed: int) -> Stream:
        """The part of ``stream`` that a run is to see, under the run's protocol. ``PerdureError`` where that cannot be."""
        stream = reordered(stream, self.class_order) if self.class_order else stream
        stream = recut(stream, self.base, self.increment) if self.base or self.increment else stream
        stream = tasks_reordered(stream, self.task_order) if self.task_order else stream
        if self.shots_from > 1 and stream.labels == "seen":
            stream = replace(stream, base_new="sessions")
        if self.shots and self.shots_file:
            raise PerdureError("shots and shots_file say the same twice. Give one of them.")
        stream = listed_shots(stream, self.shots_file, self.shots_from) if self.shots_file else stream
        draw = seed if self.shots_seed is None else self.shots_seed
        seen = stream.shortened(self.tasks, self.images).few_shot(self.shots, draw, self.shots_from)
        return seen if self.labels == "stream" else replace(seen, labels=self.labels)

    def settled(self, stream: Stream) -> Settings:
        """With every choice made, as a run records it: folders as absolute paths, a class order by its content."""
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise PerdureError("device=cuda: torch finds no CUDA device here. Use device=cpu.")
        model = expanded(self.model)
        return replace(
            self,
            model=str(model.resolve()) if self.model and os.path.isdir(model) else self.model or "stream",
            class_order=kept_order(self.class_order),
            task_order=kept_order(self.task_order),
            shots_file=kept_order(self.shots_file),
            labels=stream.labels if self.labels == "stream" else self.labels,  # type: ignore[arg-type]
            task_id=stream.task_id if self.task_id == "stream" else self.task_id,  # type: ignore[arg-type]
            precision=precision_of(self.precision, device),  # type: ignore[arg-type]
            device=device,
            threads=self.threads or THREADS,
        )

    def take_effect(self) -> None:
        """Let this process compute as the run asks; ``undisturbed`` puts back what was."""
        compute_with(self.threads, self.deterministic)

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> Settings:
        """The settings of a run as its ``config.json`` keeps them, on a device that this machine has."""
        kept = cls(**resolve(options(cls), values))
        return replace(kept, device="cpu") if kept.device == "cuda" and not torch.cuda.is_available() else kept


def kept_order(order: str) -> str:
    """An order, or lists, as a run keeps it: what a file lists, so that the file may go away; a seed as it is."""
    if not order or order.startswith(("[", "{")) or not os.path.isfile(expanded(order)):
        return order
    return json.dumps(read_json(expanded(order)), ensure_ascii=False)


# A model that was loaded for the checks before a run and is as it was loaded: the run takes it, and nobody twice.
HANDED_OVER: list[tuple[Settings, str, CLIP]] = []


def load_clip(config: Mapping[str, Any], own: str) -> CLIP:
    """The CLIP of a run, where it is computed; ``own``: that of its stream. ``PerdureError`` where it is not the one that the
    run began with."""
    settings = Settings.recorded(config["settings"])
    if "weights" in config and os.path.isabs(settings.model) and not os.path.isdir(settings.model):
        raise PerdureError(
            f"There is no folder {settings.model}. A run or HOME that was begun with the model there needs it there: put it "
            "back (a link will do)."
        )
    clip = taken(settings, own) or opened(settings, own)
    if "weights" in config:
        check_same(clip, config)
    return clip


def opened(settings: Settings, own: str) -> CLIP:
    """A CLIP read from its files, with a run's settings."""
    clip = CLIP.load(own if settings.model in ("", "stream") else settings.model, settings.device)
    clip.accumulate, clip.evaluation_batch = settings.accumulate, settings.evaluation_batch
    if settings.gradient_checkpointing:
        by_blocks(clip.backbone)
    if settings.compile:
        compiled(clip.backbone, clip.device)
    return clip


def hand_over(clip: CLIP, config: Mapping[str, Any], own: str) -> None:
    """Let the next run with these settings take ``clip``, which nothing has touched since ``load_clip``."""
    HANDED_OVER[:] = [(Settings.recorded(config["settings"]), own, clip)]


def taken(settings: Settings, own: str) -> CLIP | None:
    """The model that was handed over, where it is the one that would be read now; it is kept for nobody else."""
    found = HANDED_OVER.pop() if HANDED_OVER else None
    return found[2] if found and found[:2] == (settings, own) and found[2].as_on_disk() else None


def check_same(clip: CLIP, config: Mapping[str, Any]) -> None:
    """Refuse another model than the run's: other weights, or the same ones that see or compute otherwise."""
    found, now = clip.identity or clip.fingerprint(), clip.described()
    then = config.get("backbone", now)  # earlier versions did not note it
    if found != config["weights"]:
        raise PerdureError(
            f"The CLIP at {clip.path} is not the one that the run began with: it is a '{now['kind']}' of fingerprint "
            f"{found[:12]}…, the run's a '{then['kind']}' of {config['weights'][:12]}…. Put the run's model back there, or "
            "start a new run."
        )
    if odd := [key for key in now if now[key] != then.get(key)]:
        raise PerdureError(
            f"The CLIP at {clip.path} has the weights that the run began with, but another {odd[0]} ({now[odd[0]]}, the "
            f"run's {then.get(odd[0])}). Put the run's model back there, or start a new run."
        )
