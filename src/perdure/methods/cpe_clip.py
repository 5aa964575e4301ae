"""CPE-CLIP (D'Alessandro et al., "Multimodal Parameter-Efficient Few-Shot Class Incremental Learning", ICCV Workshops 2023,
arXiv:2303.04751): prompts in both towers of a frozen CLIP, shared by all sessions.

    G (depth, L, W) in the text tower, V = G Pᵀ + b in the image tower: see ``models/prompts.py``; G, P and b alone learn
    L = CE(100·I·Tᵀ) over the session's own classes
    ∇ ← ∇·n_t / Σ_{j≤t} n_j     from the second session on (n: a session's classes); weight decay is not scaled
    rate(epoch) = 0.001 + 0.099·epoch/50, SGD with momentum, new in each session

The classes of all sessions compete in the answer. The logits of earlier classes, which the release computes and overwrites in
training, are not computed: exact.

As in the release: later sessions have batches and epochs of their own; the rates go up through a warm-up that no session
outlasts; images are not cropped at random. Otherwise than in the release (its way: the option in brackets):
- A class is asked for by the stream's templates (``prompt=name``: its name and a full stop).
- A text is read at the tokenizer's end token (there at the largest id, which is the same in CLIP's own vocabulary).
- The logits' factor is the model's own (there 100). Sizes are the model's (there literals of ViT-B/16).
- ``regularizer=freeze`` holds G from the third session on and scales nothing; P and b go on, as they do there, where they
  were meant to be held too. ``none`` leaves the prompts as they are.
- A text without room for the prompts is cut before its end token, and that is said (there it runs past the positions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.data.task import Batch, Class, Context, Query, Task
from perdure.methods.base import Method, State, Training, register
from perdure.models.clip import CLIP
from perdure.models.prompts import Mode, Prompts, attach_image, attach_text
from perdure.training.fit import Backward
from perdure.training.schedule import Schedule


@dataclass(frozen=True)
class Config(Training):
    lr: Annotated[float, Field(ge=0, description="the rate that a warm-up through its end would reach")] = 0.1
    lr_first: Annotated[float, Field(ge=0, description="the rate of a session's first epoch")] = 0.001
    warmup_epochs: Annotated[int, Field(ge=0, le=10**6, description="epochs over which it would go up to lr")] = 50
    epochs: Annotated[
        int, Field(ge=0, le=10**6, description="passes over the first session; 0: iterations, in every session")
    ] = 5
    later_epochs: Annotated[int, Field(ge=0, le=10**6, description="passes over a later session; 0: none")] = 5
    batch_size: Annotated[int, Field(ge=1, le=10**6, description="images a step, of the first session")] = 32
    later_batch_size: Annotated[int, Field(ge=1, le=10**6, description="images a step, of later sessions")] = 4
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="of the classification loss")] = 0.0
    optimizer: Annotated[
        Literal["adamw", "adam", "sgd"], Field(description="weight decay is decoupled in adamw alone")
    ] = "sgd"
    weight_decay: Annotated[float, Field(ge=0, description="of the optimiser")] = 1e-5
    augment: Annotated[bool, Field(description="crop training images at random")] = False
    length: Annotated[int, Field(ge=1, le=1000, description="L, prompts a layer")] = 2
    depth: Annotated[int, Field(ge=0, le=1000, description="layers that get prompts of their own; 0: all")] = 0
    text_mode: Annotated[Mode, Field(description="what a layer of the text tower makes of the prompts there")] = (
        "replace"
    )
    image_mode: Annotated[Mode, Field(description="what one of the image tower makes of them")] = "accumulate"
    regularizer: Annotated[
        Literal["balance", "freeze", "none"],
        Field(description="of later sessions: smaller gradients, or G held from the third on"),
    ] = "balance"
    prompt: Annotated[
        Literal["template", "name"], Field(description="how a class is asked for: the stream's templates, or its name")
    ] = "template"


@dataclass
class Sessions(State):
    """How many classes each session so far had."""

    sizes: list[int] = field(default_factory=list)


@register("cpe_clip", paper="arXiv:2303.04751")
class CPECLIP(Method):
    """Prompts in both towers, tied by a linear map, that learn more slowly the more classes they stand for."""

    Config = Config
    plays = ("learn",)
    State = Sessions
    state: Sessions
    learning = has_cut = False

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        c = self.config
        texts, images = clip.backbone.config.text_config, clip.backbone.config.vision_config
        self.check(clip, texts.num_hidden_layers, images.num_hidden_layers)
        clip.backbone.requires_grad_(False)
        self.join(clip, context or Context())
        depth = c.depth or min(texts.num_hidden_layers, images.num_hidden_layers)
        self.prompts = Prompts(depth, c.length, texts.hidden_size, images.hidden_size).to(clip.device)
        clip.grow("prompts", self.prompts)
        if c.towers != "text":
            attach_image(clip.backbone, self.prompts, c.image_mode, clip.patches**2, self.acts)
        if c.towers != "image":
            end = clip.tokenizer.eos_token_id
            attach_text(clip.backbone, self.prompts, c.text_mode, end, self.acts, self.say_cut)

    def check(self, clip: CLIP, texts: int, images: int) -> None:
        """Refuse a model without a place for the prompts, and more of them than it has room for."""
        c = self.config
        if clip.kind != "clip":
            raise PerdureError(
                f"cpe_clip puts prompts behind the start token of a text that is read forwards; the {clip.kind} at {clip.path} "
                "has none. Use it with a CLIP."
            )
        if c.depth > min(texts, images):
            raise PerdureError(
                f"depth={c.depth}: the towers of {clip.path} have {texts} (text) and {images} (image) layers. Set "
                f"depth={min(texts, images)} or less; 0: all."
            )
        if c.vcreg != "none" and c.vcreg_towers != "image":
            raise PerdureError(
                f"vcreg_towers={c.vcreg_towers}: prompts stand among the tokens of a text here, and VCReg cannot tell which "
                "rows count. Set vcreg_towers=image, or vcreg=none."
            )
        context = clip.backbone.config.text_config.max_position_embeddings
        if c.length > context - 3:  # a start token, a word, an end token
            raise PerdureError(
                f"length={c.length}: the text tower of {clip.path} reads {context} tokens, and a name needs three. Set "
                f"length={context - 3} or less."
            )

    def acts(self) -> bool:
        """Whether the prompts are in the towers: while they are learned and after, but not in the pre-trained model."""
        return self.learning or (bool(self.state.sizes) and self.clip.holds != "pretrained")

    def say_cut(self, count: int) -> None:
        if not self.has_cut:
            self.context.warn(
                f"Texts without room beside {self.config.length} prompts: {count} at once; each is cut before its end."
            )
        self.has_cut = True

    # ---- learn

    def begin_task(self, task: Task) -> None:
        self.learning = True
        super().begin_task(replace(task, classes=self.asked(task.classes)))

    def asked(self, classes: Sequence[Class]) -> tuple[Class, ...]:
        """The classes as they are asked for."""
        bare = self.config.prompt == "name"
        return tuple(replace(one, templates=("{}.",)) if bare else one for one in classes)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        held = self.config.regularizer == "freeze" and len(self.state.sizes) > 1
        return {name: p for name, p in self.prompts.named_parameters() if not (held and name == "vectors")}

    def schedule(self, task: Task) -> Schedule:
        c, later = self.config, bool(self.state.sizes)
        plan = replace(
            super().schedule(task), batch_size=c.later_batch_size if later else c.batch_size, augment=c.augment
        )
        if not c.epochs:
            return plan
        size = -(-len(task.train) // plan.batch_size)
        steps = size * (c.later_epochs if later else c.epochs)
        return replace(plan, steps=steps, stride=size, warmup=c.warmup_epochs * size, begin=c.lr_first)

    def step(self, batch: Batch, backward: Backward) -> None:
        """One batch: cross entropy over the session's classes, its gradient made smaller."""
        gradients = backward(task=self.task_loss(batch))
        if self.config.regularizer == "balance" and self.state.sizes:
            share = self.own / (self.own + sum(self.state.sizes))
            for name, gradient in gradients.items():
                if gradient is not None:
                    backward.replace(name, share * gradient)

    @property
    def own(self) -> int:
        """The classes of the session that is being learned."""
        return len(self.tokens)

    def finish(self, task: Task) -> None:
        self.learning = False
        self.state.sizes = [*self.state.sizes, len(task.classes)]

    # ---- answer

    def logits(self, query: Query) -> Tensor:
        return super().logits(replace(query, classes=self.asked(query.classes)))
