"""Pictures of one's own as they are asked for: by where they lie, and which columns of a table hold what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from perdure.benchmarks.folder import load_folder, load_listed
from perdure.benchmarks.own import hub, tables
from perdure.benchmarks.own.names import given_names
from perdure.benchmarks.own.rows import stream_of
from perdure.benchmarks.own.told import KEYS, Told
from perdure.core.errors import PerdureError
from perdure.core.paths import expanded
from perdure.data.task import Stream

YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Pictures:
    """A stream of one's own pictures. ``where``: a folder, a CSV or JSON-lines file, a YAML file that lists tasks, a folder of
    the package ``datasets``, or ``hf:user/name`` (``hf:user/name:config``) for a data set of the Hub.

    Of a table the keys name columns: of the picture (default ``file_name``), its class (``label``), a caption (``text``), its
    split (``train``, ``test``, ``val``) and its task; of a data set the first three, found by type where they are not given.
    """

    where: str
    image_key: str = ""
    label_key: str = ""
    split_key: str = ""
    task_key: str = ""
    text_key: str = ""

    @property
    def kind(self) -> str:
        """``hub``, ``saved``, ``folder``, ``table`` or ``yaml``; empty for a word that means no pictures."""
        path = expanded(self.where)
        if self.where.startswith(hub.HUB):
            return "hub"
        if path.is_dir():
            return "saved" if hub.is_saved(path) else "folder"
        ending = path.suffix.lower()
        return "table" if ending in tables.TABLES else "yaml" if ending in YAML else ""

    @property
    def path(self) -> Path:
        return expanded(self.where).resolve()

    @property
    def keys(self) -> Mapping[str, str]:
        """The columns that were named."""
        return {key: value for key, value in asdict(self).items() if key in KEYS and value}

    @property
    def name(self) -> str:
        """What the stream is called."""
        if self.kind == "hub":
            return hub.place_of(self.where, Path())[1]
        return self.path.stem if self.kind in ("table", "yaml") else self.path.name

    def settled(self) -> Pictures:
        """The same, from any working directory. ``PerdureError`` where no file is there, or a column is named of what has
        none."""
        if self.kind in ("folder", "yaml", "") and self.keys:
            option = f"--{next(iter(self.keys)).replace('_', '-')}"
            raise PerdureError(f"{option} names a column of a table or data set, and {self.where} is none.")
        if self.kind in ("table", "yaml") and not self.path.is_file():
            raise PerdureError(f"There is no file {self.path}.")
        return self if self.kind == "hub" else replace(self, where=str(self.path))

    def gone(self) -> bool:
        """Whether what was there is not there any more."""
        return not self.where.startswith(hub.HUB) and not self.path.exists()

    def load(self) -> Stream:
        """The stream."""
        if self.kind == "folder":
            return load_folder(self.path)
        if self.kind == "yaml":
            return load_listed(self.path, self.name)
        told = Told()
        if self.kind == "table":
            found = tables.found_in(self.path, self.keys, given_names((self.path.parent,)), told.templates)
        else:
            place = self.where if self.kind == "hub" else str(self.path)
            found = [hub.found_in(place, self.name, self.keys, {}, told.templates)]
        return stream_of(self.name, found, told)
