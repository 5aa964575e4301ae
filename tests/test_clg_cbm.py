"""CLG-CBM on the small world: what keeps old classes, whether scores mean their concepts, what decided, and bad files."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_replayed_features import learned, mean, task_of
from typer.testing import CliRunner

import perdure
from perdure import Learner, launch
from perdure.benchmarks import mini
from perdure.cli import app
from perdure.core.errors import PerdureError
from perdure.core.state import write_json
from perdure.data.task import Context, Query, Stream
from perdure.launch.learner.answers import answered
from perdure.methods.base import Method
from perdure.methods.clg_cbm import CLGCBM
from perdure.models.clip import CLIP
from perdure.report import html
from perdure.training.bottleneck import held_out
from perdure.training.fit import optimise

QUICK: dict[str, Any] = {"per_class": 2, "search_epochs": 1, "epochs": 2, "lr": 1e-2, "neighbours": 4}


def listed(stream: Stream, most: int = 4) -> dict[str, list[str]]:
    """Phrases that nobody would call concepts, a class."""
    return {one.name: [f"{one.name} {k}" for k in range(most)] for task in stream.tasks for one in task.classes}


@pytest.fixture(scope="module")
def world() -> tuple[CLIP, Stream]:
    """Two steps of the small world, and a model that nothing trains: each image is encoded once for all tests."""
    return CLIP.load(str(mini.MODEL)), mini.class_incremental().shortened(2, 0)


@pytest.mark.slow
def test_moved_features_and_draws_keep_what_was_learned(world: Any) -> None:
    """Without either the first step is lost; an untrained head knows nothing of the second."""
    method, both, probe = learned("clg_cbm", world)
    _, alone, _ = learned("clg_cbm", world, pseudo=False, sg_num=0)
    _, before, at_first = learned("zero_shot", world)
    assert both[0] > alone[0] + 15 and mean(both) > mean(alone) + 10 and min(both) > 70
    assert torch.equal(probe, at_first) and len(before) == 2
    assert len(method.state.phrases) == method.remarks()["concepts"] == 120


@pytest.mark.slow
def test_scores_mean_what_they_are_called_only_if_asked_to(world: Any) -> None:
    method, _, _ = learned("clg_cbm", world, sparsity=1e-2)
    other, _, _ = learned("clg_cbm", world, sim=0, sparsity=0)
    likeness, light = "likeness to concepts", "weights above 0.01, share"
    assert method.remarks()[likeness] > 0.8 and abs(other.remarks()[likeness]) < 0.3
    assert method.remarks()[light] < 0.5 < other.remarks()[light]


def test_a_class_of_one_image_of_none_and_one_that_comes_again(clip: CLIP, stream: Stream) -> None:
    warned: list[str] = []
    method = CLGCBM(**QUICK)
    method.bind(clip, Context(vocabulary=mini.vocabulary(), warn=warned.append))
    with clip.remembering():
        method.calibrate(task_of(stream, {0: 5, 2: 1}))
        rows, first = list(method.state.classes), method.state.bottleneck["weight"]
        method.calibrate(task_of(stream, {1: 4, 2: 5}, 1))  # 2 again
        assert method.state.classes[:2] == rows and len(method.state.classes) == 3
        assert len(method.state.phrases) == 8 and method.state.bottleneck["heads"].shape == (3, 8)
        assert method.state.bottleneck["weight"].shape == (8, first.shape[1])
        task = stream.tasks[0]
        query = Query(task.test.pixels, task.classes)
        answer, before = method.predict(query), Method()
        before.join(clip, Context())
        text = before.predict(query).softmax(1)
    torch.testing.assert_close(answer[:, 3:], text[:, 3:])  # what was not learned keeps its probability
    torch.testing.assert_close(answer.sum(1), torch.ones(len(answer)))
    assert len(warned) == 1 and "not attributes" in warned[0]
    assert method.explained(query, [4] * len(answer)) == [[]] * len(answer)  # never learned: nothing to tell


def test_an_explanation_adds_up_to_the_logit(clip: CLIP, stream: Stream, tmp_path: Path) -> None:
    """Few concepts, so that all are told: the contributions of an answer are its logit."""
    file = tmp_path / "concepts.json"
    write_json(file, listed(stream, 2))
    method = CLGCBM(**{**QUICK, "per_class": 1}, concepts=str(file), prefix="a drawing with ")
    method.bind(clip, stream.context())
    task = task_of(stream, {0: 8, 1: 8, 3: 8})
    method.calibrate(task)
    query = Query(task.test.pixels, [task.classes[k] for k in (0, 1, 3)])
    answer = method.predict(query)
    told = method.explained(query, answer.argmax(1).tolist())
    for why, logits in zip(told, answer, strict=True):
        assert [abs(share) for _, share in why] == sorted((abs(share) for _, share in why), reverse=True)
        assert sum(share for _, share in why) == pytest.approx(logits.max().item(), abs=1e-5)
        assert {what for what, _ in why} == set(method.state.phrases)
    assert set(method.heaviest()) == {task.classes[k].name for k in (0, 1, 3)}


@pytest.mark.parametrize("keep", ["last", "held_out"])
def test_the_best_weights_are_chosen_by_what_was_held_out(keep: str, clip: CLIP, stream: Stream) -> None:
    method = CLGCBM(
        **{**QUICK, "epochs": 4, "look_every": 1, "search_epochs": 3}, keep_weights=keep, search_bn="release"
    )
    method.bind(clip, Context(vocabulary=mini.vocabulary()))
    phases: dict[str, Any] = {}

    def noted(learner: Any, plan: Any, draws: Any, name: str) -> Any:
        phases[name] = learner
        return optimise(learner, plan, draws, clip.device)

    method.lend(noted)
    method.calibrate(task_of(stream, {0: 12, 1: 12}))
    judge, found = phases["bottleneck"].judge, method.state.bottleneck["weight"]
    assert torch.equal(found, judge.kept["weight"] if keep == "held_out" else phases["bottleneck"].weight)
    assert (judge.best > 0) == (keep == "held_out") and not phases["search"].gate.training


def test_a_tenth_of_each_class_is_held_out_but_never_all() -> None:
    rows = torch.tensor([0] * 25 + [1] * 3 + [2])
    out = held_out(rows, torch.Generator().manual_seed(0))
    assert [int(out[rows == k].sum()) for k in range(3)] == [2, 1, 0]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (["fox"], "one JSON object"),
        ({"fox": "a tail"}, "'fox' should have a list of phrases"),
        ({"fox": ["a tail", " "]}, "'fox' should have a list of phrases"),
        (None, "no such file"),
        ("less", "lacks 1 of the"),
        ("few", "takes"),
    ],
)
def test_a_concept_file_that_will_not_do_is_refused_before_the_work(written: Any, said: str, tmp_path: Path) -> None:
    stream, file = mini.multi_domain("I").shortened(2, 16), tmp_path / "concepts.json"
    content = listed(stream)
    if written == "less":
        written = {key: phrases for key, phrases in content.items() if key != stream.tasks[1].classes[0].name}
    elif written == "few":
        written = {key: phrases[:1] for key, phrases in content.items()}
    if written is not None:
        write_json(file, written)
    with pytest.raises(PerdureError, match=said):
        perdure.run("clg_cbm", "mini-mtil", tmp_path / "run", tasks=2, images=16, concepts=str(file), per_class=2)
    assert not (tmp_path / "run").exists()


def test_what_else_is_refused(clip: CLIP, stream: Stream, tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match="measure nothing"):
        CLGCBM(keep_weights="best_of_test").bind(clip, stream.context())
    with pytest.raises(PerdureError, match="no vocabulary"):
        CLGCBM(**QUICK).bind(clip, Context(tasks=stream.tasks))
    write_json(tmp_path / "a.json", {"7": ["a tail", "a nose"]})
    write_json(tmp_path / "names.json", {"8": "fox"})
    with pytest.raises(PerdureError, match="no name for '7'"):
        CLGCBM(concepts=str(tmp_path / "a.json"), concept_names=str(tmp_path / "names.json")).bind(
            clip, stream.context()
        )
    method = CLGCBM(**QUICK, ridge=0.0)
    method.bind(clip, Context(vocabulary=mini.vocabulary()))
    with pytest.raises(PerdureError, match="without an inverse"):
        method.calibrate(task_of(stream, {0: 3, 1: 3}))
    write_json(tmp_path / "b.json", listed(stream))
    method = CLGCBM(**QUICK, concepts=str(tmp_path / "b.json"))
    method.bind(clip, stream.context())
    method.calibrate(task_of(stream, {0: 3, 1: 3}))
    write_json(tmp_path / "b.json", listed(stream, 5))
    again = CLGCBM(**QUICK, concepts=str(tmp_path / "b.json"))
    again.bind(clip, stream.context())
    again.state = method.state
    with pytest.raises(PerdureError, match="has changed"):
        again.calibrate(task_of(stream, {2: 3}, 1))
    none = replace(stream.tasks[0], train=stream.tasks[0].train.take(torch.empty(0, dtype=torch.int64)))
    again.join(clip, replace(stream.context(), tasks=(none, stream.tasks[1])))  # a model in use: its file may grow
    again.calibrate(task_of(stream, {2: 3}, 1))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in use that answers by concepts, and pictures beside it."""
    folder, task = tmp_path_factory.mktemp("home"), mini.multi_domain("I").tasks[0]
    for k, name in enumerate(c.name for c in task.classes[:3]):
        (folder / "pets" / name).mkdir(parents=True)
        for number, image in enumerate(task.train.pixels[:][task.train.labels == k][:8]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "pets" / name / f"{number}.png")
    Learner(folder / "HOME", method="clg_cbm", precision="fp32", **QUICK).learn(folder / "pets", max_loss=100)
    return folder


