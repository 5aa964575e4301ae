"""Options: dataclass fields that a preset or ``key=value`` on the command line may set.

A hyper-parameter is written once, as a field ``name: Annotated[type, Field(ge=…, description=…)] = default`` of a
``Config`` dataclass. Everything wrong with a set of values is reported together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from perdure.core.errors import PerdureError, nearest


@dataclasses.dataclass(frozen=True)
class Option:
    """One key that may be set: its type (with bounds), default and meaning."""

    key: str
    annotation: Any
    default: Any
    meaning: str

    @property
    def kind(self) -> str:
        """The type in words: ``number``, ``full | lora``, ``list of words``."""
        return in_words(self.annotation)

    @property
    def shown(self) -> str:
        """The default as it would be typed: ``0.2``, ``[q_proj, k_proj]``, ``none``."""
        value = list(self.default) if isinstance(self.default, tuple) else self.default
        if value is None or value == "":
            return "none" if value is None else ""
        return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")

    def parse(self, value: Any) -> Any:
        """The checked value; text is read as the field's type. Raises ``ValueError`` with one line for a person."""
        adapter = TypeAdapter(self.annotation)
        complaint = ""
        for reading in readings(value) if isinstance(value, str) else [value]:
            try:
                return finite(adapter.validate_python(reading))
            except ValidationError as error:
                complaint = complaint or "; ".join(e["msg"].lower() for e in error.errors())
            except ValueError as error:
                complaint = complaint or str(error)
        raise ValueError(complaint)


PLAIN = {int: "whole number", float: "number", str: "text", bool: "yes or no", type(None): "none", Path: "path"}


def in_words(kind: Any) -> str:
    """A type as people say it. ``TypeError`` for one that has no words yet."""
    base, arguments = get_origin(kind), get_args(kind)
    if base is Annotated:
        title = next((m.title for m in kind.__metadata__ if isinstance(m, FieldInfo) and m.title), None)
        return title or in_words(arguments[0])
    if base is Literal:
        return " | ".join(map(str, arguments))
    if base in (Union, UnionType):
        return " or ".join(map(in_words, arguments))
    if base in (tuple, list):
        inside = in_words(arguments[0])
        return f"list of {'words' if inside == 'text' else inside + 's'}"
    if base is dict:
        key = in_words(arguments[0])
        return f"{in_words(arguments[1])} by {'name' if key == 'text' else key}"
    if kind in PLAIN:
        return PLAIN[kind]
    raise TypeError(f"an option of the type {kind} cannot be set in words")


def finite(value: Any) -> Any:
    """``value``; ``ValueError`` where a number in it is infinite or not a number."""
    for number in value.values() if isinstance(value, dict) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError("input should be a finite number")
    return value


def readings(text: str) -> list[Any]:
    """What a person may have meant by ``text``: the text itself (1e-4 is a number to pydantic), YAML, or nothing."""
    try:
        structured = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        structured = text
    if isinstance(structured, bool):  # pydantic reads the words for it; a number is not meant by "yes"
        structured = text
    return [text, structured, *([None] if text.lower() in ("none", "null") else [])]


def options(config: type) -> dict[str, Option]:
    """The options of a dataclass, in order."""
    hints = get_type_hints(config, include_extras=True)
    out = {}
    for item in dataclasses.fields(config):
        hint = hints[item.name]
        described = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, FieldInfo)]
        meaning = described[0].description or "" if described else ""
        default = item.default if item.default is not dataclasses.MISSING else None
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        out[item.name] = Option(item.name, hint, default, meaning)
    return out


def pairs(arguments: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """``["lr=1e-4", …]`` → values by key, and a complaint for each argument that is not ``key=value``."""
    values: dict[str, str] = {}
    complaints = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key.strip():
            complaints.append(f"'{argument}' is not key=value.")
        elif key.strip() in values:
            complaints.append(f"'{key.strip()}' is given twice.")
        else:
            values[key.strip()] = value.strip()
    return values, complaints


def resolve(known: Mapping[str, Option], *layers: Mapping[str, Any], complaints: Iterable[str] = ()) -> dict[str, Any]:
    """Defaults, overridden by each layer in turn. Raises one ``PerdureError`` that lists everything wrong."""
    wrong = list(complaints)
    values = {key: option.default for key, option in known.items()}
    for layer in layers:
        for key, value in layer.items():
            if key not in known:
                wrong.append(f"There is no key '{key}'.{nearest(key, known)}")
                continue
            try:
                values[key] = known[key].parse(value)
            except ValueError as error:
                wrong.append(f"{key}={value}: {error} ({known[key].kind}; default {known[key].shown}).")
    if wrong:
        raise PerdureError("\n".join([*wrong, f"Keys: {', '.join(sorted(known))}."]))
    return values
