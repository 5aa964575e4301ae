"""Gaussians of classes: running moments, shrinkage, draws, mixtures; and the schedules and prompts that their methods need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perdure.core.errors import PerdureError
from perdure.data.task import Class
from perdure.models.class_prompts import ClassPrompts
from perdure.models.clip import CLIP
from perdure.ops import gaussians
from perdure.training import feature_replay
from perdure.training.feature_replay import ReplayOptions
from perdure.training.fit import optimise
from perdure.training.schedule import Schedule


def some(n: int, seed: int = 0, width: int = 5) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) @ torch.ones(width, width).tril() + 3


@pytest.mark.parametrize("width", [5, 6])
def test_moments_that_run_are_those_of_all_rows(width: int) -> None:
    x, rows = some(40, width=width), torch.arange(40) % 3
    kept = gaussians.add({}, x[:10], rows[:10], 3)
    kept = gaussians.add(kept, x[10:31], rows[10:31], 3)
    kept = gaussians.add(kept, torch.cat([x[31:], some(1, 9, width)]), torch.cat([rows[31:], torch.tensor([4])]), 6)
    assert kept["counts"].tolist() == [14, 13, 13, 0, 1, 0]
    for row in range(3):
        own = x[rows == row].double()
        torch.testing.assert_close(kept["means"][row], own.mean(0))
        wanted = own.T.cov().float() + 1e-4 * torch.eye(width)
        torch.testing.assert_close(gaussians.covariance(kept, row), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gaussians.covariance(kept, 4), 1e-4 * torch.eye(width))  # one image: a point
    assert kept["means"].dtype == torch.float64 and kept["covariances"].dtype == torch.float32


def test_a_draw_has_the_moments_it_is_drawn_of() -> None:
    x = some(200)
    kept = gaussians.add({}, torch.cat([x, -x]), torch.tensor([0] * 200 + [1] * 200), 2)
    noise = gaussians.normal(40000, 5, torch.Generator().manual_seed(1))
    plain, other = gaussians.Sampler(kept).draw([1, 0], noise).split(20000)
    torch.testing.assert_close(plain.mean(0), -x.mean(0), rtol=0.05, atol=0.1)
    torch.testing.assert_close(other.T.cov(), x.T.cov(), rtol=0.05, atol=0.2)
    shrunk = gaussians.Sampler(kept, shrink=True).draw([0], noise)
    torch.testing.assert_close(shrunk.T.cov(), gaussians.shrunk(x.T.cov()), rtol=0.05, atol=0.3)
    moved = gaussians.Sampler(kept).draw([0, 1], noise, means=torch.zeros(2, 5))
    torch.testing.assert_close(moved[:20000] + x.mean(0), gaussians.Sampler(kept).draw([0, 1], noise)[:20000])


def test_shrinking_leaves_out_what_is_zero() -> None:
    sigma = torch.tensor([[2.0, 0.5, 0.0], [0.5, 4.0, 0.3], [0.0, 0.3, 6.0]])
    wanted = sigma + 4 * torch.eye(3) + 0.4 * (1 - torch.eye(3))  # (0.5 + 0.3)·2 / 4
    torch.testing.assert_close(gaussians.shrunk(sigma), wanted)
    torch.testing.assert_close(gaussians.shrunk(torch.eye(3)), 2 * torch.eye(3))


def test_what_rounding_makes_indefinite_has_a_factor() -> None:
    v = 1e4 * torch.randn(4, generator=torch.Generator().manual_seed(0))
    singular = torch.outer(v, v)
    singular[0, 0] *= 1 - 1e-7
    found = gaussians.factor(singular)
    assert found.isfinite().all()
    torch.testing.assert_close(found @ found.T, singular, rtol=1e-4, atol=1e-5 * singular.max().item())


def test_a_mixture_finds_its_parts_and_pads_what_there_are_too_few_rows_for() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(60, 2, generator=draw) * 0.1 + 5, torch.randn(30, 2, generator=draw) * 0.5 - 5])
    found = gaussians.mixture(x, 2, 50, draw)
    order = found["means"][:, 0].argsort()
    assert found["weights"][order].tolist() == pytest.approx([1 / 3, 2 / 3], abs=0.01)
    torch.testing.assert_close(found["means"][order], torch.tensor([[-5.0, -5], [5, 5]]), rtol=0, atol=0.3)
    assert found["deviations"][order].mean(1).tolist() == pytest.approx([0.5, 0.1], rel=0.3)
    few = gaussians.mixture(x[:1], 3, 5, draw)
    assert few["weights"].tolist() == [1, 0, 0] and few["means"].shape == (3, 2)
    torch.testing.assert_close(few["means"][0], x[0])


@pytest.mark.parametrize("kind", ["vae", "gauss", "full", "mixture"])
def test_a_generator_draws_what_it_was_fitted_to(kind: str) -> None:
    x = torch.cat([some(65, 1), 10 - some(40, 2)])
    x[:, 4] = 7.0  # without spread
    rows = torch.tensor([3] * 65 + [1] * 40)
    options = ReplayOptions(
        replay=kind,  # type: ignore[arg-type]
        vae_passes=60,
        vae_lr=5e-3,
        vae_hidden=16,
        vae_latent=4,
    )
    kept = feature_replay.fitted(
        x, rows, list("abcd"), options, lambda a, b, c, _: optimise(a, b, c, torch.device("cpu")), 0, "t"
    )
    assert kept["rows"].tolist() == [1, 3]
    drawn = feature_replay.drawn(kept, 4000, torch.Generator().manual_seed(5))
    assert drawn.shape == (2, 4000, 5) and drawn.isfinite().all()
    for own, row in zip(drawn, (1, 3), strict=True):
        wanted = x[rows == row]
        # the released noise is not that of the loss, so a VAE's draws are near its class, no more
        near = wanted.std(0).max().item() * (0.7 if kind == "vae" else 0.1)
        assert (own.mean(0) - wanted.mean(0))[:4].abs().max() < near
        if kind in ("gauss", "vae"):
            assert (own[:, 4] - 7).abs().max() < 1e-4


def test_a_cosine_that_begins_anew_twice_as_long() -> None:
    plan = Schedule(28, 1.0, 0, 1, restart=4, stride=2)
    rates = [round(plan.rate(k), 4) for k in range(14)]
    assert rates == [1, 1, 0.5, 0.5, 1, 1, 0.8536, 0.8536, 0.5, 0.5, 0.1464, 0.1464, 1, 1]
    assert replace(plan, restart=0).rate(27) < 0.02


def test_learned_vectors_stand_before_the_name(clip: CLIP) -> None:
    """Where they are the embeddings of words, the prompt is that of the words."""
    classes = [Class("cat", ("a drawing of a {}.",)), Class("red car", ("a {} on paper",)), Class("dog", ("{}",))]
    words = clip.tokens(["small black"])[0, 1:-1]
    vectors = clip.token_embedding(words).detach().expand(3, -1, -1)
    prompts = ClassPrompts(clip, classes, len(words), bare=False)
    told = ["a drawing of a small black cat.", "a small black red car on paper", "small black dog"]
    rows = torch.tensor([2, 0, 1])
    torch.testing.assert_close(prompts.encoded(rows, vectors), clip.encode_text([told[k] for k in rows]))
    bare = ClassPrompts(clip, classes[:1], len(words), bare=True)
    torch.testing.assert_close(bare.encoded(rows[1:2], vectors[:1]), clip.encode_text(["small black cat."]))
    with pytest.raises(PerdureError, match="tokens long"):
        ClassPrompts(clip, classes, 99, bare=True).encoded(rows, vectors[:, :1].expand(-1, 99, -1))
