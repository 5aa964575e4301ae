"""Every registered method as an accelerator would have it: how often a step waits, and what other precisions do to its losses.

    python proofs/devices.py [METHOD …] [--device cpu] [--parts waits compile fp16 bf16]

On the curves of ``bench/curves.py``: two short tasks of the small world. ``waits``: how often a step (forward, backward,
optimiser) asks for a number that lies on the device, which keeps the processor until all before it is done; on ``cpu`` the same
calls are counted. ``compile``, ``fp16``, ``bf16``: how far losses lie from those of fp32 at most, in shares of the larger of 1
and the loss; more than 1e-4 under ``compile`` is a failure, and so is a wait.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import curves

from perdure.models.clip import CLIP
from perdure.training import fit

CLOSE = 1e-4
PARTS = ("waits", "compile", "fp16", "bf16")
# Torch's own names of what an accelerator answers only when it is done: a number, or how many places a mask has.
ASKS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal")
OUTRIGHT = ("tolist", "numpy", "cpu")  # of a tensor


class Waits(TorchDispatchMode):
    """Follows what would lie on an accelerator: the model, what is sent there, and all that is computed from either. Counts,
    inside ``step``, what would wait for it, by the line of perdure that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.inside = False
        self.there: dict[int, Any] = {}  # storages by address; held, so that none is mistaken for a later one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        out = func(*args, **(kwargs or {}))
        if self.on_device(*given):
            masks = func.name().startswith("aten::index") and any(x.dtype == torch.bool for x in given[1:])
            if func.name() in ASKS or masks:
                self.note(func.name())
            self.put(*(x for x in tree_leaves(out) if isinstance(x, Tensor)))
        return out

    def on_device(self, *tensors: Tensor) -> bool:
        return any(x.untyped_storage()._cdata in self.there for x in tensors)

    def put(self, *tensors: Tensor) -> None:
        self.there |= {(storage := x.untyped_storage())._cdata: storage for x in tensors}

    def note(self, what: str) -> None:
        if not self.inside:
            return
        own = [frame for frame in traceback.extract_stack() if "/perdure/" in frame.filename]
        place = own[-1] if own else traceback.extract_stack()[-3]
        self.found[f"{what} at {place.filename.rpartition('/perdure/')[2]}:{place.lineno}"] += 1

    def step(self, function: Callable[..., None]) -> Callable[..., None]:
        """``function``, in which waits count."""

        def run(*given: Any) -> None:
            self.inside = True
            try:
                function(*given)
            finally:
                self.inside = False

        return run

    # ---- in the place of a tensor's own

    def to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = TO(tensor, *args, **kwargs)
        if any(isinstance(x, torch.device) for x in (*args, *kwargs.values())) and not self.on_device(out):
            out = out.clone()
            self.put(out)
        return out

    def taken(self, name: str) -> Callable[..., Any]:
        before = getattr(Tensor, name)

        def asked(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.on_device(tensor):
                return before(tensor, *args, **kwargs)
            self.note(name)
            copy = tensor.detach().clone()  # which lies with the processor
            self.there.pop(copy.untyped_storage()._cdata)
            return before(copy, *args, **kwargs)

        return asked


TO = Tensor.to


@contextlib.contextmanager
def counting() -> Iterator[Waits]:
    """Count what waits in the steps of every training, what the loop itself looks at every so often aside."""
    waits, optimise, load = Waits(), fit.optimise, CLIP.load

    def watched(learner: Any, *args: Any, **kwargs: Any) -> Any:
        learner.step, learner.stepped = waits.step(learner.step), waits.step(learner.stepped)
        try:
            return optimise(learner, *args, **kwargs)
        finally:
            del learner.step, learner.stepped

    def loaded(*args: Any) -> CLIP:
        clip = load(*args)
        waits.put(*clip.state_dict().values())
        return clip

    with contextlib.ExitStack() as stack:
        for name in OUTRIGHT:
            stack.enter_context(mock.patch.object(Tensor, name, waits.taken(name)))
        stack.enter_context(mock.patch.object(Tensor, "to", lambda *given, **more: waits.to(*given, **more)))
        stack.enter_context(mock.patch.object(CLIP, "load", loaded))
        for place in ("perdure.training.fit", "perdure.engine.teach"):
            stack.enter_context(mock.patch(f"{place}.optimise", watched))
        stack.enter_context(waits)
        yield waits


def waits(name: str, device: str) -> Counter[str]:
    """What waits in the steps of a method."""
    with counting() as waits:
        curves.curve(name, device=device)
    return waits.found


def apart(name: str, device: str, **how: Any) -> float:
    """How far losses lie from those of fp32 at most."""
    wanted = curves.numbers({**curves.curve(name, device=device), "logits": {}})
    found = curves.numbers({**curves.curve(name, device=device, **how), "logits": {}})
    return max((abs(found[k] - v) / max(1, abs(v)) for k, v in wanted.items()), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="all, if none is named")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    asked = parser.parse_args()
    failed = []
    for name in asked.methods or curves.names():
        said = []
        if "waits" in asked.parts:
            found = waits(name, asked.device)
            said += [f"waits {sum(found.values())}", *(f"\n    {count} × {where}" for where, count in found.items())]
            failed += [name] if found else []
        if "compile" in asked.parts:
            far = apart(name, asked.device, compile=True)
            said.append(f"compiled {far:.1e}")
            failed += [name] if far > CLOSE else []
        said += [f"{p} {apart(name, asked.device, precision=p):.1e}" for p in PARTS[2:] if p in asked.parts]
        print(f"{name}: {', '.join(said)}", flush=True)
    if failed:
        raise SystemExit(f"Failed: {', '.join(dict.fromkeys(failed))}.")


if __name__ == "__main__":
    main()
