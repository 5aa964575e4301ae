"""Less memory for more work: what the towers computed on the way is thrown away, and computed again in the backward pass.

In training it is activations that fill the memory, and they grow with the batch. Two ways to keep fewer, both exact:

- ``in_parts``: a tower is run over parts of its batch, and keeps nothing of a part but its embeddings (Gao et al., "Scaling
  Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021, arXiv:2101.06983). The loss sees the
  embeddings of the whole batch, so it may be any function of them: a matrix over the batch, too.
- ``by_blocks``: of each block of a tower only what goes in is kept (Chen et al., 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from perdure.core import processes


def in_parts(tower: Callable[[Tensor], Tensor], inputs: Tensor, parts: int) -> Tensor:
    """``tower(inputs)``, of inputs (B, …) in ``parts`` parts whose sizes differ by one at most; the activations of one at a
    time are held. Without gradients there are none to spare, and the batch stays whole."""
    count = min(parts, len(inputs))
    if count <= 1 or not torch.is_grad_enabled():
        return tower(inputs)
    return torch.cat([checkpoint(tower, part, use_reentrant=False) for part in inputs.tensor_split(count)])


def blocks(backbone: Any) -> dict[str, Any]:
    """The blocks of a transformers model's towers, in order, by name."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return {name: block for name, block in backbone.named_modules() if isinstance(block, GradientCheckpointingLayer)}


def blocks_of(clip: Any, tower: str) -> dict[str, Any]:
    """Those of a model's ``image`` or ``text`` tower, in order, by name."""
    return {name: block for name, block in blocks(clip.backbone).items() if clip.part_of(name) == tower}


def by_blocks(backbone: Any) -> None:
    """Let every block of a transformers model keep its input alone."""
    # later versions of transformers 5 call it activation checkpointing, and warn of the old name
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for block in blocks(backbone).values():
        block.training = True  # of the block alone, which asks for it; the dropout inside stays off


@contextlib.contextmanager
def differentiable_twice(clip: Any) -> Iterator[None]:
    """Meanwhile nothing is computed again, as it would be by the weights that ``clip`` holds by then, nor shared out to several
    processes, and attention is done by plain products: the fused kernels have no second derivative."""
    parts, clip.accumulate = clip.accumulate, 1
    twice = [block for block in blocks(clip.backbone).values() if block.training]
    for block in twice:
        block.training = False
    try:
        with sdpa_kernel(SDPBackend.MATH), processes.alone():
            yield
    finally:
        clip.accumulate = parts
        for block in twice:
            block.training = True
