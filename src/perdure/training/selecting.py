"""DDAS (Yu et al., CVPR 2024, arXiv:2403.11549, section 3.3): autoencoders on frozen features say which task an image is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from perdure.core import processes
from perdure.core.packing import Frozen
from perdure.core.seeding import derive
from perdure.data.files import Pixels
from perdure.data.task import Batch, Class, Images, Task
from perdure.models import selector
from perdure.models.clip import CLIP
from perdure.models.selector import Autoencoder, Extract
from perdure.models.shared import stretch
from perdure.training.fit import Backward, Losses, Stepper, batches, drawn
from perdure.training.schedule import Schedule

KEPT = 1 << 30  # bytes of features that are kept where images are not augmented
Train = Callable[[Stepper, Schedule, Iterator[Batch], str], Losses]


@dataclass(frozen=True)
class Selection:
    select: Annotated[
        Literal["image", "batch"],
        Field(description="what the selector decides for: an image, or a batch of one data set"),
    ] = "image"
    select_batch: Annotated[int, Field(ge=1, description="select=batch: images")] = 128
    selector_features: Annotated[
        Literal["clip", "alexnet"],
        Field(description="of the first block of CLIP's image tower, or AlexNet's as released"),
    ] = "clip"
    threshold: Annotated[
        float | None, Field(gt=0, description="loss above which an image is no task's; none: by quantile, task by task")
    ] = None
    quantile: Annotated[float, Field(gt=0, le=1, description="of the losses on images that were held out")] = 0.99
    held_out: Annotated[float, Field(gt=0, lt=1, description="share of a task's images that is held out for it")] = 0.1
    selector_code: Annotated[int, Field(ge=1, le=10**5, description="hidden units of an autoencoder")] = 100
    selector_steps: Annotated[int, Field(ge=0, le=10**9, description="its steps a task (and one more)")] = 300
    reference_steps: Annotated[int, Field(ge=0, le=10**9, description="its steps on the reference set")] = 1000
    selector_batch: Annotated[int, Field(ge=1, le=10**6, description="its images a step")] = 64
    selector_lr: Annotated[float, Field(ge=0, description="its rate, a tenth after each ten epochs")] = 0.01
    selector_decay: Annotated[float, Field(ge=0, description="its weight decay")] = 1e-4
    selector_augment: Annotated[bool, Field(description="crop its training images at random")] = True


class Kept(Protocol):
    """What outlives a task: autoencoders by number (0: the reference set's, i: the i-th task's), thresholds of the tasks, mean
    and std of features, numbers of training images that are held out, by task."""

    selector: dict[str, dict[str, Tensor]]
    thresholds: list[float]
    standard: dict[str, Tensor]
    held_out: dict[str, list[int]]


class Selector:
    """Learns an autoencoder a task, and chooses among them; the model must hold the weights whose features are asked."""

    def __init__(self, config: Selection, clip: CLIP, kept: Kept, seed: int, train: Train):
        self.config, self.clip, self.kept, self.seed, self.train = config, clip, kept, seed, train
        self.extract = {"clip": selector.first_block, "alexnet": selector.alexnet}[config.selector_features](clip)
        self.autoencoders: dict[int, Autoencoder] = {}

    def restore(self, kept: Kept) -> None:
        """Take what was kept of the tasks so far."""
        self.kept, self.autoencoders = kept, {}
        for number, tensors in kept.selector.items():
            code, width = tensors["encoder.weight"].shape
            self.autoencoders[int(number)] = one = self.made(width, code)
            one.load_state_dict(tensors)

    def made(self, width: int, code: int) -> Autoencoder:
        """A new autoencoder."""
        return Autoencoder(width, code).to(self.clip.device)

    # ---- features

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) → f (N, D) in 0 … 1, in fp32."""
        with torch.autocast(self.clip.device.type, enabled=False):
            x, standard = self.extract(images), self.kept.standard
            return torch.sigmoid((x - standard["mean"]) / standard["std"] if standard else x)

    def of_all(self, compute: Extract, pixels: Pixels) -> Tensor:
        """(N, …): what is computed of many images, ``evaluation_batch`` at a time."""
        parts = [compute(part) for part in stretch(pixels).split(self.clip.evaluation_batch)]
        return processes.gathered(torch.cat(parts), len(pixels))

    @torch.no_grad()
    def standardise(self, pixels: Pixels) -> None:
        """Bring features to mean 0 and deviation 1 over these images; AlexNet's are taken as they are."""
        if self.config.selector_features == "alexnet" or self.kept.standard:
            return
        moments = torch.zeros((), dtype=torch.float64, device=self.clip.device)
        for part in pixels.split(self.clip.evaluation_batch):
            x = self.extract(part).double()
            moments = moments + torch.stack([x.sum(0), x.square().sum(0)]) / len(pixels)
        mean, spread = moments[0], (moments[1] - moments[0].square()).clamp_min(0).sqrt().clamp_min(1e-6)
        self.kept.standard = {"mean": mean.float(), "std": spread.float()}

    # ---- learning

    def learn_reference(self, pixels: Pixels) -> None:
        """A₀, on images that are of no task."""
        self.learn(0, pixels, self.config.reference_steps, "reference")

    def learn_task(self, task: Task) -> None:
        """The next A_i, and its threshold."""
        number, count = len(self.kept.thresholds) + 1, len(task.train)
        order = torch.randperm(count, generator=self.draws(task.name, "held out"))
        away = 0 if self.config.threshold else min(count - 1, max(1, round(self.config.held_out * count)))
        held, fitted = order[:away].sort().values, order[away:].sort().values
        self.learn(number, task.train.take(fitted).pixels, self.config.selector_steps, task.name)
        limit = self.config.threshold
        if limit is None:
            left = task.train.take(held if len(held) else fitted).pixels
            limit = self.losses(left)[:, number].double().quantile(self.config.quantile).item()
            self.kept.held_out[task.name] = held.tolist()
        self.kept.thresholds = [*self.kept.thresholds, limit]

    def learn(self, number: int, pixels: Pixels, steps: int, name: str) -> None:
        """Train one autoencoder for steps + 1 steps."""
        c = self.config
        width = self.features(pixels[torch.tensor([0])]).shape[1]
        one = self.autoencoders[number] = self.made(width, c.selector_code)
        tens = 10 * -(-len(pixels) // c.selector_batch)
        plan = Schedule(
            steps + 1, c.selector_lr, 0, c.selector_batch, c.selector_decay, optimizer="adam", augment=c.selector_augment,
            milestones=tuple(range(tens, steps + 1, tens)) or (steps + 1,),
        )  # fmt: skip
        kept = not c.selector_augment and len(pixels) * width * 4 <= KEPT
        self.train(Learning(one, self.features), plan, self.fed(pixels, plan, name, kept), f"selector, {name}")
        self.kept.selector[str(number)] = Frozen({n: t.detach().clone() for n, t in one.state_dict().items()})

    def fed(self, pixels: Pixels, plan: Schedule, name: str, kept: bool) -> Iterator[Batch]:
        """Images without end; where features are kept, those."""
        draws = self.draws(name, "order")
        if kept:
            f = self.of_all(self.features, pixels)
            for index in batches(len(f), plan.batch_size, draws):
                yield Batch(f[index], torch.zeros_like(index), features=True)
        nothing = Images(pixels, torch.zeros(len(pixels), dtype=torch.int64))
        yield from drawn(Task(name, (Class(name, ("{}",)),), nothing, nothing), plan, draws, self.clip.size)

    def draws(self, task: str, what: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive(self.seed, task, f"{what} of the selector"))

    # ---- choosing

    @torch.no_grad()
    def losses(self, pixels: Pixels) -> Tensor:
        """(N, 1 + T): the loss of each image under A₀ (infinite where there is none) and each task's autoencoder."""
        numbers = range(max(self.autoencoders) + 1)

        def losses(images: Tensor) -> Tensor:
            f = self.features(images)
            none = f.new_full((len(f),), torch.inf)
            with torch.autocast(f.device.type, enabled=False):
                return torch.stack(
                    [self.autoencoders[k].losses(f) if k in self.autoencoders else none for k in numbers], 1
                )

        return self.of_all(losses, pixels)

    def choose(self, pixels: Pixels) -> Tensor:
        """(N,): the number of the task that each image looks like, 0: none's."""
        together = self.config.select_batch if self.config.select == "batch" else 1
        return selector.choose(self.losses(pixels), self.kept.thresholds, together).cpu()


class Learning(Stepper):
    """Mean (A(f) - f)²."""

    def __init__(self, one: Autoencoder, features: Callable[[Tensor], Tensor]):
        self.one, self.features = one, features

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.one.named_parameters())

    def step(self, batch: Batch, backward: Backward) -> None:
        f = batch.images if "features" in batch else self.features(batch.images)
        with torch.autocast(f.device.type, enabled=False):
            backward(selector=self.one.losses(f).mean())
