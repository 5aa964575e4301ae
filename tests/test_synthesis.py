"""Synthetic pairs: what is asked for, drawing it, keeping it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import perdure
from perdure import launch
from perdure.benchmarks import mini
from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.state import only_one
from perdure.synthesis.generator import Generator
from perdure.synthesis.prompts import Request, requests, vocabulary
from perdure.synthesis.replay import Replay, Synthesis
from perdure.synthesis.store import Store, collect

QUICK: dict[str, Any] = {"synthetic": 6, "sampling_steps": 2, "sampling_batch": 4, "guidance": 3.0}
AS_TEXT = [f"{key}={value}" for key, value in QUICK.items()]


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "perdure.cli", *arguments], capture_output=True, text=True)


def picture(value: int) -> Tensor:
    return torch.full((3, 8, 8), value, dtype=torch.uint8)


# ---- prompts


def test_fewer_requests_are_the_first_of_more_and_prompts_come_evenly() -> None:
    pool = [f"p{k}" for k in range(10)]
    many = requests(pool, 4000, 0, "animals")
    assert requests(pool, 30, 0, "animals") == many[:30]
    assert requests(pool, 30, 1, "animals") != many[:30] != requests(pool, 30, 0, "digits")
    counts = Counter(r.prompt for r in many)
    assert set(counts) == set(pool) and max(counts.values()) < 500 and min(counts.values()) > 300
    assert len({r.seed for r in many}) > 3990
    assert {r.prompt for r in requests(["a", "a", "b"], 400, 0, "t")} == {"a", "b"}
    assert 150 < Counter(r.prompt for r in requests(["a", "a", "b"], 400, 0, "t"))["b"] < 250  # each prompt counts once


def test_vocabularies(tmp_path: Path) -> None:
    own = vocabulary("stream", mini.vocabulary())
    assert len(own) >= 300 and own[0].startswith("an icon of ")
    imagenet = vocabulary("imagenet", ())
    assert len(imagenet) == 1000 and imagenet[0] == "a photo of a tench."
    (tmp_path / "words.txt").write_text("a red bus\n\n a cat \n")
    assert vocabulary(str(tmp_path / "words.txt"), ()) == ["a red bus", "a cat"]
    (tmp_path / "empty.txt").write_text("\n")
    for name, message in (
        ("stream", "no vocabulary of its own"),
        ("imagenot", "imagenot: no such vocabulary.*'imagenet'"),
        (str(tmp_path / "empty.txt"), "is empty"),
    ):
        with pytest.raises(PerdureError, match=message):
            vocabulary(name, ())


def test_paths_mean_the_same_in_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("a cat\n")
    given = ["pairs=here", "vocabulary=words.txt", "generator=some/hub-id"]
    options = launch.configure("gift", "mini-mtil", 0, given, {})[0]["options"]
    assert options["pairs"] == str(tmp_path / "here") and options["vocabulary"] == str(tmp_path / "words.txt")
    assert options["generator"] == "some/hub-id"


# ---- generator


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(str(mini.GENERATOR), steps=2, guidance=3.0, batch_size=4)


@pytest.mark.slow
def test_an_image_has_the_same_bits_alone_and_among_others(generator: Generator) -> None:
    asked = [Request(f"an icon of {c.name}", k) for k, c in enumerate(mini.vocabulary()[:7])]
    together = dict(generator.draw(asked))
    assert all(x.shape == (3, 32, 32) and x.dtype == torch.uint8 for x in together.values())
    for k in (0, 3, 5, 6):
        assert torch.equal(together[asked[k]], dict(generator.draw([asked[k]]))[asked[k]])
    other = Request(asked[0].prompt, 99)
    assert not torch.equal(dict(generator.draw([other]))[other], together[asked[0]])


@pytest.mark.slow
def test_the_prompt_and_guidance_matter(generator: Generator) -> None:
    a, b = Request("an icon of heart", 1), Request("an icon of home", 1)
    drawn = dict(generator.draw([a, b]))
    assert (drawn[a].float() - drawn[b].float()).abs().mean() > 2
    free = Generator(str(mini.GENERATOR), steps=2, guidance=1.0, batch_size=4)
    assert not torch.equal(dict(free.draw([a]))[a], drawn[a])


def test_few_steps_take_the_fast_solver_and_many_the_pipeline_s_own(tmp_path: Path) -> None:
    folder = tmp_path / "generator"
    shutil.copytree(mini.GENERATOR, folder)
    own = Generator(str(folder), 2, 3.0, 1).pipeline
    own.scheduler = DDIMScheduler.from_config(own.scheduler.config, clip_sample=False)
    own.save_pretrained(folder)
    assert isinstance(Generator(str(folder), 20, 3.0, 1).pipeline.scheduler, DPMSolverMultistepScheduler)
    assert isinstance(Generator(str(folder), 50, 3.0, 1).pipeline.scheduler, DDIMScheduler)


def test_prompts_that_cannot_be_drawn_are_refused(generator: Generator) -> None:
    with pytest.raises(PerdureError, match="prompt is empty"):
        generator.check_prompts(["a cat", "  "])
    with pytest.raises(PerdureError, match="'word word .* is 32 tokens long.* reads 16"):
        generator.check_prompts(["word " * 30])
    generator.check_prompts(["an icon of heart"])


def test_what_is_no_generator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match="has no model_index.json.*DiffusionPipeline"):
        Generator(str(tmp_path), 2, 3.0, 1)
    with pytest.raises(PerdureError, match="No generator is given"):
        Generator("", 2, 3.0, 1)
    broken = tmp_path / "broken"
    shutil.copytree(mini.GENERATOR, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10000])
    with pytest.raises(PerdureError, match="No text-to-image model could be loaded"):
        Generator(str(broken), 2, 3.0, 1).check_prompts(["a"])


# ---- store


def filled(folder: Path) -> Store:
    store = Store(folder, {"stream": "s"})
    store.open()
    store.add([(Request(f"p{k}", k), picture(10 * k + 1)) for k in range(4)])
    return store


def test_pairs_come_back_as_they_were(tmp_path: Path) -> None:
    filled(tmp_path)
    store = Store(tmp_path, {"stream": "s"})
    wanted = [Request("p2", 2), Request("p0", 0)]
    pairs = store.read(wanted, 8)
    assert pairs.prompts == ["p2", "p0"] and pairs.images[:, 0, 0, 0].tolist() == [21, 1]
    assert store.read(wanted, 4).images.shape == (2, 3, 4, 4)
    assert not store.damaged(wanted) and store.missing([*wanted, Request("p2", 5)]) == [Request("p2", 5)]
    line = json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[2])
    assert set(line) == {"prompt", "seed", "file", "sha256"}
    with Image.open(tmp_path / line["file"]) as image:
        assert image.getpixel((0, 0)) == (21, 21, 21)


def test_a_line_that_was_cut_off_is_dropped_and_written_anew(tmp_path: Path) -> None:
    filled(tmp_path)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    store = Store(tmp_path, {"stream": "s"})
    assert store.missing([Request("p3", 3), Request("p2", 2)]) == [Request("p3", 3)]
    store.open()
    store.add([(Request("p3", 3), picture(9))])
    assert len(Store(tmp_path, {"stream": "s"}).entries) == 4
    assert all(json.loads(line) for line in manifest.read_text().splitlines())


def test_a_broken_line_in_the_middle_costs_its_own_image_only(tmp_path: Path) -> None:
    filled(tmp_path)
    manifest = tmp_path / "manifest.jsonl"
    lines = manifest.read_bytes().split(b"\n")
    manifest.write_bytes(b"\n".join([lines[0], b"{" + lines[1][5:], *lines[2:]]))
    heard: list[str] = []
    store = Store(tmp_path, {"stream": "s"}, heard.append)
    assert len(store.entries) == 3 and "line 2" in heard[0]


def test_black_images_are_dropped_and_counted(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    store.open()
    store.add([(Request("a", 0), picture(0)), (Request("b", 1), picture(5))])
    wanted = [Request("a", 0), Request("b", 1)]
    assert store.black(wanted) == 1 and store.read(wanted, 8).prompts == ["b"]
    assert not store.missing(wanted)  # it would come back black again
    with pytest.raises(PerdureError, match="no usable image-text pair.*of 1 that were asked for, 1 came"):
        store.read(wanted[:1], 8)


def test_a_folder_for_something_else_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "pairs")
    with pytest.raises(PerdureError, match="made for something else .stream: 's', wanted 't'.*pairs=DIR"):
        Store(tmp_path / "pairs", {"stream": "t"})
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("…")
    with pytest.raises(PerdureError, match="holds no image-text pairs"):
        Store(tmp_path / "letters", {})


def test_damaged_images_are_named_and_drawn_again_from_their_seeds(tmp_path: Path) -> None:
    heard: list[str] = []
    stream = mini.multi_domain("I")
    replay = Replay(Synthesis(**QUICK, pairs=str(tmp_path)), stream.context(0, None, warn=heard.append), 32, "cpu")
    before = replay.pairs("animals", [])
    wanted = replay.wanted("animals", [])
    files = [tmp_path / str(replay.store().entries[r].file) for r in wanted]
    kept = [f.read_bytes() for f in files]
    files[1].write_bytes(kept[1][:-7])
    files[4].unlink()
    with pytest.raises(DamagedFile, match=re.escape(files[1].name)):
        replay.store().read(wanted, 32)
    after = replay.pairs("animals", [])
    assert [f.read_bytes() for f in files] == kept
    assert torch.equal(before.images, after.images) and before.prompts == after.prompts
    assert len(heard) == 2 and files[1].name in heard[0] + heard[1] and files[4].name in heard[0] + heard[1]


def test_a_store_that_another_process_draws_into_is_waited_for(tmp_path: Path) -> None:
    stream, heard, let_go = mini.multi_domain("I"), list[str](), threading.Event()

    def warn(text: str) -> None:
        heard.append(text)
        let_go.set()  # only now: whoever does not wait fails, whoever does not say so hangs no longer than the thread

    def hold() -> None:
        with only_one(tmp_path / "pairs"):
            held.set()
            let_go.wait(3600)

    (tmp_path / "pairs").mkdir()
    replay = Replay(Synthesis(**QUICK, pairs=str(tmp_path / "pairs")), stream.context(warn=warn), 32, "cpu")
    held = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    found = replay.pairs("animals", [])
    thread.join()
    assert len(found) and "another process" in heard[0] and "waiting" in heard[0]


def test_a_generator_s_identity_covers_its_weights(tmp_path: Path) -> None:
    folder = tmp_path / "generator"
    shutil.copytree(mini.GENERATOR, folder)
    before = Generator(str(folder), 4, 1.0, 2).identity
    weights = next((folder / "unet").glob("*.safetensors"))
    tensors = {
        name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights)
    assert Generator(str(folder), 4, 1.0, 2).identity != before
    assert Generator(str(mini.GENERATOR), 4, 1.0, 2).identity == before


@pytest.mark.slow
def test_a_second_process_waits_for_the_store_and_draws_only_what_is_missing(tmp_path: Path) -> None:
    heard: list[str] = []
    waiting = threading.Event()

    def warn(text: str) -> None:
        heard.append(text)
        waiting.set()

    stream, about = mini.multi_domain("I"), Synthesis(**QUICK, pairs=str(tmp_path / "pairs"))
    one, two = (Replay(about, stream.context(warn=w), 32, "cpu") for w in (heard.append, warn))
    wanted, found = one.wanted("animals", []), []
    (tmp_path / "pairs").mkdir()
    second = threading.Thread(target=lambda: found.append(two.draw(two.store(), wanted)))
    with only_one(tmp_path / "pairs"):
        second.start()
        waiting.wait()
        store = one.store()
        store.open()
        store.add(list(one.generator.draw(wanted[:4])))
    second.join()
    assert found == [2] and "waiting for it" in heard[0]
    assert not one.store().missing(wanted) and not one.store().damaged(wanted)


def test_a_store_that_another_run_made_meanwhile_for_something_else_is_refused(tmp_path: Path) -> None:
    mine, other = Store(tmp_path, {"stream": "s"}), Store(tmp_path, {"stream": "t"})
    other.open()
    with pytest.raises(PerdureError, match="made for something else"):
        mine.open()


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    store = filled(tmp_path / "pairs")
    manifest = tmp_path / "pairs" / "manifest.jsonl"
    (tmp_path / "elsewhere.png").write_bytes(
        (tmp_path / "pairs" / str(store.entries[Request("p1", 1)].file)).read_bytes()
    )
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[1]["file"] = "../elsewhere.png"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = Store(tmp_path / "pairs", {"stream": "s"})
    assert [e.prompt for e in again.damaged([Request("p1", 1)])] == ["p1"]
    with pytest.raises(DamagedFile, match="outside itself: .*elsewhere"):
        again.read([Request("p1", 1)], 8)


def changed_generator(folder: Path) -> Path:
    """The small generator with every weight of its UNet moved by a tenth: files of the same names and sizes."""
    shutil.copytree(mini.GENERATOR, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({n: t + 0.1 for n, t in load_file(path).items()}, path, {"format": "pt"})
    return folder


def test_other_weights_are_another_generator(tmp_path: Path) -> None:
    same = tmp_path / "same"
    shutil.copytree(mini.GENERATOR, same)
    (same / ".cache").mkdir()
    (same / ".cache" / "note").write_text("a downloader's")
    other = changed_generator(tmp_path / "other")
    assert (other / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size == (
        mini.GENERATOR / "unet" / "diffusion_pytorch_model.safetensors"
    ).stat().st_size
    assert Generator(str(same), 2, 3.0, 4).identity == Generator(str(mini.GENERATOR), 2, 3.0, 4).identity
    stream = mini.multi_domain("I")
    pairs = str(tmp_path / "pairs")
    first = Replay(Synthesis(**QUICK, pairs=pairs), stream.context(), 32, "cpu")
    first.store().open()
    with pytest.raises(PerdureError, match="made for something else .generator"):
        Replay(Synthesis(**QUICK, pairs=pairs, generator=str(other)), stream.context(), 32, "cpu")


def test_a_store_of_an_earlier_version_is_taken_with_a_word(tmp_path: Path) -> None:
    """It noted no more of the generator than its files' names and sizes."""
    heard: list[str] = []
    stream, about = mini.multi_domain("I"), Synthesis(**QUICK, pairs=str(tmp_path))
    replay = Replay(about, stream.context(), 32, "cpu")
    kept = {**replay.made_for(), "generator": replay.generator.former}
    Store(tmp_path, kept).open()
    Replay(about, stream.context(warn=heard.append), 32, "cpu")
    assert "earlier version" in heard[0]
    Store(tmp_path, kept)
    (tmp_path / "store.json").write_text(json.dumps({**kept, "generator": "0" * 64}))
    with pytest.raises(PerdureError, match="made for something else"):
        Replay(about, stream.context(), 32, "cpu")


