"""Names for things that can be chosen on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from perdure.core.errors import unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered thing, with one sentence about it and where it comes from."""

    name: str
    value: T
    summary: str
    paper: str = ""
    about: dict[str, Any] = field(default_factory=dict)


class Registry(Generic[T]):
    """A mapping from names to things, whose error for an unknown name suggests the nearest one."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def add(self, name: str, value: T, summary: str, paper: str = "", **about: Any) -> None:
        if name in self._entries:
            raise ValueError(f"the {self.kind} '{name}' exists already; give yours another name")
        self._entries[name] = Entry(name, value, summary, paper, about)

    def remove(self, name: str) -> None:
        """Forget a name, where it is known: a file that was changed registers it anew."""
        self._entries.pop(name, None)

    def register(self, name: str, paper: str = "", **about: Any) -> Callable[[T], T]:
        """Decorator; the summary is the docstring's first line."""

        def add(value: T) -> T:
            self.add(name, value, (value.__doc__ or "").strip().split("\n")[0], paper, **about)
            return value

        return add

    def __getitem__(self, name: str) -> Entry[T]:
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries[name] for name in sorted(self._entries))


@dataclass(frozen=True)
class Row:
    """A baseline that is only a combination of parts: role → (method, option values)."""

    learn: tuple[str, dict[str, Any]]
    fuse: tuple[str, dict[str, Any]] | None = None
    answer: tuple[str, dict[str, Any]] | None = None

    def parts(self) -> dict[str, tuple[str, dict[str, Any]]]:
        named = {"learn": self.learn, "fuse": self.fuse, "answer": self.answer}
        return {role: part for role, part in named.items() if part is not None}
