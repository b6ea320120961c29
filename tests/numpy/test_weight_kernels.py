"""The kernels of weightings with a measure, groups and a state, against the equations."""

from __future__ import annotations

import math
from typing import Any

import family
import numpy as np
import numpy.typing as npt
import pytest
import rgd
import rgd.reference
from rgd import _rgd
from rgd.weightings._call import kernel_of

Array = npt.NDArray[Any]

STATELESS = [
    rgd.ERM(),
    rgd.KL(1.0),
    rgd.KL(scale=-0.7),
    rgd.Focal(2.0),
    rgd.Focal(0.5),
    rgd.Focal(0.0),
    rgd.Threshold(1.0),
    rgd.KL(5.0, normalize=True),
    rgd.KL(math.inf, scale=1.5, normalize=True),
    rgd.KL(scale=-0.7, normalize=True),
    rgd.KLBall(0.0),
    rgd.KLBall(0.05),
    rgd.KLBall(1.0),
    rgd.KLBall(9.0),
    rgd.CVaR(0.3),
    rgd.CVaR(0.01),
    rgd.CVaR(1.0),
    rgd.ChiSquare(0.01),
    rgd.ChiSquare(0.5),
    rgd.ChiSquare(20.0),
    rgd.ChiSquareBall(0.0),
    rgd.ChiSquareBall(1e-9),
    rgd.ChiSquareBall(0.02),
    rgd.ChiSquareBall(0.7),
    rgd.ChiSquareBall(3.0),
    rgd.ChiSquareBall(99.0),
    rgd.CVaR(0.3, smoothing=0.5),
    rgd.CVaR(0.5, smoothing=1e-3),
    rgd.CVaR(1.0, smoothing=2.0),
    rgd.MidrangeKL(1.0),
    rgd.MidrangeKL(-2.0),
    rgd.MidrangeKL(3.0, relative=True),
    rgd.MidrangeKL(0.0),
    rgd.Trimmed(rgd.KL(1.0), fraction=0.2),
    rgd.Trimmed(rgd.KL(scale=-0.7, normalize=True), fraction=0.05),
    rgd.Trimmed(rgd.CVaR(0.3), fraction=0.1),
    rgd.Trimmed(rgd.CVaR(0.3, smoothing=0.2), fraction=0.33),
    rgd.Trimmed(rgd.ChiSquare(0.5), fraction=0.25),
    rgd.Trimmed(rgd.ERM(), fraction=0.0),
]
RNG = np.random.default_rng(0)
SITUATIONS = {
    "spread": RNG.exponential(size=40),
    "equal": np.full(40, 1.5),
    "ties at the top": np.minimum(RNG.exponential(size=40), 1.0),
    "few values": RNG.integers(0, 3, 40).astype(float),
    "one infinite": np.where(np.arange(40) == 7, math.inf, RNG.exponential(size=40)),
    "several minus infinite": np.where(np.arange(40) % 5 == 1, -math.inf, RNG.exponential(size=40)),
    "one sample": np.array([0.7]),
}
EXACT = [w for w in STATELESS if not isinstance(w, (rgd.KL, rgd.KLBall))]
OVER_KL = [rgd.KL(1.0), rgd.KL(math.inf, scale=0.4), rgd.KL(scale=-0.7), rgd.KL(math.inf, scale=0.0)]


def weigh(losses: Array, kernel: Any, threads: int = 1, **given: Any) -> Array:
    weights = np.full(losses.shape, math.nan, np.float64 if losses.dtype == np.float64 else np.float32)
    _rgd.sample_weights(losses, weights, *kernel, threads, **given)
    return weights


def measure_for(losses: Array) -> Array:
    """Numbers from 0 to 3, some of them 0, not all."""
    measure = np.random.default_rng(losses.size).integers(0, 7, losses.shape) / 2.0
    measure[-1] = 1.0
    return measure


@pytest.mark.parametrize("situation", list(SITUATIONS))
@family.members(STATELESS)
def test_a_kernel_heeds_the_measure_as_its_equation_does(situation: str, weighting: rgd.Weighting) -> None:
    losses = SITUATIONS[situation]
    measure = measure_for(losses)
    weights = weigh(losses, kernel_of(weighting), measure=measure)
    expected = rgd.reference.sample_weights(losses, weighting, sample_weight=measure)
    infinite = np.isinf(expected)  # those of a negative scale, for losses of -inf
    assert (weights[infinite] == expected[infinite]).all()
    family.same(weights[~infinite], expected[~infinite], losses[np.isfinite(losses)], weighting)
    assert (weights[measure == 0] == 0).all()


