"""Trackers that other packages bring: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import netrc
import os
import sys
from urllib.parse import urlparse

from perdure.core.errors import PerdureError
from perdure.launch.trackers.base import TRACKERS, Record, Tracker, flat


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
