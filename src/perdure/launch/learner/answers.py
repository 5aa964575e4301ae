"""What pictures show: answers of a model in use, a row a picture."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from perdure.core.errors import DamagedFile, PerdureError
from perdure.core.paths import expanded
from perdure.data.checks import are_pixels, check_range, check_texts
from perdure.data.files import Files, readers, stacked
from perdure.data.folders import PICTURES, hidden
from perdure.data.places import InMemory
from perdure.data.task import Class, Query
from perdure.engine.home import Learned, all_classes
from perdure.methods.base import Expert, Method
from perdure.models.clip import CLIP

Answer = dict[
    str, Any
]  # path, label, score, task, expert, weight; top: more labels; why: concepts; error: why there is none
Shown = str | Path | Sequence[str | Path | InMemory] | Tensor
BATCH = 256
TEMPLATES = ("a photo of a {}.",)


def answered(
    method: Method, learned: Sequence[Learned], images: Shown, classes: Sequence[str] | None, topk: int,
    explain: bool = False,
) -> list[Answer]:  # fmt: skip
    """A row a picture, in the order given: ``path``, ``label``, ``score`` (its probability among the classes asked for),
    ``task`` (that taught the class; None: none did), ``expert`` (whose say was largest) and its ``weight``. A picture that
    cannot be read has ``error`` instead of an answer. ``explain``: with ``why``, the concepts that decided and what each
    contributed to the label's logit, the weightiest first."""
    if explain and not method.explains():
        method.explain(Query(torch.empty(0), ()), ())  # which says that it cannot
    asked = competing(learned, classes)
    check_texts(asked, method.clip, "The classes asked for")
    if not topk >= 1:
        raise PerdureError(f"topk is a number from 1 on, not {topk}.")
    taught = {c: one.name for one in reversed(learned) for c in one.classes}
    out: list[Answer] = []
    for paths, pixels, troubles in batches(images, method.clip):
        rows = iter(rows_of(method, pixels, asked, taught, topk, explain) if len(pixels) else [])
        for path, trouble in zip(paths, troubles, strict=True):
            out.append({"path": path, "error": trouble} if trouble else {"path": path, **next(rows)})
    return out


def rows_of(
    method: Method, pixels: Tensor, asked: Sequence[Class], taught: dict[Class, str], topk: int, explain: bool = False
) -> Iterator[Answer]:
    """The answers for images (N, 3, H, W) of one batch."""
    answer, experts = method.answered([Query(pixels, asked)])[0]
    scores, order = probabilities(method, answer).cpu().sort(dim=1, descending=True, stable=True)
    names, weights = loudest(experts, len(pixels))
    reasons = method.explained(Query(pixels, asked), order[:, 0].tolist()) if explain else []
    for k in range(len(pixels)):
        best = asked[int(order[k, 0])]
        row = {
            "label": best.name, "score": round(scores[k, 0].item(), 6), "task": taught.get(best), "expert": names[k],
            "weight": round(weights[k], 4),
        }  # fmt: skip
        if topk > 1:
            row["top"] = [
                {"label": asked[int(place)].name, "score": round(score, 6)}
                for place, score in zip(order[k, :topk], scores[k, :topk].tolist(), strict=True)
            ]
        if explain:
            row["why"] = [{"concept": what, "contribution": round(share, 4)} for what, share in reasons[k]]
        yield row


