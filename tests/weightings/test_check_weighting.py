"""`rgd.testing.check_weighting`: every member keeps the contract, and each way to break it is named."""

import dataclasses
import importlib
import itertools
import math
import re
import sys
import warnings

import numpy as np
import pytest
import rgd
import torch
from rgd.testing import check_weighting

FRONTS = ["numpy", "torch", "jax"]
MEMBERS = [
    rgd.ERM(),
    rgd.KL(),
    rgd.KL(scale=0.0),
    rgd.KL(scale=-0.7),
    rgd.KL(2.0, normalize=True),
    rgd.KL(math.inf, scale=-0.7, normalize=True),
    rgd.KLBall(0.2),
    rgd.MidrangeKL(1.0),
    rgd.MidrangeKL(-0.5, relative=True),
    rgd.ChiSquare(1.0),
    rgd.ChiSquareBall(0.3),
    rgd.CVaR(0.3),
    rgd.CVaR(0.3, smoothing=0.2),
    rgd.Focal(2.0),
    rgd.Threshold(2.5),
    rgd.Excess(rgd.CVaR(0.3)),
    rgd.Excess(rgd.KL(0.5)),
    rgd.Excess(rgd.MovingAverage(rgd.KL(math.inf, scale=1.0), 0.9)),
    rgd.MovingAverage(rgd.Excess(rgd.KL(1.0)), 0.9),
    rgd.Trimmed(rgd.Excess(rgd.KLBall(0.2)), 0.2),
    rgd.EntropyGate(rgd.KL(0.5)),
    rgd.EntropyGate(rgd.KLBall(0.2)),
    rgd.EntropyGate(rgd.MovingAverage(rgd.Excess(rgd.KL(1.0)), 0.9)),
    rgd.MovingAverage(rgd.EntropyGate(rgd.KL(1.0)), 0.9),
    rgd.Trimmed(rgd.KL(), 0.2),
    rgd.Trimmed(rgd.CVaR(0.4), 0.2),
    rgd.MovingAverage(rgd.KL(math.inf, scale=1.0), 0.9),
    rgd.Pointwise(abs),
]
GROUPED = [
    rgd.GroupDRO(3, 0.1),
    rgd.Excess(rgd.GroupDRO(3, 0.1)),
    rgd.EntropyGate(rgd.GroupDRO(3, 0.1)),
    rgd.Trimmed(rgd.GroupDRO(3, 0.1), 0.3),
]


@dataclasses.dataclass(frozen=True)
class Softer(rgd.Weighting):
    """A user's own, as the documentation shows it."""

    power: float = 0.5
    pointwise = True

    def weights(self, batch):
        return (1 + batch.losses) ** self.power


@dataclasses.dataclass(frozen=True)
class OverRunningMean(rgd.Weighting):
    """A user's own that remembers: losses over their running mean."""

    decay: float = 0.9

    def init(self):
        return {"mean": 1.0, "past": (np.zeros(2), 0)}

    def step(self, batch, state):
        mean = self.decay * state["mean"] + (1 - self.decay) * batch.mean(batch.losses)
        sums, count = state["past"]
        return batch.losses / mean, {"mean": mean, "past": (sums + mean, count + 1)}


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("weighting", [*MEMBERS, Softer(), OverRunningMean()], ids=str)
def test_every_member_and_a_users_own_keep_the_contract(weighting, front):
    pytest.importorskip(front)
    check_weighting(weighting, fronts=[front])


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("weighting", GROUPED, ids=str)
def test_members_of_groups_keep_the_contract(weighting, front):
    pytest.importorskip(front)
    check_weighting(weighting, groups=3, fronts=[front])


# Members that break the contract, each in one way.


@dataclasses.dataclass(frozen=True)
class Pointwise(rgd.Weighting):
    """A correct one to change: `1 + l`."""

    pointwise = True

    def weights(self, batch):
        return 1 + batch.losses


@dataclasses.dataclass(frozen=True)
class OfBatch(rgd.Weighting):
    """A correct one to change: `(1 + l) / mean(1 + l)`."""

    mean_one = True

    def weights(self, batch):
        return (1 + batch.losses) / batch.mean(1 + batch.losses)


