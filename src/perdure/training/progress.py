"""A training that is saved as it goes: all that decides its next step, and how that is put back.

A training is a task's own, in as many rounds as the learner asks for, or a phase that a method is lent (a head, an
alignment). What is made before its first step, anchors, teachers, an order of images, is made again when it is gone on with:
it depends on the seed and on the task before. What batches were drawn is drawn again, without looking at them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from perdure.core.packing import Packed
from perdure.core.seeding import random_states, set_random_states
from perdure.training.scale import Scale

Record = list[dict[str, Tensor]]


class Holds(Protocol):
    """What a ``Stepper`` says of itself."""

    def pack_progress(self) -> Packed:
        """As ``Stepper`` has it."""
        ...

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """As ``Stepper`` has it."""
        ...


@dataclass
class Place:
    """Where a training stands: after how many steps, whether that is its end, whether any gradient came, and the losses; what
    they are scaled with, in fp16."""

    step: int = 0
    last: bool = False
    reached: bool = False
    record: Record = field(default_factory=list)
    scale: Scale | None = None


@dataclass
class Snapshot:
    """A place, and all that decides what comes after it, as tensors by file and plain values."""

    step: int
    last: bool
    files: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


class Saver:
    """What ``fit`` and ``optimise`` ask of whoever keeps a training as it goes; this one keeps nothing."""

    def begin(self, learner: Holds, generator: torch.Generator | None = None) -> int:
        """A training, or a round of it, begins: put what the learner and the generator of its draws were back; return the
        number of batches that were drawn by then."""
        return 0

    def take_up(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Place:
        """Put back what was learned, the optimiser and the process's random states: the last thing before a step."""
        return Place()

    def stepped(self, place: Place) -> None:
        """A step is done."""


NOTHING_KEPT = Saver()


class Keeper(Saver):
    """Takes a snapshot whenever one is due. ``found``: the one to go on from, of which ``told`` hears when it is taken up;
    ``due(place)``: whether to take one now; ``keep``: where it goes."""

    def __init__(
        self, found: Snapshot | None, due: Callable[[Place], bool], keep: Callable[[Snapshot], None],
        told: Callable[[Place], None],
    ):  # fmt: skip
        self.found, self.due, self.keep, self.told = found, due, keep, told
        self.origin: Tensor | None = None  # the state of the draws' generator when the round began

    def begin(self, learner: Holds, generator: torch.Generator | None = None) -> int:
        self.learner, self.origin = learner, None if generator is None else generator.get_state()
        if self.found is None:
            return 0
        files = self.found.files
        own = {name.removeprefix("own/"): tensors for name, tensors in files.items() if name.startswith("own/")}
        learner.unpack_progress(own, self.found.values["own"])
        if generator is not None:
            self.origin = files["draws"]["origin"]
            generator.set_state(self.origin)
        return self.found.step

    def take_up(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Place:
        self.parameters, self.optimizer = parameters, optimizer
        found, self.found = self.found, None  # a later round of this training begins anew
        if found is None:
            return Place()
        with torch.no_grad():
            for name, kept in found.files["parameters"].items():
                parameters[name].copy_(kept)
        load_optimizer(optimizer, parameters, found.files.get("optimizer", {}))
        set_random_states(found.files["random"])
        device = next(iter(parameters.values())).device
        record = unpack_record(found.files.get("losses", {}), found.values["losses"], found.step, device)
        scale = Scale(*found.values["scale"]) if "scale" in found.values else None
        place = Place(found.step, found.last, found.values["reached"], record, scale)
        self.told(place)
        return place

    def stepped(self, place: Place) -> None:
        if not self.due(place):
            return
        own, values = self.learner.pack_progress()
        names, losses = pack_record(place.record)
        files = {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "random": random_states(),
            "losses": losses,
            **{f"own/{name}": tensors for name, tensors in own.items()},
        }
        if self.origin is not None:
            files["draws"] = {"origin": self.origin}
        if not place.last:
            files["optimizer"] = optimizer_state(self.optimizer, self.parameters)
        told = {"own": values, "losses": names, "reached": place.reached}
        if place.scale:
            told["scale"] = [place.scale.value, place.scale.steps]
        self.keep(Snapshot(place.step, place.last, {name: t for name, t in files.items() if t}, told))


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:  # fmt: skip
    """What an optimiser holds of each parameter, as ``WHAT/PARAMETER``; rates are the schedule's to set."""
    return {
        f"{key}/{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]
) -> None:
    """The inverse of ``optimizer_state``."""
    about = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    number = {id(p): k for k, p in enumerate(order)}
    found: dict[int, dict[str, Tensor]] = {}
    for full, value in kept.items():
        key, _, name = full.partition("/")
        found.setdefault(number[id(parameters[name])], {})[key] = value
    optimizer.load_state_dict({"state": found, "param_groups": about["param_groups"]})


def pack_record(record: Record) -> tuple[list[str], dict[str, Tensor]]:
    """The losses' names in the order in which they appeared, and by name (2, steps): its values, and where it has one."""
    names = list(dict.fromkeys(name for losses in record for name in losses))
    zero = torch.zeros(())
    out = {}
    for number, name in enumerate(names):
        values = torch.stack([losses.get(name, zero).cpu() for losses in record])
        out[str(number)] = torch.stack([values, torch.tensor([float(name in losses) for losses in record])])
    return names, out


def unpack_record(kept: Mapping[str, Tensor], names: list[str], steps: int, device: torch.device) -> Record:
    """The inverse of ``pack_record``."""
    record: Record = [{} for _ in range(steps)]
    for number, name in enumerate(names):
        values, there = kept[str(number)].to(device)
        for losses, value, has in zip(record, values, there.tolist(), strict=True):
            if has:
                losses[name] = value
    return record
