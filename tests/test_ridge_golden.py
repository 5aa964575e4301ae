"""Ridge against the numbers of RAIL's and RanPAC's released code, through the method, on tables of features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import case
from torch import Tensor, nn

from perdure.core.features import Features
from perdure.data.task import Class, Context, Images, Query, Task
from perdure.methods.base import Expert
from perdure.methods.ridge import Ridge


class Table(nn.Module):
    """What stands for a CLIP where its features are given: an image is the number of its row, in two bytes."""

    device, holds, remembers = torch.device("cpu"), "pretrained", False
    pretrained: dict[str, Tensor] = {}
    evaluation_batch = 256

    def __init__(self, rows: Tensor, texts: Tensor, scale: float):
        super().__init__()
        self.rows, self.texts, self.scale, self.backbone = rows, F.normalize(texts, dim=1), scale, nn.Module()

    def features(self, pixels: Tensor) -> Features:
        number = pixels[:, 0, 0, 0].long() * 256 + pixels[:, 1, 0, 0]
        x = self.rows[number]
        return Features(F.normalize(x, dim=1), x, x[:, :0])

    def encode_image(self, images: Tensor) -> Tensor:
        return self.features(images).embedded

    def class_texts(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        return self.texts[[int(own[0]) for own in prompts]]

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.scale * images @ texts.T

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        yield

    def load_weights(self, name: str, weights: Any) -> None: ...

    def load_last(self) -> None: ...


def pictures(numbers: Tensor) -> Tensor:
    """(N, 3, 1, 1) uint8 that ``Table`` reads as these numbers."""
    return torch.stack([numbers // 256, numbers % 256, numbers * 0], 1).to(torch.uint8)[..., None, None]


def classes_of(numbers: Sequence[int]) -> tuple[Class, ...]:
    return tuple(Class(str(k), ("{}",)) for k in numbers)


def task_of(name: str, rows: Tensor, labels: Tensor, first: int, count: int) -> Task:
    images = Images(pictures(rows), labels - first)
    return Task(name, classes_of(range(first, first + count)), images, images)


def ready(t: dict[str, Tensor], texts: Tensor, projection: Tensor | None, **values: Any) -> Ridge:
    """The method on a case's table, its training images first, with the case's random layer."""
    method = Ridge(choose=values.pop("choose"), score="raw", **values)
    table: Any = Table(torch.cat([t["train/features"], t["test/features"]]), texts, 100.0)
    method.bind(table, Context(labels="all"))
    if projection is not None:
        method.head.lift.weights = projection
    return method


def relative(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).norm() / theirs.norm()).item()


def test_rail_is_the_release_s() -> None:
    about, t = case("rail_a")
    h = about["hyper_parameters"]
    method = ready(
        t, t["texts"], t["primal/projection"], choose="fixed", input="projected", features=h["hidden_dim"],
        lam=h["regularization"], weight=h["fusion_weight"], gate="argmax",
    )  # fmt: skip
    tests, total = torch.arange(len(t["test/labels"])) + len(t["train/labels"]), sum(h["task_sizes"])
    first = 0
    for number, size in enumerate(h["task_sizes"]):
        rows = ((t["train/labels"] >= first) & (t["train/labels"] < first + size)).nonzero().squeeze(1)
        method.calibrate(task_of(f"task {number}", rows, t["train/labels"][rows], first, size))
        first += size
        assert relative(method.head.solved(), t[f"primal/weight_task{number}"]) < 2e-4
        answer = method.predict(Query(pictures(tests), classes_of(range(total))))
        torch.testing.assert_close(answer, t[f"primal/fused_task{number}"], atol=1e-4, rtol=0)
        ends = torch.tensor([0, *h["task_sizes"]]).cumsum(0).tolist()
        for j, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
            own = (t["test/labels"] >= a) & (t["test/labels"] < b)
            hits = answer[own].argmax(1).eq(t["test/labels"][own]).double().mean().item()
            assert 100 * hits == pytest.approx(t["primal/accuracy"][number, j].item())


def test_without_the_gate_rail_s_answers_are_others() -> None:
    about, t = case("rail_a")
    h = about["hyper_parameters"]
    size = h["task_sizes"][0]
    rows = (t["train/labels"] < size).nonzero().squeeze(1)
    tests = pictures(torch.arange(len(t["test/labels"])) + len(t["train/labels"]))
    far = {}
    for gate in ("argmax", "none", "mass"):
        method = ready(
            t, t["texts"], t["primal/projection"], choose="fixed", input="projected", features=h["hidden_dim"],
            lam=h["regularization"], weight=h["fusion_weight"], gate=gate,
        )  # fmt: skip
        method.calibrate(task_of("first", rows, t["train/labels"][rows], 0, size))
        answer = method.predict(Query(tests, classes_of(range(sum(h["task_sizes"])))))
        far[gate] = (answer - t["primal/fused_task0"]).abs().max().item()
    assert far["argmax"] < 1e-4 < 1e-2 < min(far["none"], far["mass"])


@pytest.mark.parametrize("name", ["ranpac_a", "ranpac_dil_a"])
def test_ranpac_is_the_release_s(name: str) -> None:
    about, t = case(name)
    h = about["hyper_parameters"]
    layer = t.get("rp/projection")
    method = ready(
        t, torch.zeros(sum(h["task_sizes"]), h["dim"]), layer, choose="holdout", unit=False, features=h["M"], weight=1.0,
        gate="none",
    )  # fmt: skip
    first = 0
    for number, size in enumerate(h["task_sizes"]):
        domains = h["domain_incremental"]
        labels, count = t["train/labels"], size
        mine = t["train/domain"] == number if domains else (labels >= first) & (labels < first + size)
        rows = mine.nonzero().squeeze(1)
        drawn = torch.searchsorted(rows, t[f"rp/fit_rows_task{number}"])
        assert torch.equal(rows[drawn], t[f"rp/fit_rows_task{number}"])
        method.order = lambda task, drawn=drawn: drawn  # type: ignore[method-assign,misc]
        method.calibrate(task_of(f"task {number}", rows, labels[rows], 0 if domains else first, count))
        first = size if domains else first + size
        assert method.state.lam == pytest.approx(h["lambda_chosen"][str(number)])
        seen = t["test/domain"] <= number if domains else t["test/labels"] < first
        asked = Query(pictures(seen.nonzero().squeeze(1) + len(labels)), classes_of(range(first)))
        logits, theirs = method.predict(asked), t[f"rp/logits_task{number}"]
        assert relative(logits, theirs) < 1e-3
        top = theirs.topk(2, 1).values
        clear = (top[:, 0] - top[:, 1]) > 1e-3
        assert torch.equal(logits.argmax(1)[clear], theirs.argmax(1)[clear])
    assert method.stands_on() == Expert("pretrained", {})
