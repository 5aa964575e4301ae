"""Where methods and streams come from: the package, entry points, a file, or the caller's hand.

A file (``path/to/mine.py``, or ``path/to/mine.py:name`` where it holds several) registers what it brings, or defines one
subclass of ``Method`` (one function ``stream()``). A run records it with its checksum, so that it is known again.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from perdure.benchmarks import STREAMS
from perdure.benchmarks.own.pictures import Pictures
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.core.registry import Entry, Registry
from perdure.core.state import digest
from perdure.data.task import Stream
from perdure.methods import load_all
from perdure.methods.base import METHODS, Method, Row

Asked = str | Pictures | Stream  # how a stream is asked for
# {"file": …, "sha256": …}, {"where": …} of pictures with the columns that were named, or {"object": …}; empty: the package's
# own, or an entry point's.
Source = dict[str, str]
# What importing somebody's file may raise; anything else is no mistake in a file.
MISTAKES = (
    SyntaxError, ImportError, NameError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError, OSError,
    AssertionError, RuntimeError, SystemExit,
)  # fmt: skip
LOADED: dict[tuple[str, str], dict[str, Any]] = {}  # (path, sha256) → entries by name


def methods() -> list[Entry[Any]]:
    """Every registered method and table row."""
    load_all()
    plug_in("perdure.methods")
    return list(METHODS)


def method_entry(name: str) -> Entry[Any]:
    """A method or row that can run by itself, by its name or file. ``PerdureError`` for anything else."""
    return find_method(name)[0]


def find_method(what: str | type[Method]) -> tuple[Entry[Any], Source]:
    """The entry of a method given by name, file or class, and where it comes from."""
    known = methods()
    if isinstance(what, type):
        return method_of_class(what)
    if is_file(what):
        return from_file(what, METHODS, method_in)
    runnable = {e.name for e in known if "role" not in e.about}
    entry = METHODS[what]
    if what not in runnable:
        rows = sorted(e.name for e in METHODS if isinstance(e.value, Row) and what in dict(e.value.parts().values()))
        raise PerdureError(f"'{what}' plays the role {entry.about['role']} only. Rows that use it: {', '.join(rows)}.")
    return entry, {}


def method_of_class(kind: type[Method]) -> tuple[Entry[Any], Source]:
    """A method handed over as a class; one that is not registered is, under its name in small letters."""
    if not issubclass(kind, Method):
        raise PerdureError(f"{kind.__name__} is no method: it should be a subclass of perdure.Method.")
    entry = next((e for e in METHODS if e.value is kind), None)
    if entry is None:
        name = kind.__name__.lower()
        old = next((e.value for e in METHODS if e.name == name), None)
        if old is not None and getattr(old, "__module__", "perdure.").startswith("perdure."):
            raise PerdureError(f"There is a method '{name}' already: give the class {kind.__name__} another name.")
        METHODS.remove(name)  # defined anew, in a notebook say
        METHODS.add(name, kind, (kind.__doc__ or "").strip().split("\n")[0])
        entry = METHODS[name]
    if kind.__module__.startswith("perdure."):
        return entry, {}
    found = inspect.getsourcefile(kind) if kind.__module__ != "__main__" else None
    if found and Path(found).is_file():
        return entry, {"file": str(Path(found).resolve()), "sha256": digest(Path(found).read_bytes())}
    return entry, {"object": kind.__qualname__}


def find_stream(what: Asked) -> tuple[Callable[[], Stream], str, Source]:
    """What makes a stream given by name, file, as pictures or as an object; its name, and where it comes from."""
    plug_in("perdure.streams")
    if isinstance(what, Stream):
        return lambda: what, what.name, {"object": what.name}
    if isinstance(what, str) and is_file(what):
        entry, source = from_file(what, STREAMS, stream_in)
        return entry.value, entry.name, source
    pictures = what if isinstance(what, Pictures) else Pictures(what)
    if not pictures.keys and (not pictures.kind or any(e.name == pictures.where for e in STREAMS)):
        return STREAMS[pictures.where].value, pictures.where, {}
    pictures = pictures.settled()
    return pictures.load, pictures.name, {"where": pictures.where, **pictures.keys}


def stream_of(what: Asked) -> Stream:
    """A stream given by name, file, as pictures or as an object."""
    return find_stream(what)[0]()


# ---- files


def is_file(word: str) -> bool:
    """Whether a word means a file: ``mine.py`` or ``mine.py:name``."""
    return word.endswith(".py") or ".py:" in word


def from_file(
    word: str, registry: Registry[Any], alone: Callable[[ModuleType], dict[str, Any]]
) -> tuple[Entry[Any], Source]:
    """The entry that a file brings, and its source. ``alone`` finds what it defines without registering."""
    place, _, name = word.rpartition(":") if ".py:" in word else (word, "", "")
    path = expanded(place).resolve()
    if not path.is_file():
        raise PerdureError(
            f"There is no file {path}. Give the path of a Python file, or a name: perdure {registry.kind}s."
        )
    sha256 = digest(path.read_bytes())
    key = (f"{registry.kind} {path}", sha256)
    if key not in LOADED:
        LOADED[key] = load_file(path, registry, alone)
    found = LOADED[key]
    if name and name not in found:
        raise PerdureError(f"{path} brings no {registry.kind} '{name}'. It brings: {', '.join(sorted(found))}.")
    if not name and len(found) > 1:
        raise PerdureError(
            f"{path} brings several {registry.kind}s. Say which: {', '.join(f'{place}:{n}' for n in sorted(found))}."
        )
    entry = found[name or next(iter(found))]
    return entry, {"file": str(path), "sha256": sha256}


def load_file(
    path: Path, registry: Registry[Any], alone: Callable[[ModuleType], dict[str, Any]]
) -> dict[str, Entry[Any]]:
    """Import a file under a name of its own; return the entries that it brings."""
    for (old, _), entries in LOADED.items():
        if old == f"{registry.kind} {path}":  # the file was changed since: its entries make room
            for name in entries:
                registry.remove(name)
    before = {e.name for e in registry}
    name = f"perdure_file_{digest(f'{registry.kind} {path}'.encode())[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if {e.name for e in registry} == before:
            for new, value in alone(module).items():
                registry.add(new, value, (value.__doc__ or "").strip().split("\n")[0])
    except (*MISTAKES, PerdureError) as error:
        for entry in [e for e in registry if e.name not in before]:
            registry.remove(entry.name)
        raise PerdureError(f"{path} cannot be used: {where(error, path)}{type(error).__name__}: {error}") from error
    entries = {e.name: e for e in registry if e.name not in before}
    if not entries:
        raise PerdureError(
            f"{path} brings no {registry.kind}: it should hold a subclass of Method, or register one with @register(name)."
            if registry is METHODS
            else f"{path} brings no stream: it should hold a function stream() that returns one, or add to STREAMS."
        )
    return entries


def where(error: BaseException, path: Path) -> str:
    """``line 12: `` for the last line of ``path`` that an error passed through."""
    lines = [error.lineno] if isinstance(error, SyntaxError) else []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f"line {lines[-1]}: " if lines else ""


def method_in(module: ModuleType) -> dict[str, Any]:
    """The one subclass of ``Method`` that a file defines, under its name in small letters, as ``method_of_class``."""
    own = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, Method) and v.__module__ == module.__name__
    ]
    return {own[0].__name__.lower(): own[0]} if len(own) == 1 else {}


def stream_in(module: ModuleType) -> dict[str, Any]:
    """The function ``stream()`` of a file, under the file's name."""
    made = getattr(module, "stream", None)
    return {Path(str(module.__file__)).stem: made} if callable(made) else {}


