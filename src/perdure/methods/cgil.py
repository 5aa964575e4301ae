"""CGIL (Frascaroli et al., "CLIP with Generative Latent Replay: a Strong Baseline for Incremental Learning", BMVC 2024,
arXiv:2407.15793).

    replay   each class gets a generator of its image features f by the frozen CLIP: a VAE, fitted once
    key      k_c = text tower([start] v_c g_c [name . end]), unit; v_c: the class's own vectors, learned; g_c = G(t⁰_c): one
             vector that a network G, shared by all, makes of the class's hand-written prompt's text feature
    align    after each task, all v_c and G: CE(s·⟨f/‖f‖, k_c⟩ over the classes seen), on draws of all of them
    predict  argmax s·⟨f/‖f‖, k_c⟩; a class that was not learned has its hand-written prompt for a key

As in the release: AdamW anew a task at one rate; batch norm in G by running statistics that never run, so an affine map; in a
VAE by the batch's; the VAE's rate by a cosine with restarts of doubling length; a last batch of one image left out;
``noise=release``, z = mean + exp(log variance)·ε, where ``standard`` has ½ in the exponent. Exact shortcuts: features once,
keys of old classes once where neither they nor G learn, all decoders side by side, tokens cut after the longest prompt; the
scaling to 0 … 1 before that to deviation 1 is left out, as it changes nothing. Otherwise than there:
- ``unseen=unit``: the key of a class not learned is unit as all are. The release leaves it as long as it was projected
  (``unseen=release``), so that such classes win wherever cosines are positive, and its transfer figures with them.
- ``prompt=template`` puts the vectors before the name in the stream's own template; ``name`` has the name and a full stop.
- A dimension without spread stays what it is (there 0/0). A VAE of one image is refused before the work.
- ``replay=full`` (a shrunk full Gaussian) is not the release's; ``mixture`` has the density that is meant (there the deviation
  stands where the variance should). Its diffusion model and vectors made of each image (cocoop) are left out.
- A class that comes again keeps its row, and is drawn from all of its generators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from perdure.core.errors import PerdureError
from perdure.core.features import Features
from perdure.core.packing import Frozen
from perdure.core.seeding import derive
from perdure.data.task import Batch, Class, Context, Query, Task
from perdure.methods.base import register
from perdure.methods.base_head import HeadMethod, HeadOptions, HeadState
from perdure.models.class_prompts import ClassPrompts
from perdure.models.clip import CLIP
from perdure.models.heads import known
from perdure.ops import gaussians
from perdure.ops.losses import classification
from perdure.training.feature_replay import ReplayOptions, drawn, fitted
from perdure.training.fit import Backward, Stepper
from perdure.training.schedule import Schedule


@dataclass(frozen=True)
class Config(ReplayOptions, HeadOptions):
    lr: Annotated[float, Field(ge=0, description="of vectors and network, by AdamW")] = 0.03
    epochs: Annotated[int, Field(ge=0, le=10**6, description="of the alignment")] = 60
    batch_size: Annotated[int, Field(ge=1, le=10**6, description="draws a step of the alignment")] = 128
    weight_decay: Annotated[float, Field(ge=0, description="of the alignment")] = 0.0
    context: Annotated[
        Literal["both", "own", "shared", "generated"],
        Field(
            description="before the name: a class's own vectors and the network's; either; or own ones that all share"
        ),
    ] = "both"
    vectors: Annotated[int, Field(ge=1, le=1000, description="own vectors")] = 1
    prompt: Annotated[Literal["template", "name"], Field(description="what the vectors are put into")] = "template"
    trained: Annotated[
        Literal["seen", "task"], Field(description="whose own vectors learn: all classes', the task's")
    ] = "seen"
    orthogonal: Annotated[bool, Field(description="add mean((VVᵀ - I)²) of the vectors that learn")] = False
    unseen: Annotated[Literal["unit", "release"], Field(description="text features of classes not learned")] = "unit"


@dataclass
class Tuned(HeadState):
    """Own vectors (C, n, W), those of the network and all keys (C, D); by task, its classes' generators, side by side."""

    prompts: dict[str, Tensor] = field(default_factory=dict)
    replay: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@register("cgil", paper="arXiv:2407.15793")
