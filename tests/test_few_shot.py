"""Few-shot class-incremental streams: published lists in their usual places, cuts of any stream, figures of base and new
classes; base-to-new streams; input that is wrong."""

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import perdure
from perdure.benchmarks import STREAMS, class_incremental, few_shot, mini
from perdure.core.errors import DamagedFile, PerdureError
from perdure.data import shots
from perdure.data.files import Files
from perdure.data.task import Class, Images, Stream, Task
from perdure.engine.evaluate import Protocol, summarise
from perdure.engine.settings import Settings
from perdure.ops import metrics
from perdure.report.entries import collect
from perdure.report.tables import metrics as table_of

BIRDS = [f"{k:03d}.Bird_{k}" for k in range(1, 201)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path))
    for load in (class_incremental.cub200, class_incremental.cifar100, few_shot.mini_imagenet):
        load.cache_clear()
    return tmp_path


def pictures(folder: Path, names: list[str]) -> None:
    """One small picture under many names."""
    picture = io.BytesIO()
    Image.new("RGB", (12, 20), (40, 90, 140)).save(picture, "PNG")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture.getvalue())


def lines(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def cub(home: Path) -> Path:
    """Ten images a bird, the last of them for the test; lists of five: numbers 2, 4, 6, 8, 0 of each new bird."""
    base, names = home / "CUB_200_2011", [f"{bird}/{bird[4:]}_{n:04d}_{n}.png" for bird in BIRDS for n in range(10)]
    pictures(base / "images", names)
    lines(base / "classes.txt", [f"{k} {bird}" for k, bird in enumerate(BIRDS, 1)])
    lines(base / "images.txt", [f"{k} {name}" for k, name in enumerate(names, 1)])
    lines(base / "image_class_labels.txt", [f"{k} {(k - 1) // 10 + 1}" for k in range(1, len(names) + 1)])
    lines(base / "train_test_split.txt", [f"{k} {int(k % 10 != 0)}" for k in range(1, len(names) + 1)])
    for session in range(2, 12):
        own = BIRDS[100 + 10 * (session - 2) :][:10]
        listed = [f"CUB_200_2011/images/{bird}/{bird[4:]}_{n:04d}_{n}.png" for bird in own for n in (2, 4, 6, 8, 0)]
        lines(home / "index_list" / "cub200" / f"session_{session}.txt", listed)
    return home / "index_list" / "cub200"


def test_birds_are_those_that_the_lists_name(home: Path) -> None:
    lists = cub(home)
    stream = STREAMS["cub200-fscil"].value()
    assert [(len(t.classes), len(t.train), len(t.test)) for t in stream.tasks] == [(100, 900, 100)] + [
        (10, 50, 10)
    ] * 10
    fourth = stream.tasks[3]
    assert fourth.classes[0].name == "Bird 121" and fourth.train.labels.bincount().tolist() == [5] * 10
    assert [Path(p).name for p in fourth.train.pixels.paths[:5]] == [
        f"Bird_121_000{n}_{n}.png" for n in (2, 4, 6, 8, 0)
    ]
    assert (stream.labels, stream.task_id, stream.base_new) == ("seen", "hidden", "sessions")
    rows = (lists / "session_4.txt").read_text().replace("Bird_121_0008_8", "Bird_121_0003_3")
    (lists / "session_4.txt").write_text(rows)
    assert STREAMS["cub200-fscil"].value().digest != stream.digest  # other shots are another split


def test_lists_that_are_missing_overlap_or_are_damaged(home: Path) -> None:
    lists = cub(home)
    good = {k: (lists / f"session_{k}.txt").read_text() for k in (3, 4)}

    def refused(kind: type[PerdureError], said: str, session: int, text: str) -> None:
        (lists / f"session_{session}.txt").write_text(text)
        with pytest.raises(kind, match=said):
            STREAMS["cub200-fscil"].value()
        (lists / f"session_{session}.txt").write_text(good[session])

    refused(PerdureError, r"Sessions overlap: .*session_4.txt lists images of 'Bird 111'", 4, good[4] + good[3])
    base = good[3].replace(BIRDS[110], BIRDS[6]).replace("Bird_111", "Bird_7")
    refused(PerdureError, r"Sessions overlap: .*session_3.txt lists images of 'Bird 7'", 3, base)
    short = good[3].split("\n", 1)[1]
    refused(DamagedFile, r"session_3.txt lists 4 images of 'Bird 111', not 5", 3, short)
    refused(DamagedFile, "Bird_111_0004_4.png' twice", 3, good[3].replace("0002_2", "0004_4"))
    refused(DamagedFile, "'Bird_111_0009_9.png', which is no training image", 3, good[3].replace("0002_2", "0009_9"))
    (lists / "session_9.txt").unlink()
    with pytest.raises(PerdureError, match=r"session_9.txt is missing: looked for it in .*cub200"):
        STREAMS["cub200-fscil"].value()
    beside = home / "CUB_200_2011" / "index_list"
    shutil.move(lists, beside)
    with pytest.raises(PerdureError, match="session_9.txt is missing"):  # found beside the data, too
        STREAMS["cub200-fscil"].value()
    shutil.rmtree(beside)
    with pytest.raises(
        PerdureError, match=r"looked for session_2.txt in .*index_list/cub200 and in .*CUB_200_2011/index_list"
    ):
        STREAMS["cub200-fscil"].value()


@pytest.mark.parametrize("place", ["miniimagenet/split", "index_list/mini_imagenet"])
def test_mini_imagenet_from_its_tables(place: str, home: Path) -> None:
    with pytest.raises(
        PerdureError, match=r"looked for .*miniimagenet/split/train.csv or .*index_list/mini_imagenet/train.csv"
    ):
        STREAMS["miniimagenet-fscil"].value()
    wnids = [f"n{k:08d}" for k in range(1, 101)]
    wnids[0] = "n01532829"  # out of order in the tables, and one that has a name
    for side, numbers in (("train", range(6)), ("test", range(6, 8))):
        lines(
            home / place / f"{side}.csv",
            ["filename,label"] + [f"{w}0000000{n}.jpg,{w}" for w in wnids for n in numbers],
        )
    with pytest.raises(PerdureError, match=r"looked for .*miniimagenet/images"):
        STREAMS["miniimagenet-fscil"].value()
    pictures(home / "miniimagenet" / "images", [f"{w}0000000{n}.jpg" for w in wnids for n in range(8)])
    wnids.sort()
    for session in range(2, 10):
        own = wnids[60 + 5 * (session - 2) :][:5]
        listed = [f"MINI-ImageNet/train/{w}/{w}0000000{n}.jpg" for w in own for n in (5, 3, 1, 0, 2)]
        lines(home / "index_list" / "mini_imagenet" / f"session_{session}.txt", listed)
    stream = STREAMS["miniimagenet-fscil"].value()
    assert [(len(t.classes), len(t.train), len(t.test)) for t in stream.tasks] == [(60, 360, 120)] + [(5, 25, 10)] * 8
    assert stream.tasks[-1].classes[-1].name == "house finch" and stream.tasks[0].classes[0].name == "n00000002"
    assert [Path(p).name[9:] for p in stream.tasks[1].train.pixels.paths[:5]] == [
        f"0000000{n}.jpg" for n in (5, 3, 1, 0, 2)
    ]


def test_cifar_by_numbers_into_its_training_set(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    base = home / "cifar-100-python"
    base.mkdir()
    labels = {"train": [k % 100 for k in range(700)], "test": [k % 100 for k in range(100)]}
    for side, own in labels.items():
        data = np.arange(len(own))[:, None].repeat(3072, 1).astype(np.uint8)
        (base / side).write_bytes(pickle.dumps({"data": data, "fine_labels": own}))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"thing_{k}" for k in range(100)]}))
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for session in range(2, 10):
        own = [60 + 5 * (session - 2) + k for k in range(5)]
        rows = [str(k + 100 * n) for k in own for n in (6, 1, 0, 3, 2)]
        lines(home / "index_list" / "cifar100" / f"session_{session}.txt", rows)
    stream = STREAMS["cifar100-fscil"].value()
    assert [(len(t.classes), len(t.train), len(t.test)) for t in stream.tasks] == [(60, 420, 60)] + [(5, 25, 5)] * 8
    second = stream.tasks[1].train
    assert second.pixels[:5, 0, 0, 0].tolist() == [(60 + 100 * n) % 256 for n in (6, 1, 0, 3, 2)]
    assert second.labels[:5].tolist() == [0] * 5 and stream.tasks[1].classes[0].name == "thing 60"


