"""Teaching a method one task: learn, fuse, calibrate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from perdure.core import stopping
from perdure.core.seeding import reseed
from perdure.data.task import Batch, Task
from perdure.engine.settings import Settings
from perdure.engine.steps import Steps
from perdure.engine.watcher import Watcher
from perdure.methods.base import Method
from perdure.training.fit import Losses, OnStep, Stepper, fit, optimise
from perdure.training.progress import NOTHING_KEPT, Place, Saver
from perdure.training.schedule import Schedule


class Teacher:
    """Takes a bound method through a task at a time; what it draws depends on the seed and the task's number alone.

    ``phases``: the losses of the phases that the method trained beside the last task, by name.
    """

    def __init__(self, method: Method, seed: int, settings: Settings, watcher: Watcher):
        self.method, self.seed, self.settings, self.watcher = method, seed, settings, watcher
        self.phases: dict[str, Losses] = {}
        self.stepped = watcher.step  # hears of each step of a task
        self.steps: Steps | None = None

    def learn(self, task: Task | None, number: int, steps: Steps | None = None) -> Losses:
        """Learn ``task`` as number 1, 2, …; return its losses, one value a step by name. None: there is nothing to learn.
        ``steps``: where its trainings are saved as they go, and gone on with."""
        method, self.steps = self.method, steps
        generator, self.phases = reseed(self.seed, number), {}
        if task is None or not method.learns:
            return Losses()
        method.start(task)
        if method.foresees():
            with self.before_the_head():
                method.foresee(task)
        losses = self.train_on(task, generator) if method.trains_on(task) else Losses()
        stopping.stop_together()
        method.fuse(task)
        stopping.stop_together()
        with self.before_the_head():
            method.calibrate(task)
        return losses

    def train_on(self, task: Task, generator: torch.Generator) -> Losses:
        """Take a task's steps."""
        method, clip = self.method, self.method.clip
        material = method.material(task)
        method.begin_task(material)
        s = self.settings

        def plan() -> Schedule:
            return method.schedule(material).over(len(material.train))

        heard, saver = self.told(task.name, plan, self.stepped), self.saver(task.name, plan)
        with stopping.held(working=True):
            losses = fit(
                method, material, generator, clip.size, clip.device, s.precision, heard, workers=s.workers, saver=saver
            )
        if losses.steps:
            clip.trained(f"trained {task.name}", method.parameters().values())
        return losses

    @contextlib.contextmanager
    def before_the_head(self) -> Iterator[None]:
        """Meanwhile, the model holds the weights that a head stands on."""
        method, clip = self.method, self.method.clip
        with clip.preserved(), clip.remembering(method.steady()):
            method.load_expert(method.head_expert())
            yield

    def train(self, learner: Stepper, schedule: Schedule, draws: Iterator[Batch], name: str) -> Losses:
        """What a method is lent for a phase of its own: the run's device, precision and progress, and a place in the record."""
        device, saver = self.method.clip.device, self.saver(name, lambda: schedule)
        heard = self.told(name, lambda: schedule, self.watcher.step)
        with stopping.held(working=True):
            for _ in range(saver.begin(learner)):
                next(draws)
            losses = optimise(learner, schedule, draws, device, self.settings.precision, heard, name, saver)
        self.phases[name] = losses
        towers = {id(p) for p in self.method.clip.backbone.parameters()}
        if losses.steps and any(id(p) in towers for p in learner.parameters().values()):
            self.method.clip.trained(f"trained in {name}", learner.parameters().values())
        return losses

    def told(self, name: str, schedule: Callable[[], Schedule], heard: OnStep) -> OnStep:
        """``heard``, before which the watcher hears of the schedule: anew where a training begins anew."""
        last = [0]

        def step(step: int, total: int, losses: Mapping[str, Tensor]) -> None:
            if not last[0] or step <= last[0]:
                self.watcher.trains(name, schedule())
            last[0] = step
            heard(step, total, losses)

        return step

    def saver(self, name: str, schedule: Callable[[], Schedule]) -> Saver:
        """Who keeps the next training of the task; the watcher hears of what an earlier process had done of it."""

        def taken_up(place: Place) -> None:
            self.watcher.trains(name, schedule())
            self.watcher.took_up(place.record)

        return self.steps.training(name, taken_up) if self.steps else NOTHING_KEPT