@family.members(STATELESS)
def test_a_measure_of_ones_and_zeros_is_the_batch_without_the_others(weighting: rgd.Weighting) -> None:
    losses = SITUATIONS["spread"]
    kept = np.arange(losses.size) % 3 != 0
    outsider = np.where(kept, losses, math.nan)
    weights = weigh(outsider, kernel_of(weighting), measure=kept.astype(np.float32))
    family.same(weights[kept], weigh(losses[kept], kernel_of(weighting)), losses, weighting)
    assert (weights[~kept] == 0).all()


@family.members(STATELESS)
def test_where_the_whole_measure_is_zero_all_weights_are(weighting: rgd.Weighting) -> None:
    losses = np.array([1.0, math.nan, math.inf])
    assert (weigh(losses, kernel_of(weighting), measure=np.zeros(3)) == 0).all()


@family.members(STATELESS)
def test_threads_do_not_change_a_bit_of_measured_weights(weighting: rgd.Weighting) -> None:
    rng = np.random.default_rng(5)
    losses, measure = rng.exponential(size=100_000), rng.random(100_000)
    one, two = (weigh(losses, kernel_of(weighting), threads, measure=measure) for threads in (1, 2))
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("situation", list(SITUATIONS))
@family.members(EXACT)
def test_a_kernel_follows_its_formula(situation: str, weighting: rgd.Weighting) -> None:
    losses = SITUATIONS[situation]
    weights = weigh(losses, kernel_of(weighting))
    family.same(weights, family.formula(losses, weighting), losses[np.isfinite(losses)], weighting)
    single = weigh(losses.astype(np.float32), kernel_of(weighting))
    expected = rgd.reference.sample_weights(losses.astype(np.float32), weighting)
    np.testing.assert_array_max_ulp(single, expected.astype(np.float32), 4)


def test_a_nan_makes_all_weights_of_the_tail_nan_and_of_focal_its_own() -> None:
    losses = np.array([1.0, math.nan, 2.0])
    assert np.isnan(weigh(losses, ("cvar", (0.5, 0.0)))).all()
    for gamma in (0.0, 2.0):
        assert np.isnan(weigh(losses, ("focal", (gamma,)))).tolist() == [False, True, False]
    assert weigh(np.array([-3.0, 0.0]), ("focal", (0.0,))).tolist() == [1.0, 1.0]
    assert weigh(np.array([-3.0, 0.0]), ("focal", (2.0,))).tolist() == [0.0, 0.0]


def batches(kind: str) -> list[Array]:
    rng = np.random.default_rng(3)
    losses = [rng.exponential(size=24) for _ in range(4)]
    if kind != "finite":
        losses[1][5] = {"nan": math.nan, "infinite": math.inf, "minus infinite": -math.inf}[kind]
    return losses


