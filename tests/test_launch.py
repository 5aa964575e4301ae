"""From names to runs: where methods and streams come from, whose an option is, folders that lose nothing, runs found again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, same_bits
from safetensors.torch import load_file
from transformers import CLIPModel

import perdure
from perdure import launch
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.data.task import Stream
from perdure.engine.environment import cpu, differing
from perdure.launch import folders
from perdure.methods.base import METHODS, Method, Row
from perdure.methods.compose import Compose
from perdure.models.clip import CLIP

Run = Callable[..., dict[str, Any]]
OWN = Path(__file__).parent / "own"
WORDS = [f"{k}={v}" for k, v in SHORT.items()]


def command(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "perdure", *map(str, words)], capture_output=True, text=True, check=False, **options
    )


# ---- options


def test_an_option_belongs_to_a_role_and_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.methods()
    row = Row(learn=("gift", {"alpha": 0.7}), fuse=("merge", {"rule": "interpolate", "alpha": 0.3}))
    METHODS.add("both", row, "Two parts with one key.")
    try:
        known = launch.method_options(launch.method_entry("both"))
        assert known["alpha"][1].default == 0.7 and known["fuse.alpha"][1].default == 0.3
        values = {key: option.default for key, (_, option) in known.items()}
        for given, wanted in (({}, (0.7, 0.3)), ({"alpha": 0.1, "fuse.alpha": 0.9}, (0.1, 0.9))):
            made = launch.build("both", {**values, **given})
            assert isinstance(made, Compose)
            assert (made.learn.config.alpha, made.fuser.config.alpha) == wanted
        config, _ = launch.configure("both", "mini-mtil", 0, ["fuse.alpha=0.25"], {})
        assert config["options"]["fuse.alpha"] == 0.25 and config["options"]["alpha"] == 0.7
    finally:
        METHODS.remove("both")


@pytest.mark.slow
def test_an_option_that_came_later_has_its_default(short_run: Run) -> None:
    folder = short_run("finetune")["folder"]
    before = json.loads((folder / "metrics.json").read_text())
    for record in folder.glob("task_*/state.json"):
        assert record.exists()
    config = json.loads((folder / "config.json").read_text())
    assert "gamma" in config["options"]
    from perdure.engine import checkpoint
    from perdure.engine.run import identity

    for key in ("gamma", "milestones", "optimizer"):  # as a version wrote it that did not know them
        del config["options"][key]
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("task_*/state.json"):
        record = {**json.loads(path.read_text()), "config": identity(config)}
        record.pop("sha256")
        path.write_text(json.dumps({**record, "sha256": checkpoint.seal(record)}))
    shutil.rmtree(next(folder.glob("task_03*")))
    assert perdure.resume(folder)["accuracy"] == before["accuracy"]
    config["options"]["unheard_of"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PerdureError, match="no key 'unheard_of'"):
        perdure.resume(folder)


# ---- where methods and streams come from


@pytest.mark.slow
def test_a_method_in_a_file_of_its_own_is_killed_resumed_reported_and_exported(tmp_path: Path) -> None:
    file = tmp_path / "mine" / "adapter.py"
    file.parent.mkdir()
    shutil.copy(OWN / "adapter.py", file)
    words = [*(w for w in WORDS if "iterations" not in w), "iterations=25", "lr=0.003", "threads=1"]
    begin: list[str | Path] = ["run", "--method", file, "--stream", "mini-mtil", *words, "--out"]
    assert command(*begin, tmp_path / "whole").returncode == 0
    started = subprocess.Popen([sys.executable, "-m", "perdure", *map(str, begin), str(tmp_path / "broken")])
    while not (tmp_path / "broken" / "task_01_animals").exists():
        assert started.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert command("resume", tmp_path / "broken", cwd=tmp_path / "mine").returncode == 0
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.safetensors"))
    assert any(p.name == "modules.safetensors" for p in files)
    for path in files:
        assert same_bits(load_file(tmp_path / "whole" / path), load_file(tmp_path / "broken" / path)), path
    assert sum((tmp_path / "whole" / p).stat().st_size for p in files) < 1_000_000  # no frozen tower is written
    assert command("report", tmp_path / "whole").returncode == 0
    exported = command("export", tmp_path / "whole", tmp_path / "out")
    assert exported.returncode == 0 and "residual" in exported.stdout
    kept = load_file(tmp_path / "out" / "perdure.safetensors")
    assert kept["modules/residual/change.weight"].abs().sum() > 0
    file.write_text(file.read_text() + "\n# changed\n")
    changed = command("resume", tmp_path / "whole")
    assert changed.returncode == 2 and "has changed since" in changed.stderr
    file.unlink()
    gone = command("export", tmp_path / "whole", tmp_path / "out2")
    assert gone.returncode == 2 and "which is gone" in gone.stderr and "Traceback" not in gone.stderr


@pytest.mark.slow
def test_modules_inside_a_tower_are_kept_alone_and_no_export_leaves_them_out(tmp_path: Path) -> None:
    values = {**SHORT, "tasks": 1, "lr": 0.02}
    perdure.run(str(OWN / "prompt.py"), "mini-mtil", tmp_path / "run", **values)
    files = list((tmp_path / "run").glob("task_01*/*.safetensors"))
    assert any(p.name == "modules.safetensors" for p in files)
    assert sum(p.stat().st_size for p in files) < 1_000_000  # no frozen tower is written
    with pytest.raises(PerdureError, match="prompts"):
        launch.export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nowhere_at_all", "line 1: ModuleNotFoundError"),
        ("x = 1\ndef (", "line 2: SyntaxError"),
        ("x = 1", "brings no method"),
        (
            "from perdure.methods.base import Method, register\n@register('finetune')\nclass Mine(Method): 'Mine.'",
            "'finetune' exists already",
        ),
        (
            "from perdure.methods.base import Method, register\n@register('a')\nclass A(Method): 'A.'\n"
            "@register('b')\nclass B(Method): 'B.'",
            "several methods. Say which: .*:a, .*:b",
        ),
        (
            "from dataclasses import dataclass\nfrom typing import Any\n"
            "from perdure.methods.base import Method, State\n@dataclass\nclass Kept(State):\n    x: Any = None\n"
            "class Mine(Method):\n    State = Kept",
            "'x: typing.Any' of the State Kept could not be kept",
        ),
    ],
)
def test_a_file_that_cannot_be_used_says_why(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    before = {e.name for e in launch.methods()}
    with pytest.raises(PerdureError, match=said):
        launch.method_entry(str(file))
    for name in {e.name for e in METHODS} - before:
        METHODS.remove(name)


def test_one_of_several_methods_of_a_file_is_asked_for_by_name(tmp_path: Path) -> None:
    file = tmp_path / "two.py"
    file.write_text(
        "from perdure.methods.base import Method, register\n@register('first_of_two')\nclass A(Method): 'The first.'\n"
        "@register('second_of_two')\nclass B(Method): 'The second.'"
    )
    assert launch.method_entry(f"{file}:second_of_two").summary == "The second."
    with pytest.raises(PerdureError, match="brings no method 'third'"):
        launch.method_entry(f"{file}:third")


@pytest.mark.slow
def test_objects_run_and_are_asked_for_again(tmp_path: Path, stream: Stream) -> None:
    class Slower(Method):
        """Learns as finetune does."""

    short = {k: v for k, v in SHORT.items() if k not in ("tasks", "images")}
    mine = replace(stream, name="mine", digest="my own")
    m = perdure.run(Slower, mine, tmp_path / "run", **short)
    assert m["method"] == "slower" and m["stream"] == "mine" and len(m["accuracy"]) == 4
    with pytest.raises(PerdureError, match="stream 'mine' of this run was handed over as an object.*stream=…"):
        perdure.resume(tmp_path / "run", method=Slower)
    shutil.rmtree(next((tmp_path / "run").glob("task_03*")))
    assert perdure.resume(tmp_path / "run", method=Slower, stream=mine)["accuracy"] == m["accuracy"]
    with pytest.raises(PerdureError, match="its split differs"):
        perdure.resume(tmp_path / "run", method=Slower, stream=replace(mine, digest="another"))


def test_a_stream_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "short.py"
    file.write_text(
        "from dataclasses import replace\nfrom perdure.benchmarks import mini\n\n\ndef stream():\n"
        "    return replace(mini.multi_domain('I').shortened(2, 16), name='short', digest='two tasks')\n"
    )
    m = perdure.run("zero_shot", str(file), tmp_path / "run")
    assert m["stream"] == "short" and m["tasks"] == ["animals", "digits"]
    assert perdure.resume(tmp_path / "run")["finished"]
    file.write_text(file.read_text() + "\n")
    with pytest.raises(PerdureError, match="has changed since"):
        perdure.resume(tmp_path / "run")


def test_a_class_that_is_not_registered_is_found_again_in_its_file(tmp_path: Path) -> None:
    file = tmp_path / "growing.py"
    start = "from dataclasses import dataclass\nfrom perdure.methods.base import Method, Recipe\n\n\n"
    file.write_text(f'{start}class Grows(Method):\n    """Grows."""\n')
    assert launch.method_entry(str(file)).name == "grows"
    assert launch.method_entry(f"{file}:grows").summary == "Grows."
    clash = "@dataclass(frozen=True)\nclass Config(Recipe):\n    images: float = 0.5\n\n\n"
    file.write_text(f"{start}{clash}class Grows(Method):\n    Config = Config\n")
    with pytest.raises(PerdureError, match="option 'images', which every run has already"):
        launch.configure(str(file), "mini-mtil", 0, [], {})


@pytest.mark.slow
def test_entry_points_bring_methods_and_a_broken_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "plugged.py").write_text(
        "from perdure.methods.base import Method\n\n\nclass Plugged(Method):\n    '''From another package.'''\n"
    )
    about = tmp_path / "plugged-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[perdure.methods]\nplugged = plugged:Plugged\nbroken = not_there:X\n")
    done = command("methods", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "From another package." in done.stdout
    assert "Warning: The entry point perdure.methods: broken" in done.stderr and "Traceback" not in done.stderr


# ---- folders


@pytest.mark.slow
def test_overwriting_loses_nothing_before_the_new_run_has_begun(
    short_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = short_run("finetune")["folder"]
    files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    from perdure.launch import runs as launched

    def stopped(*_: Any) -> Any:
        raise PerdureError("The disk is on fire.")

    monkeypatch.setattr(launched, "engine_run", stopped)
    with pytest.raises(PerdureError, match="on fire.*to be replaced is back"):
        perdure.run("zero_shot", "mini-mtil", folder, overwrite=True, **SHORT)
    assert {
        p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    } == files
    monkeypatch.undo()
    assert perdure.run("zero_shot", "mini-mtil", folder, overwrite=True, **SHORT)["method"] == "zero_shot"
    assert not (folder / ".replaced").exists()


@pytest.mark.slow
@pytest.mark.parametrize("after", range(1, 7))
def test_a_move_that_is_cut_off_anywhere_is_undone(short_run: Run, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Setting aside and bringing back, stopped between any two of their renames."""
    folder = short_run("finetune")["folder"]
    names = sorted(p.name for p in folders.own_files(folder))
    rename, left = os.replace, [after]

    def some(a: Any, b: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        rename(a, b)

    for move in (folders.set_aside, folders.bring_back):
        left[0] = after
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", some)
            move(folder)
        folders.recover(folder)
        if not (folder / folders.REPLACED).exists():
            assert sorted(p.name for p in folders.own_files(folder)) == names
            folders.set_aside(folder)
    folders.bring_back(folder)
    assert sorted(p.name for p in folders.own_files(folder)) == names and launch.is_finished(folder)


@pytest.mark.slow
def test_what_cannot_begin_costs_no_old_run(short_run: Run) -> None:
    """GIFT's pairs were drawn for other settings: that is found before the old run is touched."""
    quick = {"synthetic": 8, "sampling_steps": 2, "sampling_batch": 4, "tasks": 1}
    folder = short_run("gift", **quick)["folder"]
    with pytest.raises(PerdureError, match="were made for something else"):
        perdure.run("gift", "mini-mtil", folder, overwrite=True, **{**SHORT, **quick, "sampling_steps": 3})
    assert perdure.resume(folder)["finished"] and launch.is_finished(folder)


@pytest.mark.slow
def test_the_same_command_again_goes_on(short_run: Run) -> None:
    folder = short_run("finetune")["folder"]
    launch.begin("finetune", "mini-mtil", folder, assignments=SHORT, go_on=True)
    with pytest.raises(PerdureError, match="another configuration .it differs in lr"):
        launch.begin("finetune", "mini-mtil", folder, assignments={**SHORT, "lr": 0.5}, go_on=True)


@pytest.mark.slow
def test_the_same_command_goes_on_where_a_machine_would_choose_another_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, folder = {**SHORT, "tasks": 1}, tmp_path / "run"
    asked.pop("precision", None)
    for chosen, values in (("bf16", asked), ("fp32", asked)):  # as a processor with, one without would
        monkeypatch.setattr("perdure.engine.settings.precision_of", lambda wanted, device, chosen=chosen: chosen)
        launch.begin("finetune", "mini-mtil", folder, assignments=values, go_on=True)
    assert json.loads((folder / "config.json").read_text())["settings"]["precision"] == "bf16"
    with pytest.raises(PerdureError, match="holds this very run, unfinished"):
        launch.begin("finetune", "mini-mtil", folder, assignments=asked)
    with pytest.raises(PerdureError, match="it differs in precision"):  # asked for by a person
        launch.begin("finetune", "mini-mtil", folder, assignments={**asked, "precision": "fp32"}, go_on=True)


@pytest.mark.slow
def test_several_seeds_killed_and_gone_on_with(tmp_path: Path) -> None:
    begin = ["run", "--method", "finetune", "--stream", "mini-mtil", "--seeds", "2", *WORDS, "threads=1"]
    assert command(*begin, "--out", tmp_path / "whole").returncode == 0
    started = subprocess.Popen([sys.executable, "-m", "perdure", *begin, "--out", str(tmp_path / "broken")])
    while not (tmp_path / "broken" / "seed_0" / "task_02_digits").exists():
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert command(*begin, "--resume", "--out", tmp_path / "broken").returncode == 0
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "broken"))
    assert a["accuracy"] == b["accuracy"] and a["seed"] == b["seed"] == [0, 1]
    assert [r["losses"] for r in a["runs"]] == [r["losses"] for r in b["runs"]]


