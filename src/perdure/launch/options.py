"""What may be set of a method, and the method that values make.

An option belongs to a role and a key. Where a later role of a composition has a key that an earlier one has too, it is
written with its role: ``fuse.alpha``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from perdure.core.config import Option, options
from perdure.core.registry import Entry
from perdure.launch.sources import method_entry
from perdure.methods.base import METHODS, Method, Row
from perdure.methods.compose import Compose


def method_options(entry: Entry[Any]) -> dict[str, tuple[str, Option]]:
    """The options of a method, or of the parts of a row: key as it is written → (role, option)."""
    if not isinstance(entry.value, Row):
        return {key: ("learn", option) for key, option in options(entry.value.Config).items()}
    out: dict[str, tuple[str, Option]] = {}
    for role, (part, fixed) in entry.value.parts().items():
        kind = METHODS[part].value
        for key, option in options(kind.role_options.get(role, kind.Config)).items():
            written = key if key not in out else f"{role}.{key}"
            default = fixed.get(key, option.default)
            out[written] = (role, dataclasses.replace(option, key=written, default=default))
    return out


def build(name: str, values: Mapping[str, Any]) -> Method:
    """The method, or the composition that a row stands for, with resolved option values."""
    return build_entry(method_entry(name), values)


def build_entry(entry: Entry[Any], values: Mapping[str, Any]) -> Method:
    """``build`` for a registered method or row."""
    if not isinstance(entry.value, Row):
        return entry.value(**values)
    known = method_options(entry)
    parts = {}
    for role, (part, fixed) in entry.value.parts().items():
        own = {key.removeprefix(f"{role}."): values[key] for key, (owner, _) in known.items() if owner == role}
        parts[role] = METHODS[part].value(**{**fixed, **own})
    return Compose(**parts) if len(parts) > 1 else parts["learn"]
