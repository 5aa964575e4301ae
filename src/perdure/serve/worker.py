"""The one thread that asks the model: it takes what is waiting, shows it to the model at once, and hands the answers back."""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from perdure.core.errors import DamagedFile, PerdureError
from perdure.data.places import InMemory
from perdure.launch.learner import Learner
from perdure.launch.learner.answers import Answer
from perdure.serve.limits import Limits, Refused
from perdure.serve.pictures import trouble


@dataclass(frozen=True)
class Answered:
    """A row a picture, as ``Learner.predict`` has them, and the name of the state that answered."""

    state: str
    rows: list[Answer]


@dataclass(frozen=True)
class Question:
    """Pictures of one request, and what is asked about them."""

    pictures: Sequence[InMemory]
    classes: tuple[str, ...] | None
    topk: int
    answer: Future[Answered] = field(default_factory=Future)

    @property
    def kind(self) -> tuple[tuple[str, ...] | None, int]:
        """What requests must have in common to be answered together."""
        return self.classes, self.topk


class Worker:
    """Answers questions of ``learner``, which nobody else may ask meanwhile, from ``start`` to ``stop``."""

    def __init__(self, learner: Learner, limits: Limits):
        self.learner, self.limits = learner, limits
        self.waiting: deque[Question] = deque()
        self.changed, self.stopping = threading.Condition(), False
        self.state = ""  # which answered last
        self.method = ""
        self.thread = threading.Thread(target=self.work, name="perdure-answers", daemon=True)
        self.ready: Future[None] = Future()

    def start(self) -> None:
        """Load the model. Raises whatever loading it raises."""
        self.thread.start()
        self.ready.result()

    def stop(self) -> None:
        """Finish what is being answered; what still waits is refused."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join()

    def ask(self, question: Question) -> Future[Answered]:
        """Put a question in the queue. Of its answer, ``Refused`` says why there is none."""
        with self.changed:
            if self.stopping:
                raise Refused(503, "The server is being stopped.", retry_after=5)
            self.waiting.append(question)
            self.changed.notify()
        return question.answer

    # ---- in the thread

    def work(self) -> None:
        try:
            self.learner.loaded()
            self.state = self.answering()
            self.method = self.learner.config["method"]
        except BaseException as error:  # whatever it is, it belongs to who called start()
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        while batch := self.take():
            self.answer(batch)
        for question in self.waiting:
            question.answer.set_exception(Refused(503, "The server is being stopped.", retry_after=5))

    def take(self) -> list[Question]:
        """The question that has waited longest, and others of its kind, up to ``batch`` pictures; none: it is over."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.stopping)
            if self.stopping:
                return []
            first = self.waiting.popleft()
            batch, room, later = [first], self.limits.batch - len(first.pictures), deque[Question]()
            for one in self.waiting:
                if one.kind == first.kind and len(one.pictures) <= room:
                    batch.append(one)
                    room -= len(one.pictures)
                else:
                    later.append(one)
            self.waiting = later
        return batch

    def answer(self, batch: list[Question]) -> None:
        """Ask the model, once; every question gets its rows, or why there are none."""
        try:
            rows = iter(self.rows(batch))
            self.state = self.answering()
            for question in batch:
                question.answer.set_result(Answered(self.state, [next(rows) for _ in question.pictures]))
        except Exception as error:  # a server goes on whatever one request brings about
            for question in batch:
                if not question.answer.done():
                    question.answer.set_exception(refusal(error))

    def answering(self) -> str:
        """The name of the state that answered: not the newest, if another process has learned just now."""
        return self.learner.ready.last.folder.name if self.learner.ready else ""

    def rows(self, batch: list[Question]) -> list[Answer]:
        pictures = [picture for question in batch for picture in question.pictures]
        troubles = [trouble(picture, self.limits) for picture in pictures]
        sound = [picture for picture, bad in zip(pictures, troubles, strict=True) if not bad]
        found = iter(self.found(sound, batch[0]) if sound else [])
        return [
            {"path": picture.name, "error": bad} if bad else next(found)
            for picture, bad in zip(pictures, troubles, strict=True)
        ]

    def found(self, pictures: list[InMemory], asked: Question) -> list[Answer]:
        """What the model says of pictures that can be read; and why, where its method has concepts."""
        why = self.learner.loaded().method.explains()
        return self.learner.predict(pictures, classes=asked.classes, topk=asked.topk, explain=why)


def refusal(error: Exception) -> Refused:
    """What is said to those who asked."""
    if isinstance(error, DamagedFile | OSError):
        print(f"Error: {error}", file=sys.stderr)
        return Refused(503, "The model cannot be read just now; the server's terminal says why.", retry_after=5)
    if isinstance(error, PerdureError):
        return Refused(400, str(error))
    traceback.print_exception(error)
    return Refused(500, "Something went wrong that should not; the server's terminal says what.")