# ---- another model, another place, another device


@pytest.mark.slow
def test_another_model_under_a_run_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "clip"
    shutil.copytree(mini.MODEL, model)
    perdure.run("finetune_lora", "mini-mtil", tmp_path / "run", model=str(model), **{**SHORT, "tasks": 1})
    spoilt = CLIPModel.from_pretrained(model)
    spoilt.visual_projection.weight.data += 0.01
    spoilt.save_pretrained(model)
    with pytest.raises(PerdureError, match="not the one that the run began with"):
        launch.export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(PerdureError, match="not the CLIP that|not the one that"):
        perdure.resume(tmp_path / "run")


def test_a_clip_whose_folder_changes_while_it_is_used_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "clip"
    shutil.copytree(mini.MODEL, model)
    clip = CLIP.load(str(model))
    clip.fingerprint()
    spoilt = CLIPModel.from_pretrained(model)
    spoilt.visual_projection.weight.data += 0.01
    spoilt.save_pretrained(model)
    with pytest.raises(PerdureError, match="has changed since it was loaded"):
        clip.pretrained  # noqa: B018


def test_what_an_older_run_did_not_note_is_not_called_changed() -> None:
    assert differing({"torch": "2.0", "cores": 64}, {"torch": "2.0", "cores": 2, "cpu": "x"}) == []


