"""Synthetic pairs, drawn ahead of the runs that replay them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from perdure.core.caller import undisturbed
from perdure.core.config import options, pairs, resolve
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.data.task import silent
from perdure.engine.settings import Settings
from perdure.launch.sources import Asked, stream_of
from perdure.synthesis.replay import Replay, Synthesis

GENERAL = ("device", "tasks", "threads")  # the settings of a run that matter here


def generate(
    stream: Asked, out: Path, *, seeds: Iterable[int] = (0,), assignments: Iterable[str] = (),
    drawn: Callable[[str, int, int, int], None] = silent, warn: Callable[[str], None] = silent,
) -> int:  # fmt: skip
    """Draw the synthetic pairs that runs of ``stream`` will ask for, into ``out``; return how many were drawn now.

    What lies there already is kept. ``drawn(task, done, total, new)`` hears how it goes. A run takes them with ``pairs=out``.
    """
    known = {**options(Synthesis), **{k: o for k, o in options(Settings).items() if k in GENERAL}}
    del known["pairs"]
    given, complaints = pairs(assignments)
    with undisturbed():
        data, out = stream_of(stream), expanded(out)
        suits = {key: value for key, value in data.defaults.get("all", {}).items() if key in known}
        values = resolve(known, suits, given, complaints=complaints)
        settings = Settings(**{k: values.pop(k) for k in GENERAL}).settled(data)
        settings.take_effect()
        total = 0
        for seed in seeds:
            learned: list[str] = []
            for task in data.shortened(settings.tasks, 0).tasks:
                context = data.context(seed, None, partial(drawn, task.name), warn)
                replay = Replay(Synthesis(**values, pairs=str(out)), context, 0, settings.device)
                if replay.collected:
                    raise PerdureError(
                        f"{out} holds collected pairs; nothing is to be drawn there. Choose another folder."
                    )
                total += replay.draw(replay.store(), replay.wanted(task.name, learned))
                learned += task.prompts()
    return total
