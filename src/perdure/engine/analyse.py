"""What became of a model, task by task: margins, modality gap, how far weights and features moved, which experts agree."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from perdure.core.features import Features
from perdure.data.task import Images, Probe, Query, Stream, Task
from perdure.engine.evaluate import Protocol, for_gap, gap
from perdure.methods.base import Expert, Method
from perdure.models.clip import CLIP
from perdure.models.recompute import blocks_of
from perdure.ops.losses import positive_pull
from perdure.ops.margins import cka, class_margins, correlation, described, pair_margins
from perdure.ops.redundancy import effective_rank, mean_correlation

BLOCK = re.compile(r"\w+_model\.encoder\.layers\.(\d+)\.")
TEXTS = (
    512  # at a time, whatever ``evaluation_batch``: padded tokens, as many as the longest has, count in a block's means
)


@dataclass(frozen=True)
class Asked:
    """Test images of a task or of the probe, as the protocol asks about them, with the true places among the classes."""

    name: str
    query: Query
    labels: Tensor


def asked(stream: Stream, protocol: Protocol, seen: int, images: int) -> list[Asked]:
    """What is measured on after ``seen`` tasks: at most ``images`` test images of each task, and of the probe."""
    out = []
    for j, task in enumerate(stream.tasks):
        classes, own = protocol.classes(stream, seen, j)
        test = task.test.spread(images)
        query = Query(test.pixels, classes, j if protocol.task_id == "known" else None)
        out.append(Asked(task.name, query, test.labels + own))
    if stream.probe is not None:
        test = stream.probe.test.spread(images)
        out.append(Asked("probe", Query(test.pixels, stream.probe.classes), test.labels))
    return out


# ---- margins


@torch.no_grad()
def cosines(method: Method, queries: Sequence[Query]) -> list[Tensor]:
    """(N, C) each: the texts' own say, Σ gate × cosine of the experts over Σ gate, before any head has its."""
    clip, out = method.clip, []
    with clip.preserved():
        base, looked = method.head_expert(), ""
        for query in queries:
            if method.finalizes():
                method.load_expert(base)
                looked = clip.holds
                query = replace(query, features=method.look(query.images))
            total = torch.zeros(len(query.images), len(query.classes), device=clip.device)
            gates = torch.zeros(len(query.images))
            for expert in method.experts(query):
                gates += torch.as_tensor(expert.gate, dtype=torch.float32).cpu()
                method.add(expert, query, total, looked)
            total /= gates.clamp_min(1e-12).unsqueeze(1).to(total.device)
            out.append((total if clip.bias is None else total - clip.bias) / clip.scale)
    return out


def margins(method: Method, parts: Sequence[Asked]) -> dict[str, Any]:
    """By task, and of the probe: class margins in figures, and ``distance``, the mean squared one of images to their texts."""
    tau, out = 1 / method.clip.scale.item(), {}
    for part, found in zip(parts, cosines(method, [part.query for part in parts]), strict=True):
        labels = part.labels.to(found.device)
        own = found.gather(1, labels[:, None])
        out[part.name] = {**described(class_margins(found, labels), tau), "distance": (2 - 2 * own).mean().item()}
    return out


@torch.no_grad()
def of_pairs(clip: CLIP, images: Images, most: int) -> dict[str, Any] | None:
    """Pair margins of images with their captions, of at most ``most``, by the weights held now; None without captions."""
    some = images.spread(most)
    if some.captions is None or len(some) < 2:
        return None
    x, y = clip.embeddings(some.pixels), clip.encode_text(list(some.captions))
    return {**described(pair_margins(x, y), 1 / clip.scale.item()), "distance": positive_pull(x, y).item()}


# ---- drift


def newest(method: Method, parts: Sequence[Asked], seen: int) -> Expert:
    """The weights that stand for the model after ``seen`` tasks: where each task has an expert, the last task's."""
    if seen and not method.carries_weights:
        return method.experts(replace(parts[0].query, task=seen - 1))[0]
    return method.base_expert()


def part_of(clip: CLIP, name: str) -> str:
    """The part that a weight belongs to: ``image 3``, the third block; ``text rest``, what is in no block; ``scale``."""
    found, tower = BLOCK.match(name), clip.part_of(name)
    return tower if tower == "scale" else f"{tower} {int(found[1]) + 1 if found else 'rest'}"


def in_order(part: str) -> tuple[str, int]:
    """What puts parts in order: blocks by their numbers, the rest after them."""
    tower, _, block = part.partition(" ")
    return tower, int(block) if block.isdecimal() else 10**6


def weights_moved(clip: CLIP) -> dict[str, float]:
    """‖W - W₀‖ / ‖W₀‖ of each part, by the weights that ``clip`` holds and those it was born with."""
    away: dict[str, float] = {}
    whole: dict[str, float] = {}
    start = clip.pretrained
    for name, tensor in clip.weights().items():
        if name in start and tensor.is_floating_point():
            part = part_of(clip, name)
            away[part] = away.get(part, 0.0) + (tensor - start[name].to(tensor)).double().square().sum().item()
            whole[part] = whole.get(part, 0.0) + start[name].double().square().sum().item()
    return {p: (away[p] / whole[p]) ** 0.5 if whole[p] else 0.0 for p in sorted(whole, key=in_order) if p != "scale"}