@pytest.mark.slow
def test_the_pipeline_does_not_outlive_the_drawing(tmp_path: Path) -> None:
    replay = Replay(Synthesis(**QUICK, pairs=str(tmp_path)), mini.multi_domain("I").context(), 32, "cpu")
    replay.pairs("animals", [])
    assert "pipeline" not in vars(replay.generator)


def test_learned_classes_join_the_pool_and_other_prompts_stay() -> None:
    stream = mini.multi_domain("I")
    replay = Replay(Synthesis(synthetic=300), stream.context(), 32, "cpu")
    later = replay.wanted("digits", stream.tasks[0].prompts())
    drawn = {r.prompt for r in later}
    assert drawn & set(stream.tasks[0].prompts()) and drawn & {p for c in stream.vocabulary for p in c.prompts()}
    assert not {r.prompt for r in replay.wanted("animals", [])} & set(stream.tasks[0].prompts())


def test_collected_pairs_take_the_place_of_synthetic_ones(tmp_path: Path) -> None:
    task = mini.class_incremental().tasks[0]
    captions = [task.prompts()[k] for k in task.train.labels.tolist()]
    collect(tmp_path / "real", task.train.pixels, captions, "mini-cil")
    again = collect(tmp_path / "real", task.train.pixels, captions, "mini-cil")
    assert len(again.entries) == len(captions)
    stream = mini.multi_domain("I")
    replay = Replay(Synthesis(synthetic=20, pairs=str(tmp_path / "real")), stream.context(), 32, "cpu")
    pairs = replay.pairs("animals", ["a drawing of a cat"])
    assert len(pairs) == 20 and set(pairs.prompts) <= set(captions)
    for image, prompt in zip(pairs.images, pairs.prompts, strict=True):
        same = [k for k, caption in enumerate(captions) if caption == prompt]
        assert any(torch.equal(image, task.train.pixels[k]) for k in same)
    with pytest.raises(PerdureError, match="collected pairs"):
        launch.generate("mini-mtil", tmp_path / "real")


