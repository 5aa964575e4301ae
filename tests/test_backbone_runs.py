"""Every kind of method on a SigLIP: two steps a task, exported, and answered for by plain transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import WORDS, checkpoint, plain_logits

import perdure
from perdure import launch
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.core.pixels import Fit, resized
from perdure.core.state import read_json
from perdure.data.task import Context
from perdure.engine.watcher import Watcher
from perdure.methods.gift import GIFT
from perdure.models.clip import CLIP
from perdure.synthesis.prompts import Request
from perdure.synthesis.store import Store, collect

TRAINED: dict[str, Any] = {"iterations": 2, "warmup": 1, "batch_size": 8, "lr": 1e-3, "precision": "fp32"}
METHODS: dict[str, dict[str, Any]] = {
    "finetune": {**TRAINED, "loss": "sigmoid"},
    "finetune_lora": TRAINED,
    "gift": {**TRAINED, "synthetic": 8, "synthetic_batch": 4},
    "condu": {**TRAINED, "loss": "sigmoid"},
    "mg_clip": TRAINED,
    "ridge": {"features": 64},
    "ridge_patches": {"features": 64},
}
BY_TEXT = ("finetune", "finetune_lora", "gift", "condu")  # what answers is what is exported


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("tiny") / "siglip", "siglip")


def pairs(out: Path) -> str:
    images = mini.multi_domain("I").tasks[3].train.pixels[:8]
    collect(out, images, [f"a drawing of thing {k}" for k in range(8)], "the small world")
    return str(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_method_learns_and_its_export_answers_the_same(name: str, folder: Path, tmp_path: Path) -> None:
    run, out, options = tmp_path / "run", tmp_path / "out", {"tasks": 2, "images": 24, **METHODS[name]}
    if name == "gift":
        options["pairs"] = pairs(tmp_path / "pairs")
    metrics = perdure.run(name, "mini-mtil", run, model=str(folder), **options)
    config = read_json(run / "config.json")
    assert metrics["finished"] and config["backbone"] == CLIP.load(str(folder)).described()
    assert metrics["model"] == {"weights": config["weights"], **config["backbone"]}
    launch.export(run, out, task=1 if name == "condu" else None)
    again, born = CLIP.load(str(out)), CLIP.load(str(folder))
    assert (again.fingerprint() == born.fingerprint()) == name.startswith("ridge")
    for task, accuracy in list(
        zip(mini.multi_domain("I").shortened(2, 24).tasks, metrics["accuracy"][-1], strict=True)
    ):
        if name == "condu" and task.index:
            continue  # another expert's
        classes = [c.prompts() for c in task.classes]
        with torch.no_grad():
            mine = again.similarity(again.encode_image(task.test.pixels), again.encode_text([c[0] for c in classes]))
            answers = again.similarity(again.encode_image(task.test.pixels), again.class_texts(classes)).argmax(1)
        theirs = plain_logits(out, task.test.pixels, [c[0] for c in classes])
        torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=0)
        if name in BY_TEXT:
            assert 100 * answers.eq(task.test.labels).double().mean().item() == pytest.approx(accuracy)


SHORT: dict[str, Any] = {
    "iterations": 1, "warmup": 0, "batch_size": 4, "synthetic": 4, "synthetic_batch": 2, "sampling_steps": 1,
    "reference": "drawings", "reference_batch": 4, "answer.features": 16, "align_epochs": 1, "align_draws": 2, "draws": 2,
    "replay": "full", "per_class": 1, "search_epochs": 1, "meta_source": "drawings", "meta_steps": 1, "meta_batch": 1,
    "replayed": 2,
}  # fmt: skip
FORWARDS = ("moe_adapters", "cpe_clip", "cgil")  # they need a text that is read forwards, and say so
REMEMBERING = ("experience_replay", "icarl", "ocl_sda")
OTHERS = [e.name for e in launch.methods() if "role" not in e.about and e.name not in METHODS]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OTHERS if "+" not in name])
def test_every_other_method_learns_or_says_before_the_work_why_it_cannot(
    name: str, folder: Path, tmp_path: Path
) -> None:
    known = launch.method_options(launch.method_entry(name))
    options = {key: value for key, value in SHORT.items() if key in known}
    options |= {"memory": 52} if name in REMEMBERING else {}
    values = {"tasks": 2, "images": 24, "precision": "fp32", **options}
    if name in FORWARDS:
        with pytest.raises(PerdureError, match="Use it with a CLIP"):
            perdure.run(name, "mini-mtil", tmp_path / "run", model=str(folder), **values)
        assert not list((tmp_path / "run").glob("task_*"))
    else:
        assert perdure.run(name, "mini-mtil", tmp_path / "run", model=str(folder), **values)["finished"]


@pytest.mark.slow
def test_siglip_2_learns_from_files_pressed_into_its_square_and_no_other_model_goes_on(tmp_path: Path) -> None:

    for number in range(12):
        path = tmp_path / "photos" / f"kind {'ab'[number % 2]}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40 + number, 70), 90).convert("RGB").save(path)
    model, run, heard = checkpoint(tmp_path / "siglip2", "siglip2"), tmp_path / "run", list[str]()

    class Ear(Watcher):
        def warn(self, text: str) -> None:
            heard.append(text)

    options = {**TRAINED, "iterations": 2, "model": str(model), "workers": 0}
    assert perdure.run("finetune", str(tmp_path / "photos"), run, watcher=Ear(), **options)["finished"]
    assert any("shown every picture as a square here" in text for text in heard)
    launch.export(run, tmp_path / "out")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    again = CLIP.load(str(tmp_path / "out"))
    with torch.no_grad():
        mine = again.similarity(again.encode_image(images), again.encode_text(WORDS))
    torch.testing.assert_close(mine, plain_logits(tmp_path / "out", images, WORDS), atol=5e-5, rtol=0)
    for path in sorted(model.iterdir()):
        path.unlink()
    for path in sorted(checkpoint(tmp_path / "other", "siglip").iterdir()):
        path.rename(model / path.name)
    with pytest.raises(PerdureError, match="it is a 'siglip' of fingerprint .*, the run's a 'siglip2' of"):
        perdure.resume(run)


def test_synthetic_pairs_are_seen_as_the_model_sees_pictures(folder: Path, tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 20, 48), dtype=torch.uint8)
    collect(tmp_path / "pairs", images, ["one", "two"], "nowhere")
    fit = Fit(False, "bilinear")
    store = Store(tmp_path / "pairs", {"kind": "collected"})
    found = store.read([Request("one", 0), Request("two", 1)], 32, fit).images
    assert torch.equal(found, (resized(images / 255, 32, fit) * 255).round().to(torch.uint8))
    method = GIFT(pairs=str(tmp_path / "pairs"), synthetic=2)
    method.bind(CLIP.load(str(folder)), Context())
    assert torch.equal(
        method.replay.pairs("a task", []).images.sum((1, 2, 3)).sort()[0], found.sum((1, 2, 3)).sort()[0]
    )