# ---- streams of the small world


def sizes(stream: Stream) -> list[tuple[int, list[int]]]:
    return [(len(t.classes), sorted(set(t.train.labels.bincount().tolist()))) for t in stream.tasks]


def test_mini_fscil_has_thirty_classes_and_then_six_sessions_of_five() -> None:
    stream, whole = STREAMS["mini-fscil"].value(), STREAMS["mini-cil"].value()
    assert [len(t.classes) for t in stream.tasks] == [30, 5, 5, 5, 5, 5, 5] and sizes(stream)[1:] == [(5, [5])] * 6
    assert [c for t in stream.tasks for c in t.classes] == [c for t in whole.tasks for c in t.classes]
    assert len(stream.tasks[0].train) == sum(len(t.train) for t in whole.tasks[:5])
    assert sum(len(t.test) for t in stream.tasks) == sum(len(t.test) for t in whole.tasks)
    for seed in (0, 9):  # the run's seed has no say in which they are
        assert Settings(shots_from=2).select(stream, seed).tasks[3].train is stream.tasks[3].train
    with pytest.raises(
        PerdureError, match="class_order=3: which images the later sessions of mini-fscil have is fixed"
    ):
        Settings(class_order="3").select(stream, 0)


def test_any_class_incremental_stream_can_be_cut_so() -> None:
    whole = STREAMS["mini-cil"].value()
    asked = Settings(base=40, increment=10, shots=3, shots_from=2)
    stream = asked.select(whole, 0)
    assert (
        sizes(stream)[1:] == [(10, [3])] * 2 and len(stream.tasks[0].train) > 40 * 15 and stream.base_new == "sessions"
    )
    other = [asked.select(whole, 1), Settings(**{**vars(asked), "shots_seed": 7}).select(whole, 1)]
    again = Settings(**{**vars(asked), "shots_seed": 7}).select(whole, 2)
    pixels: list[Tensor] = [s.tasks[1].train.pixels for s in (stream, *other, again)]
    assert torch.equal(pixels[2], pixels[3]) and not any(torch.equal(pixels[2], p) for p in pixels[:2])
    assert not torch.equal(pixels[0], pixels[1])
    assert len({stream.digest, whole.digest, Settings(base=40, increment=10).select(whole, 0).digest}) == 3
    assert sizes(Settings(shots=3).select(whole, 0)) == [(6, [3])] * 10
    third = Settings(shots=2, shots_from=3).select(whole, 0)
    assert sizes(third)[2:] == [(6, [2])] * 8 and all(n[0] > 2 for _, n in sizes(third)[:2])
    wrong: tuple[tuple[dict[str, Any], str, str], ...] = (
        ({"base": 40}, "mini-cil", "give both"),
        ({"base": 40, "increment": 7}, "mini-cil", "60 classes cannot be cut into 40 and then 7"),
        ({"base": 40, "increment": 10}, "mini-mtil", "its tasks are domains"),
    )
    for values, stream_name, said in wrong:
        with pytest.raises(PerdureError, match=said):
            Settings(**values).select(STREAMS[stream_name].value(), 0)


