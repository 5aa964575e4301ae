"""MTIL and X-TAIL on small trees in the data sets' real formats."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import trees
from scipy.io import loadmat, savemat
from torchvision.datasets import CIFAR100, Flowers102
from transformers import CLIPConfig, CLIPModel
from typer.testing import CliRunner

import perdure
from perdure.benchmarks import STREAMS, mini, mtil
from perdure.cli import app
from perdure.core.errors import DamagedFile, PerdureError


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("data")
    for build in trees.BUILDERS.values():
        build(base)
    return base


@pytest.fixture
def base(grown: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def meta(self: CIFAR100) -> None:
        self.classes = [f"thing_{k}" for k in range(100)]

    for kind in (CIFAR100, Flowers102):  # whose checksums are those of the real archives
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR100, "_load_meta", meta)
    monkeypatch.setenv("PERDURE_DATA", str(grown))
    return grown


def test_eleven_data_sets_in_two_orders(base: Path) -> None:
    one, two = mtil.mtil("I"), mtil.mtil("II")
    assert [t.name for t in one.tasks] == mtil.facts()["orders"]["I"] and len(one.tasks) == 11
    assert [t.name for t in two.tasks] == mtil.facts()["orders"]["II"] and two.digest != one.digest
    assert [t.index for t in two.tasks] == list(range(11))
    assert (one.labels, one.task_id, one.model) == ("task", "known", "openai/clip-vit-base-patch16")
    by_name = {t.name: t for t in one.tasks}
    assert len(by_name["Aircraft"].train) == 12 and len(by_name["Aircraft"].test) == 8  # val unused
    assert len(by_name["OxfordPet"].train) == 9 and len(by_name["Flowers"].test) == 102
    assert by_name["Caltech101"].classes[0].name == "off-center face" and len(by_name["Caltech101"].classes) == 101
    assert by_name["DTD"].classes[0].templates[0] == "a photo of a {} texture."
    assert by_name["Food"].classes[1].name == "baby back ribs"
    assert by_name["MNIST"].train.pixels[:2].shape == (2, 3, 28, 28)
    for task in one.tasks:
        assert set(task.train.labels.tolist()) == set(range(len(task.classes)))
        assert len(task.test) and int(task.test.labels.max()) < len(task.classes)


def test_x_tail_is_ten_of_them_few_shot_and_hidden(base: Path) -> None:
    stream = STREAMS["x-tail"].value()
    names = [t.name for t in stream.tasks]
    assert names == sorted(names, key=str.lower) and len(names) == 10
    assert "CIFAR100" not in names
    assert (stream.labels, stream.task_id) == ("all", "hidden") and stream.defaults["all"]["shots"] == 16


def test_a_random_split_does_not_hang_on_the_order_of_files(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: mtil.mark(name, base) for name in ("SUN397", "EuroSAT", "Caltech101")}
    listing, walk = os.listdir, Path.rglob
    monkeypatch.setattr(os, "listdir", lambda *a: random.Random(1).sample(found := listing(*a), len(found)))
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(walk(self, pattern))))
    mtil.load.cache_clear()
    mtil.mark.cache_clear()
    assert {name: mtil.mark(name, base) for name in before} == before
    task = mtil.load("SUN397", base)
    assert len(task.train) == 21 and len(task.test) == 6  # int(0.8 · 27)
    sides = [set(side.pixels.paths) for side in (task.train, task.test)]
    assert not sides[0] & sides[1]


def test_the_published_rule_is_the_first_four_fifths_by_seed_42() -> None:
    names = [f"{k:02d}" for k in range(10)]
    pixels = torch.arange(10).view(10, 1, 1, 1).expand(10, 3, 1, 1).to(torch.uint8)
    one, two = mtil.split((pixels[torch.arange(9, -1, -1)], list(range(9, -1, -1)), names[::-1]))
    drawn = torch.randperm(10, generator=torch.Generator().manual_seed(42)).tolist()
    assert sorted(one[1]) == sorted(drawn[:8]) and sorted(two[1]) == sorted(drawn[8:])
    assert one[0][:, 0, 0, 0].tolist() == one[1] and one[2] == [names[k] for k in one[1]]


@pytest.mark.parametrize("name", sorted(trees.BUILDERS))
def test_what_is_missing_says_where_and_how(name: str, tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match=f"{name} is not at .*How to get it") as raised:
        mtil.load(name, tmp_path)
    assert str(tmp_path / mtil.SETS[name].home) in str(raised.value) and not list(tmp_path.iterdir())


def test_a_stream_says_how_many_are_missing_and_damaged_lists_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path))
    trees.dtd(tmp_path)
    with pytest.raises(PerdureError, match="9 more of its 11 data sets are missing"):
        mtil.mtil("I")
    trees.aircraft(tmp_path)
    listed = tmp_path / "fgvc-aircraft-2013b" / "data" / "images_variant_train.txt"
    listed.write_text(listed.read_text().replace("Spitfire", "Spitfir"))
    with pytest.raises(DamagedFile, match="lists of Aircraft"):
        mtil.load("Aircraft", tmp_path)
    trees.flowers(tmp_path)
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    place = tmp_path / "flowers-102" / "imagelabels.mat"
    savemat(place, {"labels": loadmat(place)["labels"] + 1})  # off by one
    with pytest.raises(DamagedFile, match="labels 1 … 102"):
        mtil.load("Flowers", tmp_path)


def test_the_commands_say_what_is_there(base: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["data", "check", "--root", str(base), "--read"])
    assert found.exit_code == 0 and "DTD: found, 3 classes, 9 training and 6 test images; split" in found.output
    trees.dtd(tmp_path)
    next((tmp_path / "dtd" / "dtd" / "images" / "banded").glob("banded_tr*.jpg")).write_bytes(b"no picture")
    lists = CliRunner().invoke(app, ["data", "check", "--root", str(tmp_path)])
    assert lists.exit_code == 1 and "Food: missing" in lists.output and "perdure data fetch Food" in lists.output
    whole = CliRunner().invoke(app, ["data", "check", "--root", str(tmp_path), "--read"])
    assert "is no image that can be read" in whole.output
    own = CliRunner().invoke(app, ["data", "check", str(tmp_path / "dtd" / "dtd" / "images")])
    assert own.exit_code == 1 and "1 pictures cannot be read" in own.output


def of_real_context(folder: Path) -> str:
    """A random CLIP of the small world's shape that reads prompts as long as the real one does."""
    shutil.copytree(mini.MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = CLIPConfig.from_pretrained(folder)
    config.text_config.max_position_embeddings = 77
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ridge", "finetune"])
def test_a_miniature_mtil_is_learned(method: str, base: Path, tmp_path: Path) -> None:
    taught = {"iterations": 1, "warmup": 0, "batch_size": 4, "workers": 2, "tasks": 2}
    values: dict[str, Any] = {"features": 32} if method == "ridge" else taught
    metrics = perdure.run(
        method, "mtil", tmp_path / "run", model=of_real_context(tmp_path / "clip"), images=6, precision="fp32", **values
    )
    assert metrics["finished"] and metrics["tasks"] == mtil.facts()["orders"]["I"][: values.get("tasks")]
