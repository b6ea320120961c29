"""The z-loss in the kernels: `p * z * Z^2` beside the weighted loss, `Z` the logsumexp of the logits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from rgd import _rgd

Array = npt.NDArray[Any]

KL = ("kl", (1.0, 0.5, 0.0))
IGNORED = -100
Z_LOSS = 0.3
N, CLASSES = 9, [5, 40]
DTYPES = [np.float32, np.float64]


class Case:
    """Logits, labels, class weights, base measure and adjustment, and what the formula makes of them."""

    def __init__(self, classes: int, dtype: Any) -> None:
        rng = np.random.default_rng(classes)
        self.logits = rng.normal(size=(N, classes)).astype(dtype)
        self.target = rng.integers(0, classes, N)
        self.target[2] = IGNORED
        self.class_weight = rng.uniform(0.5, 1.5, classes).astype(dtype)
        self.measure = rng.integers(0, 3, N).astype(dtype)
        self.adjustment = rng.normal(size=classes).astype(dtype)
        self.tolerance = 64 * classes * float(np.finfo(dtype).eps)
        adjusted = self.logits.astype(np.float64) + self.adjustment
        highest = adjusted.max(1, keepdims=True)
        self.logsumexp = (highest + np.log(np.exp(adjusted - highest).sum(1, keepdims=True)))[:, 0]
        self.softmax = np.exp(adjusted - self.logsumexp[:, None])
        self.counts = self.target != IGNORED

    def empty(self, *shape: int) -> Array:
        return np.full(shape, 777, self.logits.dtype)

    def objective(self, reduction: str, z_loss: float, *, grad: bool = True) -> tuple[Array, ...]:
        """Losses, weights, objective and gradient of `cross_entropy`."""
        shape = (N,) if reduction == "none" else ()
        losses, weights, objective = self.empty(N), self.empty(N), self.empty(*shape)
        gradient = np.empty_like(self.logits)
        _rgd.cross_entropy(
            self.logits, self.target, self.class_weight, self.measure, *KL, IGNORED, 0.1, False, reduction,
            losses, weights, objective, gradient if grad else None, 1, self.adjustment, z_loss=z_loss,
        )  # fmt: skip
        return losses, weights, objective, gradient

    def divisor(self, reduction: str) -> float:
        c = self.class_weight.astype(np.float64)[np.where(self.counts, self.target, 0)]
        return float((self.counts * self.measure * c).sum()) if reduction == "mean" else 1.0


@pytest.fixture(
    params=itertools.product(CLASSES, DTYPES), ids=lambda param: f"{param[0]}-{param[1].__name__}"
)
def case(request: Any) -> Case:
    return Case(*request.param)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_z_loss_adds_its_term_to_objective_and_gradient_and_leaves_losses_and_weights(
    case: Case, reduction: str
) -> None:
    plain, result = (case.objective(reduction, z) for z in (0.0, Z_LOSS))
    np.testing.assert_array_equal(result[0], plain[0])
    np.testing.assert_array_equal(result[1], plain[1])
    p = case.counts * case.measure.astype(np.float64) / case.divisor(reduction)
    added = p * Z_LOSS * case.logsumexp**2
    added = added if reduction == "none" else added.sum()
    np.testing.assert_allclose(result[2], plain[2] + added, rtol=case.tolerance)
    rows = (2 * p * Z_LOSS * case.logsumexp)[:, None] * case.softmax
    np.testing.assert_allclose(result[3], plain[3] + rows, rtol=case.tolerance, atol=case.tolerance)
    np.testing.assert_array_equal(case.objective(reduction, Z_LOSS, grad=False)[2], result[2])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_two_passes_equal_one(case: Case, reduction: str) -> None:
    _, weights, objective, grad = case.objective(reduction, Z_LOSS)
    losses, logsumexp = case.empty(N), case.empty(N)
    _rgd.cross_entropy_losses(
        case.logits, case.target, case.class_weight, IGNORED, 0.1, losses, 1, case.adjustment,
        logsumexp=logsumexp,
    )  # fmt: skip
    expected = np.where(case.counts, case.logsumexp, 0)
    np.testing.assert_allclose(logsumexp, expected, rtol=case.tolerance)
    for second in (np.empty_like(grad), None):
        value = np.empty_like(objective)
        _rgd.cross_entropy_gradient(
            case.logits, case.target, case.class_weight, case.measure, IGNORED, 0.1, False, reduction,
            losses, weights, value, second, 1, case.adjustment, z_loss=Z_LOSS, logsumexp=logsumexp,
        )  # fmt: skip
        np.testing.assert_array_equal(value, objective)
        if second is not None:
            np.testing.assert_array_equal(second, grad)


@pytest.mark.parametrize("z_loss", [0.0, Z_LOSS])
def test_norms_take_the_place_of_the_base_measure_over_the_divisor(case: Case, z_loss: float) -> None:
    losses, weights, _, grad = case.objective("sum", z_loss)
    out = case.empty(N), case.empty(N), np.empty_like(grad)
    logsumexp = case.empty(N)
    counted = _rgd.cross_entropy_rows(
        case.logits, case.target, case.class_weight, case.measure, *KL, IGNORED, 0.1, *out, 1,
        case.adjustment, z_loss=z_loss, logsumexp=logsumexp,
    )  # fmt: skip
    # A norm of 0 leaves the loss and its weight as they are, where a base measure of 0 leaves the target out.
    part = case.counts & (case.measure != 0)
    assert counted == case.counts.sum()
    np.testing.assert_array_equal(out[0][part], losses[part])
    np.testing.assert_array_equal(out[1][part], weights[part])
    assert np.all(out[1][case.counts] > 0)
    np.testing.assert_array_equal(out[2], grad)
    np.testing.assert_allclose(logsumexp, np.where(case.counts, case.logsumexp, 0), rtol=case.tolerance)

    second = case.logits.copy()
    _rgd.cross_entropy_rows_gradient(
        second, case.target, case.class_weight, case.measure, out[1], IGNORED, 0.1, second, 1,
        case.adjustment, z_loss=z_loss,
    )  # fmt: skip
    np.testing.assert_array_equal(second, grad)


def test_norms_without_weights_are_the_factors_of_the_losses(case: Case) -> None:
    given = []
    for norms, weights in [(case.measure, None), (np.ones_like(case.measure), case.measure)]:
        grad = np.empty_like(case.logits)
        _rgd.cross_entropy_rows_gradient(
            case.logits, case.target, None, norms, weights, IGNORED, 0.0, grad, 1
        )
        given.append(grad)
    np.testing.assert_array_equal(*given)


def call_rows(kind: str = "kl", **changed: Any) -> None:
    case = Case(5, np.float32)
    losses, weights = case.empty(N), case.empty(N)
    given: dict[str, Any] = {
        "logits": case.logits,
        "target": case.target,
        "class_weight": None,
        "norms": case.measure,
        "kind": kind,
        "numbers": KL[1] if kind == "kl" else (0.1,),
        "ignore_index": IGNORED,
        "label_smoothing": 0.0,
        "losses": losses,
        "weights": weights,
        "grad": None,
        "threads": 1,
        **changed,
    }
    try:
        _rgd.cross_entropy_rows(**given)
    except BaseException:
        assert np.all(losses == 777)
        raise
    assert not np.any(losses == 777)


def test_what_does_not_fit_is_refused() -> None:
    call_rows()
    for z_loss in (-0.1, np.inf, np.nan):
        with pytest.raises(ValueError, match=r"z_loss must be a finite number >= 0, got"):
            call_rows(z_loss=z_loss)
    with pytest.raises(ValueError, match=r"norms must have 9 elements .* got 8"):
        call_rows(norms=np.ones(8, np.float32))
    with pytest.raises(TypeError, match=r"norms must be float32, got float64"):
        call_rows(norms=np.ones(9))
    with pytest.raises(ValueError, match=r"logsumexp must have 9 elements"):
        call_rows(logsumexp=np.ones(8, np.float32))
    with pytest.raises(
        ValueError, match=r"'kl_ball' .*whole batch: give them to cross_entropy_rows_gradient"
    ):
        call_rows("kl_ball")
    norms = np.ones(9, np.float32)
    with pytest.raises(ValueError, match=r"weights and norms must not share memory"):
        call_rows(norms=norms, weights=norms)
    with pytest.raises(ValueError, match=r"logsumexp and norms must not share memory"):
        call_rows(norms=norms, logsumexp=norms)


def test_the_objective_of_given_losses_needs_their_logsumexp() -> None:
    case = Case(5, np.float32)
    objective = case.empty()
    with pytest.raises(ValueError, match=r"a z_loss needs the logsumexp of each target"):
        _rgd.cross_entropy_gradient(
            case.logits, case.target, None, None, IGNORED, 0.0, False, "sum", np.zeros(N, np.float32),
            np.ones(N, np.float32), objective, None, 1, z_loss=0.1,
        )  # fmt: skip
    assert objective == 777
