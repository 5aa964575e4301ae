"""The model card of an exported model: what it is, what it knows, what was lost, and how to make it again."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from perdure.core.config import options as options_of
from perdure.engine.home import Learned
from perdure.engine.settings import ELSEWHERE, Settings
from perdure.launch.folders import plain
from perdure.launch.options import method_options
from perdure.launch.sources import find_method


def model_card(
    config: Mapping[str, Any], history: Sequence[Mapping[str, Any]], learned: Sequence[Learned], left: Sequence[str]
) -> str:
    """A ``README.md`` as the Hugging Face Hub reads it."""
    config = portable(config)
    current = [one for one in history if one["state"] == "current"]
    rows = current[-1]["rows"] if current else []
    return "\n".join(
        [
            "---", yaml.safe_dump(header(config, rows), sort_keys=False, allow_unicode=True).strip(), "---", "",
            f"# {config['stream']}", "",
            f"A CLIP that learned {len(learned)} task{'s' * (len(learned) != 1)} one after another with "
            f"perdure {config['environment']['perdure']}, method `{config['method']}`.",
            "", "## What it knows", "", *known(learned), "",
            "## What was won and lost", "", *course(current, rows), "",
            "## How to use it", "", *usage(left), "",
            "## How it was made", "", "```sh", *commands(config, history), "```", "",
            f"Base model: {base_of(config)} (sha256 of its weights {config['weights'][:16]}…). Options: "
            + (", ".join(f"`{k}={v}`" for k, v in sorted(config["options"].items())) or "none") + ".",
            "",
        ]
    )  # fmt: skip


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what belongs to the maker's machine: of files the names alone, and nothing of how it was
    trained there, compiled say."""
    source = {
        kind: {key: named(value) for key, value in about.items()} for kind, about in config.get("source", {}).items()
    }
    options = {key: named(value) for key, value in config["options"].items()}
    usual = {key: option.default for key, option in options_of(Settings).items() if key in ELSEWHERE}
    settings = {**config["settings"], **usual, **{key: config["settings"][key] for key in ("device", "threads")}}
    return {**config, "options": options, "settings": settings, **({"source": source} if source else {})}


def named(value: Any) -> Any:
    """Of a file or folder its name; anything else as it is."""
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


def header(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the Hub reads of a card."""
    base = config["settings"]["model"]
    hub = {} if base == "stream" or os.path.isabs(base) else {"base_model": base, "base_model_relation": "finetune"}
    measured = [row for row in rows if row["after"] is not None]
    results = [
        {
            "task": {"type": "zero-shot-image-classification"}, "dataset": {"name": row["name"], "type": row["name"]},
            "metrics": [{"type": "accuracy", "value": round(row["after"] / 100, 4)}],
        }
        for row in measured
    ]  # fmt: skip
    return {
        "library_name": "perdure", "pipeline_tag": "zero-shot-image-classification",
        "tags": ["perdure", "clip", "continual-learning"],
        **hub, "metrics": ["accuracy"],
        **({"model-index": [{"name": config["stream"], "results": results}]} if results else {}),
    }  # fmt: skip


def base_of(config: Mapping[str, Any]) -> str:
    """The base model for people; a folder by its name alone."""
    base = config["settings"]["model"]
    return "the CLIP embedded in perdure" if base == "stream" else str(named(base))


def known(learned: Sequence[Learned]) -> list[str]:
    """The classes of each task."""
    own = [", ".join(c.name for c in one.classes) or "pictures without labels" for one in learned]
    return [f"- **{one.name}**: {words}" for one, words in zip(learned, own, strict=True)] or ["Nothing yet."]


def course(current: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy by task: when it was learned and now."""
    first: dict[str, Mapping[str, Any]] = {
        one["task"]: next((r for r in one["rows"] if r["name"] == one["task"]), {}) for one in current
    }
    probe = next((r["before"] for one in current for r in one["rows"] if r["name"] == "probe"), None)
    out = ["| accuracy, % | before | when learned | now | test images |", "|---|---|---|---|---|"]
    for row in rows:
        own = first.get(row["name"], {})
        before = probe if row["name"] == "probe" else own.get("before")
        name = "zero-shot probe (classes that no task taught)" if row["name"] == "probe" else row["name"]
        figures = (before, own.get("after"), row["after"])
        out.append(
            f"| {name} | {' | '.join('–' if x is None else f'{x:.1f}' for x in figures)} | {row['images'] or '–'} |"
        )
    if all(row["name"] != "probe" or row["after"] is None for row in rows):
        out += ["", "Zero-shot ability was not measured: there was no probe."]
    return [*out, "", "Each task among its own classes; 'before' is the model as it was when the task came."]


def usage(left: Sequence[str]) -> list[str]:
    """How to load it, and what plain transformers will not have."""
    whole = f", without {' and '.join(left)}." if left else "; it is the whole model."
    return [
        "```python", "from perdure import Learner", 'learner = Learner.from_pretrained("FOLDER")',
        'learner.predict("picture.jpg")', "```", "",
        f"`transformers.AutoModel.from_pretrained` loads the checkpoint in this folder too{whole}",
    ]  # fmt: skip


def commands(config: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The commands that repeat it, with the folders of pictures by their names."""
    base = config["settings"]["model"]
    first = "" if base == "stream" else f" --from {shlex.quote(named(base))}"
    file = config.get("source", {}).get("method", {}).get("file")
    first += f" --method {shlex.quote(file) if file else config['method']}"
    seed = f" --seed {config['seed']}" if config["seed"] else ""
    about = config.get("home", {})
    seed += f" --keep {about['keep']}" if about.get("keep", "pictures") != "pictures" else ""
    if about.get("probe", {}).get("kind") == "pictures":
        seed += f" --probe {shlex.quote(os.path.basename(about['probe']['folder']))}/"
    seed += "".join(f" {shlex.quote(word)}" for word in chosen(config))
    out = []
    for one in history:
        if one["state"] not in ("current", "forgotten"):
            continue
        if "forgot" in one:
            out.append(f"perdure forget HOME {shlex.quote(one['forgot'])}")
        else:
            unlabelled = "" if one.get("about", {}).get("classes", True) else " --unlabelled"
            folder = shlex.quote(f"{one['task']}/")
            most = "" if one.get("max_loss") is None else f" --max-loss {one['max_loss']:g}"
            out.append(f"perdure learn HOME {folder}{unlabelled}{most}" + (first + seed if not out else ""))
    return out


def chosen(config: Mapping[str, Any]) -> list[str]:
    """Options that are not the defaults, as the command line takes them, and the precision."""
    known = {key: option for key, (_, option) in method_options(find_method(config["method"])[0]).items()}
    values = {key: value for key, value in config["options"].items() if plain(value) != plain(known[key].default)}
    typed = {key: replace(known[key], default=value).shown for key, value in sorted(values.items())}
    return [f"{key}={text}" for key, text in {**typed, "precision": config["settings"]["precision"]}.items()]
