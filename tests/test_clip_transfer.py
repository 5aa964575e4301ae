"""Learning from captions, the pull on positive pairs, and ``perdure analyse`` on the small world."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gift_step import Given
from test_gains import two_tasks
from test_gift import some_pairs
from typer.testing import CliRunner

import perdure
from perdure import launch
from perdure.benchmarks import mini
from perdure.cli import app
from perdure.cli.analysing import courses
from perdure.cli.results import read_metrics
from perdure.core.errors import PerdureError
from perdure.data.rehearsed import recalled, rehearsed
from perdure.data.task import Batch, Stream, Task
from perdure.engine.analyse import asked, margins, of_pairs
from perdure.engine.evaluate import Protocol
from perdure.launch.analysing import analyse
from perdure.methods.condu import ConDU
from perdure.methods.finetune import FineTune
from perdure.methods.gift import GIFT
from perdure.methods.icarl import ICaRL
from perdure.methods.ncm import NearestClassMean
from perdure.methods.zscl import ZSCL
from perdure.models.clip import CLIP
from perdure.ops.losses import classification, contrastive, positive_pull
from perdure.ops.margins import cka, class_margins, correlation, described, pair_margins
from perdure.report import analysis, html
from perdure.synthesis.store import collect
from perdure.terminal import console
from perdure.training.fit import fit

Run = Callable[..., dict[str, Any]]


def captioned(task: Task) -> Task:
    """The task, each of its training images with a text of its own."""
    texts = tuple(f"{task.prompts()[k]} number {n}" for n, k in enumerate(task.train.labels.tolist()))
    return replace(task, train=replace(task.train, captions=texts))


def with_captions(stream: Stream) -> Stream:
    return replace(stream, tasks=tuple(map(captioned, stream.tasks)))


# ---- learning


def test_images_without_captions_are_refused_before_the_work(tmp_path: Path, clip: CLIP, stream: Stream) -> None:
    with pytest.raises(PerdureError, match="learns from images with captions, and animals has none"):
        perdure.run("finetune", "mini-mtil", tmp_path / "run", loss="contrastive", tasks=2, images=8)
    assert not (tmp_path / "run").exists()
    method = FineTune(loss="contrastive", iterations=1, warmup=0)
    method.bind(clip)
    method.begin_task(stream.tasks[0])
    with pytest.raises(PerdureError, match="this batch has none"):
        fit(method, stream.tasks[0], torch.Generator(), clip.size, clip.device)
    with pytest.raises(PerdureError, match="loss=contrastive"):
        launch.configure("slca", "mini-mtil", 0, {"loss": "contrastive"}, {})  # its heads know no texts
    few = with_captions(stream.shortened(2, 12))
    for name in ("experience_replay", "ocl_sda", "pfr"):
        with pytest.raises(PerdureError, match="hold images without their captions"):
            launch.build(name, {"loss": "contrastive"}).bind(clip, few.context())


def test_images_that_are_learned_again_bring_their_captions(stream: Stream) -> None:
    few = with_captions(stream.shortened(2, 12))
    first, second = few.tasks
    again = recalled(few.context(), {first.name: [3, 1]})
    whole, _ = rehearsed(second, few.context(), again)
    new, old = second.train.captions, first.train.captions
    assert new and old and whole.train.captions == (*new, old[3], old[1])
    bare = replace(second, train=replace(second.train, captions=None))
    assert rehearsed(bare, few.context(), again)[0].train.captions is None


@pytest.mark.parametrize(
    "kind", [FineTune, ConDU, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (ZSCL, ICaRL))]
)
def test_captions_are_learned_by_every_learner(kind: Any, clip: CLIP, stream: Stream) -> None:
    """The first step's loss is that of the images and captions of the batch, whoever learns."""
    few = with_captions(stream.shortened(1, 12))
    values = {"iterations": 3, "batch_size": 12, "warmup": 0, "lr": 1e-4, "reference": "drawings", "reference_batch": 4}
    options = set(kind.Config.__dataclass_fields__)
    method = kind(**{k: v for k, v in values.items() if k in options}, loss="contrastive", positive_pull=0.3)
    method.bind(clip, few.context())
    (task,) = few.tasks
    expected: list[float] = []
    step = method.step

    def seen(batch: Batch, backward: Any) -> None:
        with torch.no_grad():
            x, y = clip.encode_image(batch.images), clip.encode_text(batch.captions)
            expected.append((contrastive(clip.similarity(x, y)) + 0.3 * positive_pull(x, y)).item())
        step(batch, backward)

    method.step = seen
    method.begin_task(task)
    losses = fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device)["task"]
    assert losses == pytest.approx(expected, rel=1e-4) and losses[2] < losses[0]