def probabilities(method: Method, answer: Tensor) -> Tensor:
    """(N, C): a head's answers are probabilities already, the others' are logits."""
    sums = answer.sum(1)
    already = bool((answer >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
    return answer if already else method.clip.probabilities(answer)


def loudest(experts: Sequence[Expert], count: int) -> tuple[list[str], list[float]]:
    """The expert with the largest gate for each of ``count`` images, by name, and its share of all gates."""
    gates = torch.stack([torch.as_tensor(e.gate, dtype=torch.float32).cpu().expand(count) for e in experts], 1)
    shares, places = (gates / gates.sum(1, keepdim=True)).max(1)
    return [experts[k].name for k in places.tolist()], shares.tolist()


def names_in(text: str) -> list[str]:
    """The names in a text, with commas between; one that holds a comma stands in quotation marks."""
    try:
        found = [name for row in csv.reader([" ".join(text.split())], skipinitialspace=True) for name in row]
    except csv.Error:  # longer than any name
        found = text.split(",")
    return [name for name in map(str.strip, found) if name]


def competing(learned: Sequence[Learned], words: Sequence[str] | None) -> tuple[Class, ...]:
    """The classes that a question is about: those of ``words`` (as they were learned, where they were), or all learned."""
    known = all_classes([one.task(k) for k, one in enumerate(learned)])
    if words is None:
        if not known:
            raise PerdureError("Nothing is learned yet: say which classes to tell apart, as --classes cat,dog.")
        return known
    by_name = {c.name.lower(): c for c in reversed(known)}
    wanted = [" ".join(word.split()) for word in words if word.strip()]
    if len(set(map(str.lower, wanted))) < len(wanted) or len(wanted) < 2:
        raise PerdureError(
            f"Give two or more classes, each once, as --classes cat,dog; these are: {', '.join(wanted) or 'none'}."
        )
    return tuple(by_name.get(word.lower(), Class(word, known[0].templates if known else TEMPLATES)) for word in wanted)


def batches(images: Shown, clip: CLIP) -> Iterator[tuple[list[str], Tensor, list[str]]]:
    """Pictures in batches: their names, those that can be read (n, 3, H, W), and what is wrong with each, or nothing."""
    if isinstance(images, Tensor):
        if not are_pixels(images):
            raise PerdureError(
                f"Images in memory are (N, 3, H, W), uint8 or float in 0 … 1, not {tuple(images.shape)}."
            )
        check_range(images, "The images")
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            yield [str(start + k) for k in range(len(some))], some, [""] * len(some)
        return
    paths, reader = listed(images), Reader(clip)
    ready = readers().map(reader, paths[:BATCH])
    for start in range(0, len(paths), BATCH):
        following = readers().map(reader, paths[start + BATCH : start + 2 * BATCH])  # while the model looks at these
        read, ready = list(ready), following
        pixels = stacked((x for x in read if not isinstance(x, str)), clip.size)
        yield [str(p) for p in paths[start : start + BATCH]], pixels, [x if isinstance(x, str) else "" for x in read]


class Reader:
    """Reads a picture as the model sees it, or says what is wrong with it."""

    def __init__(self, clip: CLIP):
        self.files = Files((), *clip.view)

    def __call__(self, path: Path | InMemory) -> Image.Image | str:
        try:
            return self.files.read(path)
        except DamagedFile as error:
            return str(error)


def listed(images: str | Path | Sequence[str | Path | InMemory]) -> list[Path | InMemory]:
    """The pictures that are meant: files as they are, of folders all pictures below them, sorted."""
    out: list[Path | InMemory] = []
    several = [images] if isinstance(images, str | Path) else images
    if not isinstance(several, Sequence) or not all(isinstance(one, str | Path | InMemory) for one in several):
        raise PerdureError(
            "Pictures are paths, folders, a list of them, or a tensor (N, 3, H, W), uint8 or float in 0 … 1; a picture of "
            "Pillow or an array becomes one by torchvision.transforms.functional.pil_to_tensor(…)[None]."
        )
    for one in several:
        if isinstance(one, InMemory):
            out.append(one)
            continue
        path = expanded(one)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
            found = [p for p in inside if not hidden(p.relative_to(path))]
            if not found:
                raise PerdureError(f"{path} holds no pictures ({', '.join(PICTURES)}).")
            out += found
        else:
            out.append(path)
    if not out:
        raise PerdureError("No pictures are given. Give files or folders.")
    return out