def test_images_can_be_chosen_in_the_place_of_a_draw(tmp_path: Path) -> None:
    whole = STREAMS["mini-cil"].value()
    later = [one.name for task in whole.tasks[1:] for one in task.classes]
    lists = {name: [4, 1] for name in later}
    path = tmp_path / "shots.json"
    path.write_text(json.dumps(lists))
    asked = Settings(shots_file=str(path), shots_from=2)
    stream = asked.select(whole, 0)
    assert sizes(stream)[1:] == [(6, [2])] * 9 and len(stream.tasks[0].train) == len(whole.tasks[0].train)
    task, full = stream.tasks[3], whole.tasks[3]
    for k in range(6):
        own = full.train.pixels[full.train.labels == k]
        assert torch.equal(task.train.pixels[task.train.labels == k], own[[1, 4]])
    kept = asked.settled(whole)
    path.unlink()  # what it lists is kept
    assert kept.select(whole, 1).digest == stream.digest != whole.digest and stream.base_new == "sessions"
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({later[0]: []}, f"lists no image of '{later[0]}'"),
        ({later[1]: [0, 10**4]}, f"lists 10000 of '{later[1]}', which has the training images numbers 0 to"),
        ({later[1]: [3, 3]}, f"lists an image of '{later[1]}' twice"),
        ({"a class": [1]}, "There is no class from task 2 on 'a class'"),
        ({later[0]: "12"}, "must hold a JSON object"),
    )
    for change, said in wrong:
        with pytest.raises(PerdureError, match=said):
            Settings(shots_file=json.dumps({**lists, **change}), shots_from=2).select(whole, 0)
    for values, said in (
        ({"shots_file": str(path)}, "is not there"),
        ({"shots_file": "{half"}, "is no JSON object"),
        ({"shots_file": json.dumps(lists), "shots": 2, "shots_from": 2}, "say the same twice"),
    ):
        with pytest.raises(PerdureError, match=said):
            Settings(**values).select(whole, 0)
    with pytest.raises(PerdureError, match="no class-incremental stream"):
        Settings(shots_file=json.dumps(lists)).select(STREAMS["mini-mtil"].value(), 0)


