"""Where else a run's figures go while it runs: trackers behind one interface.

``jsonl``        ``RUN/track.jsonl``: one JSON object a line
``csv``          ``RUN/track.csv``: one figure a line
``tensorboard``  ``RUN/tensorboard/``: event files
``wandb``        Weights & Biases, online or (``WANDB_MODE=offline``) in ``RUN/wandb/``

Each takes the configuration once, a record of every training step and one of every row. What an earlier process wrote after
the last row that was kept is taken back, where that can be done: a run that was killed leaves the records of one that was not.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import netrc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlparse

from perdure.core.errors import PerdureError
from perdure.core.registry import Registry
from perdure.core.state import write_bytes


@dataclass(frozen=True)
class Record:
    """Figures by name, of a training step or of a row. ``number``: of the task (0: before any); ``step``: of the task's
    training; ``at``: training steps since the run began."""

    kind: Literal["step", "row"]
    number: int
    task: str
    at: int
    figures: Mapping[str, float]
    step: int = 0


@dataclass(frozen=True)
class Begun:
    """What a tracker is opened with: the run, and how many of its ``rows`` (0: it is new) and steps (``at``) were kept."""

    folder: Path
    about: Mapping[str, Any]
    identity: str
    rows: int = 0
    at: int = 0


@dataclass
class Tracker:
    """Takes the records of one run."""

    packages: ClassVar[Sequence[str]] = ()
    begun: Begun
    own: Any = field(default=None, init=False)

    @classmethod
    def check(cls) -> None:
        """Refuse, before the work, what could not be written to."""

    def open(self) -> None:
        """Begin, or go on."""

    def write(self, record: Record) -> None:
        """Take a record."""

    def close(self) -> None:
        """No more will come."""


TRACKERS: Registry[type[Tracker]] = Registry("tracker")


def checked(names: str | Sequence[str]) -> list[type[Tracker]]:
    """The trackers of names, one after another or with commas between; each once. ``PerdureError`` for an unknown one, one
    whose package is not installed, and one that nobody is logged in to."""
    listed = names.split(",") if isinstance(names, str) else names
    kinds = [TRACKERS[name.strip()] for name in dict.fromkeys(listed) if name.strip()]
    for entry in kinds:
        for package in entry.value.packages:
            try:
                importlib.import_module(package)
            except ModuleNotFoundError as error:
                raise PerdureError(
                    f"The tracker {entry.name} needs the package {error.name or package}, which is not installed: "
                    f"pip install 'perdure[{entry.name}]'. jsonl and csv need none."
                ) from None
        entry.value.check()
    return [entry.value for entry in kinds]


class Lines(Tracker):
    """A text file of lines, each of a task's number."""

    name: ClassVar[str]
    head = ""

    def number(self, line: str) -> int:
        """The number of the task that a line is of; -1 of the first. ``ValueError`` for half a line."""
        raise NotImplementedError

    def open(self) -> None:
        path = self.begun.folder / self.name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and self.begun.rows else []
        kept = "".join(f"{line}\n" for line in lines[1:] if self.kept(line))
        write_bytes(path, f"{self.head}\n{kept}".encode())
        self.own = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def kept(self, line: str) -> bool:
        """Whether a line is of a row that was kept."""
        try:
            return self.number(line) < self.begun.rows
        except (ValueError, LookupError, TypeError):
            return False  # cut off by a kill

    def say(self, text: str) -> None:
        self.own.write(text)
        self.own.flush()

    def close(self) -> None:
        self.own.close()


@TRACKERS.register("jsonl")
class JSONLines(Lines):
    """A JSON object a line."""

    name = "track.jsonl"

    def open(self) -> None:
        self.head = json.dumps({"kind": "config", **self.begun.about}, ensure_ascii=False)
        super().open()

    def number(self, line: str) -> int:
        return int(json.loads(line)["number"])

    def write(self, record: Record) -> None:
        place = {
            "kind": record.kind,
            "number": record.number,
            "task": record.task,
            "step": record.step,
            "at": record.at,
        }
        self.say(json.dumps({**place, **finite(record.figures)}, ensure_ascii=False) + "\n")


@TRACKERS.register("csv")
class CSV(Lines):
    """A figure a line: a table that any program reads."""

    name = "track.csv"
    head = "kind,number,task,step,at,figure,value"

    def open(self) -> None:
        super().open()
        if not self.begun.rows:
            self.rows(["config", 0, "", 0, 0, key, value] for key, value in flat(self.begun.about))

    def number(self, line: str) -> int:
        cells = next(csv.reader([line]))
        return int(cells[1]) if len(cells) == 7 else int("")

    def write(self, record: Record) -> None:
        place = (record.kind, record.number, record.task, record.step, record.at)
        self.rows([*place, name, value] for name, value in finite(record.figures).items())

    def rows(self, rows: Iterator[list[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self.say(text.getvalue())


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """Event files for ``tensorboard --logdir``."""

    packages = ("tensorboard",)

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        begun = self.begun
        self.own = SummaryWriter(str(begun.folder / "tensorboard"), purge_step=begun.at + 1 if begun.rows else 0)
        lines = [f"| {key} | {value} |" for key, value in flat(begun.about)]
        self.own.add_text("config", "\n".join(["| key | value |", "|---|---|", *lines]), begun.at)

    def write(self, record: Record) -> None:
        for name, value in record.figures.items():
            self.own.add_scalar(name, value, record.at)
        if record.kind == "row":
            self.own.flush()

    def close(self) -> None:
        self.own.close()


@TRACKERS.register("wandb")
class WandB(Tracker):
    """Weights & Biases; with ``WANDB_MODE=offline`` in the run's folder alone."""

    packages = ("wandb",)

    @classmethod
    def check(cls) -> None:
        if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or logged_in():
            return
        raise PerdureError(
            "The tracker wandb: nobody is logged in here. Say wandb login, set WANDB_API_KEY, or keep the figures here with "
            "WANDB_MODE=offline (and send them later with wandb sync)."
        )

    def open(self) -> None:
        import wandb

        begun = self.begun
        self.own = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "perdure"), name=begun.folder.name, id=begun.identity,
            dir=str(begun.folder), config=dict(flat(begun.about)), resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip

    def write(self, record: Record) -> None:
        self.own.log(dict(record.figures), step=record.at)

    def close(self) -> None:
        # of a run that is broken off it is said that it crashed
        self.own.finish(exit_code=int(sys.exc_info()[0] is not None))


def logged_in() -> bool:
    """Whether there are credentials for Weights & Biases: in the environment, or where ``wandb login`` puts them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [os.environ.get("NETRC"), os.path.expanduser("~/.netrc"), os.path.expanduser("~/_netrc")]
    for place in filter(None, places):
        try:
            if netrc.netrc(place).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Figures as JSON has them: what is no number is null."""
    return {name: value if abs(value) < float("inf") else None for name, value in figures.items()}


def flat(about: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as ``outer/inner`` → value."""
    for key, value in about.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", value
