"""Fetch what the small world is made of, with the npm client, pinned and checked.

``sources.json`` holds every package with its version and the sha256 of its archive.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

PINS = Path(__file__).parent / "sources.json"


def archive_name(package: str, version: str) -> str:
    """How ``npm pack`` names an archive: ``@iconify/json`` 2.2 → ``iconify-json-2.2.tgz``."""
    return f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"


def fetch(packages: list[dict[str, str]], folder: Path) -> None:
    """Download what is missing, ten packages a call."""
    missing = [p for p in packages if not (folder / archive_name(p["package"], p["version"])).exists()]
    for start in range(0, len(missing), 10):
        names = [f"{p['package']}@{p['version']}" for p in missing[start : start + 10]]
        print(f"fetching {', '.join(names)}", flush=True)
        try:
            subprocess.run(["npm", "pack", "--silent", *names], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            sys.exit("The recipe fetches its sources with npm, which is not installed here.")


def unpack(package: dict[str, str], folder: Path, target: Path) -> None:
    """Check an archive against its pin and unpack it, once."""
    path = folder / archive_name(package["package"], package["version"])
    if target.exists():
        return
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package["sha256"]:
        sys.exit(
            f"{path.name} is not the archive that the recipe was made with (sha256 {found}). Delete it to try again."
        )
    beside = folder / "unpacking"
    shutil.rmtree(beside, ignore_errors=True)
    with tarfile.open(path) as archive:
        archive.extractall(beside, filter="data")
    (beside / "package").rename(target)


def main(work: Path) -> tuple[Path, Path]:
    """The unpacked icon package, and the folder of unpacked fonts by family."""
    pins = json.loads(PINS.read_text())
    folder = work / "archives"
    fonts = work / "fonts"
    folder.mkdir(parents=True, exist_ok=True)
    fonts.mkdir(exist_ok=True)
    fetch([pins["drawings"], *pins["fonts"]], folder)
    unpack(pins["drawings"], folder, work / "iconify")
    for font in pins["fonts"]:
        unpack(font, folder, fonts / font["package"].split("/")[1])
    return work / "iconify", fonts
