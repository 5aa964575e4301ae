"""Low-rank adapters (Hu et al., 2021, arXiv:2106.09685) inside the towers, over peft."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perdure.core.weights import Lazy, Weights

ADAPTING = ("lora_", ".rotation.")  # in the names of factors, and of what turns a weight (rotation.py)
TOWERS = {"both": "(vision_model|text_model)", "image": "vision_model", "text": "text_model"}


def attach(
    backbone: nn.Module, rank: int, alpha: float, targets: Sequence[str], towers: str, init: str = "kaiming"
) -> None:
    """Freeze ``backbone`` and put adapters beside the named linear layers of the towers: W + (alpha / rank)·B·A.

    ``init``: A ``kaiming`` or ``xavier`` uniform and B zero, or both ``random`` (kaiming uniform). Raises ``ValueError``
    where no layer has such a name. The attention by which SigLIP pools an image gets none.
    """
    from peft import LoraConfig, inject_adapter_in_model

    pattern = rf"{TOWERS[towers]}\..*\.({'|'.join(map(re.escape, targets))})"
    # SigLIP pools by an attention of torch's, which reads its layers' weights and would pass by an adapter in silence
    pooling = [f"{n}.out_proj" for n, module in backbone.named_modules() if isinstance(module, nn.MultiheadAttention)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=pattern,
        exclude_modules=pooling or None,
        init_lora_weights=init != "random",
    )
    inject_adapter_in_model(config, backbone)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)
    backbone.lora_init = init  # type: ignore[assignment]
    if init == "xavier":
        xavier(backbone)


def adapters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that carry an adapter, by name."""
    return ((name, layer) for name, layer in module.named_modules() if hasattr(layer, "lora_A"))


def reset(module: nn.Module) -> None:
    """Start all adapters anew, as ``attach`` did."""
    init = getattr(module, "lora_init", "kaiming")
    for _, layer in adapters(module):
        layer.reset_lora_parameters("default", True)
        if init == "random":
            nn.init.kaiming_uniform_(layer.lora_B["default"].weight, a=math.sqrt(5))
    if init == "xavier":
        xavier(module)


def xavier(module: nn.Module) -> None:
    """Draw every A anew: Xavier uniform."""
    for _, layer in adapters(module):
        nn.init.xavier_uniform_(layer.lora_A["default"].weight)


@torch.no_grad()
def silence(module: nn.Module) -> None:
    """Let all adapters add nothing: B zero."""
    for _, layer in adapters(module):
        layer.lora_B["default"].weight.zero_()


def adapts(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter."""
    return any(mark in name for mark in ADAPTING)


def plain(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors without its adapters, under the names they have in a model without any."""
    state = module.state_dict(keep_vars=True)
    return {name.replace(".base_layer.", "."): t for name, t in state.items() if not adapts(name)}


@torch.no_grad()
def merged(module: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """A copy of the module's own ``weights`` with every adapter multiplied out and added."""
    out = {name: tensor.detach().clone() for name, tensor in weights.items()}
    for name, layer in adapters(module):
        out[f"{name}.weight"] += layer.get_delta_weight("default")
    return out


def factors(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all that adapts (A and B, or the entries of rotations), by name."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items() if adapts(name)}


def downward(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every adapter's A, itself, by its name."""
    return {name: parameter for name, parameter in module.named_parameters() if ".lora_A." in name}


def multiplied(module: nn.Module, weights: Weights, found: Weights) -> Lazy:
    """Plain ``weights`` with the products of the factors ``found`` added, tensor by tensor as they are asked for."""
    scale = {f"{name}.weight": layer.scaling["default"] for name, layer in adapters(module)}

    def compute(name: str) -> Tensor:
        if name not in scale:
            return weights[name]
        a, b = (found[f"{name.removesuffix('.weight')}.lora_{x}.default.weight"] for x in "AB")
        return weights[name] + scale[name] * (b @ a)

    return Lazy(weights, compute)
