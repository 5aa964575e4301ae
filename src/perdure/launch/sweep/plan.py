"""The runs of a sweep: which there are, where each lies, and what is wrong with them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from perdure.benchmarks import STREAMS
from perdure.core.config import options, pairs
from perdure.core.errors import PerdureError, nearest
from perdure.core.paths import expanded
from perdure.core.state import digest, read_json, write_json
from perdure.engine.settings import Settings
from perdure.launch.configure import configure
from perdure.launch.folders import asked_alike, read_config
from perdure.launch.options import method_options
from perdure.launch.sources import find_method, find_stream, is_file, stream_of

FILE, FORMAT = "sweep.json", 1
LONG = 120  # characters of a folder's name; of a longer one the end is told by a checksum
OPEN, CLOSE = "[{(", "]})"


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep, in one seed or several: ``folder`` is laid out as ``perdure run --seeds`` does it."""

    folder: Path
    label: str
    method: str
    stream: str
    words: tuple[str, ...]
    seed: int
    seeds: int
    key: str = ""  # what was asked for, whatever else is in the sweep

    @property
    def runs(self) -> list[Path]:
        """The folders of its runs."""
        several = range(self.seed, self.seed + self.seeds)
        return [self.folder / f"seed_{n}" for n in several] if self.seeds > 1 else [self.folder]

    def check(self) -> dict[str, Any]:
        """The configuration of its runs, without the model. Refuses what a run would refuse, as far as that can be told."""
        return configure(self.method, self.stream, self.seed, self.words, {}, lambda text: None)[0]

    def claimed(self) -> bool:
        """Whether its runs have all been begun, as they are asked for now."""
        if not all((one / "config.json").exists() for one in self.runs):
            return False
        now, then = self.check(), [read_config(one) for one in self.runs]
        return not any(asked_alike(one, {**now, "weights": one["weights"], "seed": one["seed"]}) for one in then)


@dataclass(frozen=True)
class Plan:
    """What a sweep was asked for. ``values``: ``key=v1,v2``; a key counts for those methods that have it. ``orders``: the
    stream's own order, and further ones by the seeds 1, 2, … of ``class_order`` or ``task_order``. ``how``: how its runs are
    done, by name."""

    methods: tuple[str, ...]
    streams: tuple[str, ...]
    values: tuple[str, ...] = ()
    seed: int = 0
    seeds: int = 1
    orders: int = 1
    how: Mapping[str, Any] = field(default_factory=dict)

    def write(self, out: Path, cells: Sequence[Cell] = ()) -> None:
        """Keep it in a sweep's folder, and under which name each setting lies there, those of earlier plans too."""
        names = {**names_in(out), **{cell.key: cell.folder.name for cell in cells}}
        write_json(out / FILE, {"format": FORMAT, **asdict(self), "folders": names})

    @classmethod
    def read(cls, out: Path) -> Plan:
        """The plan that a sweep's folder keeps. ``PerdureError`` where it holds none."""
        if not (out / FILE).exists():
            raise PerdureError(
                f"{out} holds no sweep (it has no {FILE}). Give one: perdure sweep --methods A,B --streams S --out {out}"
            )
        found = read_json(out / FILE)
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise PerdureError(
                f"{out / FILE} was written by another version of perdure (format {FORMAT} is read here)."
            )
        about: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in found.items() if key != "folders"
        }
        return cls(**about)

    def cells(self, out: Path, threads: int = 0) -> list[Cell]:
        """Its settings, in order; everything wrong with them is reported together. ``threads`` of a run, where the values do
        not say; 0: as torch chooses."""
        grid, complaints = self.grid()
        known = {method: known_options(method) for method in self.methods}
        every = {key for keys in known.values() for key in keys}
        complaints += [f"There is no key '{key}'.{nearest(key, every)}" for key in sorted(set(grid) - every)]
        if complaints:
            raise PerdureError("\n".join(complaints))
        both = itertools.product(self.streams, self.methods)
        cells = [c for stream, method in both for c in self.cells_of(out, method, stream, grid, known[method])]
        if threads and "threads" not in grid:
            cells = [replace(cell, words=(*cell.words, f"threads={threads}")) for cell in cells]
        if twice := [c.folder.name for k, c in enumerate(cells) if c.folder in {d.folder for d in cells[:k]}]:
            raise PerdureError(f"The sweep has the setting {twice[0]} twice. Name each method, stream and value once.")
        for cell in cells:
            try:
                cell.check()
            except PerdureError as error:
                complaints.append(f"{cell.label}: {error}" if str(error) not in "\n".join(complaints) else "")
        if complaints := [text for text in complaints if text]:
            raise PerdureError("\n".join(complaints))
        return cells

    def grid(self) -> tuple[dict[str, list[str]], list[str]]:
        """The choices of each key, and complaints."""
        given, complaints = pairs(self.values)
        grid = {key: choices(value) for key, value in given.items()}
        for key in ("class_order", "task_order"):
            if self.orders > 1 and key in grid:
                complaints.append(f"--orders and {key} say the same twice. Give one of them.")
        complaints += [f"{key}: a value is given twice." for key, found in grid.items() if len(set(found)) < len(found)]
        return grid, complaints

    def cells_of(
        self, out: Path, method: str, stream: str, grid: dict[str, list[str]], known: set[str]
    ) -> Iterator[Cell]:
        """The settings of one method on one stream."""
        name, where, names = find_method(method)[0].name, find_stream(stream)[1], names_in(out)
        own = {key: found for key, found in grid.items() if key in known}
        key = order_key(stream) if self.orders > 1 else ""
        for order, *picked in itertools.product(range(self.orders), *own.values()):
            chosen = dict(zip(own, picked, strict=True))
            told = [f"{k}={v}" for k, v in chosen.items() if len(own[k]) > 1]
            told += [f"order {order}"] if self.orders > 1 else []
            words = [f"{k}={v}" for k, v in chosen.items()] + ([f"{key}={order}"] if order else [])
            asked = " ".join([method, stream, *sorted(words), f"seeds {self.seed}+{self.seeds}"])
            folder = out / names.get(asked, folder_name("-".join([name, where, *told])))
            label = ", ".join([f"{name} on {where}" if len(self.streams) > 1 else name, *told])
            yield Cell(folder, label, method, stream, tuple(words), self.seed, self.seeds, asked)


