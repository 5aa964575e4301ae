"""A model in use: what it learns, answers, takes back, forgets and leaves for others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import perdure
from perdure import Learner, PerdureError, Pictures
from perdure.benchmarks import mini
from perdure.cli.results import read_metrics
from perdure.core.state import only_one
from perdure.engine import home, keeping
from perdure.launch.learner.comparison import Row, compared, refusal
from perdure.models.clip import CLIP
from perdure.synthesis.store import collect

RIDGE: dict[str, Any] = {
    "method": "ridge",
    "features": 96,
    "choose": "fixed",
    "lam": 0.01,
    "temperature": 8,
    "weight": 0.7,
}
QUICK: dict[str, Any] = {"method": "finetune", "iterations": 2, "warmup": 0, "batch_size": 8, "precision": "fp32"}


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of drawings: TASK/CLASS/*.png, of three domains, four classes each."""
    base = tmp_path_factory.mktemp("given") / "drawings"
    for task in mini.multi_domain("I").tasks[:4]:
        place, classes, each = (base / task.name, 4, 12) if task.name != "letters" else (base.parent / "probe", 16, 3)
        for k, one in enumerate(task.classes[:classes]):
            (place / one.name).mkdir(parents=True)
            for number in (task.train.labels == k).nonzero().squeeze(1)[:each].tolist():
                picture = Image.fromarray(task.train.pixels[number].permute(1, 2, 0).numpy())
                picture.save(place / one.name / f"{number}.png")
    return base


def opened(folder: Path, drawings: Path, **values: Any) -> Learner:
    """A model in use whose probe is small."""
    return Learner(folder, probe=drawings.parent / "probe", **(values or RIDGE))


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory, drawings: Path) -> Path:
    """A HOME that learned two tasks with a small ridge head."""
    folder = tmp_path_factory.mktemp("homes") / "HOME"
    for task in ("animals", "digits"):
        assert opened(folder, drawings).learn(drawings / task).accepted
    return folder


