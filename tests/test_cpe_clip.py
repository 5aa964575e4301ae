"""CPE-CLIP against the numbers of the paper's own released code, through the method and ``fit``; and what its switches do."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cases import case, in_order, part, tiny_clip
from torch import Tensor

import perdure
from perdure import launch
from perdure.benchmarks import mini
from perdure.core.errors import PerdureError
from perdure.data.task import Class, Context, Images, Query, Task
from perdure.engine.evaluate import per_cent
from perdure.methods.compose import Compose
from perdure.methods.condu import ConDU
from perdure.methods.cpe_clip import CPECLIP
from perdure.models.clip import CLIP
from perdure.training import fit as training
from perdure.training.fit import fit

NAMES = {"g_values": "vectors", "prompt_proj.weight": "project.weight", "prompt_proj.bias": "project.bias"}


class Watched(CPECLIP):
    """Notes the first gradients of a session, as the optimiser gets them."""

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.first: dict[str, Tensor] = {}

    def step(self, batch: Any, backward: Any) -> None:
        super().step(batch, backward)
        self.first = self.first or {n: p.grad.clone() for n, p in self.parameters().items() if p.grad is not None}


def ready(about: dict[str, Any], t: dict[str, Tensor], **values: Any) -> Watched:
    h, last = about["hyper_parameters"], len(about["hyper_parameters"]["classes_per_session"]) - 1
    clip = tiny_clip(about, part(t, "pretrained/"), dict(zip(about["texts"], t[f"session{last}/tokens"], strict=True)))
    settings: dict[str, Any] = dict(
        length=h["L"], depth=h["depth"], text_mode=h["text_mode"], image_mode=h["vision_mode"],
        regularizer=h["regularization"], epochs=h["base_epochs"], batch_size=h["base_batch"], prompt="name",
        later_epochs=h["later_epochs"], later_batch_size=h["later_batch"], lr_first=h["rate_first"],
        lr=h["rate_first"] + 50 * h["rate_per_epoch"],
    )  # fmt: skip
    clip.backbone.logit_scale.data.fill_(torch.tensor(h["logit_scale"]).log())
    method = Watched(**settings | values)
    method.bind(clip)
    return method


def sessions(about: dict[str, Any], t: dict[str, Tensor]) -> list[Task]:
    out, first = [], 0
    for k, count in enumerate(about["hyper_parameters"]["classes_per_session"]):
        classes = tuple(Class(name.removesuffix("."), ("a {}",)) for name in about["texts"][first : first + count])
        train, test = (
            Images(t[f"session{k}/{s}_images"], t[f"session{k}/{s}_labels"] - first) for s in ("train", "test")
        )
        out.append(Task(f"session{k}", classes, train, test, k))
        first += count
    return out


@pytest.fixture(autouse=True)
def orderly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "batches", in_order)


def put(method: CPECLIP, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in values.items():
            method.prompts.get_parameter(NAMES[name]).copy_(tensor)


def learn(method: Any, task: Task) -> Any:
    method.start(task)
    method.begin_task(task)
    losses = fit(method, task, torch.Generator().manual_seed(0), method.clip.size, method.clip.device)
    method.clip.trained(f"trained {task.name}", method.parameters().values())
    method.fuse(task)
    return losses


def far(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).norm() / theirs.norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", ["cpe_clip_a"])
def test_every_loss_gradient_prompt_and_logit_is_the_release_s(name: str) -> None:
    about, t = case(name)
    allowed, method = about["tolerance"], ready(about, t)
    tasks = sessions(about, t)
    put(method, part(t, "start_session0/"))
    for k, task in enumerate(tasks):
        wanted = [s for s in about["steps"] if s["session"] == k]
        start = part(t, f"start_session{k}/")
        for n, theirs in start.items():
            torch.testing.assert_close(method.prompts.get_parameter(NAMES[n]).data, theirs, rtol=0, atol=2e-3)
        put(method, start)
        plan = method.schedule(task)
        assert [plan.rate(i) for i in range(plan.steps)] == pytest.approx([s["lr"] for s in wanted], rel=1e-6)
        losses = learn(method, task)
        assert losses["task"] == pytest.approx([s["loss"] for s in wanted], rel=allowed["losses_relative"])
        for n, theirs in part(t, f"grad0_session{k}/").items():
            assert far(method.first[NAMES[n]], theirs) < allowed["gradients_relative_l2"], n
        for n, theirs in part(t, f"end_session{k}/").items():
            moved = method.prompts.get_parameter(NAMES[n]).detach() - start[n]
            assert far(moved, theirs - start[n]) < allowed["updates_relative_l2"], n
        seen = tuple(c for one in tasks[: k + 1] for c in one.classes)
        found = method.predict(Query(torch.cat([one.test.pixels for one in tasks[: k + 1]]), seen))
        torch.testing.assert_close(found, t[f"eval_session{k}/logits"], rtol=0, atol=allowed["logits_abs"])
        assert torch.equal(found.argmax(1), t[f"eval_session{k}/logits"].argmax(1))


@pytest.mark.parametrize("name", ["cpe_clip_a"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_pair_of_modes_is_the_release_s(name: str, attention: str) -> None:
    about, t = case(name)
    last = len(about["hyper_parameters"]["classes_per_session"]) - 1
    first, every = sessions(about, t)[0], sum((task.classes for task in sessions(about, t)), ())
    for pair, theirs in part(t, "forward/").items():
        modes = dict(text_mode=about["hyper_parameters"]["text_mode"], towers="text")
        if pair != "no_vision_prompts":
            text, image = pair.split("/")
            modes = dict(text_mode=text.removeprefix("text_"), image_mode=image.removeprefix("vision_"))
        method = ready(about, t, **modes)
        method.clip.backbone.set_attn_implementation(attention)
        put(method, part(t, f"end_session{last}/"))
        method.state.sizes = [4]
        method.clip.changed("with prompts")
        found = method.predict(Query(first.test.pixels[:4], every))
        torch.testing.assert_close(found, theirs, rtol=0, atol=about["tolerance"]["logits_abs"], msg=pair)


# ---- what its switches do


def some_sessions(images: int = 6) -> tuple[Task, ...]:
    return mini.class_incremental().shortened(tasks=3, images=images).tasks


def bound(clip: CLIP, fuse: Any = None, **values: Any) -> Any:
    method: Any = CPECLIP(**{"epochs": 1, "later_epochs": 2, "lr_first": 0.01, "batch_size": 3, **values})
    method = Compose(method, fuse=fuse) if fuse else method
    torch.manual_seed(0)
    method.bind(clip, mini.class_incremental().context(seed=1))
    return method


def test_the_pre_trained_model_has_no_prompts_before_or_after(clip: CLIP) -> None:
    task = some_sessions()[0]
    query = Query(task.test.pixels, task.classes)
    plain = CLIP.load(str(mini.MODEL))
    with torch.no_grad():
        before = plain.similarity(
            plain.encode_image(query.images), plain.class_texts([c.prompts() for c in query.classes])
        )
    method = bound(clip)
    assert torch.equal(method.predict(query), before) and clip.fingerprint() == plain.fingerprint()
    learn(method, task)
    after = method.predict(query)
    assert not torch.allclose(after, before, atol=0.1)
    with clip.preserved():
        clip.load_weights("pretrained", clip.pretrained)
        assert torch.equal(method.logits(query), before)
    assert torch.equal(method.predict(query), after) and clip.fingerprint() == plain.fingerprint()
    assert set(clip.own_state()) == {
        f"prompts.{name}" for name in NAMES.values()
    }  # a checkpoint holds nothing of CLIP's


@pytest.mark.parametrize("regularizer", ["balance", "freeze", "none"])
def test_later_sessions_move_less_or_leave_the_text_side(regularizer: str, clip: CLIP) -> None:
    method = bound(clip, regularizer=regularizer, later_epochs=1, later_batch_size=6, weight_decay=0.0)
    moved: dict[int, dict[str, Tensor]] = {}
    for number, task in enumerate(some_sessions()):
        before = {n: p.detach().clone() for n, p in method.prompts.named_parameters()}
        losses = learn(method, task)
        moved[number] = {n: p.detach() - before[n] for n, p in method.prompts.named_parameters()}
        assert method.state.sizes == [6] * (number + 1) and len(losses["task"]) == (2 if number == 0 else 1)
    assert bool(moved[1]["vectors"].any()) and bool(moved[2]["project.weight"].any())
    assert bool(moved[2]["vectors"].any()) == (regularizer != "freeze")


def test_the_share_of_a_session_is_its_share_of_the_classes(clip: CLIP) -> None:
    """One step of a second session, at one rate: half of what it would be, as its classes are half of those seen."""
    first, second, _ = some_sessions()
    moved = {}
    for regularizer in ("balance", "none"):
        method = bound(
            CLIP.load(str(mini.MODEL)), regularizer=regularizer, later_epochs=1, later_batch_size=6, weight_decay=0.0
        )
        learn(method, first)
        before = method.prompts.vectors.detach().clone()
        learn(method, second)
        moved[regularizer] = method.prompts.vectors.detach() - before
    torch.testing.assert_close(moved["balance"], moved["none"] / 2, rtol=1e-4, atol=1e-8)


def test_a_class_is_asked_for_by_template_or_by_name(clip: CLIP) -> None:
    method = bound(clip, prompt="name")
    task = some_sessions()[0]
    learn(method, task)
    found = method.predict(Query(task.test.pixels, task.classes))
    with torch.no_grad():
        texts = clip.encode_text([f"{c.name}." for c in task.classes])
        torch.testing.assert_close(
            found, clip.similarity(clip.encode_image(task.test.pixels), texts), rtol=0, atol=1e-4
        )
    method.config = CPECLIP.Config(**{**vars(method.config), "prompt": "template"})
    assert not torch.allclose(found, method.predict(Query(task.test.pixels, task.classes)), atol=0.1)


def test_steps_in_the_place_of_epochs(clip: CLIP) -> None:
    method = bound(clip, epochs=0, iterations=3, warmup=2, lr=0.01)
    plan = method.schedule(some_sessions()[0])
    assert plan.steps == 3 and [plan.rate(k) for k in range(2)] == pytest.approx([0.005, 0.01])


def test_a_name_without_room_is_cut_before_its_end_and_that_is_said(clip: CLIP) -> None:
    """What is cut lies behind the end token's place: another text with the same beginning is the same to the model."""
    said: list[str] = []
    words = "a drawing of a very long name with many words that never ends"
    room = clip.backbone.config.text_config.max_position_embeddings
    while clip.tokenizer(words).input_ids.__len__() > room:
        words = words.rsplit(" ", 1)[0]
    ids = clip.tokens([words])[0]
    assert room - 3 < len(ids) <= room
    method = CPECLIP(length=3)
    method.bind(clip, Context(warn=said.append))
    method.state.sizes = [1]
    clip.changed("with prompts")
    with torch.no_grad():
        found = clip.encode_tokens(ids[None])
        kept = torch.cat([ids[: room - 4], ids[-1:]])
        assert len(said) == 1 and said[0].startswith("Texts without room beside 3 prompts: 1 at once;")
        torch.testing.assert_close(found, clip.encode_tokens(kept[None]), rtol=0, atol=1e-6)
        assert len(said) == 1


