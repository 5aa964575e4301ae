"""MTIL and X-TAIL on small trees in the data sets' real formats."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
import trees
from scipy.io import loadmat, savemat

from perdure.benchmarks import STREAMS, mtil
from perdure.core.errors import DamagedFile, PerdureError


def test_eleven_data_sets_in_two_orders(mtil_data: Path) -> None:
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


def test_x_tail_is_ten_of_them_few_shot_and_hidden(mtil_data: Path) -> None:
    stream = STREAMS["x-tail"].value()
    names = [t.name for t in stream.tasks]
    assert names == sorted(names, key=str.lower) and len(names) == 10
    assert "CIFAR100" not in names
    assert (stream.labels, stream.task_id) == ("all", "hidden") and stream.defaults["all"]["shots"] == 16


def test_a_random_split_does_not_hang_on_the_order_of_files(mtil_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: mtil.mark(name, mtil_data) for name in ("SUN397", "EuroSAT", "Caltech101")}
    listing, walk = os.listdir, Path.rglob
    monkeypatch.setattr(os, "listdir", lambda *a: random.Random(1).sample(found := listing(*a), len(found)))
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(walk(self, pattern))))
    mtil.load.cache_clear()
    mtil.mark.cache_clear()
    assert {name: mtil.mark(name, mtil_data) for name in before} == before
    task = mtil.load("SUN397", mtil_data)
    assert len(task.train) == 21 and len(task.test) == 6  # int(0.8 · 27)
    sides = [set(side.pixels.paths) for side in (task.train, task.test)]
    assert not sides[0] & sides[1]


def test_a_split_that_is_kept_stays_whatever_comes_beside_it(tmp_path: Path) -> None:
    def again() -> str:
        mtil.load.cache_clear()
        mtil.mark.cache_clear()
        return mtil.mark("EuroSAT", tmp_path)

    trees.BUILDERS["EuroSAT"](tmp_path)
    drawn, home = again(), tmp_path / "eurosat" / "2750" / "Forest"
    path = mtil.keep("EuroSAT", tmp_path)
    assert path == tmp_path / "splits" / "EuroSAT.json" and again() == drawn
    more = home / "Forest_0.jpg"
    more.write_bytes(next(home.iterdir()).read_bytes())
    with pytest.warns(UserWarning, match=r"1 pictures are not in .*EuroSAT\.json and are left out"):
        assert again() == drawn
    text = path.read_text()
    path.unlink()
    assert again() != drawn  # a file more, and others are drawn
    path.write_text(text.replace('"train"', '"x"').replace('"test"', '"train"').replace('"x"', '"test"'))
    with pytest.raises(DamagedFile, match="was changed since it was written"):
        again()
    path.write_text(text)
    lost = tmp_path / mtil.load.__wrapped__("EuroSAT", tmp_path).test.pixels.paths[0]
    lost.unlink()
    with pytest.raises(DamagedFile, match=rf"1 of the pictures .* are not there .*{lost.name} the first"):
        again()
    assert mtil.keep("DTD", tmp_path) is None  # its own lists say it


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
    trees.cifar100(tmp_path)
    place = tmp_path / "flowers-102" / "imagelabels.mat"
    savemat(place, {"labels": loadmat(place)["labels"] + 1})  # off by one
    with trees.own_checksums(tmp_path), pytest.raises(DamagedFile, match="labels 1 … 102"):
        mtil.load("Flowers", tmp_path)