class CGIL(HeadMethod):
    """Learned vectors in the prompts of all classes seen, aligned on features that a generator a class draws."""

    Config = Config
    State = Tuned
    state: Tuned

    def join(self, clip: CLIP, context: Context) -> None:
        super().join(clip, context)
        if clip.kind != "clip":
            raise PerdureError(
                f"cgil puts vectors into a text that is read forwards, to its end; the {clip.kind} at {clip.path} reads all of "
                "one that is as long as may be. Use it with a CLIP."
            )
        for task in context.tasks:
            self.check(task)
        width, wide = clip.width, clip.token_embedding.embedding_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(context.seed, "network of CGIL"))
            self.network = network(width, wide).to(clip.device)

    def check(self, task: Task) -> None:
        """Refuse what a VAE cannot be fitted to."""
        counts = torch.bincount(task.train.labels, minlength=len(task.classes)).tolist()
        if self.config.replay == "vae" and (
            one := [c.name for c, n in zip(task.classes, counts, strict=True) if n == 1]
        ):
            raise PerdureError(
                f"{task.name}: a VAE needs two images of a class, and there is one of {', '.join(one[:5])}"
                f"{' …' if len(one) > 5 else ''}. Set replay=gauss, full or mixture, or give more images."
            )

    def calibrate(self, task: Task) -> None:
        self.check(task)
        c, state = self.config, self.state
        x, place = self.learned_on(task)
        names = [name for name, _ in state.classes]
        found = fitted(x, place[task.train.labels], names, c, self.train, self.context.seed, task.name)
        state.replay[task.name] = Frozen(found)
        aligner = Aligner(self, place[place >= 0])
        count = c.draws * sum(len(kept["rows"]) for kept in state.replay.values())
        plan = Schedule(0, c.lr, 0, c.batch_size, weight_decay=c.weight_decay, floor=1.0, epochs=c.epochs).over(count)
        self.train(aligner, plan, self.drawn(self.generator(task, "draws of CGIL")), "alignment")
        self.state.prompts = aligner.outcome()

    def drawn(self, draw: torch.Generator) -> Iterator[Batch]:
        """Unit draws of all generators, shuffled anew each epoch."""
        c, kept = self.config, self.state.replay.values()
        rows = torch.cat([some["rows"] for some in kept]).repeat_interleave(c.draws)
        while True:
            x = F.normalize(torch.cat([drawn(some, c.draws, draw).flatten(0, 1) for some in kept]), dim=1)
            for some in gaussians.shuffled(len(x), draw).split(c.batch_size):
                yield Batch(x[some], rows[some])

    # ---- answering

    def born(self, count: int, task: str) -> Tensor:
        """Own vectors (count, n, W) of classes at birth."""
        draw = torch.Generator().manual_seed(derive(self.context.seed, task, "vectors of CGIL"))
        wide = self.clip.token_embedding.embedding_dim
        return 0.02 * torch.randn(count, self.config.vectors, wide, generator=draw)

    def logits(self, query: Query) -> Tensor:
        if self.config.unseen == "unit":
            return super().logits(query)
        raw = [self.clip.text_features(self.clip.tokens(c.prompts())).mean(0) for c in query.classes]
        return self.clip.similarity(self.embed(query), torch.stack(raw))

    def scores(self, seen: Features, rows: list[int]) -> Tensor:
        return self.clip.similarity(seen.embedded, self.state.prompts["keys"][rows])

    def finalize(self, query: Query, logits: Tensor) -> Tensor:
        """The logits of all classes, learned or not, on one scale."""
        columns, rows = known(self.state.classes, query.classes)
        if not rows or query.features is None:
            return logits
        out = logits.clone()
        out[:, columns] = self.scores(query.features, rows)
        return out

    def unpack_state(self, files: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        super().unpack_state(files, values)
        kept = {n.removeprefix("network/"): t for n, t in self.state.prompts.items() if n.startswith("network/")}
        self.network.load_state_dict(kept, strict=False)


class Aligner(Stepper):
    """Own vectors and the network, and the loss of their alignment; ``rows``: of the task's classes."""

    def __init__(self, method: CGIL, rows: Tensor):
        self.method, self.config, self.network, clip = method, method.config, method.network, method.clip
        classes = [Class(*row) for row in method.state.classes]
        c, count, first = self.config, len(classes), len(method.state.prompts.get("keys", ()))
        self.has_own, self.has_network = c.context != "generated", c.context in ("both", "generated")
        shared = c.context == "shared"
        born = method.born(1 if shared else count - first, method.state.tasks[-1]).to(clip.device)
        kept = method.state.prompts.get("own", born[:0])
        self.whole = kept if shared and len(kept) else torch.cat([kept, born])
        everything = torch.arange(count, device=clip.device)
        self.rows = everything if c.trained == "seen" else rows
        self.rest = everything[~torch.isin(everything, self.rows)]
        self.places = everything[:1] if shared else self.rows  # of those of ``whole`` that learn
        self.own = nn.Parameter(self.whole[self.places].clone())
        count = (c.vectors if self.has_own else 0) + self.has_network
        self.prompts = ClassPrompts(clip, classes, count, c.prompt == "name")
        with torch.no_grad():
            self.origins = clip.text_features(clip.tokens([one.prompts()[0] for one in classes]))
            self.old_keys = self.encoded(self.rest) if len(self.rest) else self.origins[:0]

    def parameters(self) -> Mapping[str, nn.Parameter]:
        network = {f"network.{n}": p for n, p in self.network.named_parameters()} if self.has_network else {}
        return {**({"own": self.own} if self.has_own else {}), **network}

    def encoded(self, rows: Tensor) -> Tensor:
        """The keys (n, D) of the classes ``rows``."""
        parts = []
        if self.has_own:
            own = self.whole.index_copy(0, self.places, self.own)
            parts.append(own.expand(len(self.prompts.ids), -1, -1)[rows])
        if self.has_network:
            parts.append(self.network(self.origins[rows]).unsqueeze(1))
        return self.prompts.encoded(rows, torch.cat(parts, 1))

    def keys(self) -> Tensor:
        """(C, D), unit; those of classes that do not learn are without gradient."""
        keys = self.encoded(self.rows)
        if not len(self.rest):
            return keys
        if self.has_network or self.config.context == "shared":  # the old keys move with what is shared
            with torch.no_grad():
                self.old_keys = self.encoded(self.rest)
        place = torch.cat([self.rows, self.rest]).argsort()
        return torch.cat([keys, self.old_keys])[place]

    def step(self, batch: Batch, backward: Backward) -> None:
        losses = {"alignment": classification(self.method.clip.similarity(batch.images, self.keys()), batch.labels)}
        if self.config.orthogonal:
            v = self.own.flatten(0, 1)
            losses["orthogonal"] = (v @ v.T - torch.eye(len(v), device=v.device)).square().mean()
        backward(**losses)

    @torch.no_grad()
    def outcome(self) -> dict[str, Tensor]:
        """What is kept."""
        network = {f"network/{n}": p.detach().clone() for n, p in self.network.named_parameters()}
        return {"own": self.whole.index_copy(0, self.places, self.own), "keys": self.keys(), **network}


def network(width: int, wide: int) -> nn.Sequential:
    """G: text features (n, D) → vectors (n, W). Its batch norm is an affine map: its statistics stay as they are born."""
    blocks = [
        [nn.Linear(a, b), nn.BatchNorm1d(b), nn.SELU()] for a, b in ((width, width), (width, width), (width, wide))
    ]
    return nn.Sequential(*(layer for block in blocks for layer in block), nn.Linear(wide, wide)).eval()