def names_in(out: Path) -> dict[str, str]:
    """The folder of each setting that a sweep's folder has been asked for: what is added to a sweep renames nothing."""
    found = read_json(out / FILE) if (out / FILE).exists() else {}
    names: dict[str, str] = found.get("folders", {}) if isinstance(found, dict) else {}
    return names


def planned(methods: Sequence[str], streams: Sequence[str], values: Sequence[str] = (), **more: Any) -> Plan:
    """A plan whose files are named by whole paths: a job may be done in another folder."""
    known = {entry.name for entry in STREAMS}
    learners = [whole(one) if is_file(one) else one for one in methods]
    return Plan(tuple(learners), tuple(s if s in known else whole(s) for s in streams), tuple(values), **more)


def whole(word: str) -> str:
    """A path (``mine.py:name`` too) from the root on; a word that is none as it is."""
    path, colon, rest = word.partition(".py:") if is_file(word) else (word, "", "")
    found = expanded(f"{path}.py" if colon else path)
    return f"{found.resolve()}{':' if colon else ''}{rest}" if found.exists() else word


def known_options(method: str) -> set[str]:
    """The keys that a run of a method has."""
    return {*method_options(find_method(method)[0]), *options(Settings)}


def order_key(stream: str) -> str:
    """The setting by which a stream's order is another."""
    return "class_order" if stream_of(stream).labels == "seen" else "task_order"


def choices(text: str) -> list[str]:
    """``a,[b,c]`` → ``a`` and ``[b,c]``: values with commas between, brackets and quotes kept whole."""
    found, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        depth += 0 if quote else (c in OPEN) - (c in CLOSE)
        if c == "," and not quote and not depth:
            found.append("")
        else:
            found[-1] += c
    return [one.strip() for one in found]


def folder_name(name: str) -> str:
    """A setting as a folder's name; characters that a file system may refuse become ``-``."""
    plain = re.sub(r"[^A-Za-z0-9._+=-]+", "-", name)
    return plain if len(plain) <= LONG else f"{plain[:LONG]}-{digest(name.encode())[:8]}"
