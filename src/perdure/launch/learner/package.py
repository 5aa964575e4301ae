"""A model in use for others: a folder that plain ``transformers`` loads, that answers as it did, and that says what it is.

``config.json`` …            a plain checkpoint: the weights that answer, or those that experts and heads stand on
``experts/NAME/``            one a task, where the method keeps an expert a task
``perdure.json``             the method, its options (of files that it learned with the names alone: it answers without them),
                             classes, and what of it plain transformers will not have
``perdure.safetensors``      heads, triggers, prototypes, modules, and changes to the weights
``base/``                    the model as it was found, where the plain checkpoint is another
``README.md``                the model card
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perdure.benchmarks import mini
from perdure.core.caller import undisturbed
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.core.state import read_json, write_json
from perdure.core.tensors import read_tensors, write_tensors
from perdure.data.task import Query
from perdure.engine.checkpoint import Saved, module_state
from perdure.engine.home import Learned
from perdure.engine.settings import load_clip
from perdure.engine.summary import FORMAT
from perdure.launch.export import check_free, check_modules, whole
from perdure.launch.learner.card import model_card, portable
from perdure.launch.learner.learner import Learner
from perdure.launch.learner.state import Current, bound, uncompiled
from perdure.launch.sources import find_method
from perdure.methods.base import METHODS, Method

TENSORS, ABOUT, BASE, EXPERTS = "perdure.safetensors", "perdure.json", "base", "experts"
PRIVATE = ("marks", "test_marks", "paths", "labels")  # of a task's record: pictures and where they lie


def export_home(home: Learner, out: str | Path) -> list[str]:
    """Write the model in use to ``out``, whole or not at all; return what plain transformers will not have of it."""
    out = expanded(out)
    check_free(out)
    with undisturbed():
        now = home.current()
        check_modules(now.method, home.config["method"])
        now.method.clip.check_saveable()
        with whole(out) as beside:
            left = write_package(home, now, beside)
            (beside / "README.md").write_text(
                model_card(home.config, home.history(), now.learned, left), encoding="utf-8"
            )
        return left


def write_package(home: Learner, now: Current, beside: Path) -> list[str]:
    """Write the checkpoints and what lies beside them; return what plain transformers will not have, in words."""
    method, clip, config = now.method, now.method.clip, uncompiled(home.config)
    method.publish()  # read anew for this, and thrown away after it
    files, values = method.pack_state()
    files["modules"] = module_state(method)
    if method.carries_weights:
        files["weights"] = clip.own_state()
    tensors = {f"{number}/{key}": t for number, own in enumerate(files.values()) for key, t in own.items()}
    with clip.preserved():
        base = method.base_expert()
        method.load_expert(base)
        clip.save(beside)
        root = clip.fingerprint()
        if root != config["weights"]:
            load_clip(config, str(mini.MODEL)).save(beside / BASE)
        experts = save_experts(method, now.learned, beside)
    sha256 = write_tensors(beside / TENSORS, tensors)[0] if tensors else None
    left = left_out(method, experts)
    model = "." if root == config["weights"] else BASE
    public = {key: value for key, value in portable(config).items() if key != "home"}
    kept = {key: value for key, value in config["options"].items() if value == public["options"][key]}
    public["options"], files_of = kept, {key: value for key, value in public["options"].items() if key not in kept}
    known = [(one.name, {key: value for key, value in one.about.items() if key not in PRIVATE}) for one in now.learned]
    public["settings"] = {**public["settings"], "model": model}
    write_json(beside / ABOUT, {
        "format": FORMAT, "config": public, "values": values, "learned_with": files_of,
        "tensors": sha256, "files": list(files),
        "beside": left, "experts": experts, "learned": [{"task": name, "about": about} for name, about in known],
    })  # fmt: skip
    return left


def save_experts(method: Method, learned: Sequence[Learned], beside: Path) -> dict[str, str]:
    """A plain checkpoint of each task's expert, where the method keeps one a task; their folders by task."""
    if method.carries_weights:
        return {}
    out = {}
    for number, one in enumerate(learned):
        (expert,) = method.experts(Query(one.task(number).test.pixels, (), number))
        folder = f"{EXPERTS}/{number + 1:02d}_{re.sub(r'[^A-Za-z0-9._-]+', '-', one.name)}"
        method.load_expert(expert)
        method.clip.save(beside / folder)
        out[one.name] = folder
    return out


