"""Runs beside published tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from perdure import launch
from perdure.benchmarks import STREAMS
from perdure.cli import app
from perdure.report.published import differences, tables


def run_of(folder: Path, **more: Any) -> Path:
    """A metrics file as a run leaves it."""
    found = {
        "method": "zscl", "stream": "mtil", "seed": 0, "tasks": ["a"], "accuracy": [[1.0], [2.0]], "seconds": 1,
        "peak_memory_mb": 1,
        "transfer": 67.1, "average": 76.4, "last": None, "config": {"shots": 0, "model": "openai/clip-vit-base-patch16"},
        "protocol": {"labels": "task", "task_id": "known"}, **more,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(found))
    return folder


def compared(*runs: Path) -> str:
    done = CliRunner().invoke(app, ["compare", *map(str, runs)])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_every_table_names_streams_and_figures_that_are_there() -> None:
    known, methods = {e.name for e in STREAMS}, {e.name for e in launch.methods()}
    for table in tables():
        assert table.stream in known and table.source and table.figures
        assert all(len(row) == len(table.figures) for row in table.rows.values())
        assert any(name in methods or name.startswith("RAIL") for name in table.rows)


def test_a_run_is_set_beside_the_tables_of_its_protocol(tmp_path: Path) -> None:
    said = compared(run_of(tmp_path / "a"))
    assert "ZSCL's release" in said and "GIFT (arXiv:2503.04229)" in said and "RAIL, dual form" in said
    assert "less zscl, published -1.0 +1.0 –" in said  # 67.1 and 76.4 of 68.1 and 75.4; the last is not known yet
    assert "65.3 64.4 67.4" not in said  # five shots are another protocol
    few = compared(run_of(tmp_path / "b", config={"shots": 5}))
    star = compared(run_of(tmp_path / "c", config={"lam": 0.0}))
    assert "less ZSCL*, published +4.9 +3.8 –" in star
    assert "65.3 64.4 67.4" in few and "less zscl, published +1.8 +12.0 –" in few


@pytest.mark.parametrize(
    "more",
    [
        {"stream": "mini-mtil"},
        {"config": {"shots": 3}},
        {"protocol": {"labels": "task", "task_id": "hidden"}, "stream": "mtil-2"},
    ],
)
def test_where_nothing_is_published_it_is_said(more: dict[str, Any], tmp_path: Path) -> None:
    assert "no published table is kept" in compared(run_of(tmp_path / "a", **more))


def test_a_head_of_ours_is_no_published_method(tmp_path: Path) -> None:
    run = {"method": "ridge_patches", "transfer": 1.0, "average": 1.0, "last": 1.0}
    assert all(differences(run, table) == [] for table in tables())
    run["method"] = "ridge"
    (x_tail, *_) = [t for t in tables() if t.stream == "x-tail"]
    assert differences(run, x_tail) == pytest.approx([1 - 62.4, 1 - 70.7, 1 - 79.1])
