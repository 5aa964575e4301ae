"""How a task is trained: the options that every method shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from perdure.core.errors import PerdureError

Rate = Annotated[float, Field(ge=0)]
TaskName = Annotated[str, Field(title="task name")]
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Training:
    """How a task is trained, whatever it is that learns. The defaults are the published recipe of ZSCL, GIFT and ConDU for
    CLIP ViT-B/16."""

    lr: Annotated[float, Field(ge=0, description="peak learning rate")] = 1e-5
    lr_by_task: Annotated[dict[TaskName, Rate], Field(description="learning rates of single tasks, by task name")] = (
        field(default_factory=dict)
    )
    iterations: Annotated[int, Field(ge=0, le=10**9, description="optimiser steps a task")] = 1000
    epochs: Annotated[
        int, Field(ge=0, le=10**6, description="passes over a task's images, in place of iterations; 0: iterations")
    ] = 0
    first_only: Annotated[
        bool, Field(description="train on the first task alone, then stay (first-session adaptation, as in RanPAC)")
    ] = False
    batch_size: Annotated[int, Field(ge=1, le=10**6, description="images a step")] = 64
    warmup: Annotated[int, Field(ge=0, le=10**9, description="steps of linear warm-up, then a cosine to 0")] = 100
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="of the classification loss")] = 0.2
    milestones: Annotated[
        tuple[int, ...],
        Field(description="steps (of epochs: epochs) where the rate falls by gamma, in place of the cosine"),
    ] = ()
    gamma: Annotated[float, Field(ge=0, le=1, description="factor on the rate at each milestone")] = 0.1
    optimizer: Annotated[
        Literal["adamw", "adam", "sgd"], Field(description="weight decay is decoupled in adamw alone")
    ] = "adamw"
    momentum: Annotated[float, Field(ge=0, lt=1, description="SGD's")] = 0.9
    weight_decay: Annotated[float, Field(ge=0, description="of the optimiser")] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1, description="AdamW's and Adam's")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="AdamW's and Adam's")] = 0.999
    clip_grad: Annotated[float | None, Field(gt=0, description="largest norm of the gradient; none: no limit")] = None
    towers: Annotated[Literal["both", "image", "text"], Field(description="which towers learn")] = "both"
    tower_lr_scale: Annotated[
        float, Field(ge=0, description="factor on the towers' rate, where more learns beside them (SLCA: 0.01)")
    ] = 1.0
    vcreg: Annotated[
        Literal["none", "blocks", "last"],
        Field(description="keep variance in, and correlation out of, what every block or the last one makes (VCReg)"),
    ] = "none"
    vcreg_var: Annotated[float, Field(ge=0, description="α, weight of VCReg's variance term, a block")] = 0.16
    vcreg_cov: Annotated[float, Field(ge=0, description="β, weight of VCReg's covariance term, a block")] = 0.01
    vcreg_delta: Annotated[
        float, Field(ge=0, description="δ: covariances beyond it count by their size, not its square; 0: all squared")
    ] = 0.0
    vcreg_towers: Annotated[
        Literal["image", "text", "both"],
        Field(description="whose blocks; hidden states, as of unit embeddings no dimension deviates by 1"),
    ] = "image"
    positive_pull: Annotated[
        float, Field(ge=0, description="λ, weight of the squared distance of images to their own texts")
    ] = 0.0

    def __post_init__(self) -> None:
        if self.vcreg != "none" and {self.towers, self.vcreg_towers} == {"image", "text"}:
            raise PerdureError(
                f"vcreg_towers={self.vcreg_towers}: that tower does not learn here (towers={self.towers}), and what it makes "
                f"cannot change. Set vcreg_towers={self.towers}, or vcreg=none."
            )


@dataclass(frozen=True)
class Recipe(Training):
    """How a task is trained, and what of the towers learns: all weights, low-rank adapters, or rotations."""

    loss: Annotated[
        Literal["softmax", "sigmoid", "contrastive"],
        Field(
            description="cross entropy of classes, or SigLIP's, a sigmoid a pair (models with a bias alone); contrastive: of "
            "images with captions"
        ),
    ] = "softmax"
    adapt: Annotated[
        Literal["full", "lora", "rotation"],
        Field(description="train all weights, low-rank adapters, or rotations of the weights (orthogonal fine-tuning)"),
    ] = "full"
    lora_rank: Annotated[int, Field(ge=1, le=1024, description="rank of the adapters")] = 8
    lora_alpha: Annotated[float, Field(gt=0, description="adapters are scaled by alpha / rank")] = 16.0
    lora_layers: Annotated[tuple[str, ...], Field(description="linear layers that get an adapter")] = LORA_LAYERS
    lora_init: Annotated[
        Literal["kaiming", "xavier", "random"],
        Field(description="how A starts, B being 0; random: both random, so that a new adapter changes the model"),
    ] = "kaiming"
    rotation_block: Annotated[
        int,
        Field(ge=0, le=10**5, description="dimensions of a block of a rotation; 0: one block, all of a layer's input"),
    ] = 0
    rotation_layers: Annotated[tuple[str, ...], Field(description="linear layers whose weights are rotated")] = (
        "q_proj", "k_proj", "v_proj", "out_proj",
    )  # fmt: skip
