"""Tasks that are broken off inside and gone on with from their last save: the same bits, for every method."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import known, same_bits
from gift_step import Given
from test_gift import some_pairs

from perdure import launch
from perdure.benchmarks import mini
from perdure.core.seeding import reseed
from perdure.data.task import Stream
from perdure.engine.checkpoint import load_modules, module_state
from perdure.engine.settings import Settings
from perdure.engine.steps import Every, Steps
from perdure.engine.teach import Teacher
from perdure.engine.watcher import Watcher
from perdure.launch.options import build_entry
from perdure.methods.base import Method
from perdure.models.clip import CLIP

OWN = Path(__file__).parent / "own"
SMALL: dict[str, Any] = {
    "iterations": 4, "warmup": 1, "batch_size": 4, "reference": "drawings", "reference_batch": 4, "synthetic_batch": 5,
    "features": 48, "judge": 16, "answer.features": 48,
}  # fmt: skip
SLCA = {"epochs": 2, "align_epochs": 1, "align_draws": 8}
OTHERWISE: dict[str, dict[str, Any]] = {
    "cgil": {
        "replay": "mixture",
        "components": 2,
        "epochs": 1,
        "draws": 4,
        "vae_passes": 10,
        "vae_hidden": 8,
        "vae_latent": 4,
    },
    "finetune+slca": {**SLCA, "answer.epochs": 2, "epochs": 0},
    "clg_cbm": {
        "shots": 2,
        "keep_weights": "held_out",
        "look_every": 1,
        "per_class": 2,
        "neighbours": 3,
        "search_epochs": 3,
        "epochs": 3,
        "batch_size": 8,
    },
    "cpe_clip": {"epochs": 2, "warmup_epochs": 1, "later_epochs": 2, "augment": True, "depth": 1},
    "icarl": {"memory": 40},
    "keep_lora": {"epochs": 1, "head": True},
    "moe_adapters": {"experts": 3, "bottleneck": 4, "reference": "none", "selector_steps": 3, "selector_code": 4},
    "orth_sr": {"cutout": "random", "cutout_share": 0.7},
    "pfr": {"views": 2},
    "rapf": {"epochs": 2},
    "slca": SLCA,
    "experience_replay": {"memory": 40, "replayed": 3},
    "ocl_sda": {"memory": 40, "replayed": 3, "classifier": "cosine", "projector": "mlp"},
    "taalm": {"meta_source": "drawings", "meta_steps": 2, "meta_batch": 1, "hidden": 4},
    "td_vcl": {"n": 2, "buffer": 8, "samples": 2},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("finetune", {"optimizer": "sgd", "momentum": 0.0}),
    ("finetune", {"optimizer": "sgd", "momentum": 0.9, "towers": "image"}),
    ("gift", {"consolidation": "static", "static_steps": 3, "distillation": "none"}),
    ("gift", {"consolidation": "static_release", "static_steps": 2}),
    ("mg_clip", {"iterations": 0, "warmup": 0, "most_epochs": 3, "gap_change": 1e-9}),
    ("mg_clip", {"iterations": 0, "warmup": 0, "most_epochs": 2, "gap_change": 9.0, "freeze_A": True}),
    ("slca", {**SLCA, "tower_lr_scale": 0.0, "augment": False}),
    ("zscl", {"average": "moving", "moving_towards": "last", "average_every": 2}),
    ("zscl", {"average": "we_wise", "embed_texts": "student"}),
    (
        "cgil",
        {"replay": "vae", "epochs": 1, "draws": 2, "vae_passes": 10, "vae_hidden": 8, "vae_latent": 4, "shots": 2},
    ),
    ("orth_sr", {"rotation_block": 32, "cutout": "attentive", "cutout_at": "drawn"}),
    ("codyra", {"dense": 0.0, "kappa": 0.5, "kappa_steps": 2}),
    ("orth_sr", {"cutout": "random", "rotation_block": 32, "rotation_layers": ("v_proj",)}),
    ("pfr", {"distil_on": "synthetic"}),
    ("td_vcl", {"n": 2, "buffer": 8, "buffer_of": "synthetic"}),
    (str(OWN / "prompt.py"), {}),
    (str(OWN / "adapter.py"), {}),
]
CASES = [
    *(
        (e.name, OTHERWISE.get(e.name, {}))
        for e in launch.methods()
        if "role" not in e.about and str(OWN) not in e.name
    ),
    *VARIANTS,
]


class Killed(BaseException):
    """Nothing catches it, and nothing is tidied up in its name."""


class Ear(Watcher):
    """Counts steps; ends the process at the step number ``at``, before it can be saved."""

    def __init__(self, at: int = 0):
        self.at, self.steps, self.heard = at, 0, list[str]()

    def step(self, *heard: Any) -> None:
        self.steps += 1
        if self.steps == self.at:
            raise Killed

    def warn(self, text: str) -> None:
        self.heard.append(text)


class World:
    """A method on two short tasks, in one process or in several, one after another."""

    def __init__(self, name: str, values: dict[str, Any], clip: CLIP, stream: Stream, folder: Path):
        entry = launch.method_entry(name)
        options = {key: option.default for key, (_, option) in launch.method_options(entry).items()}
        self.values = {**options, **known(name, SMALL), **{k: v for k, v in values.items() if k in options}}
        self.entry, self.clip, self.folder = entry, clip, folder
        shots = values.get("shots", 0)
        self.stream = stream.few_shot(shots, 0).shortened(tasks=2, images=0 if shots else 9)
        self.pairs = some_pairs(stream.shortened(tasks=3, images=12))
        self.done: list[tuple[Any, ...]] = []

    def bound(self, clip: CLIP) -> Method:
        reseed(3, "bind")
        method = build_entry(self.entry, self.values)
        method.bind(clip, self.stream.context(3, self.folder))
        for part in getattr(method, "parts", {"learn": method}).values():
            if hasattr(part, "replay"):
                part.replay = Given(self.pairs)
        return method

    def life(self, ear: Ear, every: Every) -> None:
        """A process: go on after the last task that is done, until ``ear`` ends it."""
        method = self.bound(copy.deepcopy(self.clip))
        teacher = Teacher(method, 3, Settings(precision="fp32"), ear)
        method.lend(teacher.train)
        if self.done:
            (files, values), modules, weights, *_ = copy.deepcopy(self.done[-1])
            method.unpack_state(files, values)
            load_modules(method, modules)
            method.clip.load_own_state(weights, "saved")
        tasks = [*self.stream.tasks] if method.scope == "task" else [self.stream.joined(grouped=True)]
        for number, task in list(enumerate(tasks, 1))[len(self.done) :]:
            steps = Steps(self.folder, f"task_{number:02d}", ("id",), f"after {number - 1}", every, ear.warn)
            losses = teacher.learn(task, number, steps)
            weights = {name: tensor.clone() for name, tensor in method.clip.own_state().items()}
            kept = method.pack_state(), module_state(method), weights
            self.done.append((*copy.deepcopy(kept), dict(losses), copy.deepcopy(teacher.phases)))
            steps.done()


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    (files_a, values_a), (files_b, values_b) = a[0], b[0]
    assert files_a.keys() == files_b.keys() and values_a == values_b and a[3:] == b[3:]
    return all(same_bits(files_a[k], files_b[k]) for k in files_a) and all(map(same_bits, a[1:3], b[1:3]))


@pytest.fixture(scope="module")
def model() -> Iterator[CLIP]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clip = CLIP.load(str(mini.MODEL))
    clip.pretrained = clip.weights()
    yield clip
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "values"), CASES, ids=[f"{Path(n).stem}-{k}" for k, (n, _) in enumerate(CASES)])
def test_killed_inside_a_task_and_gone_on_with_ends_with_the_same_bits(
    name: str, values: dict[str, Any], model: CLIP, tmp_path: Path
) -> None:
    whole, broken = (World(name, values, model, mini.multi_domain("I"), tmp_path) for _ in range(2))
    free = Ear()
    whole.life(free, Every())
    draw, heard, ears = random.Random(f"{name} {values}"), 0, list[Ear]()
    for _ in range(2 if free.steps else 0):
        ears.append(Ear(draw.randint(1, max(1, free.steps - heard))))
        with pytest.raises(Killed):
            broken.life(ears[-1], Every(steps=2))
        heard += ears[-1].steps
    ears.append(Ear())
    broken.life(ears[-1], Every(steps=2))
    assert all(same(a, b) for a, b in zip(whole.done, broken.done, strict=True))
    assert not list(tmp_path.glob("begun_*"))
    # what was saved was not learned again: at most the steps since, and a phase of one step, a kill
    assert sum(ear.steps for ear in ears) <= free.steps + 3 * (len(ears) - 1)