@dataclasses.dataclass(frozen=True)
class Remembering(rgd.Weighting):
    """A correct one to change: `(1 + l) / mean(1 + l)`, and how many updates there were."""

    def init(self):
        return {"updates": 0, "means": np.ones(2)}

    def step(self, batch, state):
        means = state["means"] + batch.mean(batch.losses)
        return OfBatch().weights(batch), {"updates": state["updates"] + 1, "means": means}


@dataclasses.dataclass(frozen=True)
class Numbered(rgd.Weighting):
    """A correct one to change: `1 + power * l`."""

    power: float = 2.0
    pointwise = True

    def weights(self, batch):
        return 1 + self.power * batch.losses


@pytest.mark.parametrize("weighting", [Pointwise(), OfBatch(), Remembering(), Numbered()], ids=str)
def test_what_the_broken_members_are_made_of_is_correct(weighting):
    check_weighting(weighting)


def altered(base, formula=None, /, **attributes):
    """A member that differs from a correct one in its formula, another method or a declaration."""
    if formula is not None:
        attributes["weights"] = lambda self, batch: formula(batch)
    return dataclasses.dataclass(frozen=True)(type("Broken", (base,), attributes))()


class NoDataclass(rgd.Weighting):
    def weights(self, batch):
        return 1 + batch.losses


@dataclasses.dataclass
class NotFrozen(rgd.Weighting):
    def weights(self, batch):
        return 1 + batch.losses


@dataclasses.dataclass(frozen=True)
class WithList(Pointwise):
    edges: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class WithAnOpenFile(Pointwise):
    file: object = sys.stdout

    def __deepcopy__(self, memo):
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class EqualToItselfAlone(Pointwise):
    def __eq__(self, other):
        return self is other

    __hash__ = object.__hash__


@dataclasses.dataclass(frozen=True)
class HashedByIdentity(Pointwise):
    def __hash__(self):
        return id(self)


def refuse(condition, message):
    if condition:
        raise ValueError(message)


def refusing(condition):
    """A formula that raises for some batches."""

    def weights(batch):
        refuse(condition(batch), "too hard")
        return 1 + batch.losses

    return weights


def writing(self, batch, state):
    state["means"] += 1
    return OfBatch().weights(batch), state


def in_numpy(batch):
    return "numpy" in batch.xp.__name__ and "jax" not in batch.xp.__name__


def added_in_place(batch):
    weights = batch.xp.ones(batch.losses.shape, dtype=batch.losses.dtype)
    weights += batch.losses
    return weights


counter = itertools.count()

