"""Small trees of MTIL's data sets in their real formats on disk: annotation files, devkits, folder names, tiny pictures.
The tests take them from here too."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR100, Flowers102


def jpeg(path: Path, shade: int, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(shade).integers(0, 40, (size[1], size[0], 3))
    Image.fromarray((noise + shade * 37 % 200).astype(np.uint8)).save(path, quality=90)


def lines(path: Path, content: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in content))


def aircraft(base: Path) -> None:
    data = base / "fgvc-aircraft-2013b" / "data"
    variants = ["707-320", "A300B4", "Spitfire", "Boeing 717"]
    lines(data / "variants.txt", variants)
    number = 34958
    for side, each in (("train", 3), ("val", 2), ("test", 2)):
        listed = []
        for k, variant in enumerate(variants):
            for _ in range(each):
                number += 1
                jpeg(data / "images" / f"{number:07d}.jpg", k)
                listed.append(f"{number:07d} {variant}")
        lines(data / f"images_variant_{side}.txt", listed)


def caltech101(base: Path) -> None:
    home = base / "caltech101"
    (home / "Annotations").mkdir(parents=True)
    for k in range(101):  # of the categories' real names torchvision uses the order alone
        for n in range(1, 9):
            jpeg(home / "101_ObjectCategories" / f"category_{k:03d}" / f"image_{n:04d}.jpg", k, (12, 10))
    jpeg(home / "101_ObjectCategories" / "BACKGROUND_Google" / "image_0001.jpg", 5)


def cifar100(base: Path) -> None:
    home = base / "cifar-100-python"
    home.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for side, count in (("train", 200), ("test", 100)):
        data = draw.integers(0, 255, (count, 3072)).astype(np.uint8)
        (home / side).write_bytes(pickle.dumps({"data": data, "fine_labels": [k % 100 for k in range(count)]}))
    (home / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"thing_{k}" for k in range(100)]}))


def dtd(base: Path) -> None:
    home = base / "dtd" / "dtd"
    for side, each in (("train", 3), ("val", 1), ("test", 2)):
        listed = []
        for k, name in enumerate(("banded", "polka-dotted", "veined")):
            for n in range(each):
                jpeg(home / "images" / name / f"{name}_{side}{n}.jpg", k)
                listed.append(f"{name}/{name}_{side}{n}.jpg")
        lines(home / "labels" / f"{side}1.txt", listed)


def eurosat(base: Path) -> None:
    names = ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
             "Residential", "River", "SeaLake")  # fmt: skip
    for k, name in enumerate(names):
        for n in range(1, 9):
            jpeg(base / "eurosat" / "2750" / name / f"{name}_{n}.jpg", k, (16, 16))


def flowers(base: Path) -> None:
    home, count = base / "flowers-102", 102 * 3
    for number in range(1, count + 1):
        jpeg(home / "jpg" / f"image_{number:05d}.jpg", number % 102, (12, 14))
    savemat(home / "imagelabels.mat", {"labels": np.array([[1 + (n - 1) % 102 for n in range(1, count + 1)]])})
    thirds = [np.arange(102 * k + 1, 102 * (k + 1) + 1)[None] for k in range(3)]
    savemat(home / "setid.mat", {"trnid": thirds[0], "valid": thirds[1], "tstid": thirds[2]})


def food(base: Path) -> None:
    home = base / "food-101"
    for side, first in (("train", 0), ("test", 10)):
        listed = {}
        for k, name in enumerate(("apple_pie", "baby_back_ribs", "waffles")):
            listed[name] = [f"{name}/{100 * k + first + n}" for n in range(3)]
            for one in listed[name]:
                jpeg(home / "images" / f"{one}.jpg", k)
        (home / "meta").mkdir(parents=True, exist_ok=True)
        (home / "meta" / f"{side}.json").write_text(json.dumps(listed))


def mnist(base: Path) -> None:
    home = base / "MNIST" / "raw"
    home.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for side, count in (("train", 40), ("t10k", 20)):
        images = draw.integers(0, 255, (count, 28, 28)).astype(np.uint8)
        labels = np.array([k % 10 for k in range(count)], dtype=np.uint8)
        (home / f"{side}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        (home / f"{side}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


def oxford_pet(base: Path) -> None:
    home = base / "oxford-iiit-pet"
    (home / "annotations" / "trimaps").mkdir(parents=True)
    for side, first in (("trainval", 1), ("test", 5)):
        listed = []
        for k, name in enumerate(("Abyssinian", "american_bulldog", "Bengal")):
            for n in range(first, first + 3):
                jpeg(home / "images" / f"{name}_{n}.jpg", k)
                listed.append(f"{name}_{n} {k + 1} {1 + (name == 'american_bulldog')} {n}")
        lines(home / "annotations" / f"{side}.txt", listed)


def stanford_cars(base: Path) -> None:
    home = base / "stanford_cars"
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"]
    (home / "devkit").mkdir(parents=True)
    savemat(home / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)[None]})
    kinds = [(key, object) for key in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    places = {"train": home / "devkit" / "cars_train_annos.mat", "test": home / "cars_test_annos_withlabels.mat"}
    for side, place in places.items():
        rows = []
        for n in range(9):
            jpeg(home / f"cars_{side}" / f"{n + 1:05d}.jpg", n % 3)
            rows.append((1, 1, 10, 10, n % 3 + 1, f"{n + 1:05d}.jpg"))
        savemat(place, {"annotations": np.array(rows, dtype=kinds)[None]}, do_compression=True)


def sun397(base: Path) -> None:
    home, names = base / "SUN397", ("abbey", "airplane_cabin", "zen_garden")
    lines(home / "ClassName.txt", [f"/{name[0]}/{name}" for name in names])
    for k, name in enumerate(names):
        for n in range(9):
            jpeg(home / name[0] / name / f"sun_{name}{n:03d}.jpg", k)


BUILDERS = {
    "Aircraft": aircraft, "Caltech101": caltech101, "CIFAR100": cifar100, "DTD": dtd, "EuroSAT": eurosat, "Flowers": flowers,
    "Food": food, "MNIST": mnist, "OxfordPet": oxford_pet, "StanfordCars": stanford_cars, "SUN397": sun397,
}  # fmt: skip


def grow(base: Path) -> Path:
    """All eleven under one root."""
    for build in BUILDERS.values():
        build(base)
    return base


@contextlib.contextmanager
def own_checksums(base: Path) -> Iterator[None]:
    """torchvision knows two of the data sets by the checksums of their real archives; here by those of the small files."""

    def md5(*parts: str) -> str:
        return hashlib.md5(base.joinpath(*parts).read_bytes()).hexdigest()

    cifar, flowers = CIFAR100.base_folder, "flowers-102"
    lists = {"label": "imagelabels.mat", "setid": "setid.mat"}
    with (
        mock.patch.object(CIFAR100, "train_list", [["train", md5(cifar, "train")]]),
        mock.patch.object(CIFAR100, "test_list", [["test", md5(cifar, "test")]]),
        mock.patch.object(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5(cifar, "meta")}),
        mock.patch.dict(Flowers102._file_dict, {key: (name, md5(flowers, name)) for key, name in lists.items()}),
    ):
        yield
