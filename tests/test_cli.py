"""The command line as people meet it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT
from transformers import CLIPModel

from perdure import cli

WORDS = [f"{k}={v}" for k, v in SHORT.items()]


def perdure(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """Run the command line in this process; return its exit code."""
    monkeypatch.setattr("sys.argv", ["perdure", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "diffusers",
    "peft",
    "pydantic",
    "yaml",
    "PIL",
    "matplotlib",
    "jinja2",
    "ray",
)


def test_help_does_not_import_torch() -> None:
    code = "import sys; from perdure import cli; sys.argv = ['perdure', '--help']\ntry: cli.main()\nexcept SystemExit: pass\n"
    code += f"print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Vision-language models" in out and out.strip().endswith("[]")


@pytest.mark.parametrize(
    ("words", "piece"),
    [
        (["run", "--method", "finetun", "--stream", "mini-mtil"], "Did you mean 'finetune'?"),
        (["run", "--method", "finetune", "--stream", "mini"], "mini-cil, mini-fscil, mini-mtil"),
        (["run", "--method", "finetune"], "--stream missing"),
        (
            ["run", "--method", "finetune", "--stream", "mini-mtil", "lrr=1", "lr=fast"],
            "There is no key 'lrr'. Did you mean 'lr'?",
        ),
        (
            ["run", "--method", "finetune", "--stream", "mini-mtil", "model=/no/such/folder"],
            "No CLIP model could be loaded",
        ),
        (["run", "--preset", "nothing"], "finetune-mtil"),
        (["resume", "/no/such/run"], "holds no run"),
        (["report", "/no/such/run"], "There is no /no/such/run"),
        (["run", "finetune", "mini-mtil"], "Did you mean: perdure run --method finetune --stream mini-mtil"),
        (["run", "finetune", "--stream", "mini-cil"], "Did you mean: perdure run --stream mini-cil --method finetune"),
        (["run", "--seeds", "many"], "Error: Invalid value for '--seeds'"),
        (["frobnicate"], "Error: No such command 'frobnicate'. See:"),
        (["resume"], "There are no runs in"),
        (["methods", "gft"], "There is no method 'gft'"),
        (["run", "--seeds", "0"], "Invalid value for '--seeds'"),
        (["export", "/no/such/run", "/nowhere"], "holds no run"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(
    words: list[str], piece: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert perdure(monkeypatch, *words) == 2
    said = capsys.readouterr()
    assert piece in said.err and "Traceback" not in said.out + said.err


def test_lists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert perdure(monkeypatch, "methods") == 0
    out = capsys.readouterr().out
    for name in ("zero_shot", "finetune", "finetune_lora", "joint", "individual", "wise_ft", "weight_average"):
        assert name in out
    assert perdure(monkeypatch, "methods", "wise_ft") == 0
    assert "alpha" in capsys.readouterr().out
    assert perdure(monkeypatch, "streams") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("mini-mtil", "mini-mtil-2", "mini-cil"))


@pytest.mark.slow
def test_run_report_and_export(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert (
        perdure(
            monkeypatch, "run", "--method", "finetune", "--stream", "mini-mtil", "--seeds", "2", "--out", run, *WORDS
        )
        == 0
    )
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["seed"] == [0, 1] and len(metrics["runs"]) == 2
    assert {p.name for p in run.iterdir()} == {
        "seed_0",
        "seed_1",
        "seeds.json",
        "metrics.json",
        "report.html",
        "report.png",
    }
    page = tmp_path / "page.html"
    assert perdure(monkeypatch, "report", run / "seed_0", run / "seed_1", "--out", page) == 0
    assert page.exists() and page.with_suffix(".png").exists()
    assert perdure(monkeypatch, "export", run / "seed_0", tmp_path / "plain") == 0
    assert "food" in capsys.readouterr().out
    assert CLIPModel.from_pretrained(tmp_path / "plain").config.projection_dim == 128
    assert perdure(monkeypatch, "export", run / "seed_0", tmp_path / "plain") == 2  # never over what exists
    assert perdure(monkeypatch, "resume", run) == 0


def test_python_m_perdure_is_the_command_line_too() -> None:
    done = subprocess.run([sys.executable, "-m", "perdure", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("perdure ")


def test_bare_perdure_shows_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert perdure(monkeypatch) == 0
    assert "resume" in capsys.readouterr().out


@pytest.mark.slow
def test_resume_without_a_folder_lists_the_runs(
    short_run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = short_run("finetune")["folder"]
    runs = tmp_path / "here" / "runs"
    for name in ("done", "demo/stopped"):
        shutil.copytree(folder, runs / name)
    shutil.rmtree(next((runs / "demo" / "stopped").glob("task_03*")))
    (runs / "demo" / "stopped" / "metrics.json").unlink()
    monkeypatch.chdir(tmp_path / "here")
    assert perdure(monkeypatch, "resume") == 0
    out = capsys.readouterr().out
    assert "runs/done: finished" in out
    assert "runs/demo/stopped: 2 tasks learned; go on with: perdure resume runs/demo/stopped" in out


@pytest.mark.slow
def test_a_report_is_written_over_nothing_that_perdure_did_not_write(
    short_run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = short_run("finetune")["folder"]
    page, picture = tmp_path / "mine.html", tmp_path / "mine.png"
    for file in (page, picture):
        file.write_text("mine")
        assert perdure(monkeypatch, "report", folder, "--out", page) == 2
        assert f"{file} exists, and perdure did not write it" in capsys.readouterr().err and file.read_text() == "mine"
        file.unlink()
    assert perdure(monkeypatch, "report", folder, "--out", page) == 0
    picture.write_bytes(
        picture.read_bytes().replace(b"perdure", b"matters")
    )  # as of 0.1.0, whose pictures bore no mark
    assert perdure(monkeypatch, "report", folder, "--out", page) == 0
    assert b"perdure" in picture.read_bytes()
