"""Some pictures of a run and the concepts that decided their answers, for its report."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from perdure.core.pixels import as_floats
from perdure.data.task import Query, Stream
from perdure.engine.evaluate import Protocol
from perdure.methods.base import Method

PICTURES, SIDE = 8, 64  # how many, and how large at most


def explanations(method: Method, stream: Stream, protocol: Protocol, seen: int) -> dict[str, Any]:
    """After ``seen`` tasks: by class the concepts that weigh most; and of test pictures of classes spread over the tasks, the
    answer and what decided, with the picture as a small PNG."""
    shown = []
    for j, index in spread(stream, seen):
        task = stream.tasks[j]
        classes, own = protocol.classes(stream, seen, j)
        pixels = task.test.pixels[torch.tensor([index])]
        query = Query(pixels, classes, j if protocol.task_id == "known" else None)
        best = int(method.predict(query).argmax())
        (why,) = method.explained(query, [best])
        label = classes[own + int(task.test.labels[index])].name
        shown.append(
            {"task": task.name, "label": label, "answer": classes[best].name, "why": why, "png": png(pixels[0])}
        )
    return {"classes": method.heaviest(), "pictures": shown}


def spread(stream: Stream, seen: int) -> list[tuple[int, int]]:
    """The first test picture of classes that lie evenly spread over the tasks seen: (task, number of the picture)."""
    firsts = [
        (j, int((task.test.labels == k).nonzero()[0]))
        for j, task in enumerate(stream.tasks[:seen])
        for k in task.test.labels.unique().tolist()
    ]
    places = torch.linspace(0, len(firsts) - 1, min(PICTURES, len(firsts))).round().long()
    return [firsts[k] for k in places.tolist()]


def png(image: Tensor) -> str:
    """An image (3, H, W) as a PNG of ``SIDE`` pixels at most, in base64."""
    values = (as_floats(image[None])[0].permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
    picture, out = Image.fromarray(values), io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
