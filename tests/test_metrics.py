"""Figures of the accuracy matrix, against the release's own numbers and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from perdure.ops import metrics

GOLDEN = Path(__file__).parent / "golden"


def with_row_zero(rows: np.ndarray) -> np.ndarray:
    """The release's matrices begin after the first task; row 0 must not matter for what it computes."""
    return np.vstack([np.full(rows.shape[1], -1e6), rows])


@pytest.mark.parametrize("case", ["m4_0", "m4_1", "m11"])
def test_release_numbers(case: str) -> None:
    expected = json.loads((GOLDEN / "metrics_a.json").read_text())["expected"][case]
    a = with_row_zero(load_file(GOLDEN / "metrics_a.safetensors")[case])
    ours = {
        "Avg.": metrics.average(a), "Last": metrics.last(a), "Transfer": metrics.transfer(a),
        "Forget": metrics.backward_transfer(a),
    }  # fmt: skip
    for name, value in expected["unrounded_by_driver"].items():
        assert ours[name] == pytest.approx(value, abs=1e-9)
        assert f"{ours[name]:.2f}" == expected["official_strings"][name]


def test_by_hand() -> None:
    a = [[10, 20, 30], [90, 25, 28], [80, 70, 20], [85, 60, 50]]
    assert metrics.transfer(a) == pytest.approx((25 + (28 + 20) / 2) / 2)
    assert metrics.last(a) == pytest.approx((85 + 60 + 50) / 3)
    assert metrics.forgetting(a) == pytest.approx(((90 - 85) + (70 - 60)) / 2)
    assert metrics.backward_transfer(a) == pytest.approx(((85 - 90) + (60 - 70)) / 2)
    assert metrics.forward_transfer(a) == pytest.approx(((25 - 20) + (20 - 30)) / 2)
    assert metrics.incremental([80, 60, 40]) == (60, 40)


def test_forgetting_counts_from_the_best_since_learned() -> None:
    a = [[99, 0], [50, 0], [60, 70]]  # the zero-shot 99 came before learning and is no loss; nothing was forgotten
    assert metrics.forgetting(a) == -10
    b = [[0, 0, 0], [50, 0, 0], [60, 0, 0], [40, 0, 0]]
    assert metrics.forgetting(b) == pytest.approx(20 / 2)


def test_many_matrices_at_once() -> None:
    stack = np.random.default_rng(0).random((5, 4, 3)) * 100
    for figure in metrics.FIGURES.values():
        np.testing.assert_allclose(np.array(figure(stack)), np.array([figure(a) for a in stack]))


def test_one_task_has_no_transfer() -> None:
    assert metrics.transfer([[5], [50]]) is None
    assert metrics.forgetting([[5], [50]]) is None
    assert metrics.last([[5], [50]]) == 50


@pytest.mark.parametrize("shape", [(3, 3), (2,), (1, 0), (2, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="T \\+ 1 rows"):
        metrics.average(np.zeros(shape))


def test_bootstrap_interval_covers_and_narrows() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (50, 5000):
        hits = rng.random((2, n)) < 0.7
        samples = metrics.resampled(hits, 400, np.random.default_rng(1))
        assert samples.shape == (400, 2)
        low, high = metrics.interval(samples[:, 0])
        assert low <= 100 * hits[0].mean() <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5
    # binomial standard error at n = 5000 and p = 0.7 is 0.65 points: the interval is about four of them
    assert widths[1] == pytest.approx(4 * 0.65, rel=0.25)


def test_bootstrap_takes_the_same_images_in_every_row() -> None:
    hits = np.random.default_rng(0).random((1, 200)) < 0.5
    samples = metrics.resampled(np.vstack([hits, hits]), 50, np.random.default_rng(0))
    np.testing.assert_array_equal(samples[:, 0], samples[:, 1])


def test_the_figures_of_x_tail_are_its_authors() -> None:
    """Their matrix has no row before training; Transfer, Average and Last leave ours out."""
    t = load_file(GOLDEN / "rail_a.safetensors")
    for form in ("primal", "dual"):
        matrix = with_row_zero(t[f"{form}/accuracy"])
        found = [figure(matrix) for figure in (metrics.transfer, metrics.average, metrics.last)]
        assert found == pytest.approx(t[f"{form}/summary"].tolist(), rel=1e-5)
