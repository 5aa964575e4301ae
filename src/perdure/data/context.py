"""What a run offers its method beside the tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from perdure.core.errors import PerdureError

if TYPE_CHECKING:
    from perdure.data.task import Class, Images, Task

OnDraw = Callable[[int, int, int], None]


def silent(*heard: object) -> None:
    """Hears and says nothing."""


@dataclass(frozen=True)
class Context:
    """What a run offers its method beside the tasks.

    ``folder`` is where it may keep what can be made again (None: nowhere); ``stream``, ``generator`` and ``vocabulary`` are
    the stream's; ``drawn(done, total, new)`` hears how the drawing of images goes, ``warn(text)`` what
    someone should know. ``tasks`` are those of the stream: a method that replays real images keeps their numbers as state,
    and takes the images themselves from there. ``labels``: the classes that compete, as the protocol of a run has it.
    ``drawings()`` are pictures of the stream's world that belong to none of its tasks, with captions (None: there are none).
    """

    seed: int = 0
    folder: Path | None = None
    stream: str = ""
    generator: str = ""
    vocabulary: tuple[Class, ...] = ()
    drawn: OnDraw = silent
    warn: Callable[[str], None] = silent
    tasks: tuple[Task, ...] = ()
    labels: str = "task"
    drawings: Callable[[], Images] | None = None

    def images(self, task: str, index: Tensor) -> Images:
        """Training images of a task by its name, those numbered ``index`` (n,). ``PerdureError`` where they are not at hand."""
        found = next(t for t in self.tasks if t.name == task).train
        if len(index) and not len(found):
            raise PerdureError(
                f"The method asks for training images of {task}, which are not at hand: a model in use keeps none. Choose "
                "one that needs no old images."
            )
        return found.take(index)
