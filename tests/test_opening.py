"""One picture opened: what is no picture, what is damaged, what is of a kind whose range nobody knows, and who says so when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from albums import tasks, write
from PIL import Image
from typer.testing import CliRunner

import perdure
from perdure.cli import app
from perdure.core.errors import DamagedFile, PerdureError
from perdure.data import opening
from perdure.data.files import DECODED, Files, cannot_be_read

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_decoder_that_gives_up_is_the_picture_s_fault_what_comes_after_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(RuntimeError, match="no room"), opening.opened(path):
        raise RuntimeError("no room")

    def load(_: Image.Image) -> None:
        raise RuntimeError("Failed to decode image: Not implemented")  # as Pillow's AVIF decoder does

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    assert "a.png is no image that can be read: Failed to decode" in opening.trouble(path)


@pytest.mark.parametrize(("kind", "said"), [("float32", "floats"), ("int32", "numbers of 32 bits")])
def test_grey_without_a_range_is_refused(kind: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.linspace(0, 1 if kind == "float32" else 70_000, 64).reshape(8, 8).astype(kind)).save(path)
    assert opening.looks_wrong(path)
    with pytest.raises(DamagedFile, match=rf"a\.tif .*it holds {said}.*save it with 8 or 16 bits"):
        Files((path,), 8)[:]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_grey_of_16_bits_is_read_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65_535, 64).reshape(8, 8).astype(np.uint16)
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5\n8 8\n65535\n" + values.byteswap().tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    found = Files((tmp_path / name,), 8)[:][0, 0].float()
    assert (found - torch.from_numpy(values / 257).float()).abs().max() <= 0.51


def test_a_cheap_look_decodes_some(tmp_path: Path) -> None:
    paths: list[Any] = []
    for k in range(DECODED + 20):
        paths.append(tmp_path / f"{k:03d}.jpg")
        Image.effect_noise((30, 30), 60).save(paths[-1])
    paths[-1].write_bytes(paths[-1].read_bytes()[:-99])  # the last is among those that are decoded
    files = Files(tuple(paths), 8)
    assert cannot_be_read(files) == [paths[-1]] and not cannot_be_read(files, decoded=0)
    paths[7].write_bytes(b"none")
    assert cannot_be_read(files) == [paths[7], paths[-1]]


def test_a_picture_that_is_cut_short_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    (digits,) = tasks("digits")
    write(digits, tmp_path / "mine", 3, 6)
    bad = sorted((tmp_path / "mine" / "one").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:-60])
    with pytest.raises(PerdureError, match=rf"1 of its (training|test) pictures cannot be read, {bad}"):
        perdure.run("ridge", str(tmp_path / "mine"), tmp_path / "run", features=32)
    assert not (tmp_path / "run").exists()


def test_data_check_refuses_what_a_run_would(tmp_path: Path) -> None:
    (digits,) = tasks("digits")
    check = lambda *words: CliRunner().invoke(app, ["data", "check", str(tmp_path / "mine"), *words])  # noqa: E731
    write(digits, tmp_path / "mine", 3, 1)
    alone = check()
    assert alone.exit_code and "there are no test images" in str(alone.exception)
    for k, one in enumerate(sorted((tmp_path / "mine").iterdir())):
        for n in range(4):
            Image.new("RGB", (8, 8), (40 * k, 40 * n, 9)).save(one / f"more{n}.png")
    assert check().exit_code == 0
    from perdure.benchmarks import mini

    known = check("--model", str(mini.MODEL))
    assert known.exit_code == 0 and "can be asked for every class" in known.output
    (tmp_path / "mine" / "one").rename(
        tmp_path / "mine" / "_".join(f"number {k} and" for k in range(9)).replace(" ", "_")
    )
    assert check().exit_code == 0  # whether a prompt is too long is for a model to say
    long = check("--model", str(mini.MODEL))
    assert long.exit_code and "tokens long" in str(long.exception)
