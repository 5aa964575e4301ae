"""The lemmas of ConDU's appendix F as properties, where they hold, and the cases in which they do not."""

from collections.abc import Callable, Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, find, given, settings
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.weights import Weights
from perdure.ops import fusion

Deltas = dict[str, Tensor]  # by tensor name, each (T, n)


def numbers(whole: bool) -> st.SearchStrategy[float]:
    some = st.floats(-4, 4, allow_nan=False, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
    return st.integers(-3, 3).map(float) if whole else some


@st.composite
def deltas(draw: st.DrawFn, whole: bool = False, tasks: int | None = None, tensors: int | None = None) -> Deltas:
    """Deltas of a few tasks on a few small tensors, in double precision; whole numbers make sums exact."""
    count = tasks or draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 5), min_size=tensors or 1, max_size=tensors or 3))
    row = [st.lists(numbers(whole), min_size=count * n, max_size=count * n) for n in sizes]
    return {f"t{k}": torch.tensor(draw(r), dtype=torch.float64).view(count, -1) for k, r in enumerate(row)}


def once(found: Deltas) -> tuple[Deltas, Deltas, list[float]]:
    """Unify and decouple: the new deltas, the masks, the rescalers."""
    tasks = len(next(iter(found.values())))
    means, unified, masks = fusion.Means(tasks), {}, {}
    for name, delta in found.items():
        unified[name], masks[name] = fusion.elect(delta)
        means.add(name, delta.abs().sum(1), masks[name].double() @ unified[name].abs(), delta.shape[1])
    rescalers = means.rescalers()
    scale = torch.tensor(rescalers, dtype=torch.float64).unsqueeze(1)
    return {n: unified[n] * masks[n] * scale for n in found}, masks, rescalers


def means_of_magnitudes(found: Deltas) -> Tensor:
    """Σ over tensors of mean|·|, (T,)."""
    return torch.stack([d.abs().mean(1) for d in found.values()]).sum(0)


def l1(found: Deltas) -> Tensor:
    return torch.stack([d.abs().sum(1) for d in found.values()]).sum(0)


@given(deltas())
def test_f1_a_position_never_changes_its_sign(found: Deltas) -> None:
    new, masks, _ = once(found)
    for name, before in found.items():
        assert bool(((new[name].sign() == before.sign()) | (new[name] == 0)).all())
        assert torch.equal(new[name] != 0, masks[name])


@given(deltas())
def test_f1_what_is_kept_once_is_kept_for_ever(found: Deltas) -> None:
    first, masks, _ = once(found)
    for _ in range(5):
        first, again, _ = once(first)
        assert all(torch.equal(again[n], masks[n]) for n in masks)


@given(deltas())
def test_f2_the_sum_of_the_tensors_mean_magnitudes_is_preserved(found: Deltas) -> None:
    new, masks, _ = once(found)
    left = torch.stack([m.any(1) for m in masks.values()]).any(0)
    before, after = means_of_magnitudes(found), means_of_magnitudes(new)
    assert torch.allclose(after[left], before[left], rtol=1e-6)
    assert bool((after[~left] == 0).all())


@given(deltas(tensors=1))
def test_f2_within_one_tensor_that_is_the_l1_norm(found: Deltas) -> None:
    new, masks, _ = once(found)
    left = masks["t0"].any(1)
    assert torch.allclose(l1(new)[left], l1(found)[left], rtol=1e-6)


def test_f2_fails_for_the_l1_norm_of_the_whole_model() -> None:
    """The paper speaks of the L1 norm; the release's rescaler weighs tensors of every size alike."""

    def broken(found: Deltas) -> bool:
        new, masks, _ = once(found)
        left = torch.stack([m.any(1) for m in masks.values()]).any(0)
        return bool(left.all()) and not torch.allclose(l1(new), l1(found), rtol=1e-2)

    assert find(deltas(whole=True, tasks=2, tensors=2), broken)


@settings(max_examples=20)
@given(deltas())
def test_f3_repeating_converges_with_the_square_of_the_rounds(found: Deltas) -> None:
    rounds = 60
    for _ in range(rounds):
        last, (found, _, _) = found, once(found)
    change = max(float((found[n] - last[n]).abs().max()) for n in found)
    size = max(float(d.abs().max()) for d in found.values())
    assert change <= 4 * max(size, 1e-12) / rounds**2 * len(found) * 5


@given(deltas(tasks=1))
def test_a_single_task_is_its_own_expert(found: Deltas) -> None:
    new, _, rescalers = once(found)
    assert rescalers == [1.0]
    assert all(torch.equal(new[n], found[n]) for n in found)


