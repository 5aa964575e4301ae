"""A run's model for others: a plain ``transformers`` checkpoint, whole or not at all, and beside it what that leaves out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perdure.core.caller import undisturbed
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.core.seeding import reseed
from perdure.core.state import write_json
from perdure.core.tensors import write_tensors
from perdure.data.task import Query, Stream
from perdure.engine.checkpoint import folder_names, module_state, read_task
from perdure.engine.settings import load_clip
from perdure.launch.runs import reopen
from perdure.methods.base import Method


def export(folder: Path, out: Path, task: int | None = None) -> str:
    """Write the weights of a run after ``task`` tasks (default: the last) as a ``transformers`` checkpoint; where the
    method keeps an expert a task, that of task number ``task``, as it is after the last task learned.

    What answers on top of the weights, a head say, goes beside it (``perdure.json``, ``perdure.safetensors``). Everything is
    checked before the work; ``out`` appears whole or not at all. Returns what was written and what plain transformers will
    not load, in words.
    """
    folder, out = expanded(folder), expanded(out)
    with undisturbed():
        config, data, method = reopen(folder)
        done = finished(folder, data, task)
        check_target(out, done, data, method, task, config)
        clip = load_clip(config, data.model)
        reseed(config["seed"], "bind")
        method.bind(clip, data.context(config["seed"]))
        check_modules(method, config["method"])
        clip.check_saveable()
        one_of_many = bool(task) and not method.carries_weights
        saved = read_task(done[-1 if task is None or one_of_many else task], tensors=True)
        saved.restore(method)
        said = f"The model after {saved.record['task']}"
        if one_of_many:
            assert task is not None
            (expert,) = method.experts(Query(data.tasks[task - 1].test.pixels[:0], (), task - 1))
            said = f"The expert of {data.tasks[task - 1].name}, after {saved.record['task']},"
        else:
            expert = method.base_expert()
        method.load_expert(expert)
        left = write(method, config, out)
        elsewhere = "" if method.head_expert().name == expert.name else method.head_expert().name
        return said + left_out(method, left, elsewhere)


def left_out(method: Method, left: list[str], elsewhere: str) -> str:
    """What plain transformers will not have of the method, in words; empty: nothing. ``elsewhere``: other weights than those
    written, on whose features a head stands."""
    said = []
    if left:
        stands = f", on features of the weights '{elsewhere}', not of these" if elsewhere else " of it"
        said.append(
            f"what answers on top{stands} ({', '.join(left)}: in perdure.json and perdure.safetensors beside it)"
        )
    if not method.carries_weights:
        said.append("the other tasks' experts, and how they answer together")
    return f" without {' and '.join(said)}," if said else ""


def finished(folder: Path, data: Stream, task: int | None) -> list[Path]:
    """The folders of the tasks that are done, row 0's first."""
    done = [folder / name for name in folder_names([t.name for t in data.tasks]) if (folder / name).exists()]
    if not done or (task is not None and task >= len(done)):
        raise PerdureError(f"{folder} has {max(0, len(done) - 1)} finished tasks.")
    return done


def check_target(
    out: Path, done: list[Path], data: Stream, method: Method, task: int | None, config: dict[str, Any]
) -> None:
    """Refuse a folder that is taken or cannot be written, and to choose among experts for the user."""
    check_free(out)
    if not method.carries_weights and task is None:
        known = ", ".join(f"{n} ({t.name})" for n, t in enumerate(data.tasks[: len(done) - 1], 1))
        raise PerdureError(f"{config['method']} keeps an expert a task. Say which with --task: {known or 0}.")


def check_free(out: Path) -> None:
    """Refuse a folder that is taken or cannot be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PerdureError(f"{out} exists. Choose a new folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise PerdureError(f"{out.parent} cannot be written to. Choose another folder.")


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to write, which becomes ``out`` when it is complete."""
    beside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if out.exists():
            out.rmdir()  # empty, as was checked
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_modules(method: Method, name: str) -> None:
    """Refuse modules that stand inside the towers: a plain checkpoint has no place for them."""
    if inside := method.clip.inside(method.modules()):
        raise PerdureError(
            f"{name} has put modules of its own into the towers ({', '.join(inside)}): without them it is another model, and "
            "a plain transformers checkpoint has no place for them. Nothing was written."
        )


def write(method: Method, config: dict[str, Any], out: Path) -> list[str]:
    """Write the checkpoint and what lies beside it; return the names of what plain transformers will not load."""
    with whole(out) as beside:
        method.clip.save(beside)
        files, values = method.answer_state()
        tensors = {f"state/{file}/{key}": t for file, own in files.items() for key, t in own.items()}
        tensors |= {f"modules/{key}": t for key, t in module_state(method).items()}
        left = sorted({*(k.split("/")[0] for own in files.values() for k in own), *method.modules()})
        if tensors:
            write_tensors(beside / "perdure.safetensors", tensors)
            about = {"method": config["method"], "options": config["options"], "values": values, "beside": left}
            write_json(beside / "perdure.json", about)
    return left
