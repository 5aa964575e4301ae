"""Low-rank adapters (Hu et al., 2021, arXiv:2106.09685) inside a CLIPModel, over peft."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TOWERS = {"both": "(vision_model|text_model)", "image": "vision_model", "text": "text_model"}


def attach(backbone: nn.Module, rank: int, alpha: float, targets: Sequence[str], towers: str) -> None:
    """Freeze ``backbone`` and put adapters beside the named linear layers of the towers: W + (alpha / rank)·B·A, B zero.

    Raises ``ValueError`` where no layer has such a name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    pattern = rf"{TOWERS[towers]}\..*\.({'|'.join(map(re.escape, targets))})"
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, init_lora_weights=True)
    inject_adapter_in_model(config, backbone)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)


def adapters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that carry an adapter, by name."""
    return ((name, layer) for name, layer in module.named_modules() if hasattr(layer, "lora_A"))


def reset(module: nn.Module) -> None:
    """Start all adapters anew: A random, B zero."""
    for _, layer in adapters(module):
        layer.reset_lora_parameters("default", True)


@torch.no_grad()
def silence(module: nn.Module) -> None:
    """Let all adapters add nothing: B zero."""
    for _, layer in adapters(module):
        layer.lora_B["default"].weight.zero_()


def plain(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors without its adapters, under the names they have in a model without any."""
    state = module.state_dict(keep_vars=True)
    return {name.replace(".base_layer.", "."): t for name, t in state.items() if "lora_" not in name}


@torch.no_grad()
def merged(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights with every adapter multiplied out and added."""
    out = {name: tensor.detach().clone() for name, tensor in plain(module).items()}
    for name, layer in adapters(module):
        out[f"{name}.weight"] += layer.get_delta_weight("default")
    return out