def left_out(method: Method, experts: dict[str, str]) -> list[str]:
    """What plain transformers will not have, in words."""
    said = ["the head that answers on top of it"] if method.finalizes() else []
    said += [f"its modules ({', '.join(method.modules())})"] if method.modules() else []
    return said + (["how its experts answer together"] if experts else [])


# ---- and back


def is_export(folder: str | Path) -> bool:
    """Whether a folder holds an export, and no HOME."""
    return (expanded(folder) / ABOUT).exists()


def check_method(config: Mapping[str, Any], given: str) -> None:
    """Know the method of an export by its name. ``PerdureError`` where its file is needed, or another is ``given``."""
    source, name = config.get("source", {}).get("method", {}), config["method"]
    if given:
        entry, found = find_method(given)
        if entry.name != name or found.get("sha256") != source.get("sha256"):
            raise PerdureError(f"The export is of the method '{name}'{lies(source)}, and {given} is another.")
    elif source and name not in {entry.name for entry in METHODS}:
        raise PerdureError(
            f"The export is of the method '{name}'{lies(source)}, and an export carries no code. Name that file: "
            "perdure predict --method FILE, or Learner.from_pretrained(folder, method=FILE)."
        )


def lies(source: Mapping[str, Any]) -> str:
    """Where a method was read from, in words; empty: it is perdure's own."""
    return f", from {source['file']} (sha256 {source['sha256'][:16]}…)" if "file" in source else ""


class Exported(Learner):
    """An exported model: it answers as the model in use did, and learns nothing."""

    def __init__(self, folder: str | Path, method: str = ""):
        folder = expanded(folder)
        if not (folder / ABOUT).exists():
            raise PerdureError(
                f"{folder} is no export of a model in use: it has no {ABOUT}. Make one with: perdure export HOME DIR"
            )
        self.about = read_json(folder / ABOUT)
        if not isinstance(self.about, dict) or "learned" not in self.about:
            raise PerdureError(
                f"{folder} was exported from a run, not from a model in use. perdure.CLIP.load reads its weights."
            )
        check_method(self.about["config"], method)
        config = self.about["config"]
        place = (folder / config["settings"]["model"]).resolve()
        super().__init__(folder / "no-home")
        settings = {**config["settings"], "model": str(place)}
        known = {key: value for key, value in config.items() if key != "source"}  # by its name, which was checked
        self.folder, self.made = folder, {**known, "settings": settings}

    def current(self, new: Any = None) -> Current:
        about = self.about
        states = [
            Saved(self.folder, {"task": one["task"], "about": one["about"], "files": {}}, {})
            for one in about["learned"]
        ]
        learned = [Learned(saved) for saved in states]
        method = bound(self.folder, self.config, [one.task(k) for k, one in enumerate(learned)], self.watcher)
        last = Saved(self.folder, {"values": about["values"], "task": "export"}, self.files())
        last.restore(method)
        return Current(method, [last], learned, None)

    def files(self) -> dict[str, dict[str, Any]]:
        """The tensors as a task's folder keeps them."""
        if not self.about["tensors"]:
            return {}
        out: dict[str, dict[str, Any]] = {}
        for name, tensor in read_tensors(self.folder / TENSORS, self.about["tensors"]).items():
            number, _, key = name.partition("/")
            out.setdefault(self.about["files"][int(number)], {})[key] = tensor
        return out

    def newest(self) -> Path:
        return self.folder

    def learn(self, *given: Any, **more: Any) -> Any:
        raise PerdureError(
            f"{self.folder} is an export: it answers, and that is all. Learn into a HOME: perdure learn HOME PICTURES"
        )

    evaluate = history = undo = forget = export = kept = learn
