"""``perdure data check`` on trees that are whole, partly missing and damaged: every name, and the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
import trees
from typer.testing import CliRunner, Result

from perdure.benchmarks import mtil
from perdure.cli import app

NAMES = sorted(mtil.facts()["datasets"])
LISTS = {  # what says which picture is which
    "Aircraft": ["data/variants.txt", "data/images_variant_train.txt", "data/images_variant_test.txt"],
    "CIFAR100": ["train", "test", "meta"],
    "DTD": ["labels/train1.txt", "labels/test1.txt"],
    "Flowers": ["imagelabels.mat", "setid.mat"],
    "Food": ["meta/train.json", "meta/test.json"],
    "MNIST": [f"{side}-{kind}-ubyte" for side in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")],
    "OxfordPet": ["annotations/trainval.txt", "annotations/test.txt"],
    "StanfordCars": ["devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"],
    "SUN397": ["ClassName.txt"],
}


def check(base: Path, *words: str) -> Result:
    mtil.load.cache_clear()  # a command's process has none
    mtil.mark.cache_clear()
    return CliRunner().invoke(app, ["data", "check", "--root", str(base), *words], catch_exceptions=False)


def states(found: Result) -> dict[str, str]:
    """Each data set's line, by its name."""
    return dict(line.split(": ", 1) for line in found.output.splitlines() if line.split(": ")[0] in trees.BUILDERS)


def test_the_whole_is_found_under_the_published_names(mtil_data: Path) -> None:
    found = check(mtil_data, "--read")
    assert found.exit_code == 0 and sorted(states(found)) == NAMES == sorted(mtil.facts()["orders"]["I"])
    assert all(line.startswith("found, ") for line in states(found).values())
    assert "DTD: found, 3 classes, 9 training and 6 test images; split" in found.output


def test_what_is_missing_is_named_with_how_to_get_it(tmp_path: Path) -> None:
    there = ("DTD", "SUN397", "StanfordCars")
    for name in there:
        trees.BUILDERS[name](tmp_path)
    found = check(tmp_path)
    assert found.exit_code == 1 and sorted(states(found)) == NAMES
    for name, line in states(found).items():
        assert line.startswith(
            "found, " if name in there else f"missing. {name} is not at {tmp_path / mtil.SETS[name].home}"
        )
        assert name in there or f"perdure data fetch {name}" in line
    nowhere = check(tmp_path / "nowhere")
    assert nowhere.exit_code == 1 and all(line.startswith("missing.") for line in states(nowhere).values())
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("harm", ["gone", "empty", "cut", "other"])
@pytest.mark.parametrize("name", sorted(LISTS))
def test_lists_that_are_damaged_are_said_and_stop_nothing(name: str, harm: str, tmp_path: Path) -> None:
    home = tmp_path / mtil.SETS[name].home
    for one in sorted({name, "CIFAR100", "Flowers"}):  # the two that have checksums, those of the real ones
        trees.BUILDERS[one](tmp_path)
    for place in LISTS[name]:
        (path,) = [p for p in home.rglob("*") if p.as_posix().endswith(f"/{place}")]
        whole = path.read_bytes()
        with trees.own_checksums(tmp_path):
            assert states(check(tmp_path))[name].startswith("found, ")
            if harm == "gone":
                path.unlink()
            else:
                path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "other": b"no list\n"}[harm])
            found = check(tmp_path)
        assert found.exit_code == 1 and states(found)[name].startswith("not as it should be. "), place
        assert sorted(states(found)) == NAMES
        path.write_bytes(whole)


def test_a_data_set_of_other_checksums_is_refused(tmp_path: Path) -> None:
    for name in ("CIFAR100", "Flowers"):
        trees.BUILDERS[name](tmp_path)
    found = states(check(tmp_path))
    assert all(found[name].startswith("not as it should be. ") for name in ("CIFAR100", "Flowers"))


def test_a_picture_that_is_none_is_found_by_reading(tmp_path: Path) -> None:
    trees.dtd(tmp_path)
    next((tmp_path / "dtd" / "dtd" / "images" / "banded").glob("banded_tr*.jpg")).write_bytes(b"no picture")
    assert states(check(tmp_path))["DTD"].startswith("found, ")
    whole = check(tmp_path, "--read")
    assert whole.exit_code == 1 and "is no image that can be read" in whole.output
    own = CliRunner().invoke(app, ["data", "check", str(tmp_path / "dtd" / "dtd" / "images")])
    assert own.exit_code == 1 and "1 pictures cannot be read" in own.output
