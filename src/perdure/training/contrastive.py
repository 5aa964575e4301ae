"""The loss of a task's pairs, and a pull on those that belong together (Chen, Deng, Li and Gu, "Understanding Transferable
Representation Learning and Zero-shot Transfer in CLIP", ICLR 2024, arXiv:2310.00927).

    S = I·Tᵀ/τ                                      of unit embeddings of images and of their captions, τ = 1/s
    L = CE(S, diag) + CE(Sᵀ, diag) + λ·mean ‖x - y‖²        ``loss=contrastive``, λ = ``positive_pull``
    L = CE(I·Tᵀ/τ, class) + λ·mean ‖x - t_y‖²               ``loss=softmax``: the text of an image is its class's

The contrastive loss alone parts positive pairs from negative ones by a margin of the order of τ; a pull on positive pairs
alone lifts it towards the data's own.

No release was found; the formulas follow the abstract, public reviews and the theory's outline. The pull's constant was not
seen: of unit vectors every reading that is linear in the cosine has the same gradient but for a factor, which λ takes up. The
paper trains from nothing on CC3M; here τ is the pre-trained model's, and stays. Captions that occur twice in a batch count as
each other's negatives, as in CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.data.task import Context
from perdure.models.clip import CLIP
from perdure.ops.losses import classification, contrastive, pairwise, positive_pull

LACKING = (
    "loss=contrastive learns from images with captions, and {} has none. Give a table with a column of texts (--text-key, or "
    "'text'), or take loss=softmax, which learns from class names."
)


def check_loss(config: Any, clip: CLIP, context: Context, captions: bool = True) -> None:
    """Refuse a loss that the model, the method (``captions``: whether its batches have them) or the data have nothing for."""
    if config.loss == "sigmoid":
        clip.check_bias("loss=sigmoid")
    if config.loss == "contrastive":
        if not captions:
            raise PerdureError(
                "loss=contrastive: batches of this method hold images without their captions (of its memory, or views). Take "
                "loss=softmax, or another method."
            )
        for task in context.tasks:
            if len(task.train) and task.train.captions is None:
                raise PerdureError(LACKING.format(task.name))


def of_captions(
    config: Any, clip: CLIP, images: Tensor, captions: Sequence[str] | None, reduction: str = "mean"
) -> Tensor:  # fmt: skip
    """The contrastive loss of unit images (B, D) with a caption each."""
    if captions is None:
        raise PerdureError(LACKING.format("this batch"))
    texts = clip.encode_text(list(captions))
    found = contrastive(clip.scaled(images, texts), reduction)
    return found + config.positive_pull * positive_pull(images, texts, reduction)


def of_classes(
    config: Any, clip: CLIP, images: Tensor, texts: Tensor, labels: Tensor, group: Tensor | None, reduction: str = "mean"
) -> Tensor:  # fmt: skip
    """The classification loss of unit images (B, D) with labels (B,) among the classes' unit texts (C, D); ``group`` and
    ``reduction``: as ``ops.losses.classification`` has them."""
    loss = pairwise if getattr(config, "loss", "softmax") == "sigmoid" else classification
    found = loss(clip.similarity(images, texts), labels, config.label_smoothing, group, reduction)
    pull = getattr(config, "positive_pull", 0.0)
    return found + pull * positive_pull(images, texts[labels], reduction) if pull else found
