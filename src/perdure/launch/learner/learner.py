"""A model in use, in three lines of Python; the commands ``learn``, ``predict``, ``evaluate``, ``history``, ``undo`` and
``forget`` are its methods.

>>> from perdure import Learner
>>> learner = Learner("HOME")
>>> print(learner.learn("photos/"))
>>> learner.predict("holiday.jpg")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perdure.benchmarks.own.pictures import Pictures
from perdure.core import stopping
from perdure.core.caller import undisturbed
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.core.state import only_one
from perdure.data.task import Stream, Task
from perdure.engine import home, keeping
from perdure.engine.checkpoint import folder_name, free_name
from perdure.engine.keeping import Keep
from perdure.engine.run import finite
from perdure.engine.settings import Settings
from perdure.engine.steps import forget as forget_steps
from perdure.engine.watcher import Watcher
from perdure.launch.learner.answers import Answer, Shown, answered
from perdure.launch.learner.comparison import Outcome, Outcomes, Row, compared, refusal
from perdure.launch.learner.making import Asked, can_learn, check_same, configured, elsewhere, find_again, read_home
from perdure.launch.learner.pictures import check_apart, check_unchanged, pictures_of, planned, prepared
from perdure.launch.learner.pictures import unlabelled_pictures as unlabelled_of
from perdure.launch.learner.probe import probe_of
from perdure.launch.learner.state import Current, begin, bound, check_task, forget, noted, uncompiled, write_state


class Learner:
    """The model in ``folder`` (HOME), made when it first learns.

    ``model``: a folder or Hub id of a CLIP (default: the embedded one); ``method``: a name or file (default: ridge_patches);
    ``options``: of the method, of precision, device, threads and workers, as ``key=value`` is on the command line;
    ``keep``: of each task's test pictures, ``pictures`` (at the model's size), ``paths`` or ``none``; ``probe``: a folder
    ``CLASS/*`` of pictures that no task teaches, to measure what it could do before. Of a HOME that is there already, what is
    given must be what it was made with. Raises ``PerdureError`` for anything the caller can put right.
    """

    def __init__(
        self, folder: str | Path, *, model: str = "", method: str = "", probe: str | Path | None = None,
        keep: Keep | None = None, seed: int | None = None, watcher: Watcher | None = None, **options: Any,
    ):  # fmt: skip
        self.folder, self.watcher = expanded(folder), watcher or Watcher()
        self.asked = Asked(model, method, str(probe or ""), keep, seed, options)
        self.made = read_home(self.folder)
        if self.made is not None:
            find_again(self.made)
            self.asked = replace(self.asked, method=method or self.made["method"])
            check_same(self.folder, self.made, self.asked)
        self.here = elsewhere(self.asked)
        self.seen: tuple[Path, int] | None = None  # which state that is, and when it was written
        self.ready: Current | None = None  # what answered last, where nothing has been learned since

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the HOME. ``PerdureError`` where it has learned nothing yet."""
        if self.made is None:
            self.made = read_home(self.folder)
        if self.made is None:
            raise PerdureError(
                f"{self.folder} has learned nothing yet. Begin with: perdure learn {self.folder} PICTURES"
            )
        return {**self.made, "settings": {**self.made["settings"], **self.here}}

    def there(self) -> Path:
        """The folder. ``PerdureError`` where it has learned nothing yet."""
        _ = self.config
        return self.folder

    # ---- learning

    def learn(
        self, pictures: str | Path | Pictures | Stream, *, name: str = "", max_loss: float | None = None,
        dry_run: bool = False, unlabelled: bool = False, told: Callable[[Outcome], None] = lambda outcome: None,
    ) -> Outcomes:  # fmt: skip
        """Learn the pictures of a folder (``CLASS/*``: one task; ``TASK/CLASS/*``: one after another), or of whatever else
        ``perdure run --stream`` takes.

        A result that costs an earlier task or the probe more than ``max_loss`` points is refused: the state before stays
        current, and the new one lies beside it. None: more than 2 points, and more than chance takes. What was learned
        before is not learned again. ``name``: of the task, instead of the folder's. ``dry_run``: say what would be learned.
        ``unlabelled``: learn from all pictures of a folder without knowing what they show, where the method can. ``told``
        hears of each task as soon as it is learned: what comes after may fail.
        """
        with undisturbed():
            make, stream = (unlabelled_of if unlabelled else pictures_of)(pictures, name)
            config = self.made or configured(self.folder, stream, self.asked, self.watcher.warn)
            can_learn(config, stream, max_loss)
            check_apart(self.folder, pictures)
            if dry_run or len(stream.tasks) > 1:  # what is wrong with a later task is said before the first is learned
                plan = planned(stream, home.known(self.folder))
            if dry_run:
                return plan
            self.folder.mkdir(parents=True, exist_ok=True)
            with only_one(self.folder):
                begin(self.folder, config, self.watcher)
                forget_steps(self.folder, [path.name for path in home.numbered(self.folder)])
                self.made = read_home(self.folder)
                out: list[Outcome] = []
                for task in stream.tasks:
                    out.append(self.learn_one(task, max_loss, lambda: check_unchanged(make, stream), told))
                    if not out[-1].accepted:
                        break
                return Outcomes(out)

    def current(self, new: Task | None = None) -> Current:
        """What the HOME holds now, read and checked; ``new``: a task that is about to be learned."""
        config = self.config if new else uncompiled(self.config)
        states, learned = home.course(self.folder)
        tasks = [one.task(k) for k, one in enumerate(learned)]
        method = bound(self.folder, config, [*tasks, new] if new else tasks, self.watcher)
        states[-1].restore(method)
        return Current(method, states, learned, probe_of(self.folder, config, method.clip))

    def learn_one(
        self, task: Task, max_loss: float | None, check: Callable[[], None], told: Callable[[Outcome], None]
    ) -> Outcome:
        """Learn a task, measure, and take it or refuse it. ``check``: what must still hold when it is learned; ``told``
        hears what it has cost before anything can stop it."""
        ready, about, said = prepared(task, home.course(self.folder, tensors=False)[1])
        if ready is None:
            told(old := Outcome(task.name, already=True, notes=tuple(said)))
            return old
        now = self.current(ready)
        number, view = len(now.states), now.method.clip.view
        task = replace(ready, index=len(now.learned), train=ready.train.at(*view), test=ready.test.at(*view))
        said += check_task(task, now)
        self.watcher.begins([*(t.name for t in now.tasks), task.name], [], [])
        self.watcher.learns(task.name, number)
        steps = now.steps(self.folder, self.config, task, about, self.watcher)
        start, before = time.perf_counter() - steps.spent, now.before(task)
        teacher = now.teacher(self.config, self.watcher)
        losses = teacher.learn(task, number, steps)
        learned = time.perf_counter()
        self.watcher.evaluates()
        after = now.measure(task)
        rows = compared(now.rows(task), before, after.own, after.of_all)
        refused = refusal(rows, task.name, max_loss)
        check()
        files, kept = keeping.kept_tests(self.config["home"]["keep"], task.test)
        more = {
            "losses": losses, "phases": teacher.phases, "remarks": finite(now.method.remarks()), "about": {**about, **kept},
            "refused": refused, "max_loss": max_loss,
        }  # fmt: skip
        place = folder_name(number, task.name)
        place = free_name(self.folder / f"{home.REFUSED}{place}").name if refused else place
        record = noted(task.name, number, (start, learned)) | more
        with stopping.held():
            write_state(self.folder / place, self.config, now, after, record, rows, files)
            steps.done() if refused else home.let_go(self.folder)
            self.ready = None
            told(out := Outcome(task.name, tuple(rows), self.folder / place, refused, notes=tuple(said)))
        return out

    # ---- looking back

    def evaluate(self) -> list[Row]:
        """Every task whose test pictures are there, and the probe, measured anew."""
        with undisturbed():
            now = self.current()
            found = now.measure()
            return compared(now.rows(), {}, found.own, found.of_all)

    def history(self) -> list[dict[str, Any]]:
        """What was learned, in order, and what was refused or undone: records as ``state.json`` keeps them, with ``state``
        (current, forgotten, refused or undone) and ``folder``."""
        return home.history(self.there())

    def kept(self) -> str:
        """What is kept of test pictures, and how much room the HOME takes, in words."""
        return keeping.kept(self.folder, self.config["home"]["keep"])

    def undo(self, to: int | None = None) -> list[str]:
        """Take back the last task, or all after task number ``to`` (0: all). Nothing is deleted: their folders are renamed.
        Returns the names of the tasks taken back, the last one first."""
        with only_one(self.there()):
            self.ready = None
            return [path.name.removeprefix(home.UNDONE) for path in home.set_back(self.folder, to)]

    def forget(self, name: str) -> list[Row]:
        """Unlearn one task, as if it had never been learned, where the method can: the sums of a closed-form head less the
        task's, ConDU's experts without the task's. It is a new state, which ``undo`` takes back: the states before it, which
        still know the task, stay in the folder. Returns what became of the others."""
        with undisturbed(), only_one(self.there()):
            now = self.current()
            with stopping.held():
                rows = forget(self.folder, self.config, now, name)
                self.ready = None
            return rows

    # ---- answering, and others

    def newest(self) -> Path:
        """Where the current state lies: another process may have learned since this one looked."""
        return home.numbered(self.there())[-1]

    def loaded(self) -> Current:
        """The state that answers: the one of the last answer, or read anew where something has been learned since."""
        newest = self.newest()
        mark = newest, newest.stat().st_mtime_ns  # what was taken back may have been learned anew under the same name
        if self.ready is None or self.seen != mark:
            with undisturbed():
                self.ready, self.seen = self.current(), mark
        return self.ready

    def predict(
        self, images: Shown, *, classes: Sequence[str] | None = None, topk: int = 1, explain: bool = False
    ) -> list[Answer]:
        """What each picture shows: of ``classes``, or of all that was learned. ``images``: a path, a folder, a list of paths,
        or images in memory (N, 3, H, W), uint8 or float in 0 … 1. ``explain``: and why, where the method has concepts."""
        now = self.loaded()
        with undisturbed():
            Settings.recorded(self.config["settings"]).take_effect()
            return answered(now.method, now.learned, images, classes, topk, explain)

    def export(self, out: str | Path) -> list[str]:
        """Write the model to a folder: a plain ``transformers`` checkpoint (one an expert, where it keeps several), what that
        leaves out beside it, and a model card. Returns what plain transformers will not have of it, in words."""
        from perdure.launch.learner.package import export_home

        return export_home(self, out)

    @staticmethod
    def from_pretrained(folder: str | Path, method: str = "") -> Learner:
        """The exported model in ``folder``: it answers the same bits as the model in use did, and learns nothing. ``method``:
        the file of a method that was read from one; an export carries no code."""
        from perdure.launch.learner.package import Exported

        return Exported(folder, method)
