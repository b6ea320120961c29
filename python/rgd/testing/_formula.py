"""The checks of a weighting's formula, in NumPy. Each is a function that raises with a sentence."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from rgd.testing._subject import SIZE, SLACK, Subject, named, same, structure
from rgd.weightings import Batch, Weighting
from rgd.weightings._call import check_new_state, map_state


def _check_value(subject: Subject) -> None:
    """Checks that it is a frozen dataclass, and that a copy compares and hashes equal."""
    weighting = subject.weighting
    parameters = getattr(type(weighting), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        subject.fail("is no frozen dataclass: put @dataclasses.dataclass(frozen=True) above its class")
    try:
        hash(weighting)
    except TypeError as error:
        subject.fail(f"cannot be a dict key ({error}): keep tuples, not lists or dicts, in its fields")
    for way, make in (("copy.deepcopy", copy.deepcopy), ("pickling", _pickled)):
        try:
            twin = make(weighting)
        except Exception as error:
            subject.fail(f"fails at {way} with {named(error)}: keep what can be pickled in its fields")
        if twin != weighting:
            subject.fail(f"is not equal to itself after {way}: compare by its fields, as a dataclass does")
        if hash(twin) != hash(weighting):
            subject.fail(f"is another dict key after {way}: hash its fields, as a dataclass does")


def _check_state(subject: Subject) -> None:
    """Checks that the state keeps its structure, and that `step` does not write to the state it is given."""
    weighting = subject.weighting
    if not weighting.stateful:
        return
    first: Any = weighting.init()
    kept = copy.deepcopy(first)
    if not same(first, weighting.init()):
        subject.fail("starts with another state each time: init() must return the same numbers")
    state = map_state(np.asarray, first)
    with np.errstate(all="ignore"):
        batch = Batch(subject.losses, None, subject.groups, concrete=True, **subject.beside(slice(SIZE)))
        try:
            new: Any = weighting.step(batch, state)[1]
        except Exception as error:
            subject.fail(f"raised {named(error)} in step")
    if structure(new) != structure(first):
        subject.fail(
            f"changes the structure of its state: init() gives {structure(first)}, step {structure(new)}"
        )
    try:
        check_new_state(type(weighting).__name__, state, map_state(np.asarray, new))
    except TypeError as error:
        subject.fail(f"would lose its state: {error}")
    if not (same(first, kept) and same(state, map_state(np.asarray, kept))):
        subject.fail("writes to the state that step is given: return a new one")


def _check_weights(subject: Subject) -> None:
    """Finite numbers >= 0, also for one sample and for equal losses."""
    batches = (
        ("an ordinary batch", subject.losses),
        ("a batch of one", subject.losses[:1]),
        ("a batch of equal losses", np.full(SIZE, 1.5)),
    )
    for dtype in (np.float64, np.float32):
        for situation, losses in batches:
            weights = subject.weights(situation, losses, dtype=dtype)
            wrong = ~np.isfinite(weights)
            if wrong.any():
                subject.fail(f"gives a weight of {weights[wrong][0]} in {situation} ({np.dtype(dtype)})")
            if weights.min() < 0:
                subject.fail(f"gives a negative weight, {weights.min():g}, in {situation}")


def _check_single_precision(subject: Subject) -> None:
    """float32 gives the weights of float64 to its own precision."""
    for case, expected, before, _ in subject.follow():
        if np.isfinite(case.losses[case.where]).all():
            actual = subject.weights(
                case.situation,
                case.losses,
                where=case.where,
                measure=case.measure,
                state=before,
                dtype=np.float32,
            )
            sentence = f"gives other weights in float32 than in float64 for {case.situation}"
            subject.compare(actual, expected, sentence, losses=case.losses, dtype=np.float32)


def _check_logarithms(subject: Subject) -> None:
    """`log_weights` are the logarithms of `weights`."""
    if subject.weighting.stateful:
        return
    with np.errstate(all="ignore"):
        batch = Batch(subject.losses, None, subject.groups, concrete=True, **subject.beside(slice(SIZE)))
        actual = np.exp(subject.weighting.log_weights(batch))
    expected = subject.weights("an ordinary batch", subject.losses)
    subject.compare(
        actual, expected, "has log_weights that are not its weights' logarithms", losses=subject.losses
    )


def _check_ties(subject: Subject) -> None:
    """Equal losses, of one group, have equal weights."""
    weights = subject.weights("an ordinary batch", subject.losses)[[2, 5, 8]]
    sentence = "gives equal losses different weights"
    subject.compare(weights, np.full(3, weights[0]), sentence, losses=subject.losses[[2, 5, 8]])


def _check_order(subject: Subject) -> None:
    """Weights are permuted with the losses."""
    order = np.random.default_rng(1).permutation(SIZE)
    weights = subject.weights("an ordinary batch", subject.losses)
    permuted = subject.weights("a permuted batch", subject.losses[order], members=order)
    sentence = "gives other weights where the samples come in another order"
    subject.compare(permuted, weights[order], sentence, losses=subject.losses[order])


def _check_mask(subject: Subject) -> None:
    """A masked sample has the same effect as no sample, for any loss."""
    kept = np.arange(SIZE) % 3 != 1
    without = subject.weights("a shorter batch", subject.losses[kept], members=np.flatnonzero(kept))
    for hidden in (1e6, math.inf, math.nan):
        losses = np.where(kept, subject.losses, hidden)
        masked = subject.weights("a batch with a mask", losses, where=kept)
        sentence = (
            "gives other weights where samples are masked than where they are left out (use batch.sum, mean,"
        )
        subject.compare(masked[kept], without, f"{sentence} min and max)", losses=losses[kept])


def _check_measure(subject: Subject) -> None:
    """A sample of integer `sample_weight` k has the same effect as k samples."""
    copies = np.repeat(np.arange(SIZE), subject.measure)
    weights = subject.weights("a batch with sample_weight", subject.losses, measure=subject.measure)
    repeated = subject.weights("a batch of repeated samples", subject.losses[copies], members=copies)
    sentence = (
        "gives a sample of sample_weight k another weight than k samples (use batch.sum and batch.mean)"
    )
    subject.compare(weights[copies], repeated, sentence, losses=subject.losses[copies])


def _check_mean_one(subject: Subject) -> None:
    """With `mean_one`, weights average to one under every measure."""
    if not subject.weighting.mean_one:
        return
    fractions = np.random.default_rng(2).random(SIZE)
    batches: tuple[tuple[str, Any, Any], ...] = (
        ("an ordinary batch", subject.losses, np.ones(SIZE)),
        ("a batch with sample_weight", subject.losses, fractions),
        ("a batch of one", subject.losses[:1], np.ones(1)),
        ("a batch of equal losses", np.full(SIZE, 1.5), fractions),
    )
    for situation, losses, measure in batches:
        weights = subject.weights(situation, losses, measure=measure)
        mean = float(np.sum(measure * weights) / np.sum(measure))
        if abs(mean - 1) > SLACK * losses.size * np.finfo(np.float64).eps:
            subject.fail(f"is declared mean_one, but its weights average to {mean:.16g} over {situation}")


def _check_pointwise(subject: Subject) -> None:
    """With `pointwise`, each weight is the same in a batch of one."""
    if not subject.weighting.pointwise:
        return
    together = subject.weights("an ordinary batch", subject.losses)
    alone = [
        subject.weights("a batch of one", subject.losses[i : i + 1], members=[i])[0] for i in range(SIZE)
    ]
    sentence = "is declared pointwise, but a weight depends on the rest of the batch"
    subject.compare(alone, together, sentence, losses=subject.losses)


def _check_clip(subject: Subject) -> None:
    """Above `clip` a weight no longer changes."""
    clip = subject.weighting.clip
    if math.isnan(clip):
        subject.fail(
            "has a clip of NaN: it is the loss from which on a weight no longer changes, or math.inf"
        )
    if math.isinf(clip):
        return
    losses = clip + max(abs(clip), 1.0) * np.array([-0.5, 0.0, 0.5, 2.0, 10.0])
    if subject.reference is not None:
        losses = losses + subject.reference[8]
    weights = subject.weights("losses around the clip", losses, members=[8] * losses.size)[1:]
    sentence = f"is declared to clip at {clip:g}, but weights change beyond"
    subject.compare(weights, np.full(weights.size, weights[0]), sentence, losses=losses[1:])


def _check_nan(subject: Subject) -> None:
    """A NaN loss raises nothing, and does not change the other weights of a pointwise member."""
    losses = subject.spoiled(math.nan)
    weights = subject.weights("a batch with a NaN loss", losses)
    if subject.weighting.pointwise:
        clean = subject.weights("an ordinary batch", subject.losses)
        sentence = "is declared pointwise, but a NaN loss changes other weights"
        subject.compare(np.delete(weights, 3), np.delete(clean, 3), sentence, losses=np.delete(losses, 3))


def _check_infinity(subject: Subject) -> None:
    """An infinite loss raises nothing, and changes no other pointwise weight."""
    for infinity in (math.inf, -math.inf):
        losses = subject.spoiled(infinity)
        weights = subject.weights(f"a batch with a loss of {infinity}", losses)
        if subject.weighting.pointwise:
            clean = subject.weights("an ordinary batch", subject.losses)
            sentence = "is declared pointwise, but an infinite loss changes other weights"
            subject.compare(np.delete(weights, 3), np.delete(clean, 3), sentence, losses=np.delete(losses, 3))
        subject.weights(f"a batch of losses that are all {infinity}", np.full(SIZE, infinity))


def _check_empty(subject: Subject) -> None:
    """A batch in which no sample takes part raises nothing."""
    subject.weights("a batch that is masked out", subject.losses, where=np.zeros(SIZE, np.bool_))


FORMULA_CHECKS: tuple[Callable[[Subject], None], ...] = (
    _check_value,
    _check_state,
    _check_weights,
    _check_single_precision,
    _check_logarithms,
    _check_ties,
    _check_order,
    _check_mask,
    _check_measure,
    _check_mean_one,
    _check_pointwise,
    _check_clip,
    _check_nan,
    _check_infinity,
    _check_empty,
)


class _Pickler(pickle.Pickler):
    """Pickles without the classes, so that a weighting may be defined inside a function."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.classes: list[Any] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, type):
            return None
        self.classes.append(obj)
        return len(self.classes) - 1


class _Unpickler(pickle.Unpickler):
    """Puts the classes back."""

    def __init__(self, file: Any, classes: list[Any]) -> None:
        super().__init__(file)
        self.classes = classes

    def persistent_load(self, pid: Any) -> Any:
        return self.classes[pid]


def _pickled(weighting: Weighting) -> Any:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(weighting)
    file.seek(0)
    unpickler: Any = cast("Any", _Unpickler)(file, pickler.classes)
    return unpickler.load()