def test_the_pull_is_towards_the_class_s_text(clip: CLIP, stream: Stream) -> None:
    task = stream.tasks[0]
    for towers in ("both", "image"):
        method = FineTune(towers=towers, positive_pull=0.7, label_smoothing=0.1)
        method.bind(clip)
        method.begin_task(task)
        x, labels = clip.encode_image(task.train.pixels[:6]), task.train.labels[:6]
        texts = clip.encode_tokens(method.tokens)
        plain = classification(clip.similarity(x, texts), labels, 0.1)
        found = method.classify(x, labels)
        assert found.item() == pytest.approx(
            (plain + 0.7 * (x - texts[labels]).square().sum(1).mean()).item(), rel=1e-5
        )


@pytest.mark.parametrize("name", ["codyra", "keep_lora", "moe_adapters", "cpe_clip"])
def test_methods_with_losses_of_their_own_pull_too(name: str, stream: Stream) -> None:
    few = stream.shortened(1, 12)
    (task,) = few.tasks
    asked = {"iterations": 1, "epochs": 1, "batch_size": 12, "warmup": 0, "experts": 3, "reference": "none"}
    known = set(launch.method_options(launch.method_entry(name)))
    first = []
    for pull in (0.0, 0.3):
        clip = CLIP.load(str(mini.MODEL))
        texts = clip.class_texts([c.prompts()[:1] for c in task.classes])
        away = positive_pull(clip.embeddings(task.train.pixels), texts[task.train.labels]).item()
        method = launch.build(name, {**{k: v for k, v in asked.items() if k in known}, "positive_pull": pull})
        torch.manual_seed(0)
        method.bind(clip, few.context())
        method.begin_task(task)
        losses = fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device)
        first.append(sum(values[0] for values in losses.values()))
    assert first[1] - first[0] == pytest.approx(0.3 * away, rel=0.35)  # images are cropped at random, prompts are new


def test_gift_pulls_its_pairs_together_too(clip: CLIP, stream: Stream) -> None:
    found = {}
    for pull in (0.0, 0.5):
        method = GIFT(positive_pull=pull, synthetic_batch=6, iterations=1)
        method.bind(clip, stream.context())
        method.replay = Given(some_pairs(stream))  # type: ignore[assignment]
        method.begin_task(stream.tasks[0])
        found[pull] = method.replay_losses(torch.arange(6))
    assert set(found[0.5]) - set(found[0.0]) == {"pull"}
    own = method.pairs.images[:6], [method.pairs.prompts[k] for k in range(6)]
    x, y = clip.encode_image(own[0]), clip.encode_text(own[1])
    assert found[0.5]["pull"].item() == pytest.approx(0.5 * (x - y).square().sum(1).mean().item(), rel=1e-5)


@pytest.mark.slow
def test_a_pull_brings_images_to_their_texts_and_margins_follow_learning() -> None:
    """A task's margin rises when it is learned, and falls when the next is."""
    found = {}
    for pull in (0.0, 4.0):
        data, clip = two_tasks().shortened(2, 48), CLIP.load(str(mini.MODEL))
        method = FineTune(positive_pull=pull, iterations=20, warmup=2, lr=3e-4, batch_size=24)
        method.bind(clip)
        parts = asked(replace(data, probe=None), Protocol("task", "known"), 2, 48)[:1]
        found[pull] = [margins(method, parts)["digits"]]
        for task in data.tasks:
            method.begin_task(task)
            fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device)
            clip.trained(task.name)
            found[pull].append(margins(method, parts)["digits"])
    before, learned, after = (figures["median"] for figures in found[0.0])
    assert learned > before and after < learned and found[0.0][1]["right"] > found[0.0][0]["right"] + 0.1
    assert found[4.0][1]["distance"] < found[0.0][1]["distance"] - 0.05