@pytest.mark.slow
def test_a_run_begun_on_an_accelerator_can_be_gone_on_with_here(short_run: Run) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device that should be missing")
    m = short_run("finetune")
    folder = m["folder"]
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["device"] = config["environment"]["device"] = "cuda"
    config["environment"] |= {"cpu": "another", "gpu": "a card"}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(next(folder.glob("task_03*")))
    (folder / "metrics.json").unlink()
    heard: list[str] = []
    ear = launch.Watcher()
    setattr(ear, "warn", heard.append)  # noqa: B010
    assert perdure.resume(folder, ear)["accuracy"] == m["accuracy"]
    [said] = [text for text in heard if "environment has changed" in text]
    assert all(
        part in said for part in ("device: cuda, now cpu", "gpu: a card, now None", f"cpu: another, now {cpu()}")
    )
    assert launch.export(folder, folder.parent / "out").startswith("The model after food")


@pytest.mark.slow
def test_all_classes_compete_when_asked(short_run: Run) -> None:
    apart, together = (short_run("finetune", labels=labels, lr=5e-4, iterations=12) for labels in ("task", "all"))
    assert together["protocol"] == {"labels": "all", "task_id": "known"}
    pairs = [
        (a, b)
        for one, two in zip(apart["accuracy"], together["accuracy"], strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    assert all(a >= b for a, b in pairs) and sum(a > b for a, b in pairs) > 3
    assert together["accuracy"][2][1] > together["accuracy"][0][1] + 10  # digits are learned among all names


@pytest.mark.slow
def test_an_export_is_whole_or_absent(short_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = short_run("mg_clip", "mini-cil", epochs=1, iterations=0, warmup=0, tasks=2)["folder"]

    def full(self: CLIP, place: Path) -> None:
        place.mkdir(exist_ok=True)
        (place / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(CLIP, "save", full)
        launch.export(folder, tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []
    said = launch.export(folder, tmp_path / "out")
    assert "head" in said and "perdure.json" in said
    about = json.loads((tmp_path / "out" / "perdure.json").read_text())
    kept = load_file(tmp_path / "out" / "perdure.safetensors")
    assert len(about["values"]["classes"]) == 12 and kept["state/state/head/rows"].shape[0] == 12
    with pytest.raises(PerdureError, match="exists. Choose a new folder"):
        launch.export(folder, tmp_path / "out")


def test_an_old_run_folder_stays_readable(tmp_path: Path) -> None:
    """A run that version 0.1.0 wrote: looked at, exported, gone on with."""
    folder = tmp_path / "run"
    shutil.copytree(Path(__file__).parent / "runs" / "format-1", folder)
    before = json.loads((folder / "metrics.json").read_text())
    wanted = load_file(folder / "task_02_step_02" / "hits.safetensors")
    assert perdure.resume(folder)["accuracy"] == before["accuracy"]
    assert "head" in launch.export(folder, tmp_path / "out")
    shutil.rmtree(folder / "task_02_step_02")
    (folder / "metrics.json").unlink()
    assert perdure.resume(folder)["tasks"] == before["tasks"]
    found = load_file(folder / "task_02_step_02" / "hits.safetensors")
    agree = torch.cat([(found[name] == wanted[name]).float() for name in wanted]).mean().item()
    assert found.keys() == wanted.keys() and agree > 0.9  # to the bit on the machine that wrote it


def test_an_old_run_that_was_stopped_inside_a_task_is_gone_on_with(tmp_path: Path) -> None:
    """A run of ConDU that version 0.1.0 wrote, with ``keep=last`` and a save inside its third task, at step 2 of 6."""
    folder, heard = tmp_path / "run", list[int]()
    shutil.copytree(Path(__file__).parent / "runs" / "format-1-condu", folder)
    before = json.loads((folder / "metrics.json").read_text())
    ear = launch.Watcher()
    setattr(ear, "step", lambda step, *rest: heard.append(step))  # noqa: B010
    found = perdure.resume(folder, ear)
    assert heard == [3, 4, 5, 6] and not list(folder.glob("begun_*"))
    assert found["accuracy"][:3] == before["accuracy"] and found["tasks"] == ["animals", "digits", "food"]
    assert launch.export(folder, tmp_path / "out", task=2).startswith("The expert of digits")
