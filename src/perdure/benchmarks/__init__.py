"""Floor 5: the streams that methods are compared on. ``perdure streams`` lists them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from perdure.benchmarks import mini, mtil
from perdure.benchmarks.class_incremental import HOMES, SETTINGS, load_stream
from perdure.benchmarks.few_shot import SESSIONS, home_of, load_sessions
from perdure.core.registry import Registry
from perdure.data.task import Stream

MTIL = "each data set where torchvision keeps it; `perdure data check` lists them"
STREAMS: Registry[Callable[[], Stream]] = Registry("stream")
STREAMS.add(
    "mini-mtil", lambda: mini.multi_domain("I"), "Eight domains of drawings, one after another, alphabetically."
)
STREAMS.add("mini-mtil-2", lambda: mini.multi_domain("II"), "The same eight domains in another order.")
STREAMS.add(
    "mini-xtail", mini.cross_domain,
    "X-TAIL on them: 16 images a class, the classes of all domains compete from the start, the task is hidden.",
)  # fmt: skip
STREAMS.add("mini-cil", mini.class_incremental, "Sixty classes of drawings in ten steps, six new ones a step.")
STREAMS.add(
    "mini-fscil",
    mini.few_shot,
    "Few-shot class-incremental: thirty classes, then six sessions of five with five drawings each.",
)
for name in mini.DOMAINS:
    STREAMS.add(
        f"mini-base-to-new-{name}", partial(mini.half_taught, name),
        f"Base to new: half of the classes of {name} from 16 drawings each, the other half asked for.",
    )  # fmt: skip
STREAMS.add("mtil", lambda: mtil.mtil("I"), "Eleven data sets, one after another (order I).", home=MTIL)
STREAMS.add("mtil-2", lambda: mtil.mtil("II"), "The same eleven data sets in order II.", home=MTIL)
STREAMS.add(
    "x-tail", mtil.x_tail, "Ten of them, 16 images a class, the classes of all compete, the task is hidden.", home=MTIL
)
for name, (load, *_, summary) in SETTINGS.items():
    STREAMS.add(name, partial(load_stream, name), summary, home=HOMES[load.__name__])
for name, (*_, summary) in SESSIONS.items():
    STREAMS.add(name, partial(load_sessions, name), summary, home=home_of(name))
