"""What a model in use keeps of test pictures, so that old tasks can be measured: all, their paths, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.data.files import Files
from perdure.data.places import mark
from perdure.data.task import Images

Keep = Literal["pictures", "paths", "none"]
KEPT: dict[Keep, str] = {
    "pictures": "keeps test pictures at the model's size", "paths": "keeps the paths of test pictures",
    "none": "keeps no test pictures",
}  # fmt: skip


def kept(folder: Path, keep: Keep) -> str:
    """What is kept of test pictures, and how much room a HOME takes, in words."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{KEPT[keep]}; {size / 1e6:,.0f} MB in all"


def kept_tests(keep: Keep, images: Images) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What is kept of a task's test pictures: files of tensors, and what the record says."""
    if not len(images):  # of a task without labels
        return {}, {"keep": keep}
    if keep == "pictures":
        pixels = images.pixels[:]
        if pixels.is_floating_point():
            pixels = (pixels * 255).round().to(torch.uint8)
        return {"pictures": {"pixels": pixels, "labels": images.labels}}, {"keep": keep}
    if keep == "paths":
        check_kept(keep, images)
        paths, own = images.pixels.paths, images.labels.tolist()
        return {}, {
            "keep": keep,
            "paths": [str(p) for p in paths],
            "labels": own,
            "test_marks": [mark(p)[:16] for p in paths],
        }
    return {}, {"keep": keep}


def check_kept(keep: Keep, images: Images) -> None:
    """Refuse to keep paths of pictures that have none."""
    files = isinstance(images.pixels, Files) and all(isinstance(p, Path) for p in images.pixels.paths)
    if keep == "paths" and len(images) and not files:
        raise PerdureError(
            "keep=paths: not all pictures are files of their own, so they have no paths. Choose keep=pictures or none, when a "
            "HOME is made."
        )
