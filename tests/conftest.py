"""What tests share: a short stream of the small world, and a model to spoil."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

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