class Listening:
    """Hears what each block of both towers gives, as means over tokens (N, H), and keeps what the image tower ``pooled``."""

    pooled: Tensor

    def __init__(self, clip: CLIP):
        self.clip = clip
        self.heard: dict[str, list[Tensor]] = {}

    def hear(self, name: str) -> Any:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            tokens = out[0] if isinstance(out, tuple) else out
            self.heard.setdefault(name, []).append(tokens.float().mean(1))

        return hook

    @torch.no_grad()
    def features(self, images: Sequence[Images], prompts: Sequence[str]) -> dict[str, Tensor]:
        """By block, and under ``rest`` of the embeddings themselves."""
        clip, hooks = self.clip, []
        for tower in ("image", "text"):
            for number, block in enumerate(blocks_of(clip, tower).values(), 1):
                hooks.append(block.register_forward_hook(self.hear(f"{tower} {number}")))
        try:
            seen = Features.cat([clip.features(one.pixels) for one in images])
            self.pooled, ends = seen.pooled, {"image rest": seen.embedded}
            texts = [clip.encode_text(prompts[k : k + TEXTS]) for k in range(0, len(prompts), TEXTS)]
            ends["text rest"] = torch.cat(texts)
        finally:
            for hook in hooks:
                hook.remove()
        return {**{name: torch.cat(found) for name, found in self.heard.items()}, **ends}


def block_features(clip: CLIP, stream: Stream) -> tuple[dict[str, Tensor], Tensor]:
    """What the blocks make of the images that the gap is measured on, and of all classes' prompts, by the weights held now; and
    what of these images is pooled."""
    parts: list[Task | Probe] = [*stream.tasks, *([stream.probe] if stream.probe else [])]
    prompts = list(dict.fromkeys(c.prompts()[0] for part in parts for c in part.classes))
    ears = Listening(clip)
    return ears.features([part.test for part in for_gap(stream)], prompts), ears.pooled


def spread(pooled: Tensor) -> dict[str, float]:
    """How many directions features (N, H) use, and how alike their dimensions are: what VCReg is to raise and to lower."""
    return {"effective_rank": effective_rank(pooled), "mean_correlation": mean_correlation(pooled)}


# ---- experts


@torch.no_grad()
def agreement(method: Method, parts: Sequence[Asked], seen: int) -> dict[str, Any]:
    """The pre-trained model and the method's experts: ``names``, and ``same``, the share of all test images for which two of
    them give the same answer, each asked alone."""
    answers: dict[str, Tensor] = {}
    with method.clip.preserved():
        found = {"pretrained": Expert("pretrained", method.clip.pretrained)}
        for k in range(seen):
            for expert in method.experts(replace(parts[0].query, task=k)):
                found.setdefault(expert.name, expert)
        for name, expert in found.items():
            method.load_expert(expert)
            answers[name] = torch.cat([answer_alone(method, part.query) for part in parts])
    same = [[a.eq(b).double().mean().item() for b in answers.values()] for a in answers.values()]
    return {"names": list(answers), "same": same}


def answer_alone(method: Method, query: Query) -> Tensor:
    """(N,): the likeliest class by the weights the model holds now."""
    every = torch.arange(len(query.images))
    return torch.cat([method.logits(part).argmax(1).cpu() for part in query.parts(every, method.clip.evaluation_batch)])


def measured(
    method: Method, stream: Stream, parts: Sequence[Asked], seen: int, start: Mapping[str, Tensor], images: int,
    synthetic: Images | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The stage after ``seen`` tasks in figures. ``start``: what ``block_features`` gave before any; ``synthetic``: pairs that
    the run replayed."""
    clip = method.clip
    with clip.preserved():
        method.load_expert(newest(method, parts, seen))
        moved, (now, pooled) = weights_moved(clip), block_features(clip, stream)
        pairs = {task.name: found for task in stream.tasks if (found := of_pairs(clip, task.train, images))}
        replayed = of_pairs(clip, synthetic, images) if synthetic else None
    alike = {name: cka(start[name], now[name]) for name in sorted(now, key=in_order)}
    apart = gap(method, for_gap(stream))
    found = {"margins": margins(method, parts), "pairs": pairs, "synthetic_pairs": replayed, "gap": apart}
    return {**found, "weights": moved, "cka": alike, "spread": spread(pooled)}


def early_warning(stages: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    """Of each task but the last: how far its median margin and its share of right answers have fallen from when it was learned
    to the end; ``correlation`` between the two over the tasks, None where that says nothing."""
    end, fell = stages[-1]["margins"], {}
    for number, name in enumerate(tasks[: len(stages) - 2], 1):
        then = stages[number]["margins"][name]
        fell[name] = {key: then[key] - end[name][key] for key in ("median", "right")}
    columns = [[one[key] for one in fell.values()] for key in ("median", "right")]
    return {"fell": fell, "correlation": correlation(*columns)}
