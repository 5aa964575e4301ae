"""CoDyRA against the numbers of the paper's own released code, through the method and ``fit``; and what its switches do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import case, in_order, part, tiny_clip
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel

import perdure
from perdure import launch
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.data.task import Class, Images, Query, Task
from perdure.methods.codyra import CoDyRA, shrink, shrink_release
from perdure.models.clip import CLIP
from perdure.training import fit as training
from perdure.training.fit import fit

KINDS = {"ffn_in": "fc1", "ffn_out": "fc2"}
TOWERS = {"all": "both", "vision": "image", "text": "text"}


class Watched(CoDyRA):
    """Notes w before every step, κ, and the gradients of the first steps."""

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.gates: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []

    def step(self, batch: Any, backward: Any) -> None:
        self.note()

        def watched(**losses: Tensor) -> Any:
            found = backward(**losses)
            self.gradients.append({n: g for n, g in found.items() if g is not None} if len(self.gates) < 5 else {})
            return found

        super().step(batch, watched)  # type: ignore[arg-type]

    def note(self) -> None:
        self.gates.append(torch.stack([u.w.detach().clone() for u in self.updates.values()]))

    def finish(self, task: Task) -> None:
        self.note()
        self.end = {n: p.detach().clone() for n, p in self.parameters().items()}
        super().finish(task)


def ready(about: dict[str, Any], t: dict[str, Tensor], **values: Any) -> Watched:
    clip = tiny_clip(about, part(t, "pretrained/"), {f"class {k}": row for k, row in enumerate(t["class_tokens"])})
    h = about["hyper_parameters"]
    settings = dict(
        iterations=h["iterations"], lr=h["lr"], weight_decay=h["wd"], label_smoothing=h["ls"], warmup=h["warmup_length"],
        rank=h["rank"], towers=TOWERS[h["target_encoder"]], layers=tuple(KINDS.get(m, m) for m in h["target_modules"]),
        kappa=h["max_kappa"], kappa_steps=h["lambda_num"], dense=h["dense_iters"], batch_size=h["batch_size"],
        beta2=h["adam_betas"][1], shrink="release",
    )  # fmt: skip
    method = Watched(**settings | values)
    method.bind(clip)
    return method


def tasks_of(about: dict[str, Any], t: dict[str, Tensor]) -> list[Task]:
    out = []
    for k in range(about["hyper_parameters"]["tasks"]):
        count = about["hyper_parameters"]["classes_per_task"]
        classes = tuple(Class(f"class {c}", ("{}",)) for c in range(k * count, (k + 1) * count))
        images = Images(t[f"task{k}/images"], t[f"task{k}/labels"])
        out.append(Task(f"task{k}", classes, images, images, k))
    return out


@pytest.fixture(autouse=True)
def orderly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "batches", in_order)
    monkeypatch.setattr(training, "crops", lambda pixels, index, size, numbers: pixels[index])


def learn(method: Watched, task: Task, start: dict[str, Tensor]) -> Any:
    """One task through the hooks of a run, from given factors."""
    method.start(task)
    method.begin_task(task)
    for name, tensor in start.items():
        layer, which = name.rsplit(".", 1)
        method.updates[layer].get_parameter({"gate": "w"}.get(which, which)).data.copy_(
            tensor.squeeze(0) if which == "gate" else tensor
        )
    losses = fit(method, task, torch.Generator(), method.clip.size, method.clip.device)
    method.clip.trained(f"trained {task.name}", method.parameters().values())
    method.fuse(task)
    return losses


def far(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.reshape(theirs.shape) - theirs).norm() / theirs.norm().clamp_min(1e-30))


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removesuffix("gate") + "w" if n.endswith(".gate") else n: t for n, t in tensors.items()}


@pytest.mark.parametrize("name", ["codyra_a"])
def test_every_gate_gradient_loss_and_factor_is_the_release_s(name: str) -> None:
    about, t = case(name)
    allowed = about["tolerance"]
    method = ready(about, t)
    assert list(method.updates) == about["module_order"]
    tasks = tasks_of(about, t)
    every = tuple(one for task in tasks for one in task.classes)
    for task, wanted in zip(tasks, about["runs"], strict=True):
        losses = learn(method, task, part(t, f"{task.name}/start/"))
        steps = wanted["steps"]
        assert losses["task"] == pytest.approx([s["ce_image"] for s in steps], rel=allowed["losses_relative"])
        if "ce_text" in steps[0] and method.config.towers != "text":
            assert losses["text_side"] == pytest.approx([s["ce_text"] for s in steps], rel=allowed["losses_relative"])
        plan = method.schedule(task)
        assert [plan.rate(k) for k in range(len(steps))] == pytest.approx([s["lr"] for s in steps], rel=1e-6)
        assert [method.kappa(k) for k in range(len(steps))] == pytest.approx([s["kappa"] for s in steps], rel=1e-6)
        gates = torch.stack(method.gates)
        torch.testing.assert_close(gates, t[f"{task.name}/gates"], rtol=0, atol=allowed["gates_abs"])
        assert [int(g.count_nonzero()) for g in gates[1:]] == [s["nonzero_gates_after"] for s in steps]
        for at, prefix in ((0, "grad_first"), (3, "grad_fourth")):
            for n, theirs in renamed(part(t, f"{task.name}/{prefix}/")).items():
                assert far(method.gradients[at][n], theirs) < allowed["gradients_relative_l2"], (prefix, n)
        start = renamed(part(t, f"{task.name}/start/"))
        for n, theirs in renamed(part(t, f"{task.name}/end/")).items():
            origin = start.get(n, torch.zeros_like(theirs)).reshape(theirs.shape)
            assert far(method.end[n].reshape(theirs.shape) - origin, theirs - origin) < allowed["update_relative_l2"], n
        assert method.state.ranks[task.name] == wanted["active_rank_end"]
        found = method.predict(Query(t["test_images"], every))
        torch.testing.assert_close(found, t[f"{task.name}/test_logits"], rtol=0, atol=allowed["test_logits_abs"])


def test_the_two_shrinks() -> None:
    w = torch.tensor([-3.0, -1.5, -0.5, 0.0, 0.9, 1.9, 2.0, 2.5])
    assert shrink(w, 1.0).tolist() == pytest.approx([-2.0, -0.5, 0.0, 0.0, 0.0, 0.9, 1.0, 1.5])
    assert shrink_release(w, 1.0).tolist() == pytest.approx([-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.5])
    assert torch.equal(shrink(w, 0.0), w) and torch.equal(shrink_release(w, 0.0), w)


def test_the_paper_s_shrink_keeps_what_the_release_s_loses() -> None:
    about, t = case("codyra_a")
    kept = {}
    for which in ("release", "soft"):
        method = ready(about, t, shrink=which)
        task = tasks_of(about, t)[0]
        learn(method, task, part(t, "task0/start/"))
        kept[which] = sum(method.state.ranks["task0"].values())
        live = method.end[next(n for n in method.end if n.endswith(".w"))]
        assert live.isfinite().all()
    assert kept["soft"] > kept["release"]


def test_rows_of_earlier_classes_are_counted_or_not() -> None:
    about, t = case("codyra_a")
    first: dict[str, float] = {}
    for which in ("all", "current"):
        method = ready(about, t, text_rows=which, iterations=2)
        for task in tasks_of(about, t):
            losses = learn(method, task, part(t, f"{task.name}/start/"))
        first[which] = losses["text_side"][0]
    assert first["current"] == pytest.approx(2 * first["all"], rel=1e-3)


def test_a_task_is_merged_into_plain_weights(clip: CLIP) -> None:
    """What acts while training acts afterwards, without any hook; nothing but the named layers has moved."""
    method = CoDyRA(iterations=3, lr=0.01, kappa=0.0, layers=("q_proj", "fc2"), towers="image", batch_size=8)
    method.bind(clip)
    task = mini.multi_domain("I").shortened(tasks=1, images=24).tasks[0]
    before = clip.weights()
    images = task.test.pixels[:8]
    seen = {}

    class Peeking(CoDyRA):
        def finish(self, task: Task) -> None:
            with torch.no_grad():
                seen["training"] = clip.encode_image(images)
            super().finish(task)

    method.__class__ = Peeking
    method.begin_task(task)
    fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device)
    with torch.no_grad():
        merged = clip.encode_image(images)
    torch.testing.assert_close(merged, seen["training"], rtol=0, atol=1e-5)
    assert not any(update.on for update in method.updates.values())
    moved = {n for n, w in clip.weights().items() if not torch.equal(w, before[n])}
    assert moved == {f"{name}.weight" for name in method.updates}
    assert all(n.startswith("vision_model") and n.endswith(("q_proj.weight", "fc2.weight")) for n in moved)


def test_layers_that_are_not_there_are_refused(clip: CLIP) -> None:
    with pytest.raises(PerdureError, match="no linear layer 'c_fc'. They have: fc1, fc2"):
        CoDyRA(layers=("q_proj", "c_fc")).bind(clip)


@pytest.mark.slow
def test_the_shrink_keeps_more_of_what_the_model_could_do(tmp_path: Path) -> None:
    """At the same rate, against no shrink: a shorter way from the start, more of the probe, ranks gone; digits are learned."""
    asked: dict[str, Any] = dict(
        tasks=2, images=300, iterations=60, batch_size=32, lr=1e-3, kappa_steps=30, precision="fp32", warmup=0
    )
    kept, free = (perdure.run("codyra", "mini-mtil", tmp_path / str(k), kappa=k, **asked) for k in (0.04, 0.0))
    said, unsaid = (run["remarks"]["digits"] for run in (kept, free))
    assert said["norm of all updates"] < 0.8 * unsaid["norm of all updates"]
    assert 2 < said["ranks kept, mean"] < 14 and unsaid["ranks kept, mean"] == 16
    assert kept["probe"][-1] > free["probe"][-1] + 1
    assert kept["accuracy"][2][1] > kept["accuracy"][0][1] + 10
    launch.export(tmp_path / "0.04", tmp_path / "out")  # plain weights: what was merged, in plain transformers
    plain = CLIPModel.from_pretrained(tmp_path / "out").state_dict()
    saved = load_file(next((tmp_path / "0.04").glob("task_02*")) / "weights.safetensors")
    assert saved and all(torch.equal(plain[name], tensor) for name, tensor in saved.items())