@given(deltas(whole=True, tasks=3), st.permutations(range(3)))
def test_the_order_of_tasks_does_not_matter_within_a_session(found: Deltas, order: Sequence[int]) -> None:
    new, _, rescalers = once(found)
    other, _, shuffled = once({n: d[list(order)] for n, d in found.items()})
    assert shuffled == pytest.approx([rescalers[k] for k in order])
    assert all(torch.allclose(other[n], new[n][list(order)]) for n in found)


def session_by_session(found: Deltas) -> Deltas:
    """Tasks one after another, the old ones as they were decoupled last."""
    tasks = len(next(iter(found.values())))
    known = {n: d[:1] for n, d in found.items()}
    for k in range(1, tasks):
        known, _, _ = once({n: torch.cat([known[n], found[n][k : k + 1]]) for n in found})
    return known


def test_the_order_of_tasks_matters_from_session_to_session() -> None:
    def differs(found: Deltas) -> bool:
        back = session_by_session({n: d.flip(0) for n, d in found.items()})
        return not all(torch.allclose(d.flip(0), back[n]) for n, d in session_by_session(found).items())

    assert find(deltas(whole=True, tasks=3, tensors=1), differs)


# ---- the streamed session


def stored(found: Deltas) -> tuple[Weights, Callable[[int], Weights]]:
    """θ⁰ and the experts of deltas, in fp32."""
    origin = {n: torch.linspace(-1, 1, d.shape[1]) for n, d in found.items()}
    return origin, lambda task: {n: origin[n] + found[n][task].float() for n in found}


def run_sessions(origin: Weights, expert: Callable[[int], Weights], tasks: int) -> list[Deltas]:
    """``fusion.unify`` task after task; all experts' deltas after each session."""
    unified: dict[str, Tensor] = {}
    triggers: list[tuple[dict[str, Tensor], float]] = []
    out = []
    for task in range(tasks):
        new: dict[str, Tensor] = {}
        bits: list[dict[str, Tensor]] = [{} for _ in range(task + 1)]

        def keep(name: str, delta: Tensor, masks: Tensor, new=new, bits=bits) -> None:  # type: ignore[no-untyped-def]
            new[name] = delta
            for one, row in zip(bits, masks, strict=True):
                one[name] = row

        rescalers = fusion.unify(origin, expert(task), unified, triggers, keep)
        unified, triggers = new, list(zip(bits, rescalers, strict=True))
        out.append({n: torch.stack([fusion.decouple(unified[n], b[n], r) for b, r in triggers]) for n in origin})
    return out


@given(deltas(whole=True, tasks=3))
def test_streamed_in_short_stretches_it_is_the_same(found: Deltas) -> None:
    wide = {n: d.repeat(1, 9) for n, d in found.items()}
    whole = run_sessions(*stored(wide), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "STRETCH", 8)
        pieces = run_sessions(*stored(wide), 3)
    for one, other in zip(pieces, whole, strict=True):
        assert all(torch.allclose(one[n], other[n], rtol=1e-5, atol=1e-6) for n in wide)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_masks_take_a_bit_a_parameter(mask: list[bool]) -> None:
    bits = fusion.packed(torch.tensor([mask]))
    assert bits.shape == (1, -(-len(mask) // 8)) and bits.dtype == torch.uint8
    assert fusion.unpacked(bits[0], len(mask)).tolist() == mask


@example(scores=[[0.9, 0.8, 0.1]], most=2)
@given(
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(1, 5)
)
def test_gates_add_up_and_only_the_nearest_answer(scores: list[list[float]], most: int) -> None:
    nearness = torch.tensor(scores)
    for weighting in ("mean", "similarity"):
        gates = fusion.shares(nearness, most, weighting)
        assert torch.allclose(gates.sum(1), torch.ones(len(scores)))
        assert bool(((gates[:, 1:] > 0).sum(1) == min(most, 3)).all()) and bool((gates[:, 0] > 0).all())
        least = torch.where(gates[:, 1:] > 0, nearness, 9.0).amin(1)
        assert bool((torch.where(gates[:, 1:] > 0, -9.0, nearness).amax(1) <= least).all())
    mean = fusion.shares(nearness, most, "mean")
    assert torch.allclose(mean[mean > 0], torch.tensor(1 / (min(most, 3) + 1)))


def test_experts_that_cannot_be_unified_are_refused() -> None:
    origin = {"w": torch.zeros(4)}
    keep: fusion.Keep = lambda name, delta, masks: None  # noqa: E731
    with pytest.raises(PerdureError, match="no numbers"):
        fusion.unify(origin, {"w": torch.tensor([0.0, float("nan"), 1, 1])}, {}, [], keep)
    with pytest.raises(PerdureError, match="another architecture"):
        fusion.unify(origin, {"w": torch.zeros(5)}, {}, [], keep)
