"""What a method keeps beyond the weights: a dataclass whose fields come back by value and by type.

A field is one of three kinds, by its annotation:

    dict[str, Tensor]              tensors, in one file ``state``
    dict[str, dict[str, Tensor]]   a file an entry; where an entry is ``Frozen`` it is written once
    anything that JSON can hold    numbers, words, lists, tuples, dictionaries … of a stated type
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from torch import Tensor

from perdure.core.errors import DamagedFile, PerdureError

S = TypeVar("S")
TENSORS, FILES = dict[str, Tensor], dict[str, dict[str, Tensor]]
Packed = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]  # a state as (tensors by file, plain values)
VAGUE = (Any, object, dict, list, tuple, set, frozenset)  # say nothing of what is inside


LARGE = 1 << 26  # bytes from which frozen tensors stay in their file


class Frozen(dict[str, Tensor]):
    """Tensors that never change once they are made: a checkpoint writes them once, and names them again after that.

    Large ones then stay in that file (``file``), from which each is read when it is asked for.
    """

    file: Mapping[str, Tensor] | None = None

    def stay_in(self, file: Mapping[str, Tensor]) -> None:
        """Hold no tensor any more: ``file`` has the same."""
        self.clear()
        self.file = file

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name) if self.file is None else self.file[name]

    def __iter__(self) -> Iterator[str]:
        return super().__iter__() if self.file is None else iter(self.file)

    def __len__(self) -> int:
        return super().__len__() if self.file is None else len(self.file)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) if self.file is None else name in self.file

    def keys(self) -> Any:
        return super().keys() if self.file is None else self.file.keys()

    def values(self) -> Any:
        return super().values() if self.file is None else self.file.values()

    def items(self) -> Any:
        return super().items() if self.file is None else self.file.items()


def kinds(state: type) -> dict[str, Any]:
    """The fields of a ``State`` class: ``TENSORS``, ``FILES``, or what reads and writes plain values.

    ``PerdureError`` for a class with a field that could not come back as it was.
    """
    if not dataclasses.is_dataclass(state):
        raise PerdureError(f"{state.__qualname__} is no dataclass: decorate the State of a method with @dataclass.")
    fields = dataclasses.fields(state)
    try:
        hints = get_type_hints(state)
    except NameError as error:
        raise PerdureError(
            f"The State {state.__qualname__} names a type that is not known ({error}). Define or import it in the module."
        ) from None
    return {field.name: kind_of(state, field.name, hints[field.name]) for field in fields}


def kind_of(state: type, name: str, hint: Any) -> Any:
    """The kind of one field."""
    for kind in (TENSORS, FILES):
        if hint == kind:
            return kind
    refused = PerdureError(
        f"The field '{name}: {hint}' of the State {state.__qualname__} could not be kept as it is. A field is "
        "dict[str, Tensor], dict[str, dict[str, Tensor]], or of a type that JSON can hold and that says what is inside, "
        "as list[str] or dict[int, float]."
    )
    if not told(hint):
        raise refused
    try:
        return TypeAdapter(hint)
    except PydanticSchemaGenerationError:
        raise refused from None


def told(hint: Any) -> bool:
    """Whether a type says what is inside, down to the last, and no tensor is."""
    if hint in VAGUE or hint in (Tensor, bytes) or getattr(get_origin(hint), "__module__", "") == "collections.abc":
        return False
    if get_origin(hint) is dict and get_args(hint)[0] not in (str, int, float, bool):
        return False  # JSON has no other keys
    inside = get_args(hint) if get_origin(hint) is not None or isinstance(hint, types.UnionType) else ()
    return all(told(part) for part in inside if isinstance(part, type) or get_args(part) or part in VAGUE)


def pack(state: Any) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """A ``State`` → (tensors by file, plain values). Refuses a value that is not of its field's type."""
    files: dict[str, dict[str, Tensor]] = {}
    values: dict[str, Any] = {}
    for name, kind in kinds(type(state)).items():
        value = getattr(state, name)
        if kind in (TENSORS, FILES):
            check_tensors(type(state), name, value, kind is FILES)
        if kind is TENSORS:
            files.setdefault("state", {}).update({f"{name}/{key}": tensor for key, tensor in value.items()})
            if list(value) != sorted(value):
                values[name] = {"keys": list(value)}
        elif kind is FILES:
            files.update({f"{name}/{entry}": tensors for entry, tensors in value.items()})
            once = [entry for entry, tensors in value.items() if isinstance(tensors, Frozen)]
            values[name] = {"entries": list(value), "once": once}
        else:
            values[name] = plain(type(state), name, kind, value)
    return {name: tensors for name, tensors in files.items() if tensors}, values


