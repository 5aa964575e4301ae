"""What a method is: three roles, learn, fuse and answer. The defaults together are sequential fine-tuning.

| role   | hooks                                                           | default                                       |
|--------|-----------------------------------------------------------------|-----------------------------------------------|
| learn  | ``begin_task`` ``parameters`` ``schedule`` ``step`` ``stepped`` | cross entropy, the published recipe           |
|        | ``finish`` ``pack_progress`` ``unpack_progress``                |                                               |
| fuse   | ``start`` ``fuse`` ``experts`` ``base_expert``                  | go on from the last weights; answer with them |
| answer | ``stands_on`` ``look`` ``calibrate`` ``logits`` ``finalize``    | cosine similarity to the classes' texts       |
| brings | ``modules`` ``material`` ``State``                              | nothing                                       |

A method is one file, here or anywhere: a subclass with the hooks it changes, decorated with ``@register(name)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.features import Features
from perdure.core.packing import Packed, kinds, pack, unpack
from perdure.core.registry import Registry, Row
from perdure.data.files import Pixels
from perdure.data.task import Batch, Context, Query, Task
from perdure.methods.answering import Answering, Expert, Reason
from perdure.methods.inside import Inside
from perdure.methods.learning import Learning
from perdure.models.clip import CLIP
from perdure.training.contrastive import check_loss
from perdure.training.fit import Losses, Stepper, optimise
from perdure.training.recipe import Recipe, Training
from perdure.training.schedule import Schedule
from perdure.training.spread import regularised

__all__ = ["METHODS", "Expert", "Method", "Reason", "Recipe", "Row", "State", "Trainer", "Training", "register"]
Trainer = Callable[[Stepper, Schedule, Iterator[Batch], str], Losses]


@dataclass
class State:
    """What must outlive a task beyond weights and modules; the kinds of fields are those of ``perdure.core.packing``."""


class Method(Answering, Inside, Learning):
    """Sequential fine-tuning, and the base of every method.

    ``bind`` gives it the model; then, a task: ``start``, ``begin_task``, steps, ``fuse``, ``calibrate``, ``predict``.
    """

    Config: ClassVar[type] = Recipe
    State: ClassVar[type] = State
    plays: ClassVar[Sequence[str]] = ("learn", "fuse", "answer")  # in another role it has nothing of its own to say
    must_fuse: ClassVar[bool] = False  # True: what it learns acts only where it fuses too
    goes_on: ClassVar[bool] = False  # True: what it keeps of earlier tasks supposes their weights
    keeps_captions: ClassVar[bool] = True  # False: images that it brings into a batch have lost theirs
    role_options: ClassVar[Mapping[str, type]] = {}  # the options that count where only this role is played
    scope: ClassVar[Literal["task", "stream"]] = "task"  # stream: sees all tasks at once
    learns: ClassVar[bool] = True  # False: no task changes anything
    carries_weights: ClassVar[bool] = True  # False: ``start`` and ``experts`` never need the last task's weights
    needs_labels: ClassVar[bool] = True  # False: can be taught by a task without classes, too
    reference: ClassVar[Literal["", "lower", "upper"]] = ""  # no contestant: what others are held to from below, above

    clip: CLIP
    trainer: Trainer | None = None  # lent by a run
    regularised = regularised  # VCReg's terms, where the options ask for them

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        kinds(cls.State)  # a state that could not come back is refused here, not after hours of training

    def __init__(self, config: Any = None, **values: Any):
        self.config = config if config is not None else self.Config(**values)
        self.state = self.State()

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        """Take the model and what the run offers besides, and decide which weights may learn."""
        c = self.config
        if c.adapt == "lora":
            clip.adapt(c.lora_rank, c.lora_alpha, c.lora_layers, c.towers, c.lora_init)
        elif c.adapt == "rotation":
            clip.rotate(c.rotation_block, c.rotation_layers, c.towers)
        for name, parameter in clip.backbone.named_parameters():
            learns = c.towers in ("both", clip.part_of(name)) and clip.part_of(name) != "scale"
            parameter.requires_grad_(parameter.requires_grad and learns)
        self.join(clip, context or Context())
        check_loss(c, clip, self.context, self.keeps_captions)

    def join(self, clip: CLIP, context: Context) -> None:
        """Take a model that is ready to learn: all that a part of a composition does which does not learn."""
        self.clip, self.context = clip, context

    # ---- what it brings

    def modules(self) -> Mapping[str, nn.Module]:
        """Its own by name, in the towers or beside, made in ``bind`` or from state: saved alone, restored after the state."""
        return {}

    def steady(self) -> bool:
        """Whether weights that never change make the same of an image whenever they are asked: not where modules of its own
        may act in the towers then too."""
        return not self.modules()

    def material(self, task: Task) -> Task:
        """What is trained on for ``task``: the task itself, or with images of earlier ones (``context.images``)."""
        return task

    def train(self, learner: Stepper, schedule: Schedule, draws: Iterator[Batch], name: str) -> Losses:
        """Train something else after the task, a head or an alignment: a phase whose losses are recorded under ``name``.

        A run lends its own trainer (precision, progress and record as of the task).
        """
        if self.trainer is None:
            return optimise(learner, schedule, draws, self.clip.device, name=name)
        return self.trainer(learner, schedule, draws, name)

    def lend(self, trainer: Trainer) -> None:
        """Take what ``train`` is to use."""
        self.trainer = trainer

    # ---- fuse

    def start(self, task: Task) -> None:
        """Put the weights where learning ``task`` begins."""

    def fuse(self, task: Task) -> None:
        """After training: combine the new weights with what is kept."""

    def experts(self, query: Query) -> Sequence[Expert]:
        """Who answers a query."""
        return (Expert("last"),)

    def base_expert(self) -> Expert:
        """The weights whose features change least from task to task: a head on top of features is fitted on theirs."""
        return Expert("last")

    # ---- answer

    def stands_on(self) -> Expert | None:
        """The weights whose features the answer role wants; None: those of ``base_expert``. A head that has the option ``on``
        may be told to stand on the pre-trained ones."""
        return Expert("pretrained", self.clip.pretrained) if getattr(self.config, "on", "") == "pretrained" else None

    def head_expert(self) -> Expert:
        """The weights whose features a head is fitted on, and answers on."""
        return self.stands_on() or self.base_expert()

    def foresees(self) -> bool:
        """Whether ``foresee`` is to be called."""
        return type(self).foresee is not Method.foresee

    def foresee(self, task: Task) -> None:
        """Before learning: look at the task by the weights of ``head_expert``, which the model holds now."""

    def calibrate(self, task: Task) -> None:
        """After fusing: fit what stands on top of the features of ``head_expert``, which the model holds now."""

    def logits(self, query: Query) -> Tensor:
        """(N, C) logits of the weights the model holds now."""
        texts = self.clip.class_texts([c.prompts() for c in query.classes])
        return self.clip.similarity(self.embed(query), texts)

    def look(self, images: Pixels) -> Features:
        """What a head is given of images, by the weights of ``head_expert``, which the model holds now."""
        return self.clip.features(images)

    def finalize(self, query: Query, logits: Tensor) -> Tensor:
        """(N, C): the answer, of Σ gate × logits over the experts and what ``look`` gave, ``query.features``."""
        return logits

    def finalizes(self) -> bool:
        """Whether ``finalize`` is more than handing through: only then are the features of ``head_expert`` worked out."""
        return type(self).finalize is not Method.finalize

    # ---- what it has to say, and state

    def remarks(self) -> dict[str, float]:
        """What the last task's learning came to, beyond losses, by name: it stands in the record and the report."""
        return {}

    def answer_state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """What the answer role knows beyond the weights, as ``pack_state`` has it: what an export must not leave out."""
        return self.pack_state() if self.finalizes() else ({}, {})

    def publish(self) -> None:
        """It is about to be exported, to answer elsewhere: give up what is nobody else's, as pictures."""

    def forget(self, task: str, before: Packed, after: Packed) -> None:
        """Unlearn a task, as if it had never been learned. ``before`` and ``after``: the state, as ``pack_state`` gave it when
        the task was about to be learned and when it was. ``PerdureError`` where that cannot be done."""
        raise PerdureError(
            f"{type(self).__name__} cannot forget one task of several: what it learned is mixed in its weights. 'perdure undo' "
            "goes back to before it."
        )

    def pack_state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The state as (tensors by file, plain values): what a checkpoint keeps."""
        return pack(self.state)

    def unpack_state(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """The inverse of ``pack_state``."""
        self.state = unpack(self.State, files, values)


METHODS: Registry[Any] = Registry("method")
register = METHODS.register