@pytest.fixture
def mine(learned: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    shutil.copytree(learned, tmp_path / "HOME")
    return tmp_path / "HOME"


def answers(learner: Learner, pictures: Path) -> list[Any]:
    return [(row["label"], row["score"], row["task"]) for row in learner.predict(pictures)]


def states(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


@pytest.mark.slow
def test_three_lines_from_nothing_to_a_result(tmp_path: Path, drawings: Path) -> None:
    learner = Learner(tmp_path / "HOME", **RIDGE)
    (outcome,) = learner.learn(drawings / "digits")
    rows = {row.name: row for row in outcome.rows}
    assert set(rows) == {"digits", "probe"} and outcome.accepted
    after, before = rows["digits"].after, rows["digits"].before
    assert after is not None and before is not None and after > before + 20
    assert rows["probe"].change == 0 and rows["digits"].change_interval
    assert "digits is learned" in str(outcome) and f"{after:.1f} %" in str(outcome)
    found = learner.predict(drawings / "digits" / "zero", topk=3)
    right = sum(row["label"] == "zero" for row in found)
    assert right >= 0.7 * len(found)
    assert all(row["task"] == "digits" and row["top"][0]["label"] == row["label"] for row in found)
    assert all(len(row["top"]) == 3 and row["score"] == row["top"][0]["score"] for row in found)


def test_what_was_learned_before_is_not_learned_again(mine: Path, drawings: Path, tmp_path: Path) -> None:
    before = states(mine)
    (outcome,) = Learner(mine).learn(drawings / "digits")
    assert outcome.already and states(mine) == before
    shutil.copytree(drawings / "digits", tmp_path / "more")
    for number, task in enumerate(mini.multi_domain("I").tasks[1].train.pixels[-40:]):
        Image.fromarray(task.permute(1, 2, 0).numpy()).save(tmp_path / "more" / "zero" / f"new{number}.png")
    (outcome,) = Learner(mine).learn(tmp_path / "more")
    about = Learner(mine).history()[-1]["about"]
    assert outcome.accepted and "shown before (digits): they are left out" in " ".join(outcome.notes)
    assert "4 of its 4 classes are known already" in " ".join(outcome.notes)
    assert about["train"] + about["test"] == 40  # the new ones alone
    assert len(home.all_classes([one.task(0) for one in home.course(mine, tensors=False)[1]])) == 8


def test_a_name_that_is_taken_is_refused_and_another_can_be_given(mine: Path, drawings: Path, tmp_path: Path) -> None:
    other = tmp_path / "digits"
    shutil.copytree(drawings / "food", other)
    before = states(mine)
    with pytest.raises(PerdureError, match="--name digits-2"):
        Learner(mine).learn(other)
    assert states(mine) == before
    (outcome,) = Learner(mine).learn(other, name="kitchen")
    assert outcome.accepted and states(mine)[-1] == "task_03_kitchen"


@pytest.mark.slow
def test_what_costs_too_much_is_refused_and_lies_beside(tmp_path: Path, drawings: Path) -> None:
    folder, probe = tmp_path / "HOME", drawings / "food"
    learner = Learner(folder, probe=probe, **{**QUICK, "iterations": 15, "lr": 8e-4})
    (outcome,) = learner.learn(drawings / "animals", max_loss=1)
    assert not outcome.accepted and "probe would lose" in outcome.refused and "allowed are 1" in outcome.refused
    assert states(folder) == ["refused_task_01_animals", "task_00_before"]
    assert learner.predict(probe, classes=["cat", "five"]) == Learner(folder).predict(probe, classes=["cat", "five"])
    (outcome,) = Learner(folder).learn(drawings / "animals", max_loss=100)
    assert outcome.accepted and outcome.folder == folder / "task_01_animals"
    assert [one["state"] for one in Learner(folder).history()] == ["refused", "current"]


def test_a_loss_that_chance_explains_is_no_reason_unless_asked() -> None:
    rows = [
        Row("new", 10, 50, 10, -40, change_interval=(-60, -20)),
        Row("small", 10, 80, 70, -10, change_interval=(-30, 0)),
        Row("unmeasured", 0),
    ]
    assert refusal(rows, "new", None) == ""
    assert "small would lose 10.0 points" in refusal(rows, "new", 9)
    assert refusal(rows, "new", 10) == ""
    rows.append(Row("probe", 900, 69, 66.5, -2.5, change_interval=(-4, -1)))
    assert refusal(rows, "new", None).startswith("probe would lose 2.5 points; allowed are 2")
    assert refusal(rows, "new", 30) == ""


def test_undo_takes_back_and_deletes_nothing(mine: Path, drawings: Path) -> None:
    learner = Learner(mine)
    one = answers(learner, drawings / "animals")
    assert {task for *_, task in one} <= {"animals", "digits"}
    size = sum(p.stat().st_size for p in mine.rglob("*.safetensors"))
    assert learner.undo() == ["task_02_digits"]
    assert {task for *_, task in answers(learner, drawings / "animals")} == {"animals"}
    assert sum(p.stat().st_size for p in mine.rglob("*.safetensors")) == size
    assert learner.learn(drawings / "digits").accepted
    assert answers(learner, drawings / "animals") == one  # the same bits again
    assert learner.undo(to=0) == ["task_02_digits-2", "task_01_animals"]
    with pytest.raises(PerdureError, match="Nothing is to undo"):
        learner.undo()
    with pytest.raises(PerdureError, match="--classes"):
        learner.predict(drawings / "animals")
    assert learner.predict(drawings / "animals", classes=["cat", "five"])[0]["task"] is None


@pytest.mark.slow
def test_forgetting_is_never_having_learned(learned: Path, mine: Path, drawings: Path, tmp_path: Path) -> None:
    other = opened(tmp_path / "other", drawings)
    other.learn(drawings / "digits")
    rows = Learner(mine).forget("animals")
    assert [row.name for row in rows] == ["digits", "probe"]
    a, b = Learner(mine).predict(drawings / "digits", topk=4), other.predict(drawings / "digits", topk=4)
    for one, two in zip(a, b, strict=True):
        assert one["label"] == two["label"] and one["task"] == two["task"] == "digits"
        assert [x["score"] for x in one["top"]] == pytest.approx([x["score"] for x in two["top"]], abs=2e-5)
    assert [one["state"] for one in Learner(mine).history()] == ["forgotten", "current", "current"]
    with pytest.raises(PerdureError, match="no task 'animals'.*Known: digits"):
        Learner(mine).forget("animals")
    assert Learner(mine).learn(drawings / "animals").accepted  # and can be learned again
    Learner(mine).undo(to=2)
    assert answers(Learner(mine), drawings / "animals") == answers(Learner(learned), drawings / "animals")


@pytest.mark.slow
def test_what_is_mixed_in_weights_cannot_be_forgotten(tmp_path: Path, drawings: Path) -> None:
    learner = opened(tmp_path / "HOME", drawings, **QUICK)
    learner.learn(drawings / "digits", max_loss=100)
    before = states(learner.folder)
    with pytest.raises(PerdureError, match="cannot forget one task"):
        learner.forget("digits")
    assert states(learner.folder) == before


@pytest.mark.slow
def test_condu_forgets_an_expert(tmp_path: Path, drawings: Path) -> None:
    learner = opened(tmp_path / "HOME", drawings, **{**QUICK, "method": "condu"})
    for task in ("animals", "digits", "food"):
        assert learner.learn(drawings / task, max_loss=100).accepted
    learner.forget("digits")
    now = learner.current()
    assert now.method.state.order == ["animals", "food"] == list(now.method.state.prototypes)
    assert {row["task"] for row in learner.predict(drawings / "digits")} <= {"animals", "food"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        RIDGE,
        QUICK,
        {**QUICK, "adapt": "lora", "lr": 0.01},
        {**QUICK, "method": "condu"},
        {**QUICK, "method": "finetune+ridge"},
    ],
    ids=lambda v: "-".join([v["method"], v.get("adapt", "full")]),
)
def test_an_export_answers_the_same_bits(values: dict[str, Any], tmp_path: Path, drawings: Path) -> None:
    from transformers import CLIPModel

    learner = opened(tmp_path / "HOME", drawings, **values)
    for task in ("animals", "digits"):
        learner.learn(drawings / task, max_loss=100)
    left = learner.export(tmp_path / "out")
    shutil.move(tmp_path / "HOME", tmp_path / "gone")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    again = Learner.from_pretrained(tmp_path / "elsewhere")
    asked = drawings / "animals"
    assert again.predict(asked, topk=5) == Learner(tmp_path / "gone").predict(asked, topk=5)
    CLIPModel.from_pretrained(tmp_path / "elsewhere")
    card = (tmp_path / "elsewhere" / "README.md").read_text()
    assert "library_name: perdure" in card and "zero-shot probe" in card and f"`{values['method']}`" in card
    experts = sorted(p.name for p in (tmp_path / "elsewhere").glob("experts/*"))
    assert experts == (["01_animals", "02_digits"] if values["method"] == "condu" else [])
    assert ("the head that answers on top of it" in left) == ("ridge" in values["method"])
    with pytest.raises(PerdureError, match="is an export"):
        again.learn(drawings / "food")


@pytest.mark.slow
def test_what_is_kept_of_test_pictures_is_a_choice(tmp_path: Path, drawings: Path) -> None:
    shutil.copytree(drawings, tmp_path / "shown")
    for keep in ("pictures", "paths", "none"):
        learner = opened(tmp_path / keep, drawings, keep=keep, **RIDGE)
        learner.learn(tmp_path / "shown" / "digits")
        assert keeping.KEPT[keep] in learner.kept()
    shutil.rmtree(tmp_path / "shown" / "digits")
    found = {keep: Learner(tmp_path / keep).evaluate()[0] for keep in ("pictures", "paths", "none")}
    assert found["pictures"].after is not None and found["pictures"].name == "digits"
    assert found["paths"].after is None and found["none"].after is None
    (outcome,) = Learner(tmp_path / "none").learn(tmp_path / "shown" / "food")
    assert {row.name: row.after is None for row in outcome.rows} == {"digits": True, "food": False, "probe": False}


def test_a_probe_of_ones_own(tmp_path: Path, drawings: Path) -> None:
    learner = opened(tmp_path / "HOME", drawings)
    (outcome,) = learner.learn(drawings / "digits")
    (row,) = (row for row in outcome.rows if row.name == "probe")
    assert row.images == sum(1 for _ in (drawings.parent / "probe").rglob("*.png")) == 48 and row.change == 0
    with pytest.raises(PerdureError, match="is no folder"):
        Learner(tmp_path / "other", probe=tmp_path / "nowhere", **RIDGE).learn(drawings / "digits")
    assert not (tmp_path / "other").exists()


def test_synthetic_pairs_are_a_probe(tmp_path: Path, drawings: Path) -> None:
    """Which of all texts belongs to a picture; pictures that came back black are none."""
    food = mini.multi_domain("I").tasks[2]
    texts = [f"a drawing of a {food.classes[k].name}" for k in food.test.labels[:30].tolist()]
    images = food.test.pixels[:30].clone()
    images[3] = 0
    collect(tmp_path / "pairs", images, texts, "a test")
    learner = Learner(tmp_path / "HOME", probe=tmp_path / "pairs", **RIDGE)
    (outcome,) = learner.learn(drawings / "digits")
    (row,) = (row for row in outcome.rows if row.name == "probe")
    known = sorted({text for k, text in enumerate(texts) if k != 3})
    plain = CLIP.load(str(mini.MODEL))
    with torch.no_grad():
        best = plain.similarity(plain.encode_image(images), plain.encode_text(known)).argmax(1)
    right = [known[k] == text for k, text in zip(best.tolist(), texts, strict=True)]
    assert row.images == 29 and row.before == pytest.approx(100 * sum(right[:3] + right[4:]) / 29, abs=0.01)
    collect(tmp_path / "few", images[:2], texts[:1] * 2, "a test")
    with pytest.raises(PerdureError, match="a probe needs two at least"):
        Learner(tmp_path / "other", probe=tmp_path / "few", **RIDGE).learn(drawings / "digits")


def test_a_dry_run_learns_nothing(tmp_path: Path, drawings: Path, mine: Path) -> None:
    (outcome,) = Learner(tmp_path / "new", **RIDGE).learn(drawings / "food", dry_run=True)
    assert "food would be learned" in outcome.notes[-1] and "4 classes" in outcome.notes[-1]
    assert not (tmp_path / "new").exists()
    before = states(mine)
    assert [one.already for one in Learner(mine).learn(drawings, dry_run=True)] == [True, True, False]
    assert states(mine) == before


def test_a_home_is_used_as_it_was_made(mine: Path, drawings: Path, tmp_path: Path) -> None:
    for wrong, said in (
        ({"method": "finetune"}, "method: finetune was given"), ({"features": 97}, "features: 97 was given"),
        ({"model": str(tmp_path)}, "model: "), ({"keep": "none"}, "keep: none"), ({"seed": 3}, "seed: 3"),
    ):  # fmt: skip
        with pytest.raises(PerdureError, match=said):
            Learner(mine, **wrong)
    Learner(mine, **RIDGE)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    with pytest.raises(PerdureError, match="holds other things"):
        Learner(tmp_path / "notes")
    with pytest.raises(PerdureError, match="has learned nothing yet"):
        Learner(tmp_path / "nothing").predict(drawings / "food")
    with pytest.raises(PerdureError, match="shots belongs to runs"):
        Learner(tmp_path / "nothing", shots=3, **RIDGE).learn(drawings / "food")


def test_nothing_is_learned_of_a_folder_that_changes_meanwhile(
    mine: Path, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(drawings / "food", tmp_path / "food")
    before, measured = states(mine), home.measure

    def growing(*given: Any) -> Any:
        shutil.copy(
            next((tmp_path / "food").rglob("*.png")),
            tmp_path / "food" / sorted(p.name for p in (tmp_path / "food").iterdir())[0] / "one_more.png",
        )
        return measured(*given)

    monkeypatch.setattr("perdure.launch.learner.state.measure", growing)
    with pytest.raises(PerdureError, match="changed while they were being learned"):
        Learner(mine).learn(tmp_path / "food")
    assert states(mine) == before


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "while it is written"])
def test_stopped_at_any_moment_a_home_is_as_it_was(
    moment: str, mine: Path, drawings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answers(Learner(mine), drawings / "digits")
    place = "perdure.launch.learner.learner.compared" if moment == "before" else "perdure.engine.checkpoint.write_json"

    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, stop)
        Learner(mine).learn(drawings / "food")
    assert states(mine) == ["task_00_before", "task_01_animals", "task_02_digits"]
    assert answers(Learner(mine), drawings / "digits") == before
    assert Learner(mine).learn(drawings / "food").accepted


