"""What 1 to 64 devices would do, on paper: seconds a step, what of it is communication, and how well they are used.

    python bench/scaling.py                                # ViT-B/16 and ViT-L/14, fine-tuning and GIFT, accelerators
    python bench/scaling.py --measured build/sizes.jsonl   # with the step times that bench/sizes.py measured on this processor

    T(n) = towers(B/n) + rest + messages(n)
    towers(b)    = b·(work of an image)/speed(b) + the same of texts;   speed(b) = speed·b/(b + half)
    rest         = what each device does whole: (bytes that optimiser, buckets and penalty move)/memory
    messages(n)  = Σ [2(n - 1)/n·bytes/bandwidth(n) + 2·⌈log₂ n⌉·latency];  the bandwidth is the slowest link's
    fixed batch:     efficiency = T(1)/(n·T(n));   growing with n:  T(1)/T(n), B images a device

Counted, not assumed: the arithmetic of a step (forward and backward, on torch's meta device), the parameters, and the messages
that ``training/processes.py`` and ``models/shared.py`` send: gradients in fp32, once a call of ``backward`` (GIFT: twice), none
while the backward pass still runs; embeddings of images and texts there and back; pictures as bytes, where they lie in files.
Assumed, each an option: what devices, links and memory do. With ``--measured`` towers and rest are what was measured, over n.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_models import MODELS
from torch.utils.flop_counter import FlopCounterMode

from perdure.training.processes import BUCKET

DEVICES = (1, 2, 4, 8, 16, 32, 64)
PASSES = {"finetune": 1, "gift": 2}  # calls of ``backward``
MOVED = {
    "finetune": 28 + 24,
    "gift": 28 + 2 * 24 + 60,
}  # bytes a parameter: AdamW, copies into and out of buckets, penalty


@dataclass(frozen=True)
class Model:
    """What a tower costs: floating-point operations forward and backward of an image, of a text; numbers that learn; how long
    an embedding is; the side of a picture."""

    image: float
    text: float
    parameters: int
    width: int
    side: int


@dataclass(frozen=True)
class Machine:
    """What is assumed. speed: operations a second that a full device reaches; half: images at which it reaches half of that;
    memory, inside, between: bytes a second of a device's memory, of links in a node and between nodes, a device; latency:
    seconds from one device to the next; node: devices a node."""

    speed: float = 400e12
    half: float = 4.0
    memory: float = 2.4e12
    inside: float = 350e9
    between: float = 40e9
    latency: float = 5e-6
    node: int = 8


@dataclass(frozen=True)
class Work:
    """A step: images of the task, pairs beside them, texts of either, pictures read from files."""

    method: str
    images: int
    pairs: int
    texts: int
    files: bool = True

    def grown(self, times: int) -> Work:
        """The same with so many times the images; the classes stay."""
        more = self.pairs * times
        return Work(self.method, self.images * times, more, self.texts - self.pairs + more, self.files)


def model_of(name: str, tokens: int) -> Model:
    """What is counted of a CLIP of a published shape."""
    import transformers

    about = MODELS[name]
    config = transformers.CLIPConfig(text_config=about["text"], vision_config=about["vision"], **about["shared"])
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = transformers.CLIPModel(config)
        side = config.vision_config.image_size
        ids = torch.ones(1, tokens, dtype=torch.int64)
        image = counted(lambda: model.visual_projection(model.vision_model(torch.rand(1, 3, side, side)).pooler_output))
        text = counted(lambda: model.text_projection(model.text_model(ids).pooler_output))
    return Model(image, text, sum(p.numel() for p in model.parameters()), config.projection_dim, side)


def counted(forward: Any) -> float:
    """Floating-point operations of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        forward().sum().backward()
    return float(counter.get_total_flops())


def messages(work: Work, model: Model) -> Iterator[float]:
    """The bytes of each message of a step."""
    for _ in range(PASSES[work.method]):
        whole = 4.0 * model.parameters
        while whole > 0:
            yield min(whole, 4.0 * BUCKET)
            whole -= 4.0 * BUCKET
    for rows in filter(None, (work.images, work.pairs, work.texts - work.pairs, work.pairs)):
        yield from [4.0 * rows * model.width] * 2
    if work.files:
        yield 3.0 * model.side**2 * work.images


