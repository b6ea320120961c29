"""The weighting under test, the batches it is tested on, and how two results are compared."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
import numpy.typing as npt

from rgd.weightings import Batch, Weighting
from rgd.weightings._call import map_state, weigh
from rgd.weightings._fields import needs_of

SIZE = 12
CLASSES = 8

SLACK = 256
"""How much a formula may amplify the rounding of a sum. Weights must agree to `SLACK * n * eps`."""

Floats = npt.NDArray[Any]


class Case(NamedTuple):
    """A batch and its name in messages."""

    situation: str
    losses: Floats
    where: npt.NDArray[np.bool_]
    measure: Floats
    groups: npt.NDArray[np.int64] | None


class Subject:
    """The weighting under test, and the batches it is tested on.

    Losses are sixteenths from 1/16 to 8, which every floating dtype holds exactly; three of them are equal.
    """

    def __init__(self, weighting: Weighting, groups: int | None) -> None:
        rng = np.random.default_rng(0)
        self.weighting = weighting
        self.losses = rng.permutation(128)[:SIZE] / 16
        self.losses[10] = 1 / 16
        self.losses[[2, 5]] = self.losses[8]
        self.measure = np.array([2, 0, 1, 3, 1, 1, 2, 5, 2, 0, 1, 4])
        self.groups: npt.NDArray[np.int64] | None = None
        if groups is not None:
            self.groups = rng.integers(0, groups, SIZE)
            self.groups[[2, 5]] = self.groups[8]
        self.reference: Floats | None = None
        if "reference" in needs_of(weighting):
            self.reference = rng.permutation(128)[:SIZE] / 16
            self.reference[[2, 5]] = self.reference[8]
        self.entropy: Floats | None = None
        if "entropy" in needs_of(weighting):
            self.entropy = rng.permutation(32)[:SIZE] / 16
            self.entropy[[2, 5]] = self.entropy[8]

    def fail(self, sentence: str) -> NoReturn:
        raise AssertionError(f"{self.weighting} {sentence}")

    def run(
        self,
        situation: str,
        losses: Any,
        *,
        where: Any = None,
        measure: Any = None,
        members: Any = None,
        state: Any = None,
        entropy: Any = None,
        dtype: Any = np.float64,
    ) -> tuple[Floats, Any]:
        """The weights by the formula, in NumPy, and the state after them.

        `members` are the indices of the samples, for their groups, their reference and their entropy; None
        for the first. `entropy` is another entropy of the samples.
        """
        losses = np.asarray(losses, dtype)
        p = None if measure is None else np.asarray(measure, dtype)
        if where is not None:
            p = np.where(where, np.ones(losses.size, dtype) if p is None else p, 0)
        own = slice(losses.size) if members is None else members
        groups = None if self.groups is None else self.groups[own]
        beside = self.beside(own, dtype)
        if entropy is not None:
            beside["entropy"] = np.asarray(entropy, dtype)
        if self.weighting.stateful:
            state = map_state(np.asarray, self.weighting.init() if state is None else state)
        with np.errstate(all="ignore"):
            try:
                batch = Batch(losses, p, groups, concrete=True, **beside)
                weights, state = weigh(self.weighting, batch, state)
            except Exception as error:
                self.fail(f"raised {named(error)} for {situation}")
        return np.asarray(weights), state

    def beside(self, own: Any, dtype: Any = np.float64) -> dict[str, Any]:
        """What a batch of some samples holds beside losses, measure and groups, as the weighting needs it."""
        given = {"reference": self.reference, "entropy": self.entropy}
        beside: dict[str, Any] = {
            name: one[own].astype(dtype) for name, one in given.items() if one is not None
        }
        return beside if self.entropy is None else {**beside, "classes": CLASSES}

    def weights(self, situation: str, losses: Any, **options: Any) -> Floats:
        return self.run(situation, losses, **options)[0]

    def compare(
        self,
        actual: Any,
        expected: Any,
        sentence: str,
        *,
        losses: Any = None,
        dtype: Any = np.float64,
    ) -> None:
        """Fail with `sentence` and the first number that differs, in the weights or in the state."""
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        if actual.shape != expected.shape:
            self.fail(f"{sentence}: an array of shape {actual.shape} in place of {expected.shape}")
        finite = np.abs(expected[np.isfinite(expected)])
        slack = SLACK * max(expected.size, 1) * np.finfo(dtype).eps * max(finite.max(initial=0.0), 1e-30)
        same = np.isclose(actual, expected, rtol=0, atol=slack, equal_nan=True)
        if not same.all():
            i = int(np.flatnonzero(~same)[0])
            subject = "" if losses is None else f"a loss of {np.ravel(losses)[i]:g} weighs "
            difference = f"{np.ravel(actual)[i]:.16g} in place of {np.ravel(expected)[i]:.16g}"
            self.fail(f"{sentence}: {subject}{difference}")

    def spoiled(self, loss: float) -> Floats:
        """The ordinary losses, the fourth of them replaced."""
        losses = np.array(self.losses)
        losses[3] = loss
        return losses

    def cases(self) -> list[Case]:
        """Batches of one shape, for the fronts, in the order in which a state is passed on."""
        everywhere, ones = np.ones(SIZE, np.bool_), np.ones(SIZE)
        some = np.arange(SIZE) % 4 != 1
        with_nan, with_infinity = self.spoiled(math.nan), self.spoiled(math.inf)
        hidden = np.where(some, self.losses, math.nan)
        return [
            Case("an ordinary batch", self.losses, everywhere, ones, self.groups),
            Case(
                "a batch with where and sample_weight", hidden, some, self.measure.astype(float), self.groups
            ),
            Case("a batch with a NaN loss", with_nan, everywhere, ones, self.groups),
            Case("a batch with an infinite loss", with_infinity, everywhere, ones, self.groups),
            Case("a batch that is masked out", hidden, np.zeros(SIZE, np.bool_), ones, self.groups),
            Case("a later batch", self.losses[::-1] / 2, everywhere, ones, self.groups),
        ]

    def follow(self, dtype: Any = np.float64) -> list[tuple[Case, Floats, Any, Any]]:
        """Each case with the weights of the formula, and the state before and after it."""
        before = self.weighting.init() if self.weighting.stateful else None
        found: list[tuple[Case, Floats, Any, Any]] = []
        for case in self.cases():
            weights, after = self.run(
                case.situation, case.losses, where=case.where, measure=case.measure, state=before, dtype=dtype
            )
            found.append((case, weights, before, after))
            before = after
        return found


def named(error: Exception) -> str:
    """The type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def pairs(one: Any, other: Any) -> list[tuple[Any, Any]]:
    """The leaves of two states of one structure."""
    found: list[tuple[Any, Any]] = []
    map_state(lambda *leaves: found.append(leaves), one, other)
    return found


def structure(state: Any) -> Any:
    """The state with the shape of each leaf in its place."""
    try:
        return map_state(_shape, state)
    except Exception:
        return type(state).__name__


def _shape(leaf: Any) -> tuple[int, ...]:
    return np.asarray(leaf).shape


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, NaN to NaN."""
    return structure(one) == structure(other) and all(
        np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True) for a, b in pairs(one, other)
    )


def attempt(subject: Subject, where: str, function: Any, *arguments: Any, **options: Any) -> Any:
    """The result; an exception becomes a failure that says where it came from."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        advice = "write the formula with batch.xp and arithmetic, without an if on a number or a loss"
        raise AssertionError(
            f"{subject.weighting} fails in {where} with {named(error)} ({advice})"
        ) from error


def known(state: Any) -> dict[str, Any]:
    """The keyword of a state, where there is one."""
    return {} if state is None or state == () else {"state": state}


def split(result: Any) -> tuple[Any, Any]:
    """Weights and state, where a function returns both."""
    if isinstance(result, tuple):
        weights, state = cast("tuple[Any, Any]", result)
        return weights, state
    return result, None