# ---- figures


def test_cka_is_blind_to_turns_and_scales_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=draw)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=draw))[0]
    assert cka(x, 3 * x @ turn + 5) == pytest.approx(1) and cka(x, torch.randn(40, 6, generator=draw)) < 0.4
    assert 0.4 < cka(x, x * torch.tensor([3.0, 1, 1, 1, 1, 1])) < 0.95
    assert cka(x[:, :0], x[:, :0]) == 1.0 and cka(torch.zeros(5, 2), torch.ones(5, 3)) == 1.0


def test_margins_of_one_class_and_correlations_of_nothing() -> None:
    assert class_margins(torch.tensor([[0.3], [-0.2]]), torch.tensor([0, 0])).tolist() == pytest.approx([0.3, -0.2])
    assert correlation([1, 2, 3], [2, 4, 7]) == pytest.approx(0.9934, abs=1e-4)
    assert correlation([1, 2], [2, 4]) is None and correlation([1, 1, 1], [2, 4, 7]) is None


def test_pairs_of_captioned_images_and_texts_under_a_head(clip: CLIP, stream: Stream) -> None:
    data = with_captions(stream.shortened(2, 8))
    found = of_pairs(clip, data.tasks[1].train, 6)
    assert found is not None and sum(found["histogram"]) == 30 and of_pairs(clip, stream.tasks[1].train, 6) is None
    method = NearestClassMean()
    method.bind(clip)
    parts = asked(replace(data, probe=None), Protocol("task", "known"), 0, 4)
    before = margins(method, parts)
    method.calibrate(data.tasks[0])
    assert margins(method, parts) == before  # the texts' own say, whatever a head answers
    assert [len(part.labels) for part in parts] == [4, 4] and 0 < before["digits"]["distance"] < 2


# ---- a run


@pytest.mark.slow
def test_a_run_is_looked_at_stage_by_stage_and_its_report_shows_it(short_run: Run) -> None:
    metrics = short_run("finetune")
    folder = metrics["folder"]
    assert "Margins and drift" not in html.render([read_metrics(folder)])
    told = CliRunner().invoke(app, ["analyse", str(folder)])
    assert told.exit_code == 0 and "least CKA" in told.stdout and "same answer" in told.stdout
    run = read_metrics(folder)
    found = run["analysis"]
    assert [stage["task"] for stage in found["stages"]] == [p.name for p in sorted(folder.glob("task_*"))]
    rows = metrics["accuracy"], metrics["probe"], metrics["gap"]
    for stage, row, probe, gap in zip(found["stages"], *rows, strict=True):
        right = [100 * stage["margins"][name]["right"] for name in (*metrics["tasks"], "probe")]
        assert right == pytest.approx([*row, probe], abs=0.01) and stage["gap"] == pytest.approx(gap, rel=1e-5)
        assert all(sum(figures["histogram"]) == 16 for figures in stage["margins"].values())
    wide = [stage["spread"]["effective_rank"] for stage in found["stages"]]
    assert all(1 < rank <= 128 for rank in wide) and wide[0] != wide[-1]
    assert all(0 < stage["spread"]["mean_correlation"] < 1 for stage in found["stages"])
    first, last = found["stages"][0], found["stages"][-1]
    assert set(first["weights"].values()) == {0.0} and min(first["cka"].values()) == pytest.approx(1)
    assert min(last["weights"][f"{tower} {k}"] for tower in ("image", "text") for k in (1, 2)) > 0
    assert all(0 < value <= 1 + 1e-9 for value in last["cka"].values()) and min(last["cka"].values()) < 0.9999
    assert found["experts"]["names"] == ["pretrained", "last"] and found["experts"]["same"][0][0] == 1
    assert set(found["fell"]) == set(metrics["tasks"][:-1])
    page = html.render([run])
    assert "Margins and drift" in page and page.count("Class margins of") == len(run["tasks"]) + 1
    assert f">{last['margins']['digits']['median']:.3f}</td>" in page
    assert analysis.of({**run, "seed": 5}) == {} == analysis.of({**run, "analysis": None})
    launch.begin("zero_shot", "mini-mtil", folder, overwrite=True, assignments={"tasks": 1, "images": 8})
    assert not (folder / "analysis.json").exists()  # it was of another run