def reopened(kind: str, name: str, source: Source) -> Any:
    """What finds a recorded method or stream again: a word, or pictures. ``PerdureError`` where its file is gone or another."""
    if "object" in source:
        raise PerdureError(
            f"The {kind} '{name}' of this run was handed over as an object, which only Python code can do again: "
            f"perdure.resume(folder, {kind}=…)."
        )
    if not source:
        return name
    if "file" not in source:
        pictures = Pictures(
            **{key.replace("folder", "where"): word for key, word in source.items()}
        )  # older runs: folder
        if pictures.gone():
            raise PerdureError(f"The pictures of this run lay in {pictures.where}, which is gone. Put it back.")
        return pictures
    path = Path(source["file"])
    if not path.is_file():
        raise PerdureError(f"The {kind} '{name}' of this run was read from {path}, which is gone. Put the file back.")
    if digest(path.read_bytes()) != source["sha256"]:
        raise PerdureError(
            f"The {kind} '{name}' of this run was read from {path}, which has changed since (its checksum differs). Put the "
            "file back as it was, or start a new run."
        )
    return f"{path}:{name}"


# ---- entry points


@cache
def plug_in(group: str) -> None:
    """Load what other packages bring under an entry point; one that fails is named in a warning, and not there."""
    registry: Registry[Any] = METHODS if group == "perdure.methods" else STREAMS
    for point in sorted(importlib.metadata.entry_points(group=group), key=lambda p: p.name):
        try:
            value = point.load()
            known = [e for e in registry if e.value is value or e.name == point.name]
            if not inspect.ismodule(value) and not known:
                registry.add(point.name, value, (value.__doc__ or "").strip().split("\n")[0])
        except (*MISTAKES, PerdureError) as error:
            warnings.warn(
                f"The entry point {group}: {point.name} = {point.value} cannot be used: {error}", stacklevel=2
            )