BROKEN = [
    # What a weighting is.
    (NoDataclass(), "is no frozen dataclass: put @dataclasses.dataclass"),
    (NotFrozen(), "is no frozen dataclass"),
    (WithList(), "cannot be a dict key .*: keep tuples"),
    (
        altered(Pointwise, __deepcopy__=lambda self, memo: 1 / 0),
        "fails at copy.deepcopy with ZeroDivisionError",
    ),
    (WithAnOpenFile(), "fails at pickling with TypeError"),
    (rgd.Pointwise(lambda losses: 1 + losses), "fails at pickling with"),
    (EqualToItselfAlone(), "is not equal to itself after copy.deepcopy"),
    (HashedByIdentity(), "is another dict key after copy.deepcopy"),
    # The weights of a batch.
    (altered(rgd.Weighting), r"raised NotImplementedError: Broken must define weights\(self, batch\)"),
    (
        altered(OfBatch, lambda batch: batch.mean(batch.losses)),
        "raised ValueError: .* one weight for each loss",
    ),
    (altered(OfBatch, lambda batch: batch.losses[1:]), "raised ValueError: .* one weight for each loss"),
    (
        altered(Pointwise, lambda batch: batch.xp.log(batch.losses - 4)),
        "gives a weight of nan in an ordinary",
    ),
    (
        altered(Pointwise, lambda batch: batch.xp.exp(1000 * batch.losses)),
        "gives a weight of inf in an ordinary",
    ),
    (
        altered(
            OfBatch, lambda batch: 1 / (batch.max(batch.losses) - batch.min(batch.losses)) + batch.losses
        ),
        "gives a weight of inf in a batch of one",
    ),
    (altered(Pointwise, lambda batch: batch.losses - 1), "gives a negative weight, -"),
    (
        altered(Pointwise, lambda batch: (batch.losses + 1e9) - 1e9 + 1),
        "gives other weights in float32 than in float64 for an ordinary batch",
    ),
    (
        altered(Pointwise, log_weights=lambda self, batch: batch.losses),
        "has log_weights that are not its weights' logarithms",
    ),
    (
        altered(
            OfBatch, lambda batch: 1.0 * batch.xp.argsort(batch.xp.argsort(batch.losses)), mean_one=False
        ),
        "gives equal losses different weights",
    ),
    (
        altered(OfBatch, lambda batch: batch.losses + batch.losses[0], mean_one=False),
        "gives other weights where the samples come in another order",
    ),
    (
        altered(OfBatch, lambda batch: batch.losses / batch.losses.shape[0], mean_one=False),
        "gives other weights where samples are masked than where they are left out",
    ),
    (
        altered(OfBatch, lambda batch: 1 + batch.losses - batch.xp.min(batch.losses), mean_one=False),
        "gives other weights where samples are masked than where they are left out",
    ),
    (
        altered(OfBatch, lambda batch: batch.losses / batch.xp.sum(batch.losses), mean_one=False),
        "gives a sample of sample_weight k another weight than k samples",
    ),
    # What is declared.
    (
        altered(OfBatch, lambda batch: 2 * OfBatch().weights(batch)),
        "is declared mean_one, but its weights average to 2 over an ordinary batch",
    ),
    (
        altered(OfBatch, pointwise=True, mean_one=False),
        "is declared pointwise, but a weight depends on the rest of the batch",
    ),
    (altered(Pointwise, clip=2.0), "is declared to clip at 2, but weights change beyond"),
    (altered(Pointwise, clip=math.nan), "has a clip of NaN"),
    # NaN, infinity, nothing.
    (
        altered(Pointwise, lambda batch: 1 + batch.losses + 0 * batch.sum(batch.losses)),
        "is declared pointwise, but a NaN loss changes other weights",
    ),
    (
        altered(Pointwise, lambda batch: 1 + batch.losses + 1.0 * batch.any(batch.losses == math.inf)),
        "is declared pointwise, but an infinite loss changes other weights",
    ),
    (
        altered(Pointwise, refusing(lambda batch: batch.any(batch.losses == -math.inf))),
        "raised ValueError: too hard for a batch with a loss of -inf",
    ),
    (
        altered(Pointwise, refusing(lambda batch: batch.xp.all(batch.losses == math.inf))),
        "raised ValueError: too hard for a batch of losses that are all inf",
    ),
    (
        altered(Pointwise, refusing(lambda batch: batch.count == 0)),
        "raised ValueError: too hard for a batch that is masked out",
    ),
    # The state.
    (
        altered(Remembering, init=lambda self: {"updates": next(counter), "means": np.ones(2)}),
        "another state each",
    ),
    (
        altered(Remembering, step=lambda self, batch, state: (OfBatch().weights(batch), {"updates": 0})),
        r"changes the structure of its state: init\(\) gives",
    ),
    (
        altered(Remembering, step=lambda *given: (given[1].losses, {**given[2], "means": np.ones(1)})),
        r"changes the structure of its state: .*'means': \(2,\)}, step .*'means': \(1,\)}",
    ),
    (
        altered(
            Remembering,
            init=lambda self: {"mean": 0},
            step=lambda self, batch, state: (1 + 0 * batch.losses, {"mean": 0.5 * state["mean"] + 0.5}),
        ),
        r"would lose its state: Broken.init begins with an integer, .* begin with .* such as 0\.0",
    ),
    (altered(Remembering, step=lambda self, batch, state: 1 / 0), "raised ZeroDivisionError: .* in step"),
    (altered(Remembering, step=writing), "writes to the state that step is given"),
]


