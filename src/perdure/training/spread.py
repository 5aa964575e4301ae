"""VCReg as a part of any training (see ``methods/vcreg.py``): what blocks of the towers make of a step's images and texts is
collected on the way, and its variance and covariance terms are added where a task's loss is back-propagated.

Rows are tokens, those of the class and of patches alike; of CLIP's texts those up to the end token, as what follows it is
nobody's. A batch in parts (``accumulate``) is collected whole. Blocks that no gradient can reach are left out: their outputs
cannot change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from perdure.core import processes
from perdure.models.clip import CLIP
from perdure.models.recompute import blocks_of
from perdure.models.towers import Part
from perdure.ops.losses import variance_covariance
from perdure.training.fit import Regulariser

TOWERS: dict[str, tuple[Part, ...]] = {"image": ("image",), "text": ("text",), "both": ("image", "text")}


class Options(Protocol):
    """What of a training's options is asked here."""

    vcreg: Literal["none", "blocks", "last"]
    vcreg_var: float
    vcreg_cov: float
    vcreg_delta: float
    vcreg_towers: Literal["image", "text", "both"]


class Spread:
    """Collects the outputs of blocks by name; ``terms`` gives the two losses on what came since it was cleared."""

    def __init__(self, clip: CLIP, options: Options):
        self.clip, self.options = clip, options
        self.seen: dict[str, list[Tensor]] = {}  # rows (n, d) by block
        self.inside: Tensor | None = None  # (N, L): which tokens of the texts that are being read count

    def blocks(self) -> dict[str, nn.Module]:
        """The blocks that are regularised, by name."""
        out: dict[str, nn.Module] = {}
        for tower in TOWERS[self.options.vcreg_towers]:
            own = list(blocks_of(self.clip, tower).items())
            out |= dict(own[-1:] if self.options.vcreg == "last" else own)
        return out

    def read(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before texts are read: which of their tokens count."""
        ids = named["input_ids"] if "input_ids" in named else given[0]
        if self.clip.kind == "clip":
            ends = (ids == self.clip.tokenizer.eos_token_id).int()
            self.inside = ends.cumsum(1) - ends == 0

    def collect(self, name: str, out: Any) -> None:
        """After a block: its output (N, L, d)."""
        x = out[0] if isinstance(out, tuple) else out
        if not x.requires_grad:
            return
        texts = self.clip.part_of(name) == "text" and self.inside is not None
        self.seen.setdefault(name, []).append(x[self.inside] if texts else x.flatten(0, -2))

    def terms(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted terms, summed over blocks, where ``losses`` are a task's; else none."""
        if "task" not in losses or not self.seen:
            return {}
        c, parts = self.options, [torch.cat(rows) for rows in self.seen.values()]
        with torch.autocast(parts[0].device.type, enabled=False):
            found = [variance_covariance(rows.float(), c.vcreg_delta or None) for rows in parts]
        variance, covariance = (torch.stack(terms).sum() for terms in zip(*found, strict=True))
        return {"vcreg_variance": c.vcreg_var * variance, "vcreg_covariance": c.vcreg_cov * covariance}

    def clear(self) -> None:
        """Forget what was collected: its graph is gone."""
        self.seen.clear()


def regularised(learner: Any) -> AbstractContextManager[Regulariser | None]:
    """While ``learner`` takes steps: what the blocks of its ``clip`` make is collected, where its ``config`` asks for that."""
    off = getattr(learner.config, "vcreg", "none") == "none"
    return contextlib.nullcontext() if off else collected(learner.clip, learner.config)


@contextlib.contextmanager
def collected(clip: CLIP, options: Options) -> Iterator[Spread]:
    """Meanwhile, hooks collect what blocks make; of whole batches, so that nothing is shared out to several processes."""
    spread = Spread(clip, options)
    hooks = [clip.backbone.text_model.register_forward_pre_hook(spread.read, with_kwargs=True)]
    for name, block in spread.blocks().items():
        hooks.append(block.register_forward_hook(lambda _, __, out, name=name: spread.collect(name, out)))
    try:
        with processes.alone():
            yield spread
    finally:
        for hook in hooks:
            hook.remove()
