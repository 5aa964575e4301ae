"""Seconds, memory and bytes of ConDU's fusion against a plain implementation of the same session.

    python bench/condu_fusion.py [--tasks 1 4 11 32] [--images 16]

CLIP ViT-B/16 with random weights, triggers and a random expert, read from files. One session with T tasks: rebuild the T - 1
old deltas, add the new one, unify, write the unified delta and the triggers. Plain: every model in memory, stacked means,
masks of bools. Each runs in a process of its own. Then the images are answered with the task hidden: the K + 1 models that
an image needs, against all T + 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from perdure.core.weights import Lazy, original
from perdure.data.task import Class, Context, Query
from perdure.engine.environment import forget_peak_memory, peak_memory_mb
from perdure.methods.condu import ConDU, Unified
from perdure.models.clip import CLIP
from perdure.ops import fusion

RESCALER, PLAIN_MOST = 0.9, 11  # plain does not fit into the memory of most machines with more tasks


class Stored(Mapping[str, Tensor]):
    """A safetensors file read tensor by tensor, each into memory of its own."""

    def __init__(self, path: Path):
        self.file = open(path, "rb")  # noqa: SIM115 (open as long as the process)
        length = int.from_bytes(self.file.read(8), "little")
        self.about = json.loads(self.file.read(length))
        self.about.pop("__metadata__", None)
        self.at = 8 + length

    def __getitem__(self, name: str) -> Tensor:
        about = self.about[name]
        begin, end = about["data_offsets"]
        self.file.seek(self.at + begin)
        tensor = torch.empty(about["shape"], dtype={"F32": torch.float32, "U8": torch.uint8}[about["dtype"]])
        assert self.file.readinto(tensor.numpy().data) == end - begin
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.about)

    def __len__(self) -> int:
        return len(self.about)


def make(folder: Path, tasks: int) -> None:
    """θ⁰, an expert, a unified delta and the triggers of ``tasks`` - 1 tasks."""
    from gift_step import vit_b_16

    origin = {n: t for n, t in vit_b_16().weights().items() if t.is_floating_point()}
    save_file(origin, folder / "origin.safetensors")
    delta = {n: torch.randn_like(t) * 1e-3 for n, t in origin.items()}
    save_file({n: origin[n] + d for n, d in delta.items()}, folder / "tuned.safetensors")
    save_file({n: torch.randn_like(t) * 1e-3 for n, t in origin.items()}, folder / "unified.safetensors")
    for k in range(tasks - 1):
        bits = {n: torch.randint(0, 256, (-(-t.numel() // 8),), dtype=torch.uint8) for n, t in origin.items()}
        save_file(bits, folder / f"trigger_{k}.safetensors")


def streamed(folder: Path, tasks: int) -> dict[str, Any]:
    """perdure's session; what it keeps is written as it comes."""
    origin, tuned, unified = (Stored(folder / f"{n}.safetensors") for n in ("origin", "tuned", "unified"))
    known = [(Stored(folder / f"trigger_{k}.safetensors"), RESCALER) for k in range(tasks - 1)]
    sums: dict[str, Any] = {"unified": 0.0, "masks": 0}
    with open(folder / "out_unified.bin", "wb") as new, open(folder / "out_masks.bin", "wb") as masks:

        def keep(name: str, delta: Tensor, bits: Tensor) -> None:
            new.write(delta.numpy().data)
            masks.write(bits.numpy().data)
            sums["unified"] += float(torch.linalg.vector_norm(delta, 1))
            sums["masks"] += int(bits.sum(dtype=torch.int64))

        rescalers = fusion.unify(origin, tuned, unified, known, keep)
        size = new.tell() + masks.tell()
    return {**sums, "rescalers": rescalers, "bytes": size}


def plain(folder: Path, tasks: int) -> dict[str, Any]:
    """The same session, all models in memory at once."""
    origin, tuned, unified = (dict(Stored(folder / f"{n}.safetensors")) for n in ("origin", "tuned", "unified"))
    old = []
    for k in range(tasks - 1):
        bits = Stored(folder / f"trigger_{k}.safetensors")
        masks = {n: fusion.unpacked(bits[n], t.numel()).view(t.shape) for n, t in origin.items()}
        old.append({n: origin[n] + unified[n] * masks[n] * RESCALER for n in origin})
    deltas = [{n: model[n] - origin[n] for n in origin} for model in [*old, tuned]]
    new, agree = {}, []
    for name in origin:
        stack = torch.stack([d[name] for d in deltas])
        sign = torch.where(stack.mean(0) > 0, 1.0, -1.0)
        agree.append((stack * sign) > 0)
        new[name] = sign * (stack.abs() * agree[-1]).amax(0)
    save_file(new, folder / "out_unified.safetensors")
    names = list(origin)
    masks_of = [{n: agree[i][k] for i, n in enumerate(names)} for k in range(tasks)]
    for k, own in enumerate(masks_of):
        save_file({n: m.contiguous() for n, m in own.items()}, folder / f"out_mask_{k}.safetensors")
    rescalers = []
    for k in range(tasks):
        sums: dict[str, list[float]] = {}
        for n in names:
            kept = (new[n] * masks_of[k][n]).abs()
            found = sums.setdefault(original(n), [0.0, 0.0, 0])
            found[0] += deltas[k][n].double().abs().sum().item()
            found[1] += kept.double().sum().item()
            found[2] += kept.numel()
        rescalers.append(sum(s[0] / s[2] for s in sums.values()) / sum(s[1] / s[2] for s in sums.values()))
    size = sum(p.stat().st_size for p in folder.glob("out_*.safetensors"))
    packed = sum(int(fusion.packed(m.reshape(1, -1)).long().sum()) for own in masks_of for m in own.values())
    return {
        "unified": sum(float(torch.linalg.vector_norm(t, 1)) for t in new.values()), "masks": packed,
        "rescalers": rescalers, "bytes": size,
    }  # fmt: skip