@pytest.mark.parametrize(("weighting", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_formula_that_breaks_the_contract_is_named(weighting, message):
    with pytest.raises(AssertionError, match=rf"^{re.escape(str(weighting))} .*{message}"):
        check_weighting(weighting, fronts=[])


BROKEN_IN_A_FRONT = [
    (
        altered(Pointwise, lambda batch: 1 + batch.losses, kernel=lambda self: ("kl", (1.0, 0.5, 0.0))),
        "numpy",
        "gives other weights in its kernel 'kl' than by its formula in NumPy for an ordinary batch",
    ),
    (
        altered(Pointwise, lambda batch: 1 + batch.losses, kernel=lambda self: ("cubic", (1.0,))),
        "numpy",
        "fails in its kernel 'cubic' with ValueError",
    ),
    (
        altered(Pointwise, lambda batch: 1 + batch.losses.astype(batch.losses.dtype)),
        "torch",
        "fails in torch with AttributeError: .*write the formula with batch.xp",
    ),
    (
        altered(Pointwise, lambda batch: (1 if in_numpy(batch) else 2) + batch.losses),
        "torch",
        "gives other weights in torch than by its formula in NumPy for an ordinary batch",
    ),
    (
        altered(Pointwise, lambda batch: batch.losses + (1 if float(batch.count) >= 0 else 2)),
        "torch",
        "fails in torch.compile with",
    ),
    (altered(Pointwise, added_in_place), "torch", "fails in torch.func.vmap with"),
    (
        altered(Pointwise, lambda batch: (1 if in_numpy(batch) else 2) + batch.losses),
        "jax",
        "gives other weights in jax.jit with traced settings than by its formula in NumPy",
    ),
    (
        altered(Numbered, weights=lambda self, batch: 1 + max(self.power, 1) * batch.losses),
        "jax",
        "fails in jax.jit with traced settings with TracerBoolConversionError",
    ),
]


@pytest.mark.parametrize(
    ("weighting", "front", "message"), BROKEN_IN_A_FRONT, ids=[message for *_, message in BROKEN_IN_A_FRONT]
)
def test_a_member_that_fails_in_one_front_is_told_where(weighting, front, message):
    pytest.importorskip(front)
    check_weighting(weighting, fronts=[])
    with pytest.raises(AssertionError, match=rf"^{re.escape(str(weighting))} {message}"):
        check_weighting(weighting, fronts=[front])


def plus_one(result):
    """Weights that are off by one in a place, and a state likewise."""
    if isinstance(result, tuple):
        return result[0], {**result[1], "updates": result[1]["updates"] + 1}
    return result + 1


GATE = rgd.EntropyGate(rgd.ERM())
WRONG = [
    ("numpy", "rgd.sample_weights", Pointwise(), "gives other weights in rgd.sample_weights"),
    ("numpy", "rgd.sample_weights", Remembering(), "is left with another state by rgd.sample_weights"),
    ("torch", "rgd.torch.sample_weights", Remembering(), "is left with another state by torch "),
    ("torch", "torch.func.vmap", Pointwise(), "gives other weights in torch.func.vmap"),
    ("torch", "torch.compile", Pointwise(), "gives other weights in torch.compile"),
    ("jax", "rgd.jax.sample_weights", Remembering(), "is left with another state by jax.jit"),
    ("jax", "jax.vmap", Pointwise(), r"gives other weights in jax.vmap \(float32\)"),
    ("torch", "rgd.torch.cross_entropy", GATE, "gives other weighted losses in torch than"),
    (
        "torch",
        "rgd.torch.cross_entropy",
        rgd.EntropyGate(Remembering()),
        "is left with another state by torch",
    ),
    (
        "torch",
        "rgd.torch.linear_cross_entropy",
        GATE,
        "gives other weighted losses in a linear head of torch",
    ),
    ("torch", "torch.compile", GATE, "gives other weighted losses in torch.compile"),
    ("jax", "rgd.jax.cross_entropy", GATE, "gives other weighted losses in jax.jit"),
    (
        "jax",
        "rgd.jax.linear_cross_entropy",
        GATE,
        "gives other weighted losses in a linear head under jax.jit",
    ),
]


@pytest.mark.parametrize(("front", "name", "weighting", "message"), WRONG, ids=[case[3] for case in WRONG])
def test_a_front_with_wrong_numbers_is_told(front, name, weighting, message, monkeypatch):
    pytest.importorskip(front)
    module, _, attribute = name.rpartition(".")
    right = getattr(importlib.import_module(module), attribute)
    if "sample_weights" in name or "cross_entropy" in name:

        def wrong(*arguments, **options):
            return plus_one(right(*arguments, **options))
    else:

        def wrong(function, **options):
            changed = right(function, **options)
            return lambda *arguments: plus_one(changed(*arguments))

    monkeypatch.setattr(name, wrong)
    with pytest.raises(AssertionError, match=message):
        check_weighting(weighting, fronts=[front])


@pytest.mark.parametrize(
    ("front", "name", "kinds"),
    [
        ("numpy", "rgd.sample_weights", ["float32", "float16"]),
        ("torch", "rgd.torch.sample_weights", ["float32", "float16", "bfloat16"]),
        ("jax", "rgd.jax.sample_weights", ["float32", "bfloat16"]),
    ],
)
def test_wrong_numbers_for_one_dtype_are_told(front, name, kinds, monkeypatch):
    pytest.importorskip(front)
    module, _, attribute = name.rpartition(".")
    right = getattr(importlib.import_module(module), attribute)
    for kind in kinds:

        def wrong(losses, *arguments, kind=kind, **options):
            result = right(losses, *arguments, **options)
            return result + 1 if str(losses.dtype).endswith(kind) else result

        monkeypatch.setattr(name, wrong)
        with pytest.raises(AssertionError, match=rf"gives other weights .*{kind}"):
            check_weighting(Pointwise(), fronts=[front])


def test_without_fronts_those_that_are_installed_are_compared(monkeypatch):
    asked = []
    monkeypatch.setattr(rgd.testing.importlib.util, "find_spec", lambda name: name != "jax" or None)
    for name in FRONTS:
        monkeypatch.setitem(rgd.testing.FRONT_CHECKS, name, lambda subject, name=name: asked.append(name))
    check_weighting(Pointwise())
    assert asked == ["numpy", "torch"]


@dataclasses.dataclass(frozen=True)
class Cumulative(rgd.Weighting):
    power: float = 1.0

    def weights(self, batch):
        xp = batch.xp
        mass = xp.cumulative_sum(xp.take(batch.measure, xp.argsort(batch.losses), axis=0))
        return 1 + self.power * batch.losses + 0 * mass


def test_a_member_that_passes_says_nothing(capfd):
    if torch.__version__.startswith("2.8"):
        pytest.skip("torch 2.8 cannot compile xp.cumulative_sum")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_weighting(Cumulative(), fronts=["torch"])
    assert [str(one.message) for one in caught] == []
    assert capfd.readouterr() == ("", "")


def test_an_unknown_front_is_refused():
    with pytest.raises(ValueError, match="fronts must hold names out of numpy, torch, jax, got 'cupy'"):
        check_weighting(Pointwise(), fronts=["cupy"])


@pytest.mark.parametrize("weighting", [1.0, rgd.KL, None, np.ones(3)], ids=str)
def test_what_is_no_weighting_is_refused(weighting):
    with pytest.raises(TypeError, match="weighting must be an"):
        check_weighting(weighting, fronts=[])


def test_a_member_that_needs_groups_says_so():
    with pytest.raises(AssertionError, match="needs the group of each sample"):
        check_weighting(rgd.GroupDRO(3, 0.1), fronts=[])


def test_a_class_may_be_defined_where_pickle_does_not_find_it():
    @dataclasses.dataclass(frozen=True)
    class Local(Pointwise):
        pass

    check_weighting(Local(), fronts=["numpy"])
