"""What a method holds inside a task, beyond what learns: kept with every save inside the task, and put back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from perdure.core.packing import Packed


class Inside:
    """The two hooks, as every method has them: buffers of its modules, and the plain values of its state, may change at any
    step. What else does is the method's to add: means, counters, places in an order."""

    def pack_progress(self) -> Packed:
        """What changes from step to step beside the parameters, as (tensors by file, plain values). What ``begin_task`` makes
        and no step changes is not among it: it is made again."""
        return {"buffers": dict(self.buffers())}, {"state": self.pack_state()[1]}

    def unpack_progress(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """The inverse of ``pack_progress``, after ``begin_task`` and before the first step."""
        for name, buffer in self.buffers().items():
            buffer.copy_(files["buffers"][name])
        state, own = self.pack_state()
        if values["state"] != json.loads(json.dumps(own)):
            self.unpack_state(state, values["state"])

    def buffers(self) -> dict[str, Tensor]:
        """The buffers of its own modules that a state dictionary holds."""
        return {
            f"{name}/{key}": tensor
            for name, module in self.modules().items()
            for key, tensor in module.state_dict(keep_vars=True).items()
            if not isinstance(tensor, nn.Parameter)
        }

    # ---- a method's

    def modules(self) -> Mapping[str, nn.Module]:
        """As ``Method`` has it."""
        raise NotImplementedError

    def pack_state(self) -> Packed:
        """As ``Method`` has it."""
        raise NotImplementedError

    def unpack_state(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """As ``Method`` has it."""
        raise NotImplementedError
