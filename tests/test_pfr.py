"""PFR against the numbers of its release, through the method and the loop; its switches; and learning without labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import case, part
from features import probed, tasks, taught
from gift_step import Given
from test_gift import some_pairs
from test_learner import drawings  # noqa: F401
from torch import Tensor, nn
from typer.testing import CliRunner

from perdure import Learner
from perdure.cli import app
from perdure.core.errors import PerdureError
from perdure.core.seeding import derive
from perdure.data.task import Batch, Class, Context, Images, Stream, Task
from perdure.data.views import distorted
from perdure.methods.base import Method
from perdure.methods.pfr import PFR, Seen
from perdure.models.clip import CLIP
from perdure.models.held import Held
from perdure.ops.losses import projected
from perdure.synthesis.store import Pairs
from perdure.training.fit import Accumulator, batches, fit, optimise
from perdure.training.schedule import Schedule

QUICK: dict[str, Any] = {"iterations": 2, "warmup": 0, "batch_size": 8, "barlow_width": 16}


class Encoder(Held):
    """A case's encoder in the place of a CLIP: its features are its embeddings."""

    device = torch.device("cpu")

    def __init__(self, tensors: dict[str, Tensor]):
        weight = tensors["0.weight"]
        super().__init__(nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]), nn.Tanh()))
        self.backbone.load_state_dict(tensors)
        self.width = len(weight)

    def image_features(self, x: Tensor) -> Tensor:
        return self.backbone(x)


class Recorded(PFR):
    """With the projectors that a case begins with and the views that it has; notes the first gradients."""

    begins_with: dict[str, Tensor]
    first: dict[str, Tensor] | None = None

    def heads(self) -> dict[str, nn.Module]:
        out = super().heads()
        out["projector"].load_state_dict(part(self.begins_with, "distill_predictor."))
        weight = self.begins_with["projector.weight"]
        out["own"] = nn.Linear(weight.shape[1], weight.shape[0])
        out["own"].load_state_dict(part(self.begins_with, "projector."))
        return out

    def views(self, images: Tensor) -> list[Tensor]:
        return list(images.unbind(1))

    def stepped(self, step: int) -> None:
        self.now = {n: p.detach().clone() for n, p in {**self.beside.state_dict(), **self.clip.state_dict()}.items()}

    def step(self, batch: Batch, backward: Any) -> None:
        def noted(**losses: Tensor) -> Any:
            found = backward(**losses)
            self.first = self.first or found
            return found

        super().step(batch, noted)  # type: ignore[arg-type]


NAMES = {"projector.": "distill_predictor.", "own.": "projector.", "backbone.": "encoder."}


def theirs(name: str) -> str:
    name = name.removeprefix("beside.")
    mine = next((one for one in NAMES if name.startswith(one)), "")
    return NAMES[mine] + name.removeprefix(mine) if mine else f"encoder.{name}"


@pytest.mark.parametrize("name", ["pfr_a"])
def test_losses_gradients_and_weights_are_the_release_s(name: str) -> None:
    about, t = case(name)
    h, allowed = about["hyper_parameters"], about["tolerance"]
    method = Recorded(
        own="barlow", lam=h["lambda"], barlow_off_diagonal=h["barlow_offdiagonal"], barlow_scale=h["barlow_scale"]
    )
    method.begins_with = part(t, "start/")
    method.clip, method.context = Encoder(part(method.begins_with, "encoder.")), Context()  # type: ignore[assignment]
    none = Images(torch.zeros(1, 3, 1, 1), torch.zeros(1, dtype=torch.long))
    method.begin_task(Task("second", (), none, none, index=1, labelled=False))
    assert method.old is not None and not any(p.requires_grad for p in method.old.parameters())
    method.old.backbone.load_state_dict(part(method.begins_with, "frozen_encoder."))  # the case's has moved on already

    def draws() -> Iterator[Batch]:
        for k in range(h["steps"]):
            yield Batch(torch.stack([t[f"view1_{k}"], t[f"view2_{k}"]], 1), torch.zeros(h["batch"], dtype=torch.long))

    frozen = method.old.backbone
    plan = Schedule(h["steps"], h["lr"], 0, h["batch"], optimizer="sgd", momentum=0.0, milestones=(10**9,))
    losses = optimise(method, plan, draws(), torch.device("cpu"))
    for mine, their in (("task", "own_loss"), ("distil", "distill")):
        wanted = [step[their] for step in about["steps"]]
        assert losses[mine] == pytest.approx(wanted, rel=allowed["losses_relative"], abs=1e-6), mine
    excluded = ("distill_predictor.0.bias", "projector.bias")
    assert method.first is not None and len(method.first) == len(part(t, "grad_first/"))
    for n, gradient in method.first.items():
        wanted_gradient = t[f"grad_first/{theirs(n)}"]
        if theirs(n) not in excluded:
            far = (gradient - wanted_gradient).norm() / wanted_gradient.norm()
            assert far < allowed["gradients_relative_l2"], n
    compared = [n for n in method.now if theirs(n) not in excluded and "num_batches" not in n]
    assert len(compared) == len([k for k in part(t, "end/") if k not in excluded])
    assert all(torch.equal(p, t[f"start/frozen_encoder.{n}"]) for n, p in frozen.state_dict().items())
    for n in compared:
        assert torch.allclose(method.now[n], t[f"end/{theirs(n)}"], rtol=0, atol=allowed["weights_abs"]), n


