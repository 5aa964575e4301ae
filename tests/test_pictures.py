"""Pictures in files: evaluated as a checkpoint's image processor has them, cropped whole for training, read ahead in order."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from albums import pack
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv
from transformers import CLIPImageProcessor, Siglip2ImageProcessor, SiglipImageProcessor
from transformers.image_utils import load_image

from perdure.benchmarks import mini
from perdure.core.errors import DamagedFile
from perdure.core.pixels import Fit, resized
from perdure.data.files import Files, Joined, all_cropped, crops, opened
from perdure.data.loader import ahead
from perdure.data.places import index
from perdure.data.task import Batch, Class, Images, Task
from perdure.data.transforms import crop_box, crop_shares, some_numbers
from perdure.training.fit import drawn
from perdure.training.schedule import Schedule


def picture(wide: int, tall: int, seed: int = 0) -> Image.Image:
    """Smooth colours and some noise, so that a shift by a pixel shows."""
    y, x = np.mgrid[0:tall, 0:wide]
    waves = [128 + 100 * np.sin(x / (5 + k) + k) * np.cos(y / (7 - k)) for k in range(3)]
    noise = np.random.default_rng(seed).normal(0, 12, (tall, wide, 3))
    return Image.fromarray((np.stack(waves, 2) + noise).clip(0, 255).astype(np.uint8))


def written(folder: Path, kind: str) -> Path:
    """A picture of a kind that people have."""
    wide, tall = {"tall": (40, 131), "wide": (151, 37), "tiny": (5, 7)}.get(kind, (90, 61))
    drawn_, path, extra = picture(wide, tall), folder / f"{kind}.png", dict[str, Any]()
    if kind == "grey":
        drawn_ = drawn_.convert("L")
    elif kind == "16-bit":
        drawn_ = Image.fromarray(np.asarray(drawn_.convert("L")).astype(np.uint16) * 257)
    elif kind == "palette":
        drawn_ = drawn_.quantize(64)
    elif kind == "alpha":
        drawn_.putalpha(Image.linear_gradient("L").resize((wide, tall)))
    elif kind == "cmyk":
        drawn_, path, extra = drawn_.convert("CMYK"), folder / "cmyk.jpg", {"quality": 95}
    elif kind == "rotated":
        path, about = folder / "rotated.jpg", Image.Exif()
        about[0x0112] = 6  # taken with the camera on its side
        extra = {"exif": about, "quality": 95}
    drawn_.save(path, **extra)
    return path


KINDS = ("plain", "tall", "wide", "tiny", "grey", "palette", "alpha", "cmyk", "rotated")


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_the_checkpoint_s_image_processor(kind: str, tmp_path: Path) -> None:
    path, side = written(tmp_path, kind), 24
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    theirs = processor(load_image(str(path)), do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values[0]
    mine = Files((path,), side)[:][0].float()
    assert mine.shape == theirs.shape == (3, side, side)
    assert (mine - theirs).abs().max() <= 2  # they resample tensors, we do as Pillow does


FITS: dict[str, tuple[Fit, Any]] = {
    "siglip": (Fit(False, "bicubic"), SiglipImageProcessor(size={"height": 24, "width": 24}, resample=3)),
    "siglip 2": (Fit(False, "bilinear"), SiglipImageProcessor(size={"height": 24, "width": 24}, resample=2)),
    "more than is cut": (
        Fit(True, "bilinear", 40),
        CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 24, "width": 24}, resample=2),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FITS)
def test_evaluation_is_every_processor_s_own(name: str, kind: str, tmp_path: Path) -> None:
    path, (fit, processor) = written(tmp_path, kind), FITS[name]
    picture = load_image(str(path))
    theirs = processor(picture, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values[0]
    mine = Files((path,), 9).at(24, fit)[:][0].float()
    assert mine.shape == theirs.shape == (3, 24, 24)
    assert (mine - theirs).abs().max() <= 2  # they resample tensors, we do as Pillow does
    memory = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]
    edge = fit.edge or 24
    if not fit.crop or all(
        edge * x % min(picture.size) == 0 for x in picture.size
    ):  # else they differ by a pixel in length
        assert (resized(memory / 255, 24, fit)[0] * 255 - theirs).abs().max() <= 1


def test_a_square_picture_in_patches_is_siglip_2_s(tmp_path: Path) -> None:
    path = tmp_path / "square.png"
    picture(90, 90).save(path)
    values = Siglip2ImageProcessor(patch_size=8, max_num_patches=9)(load_image(str(path)), return_tensors="pt")
    theirs = (
        values.pixel_values[0].unflatten(1, (8, 8, 3)).unflatten(0, (3, 3)).permute(4, 0, 2, 1, 3).reshape(3, 24, 24)
    )
    assert values.spatial_shapes.tolist() == [[3, 3]]
    mine = Files((path,), 24, Fit(False, "bilinear"))[:][0].float()
    assert (mine - (theirs * 0.5 + 0.5) * 255).abs().max() <= 2


def test_grey_of_16_bits_keeps_its_range_on_purpose(tmp_path: Path) -> None:
    mine = Files((written(tmp_path, "16-bit"),), 24)[:].float()
    grey = Files((written(tmp_path, "grey"),), 24)[:].float()
    assert (mine - grey).abs().max() <= 1  # a processor would cut off nearly all of it at 255


@pytest.mark.parametrize("size", [(90, 61), (300, 40), (33, 150), (48, 48)])
def test_a_crop_is_torchvision_s_of_the_same_box(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    picture(*size).save(path)
    numbers = some_numbers(1, torch.Generator().manual_seed(3))
    mine = crops(Files((path,), 8), torch.tensor([0]), 20, numbers)[0]
    left, top, right, bottom = crop_box(size, numbers[..., 0])
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    cut = tv.resized_crop(picture(*size), top, left, bottom - top, right - left, [20, 20], InterpolationMode.BICUBIC)
    assert torch.equal(mine, torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1))


def test_crops_have_the_published_areas_and_aspects_and_odd_pictures_the_largest_allowed() -> None:
    numbers = some_numbers(400, torch.Generator().manual_seed(0))
    wide, tall, across, down = crop_shares(torch.full((400,), 100.0), torch.full((400,), 100.0), numbers)
    assert (wide * tall).min() >= 0.9 and (wide * tall).max() <= 1 + 1e-6
    assert 0.88 < (wide / tall).min() < 0.95 < 1.05 < (wide / tall).max() < 1.12  # what fits into a square
    assert across.min() < 0.05 < 0.95 < across.max() and down.std() > 0.2
    wide, tall, across, down = crop_shares(torch.full((400,), 50.0), torch.full((400,), 300.0), numbers)
    assert torch.allclose(tall, torch.ones(400)) and torch.allclose(wide * 300 / 50, torch.full((400,), 4 / 3))
    assert bool((across == 0.5).all())


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (640, 640), (50, 300), (300, 40), (1, 1), (7, 3)])
def test_the_crop_of_one_picture_is_that_of_many(size: tuple[int, int]) -> None:
    numbers = some_numbers(100, torch.Generator().manual_seed(size[0]))
    tall, wide = (torch.full((100,), float(x)) for x in (size[1], size[0]))
    for k, shares in enumerate(zip(*crop_shares(tall, wide, numbers), strict=True)):
        left, top, right, bottom = crop_box(size, numbers[..., k])
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        assert abs(right - left - max(1, shares[0].item() * size[0])) <= 0.51
        assert abs(bottom - top - max(1, shares[1].item() * size[1])) <= 0.51
        assert abs(left - shares[2].item() * (size[0] - (right - left))) <= 0.51
        assert abs(top - shares[3].item() * (size[1] - (bottom - top))) <= 0.51


def test_training_sees_what_lies_outside_the_middle_square(tmp_path: Path) -> None:
    """Both ends of a picture of 4:3 are red; its middle square is blue."""
    path = tmp_path / "flag.png"
    flag = Image.new("RGB", (80, 60), "blue")
    for left in (0, 76):
        flag.paste("red", (left, 0, left + 4, 60))
    flag.save(path)
    files = Files((path,) * 8, 16)
    assert int(files[:][:, 0].max()) < 10
    (seen,) = all_cropped(files, 16, torch.Generator().manual_seed(1))
    assert seen.shape == (8, 3, 16, 16) and bool((seen[:, 0].flatten(1).amax(1) > 100).any())


def some_task(folder: Path, kind: str = "files") -> Task:
    """Ten pictures in ``files``, in a ``tar``, in ``memory``, or some of each (``joined``)."""
    paths = []
    for k in range(10):
        paths.append(folder / f"{k}.jpg")
        picture(60 + 3 * k, 50, seed=k).save(paths[-1])
    files: Any = Files(tuple(paths), 16)
    tar: Any = Files(tuple(index(pack(folder / "x.tar", {p.name: p.read_bytes() for p in paths}))), 16)
    labels = torch.arange(10) % 2
    classes = (Class("a", ("{}",)), Class("b", ("{}",)))
    some = Joined((files.select(slice(0, 3)), tar.select(slice(3, 6)), files.select(slice(6, 10))[:]))
    train = {"files": files, "tar": tar, "memory": files[:], "joined": some}[kind]
    return Task("t", classes, Images(train, labels), Images(files, labels))


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("kind", ["files", "tar", "memory", "joined"])
def test_a_batch_is_the_same_whoever_reads_it(kind: str, augment: bool, tmp_path: Path) -> None:
    task, plan = some_task(tmp_path, kind), Schedule(7, 0.1, 0, 4, augment=augment)
    found: dict[int, tuple[list[Batch], torch.Tensor]] = {}
    for workers in (0, 1, 4):
        generator = torch.Generator().manual_seed(5)
        with closing(drawn(task, plan, generator, 16, workers)) as batches:
            found[workers] = list(islice(batches, 7)), generator.get_state()
        found[workers] = found[workers][0], generator.get_state()  # as if nothing had been read ahead
    for workers in (1, 4):
        for mine, theirs in zip(found[workers][0], found[0][0], strict=True):
            assert torch.equal(mine.images, theirs.images) and torch.equal(mine.labels, theirs.labels)
            assert torch.equal(mine["index"], theirs["index"])
        assert torch.equal(found[workers][1], found[0][1])


def test_what_is_read_ahead_ends_with_the_jobs_and_says_what_is_damaged() -> None:
    generator = torch.Generator()
    assert list(ahead(iter(range(5)), lambda job: job * 2, 3, generator)) == [(k, 2 * k) for k in range(5)]
    assert list(ahead(iter(range(0)), lambda job: job, 3, generator)) == []

    def broken(job: int) -> int:
        if job == 2:
            raise DamagedFile("two is damaged")
        return job

    with pytest.raises(DamagedFile, match="two is damaged"):
        list(ahead(iter(range(5)), broken, 2, generator))


def test_files_take_the_model_s_size(tmp_path: Path) -> None:
    task = some_task(tmp_path)
    stream = mini.multi_domain("I")
    from dataclasses import replace

    mixed = replace(stream, tasks=(task,)).at(24)
    assert mixed.tasks[0].test.pixels[:2].shape == (2, 3, 24, 24)
    assert stream.at(24).tasks[0].test.pixels is stream.tasks[0].test.pixels  # in memory: nothing to read again
    pressed = mixed.at(24, Fit(False, "bilinear")).tasks[0]
    theirs = SiglipImageProcessor(size={"height": 24, "width": 24}, resample=2)
    wanted = theirs(load_image(str(tmp_path / "0.jpg")), do_rescale=False, do_normalize=False, return_tensors="pt")
    for images in (pressed.train, pressed.test):
        assert (images.pixels[:1][0].float() - wanted.pixel_values[0]).abs().max() <= 2
    both = Joined((pressed.test.pixels, stream.tasks[0].test.pixels)).at(8, Fit(False)).parts[0]
    assert (both.side, both.fit) == (8, Fit(False))


def test_every_kind_can_be_cropped(tmp_path: Path) -> None:
    files = Files(tuple(written(tmp_path, kind) for kind in (*KINDS, "16-bit")), 8)
    (seen,) = all_cropped(files, 12, torch.Generator().manual_seed(0))
    assert seen.shape == (len(files), 3, 12, 12) and seen.dtype == torch.uint8
    with opened(tmp_path / "rotated.jpg") as turned:
        assert turned.size == (61, 90)


@pytest.mark.parametrize("size", [(20, 600), (700, 24)])
def test_of_a_slender_picture_the_middle_is_seen_and_no_more_is_made(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    files = Files((tmp_path / "a.png",), 48)
    seen = files[torch.tensor([0])].int()
    monkeypatch.setattr("perdure.data.files.SLENDER", 1000)
    assert (files[torch.tensor([0])].int() - seen).abs().max() <= 2  # of the whole, resized
    monkeypatch.undo()
    made: list[int] = []
    resize = Image.Image.resize

    def noted(self: Image.Image, to: tuple[int, int], *more: Any, **rest: Any) -> Image.Image:
        made.append(to[0] * to[1])
        return resize(self, to, *more, **rest)

    monkeypatch.setattr(Image.Image, "resize", noted)
    Image.new("RGB", (1, 20_000)).save(tmp_path / "a.png")
    assert files[torch.tensor([0])].shape == (1, 3, 48, 48) and max(made) <= 48 * 48 * 16