def test_a_home_is_no_run(mine: Path, drawings: Path) -> None:
    before = answers(Learner(mine), drawings / "digits")
    for again in (
        lambda: perdure.run("finetune", "mini-mtil", mine, overwrite=True, tasks=1), lambda: perdure.resume(mine),
        lambda: read_metrics(mine),
    ):  # fmt: skip
        with pytest.raises(PerdureError, match="is a model in use"):
            again()
    assert answers(Learner(mine), drawings / "digits") == before


def test_one_process_at_a_time(mine: Path, drawings: Path) -> None:
    with only_one(mine):
        for action in (
            lambda: Learner(mine).learn(drawings / "food"),
            Learner(mine).undo,
            lambda: Learner(mine).forget("digits"),
        ):
            with pytest.raises(PerdureError, match="another process"):
                action()
        assert Learner(mine).predict(drawings / "digits")  # who only asks need not wait


def test_a_damaged_state_is_named_and_the_way_back_works(mine: Path, drawings: Path) -> None:
    path = mine / "task_02_digits" / "hits.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(PerdureError, match=r"is damaged.*perdure undo .* --to 1"):
        Learner(mine).predict(drawings / "digits")
    Learner(mine).undo(to=1)
    assert {task for *_, task in answers(Learner(mine), drawings / "digits")} == {"animals"}


