"""Figures of an accuracy matrix, each a pure function of it.

``A`` is (T + 1, T), per cent: row 0 before any task, row i after task i; one column a task. The definitions of Transfer,
Average and Last are those of ZSCL (Zheng et al., 2023) as GIFT's release computes them, which leave row 0 out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


def checked(matrix: ArrayLike) -> Matrix:
    """(…, T + 1, T) as float64; ``ValueError`` for any other shape."""
    a = np.asarray(matrix, dtype=np.float64)
    if a.ndim < 2 or a.shape[-2] != a.shape[-1] + 1 or a.shape[-1] < 1:
        raise ValueError(f"an accuracy matrix has T + 1 rows and T columns, not the shape {a.shape}")
    return a


def transfer(matrix: ArrayLike) -> Matrix | None:
    """Zero-shot accuracy kept: for each task but the first, the mean over the rows before it is learned (row 0 left out),
    then the mean over tasks. None for a single task."""
    a = checked(matrix)[..., 1:, :]
    tasks = a.shape[-1]
    return np.mean([a[..., :j, j].mean(-1) for j in range(1, tasks)], axis=0) if tasks > 1 else None


def average(matrix: ArrayLike) -> Matrix:
    """The mean of all entries after the first task: every task, at every time, learned or not."""
    return checked(matrix)[..., 1:, :].mean((-1, -2))


def last(matrix: ArrayLike) -> Matrix:
    """The mean of the last row."""
    return checked(matrix)[..., -1, :].mean(-1)


def forgetting(matrix: ArrayLike) -> Matrix | None:
    """Accuracy lost (Chaudhry et al., 2018): the best from when the task was learned until before the last row, minus the
    last row, averaged over all tasks but the last one. Positive means lost. None for a single task."""
    a = checked(matrix)[..., 1:, :]
    tasks = a.shape[-1]
    lost = [a[..., j:-1, j].max(-1) - a[..., -1, j] for j in range(tasks - 1)]
    return np.mean(lost, axis=0) if lost else None


def backward_transfer(matrix: ArrayLike) -> Matrix | None:
    """Last accuracy minus the accuracy just after learning (Lopez-Paz and Ranzato, 2017), averaged over all tasks but the
    last one. Negative means forgetting. GIFT's release calls this number Forget. None for a single task."""
    a = checked(matrix)[..., 1:, :]
    tasks = a.shape[-1]
    change = [a[..., -1, j] - a[..., j, j] for j in range(tasks - 1)]
    return np.mean(change, axis=0) if change else None


def forward_transfer(matrix: ArrayLike) -> Matrix | None:
    """Accuracy just before a task is learned minus its accuracy before any task (Lopez-Paz and Ranzato, 2017), averaged
    over all tasks but the first. None for a single task."""
    a = checked(matrix)
    change = [a[..., j, j] - a[..., 0, j] for j in range(1, a.shape[-1])]
    return np.mean(change, axis=0) if change else None


def incremental(after_each_step: ArrayLike) -> tuple[float, float]:
    """Class-incremental (average, last) of the accuracy over all classes seen, one value after each step."""
    steps = np.asarray(after_each_step, dtype=np.float64)
    return float(steps.mean()), float(steps[-1])


def performance_drop(after_each_step: ArrayLike) -> Matrix:
    """PD of few-shot class-incremental learning (Zhang et al., CVPR 2021): the accuracy over all classes seen after the first
    session minus that after the last, (…, sessions) → (…). Positive means lost."""
    steps = np.asarray(after_each_step, dtype=np.float64)
    return steps[..., 0] - steps[..., -1]


def base_and_new(row: ArrayLike, sizes: ArrayLike) -> tuple[Matrix, Matrix | None]:
    """Accuracies (…, T) of T tasks with so many images (T,) → of the first, and over all images of the others; None for one
    task."""
    a, n = np.asarray(row, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    return a[..., 0], (a[..., 1:] @ n[1:]) / n[1:].sum() if a.shape[-1] > 1 else None


def harmonic_mean(a: ArrayLike, b: ArrayLike) -> Matrix:
    """2ab/(a + b); 0 where both are 0."""
    one, two = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    total = one + two
    return 2 * one * two / np.where(total > 0, total, 1)


FIGURES: dict[str, Callable[[ArrayLike], Matrix | None]] = {
    "transfer": transfer,
    "average": average,
    "last": last,
    "forgetting": forgetting,
    "backward_transfer": backward_transfer,
    "forward_transfer": forward_transfer,
}


def resampled(correct: NDArray[np.bool_], draws: int, generator: np.random.Generator) -> Matrix:
    """Bootstrap over the images of one task: (rows, N) hits → (draws, rows) accuracies in per cent.

    One draw takes the same images for every row, as the rows are not independent: they are one model's course.
    """
    n = correct.shape[1]
    hits = correct.T.astype(np.float32)
    out = [generator.multinomial(n, np.full(n, 1 / n)).astype(np.float32) @ hits for _ in range(draws)]
    return 100 * np.asarray(out, dtype=np.float64) / n


def interval(samples: ArrayLike, level: float = 0.95) -> list[float]:
    """The percentile interval [low, high] of bootstrap samples along axis 0, rounded to 0.01."""
    tail = 50 * (1 - level)
    low, high = np.percentile(np.asarray(samples, dtype=np.float64), [tail, 100 - tail], axis=0)
    return [round(float(low), 2), round(float(high), 2)]
