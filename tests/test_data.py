"""What can be wrong with classes, images and streams: said by name before anything is computed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

import perdure
from perdure.benchmarks import class_incremental, mini
from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.pixels import as_floats
from perdure.data.checks import check_templates
from perdure.data.files import Files, Joined, joined, take
from perdure.data.folders import pictures
from perdure.data.task import Class, Images, Probe, Stream, Task
from perdure.models.clip import CLIP

TEMPLATES = ("a drawing of a {}.",)


def grey(count: int = 4, side: int = 8, shade: int = 100) -> torch.Tensor:
    return torch.full((count, 3, side, side), shade, dtype=torch.uint8)


def images(labels: tuple[int, ...] = (0, 1), **more: Any) -> Images:
    return Images(grey(len(labels)), torch.tensor(labels, dtype=torch.long), **more)


def own(*names: str, train: Images | None = None, test: Images | None = None, **kind: Any) -> Stream:
    """A stream of one task whose classes have these names."""
    labels = tuple(range(len(names)))
    classes = tuple(Class(n, TEMPLATES) for n in names)
    task = Task(
        "birds", classes, train if train is not None else images(labels), test if test is not None else images(labels)
    )
    return Stream("own", (task,), kind.pop("probe", None), str(mini.MODEL), "own split", **kind)


# ---- classes


@pytest.mark.parametrize(
    "template", ["a drawing", "a {name}", "a {0}", "a {} and {}", "a {", "a }", "a {!r}", "a {:>9}"]
)
def test_a_template_has_exactly_one_place_for_the_name(template: str) -> None:
    with pytest.raises(PerdureError, match="must hold exactly one {}, where the name goes"):
        check_templates(Class("crane", ("a {}", template)))
    assert Class("crane", ("{{a}} {}",)).prompts() == ["{a} crane"]


@pytest.mark.parametrize("name", ["", "  ", "\n", 3])
def test_a_class_has_a_name(name: Any) -> None:
    with pytest.raises(PerdureError, match="asked for by its name"):
        Class(name, TEMPLATES)


def test_templates_are_several() -> None:
    for wrong in ((), "a photo of a {}."):
        with pytest.raises(PerdureError, match="'crane' has no templates"):
            Class("crane", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("a", "b"), [("crane", "crane"), ("crane", "Crane"), ("hot dog", "hot  dog")])
def test_classes_of_one_text_are_refused(clip: CLIP, a: str, b: str) -> None:
    with pytest.raises(PerdureError, match=f"own, task birds: the classes '{a}' and '{b}' have one text"):
        own("box", a, b).check(clip)
    with pytest.raises(PerdureError, match="own, the probe: the classes"):
        probe = Probe((Class(a, TEMPLATES), Class(b, TEMPLATES)), images())
        own("box", "bed", probe=probe).check(clip)


def test_classes_of_one_text_in_two_tasks_are_refused_where_they_compete(clip: CLIP) -> None:
    first = own("box", "crane").tasks[0]
    second = replace(own("bed", "Crane").tasks[0], name="machines", index=1)
    stream = Stream("own", (first, second), None, str(mini.MODEL), "own split")
    stream.check(clip)
    with pytest.raises(PerdureError, match="'crane' and 'Crane' have one text"):
        replace(stream, labels="seen").check(clip)


def test_prompts_longer_than_the_context_are_refused(clip: CLIP) -> None:
    long = "estate car with panoramic roof, leather seats and alloy wheels, in "
    with pytest.raises(PerdureError, match=r"'a drawing of a .* in red\.' is \d+ tokens long.* reads 16"):
        own("box", long + "red").check(clip)


# ---- images


@pytest.mark.parametrize(
    ("pixels", "labels", "said"),
    [
        (grey()[:, :1], torch.zeros(4, dtype=torch.long), r"must be \(N, 3, H, W\).*not uint8 \(4, 1, 8, 8\)"),
        (grey()[0], torch.zeros(3, dtype=torch.long), "must be"),
        (grey().permute(0, 2, 3, 1), torch.zeros(4, dtype=torch.long), r"not uint8 \(4, 8, 8, 3\)"),
        (grey().int(), torch.zeros(4, dtype=torch.long), "not int32"),
        (grey().numpy(), torch.zeros(4, dtype=torch.long), "not a value of type ndarray"),
        (grey()[..., :0], torch.zeros(4, dtype=torch.long), "must be"),
        (grey(), torch.zeros(4), r"Labels must be a tensor \(N,\) of int64, not float32"),
        (grey(), torch.zeros(4, 1, dtype=torch.long), "Labels must be"),
        (grey(), [0, 0, 0, 0], "Labels must be .* not a value of type list"),
        (grey(), torch.zeros(3, dtype=torch.long), "3 labels for"),
    ],
)
def test_pixels_and_labels_of_a_wrong_kind(pixels: Any, labels: Any, said: str) -> None:
    with pytest.raises(PerdureError, match=said):
        Images(pixels, labels)


def test_labels_out_of_range() -> None:
    for wrong in ((0, 2), (-1, 0)):
        with pytest.raises(PerdureError, match=r"Task birds: labels must lie in 0 … 1, these lie in"):
            own("box", "bed", train=images(wrong))
        with pytest.raises(PerdureError, match=r"The probe: labels must lie in 0 … 1"):
            Probe((Class("box", TEMPLATES), Class("bed", TEMPLATES)), images(wrong))


def test_a_side_without_images(clip: CLIP) -> None:
    none = Images(grey(0), torch.zeros(0, dtype=torch.long))
    for side, said in (("train", "training"), ("test", "test")):
        with pytest.raises(PerdureError, match=f"own, task birds: there are no {said} images"):
            own("box", "bed", **{side: none}).check(clip)
    with pytest.raises(PerdureError, match="own, the probe: there are no test images"):
        own("box", "bed", probe=Probe((Class("cup", TEMPLATES),), none)).check(clip)
    own("box").check(clip)  # one class is no fault


@pytest.mark.parametrize("change", [lambda x: x * 255, lambda x: x - 0.5, lambda x: x * float("nan")])
def test_floats_that_are_no_pixels_are_refused(clip: CLIP, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    floats = Images(change(grey(2).float() / 255), torch.tensor([0, 1]))
    with pytest.raises(PerdureError, match="birds, training images: images as floats must lie in 0 … 1"):
        own("box", "bed", train=floats).check(clip)


def test_two_tasks_named_for_other_things() -> None:
    for name in ("probe", "before"):
        with pytest.raises(PerdureError, match=f"called '{name}'"):
            Stream("own", (replace(own("box").tasks[0], name=name),), None, "", "")


def test_a_wrong_stream_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match="have one text"):
        perdure.run("finetune", own("crane", "crane "), tmp_path / "run", iterations=1, warmup=0)
    assert not list(tmp_path.rglob("task_*"))


@pytest.mark.slow
def test_floats_and_bytes_are_one_thing_to_every_reader(clip: CLIP, tmp_path: Path) -> None:
    stream = mini.multi_domain("I").shortened(1, 16)
    task = stream.tasks[0]
    sides = {s: replace(getattr(task, s), pixels=as_floats(getattr(task, s).pixels)) for s in ("train", "test")}
    floats = replace(stream, tasks=(replace(task, **sides),))
    a, b = (
        perdure.run("finetune", s, tmp_path / n, iterations=2, warmup=0, batch_size=4, threads=1, precision="fp32")
        for n, s in (("a", stream), ("b", floats))
    )
    assert a["losses"] == b["losses"] and a["accuracy"] == b["accuracy"]
    assert torch.equal(clip.pixels(task.test.pixels), clip.pixels(sides["test"].pixels))


def test_captions_stay_with_their_images() -> None:
    some = images((0, 0, 1, 1), captions=("a", "b", "c", "d"))
    assert some.take(torch.tensor([2, 0])).captions == ("c", "a") and some.spread(2).captions == ("a", "d")
    assert set(some.few(1, torch.Generator()).captions or ()) & {"a", "b"}
    one = own("box", "bed", train=some).tasks[0]
    both = Stream("own", (one, replace(one, name="b")), None, "", "").joined(grouped=False)
    assert both.train.captions == (*"abcd", *"abcd") and both.test.captions is None
    with pytest.raises(PerdureError, match="1 captions for 2 images"):
        images(captions=("a",))


# ---- files


def draw(path: Path, shade: int = 100, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (shade, shade, shade)).save(path, **more)
    return path


def test_a_sound_png_with_a_long_note_is_read_and_pillow_stays_as_it_was(tmp_path: Path) -> None:
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    about = PngImagePlugin.PngInfo()
    about.add_text("Notes", "x" * (2 << 20), zip=True)
    assert int(Files((draw(tmp_path / "a.png", pnginfo=about),), 8)[:].float().mean()) == 100
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_files_that_are_cut_short_are_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.tif", "a.gif"):
        path = draw(tmp_path / name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DamagedFile, match=rf"{name} is no image that can be read"):
            Files((path,), 8)[:]


def test_hidden_files_are_ignored_and_others_counted(tmp_path: Path) -> None:
    home = tmp_path / ".cache" / "owls"  # what lies above is the person's own affair
    for name in ("0.png", "1.TIF", "2.gif", "deep/3.jpeg"):
        draw(home / name)
    for name in ("._0.png", ".ipynb_checkpoints/0.png", "__MACOSX/0.png", ".DS_Store", "Thumbs.db", "about.txt"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: pytest.fail(a[0]))
        found = pictures(home)
    assert [p.relative_to(home).as_posix() for p in found] == ["0.png", "1.TIF", "2.gif", "deep/3.jpeg"]
    (home / "4.heic").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"owls: 1 files are no pictures by their names and are left out: 4\.heic"):
        pictures(home)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "0.nef").write_bytes(b"x")
    with pytest.raises(PerdureError, match=r"raw holds no picture \(1 other files, 0\.nef among them\)"):
        pictures(tmp_path / "raw")


def test_a_class_in_another_kind_of_file_is_learned_and_said(tmp_path: Path) -> None:
    for side in ("train", "test"):
        (tmp_path / side / ".ipynb_checkpoints").mkdir(parents=True)
        for name, kind in (("owl", "png"), ("cat", "png"), ("mouse", "tif")):
            draw(tmp_path / side / name / f"0.{kind}")
    class_incremental.HOMES["own"] = "own"
    try:
        with pytest.warns(UserWarning, match=r"most classes are \.png files, but not mouse \(\.tif\)"):
            names, train, _, _ = class_incremental.by_folder(tmp_path, "own", ("train", "test"))
    finally:
        del class_incremental.HOMES["own"]
    assert names == ["cat", "mouse", "owl"] and train.labels.tolist() == [0, 1, 2]


def test_cifar_is_not_fetched_without_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets.utils as fetching

    def network(*_: object, **__: object) -> None:
        pytest.fail("asked the network")

    monkeypatch.setattr(fetching, "_urlretrieve", network)
    with pytest.raises(PerdureError, match=r"CIFAR-100 is not at .*download=True"):
        class_incremental.cifar100(tmp_path)


# ---- joined


def test_images_that_are_not_alike_are_joined(tmp_path: Path, clip: CLIP) -> None:
    files = Files(tuple(draw(tmp_path / f"{k}.png", 40 * k) for k in (1, 2)), 16)
    parts = [grey(2, 32, 30), files, grey(2, 28, 90), grey(1, 32, 200).float() / 255]
    whole = joined(parts)
    assert isinstance(whole, Joined) and len(whole) == 7
    shades = (whole[torch.tensor([6, 0, 3, 4])] * 255).mean((1, 2, 3))
    torch.testing.assert_close(shades, torch.tensor([200.0, 30.0, 80.0, 90.0]), atol=0.5, rtol=0)
    assert whole[:].shape == (7, 3, 32, 32) and [len(p) for p in whole.split(3)] == [3, 3, 1]
    assert clip.embeddings(whole).shape[0] == 7 and len(take(whole, torch.tensor([1, 5]))) == 2
    alike = joined([grey(2), grey(3)])
    assert isinstance(alike, torch.Tensor) and isinstance(joined([files, files]), Files)


def test_joint_learns_from_images_that_are_not_alike(tmp_path: Path) -> None:
    first = own("box", "bed").tasks[0]
    files = Files(tuple(draw(tmp_path / f"{k}.png", 40 * k) for k in (1, 2)), 16)
    second = Task("b", first.classes, Images(files, torch.tensor([0, 1])), Images(files, torch.tensor([0, 1])), 1)
    stream = Stream("own", (first, second), None, str(mini.MODEL), "own split")
    found = perdure.run("joint", stream, tmp_path / "run", iterations=2, warmup=0, batch_size=4, threads=1)
    assert found["finished"]
