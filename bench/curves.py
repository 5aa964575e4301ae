"""Golden curves: five fp32 steps on each of two tasks of the small world, for every registered method, on one thread.

    python bench/curves.py FILE [--methods NAME …] [--missing]

writes every loss of every step, of a method's own phases too, and some logits after both tasks. ``tests/golden/curves.json`` is
such a file: a change of any number in it is a change of what a method computes. ``--missing`` leaves what the file has and adds
what it lacks. ``bench/compare_commits.py`` sets those of two commits side by side.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from perdure import launch
from perdure.benchmarks import mini
from perdure.core.caller import undisturbed
from perdure.core.errors import PerdureError
from perdure.core.seeding import reseed
from perdure.data.task import Query, Stream, Task
from perdure.engine.settings import Settings, opened
from perdure.engine.teach import Teacher
from perdure.engine.watcher import Watcher
from perdure.methods.base import Method, Row
from perdure.synthesis.store import collect

SEED, TASKS, SHOTS, STEPS, ASKED, PAIRS = 3, ("digits", "animals"), 2, 5, 3, 16
FILE = Path(__file__).parents[1] / "tests" / "golden" / "curves.json"
# Of all methods that have these options; small, and away from the defaults where a default would hide something.
VALUES: dict[str, Any] = {
    "iterations": STEPS, "warmup": 2, "lr": 2e-4, "batch_size": 4, "weight_decay": 0.01,
    "synthetic": 12, "synthetic_batch": 4, "reference_batch": 4,
    "features": 48, "judge": 16,
}  # fmt: skip
# Of single methods: what they count in epochs, and what would take long.
OWN: dict[str, dict[str, Any]] = {
    "keep_lora": {"epochs": 0, "lr": 5e-2},
    "mg_clip": {"iterations": 0, "warmup": 0, "epochs": 1, "most_epochs": 2},
    "moe_adapters": {"experts": 3, "reference": "none", "selector_steps": 5, "selector_code": 8},
    "codyra": {"kappa": 0.02, "kappa_steps": 2},
    "slca": {"align_draws": 8},
    "cgil": {"draws": 2, "vae_passes": 10, "vae_hidden": 8, "vae_latent": 4},
    "clg_cbm": {"per_class": 2, "epochs": 1, "search_epochs": 1},
    "taalm": {"meta_source": "drawings", "meta_steps": 2, "meta_batch": 1, "hidden": 4},
    "td_vcl": {"n": 2},
}
Curve = dict[str, Any]  # "losses": task → loss → a value a step; "phases": task → phase → …; "logits": task → numbers


def names() -> list[str]:
    """Every method and row of perdure's own that can run; others may have been brought in by files."""
    known = [entry for entry in launch.methods() if "role" not in entry.about]
    return [e.name for e in known if isinstance(e.value, Row) or e.value.__module__.startswith("perdure.")]


def made(name: str) -> Method:
    """The method with its short training."""
    known = {key: option.default for key, (_, option) in launch.method_options(launch.method_entry(name)).items()}
    asked = dict(VALUES)
    for part, values in OWN.items():
        if part in name.split("+"):
            asked |= values
    if known.get("epochs") and "epochs" not in asked:  # counted in epochs as a rule: one, of five to eight steps
        asked["epochs"] = 1
    return launch.build(name, {**known, **{key: value for key, value in asked.items() if key in known}})


def short() -> Stream:
    """Two tasks of few classes, with two training images a class."""
    whole = mini.multi_domain("I")
    tasks = {task.name: task for task in whole.tasks}
    chosen = tuple(replace(tasks[name], index=k) for k, name in enumerate(TASKS))
    return replace(whole, tasks=chosen).few_shot(SHOTS, SEED)


def drawings(folder: Path) -> None:
    """Real drawings in the place of synthetic ones: what a diffusion model draws differs visibly between processors."""
    task = mini.class_incremental().tasks[0]
    images = task.train.spread(PAIRS)
    collect(folder, images.pixels, [task.prompts()[k] for k in images.labels.tolist()], "mini-cil")


def curve(name: str, watcher: Watcher | None = None, **how: Any) -> Curve:
    """The numbers of one method. ``watcher`` hears of its steps; ``how``: settings of a run, of where and in what precision it
    is computed. The process is left as it was."""
    stream = short()
    with undisturbed(), tempfile.TemporaryDirectory() as folder:
        settings = Settings(**{"precision": "fp32", "device": "cpu", "threads": 1, "workers": 0, **how})
        settings.take_effect()
        clip = opened(settings, str(mini.MODEL))
        drawings(Path(folder) / "pairs")
        method, out = made(name), Curve(losses={}, phases={}, logits={})
        teacher = Teacher(method, SEED, settings, watcher or Watcher())
        reseed(SEED, "bind")
        method.bind(clip, stream.context(SEED, Path(folder)))
        method.lend(teacher.train)
        for number, task in enumerate(stream.tasks, 1):
            losses = teacher.learn(lesson(method, stream, number), number)
            out["losses"][task.name] = dict(losses)
            out["phases"][task.name] = {phase: dict(found) for phase, found in teacher.phases.items()}
        queries = [Query(t.test.pixels[:: len(t.test) // ASKED][:ASKED], t.classes, t.index) for t in stream.tasks]
        for task, logits in zip(stream.tasks, method.answer(queries), strict=True):
            out["logits"][task.name] = logits[:, :ASKED].float().flatten().tolist()
    return out


def lesson(method: Method, stream: Stream, number: int) -> Task | None:
    """What is learned as number 1, 2, …: a task, or by a method that sees the whole stream all of it first."""
    if method.scope == "task":
        return stream.tasks[number - 1]
    return stream.joined(grouped=True) if number == 1 else None


def read(path: Path) -> dict[str, Curve]:
    """The curves of a file; of one that is not there none."""
    found: dict[str, Curve] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def write(path: Path, curves: dict[str, Curve]) -> None:
    """A line a method, so that a change shows which."""
    lines = [f" {json.dumps(name)}: {json.dumps(curves[name])}" for name in sorted(curves)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def numbers(found: Any, where: str = "") -> dict[str, float]:
    """Every number of a curve by its place: ``losses/food/task/3``."""
    if isinstance(found, dict):
        parts = [numbers(value, f"{where}{key}/") for key, value in found.items()]
        return {place: value for part in parts for place, value in part.items()}
    if isinstance(found, list):
        return {f"{where}{k}": value for k, value in enumerate(found, 1)}
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=FILE)
    parser.add_argument("--methods", nargs="+", default=[], help="these alone; the others stay in the file as they are")
    parser.add_argument("--missing", action="store_true", help="only those that the file lacks")
    asked = parser.parse_args()
    known, curves = names(), read(asked.file)
    curves = {name: found for name, found in curves.items() if name in known}
    for name in [n for n in known if n in (asked.methods or known)]:
        if asked.missing and name in curves:
            continue
        try:
            curves[name] = curve(name)
        except PerdureError as error:
            print(f"{name}: {error}", flush=True)
            continue
        print(f"{name}: {len(numbers(curves[name]))} numbers", flush=True)
        write(asked.file, curves)


if __name__ == "__main__":
    main()