def test_pictures_in_memory_and_odd_ones(learned: Path, drawings: Path, tmp_path: Path) -> None:
    learner = Learner(learned)
    images = mini.multi_domain("I").tasks[1].test.pixels[:5]
    assert len(learner.predict(images)) == 5
    assert learner.predict(images[:1]) == [{**learner.predict(images)[0], "path": "0"}]
    (tmp_path / "a.png").write_bytes(b"no picture")
    good = next((drawings / "digits").rglob("*.png"))
    rows = learner.predict([tmp_path / "a.png", good, tmp_path / "gone.png"])
    assert ["error" in row for row in rows] == [True, False, True] and rows[1]["path"] == str(good)
    for wrong, said in (
        (torch.zeros(3, 8, 8), "in memory"), (torch.full((1, 3, 8, 8), 7.0), "must lie in 0"),
        (tmp_path / "empty", "no pictures"),
    ):  # fmt: skip
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(PerdureError, match=said):
            learner.predict(wrong)
    for classes in (["cat"], ["cat", "Cat"], ["", "cat"]):
        with pytest.raises(PerdureError, match="two or more classes"):
            learner.predict(good, classes=classes)


def test_where_it_is_computed_is_said_from_case_to_case(
    learned: Path, drawings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", used.append)
    mine = torch.get_num_threads()
    learner = Learner(learned, threads=3, gradient_checkpointing=False, evaluation_batch=7)
    learner.predict(drawings / "digits")
    assert (
        3 in used
        and learner.config["settings"]["evaluation_batch"] == 7 == learner.loaded().method.clip.evaluation_batch
    )
    assert torch.get_num_threads() == mine and Learner(learned).config["settings"]["evaluation_batch"] == 256


def test_who_learns_nothing_or_all_at_once_is_refused(tmp_path: Path, drawings: Path) -> None:
    for method, said in (("zero_shot", "learns nothing"), ("joint", "learns all tasks at once")):
        with pytest.raises(PerdureError, match=said):
            Learner(tmp_path / "HOME", method=method).learn(drawings / "digits")
    assert not (tmp_path / "HOME").exists()


def test_images_that_are_gone_are_asked_for_in_vain(tmp_path: Path, drawings: Path) -> None:
    values = {
        "features": 32,
        "choose": "fixed",
        "lam": 0.1,
        "temperature": 8,
        "weight": 0.5,
        "on": "drifting",
        "reencode": True,
    }
    learner = opened(tmp_path / "HOME", drawings, method="ridge", **values)
    learner.learn(drawings / "animals")
    with pytest.raises(PerdureError, match="images of animals are not at hand"):
        learner.learn(drawings / "digits")
    now = learner.current()
    with pytest.raises(PerdureError, match="training images of animals, which are not at hand"):
        now.method.context.images("animals", torch.tensor([0]))


def test_a_probe_that_has_changed_is_not_compared() -> None:
    before, after = {"probe": torch.ones(4, dtype=torch.uint8)}, {"probe": torch.ones(5, dtype=torch.uint8)}
    (row,) = compared(["probe"], before, after, {})
    assert row.after == 100 and row.images == 5 and row.before is None and row.change is None


@pytest.mark.slow
def test_a_table_is_learned_as_a_folder_is(tmp_path: Path, drawings: Path) -> None:
    rows = [(p, p.parent.name) for p in sorted((drawings / "digits").rglob("*.png"))]
    (tmp_path / "shown.csv").write_text("\n".join(["picture,what", *(f"{p},{label}" for p, label in rows)]))
    given = Pictures(str(tmp_path / "shown.csv"), image_key="picture", label_key="what")
    (outcome,) = opened(tmp_path / "HOME", drawings).learn(given, name="numbers")
    (folder,) = opened(tmp_path / "other", drawings).learn(drawings / "digits")
    assert outcome.task == "numbers" and outcome.accepted
    assert [row.after for row in outcome.rows] == [row.after for row in folder.rows]
    with pytest.raises(PerdureError, match="There is no file"):
        Learner(tmp_path / "HOME").learn(tmp_path / "gone.csv")
