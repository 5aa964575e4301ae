"""``Compose``: a method whose three roles come from different methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.features import Features
from perdure.core.packing import Packed
from perdure.data.files import Pixels
from perdure.data.task import Batch, Context, Query, Task
from perdure.methods.base import Expert, Method, Reason, Trainer
from perdure.models.clip import CLIP
from perdure.training.fit import Backward, Regulariser
from perdure.training.schedule import Schedule


class Compose(Method):
    """``Compose(learn=…, fuse=…, answer=…)``: each role is played by the method given for it.

    A role left out is played by the learner. A head is calibrated after fusing, on the features it will see.
    """

    def __init__(self, learn: Method, fuse: Method | None = None, answer: Method | None = None):
        for role, part in (("learn", learn), ("fuse", fuse), ("answer", answer)):
            if part is not None and role not in part.plays:
                raise PerdureError(
                    f"{type(part).__name__} cannot be asked to {role}: it plays {', '.join(part.plays)} alone. Leave the role "
                    "out, or give it to another method."
                )
        if learn.must_fuse and fuse is not None and fuse is not learn:
            raise PerdureError(
                f"What {type(learn).__name__} learns acts in its own experts, which {type(fuse).__name__} knows nothing of. "
                "Leave the role fuse out."
            )
        if learn.goes_on and fuse is not None and not fuse.carries_weights:
            raise PerdureError(
                f"{type(learn).__name__} goes on from the weights that its last task left; {type(fuse).__name__} begins every "
                "task from the pre-trained ones: nothing would be protected. Leave the role fuse out, or give another."
            )
        self.learn, self.fuser, self.answerer = learn, fuse or learn, answer or learn
        self.parts = {"learn": learn, "fuse": self.fuser, "answer": self.answerer}
        self.scope = learn.scope  # type: ignore[misc]
        self.needs_labels = any(part.needs_labels for part in self.parts.values())  # type: ignore[misc]
        self.learns = any(part.learns for part in self.parts.values())  # type: ignore[misc]
        self.carries_weights = self.fuser.carries_weights  # type: ignore[misc]

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        self.clip = clip
        self.learn.bind(clip, context)  # the learner alone decides what may learn
        for part in self.distinct().values():
            if part is not self.learn:
                part.join(clip, context or Context())

    def trains_on(self, task: Task) -> bool:
        return self.learn.trains_on(task)

    def begin_task(self, task: Task) -> None:
        self.learn.begin_task(task)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.learn.parameters()

    def schedule(self, task: Task) -> Schedule:
        return self.learn.schedule(task)

    def step(self, batch: Batch, backward: Backward) -> None:
        self.learn.step(batch, backward)

    def regularised(self) -> AbstractContextManager[Regulariser | None]:
        return self.learn.regularised()

    def enough(self, steps: int) -> bool:
        return self.learn.enough(steps)

    def again(self, task: Task) -> bool:
        return self.learn.again(task)

    def finish(self, task: Task) -> None:
        self.learn.finish(task)

    def stepped(self, step: int) -> None:
        self.learn.stepped(step)

    def material(self, task: Task) -> Task:
        return self.learn.material(task)

    def pack_progress(self) -> Packed:
        return self.learn.pack_progress()

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        self.learn.unpack_progress(files, values)

    def lend(self, trainer: Trainer) -> None:
        for part in self.parts.values():
            part.lend(trainer)

    def modules(self) -> Mapping[str, nn.Module]:
        return {f"{role}.{n}": module for role, part in self.distinct().items() for n, module in part.modules().items()}

    def steady(self) -> bool:
        return all(part.steady() for part in self.parts.values())

    def start(self, task: Task) -> None:
        self.fuser.start(task)

    def fuse(self, task: Task) -> None:
        self.fuser.fuse(task)

    def experts(self, query: Query) -> Sequence[Expert]:
        return self.fuser.experts(query)

    def base_expert(self) -> Expert:
        return self.fuser.base_expert()

    def stands_on(self) -> Expert | None:
        return self.answerer.stands_on()

    def foresees(self) -> bool:
        return self.answerer.foresees()

    def foresee(self, task: Task) -> None:
        self.answerer.foresee(task)

    def remarks(self) -> dict[str, float]:
        return {name: value for part in self.distinct().values() for name, value in part.remarks().items()}

    def calibrate(self, task: Task) -> None:
        self.answerer.calibrate(task)

    def logits(self, query: Query) -> Tensor:
        return self.answerer.logits(query)

    def look(self, images: Pixels) -> Features:
        return self.answerer.look(images)

    def finalizes(self) -> bool:
        return self.answerer.finalizes()

    def finalize(self, query: Query, logits: Tensor) -> Tensor:
        return self.answerer.finalize(query, logits)

    def explains(self) -> bool:
        return self.answerer.explains()

    def explain(self, query: Query, chosen: Sequence[int]) -> list[list[Reason]]:
        return self.answerer.explain(query, chosen)

    def heaviest(self) -> dict[str, list[Reason]]:
        return self.answerer.heaviest()

    def answer_state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        return self.answerer.answer_state()

    def publish(self) -> None:
        for part in self.distinct().values():
            part.publish()

    def forget(self, task: str, before: Packed, after: Packed) -> None:
        roles = {role: part for role, part in self.distinct().items() if part in (self.fuser, self.answerer)}
        for role, part in roles.items():
            part.forget(task, of_part(role, before), of_part(role, after))

    def distinct(self) -> dict[str, Method]:
        """The parts, each once, under the first role it plays."""
        found: dict[int, tuple[str, Method]] = {}
        for role, part in self.parts.items():
            found.setdefault(id(part), (role, part))
        return dict(found.values())

    def pack_state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The parts' states, each file and value under its part's role."""
        files: dict[str, dict[str, Tensor]] = {}
        values: dict[str, Any] = {}
        for role, part in self.distinct().items():
            own, values[role] = part.pack_state()
            files.update({f"{role}.{name}": tensors for name, tensors in own.items()})
        return files, values

    def unpack_state(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        for role, part in self.distinct().items():
            part.unpack_state(*of_part(role, (files, values)))


def of_part(role: str, state: tuple[Mapping[str, Any], Mapping[str, Any]]) -> Packed:
    """What of a packed state is one part's."""
    files, values = state
    mark = f"{role}."
    own = {name.removeprefix(mark): tensors for name, tensors in files.items() if name.startswith(mark)}
    return own, values.get(role, {})
