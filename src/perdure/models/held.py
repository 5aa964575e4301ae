"""A model whose weights are exchanged: experts loaded and put back, adapters, modules of a method's own beside its weights."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.features import Memory
from perdure.core.packing import Frozen
from perdure.core.weights import Weights
from perdure.models import compiled, lora, rotation

T = TypeVar("T")
H = TypeVar("H", bound="Held")


@dataclass
class Last:
    """What a model held before other weights were loaded for a while; without a name: nothing was loaded yet."""

    name: str = ""
    rebased: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)


def fingerprint_of(weights: Weights) -> str:
    """A sha256 over names and values."""
    whole = hashlib.sha256()
    for name in sorted(weights):
        whole.update(name.encode())
        whole.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


class Held(nn.Module):
    """A backbone, and the name of the weights that it holds now."""

    backbone: Any  # a transformers model, perhaps with adapters inside

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.holds = "pretrained"  # the name of the weights it holds now
        self.rebased = False  # whether the plain weights differ from the pre-trained ones
        self.born = dict(self.backbone.named_parameters())  # objects that stay the same, whatever is built around them
        self.buffers_born = set(self.backbone.state_dict()) - set(self.born)
        self.grown: dict[str, Tensor] = {}  # weights that ``grow`` has added, as they began
        self.identity = ""  # the fingerprint of the weights it was born with, once it was asked for
        self._last: Last | None = None
        self._fixed: object = "pretrained"  # the weights it holds, where they are such as never change; else None
        self._memory: Memory | None = None
        self.asked_to_remember = False

    def plain(self) -> dict[str, Tensor]:
        """Its own tensors, those it was born with, under their names in a plain checkpoint, wherever they stand now."""
        return {**self.born, **{n: t for n, t in lora.plain(self.backbone).items() if n in self.buffers_born}}

    def grow(self, name: str, module: nn.Module) -> None:
        """Put a module into the backbone, whose parameters are weights of its own from now on: experts, fusion and checkpoints
        have them, and no plain ``transformers`` model does. It is made of them alone; with the pre-trained weights it must not
        act, so that those mean what they did."""
        self.backbone.add_module(name, module)
        fresh = {f"{name}.{key}": parameter for key, parameter in module.named_parameters()}
        self.born.update(fresh)
        self.grown.update({key: parameter.detach().clone() for key, parameter in fresh.items()})
        if "pretrained" in vars(self):  # read before
            self.pretrained = {**self.pretrained, **self.grown}

    def added(self) -> dict[str, Tensor]:
        """Tensors that were put into its towers later, adapters and other modules, by their names there."""
        own = set(map(id, self.plain().values()))
        return {n: t for n, t in self.backbone.state_dict(keep_vars=True).items() if id(t) not in own}

    def inside(self, modules: Mapping[str, nn.Module]) -> list[str]:
        """The names of those modules that stand inside its towers: without them it is another model."""
        parts = {id(part) for part in self.backbone.modules()}
        return [name for name, module in modules.items() if id(module) in parts]

    def weights(self) -> dict[str, Tensor]:
        """A copy of all weights under the names of a plain checkpoint, adapters merged in."""
        return {**lora.merged(self.backbone, self.plain()), **rotation.folded(self.backbone)}

    @cached_property
    def pretrained(self) -> dict[str, Tensor]:
        """The weights it was born with."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A sha256 over names and values of the weights: which model this is, wherever it came from."""
        adapted = any(lora.adapts(name) for name in self.backbone.state_dict())
        own = self.weights() if adapted else self.plain()
        found = fingerprint_of({name: tensor for name, tensor in own.items() if name not in self.grown})
        if self.holds == "pretrained" and not self.rebased:
            self.identity = found
        return found

    def frozen_copy(self: H) -> H:
        """A copy of the model as it is now, which learns no more. What it was born with and what it remembers is shared."""
        shared = [self.__dict__[key] for key in ("pretrained", "_memory") if self.__dict__.get(key) is not None]
        found = copy.deepcopy(self, {id(one): one for one in shared}).requires_grad_(False)
        compiled.like(self.backbone, found.backbone)
        return found

    def load_weights(self, name: str, weights: Weights) -> None:
        """Take plain weights on, in place. A name that it holds already costs nothing."""
        if name == self.holds:
            return
        self.stash()
        own = self.plain()
        with torch.no_grad():
            for key, value in weights.items():
                own[key].copy_(value)
        lora.silence(self.backbone)
        rotation.reset(self.backbone)
        self.rebased = name != "pretrained"
        self.changed(name)
        if isinstance(weights, Frozen):
            self._fixed = weights

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        """Leave the model as it is found, whatever weights are loaded in between; see ``load_last``."""
        outer, self._last = self._last, Last()
        try:
            yield
        finally:
            self.load_last()
            self._last = outer

    @contextlib.contextmanager
    def remembering(self, on: bool = True) -> Iterator[None]:
        """Meanwhile, what was asked of weights that never change (the pre-trained ones, and ``Frozen``) is not worked out
        again. For a caller that shows the same image objects, unchanged, and lets nothing but weights act in the towers."""
        before, self.asked_to_remember = self.asked_to_remember, on
        self._memory = self._memory or Memory()
        try:
            yield
        finally:
            self.asked_to_remember = before

    @property
    def remembers(self) -> bool:
        """Whether what is asked of the weights it holds is kept."""
        rounds = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        return self.asked_to_remember and self._fixed is not None and not rounds

    def recall(self, question: Hashable, about: Any, compute: Callable[[], T]) -> T:
        """``compute()`` by the weights it holds, or, while ``remembering``, what that gave before; see ``Memory.recall``."""
        if not self.remembers or self._memory is None:
            return compute()
        return self._memory.recall((id(self._fixed), question), (self._fixed, about), compute)

    def stash(self) -> None:
        """Inside ``preserved``: keep what it holds, the first time that other weights are loaded."""
        last = self._last
        if last is not None and not last.name:
            last.name, last.rebased = self.holds, self.rebased
            kept = lora.factors(self.backbone) if last.name == "pretrained" else self.backbone.state_dict()
            last.state = {name: tensor.clone() for name, tensor in kept.items()}

    def load_last(self) -> None:
        """Inside ``preserved``: the weights that it held when that began."""
        last = self._last
        if last is None or not last.name or last.name == self.holds:
            return
        if last.name == "pretrained":
            self.load_weights("pretrained", self.pretrained)
        self.backbone.load_state_dict(last.state, strict=False)
        self.rebased = last.rebased
        self.changed(last.name)

    def restart(self) -> None:
        """Back to the pre-trained weights, with new adapters where there are any."""
        self.load_weights("pretrained", self.pretrained)
        lora.reset(self.backbone)
        rotation.reset(self.backbone)
        self.with_new_adapters()

    def with_new_adapters(self) -> None:
        """Adapters that start at random make another model of it before any step."""
        if getattr(self.backbone, "lora_init", "") == "random":
            self.changed("pretrained, with random adapters")

    def trained(self, name: str, parameters: Iterable[Tensor] | None = None) -> None:
        """Training has changed these parameters (None: all that may learn); those that were added are no weights of its own."""
        changed = {id(p) for p in (self.backbone.parameters() if parameters is None else parameters) if p.requires_grad}
        own = (tensor for key, tensor in self.plain().items() if key not in self.grown)
        self.rebased = self.rebased or any(id(tensor) in changed for tensor in own)
        self.changed(name)

    def adapt(self, rank: int, alpha: float, targets: Sequence[str], towers: str, init: str = "kaiming") -> None:
        """Freeze the weights and train low-rank adapters in their place. ``PerdureError`` if no layer is so named."""
        try:
            lora.attach(self.backbone, rank, alpha, targets, towers, init)
        except ValueError as error:
            raise PerdureError(
                f"LoRA cannot be attached to {', '.join(targets)}: {str(error).splitlines()[0]}"
            ) from error
        self.with_new_adapters()

    def rotate(self, block: int, layers: Sequence[str], towers: str) -> None:
        """Freeze the weights and train rotations of them in their place. ``PerdureError`` where that cannot be."""
        rotation.attach(self.backbone, block, layers, towers)

    def own_state(self) -> dict[str, Tensor]:
        """What must be kept to come back to the present weights from the pre-trained ones, bit for bit: adapters, what has
        grown, and its own tensors where they have changed. Modules of a method's own are the method's."""
        own = set(map(id, self.plain().values())) if self.rebased else set()
        state = self.backbone.state_dict(keep_vars=True)
        return {n: t.detach() for n, t in state.items() if lora.adapts(n) or n in self.grown or id(t) in own}

    def load_own_state(self, state: Weights, name: str) -> None:
        """The inverse of ``own_state``."""
        known = self.backbone.state_dict()
        strange = sorted(key for key, tensor in state.items() if key not in known or known[key].shape != tensor.shape)
        if strange:
            raise PerdureError(f"The saved weights are another architecture's: {strange[0]} does not fit this model.")
        if not state and self.holds == "pretrained" and not self.rebased:
            return  # nothing had changed: what is known of the pre-trained weights stays true
        self.backbone.load_state_dict(dict(state), strict=False)
        self.rebased = any(not lora.adapts(key) and key not in self.grown for key in state)
        self.changed(name)

    def changed(self, name: str) -> None:
        """Its weights are others now, under this name."""
        self.holds = name
        self._fixed = name if name == "pretrained" else None
