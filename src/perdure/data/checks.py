"""What can be wrong with classes and images, said by name before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import Formatter
from typing import Any

import torch
from torch import Tensor

from perdure.core.errors import PerdureError


def places_in(template: str) -> list[str]:
    """What stands between the braces of a template; ``["}"]`` where they do not fit together."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError:
        return ["}"]
    return [place + (form or "") + (turn or "") for _, place, form, turn in parts if place is not None]


def are_pixels(value: Any) -> bool:
    """Whether a value can be images: a tensor (N, 3, H, W) of uint8 or floats, or files and the like, which read when asked."""
    if not isinstance(value, Tensor):
        return hasattr(value, "split") and hasattr(value, "__len__") and not isinstance(value, str | bytes)
    kind = value.dtype == torch.uint8 or value.is_floating_point()
    return kind and value.ndim == 4 and value.shape[1] == 3 and 0 not in value.shape[2:]


def check_labels(labels: Tensor, classes: Sequence[Any], where: str) -> None:
    """Refuse labels that are no places in ``classes``."""
    if not classes:
        raise PerdureError(f"{where} has no classes.")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise PerdureError(
            f"{where}: labels must lie in 0 … {len(classes) - 1}, these lie in {int(labels.min())} … {int(labels.max())}."
        )


def described(value: Any) -> str:
    """A value in words: ``float32 (8, 3, 32, 32)``, or its type."""
    if not isinstance(value, Tensor):
        return f"a value of type {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def check_range(pixels: Any, where: str) -> None:
    """Refuse floats that do not lie in 0 … 1."""
    if isinstance(pixels, Tensor) and pixels.is_floating_point():
        low, high = pixels.min().item(), pixels.max().item()
        if not (low >= 0 and high <= 1):
            raise PerdureError(
                f"{where}: images as floats must lie in 0 … 1, these in {low:g} … {high:g}. Give uint8, or divide by 255; "
                "what the model subtracts and divides by is done later."
            )


def check_templates(one: Any) -> None:
    """Refuse templates of a class that do not hold exactly one ``{}``."""
    for template in one.templates:
        if places_in(template) != [""]:
            raise PerdureError(
                f"The template '{template}' (of the class '{one.name}') must hold exactly one {{}}, where the name goes."
            )


def check_texts(classes: Sequence[Any], clip: Any, where: str) -> None:
    """Refuse prompts that the text tower would cut, and classes that it could not tell apart."""
    for one in classes:
        check_templates(one)
    if not classes:
        return
    prompts = [one.prompts() for one in classes]
    rows = iter(map(tuple, clip.tokens([p for own in prompts for p in own]).tolist()))
    known: dict[tuple[Any, ...], str] = {}
    for one, own in zip(classes, prompts, strict=True):
        ids = tuple(next(rows) for _ in own)
        if ids in known:
            raise PerdureError(
                f"{where}: the classes '{known[ids]}' and '{one.name}' have one text, so that the model cannot tell them "
                "apart. Give one of them another name or template."
            )
        known[ids] = one.name


def say_alike(tasks: Sequence[Any]) -> str:
    """What to say where the classes of all tasks compete and two of different tasks have one text; empty: none have."""
    homes: dict[tuple[str, ...], list[str]] = {}
    for task in tasks:
        for one in task.classes:
            homes.setdefault(tuple(one.prompts()), []).append(f"'{one.name}' of {task.name}")
    shared = [own for own in homes.values() if len(own) > 1]
    if not shared:
        return ""
    return (
        f"labels=all: {len(shared)} classes have one text in several tasks ({' and '.join(shared[0])}), by which no model can "
        "tell them apart: images of one are counted as wrong. labels=task keeps tasks apart."
    )


def say_alone(task: Any, warn: Callable[[str], None]) -> None:
    """Warn of a task whose only class is right by itself."""
    if len(task.classes) == 1 and len(task.train):
        warn(
            f"{task.name} has one class, {task.classes[0].name}. Cross entropy over a task's own classes is 0 where there is "
            "one: it teaches nothing. Put classes together in a task, or take a method that solves a head (ridge, ncm)."
        )