def begun(clip: CLIP, task: Task, **values: Any) -> Any:
    method = PFR(**{**QUICK, **values})
    method.bind(clip, Context(tasks=(task,)))
    method.begin_task(task)
    return method


def losses_of(method: PFR, task: Task, count: int = 6) -> dict[str, float]:
    found: dict[str, Tensor] = {}
    batch = Batch(task.train.pixels[:count] / 255, task.train.labels[:count])
    method.step(batch, Accumulator(method.parameters(), found))
    return {name: loss.item() for name, loss in found.items()}


def test_what_is_distilled_and_when(clip: CLIP, stream: Stream) -> None:
    task = stream.tasks[0]
    second = replace(stream.tasks[1], index=1)
    assert set(losses_of(begun(clip, task), task)) == {"task", "distil"}
    assert set(losses_of(begun(clip, task, first_task="own"), task)) == {"task"}
    assert set(losses_of(begun(clip, second, first_task="own"), second)) == {"task", "distil"}
    assert set(losses_of(begun(clip, second, distil="none"), second)) == {"task"}
    assert set(losses_of(begun(clip, second, sides="both"), second)) == {"task", "distil", "distil_text"}
    direct = begun(clip, second, distil="direct", lam=0.5, sides="both")  # nothing has moved: all cosines are 1
    found = losses_of(direct, second)
    assert found["distil"] == pytest.approx(-0.5, abs=1e-5) and found["distil_text"] == pytest.approx(-0.5, abs=1e-5)
    assert set(losses_of(direct, second, count=1)) == {"task", "distil_text"}  # batch norm needs two images
    plain = Method()
    plain.bind(clip)
    plain.begin_task(second)
    batch = Batch(second.train.pixels[:6] / 255, second.train.labels[:6])
    assert found["task"] == pytest.approx(plain.task_loss(batch).item(), rel=1e-5)