@pytest.mark.slow
def test_predict_says_what_decided(home: Path) -> None:
    learner = Learner(home / "HOME")
    rows = learner.predict(home / "pets", explain=True)
    plain = learner.predict(home / "pets")
    assert [{k: v for k, v in row.items() if k != "why"} for row in rows] == plain
    assert all(len(row["why"]) == 5 and row["why"][0]["concept"].startswith("like “") for row in rows)
    ask = lambda *more: CliRunner().invoke(app, ["predict", str(home / "HOME"), str(home / "pets"), *more])  # noqa: E731
    assert "decided by" in ask("--explain").stdout and "decided by" not in ask().stdout
    assert json.loads(ask("--explain", "--format", "json").stdout)[0]["why"] == rows[0]["why"]
    (table, *_) = csv.DictReader(io.StringIO(ask("--explain", "--format", "csv").stdout))
    assert table["why"].startswith(rows[0]["why"][0]["concept"])
    Learner(home / "HOME").export(home / "out")
    assert Learner.from_pretrained(home / "out").predict(home / "pets", explain=True) == rows


@pytest.mark.slow
def test_the_served_page_and_its_answers_say_what_decided(home: Path) -> None:
    from served import Served, files

    served = Served(Learner(home / "HOME"))
    try:
        pictures = sorted((home / "pets").rglob("*.png"))[:2]
        status, answer = served.predict(files(*pictures))
        expected = Learner(home / "HOME").predict(pictures, explain=True)
        assert status == 200 and [row["why"] for row in answer["answers"]] == [row["why"] for row in expected]
        assert "Decided by: " in served.get("/")[2]
        assert "why" in served.get("/openapi.json")[2]["components"]["schemas"]["Answer"]["properties"]
    finally:
        served.end()


def test_a_method_without_concepts_says_so(clip: CLIP, stream: Stream) -> None:
    method = Method()
    method.join(clip, Context())
    with pytest.raises(PerdureError, match="without concepts"):
        answered(method, [], stream.tasks[0].test.pixels[:2], ["cat", "dog"], 1, explain=True)


def test_the_report_shows_pictures_and_what_decided(tmp_path: Path) -> None:
    metrics = perdure.run("clg_cbm", "mini-mtil", tmp_path / "run", tasks=2, images=16, precision="fp32", **QUICK)
    found = metrics["explained"]
    assert len(found["pictures"]) == 8 and {one["task"] for one in found["pictures"]} == set(metrics["tasks"])
    page = html.render([json.loads((tmp_path / "run" / "metrics.json").read_text())])
    assert page.count("data:image/png;base64,") == 8 and "What decided" in page
    concept, share = found["pictures"][0]["why"][0]
    assert f"{concept} ({share:+.2f})" in page
    assert "explained" not in launch.over_seeds([metrics, metrics])
