"""How a run is computed: in fp16 with scaled losses, compiled, by deterministic algorithms; what waits for an accelerator.

Those that need one are skipped where there is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import devices
import pytest
import torch
from conftest import SHORT
from torch import nn

import perdure
from perdure.benchmarks import mini
from perdure.core import device
from perdure.core.caller import undisturbed
from perdure.core.device import compute_with, sent
from perdure.core.errors import PerdureError
from perdure.core.precision import precision_of
from perdure.data.files import crops
from perdure.data.transforms import some_numbers
from perdure.engine.settings import Settings
from perdure.models import compiled
from perdure.models.clip import CLIP
from perdure.training import scale
from perdure.training.fit import Accumulator
from perdure.training.scale import Scale

BACKENDS: Any = torch.backends
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA: dict[str, Any] = {**SHORT, "device": "cuda"}


# ---- fp16


def test_gradients_that_overflow_are_found_again_at_half_the_scale_and_given_at_their_true_size() -> None:
    w, unused = nn.Parameter(torch.tensor([2.0, 3.0])), nn.Parameter(torch.zeros(1))
    loss = (w.half() * 100).float().square().sum()  # the gradient of the half is 2·200·100·scale: past 65,504 from 2 on
    factor = Scale()
    found = factor.gradients(loss, [w, unused])
    assert found[1] is None and factor.value < 2**16
    torch.testing.assert_close(found[0], 2e4 * w.detach())
    kept = factor.value
    factor.gradients(loss, [w, unused])
    assert factor.value == kept  # nothing overflows any more


def test_small_gradients_survive_in_fp16_because_they_are_scaled() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    loss = lambda: (w.half() * 1e-3).float().sum() * 1e-6  # noqa: E731
    plain = torch.autograd.grad(loss(), [w])[0]
    (scaled,) = Scale().gradients(loss(), [w])
    assert plain.item() == 0 and scaled is not None
    assert scaled.item() == pytest.approx(1e-9, rel=1e-2)


def test_a_loss_that_is_not_finite_is_no_endless_search() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    factor = Scale(value=8.0)
    (found,) = factor.gradients((w * float("inf")).sum(), [w])
    assert found is not None and not found.isfinite() and factor.value == 1


def test_the_scale_grows_after_steps_without_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "GROWS_AFTER", 3)
    factor = Scale(value=4.0)
    for _ in range(5):
        factor.stepped()
    assert (factor.value, factor.steps) == (8.0, 2)


def test_backward_returns_true_gradients_in_fp16() -> None:
    w = nn.Parameter(torch.tensor([2.0, 3.0]))
    backward = Accumulator({"w": w}, {}, scale=Scale(value=1024.0))
    found = backward(square=(w**2).sum())
    torch.testing.assert_close(found["w"], 2 * w.detach())
    torch.testing.assert_close(w.grad, 2 * w.detach())


@pytest.mark.slow
def test_a_run_in_fp16_learns_what_one_in_fp32_does(tmp_path: Path) -> None:
    last = {}
    for precision in ("fp16", "fp32"):
        metrics = perdure.run("finetune", "mini-mtil", tmp_path / precision, **{**SHORT, "precision": precision})
        last[precision] = metrics["losses"]["animals"]["task"]
        assert metrics["config"]["precision"] == precision
    assert last["fp16"] != last["fp32"]
    assert last["fp16"] == pytest.approx(last["fp32"], rel=2e-2)


def test_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, wanted in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert precision_of("auto", "cuda") == wanted
    for native, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native, raising=False)
        assert precision_of("auto", "cpu") == wanted
    assert precision_of("fp32", "cuda") == "fp32"


# ---- algorithms


def test_deterministic_algorithms_last_as_long_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with undisturbed():
        compute_with(threads + 1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        assert not torch.backends.cudnn.allow_tf32 and torch.get_num_threads() == threads + 1
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert torch.backends.cudnn.allow_tf32 and torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "said",
    [
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
        lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    ],
)
def test_fp32_is_fp32_however_the_caller_rounds_and_he_rounds_so_again(said: Callable[[], None]) -> None:
    if not device.products():
        pytest.skip("this torch has one way alone of saying it")
    usual, everywhere = device.rounding(), BACKENDS.fp32_precision
    try:
        said()
        before = device.rounding()
        with undisturbed():
            compute_with(1, deterministic=False)
            newer, older = device.rounding()
            assert set(newer) == {"ieee"} and older == ("highest", False)
        assert device.rounding() == before
    finally:
        BACKENDS.fp32_precision = everywhere
        device.round_products(*usual)


def test_a_run_asks_for_deterministic_algorithms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, **_: asked.append(on))
    perdure.run("zero_shot", "mini-mtil", tmp_path / "run", **SHORT, deterministic=True)
    assert True in asked and asked[-1] is False  # put back


def test_how_it_is_computed_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    perdure.run("zero_shot", "mini-mtil", tmp_path / "run", **SHORT, deterministic=True)
    with pytest.raises(PerdureError, match="holds this very run, finished"):
        perdure.run("zero_shot", "mini-mtil", tmp_path / "run", **SHORT)


# ---- compiled


def test_without_a_compiler_it_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> object:
        raise RuntimeError("no working C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(PerdureError, match=r"compile=true: torch cannot compile here \(no working C\+\+ compiler\)"):
        perdure.run("finetune", "mini-mtil", tmp_path / "run", **SHORT, compile=True)
    assert not (tmp_path / "run" / "task_00_before").exists()


def test_where_nothing_compiled_can_be_kept_it_is_not_the_compiler_that_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> object:
        raise FileNotFoundError(2, "No such file or directory", "/proc/nowhere")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(PerdureError, match="could not be kept .*/proc/nowhere.*TORCHINDUCTOR_CACHE_DIR"):
        compiled.check_compiler(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "cpe_clip", "finetune_lora"])
def test_compiled_towers_give_the_same_losses(name: str) -> None:
    """Plain blocks, blocks with prompts hung into them, and adapters."""
    try:
        compiled.check_compiler(torch.device("cpu"))
    except PerdureError as error:
        pytest.skip(str(error))
    assert devices.apart(name, "cpu", compile=True) < devices.CLOSE


@pytest.mark.slow
def test_a_hook_that_comes_later_acts_in_a_compiled_tower() -> None:
    clip = CLIP.load(str(mini.MODEL))
    try:
        compiled.compiled(clip.backbone, torch.device("cpu"))
    except PerdureError as error:
        pytest.skip(str(error))
    images, guards = torch.rand(2, 3, 32, 32), device.hook_guards()
    assert guards is False
    copy = clip.frozen_copy()
    for one in (clip, copy):  # a teacher's blocks are compiled as a learner's
        assert all(b._compiled_call_impl is not None for b in one.backbone.vision_model.encoder.layers)
    with torch.no_grad():
        before = clip.encode_image(images)
        hook = clip.backbone.vision_model.encoder.layers[1].register_forward_hook(lambda _, __, out: out * 0)
        assert not torch.allclose(clip.encode_image(images), before)
        hook.remove()
        torch.testing.assert_close(clip.encode_image(images), before)
        torch.testing.assert_close(copy.encode_image(images), before)


# ---- waiting


@pytest.mark.slow
def test_no_step_waits_for_the_device() -> None:
    assert not devices.waits("finetune", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gift", "condu", "mg_clip", "codyra", "zscl", "slca"])
def test_no_step_of_a_method_waits_for_the_device(name: str) -> None:
    assert not devices.waits(name, "cpu")


def test_what_waits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from perdure.methods.base import Method

    step = Method.step

    def asks(self: Method, batch: Any, backward: Any) -> None:
        batch.labels.tolist()
        self.clip.scale.item()
        batch.images[batch.labels > 0]
        batch.index.tolist()  # which the processor has
        step(self, batch, backward)

    monkeypatch.setattr(Method, "step", asks)
    found = {what.split(" at ")[0] for what in devices.waits("finetune", "cpu")}
    assert found == {"tolist", "aten::_local_scalar_dense", "aten::index.Tensor"}


def test_to_its_own_device_nothing_is_copied() -> None:
    x = torch.rand(3)
    assert sent(x, torch.device("cpu")) is x


# ---- on an accelerator


@needs_cuda
@pytest.mark.parametrize("name", ["finetune", "gift", "condu", "mg_clip"])
def test_no_step_synchronises(name: str, tmp_path: Path) -> None:
    """CUDA's own guard, in the place of a count."""
    from perdure.training import fit

    class Guarded(Accumulator):
        def __call__(self, **losses: torch.Tensor) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return super().__call__(**losses)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "Accumulator", Guarded)
        perdure.run(name, "mini-mtil", tmp_path / "run", **CUDA)


