"""How long and how fast something is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Schedule:
    """Steps, rates and the optimiser: linear warm-up to ``lr``, then a cosine to ``floor``·lr at ``horizon``.

    GIFT's, ZSCL's and ConDU's recipe goes to 0, a new rate each step; MG-CLIP's to a hundredth, a new rate each epoch
    (``stride`` steps). With ``milestones``, be there none of them, the rate stays after the warm-up and is multiplied by
    ``gamma`` at each of these steps instead. ``one_cycle``: see ``phase``. ``epochs``: passes over the images in place of
    steps; see ``over``. ``rates``: factors on the rate of parameters whose names begin so (the longest beginning counts).
    ``augment``: whether images are cropped at random. ``restart``: after so many steps the cosine begins anew, and after
    twice as many again, and so on; 0: never. ``begin``: the rate that a warm-up begins with, rising once a ``stride``; None:
    it rises each step, from lr / warmup.
    """

    steps: int
    lr: float
    warmup: int
    batch_size: int
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    horizon: int | None = None  # the step at which the rate is lowest; None: ``steps``, so that no step is taken there
    floor: float = 0.0
    stride: int = 1
    augment: bool = True
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = 0.9  # SGD's
    milestones: tuple[int, ...] | None = None  # None: a cosine
    gamma: float = 0.1
    one_cycle: bool = False
    epochs: int = 0
    restart: int = 0
    begin: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)

    def over(self, count: int) -> Schedule:
        """With epochs over ``count`` images as steps: the rate changes once an epoch, and milestones were epochs."""
        if not self.epochs:
            return self
        size = -(-count // self.batch_size)
        falls = None if self.milestones is None else tuple(m * size for m in self.milestones)
        return replace(self, steps=self.epochs * size, stride=size, epochs=0, milestones=falls)

    def rate(self, step: int) -> float:
        """The learning rate of step 0 … steps - 1."""
        if self.one_cycle:
            up, share = self.phase(step)
            return between(self.lr / 25, self.lr, share) if up else between(self.lr, self.lr / 25 / 1e4, share)
        if step < self.warmup and self.begin is not None:
            return self.begin + (self.lr - self.begin) * (step // self.stride * self.stride) / self.warmup
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.milestones is not None:
            return self.lr * self.gamma ** sum(step >= m for m in self.milestones)
        length = (self.steps if self.horizon is None else self.horizon) - self.warmup
        gone = step - self.warmup
        if self.restart:
            length = self.restart
            while gone >= length:
                gone, length = gone - length, 2 * length
        gone = gone // self.stride * self.stride
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * gone / max(1, length))))

    def phase(self, step: int) -> tuple[bool, float]:
        """One cycle (Smith and Topin, arXiv:1708.07120) as torch has it: three tenths of the way the rate goes up from a 25th
        and the momentum (β₁ of Adam) down from 0.95 to 0.85, then both back, the rate to 4e-6 of its peak. Whether a step is on
        the way up, and how far on it."""
        top, last = 0.3 * self.steps - 1, self.steps - 1
        return (True, step / top) if step <= top else (False, (step - top) / (last - top))

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Give the optimiser a step's rate, and its momentum where that is cycled."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step) * group["factor"]
            if self.one_cycle:
                up, share = self.phase(step)
                momentum = between(0.95, 0.85, share) if up else between(0.85, 0.95, share)
                group.update({"betas": (momentum, self.betas[1])} if "betas" in group else {"momentum": momentum})

    def factor(self, name: str) -> float:
        """The factor on the rate of the parameter ``name``."""
        begins = [prefix for prefix in self.rates if name.startswith(prefix)]
        return self.rates[max(begins, key=len)] if begins else 1.0

    def optimizer_of(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser, a group for each factor on the rate, which stands in the group as ``factor``."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            groups.setdefault(self.factor(name), []).append(parameter)
        params = [{"params": members, "factor": factor} for factor, members in groups.items()]
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                params, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True
            )
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return kind(params, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True)


def between(start: float, end: float, share: float) -> float:
    """Part of the way from start to end, on half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