@pytest.mark.parametrize(("values", "width"), [({"features": "pooled"}, 192), ({"features": "embedding"}, 128)])
def test_two_views_are_two_terms_each_through_p_alone(
    values: dict[str, Any], width: int, clip: CLIP, stream: Stream
) -> None:
    task = stream.tasks[0]
    method = begun(clip, task, views=2, lam=0.7, **values)
    assert [m.in_features for m in method.beside["projector"] if isinstance(m, nn.Linear)] == [width, width // 2]
    shown: list[Tensor] = []
    views = method.views

    def kept(images: Tensor) -> list[Tensor]:
        shown[:] = views(images)
        return shown

    method.views = kept
    found = losses_of(method, task)
    assert not torch.equal(*shown) and torch.equal(shown[0], task.train.pixels[:6] / 255)
    fs: list[Seen] = [method.encode(clip, view) for view in shown]  # nothing has moved: g is f
    terms = [projected(f, f, method.beside["projector"]).item() for f, _ in fs]
    assert found["distil"] == pytest.approx(0.7 * sum(terms) / 2, rel=1e-5)
    parts = [F.normalize(raw, dim=1) for _, raw in fs]
    wanted = [method.classify(x, task.train.labels[:6]).item() for x in parts]
    assert found["task"] == pytest.approx(sum(wanted) / 2, rel=1e-5)


def test_projectors_are_new_with_each_task_and_no_state(clip: CLIP, stream: Stream) -> None:
    method = PFR(**QUICK, own="barlow")
    method.bind(clip, stream.context())
    seen = []
    for task in stream.tasks[:2]:
        method.begin_task(task)
        seen.append({n: p.detach().clone() for n, p in method.parameters().items() if n.startswith("beside.")})
        losses = fit(method, task, torch.Generator().manual_seed(0), clip.size, clip.device)
        assert set(losses) == {"task", "distil"} and all(map(torch.isfinite, torch.tensor(losses["task"])))
        assert not any(n.startswith("beside.") for n in method.parameters()) and method.old is None
    assert seen[0].keys() == seen[1].keys() and not torch.equal(
        seen[0]["beside.own.0.weight"], seen[1]["beside.own.0.weight"]
    )
    assert not method.modules() and method.pack_state() == ({}, {})


def test_labels_are_not_looked_at_by_barlow_twins(clip: CLIP, stream: Stream) -> None:
    task = stream.tasks[0]
    wrong = replace(task, train=replace(task.train, labels=task.train.labels.flip(0)))
    ends = []
    for one in (task, wrong, replace(task, classes=(), labelled=False)):
        clip.load_weights("pretrained", clip.pretrained)
        torch.manual_seed(3)
        method = PFR(**QUICK, own="barlow" if one.labelled else "labels")
        method.bind(clip, Context())
        method.begin_task(one)
        fit(method, one, torch.Generator().manual_seed(0), clip.size, clip.device)
        clip.trained("taught")
        ends.append(clip.weights())
    assert all(torch.equal(ends[0][n], other[n]) for other in ends[1:] for n in other)
    assert not all(torch.equal(ends[0][n], w) for n, w in clip.pretrained.items())


def test_views_are_drawn_and_stay_pictures() -> None:
    images = torch.rand(16, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    one, again, other = (distorted(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == images.shape and float(one.min()) >= 0 and float(one.max()) <= 1
    grey = (one[:, 0] == one[:, 1]).flatten(1).all(1)
    assert 0 < int(grey.sum()) < 16


def test_what_cannot_move_is_refused(clip: CLIP) -> None:
    with pytest.raises(PerdureError, match="towers=text: PFR holds image features"):
        PFR(towers="text").bind(clip)
    with pytest.raises(PerdureError, match="sides=both: the texts cannot move"):
        PFR(towers="image", sides="both").bind(clip)


@pytest.mark.parametrize("features", ["embedding", "pooled"])
def test_synthetic_images_may_be_what_is_asked_of(features: Any, clip: CLIP, stream: Stream) -> None:
    """f and g of the pairs' images, g of the model that the task began with; two terms never, whatever the views."""
    task, lam = stream.tasks[0], 0.7
    method = PFR(
        **QUICK, distil_on="synthetic", distil="direct", lam=lam, synthetic_batch=5, features=features, views=2
    )
    method.bind(clip, stream.context())
    method.replay = Given(some_pairs(stream))  # type: ignore[assignment]
    method.begin_task(task)
    images = method.synthetic
    before = method.encode(clip, images)[0].detach()
    with torch.no_grad():
        for name, weight in clip.backbone.named_parameters():
            if clip.part_of(name) == "image":
                weight.mul_(1.05)
    order = torch.Generator().manual_seed(derive(method.context.seed, task.name, "order of the pairs"))
    drawn = batches(len(images), 5, order)
    for _ in range(2):
        index = next(drawn)
        f = method.encode(clip, images[index])[0]
        wanted = -lam * F.cosine_similarity(f, before[index]).mean().item()
        assert losses_of(method, task)["distil"] == pytest.approx(wanted, rel=1e-5) and wanted > -0.999 * lam
    assert method.old is None and len(losses_of(method, task, count=1)) == 2  # of the task's batch D asks nothing


def test_earlier_tasks_are_drawn_too_and_where_nothing_can_be_drawn_it_is_said(clip: CLIP, stream: Stream) -> None:
    method, asked = PFR(**QUICK, distil_on="synthetic"), list[Any]()
    method.bind(clip, stream.context())

    class Noted(Given):
        def pairs(self, task: str, learned: list[str]) -> Pairs:
            asked.append((task, learned))
            return super().pairs(task, learned)

    method.replay = Noted(some_pairs(stream))  # type: ignore[assignment]
    for number in (0, 2):
        method.begin_task(replace(stream.tasks[number], index=number))
    first, second, third = stream.tasks[:3]
    assert asked == [(first.name, []), (third.name, [*first.prompts(), *second.prompts()])]
    with pytest.raises(PerdureError, match="distil_on=synthetic: this stream has no generator.*Set distil_on=task"):
        PFR(distil_on="synthetic").bind(clip, Context())


# ---- a model in use


@pytest.fixture
def heap(tmp_path: Path, drawings: Path) -> Path:  # noqa: F811
    """Pictures of no class, in folders and beside them."""
    base = tmp_path / "heap"
    for k, path in enumerate(sorted((drawings / "digits").rglob("*.png"))[:20]):
        place = base / ("deeper" if k % 2 else "") / f"{k}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    return base


@pytest.mark.slow
def test_a_model_in_use_learns_pictures_without_labels(tmp_path: Path, heap: Path, drawings: Path) -> None:  # noqa: F811
    home, runner = tmp_path / "HOME", CliRunner()
    quick = [f"{key}={value}" for key, value in {**QUICK, "precision": "fp32"}.items()]
    first = ["learn", str(home), str(heap), "--unlabelled", "--probe", str(drawings.parent / "probe"), *quick]
    done = runner.invoke(app, [*first, "--max-loss", "100"])
    assert done.exit_code == 0, done.output
    learner = Learner(home)
    assert learner.config["method"] == "pfr"
    (one,) = learner.history()
    assert one["about"]["classes"] == [] and one["about"]["train"] == 20 and len(one["about"]["marks"]) == 20
    assert [row["name"] for row in one["rows"]] == ["probe"] and one["rows"][0]["before"] is not None
    assert set(one["losses"]) == {"task", "distil"}
    again = learner.learn(heap, unlabelled=True)
    assert again[0].already
    taught = learner.learn(drawings / "animals", max_loss=100)  # with labels, in the same model
    assert [row.name for row in taught[0].rows] == ["animals", "probe"]
    assert learner.predict(next(iter(sorted((drawings / "animals").rglob("*.png")))))[0]["label"]
    assert [row.name for row in learner.evaluate()] == ["animals", "probe"]
    learner.export(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- **heap**: pictures without labels" in card and "perdure learn HOME heap/ --unlabelled" in card
    assert learner.undo(0) == ["task_02_animals", "task_01_heap"]


def test_pictures_without_labels_are_refused_to_what_needs_them(tmp_path: Path, heap: Path) -> None:
    with pytest.raises(PerdureError, match="ridge learns from labels, and --unlabelled pictures have none"):
        Learner(tmp_path / "HOME", method="ridge").learn(heap, unlabelled=True)
    assert not (tmp_path / "HOME").exists()
    with pytest.raises(PerdureError, match="no folder. Pictures without labels are learned from a folder"):
        Learner(tmp_path / "HOME").learn(tmp_path / "nowhere", unlabelled=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PerdureError, match="holds no picture"):
        Learner(tmp_path / "HOME").learn(tmp_path / "empty", unlabelled=True)
    planned = Learner(tmp_path / "HOME").learn(heap, unlabelled=True, dry_run=True)
    assert "heap would be learned: 20 pictures without labels." in str(planned) and not (tmp_path / "HOME").exists()


@pytest.mark.slow
def test_old_features_survive_better_than_under_plain_fine_tuning() -> None:
    """Of the first task, after the second, by a linear probe, at a rate that hurts; see docs/pfr.md for the rest."""
    values = {"iterations": 12, "warmup": 1, "lr": 2e-3, "lam": 5.0}
    plain, held = (taught("pfr", {**values, "distil": kind}, 0) for kind in ("none", "projected"))
    assert probed(held, tasks()[0]) > probed(plain, tasks()[0]) + 5


def test_a_class_is_still_a_class() -> None:
    """A task without classes is one only where it says so."""
    none = Images(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(PerdureError, match="has no classes"):
        Task("x", (), none, none)
    assert Task("x", (), none, none, labelled=False).prompts() == []
    assert Task("x", (Class("a", ("{}",)),), none, none).labelled