@needs_cuda
@pytest.mark.parametrize("name", ["finetune", "gift", "ridge"])
def test_deterministic_runs_give_the_same_bits_twice(name: str, tmp_path: Path) -> None:
    values = {
        key: value
        for key, value in CUDA.items()
        if name != "ridge" or key not in ("iterations", "warmup", "batch_size")
    }
    found = [perdure.run(name, "mini-mtil", tmp_path / str(k), **values, deterministic=True) for k in range(2)]
    assert found[0]["losses"] == found[1]["losses"] and found[0]["accuracy"] == found[1]["accuracy"]


@needs_cuda
@pytest.mark.parametrize("there, here", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_begun_on_one_device_is_gone_on_with_on_another(there: str, here: str, tmp_path: Path) -> None:
    whole = perdure.run("finetune", "mini-mtil", tmp_path / "whole", **{**SHORT, "device": here})
    folder = tmp_path / "begun"
    perdure.run("finetune", "mini-mtil", folder, **{**SHORT, "device": there})
    (folder / "metrics.json").unlink()
    for path in sorted(folder.glob("task_03_*/*"), reverse=True):
        path.unlink()
    next(folder.glob("task_03_*")).rmdir()
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["device"] = here
    (folder / "config.json").write_text(json.dumps(config))
    metrics = perdure.resume(folder)
    assert metrics["last"] == pytest.approx(whole["last"], abs=10)


def test_images_in_memory_are_cropped_where_the_numbers_lie() -> None:
    pixels, numbers = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), some_numbers(2, torch.Generator())
    there = crops(pixels, torch.tensor([3, 0]), 24, numbers.to("meta"))  # a device that only counts shapes
    assert there.is_meta and there.shape == (2, 3, 24, 24)


@needs_cuda
def test_images_in_memory_are_cropped_on_the_device() -> None:
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    numbers = some_numbers(4, torch.Generator().manual_seed(0))
    there = crops(pixels, torch.arange(4), 32, numbers.to("cuda"))
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), crops(pixels, torch.arange(4), 32, numbers), atol=2e-3, rtol=0)


@needs_cuda
def test_settings_say_the_device(tmp_path: Path) -> None:
    assert Settings(device="auto").settled(mini.multi_domain("I")).device == "cuda"