# ---- the command


@pytest.mark.slow
def test_generate_then_run_draws_nothing_more(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    assert launch.generate("mini-mtil", folder, assignments=["tasks=2", *AS_TEXT]) == 12
    assert launch.generate("mini-mtil", folder, assignments=["tasks=2", *AS_TEXT]) == 0
    before = (folder / "manifest.jsonl").read_bytes()
    short: dict[str, Any] = {"tasks": 2, "images": 24, "iterations": 2, "warmup": 1, "precision": "fp32"}
    settings: dict[str, Any] = {**short, **QUICK, "pairs": str(folder)}
    first = perdure.run("gift", "mini-mtil", tmp_path / "a", **settings)
    assert (folder / "manifest.jsonl").read_bytes() == before and not (tmp_path / "a" / "pairs").exists()
    by_itself = perdure.run("gift", "mini-mtil", tmp_path / "b", **short, **QUICK)
    assert first["losses"] == by_itself["losses"] and first["accuracy"] == by_itself["accuracy"]
    assert (tmp_path / "b" / "pairs" / "manifest.jsonl").read_bytes() == before
    with pytest.raises(PerdureError, match="sampling_steps: 2, wanted 3"):
        perdure.run("gift", "mini-mtil", tmp_path / "c", **{**settings, "sampling_steps": 3})
    with pytest.raises(PerdureError, match="stream: 'mini-mtil', wanted 'mini-mtil-2'"):
        perdure.run("gift", "mini-mtil-2", tmp_path / "d", **settings)


@pytest.mark.slow
def test_generating_killed_again_and_again_ends_with_the_same_images(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    values = ["tasks=1", "synthetic=28", "sampling_steps=2", "sampling_batch=4"]
    command = ["generate", "--stream", "mini-mtil", *values]
    assert cli(command[0], str(whole), *command[1:]).returncode == 0
    lengths: list[int] = []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "perdure.cli", command[0], str(cut), *command[1:]],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        known = lengths[-1] if lengths else 0
        while process.poll() is None:
            manifest = cut / "manifest.jsonl"
            if manifest.exists() and manifest.read_bytes().count(b"\n") > known:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lengths.append((cut / "manifest.jsonl").read_bytes().count(b"\n"))
        for line in (cut / "manifest.jsonl").read_bytes().split(b"\n")[:-1]:
            with Image.open(cut / json.loads(line)["file"]) as image:
                image.load()
    assert lengths[0] < 28
    assert cli(command[0], str(cut), *command[1:]).returncode == 0
    for name in ("store.json", "manifest.jsonl"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    images = sorted(p.name for p in (whole / "images").iterdir())
    assert images == sorted(p.name for p in (cut / "images").iterdir() if not p.name.startswith("."))
    assert all((whole / "images" / n).read_bytes() == (cut / "images" / n).read_bytes() for n in images)


@pytest.mark.slow
def test_a_full_disk_while_generating_loses_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk: the manifest hits it after some batches."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from perdure import cli; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4500, 4500)); sys.argv[1:] = sys.argv[1:]; cli.main()"
    )
    command = ["generate", str(tmp_path / "pairs"), "--stream", "mini-mtil", "tasks=1", "synthetic=60", *AS_TEXT[1:]]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 2 and "Make room" in done.stderr and "Traceback" not in done.stderr
    kept = Store(tmp_path / "pairs", {}).entries
    assert 4 <= len(kept) < 60
    for entry in kept.values():
        with Image.open(tmp_path / "pairs" / str(entry.file)) as image:
            image.load()
    again = cli(*command)
    assert again.returncode == 0 and f"{60 - len(kept)} images drawn" in again.stdout
    assert len(Store(tmp_path / "pairs", {}).entries) == 60


@pytest.mark.slow
def test_careless_commands_get_one_plain_line(tmp_path: Path) -> None:
    out = str(tmp_path / "pairs")
    for arguments, message in (
        (["generate", out], "--stream missing"),
        (["generate", out, "--stream", "mini-mtl"], "Did you mean 'mini-mtil'"),
        (["generate", out, "--stream", "mini-mtil", "synthetc=3"], "Did you mean 'synthetic'"),
        (["generate", out, "--stream", "mini-mtil", "generator=nowhere/at/all", *AS_TEXT], "No text-to-image model"),
        (["generate", "synthetic=3", "--stream", "mini-mtil"], "should be the folder for the pairs"),
        (
            ["run", "--method", "gift", "--stream", "mini-mtil", "synthetic=0", "--out", out],
            "greater than or equal to 1",
        ),
    ):
        done = cli(*arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not Path(out).exists()