def measure(kind: str, folder: Path, tasks: int) -> dict[str, Any]:
    for path in folder.glob("*.safetensors"):
        path.read_bytes()  # both find the files in the system's cache
    forget_peak_memory()
    start = time.perf_counter()
    found = (streamed if kind == "perdure" else plain)(folder, tasks)
    seconds = time.perf_counter() - start
    out = {"seconds": seconds, "peak_mb": peak_memory_mb(), **found}
    if kind == "perdure":
        origin, unified = (dict(Stored(folder / f"{n}.safetensors")) for n in ("origin", "unified"))
        bits = dict(Stored(folder / "trigger_0.safetensors")) if tasks > 1 else {}
        start = time.perf_counter()
        for name in bits:
            fusion.expert(origin, name, unified, bits, RESCALER)
        out["decouple"] = time.perf_counter() - start
    return out


def answering(tasks: int, most: int, images: int) -> tuple[float, int]:
    """Seconds, and images that went through a vision tower, to answer ``images`` images with the task hidden."""
    from gift_step import vit_b_16

    clip = vit_b_16()
    method = ConDU(experts=most)
    clip.pretrained = clip.weights()
    method.join(clip, Context())
    names = [str(k) for k in range(tasks)]
    draw = torch.Generator().manual_seed(0)
    floating = {n: t for n, t in clip.pretrained.items() if t.is_floating_point()}
    bits = {n: torch.full((-(-t.numel() // 8),), 170, dtype=torch.uint8) for n, t in floating.items()}
    prototypes = torch.nn.functional.normalize(torch.randn(tasks, 5, 512, generator=draw), dim=2)
    method.state = Unified(
        names, Lazy(floating, lambda n: torch.full_like(floating[n], 1e-4)),  # type: ignore[arg-type]
        [1.0] * tasks, dict.fromkeys(names, bits), dict(zip(names, prototypes, strict=True)),
    )  # fmt: skip
    seen: list[int] = []
    clip.encode_image = partial(counted, clip, seen)  # type: ignore[method-assign]
    pixels = torch.randint(0, 256, (images, 3, 224, 224), generator=draw, dtype=torch.uint8)
    classes = [Class(f"class {k}", ("a photo of a {}.",)) for k in range(10)]
    start = time.perf_counter()
    method.predict(Query(pixels, classes))
    return time.perf_counter() - start, sum(seen)


def counted(clip: CLIP, seen: list[int], images: Tensor) -> Tensor:
    seen.append(len(images))
    return CLIP.encode_image(clip, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4, 11, 32])
    parser.add_argument("--images", type=int, default=16, help="to answer with the task hidden; 0: skip that")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, folder, tasks = options.one
        print(json.dumps(measure(kind, Path(folder), int(tasks))))
        return
    print(f"A session of ConDU on ViT-B/16, {torch.get_num_threads()} threads")
    print(f"{'tasks':>5} {'':8} {'s':>7} {'peak MB':>9} {'MB on disk':>11} {'an expert, s':>13}  speed, memory")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, max(options.tasks))
        for tasks in options.tasks:
            kinds = ["perdure"] + (["plain"] if tasks <= PLAIN_MOST else [])
            rows = {}
            for kind in kinds:
                command = [sys.executable, __file__, "--one", kind, str(folder), str(tasks)]
                rows[kind] = row = json.loads(subprocess.check_output(command))
                expert = f"{row['decouple']:13.2f}" if "decouple" in row else " " * 13
                print(
                    f"{tasks:5} {kind:8} {row['seconds']:7.2f} {row['peak_mb']:9.0f} {row['bytes'] / 1e6:11.0f} {expert}",
                    end="",
                )
                if kind == "plain":
                    mine = rows["perdure"]
                    same = mine["masks"] == row["masks"] and abs(mine["unified"] / row["unified"] - 1) < 1e-6
                    print(f"  {row['seconds'] / mine['seconds']:.1f}x, {row['peak_mb'] / mine['peak_mb']:.1f}x", end="")
                    print(", same masks and magnitudes" if same else ", DIFFERENT", end="")
                print(flush=True)
    if options.images:
        for most in (4, 11):
            seconds, passes = answering(11, most, options.images)
            print(f"hidden task, 11 tasks, K = {most}: {seconds:.1f} s, {passes / options.images:.0f} passes an image")


if __name__ == "__main__":
    main()