def test_chosen_images_are_named_by_their_files(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{folder}/{k}.png") for folder in "ab" for k in range(3)]
    images = Images(Files(tuple(map(Path, names)), 32), torch.tensor([0, 0, 0, 1, 1, 1]))
    task = Task("one", (Class("a", ("{}",)), Class("b", ("{}",))), images, images)
    assert shots.picked(task, {"a": ["2.png", 0], "b": ["1.png"]}).tolist() == [0, 2, 4]


def test_half_of_a_domain_is_taught_and_the_other_half_asked_for() -> None:
    stream = STREAMS["mini-base-to-new-tools"].value()
    tools = next(t for t in STREAMS["mini-mtil"].value().tasks if t.name == "tools")
    (base,), probe = stream.tasks, stream.probe
    assert probe is not None and base.classes + probe.classes == tools.classes
    assert 0 <= len(base.classes) - len(probe.classes) <= 1 and len(base.test) + len(probe.test) == len(tools.test)
    assert stream.base_new == "probe" and stream.defaults["all"]["shots"] == 16
    mini_names = {f"mini-base-to-new-{t.name}" for t in STREAMS["mini-mtil"].value().tasks}
    assert mini_names == {f"mini-base-to-new-{name}" for name in mini.DOMAINS} <= {e.name for e in STREAMS}


# ---- figures


def test_figures_by_hand() -> None:
    assert metrics.performance_drop([80, 70, 62.5]) == 17.5
    base, new = metrics.base_and_new([60, 50, 20], [10, 1, 2])
    assert base == 60 and new == pytest.approx((50 + 2 * 20) / 3)
    assert metrics.base_and_new([60], [10])[1] is None
    assert metrics.harmonic_mean(60, 30) == 40 and metrics.harmonic_mean(0, 0) == 0
    assert metrics.harmonic_mean([60, 0], [30, 50]).tolist() == [40, 0]
    assert metrics.performance_drop(np.array([[80, 60], [50, 55]])).tolist() == [20, -5]


def hits(*right: int, of: int) -> Tensor:
    return (torch.arange(of)[None] < torch.tensor(right)[:, None]).to(torch.uint8)


def rows_of(stream: Stream, right: list[list[float]], probe: list[float]) -> list[dict[str, Tensor]]:
    counts = {t.name: len(t.test) for t in stream.tasks}
    rows = []
    for shares, own in zip(right, probe, strict=True):
        wanted = dict(zip(counts, shares, strict=True)) | ({"probe": own} if stream.probe else {})
        count = counts | ({"probe": len(stream.probe.test)} if stream.probe else {})
        rows.append({name: hits(round(share * count[name]), of=count[name])[0] for name, share in wanted.items()})
    return rows


def test_a_run_says_how_base_and_new_classes_fared() -> None:
    stream = Settings(base=40, increment=10, shots=2, shots_from=2, images=50).select(STREAMS["mini-cil"].value(), 0)
    rows = rows_of(stream, [[0, 0, 0], [1, 0, 0], [0.8, 0.6, 0], [0.7, 0.5, 0.3]], [0.5] * 4)
    found = summarise(stream, rows, Protocol("seen", "hidden"), transfers=True)
    assert [len(t.test) for t in stream.tasks] == [50, 50, 50]
    assert found["incremental"] == pytest.approx([100, 70, 50]) and found["performance_drop"] == pytest.approx(50)
    assert (found["base"], found["new"]) == pytest.approx((70, 40))
    assert found["harmonic_mean"] == pytest.approx(2 * 70 * 40 / 110)
    for name in ("performance_drop", "base", "new", "harmonic_mean"):
        low, high = found["intervals"][name]
        assert low < found[name] < high, name
    unfinished = summarise(stream, rows[:2], Protocol("seen", "hidden"), transfers=True)
    assert unfinished["base"] is None and unfinished["performance_drop"] is None
    plain = summarise(STREAMS["mini-cil"].value().shortened(3, 50), rows, Protocol("seen", "hidden"), transfers=True)
    assert "base" not in plain and "performance_drop" not in plain


def test_base_to_new_is_told_by_the_probe() -> None:
    stream = STREAMS["mini-base-to-new-food"].value().shortened(0, 40)
    rows = rows_of(stream, [[0.5], [0.9]], [0.6, 0.45])
    found = summarise(stream, rows, Protocol("task", "known"), transfers=True)
    assert (found["base"], found["new"]) == pytest.approx((90, 45)) and found["harmonic_mean"] == pytest.approx(60)
    assert "performance_drop" not in found or found["performance_drop"] is None


@pytest.mark.slow
def test_figures_reach_the_metrics_the_screen_and_the_report(tmp_path: Path) -> None:
    asked: dict[str, Any] = dict(tasks=3, images=12, iterations=2, warmup=0, batch_size=4, precision="fp32")
    runs = [perdure.run("finetune", "mini-fscil", tmp_path / str(seed), seed=seed, **asked) for seed in (0, 1)]
    steps = runs[0]["incremental"]
    assert runs[0]["performance_drop"] == pytest.approx(steps[0] - steps[-1]) and runs[0]["config"]["shots_from"] == 2
    columns, (cells, _) = table_of(collect(runs))
    shown = {m.name: c.value for m, c in zip(columns, cells, strict=True)}
    assert {n: shown[n] for n in ("performance_drop", "base", "new", "harmonic_mean")} == {
        n: runs[0][n] for n in ("performance_drop", "base", "new", "harmonic_mean")
    }
    from perdure.launch.runs import over_seeds
    from perdure.view import figures

    mean = over_seeds(runs)
    assert mean["base"] == pytest.approx((runs[0]["base"] + runs[1]["base"]) / 2)
    assert "Harmonic mean" in [c.header for c in figures([mean], ["harmonic_mean"], True).columns]