def sending(count: int, work: Work, model: Model, machine: Machine) -> float:
    """Seconds that the messages of a step take among ``count`` devices."""
    if count == 1:
        return 0.0
    link = machine.inside if count <= machine.node else machine.between
    hops = 2 * math.ceil(math.log2(count)) * machine.latency
    return sum(2 * (count - 1) / count * size / link + hops for size in messages(work, model))


def towers(count: int, work: Work, model: Model, machine: Machine, measured: float | None) -> float:
    """Seconds of one device's share of a step. ``measured``: of all of it on one."""
    if measured is not None:
        return measured / count
    images, texts = (work.images + work.pairs) / count, work.texts / count
    speed = machine.speed * images / (images + machine.half)
    return (images * model.image + texts * model.text) / speed


@dataclass(frozen=True)
class Step:
    """A step of ``count`` devices: seconds in all, of those in messages; how well the devices are used."""

    count: int
    seconds: float
    sent: float
    efficiency: float


def course(work: Work, model: Model, machine: Machine, growing: bool, measured: float | None = None) -> list[Step]:
    """A step of 1 … 64 devices."""
    rest = 0.0 if measured is not None else MOVED[work.method] * model.parameters / machine.memory
    out: list[Step] = []
    for count in DEVICES:
        now = work.grown(count) if growing else work
        there = None if measured is None else measured * (count if growing else 1)
        sent = sending(count, now, model, machine)
        seconds = towers(count, now, model, machine, there) + rest + sent
        one = out[0].seconds if out else seconds
        out.append(Step(count, seconds, sent, one / seconds / (1 if growing else count)))
    return out


def measured_at(path: Path, model: str, method: str, images: int) -> float | None:
    """Seconds a step that bench/sizes.py measured, for so many images; None: it did not."""
    for line in path.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        cell = one["cell"]
        if (cell["model"], cell["method"], cell.get("saving")) == (model, method, "none"):
            return float(one["cost"]["seconds"]) * images / int(cell["batch"])
    return None


def table(title: str, fixed: list[Step], growing: list[Step]) -> str:
    """Markdown."""
    lines = [
        f"| {title} | s/step, fixed batch | of that messages | efficiency | s/step, batch grows | efficiency |",
        "|---|---|---|---|---|---|",
    ]
    for a, b in zip(fixed, growing, strict=True):
        lines.append(
            f"| {a.count} | {a.seconds:.4g} | {a.sent / a.seconds:.0%} | {a.efficiency:.0%} | {b.seconds:.4g} | "
            f"{b.efficiency:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vit-b-16", "vit-l-14"])
    parser.add_argument("--methods", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--batch", type=int, default=64, help="images a step, of all devices; GIFT: as many pairs")
    parser.add_argument("--classes", type=int, default=100, help="texts a step")
    parser.add_argument("--tokens", type=int, default=16, help="a text's length")
    parser.add_argument("--measured", type=Path, help="what bench/sizes.py wrote")
    for name, value in vars(Machine()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="assumed; see Machine")
    given = parser.parse_args()
    machine = Machine(**{name: getattr(given, name) for name in vars(Machine())})
    print(", ".join(f"{name} {value:g}" for name, value in vars(machine).items()))
    for name in given.models:
        model = model_of(name, given.tokens)
        print(
            f"\n{name}: {model.image / 1e9:.1f} GFLOP an image, {model.text / 1e9:.2f} a text, forward and backward; "
            f"{4 * model.parameters / 1e6:.0f} MB of gradients"
        )
        for method in given.methods:
            pairs = given.batch if method == "gift" else 0
            work = Work(method, given.batch, pairs, given.classes + pairs)
            found = measured_at(given.measured, name, method, given.batch) if given.measured else None
            if given.measured and found is None:
                print(f"\n{name}, {method}: not in {given.measured}; measure it with bench/sizes.py")
                continue
            print("\n" + table(f"{name}, {method}", *(course(work, model, machine, g, found) for g in (False, True))))


if __name__ == "__main__":
    main()
