"""Where else a run's figures go while it runs: trackers behind one interface.

``jsonl``        ``RUN/track.jsonl``: one JSON object a line
``csv``          ``RUN/track.csv``: one figure a line
``tensorboard``  ``RUN/tensorboard/``: event files
``wandb``        Weights & Biases, online or (``WANDB_MODE=offline``) in ``RUN/wandb/``

Each takes the configuration once, a record of every training step and one of every row. What an earlier process wrote after
the last row that was kept is taken back, where that can be done: a run that was killed leaves the records of one that was not.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from perdure.core.errors import PerdureError
from perdure.launch.trackers import files, services  # noqa: F401 (they register what they bring)
from perdure.launch.trackers.base import TRACKERS, Begun, Record, Tracker

__all__ = ["TRACKERS", "Begun", "Record", "Tracker", "checked"]


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