@pytest.mark.slow
def test_margins_of_the_pairs_that_a_run_replayed(
    tmp_path: Path, stream: Stream, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each text once; where they lie elsewhere, too; where they are gone, none are spoken of."""
    pixels, task = stream.tasks[1].train.pixels, stream.tasks[1]
    prompts = [task.prompts()[k] for k in task.train.labels.tolist()]
    collect(tmp_path / "kept", pixels[:], prompts, "drawings")
    values: dict[str, Any] = {
        "images": 8,
        "iterations": 2,
        "warmup": 0,
        "lr": 1e-3,
        "batch_size": 8,
        "precision": "fp32",
    }
    values |= {"pairs": str(tmp_path / "kept"), "synthetic": 16, "synthetic_batch": 8}
    folder = tmp_path / "run"
    perdure.run("gift", two_tasks(), folder, **values)
    stages = analyse(folder, stream=two_tasks())["stages"]
    several = len(set(prompts))
    assert all(sum(one["synthetic_pairs"]["histogram"]) == several * (several - 1) for one in stages)
    clip, image_of = CLIP.load(str(mini.MODEL)), {text: k for k, text in enumerate(prompts)}
    x, y = clip.embeddings(pixels[torch.tensor(list(image_of.values()))]), clip.encode_text(list(image_of))
    for key, value in described(pair_margins(x, y), 1 / clip.scale.item()).items():
        assert stages[0]["synthetic_pairs"][key] == pytest.approx(value, abs=1e-5), key
    assert stages[0]["synthetic_pairs"] != stages[-1]["synthetic_pairs"]
    run = read_metrics(folder)
    assert "Median pair margin" in (page := html.render([run])) and ">synthetic pairs<" in page
    console().print(courses(run["analysis"]))
    told = capsys.readouterr().out
    assert "pairs'" in told and f"{stages[-1]['synthetic_pairs']['median']:.3f}" in told
    shutil.rmtree(tmp_path / "kept")
    gone = analyse(folder, stream=two_tasks())["stages"]
    assert all(one["synthetic_pairs"] is None for one in gone)
    assert "Median pair margin" not in html.render([read_metrics(folder)])


@pytest.mark.slow
def test_an_expert_a_task_and_who_agrees(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "images": 8,
        "iterations": 3,
        "warmup": 0,
        "lr": 1e-3,
        "batch_size": 8,
        "precision": "fp32",
    }
    perdure.run("individual", two_tasks(), tmp_path / "run", **values)
    found = analyse(tmp_path / "run", images=8, stream=two_tasks())
    names, same = found["experts"]["names"], torch.tensor(found["experts"]["same"])
    assert names == ["pretrained", "expert digits", "expert letters"]
    assert torch.equal(same, same.T) and same.diagonal().eq(1).all() and same.min() < 1
    assert max(found["stages"][-1]["weights"].values()) > 0  # of the newest expert


def test_what_cannot_be_analysed(tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match="holds no run"):
        analyse(tmp_path / "nothing")
    launch.begin("zero_shot", "mini-mtil", tmp_path / "run", assignments={"tasks": 1, "images": 8})
    with pytest.raises(PerdureError, match="no finished task yet"):
        analyse(tmp_path / "run")