@pytest.mark.parametrize("kind", ["finite", "nan", "infinite", "minus infinite"])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("inner", OVER_KL, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_moving_average_of_the_kernel_is_the_equations_batch_by_batch(
    decay: float, inner: rgd.KL, measured: bool, kind: str
) -> None:
    weighting = rgd.MovingAverage(inner, decay)
    _, numbers = kernel_of(inner) or ("", ())
    leaves, state = [np.zeros(()), np.zeros(())], weighting.init()
    for losses in batches(kind):
        measure = measure_for(losses) if measured else None
        weights = weigh(losses, ("moving_average(kl)", (decay, *numbers)), measure=measure, state=leaves)
        expected, state = rgd.reference.sample_weights(losses, weighting, sample_weight=measure, state=state)
        np.testing.assert_allclose(weights, expected, rtol=1e-13)
        np.testing.assert_allclose(leaves[0], state["log_mean"], rtol=1e-13, atol=1e-14)
        assert leaves[1] == state["updates"]


@pytest.mark.parametrize("kind", ["finite", "nan", "infinite", "minus infinite"])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("step_size", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_group_dro_of_the_kernel_is_the_equations_batch_by_batch(
    dtype: Any, step_size: float, measured: bool, kind: str
) -> None:
    weighting = rgd.GroupDRO(4, step_size)
    shares, state = np.full(4, 0.25), weighting.init()
    groups = np.random.default_rng(1).integers(0, 3, 24).astype(dtype)  # group 3 is absent
    for losses in batches(kind):
        measure = measure_for(losses) if measured else None
        weights = weigh(losses, ("group_dro", (4, step_size)), measure=measure, groups=groups, state=[shares])
        expected, state = rgd.reference.sample_weights(
            losses, weighting, sample_weight=measure, groups=groups, state=state
        )
        np.testing.assert_allclose(weights, expected, rtol=1e-13)
        np.testing.assert_allclose(shares, state["shares"], rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_state_stays_where_nothing_takes_part(dtype: Any) -> None:
    losses, shares = np.ones(3, dtype), np.array([0.3, 0.7])
    groups = np.array([9, 9, 9])
    weights = weigh(losses, ("group_dro", (2, 1.0)), measure=np.zeros(3), groups=groups, state=[shares])
    assert weights.tolist() == [0.0] * 3
    assert shares.tolist() == [0.3, 0.7]
    empty = weigh(losses[:0], ("group_dro", (2, 1.0)), groups=groups[:0], state=[shares])
    assert empty.size == 0
    assert shares.tolist() == [0.3, 0.7]


REFUSED = {
    "a group below": ({"groups": [0, -1, 1]}, "groups must lie in 0..1 for GroupDRO.groups=2., got -1 to 1"),
    "a group above": ({"groups": [0, 2, 1]}, "got 0 to 2"),
    "no groups": ({"groups": None}, "needs the group of each sample"),
    "groups of floats": ({"groups": np.zeros(3)}, "groups must be int64 or int32, got float64"),
    "groups of another shape": ({"groups": [0, 1]}, "losses and groups must have the same shape"),
    "no state": ({"state": None}, r"has leaves of \[2\] numbers, got \[\]"),
    "a longer state": ({"state": [np.ones(3)]}, r"got \[3\]"),
    "two leaves": ({"state": [np.ones(2), np.ones(2)]}, r"got \[2, 2\]"),
    "a state in single precision": ({"state": [np.ones(2, np.float32)]}, "state must be float64"),
    "a strided state": ({"state": [np.ones(4)[::2]]}, "state must be contiguous"),
    "a negative measure": ({"measure": np.array([1.0, -1.0, 1.0])}, "finite numbers >= 0, got -1"),
    "an infinite measure": ({"measure": np.array([1.0, math.inf, 1.0])}, "finite numbers >= 0, got inf"),
    "a measure of another shape": ({"measure": np.ones(2)}, "losses and measure must have the same shape"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_fit_is_refused_before_anything_is_written(case: str) -> None:
    change, message = REFUSED[case]
    given: dict[str, Any] = {"groups": [0, 1, 1], "state": [np.array([0.3, 0.7])], **change}
    given["groups"] = None if given["groups"] is None else np.asarray(given["groups"])
    before = [leaf.copy() for leaf in given["state"] or []]
    weights = np.full(3, 7.0)
    with pytest.raises((ValueError, TypeError), match=message):
        _rgd.sample_weights(np.ones(3), weights, "group_dro", (2, 1.0), 1, **given)
    assert (weights == 7.0).all()
    for leaf, old in zip(given["state"] or [], before, strict=True):
        np.testing.assert_array_equal(leaf, old)


def test_a_state_may_not_share_memory_with_the_weights() -> None:
    memory = np.zeros(4)
    with pytest.raises(ValueError, match="must not share memory"):
        _rgd.sample_weights(
            np.ones(3), memory[:3], "group_dro", (2, 1.0), 1, groups=np.zeros(3, int), state=[memory[2:]]
        )


def test_a_weighting_that_remembers_is_refused_by_the_cross_entropy() -> None:
    kernel, out = ("group_dro", (2, 1.0)), [np.zeros(2), np.zeros(2), np.zeros(())]
    with pytest.raises(ValueError, match="depend on earlier batches"):
        _rgd.cross_entropy(
            np.zeros((2, 3)), np.zeros(2, np.int64), None, None, *kernel, -100, 0.0, False, "mean",
            *out, None, 1,
        )  # fmt: skip