@pytest.mark.slow
def test_heads_on_patches_and_experts_have_the_prompts_too(clip: CLIP) -> None:
    """Patches are found behind the prompts that stand there; ConDU's delta is that of the prompts, and its expert answers."""
    task = some_sessions()[0]
    method = bound(clip, fuse=ConDU())
    query = Query(task.test.pixels, task.classes, task=0)
    learn(method, task)
    found = method.predict(query)
    alone = bound(CLIP.load(str(mini.MODEL)))
    learn(alone, task)
    torch.testing.assert_close(found, alone.predict(query), rtol=0, atol=1e-3)
    features = alone.clip.features(task.test.pixels[:4], block=1, grid=2)
    assert features.patches.shape == (4, 4 * 192)


def test_what_does_not_fit_is_refused(clip: CLIP, tmp_path: Path) -> None:
    with pytest.raises(PerdureError, match=r"depth=5: the towers of .* have 4 \(text\) and 4 \(image\) layers"):
        CPECLIP(depth=5).bind(clip)
    with pytest.raises(PerdureError, match=r"length=14: .* reads 16 tokens, and a name needs three. Set length=13"):
        CPECLIP(length=14).bind(clip)
    with pytest.raises(PerdureError, match="vcreg_towers=both: prompts stand among the tokens of a text here"):
        CPECLIP(vcreg="blocks", vcreg_towers="both").bind(clip)
    siglip = CLIP.load(str(tiny.checkpoint(tmp_path / "siglip", "siglip", side=32, patch=16)))
    with pytest.raises(PerdureError, match="has none. Use it with a CLIP"):
        CPECLIP().bind(siglip)


@pytest.mark.slow
def test_prompts_raise_the_base_session_and_the_regulariser_keeps_the_curve(tmp_path: Path) -> None:
    """With bare names, on the first sessions of the small world: more right than without prompts after the base session, and
    more after later ones than where each moves the prompts as far as the first. An export would be another model."""
    stream = mini.few_shot()
    base = stream.tasks[0]
    born = CPECLIP(prompt="name")
    born.bind(CLIP.load(str(mini.MODEL)))
    bare = per_cent(born.predict(Query(base.test.pixels, base.classes)).argmax(1) == base.test.labels)
    asked: dict[str, Any] = dict(tasks=3, prompt="name", epochs=2, precision="fp32")
    held, free = (
        perdure.run("cpe_clip", "mini-fscil", tmp_path / rule, regularizer=rule, **asked)["incremental"]
        for rule in ("balance", "none")
    )
    assert held[0] == free[0] > bare + 4
    assert sum(held) > sum(free) + 4
    with pytest.raises(PerdureError, match="for which a plain transformers checkpoint has no place"):
        launch.export(tmp_path / "balance", tmp_path / "out")
    assert not (tmp_path / "out").exists()