def check_tensors(state: type, name: str, value: Any, nested: bool) -> None:
    """Refuse what a field of tensors would not give back: other keys than words, other values than tensors."""
    entries = value.values() if nested else [value]
    wrong = [key for own in (value, *entries) for key in own if not isinstance(key, str)]
    wrong += [
        key for own in entries if not (isinstance(own, Frozen) and own.file is not None)
        for key, one in own.items() if not isinstance(one, Tensor)
    ]  # fmt: skip
    if wrong:
        raise PerdureError(
            f"The field '{name}' of the State {state.__qualname__} holds tensors by words, and nothing else: {wrong[0]!r} is "
            "no word, or what it names is no tensor."
        )


def plain(state: type, name: str, kind: TypeAdapter[Any], value: Any) -> Any:
    """A plain value as JSON holds it. ``PerdureError`` where it would come back as another."""
    again: Any = None
    try:
        written = kind.dump_python(value, mode="json", warnings="error")
        again = kind.validate_json(kind.dump_json(value))
    except (ValueError, TypeError) as error:  # of pydantic, all of them
        reason = " ".join(str(error).split())
    else:
        if again == value and type(again) is type(value):
            return written
        reason = f"it would come back as {again!r}"
    raise PerdureError(f"The field '{name}' of the State {state.__qualname__} holds {value!r:.200}: {reason}.")


def unpack(state: type[S], files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> S:
    """The inverse of ``pack``. A field that was not kept, as an older version had no such, has its default."""
    found: dict[str, Any] = {}
    for name, kind in kinds(state).items():
        about = values.get(name)
        if kind is TENSORS:
            mark = f"{name}/"
            own = {k.removeprefix(mark): t for k, t in files.get("state", {}).items() if k.startswith(mark)}
            order = about["keys"] if isinstance(about, dict) and "keys" in about else sorted(own)
            found[name] = {key: own[key] for key in order}
        elif kind is FILES:
            about = about or {"entries": []}
            once = about.get("once", True)  # format 1 had one word for all entries
            once = once if isinstance(once, list) else about["entries"] if once else []
            kept = {entry: entry_of(files, name, entry) for entry in about["entries"]}
            found[name] = {
                entry: tensors if isinstance(tensors, Frozen) else (Frozen if entry in once else dict)(tensors)
                for entry, tensors in kept.items()
            }
        elif name in values:
            try:
                found[name] = kind.validate_python(about, strict=False)
            except ValidationError as error:
                raise DamagedFile(f"The state '{name}' of {state.__qualname__} is damaged: {error}.") from None
    return state(**found)


def frozen_files(values: Mapping[str, Any], mark: str = "") -> set[str]:
    """The names of the files of a packed state, or of a composition's, whose tensors are ``Frozen``."""
    found = set()
    for name, about in values.items():
        if isinstance(about, dict) and isinstance(about.get("once"), list) and "entries" in about:
            found |= {f"{mark}{name}/{entry}" for entry in about["once"]}
        elif isinstance(about, dict) and not mark:
            found |= frozen_files(about, f"{name}.")
    return found


def entry_of(files: Mapping[str, Mapping[str, Tensor]], name: str, entry: str) -> Mapping[str, Tensor]:
    """The tensors of one entry; format 1 began with an underscore in the place of the slash. One without tensors is empty."""
    return files.get(f"{name}/{entry}") or files.get(f"{name}_{entry}") or {}
