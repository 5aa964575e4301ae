"""What tests share: a short stream of the small world, a model to spoil, MTIL in small trees and a CLIP in its real form."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import tiny
import torch
import trees

import perdure
from perdure import launch
from perdure.benchmarks import mini
from perdure.core.config import options
from perdure.data.task import Stream
from perdure.engine.settings import Settings
from perdure.models.clip import CLIP

hypothesis.settings.register_profile("perdure", max_examples=50, deadline=None)
hypothesis.settings.load_profile("perdure")
SHORT: dict[str, Any] = {"tasks": 3, "images": 16, "iterations": 3, "warmup": 1, "batch_size": 8, "precision": "fp32"}


@pytest.fixture
def clip() -> CLIP:
    return CLIP.load(str(mini.MODEL))


@pytest.fixture
def stream() -> Stream:
    return mini.multi_domain("I").shortened(tasks=3, images=48)


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small trees of MTIL's data sets: not to be spoilt."""
    return trees.grow(tmp_path_factory.mktemp("data"))


@pytest.fixture
def mtil_data(grown: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``grown`` as the place where data lie."""
    monkeypatch.setenv("PERDURE_DATA", str(grown))
    with trees.own_checksums(grown):
        yield grown


@pytest.fixture(scope="session")
def real_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random CLIP of two layers in the real checkpoint format, for 224 pixels, with CLIP's real tokenizer."""
    return str(tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "clip", "clip", side=224, patch=32))


@pytest.fixture(scope="session")
def runs_made() -> dict[str, tuple[dict[str, Any], Path]]:
    """Short runs by what was asked for: the same bits need not be computed for every test."""
    return {}


@pytest.fixture
def short_run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, runs_made: dict[str, tuple[dict[str, Any], Path]]
) -> Callable[..., dict[str, Any]]:
    """``short_run("finetune", lr=…)`` → metrics of three short tasks; ``metrics["folder"]`` is a copy to spoil."""

    def run(method: str, stream: str = "mini-mtil", **values: Any) -> dict[str, Any]:
        key = repr((method, stream, sorted(values.items())))
        if key not in runs_made:
            original = tmp_path_factory.mktemp("short") / method
            runs_made[key] = perdure.run(method, stream, original, **{**known(method, SHORT), **values}), original
        metrics, original = runs_made[key]
        folder = tmp_path / f"{method}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(original, folder)
        return {**copy.deepcopy(metrics), "folder": folder}

    return run


def known(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that a run of the method has: some take no steps."""
    keys = {**launch.method_options(launch.method_entry(method)), **options(Settings)}
    return {key: value for key, value in values.items() if key in keys}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
