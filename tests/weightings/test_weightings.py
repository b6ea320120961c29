"""The weightings check their own numbers, wherever they are used."""

import copy
import dataclasses
import math
import pickle
from functools import partial

import numpy as np
import pytest
import rgd
from rgd import (
    ERM,
    KL,
    ChiSquare,
    ChiSquareBall,
    CVaR,
    EntropyGate,
    Excess,
    Focal,
    GroupDRO,
    KLBall,
    MidrangeKL,
    MovingAverage,
    Pointwise,
    Threshold,
    Trimmed,
    Weighting,
)
from rgd.weightings._base import observe_subclasses
from rgd.weightings._call import kernel_of, resolve_weighting
from rgd.weightings._fields import map_numbers, numbers_of

MEMBERS = [
    ERM(),
    KL(),
    KL(2.0, scale=0.1, normalize=True),
    KL(scale=-0.7),
    KLBall(0.3),
    MidrangeKL(0.5, relative=True),
    ChiSquare(1.0),
    ChiSquareBall(0.3),
    CVaR(0.1, smoothing=0.5),
    Focal(2.0),
    Threshold(2.0),
    Excess(KL()),
    EntropyGate(KL()),
    Trimmed(KL(), 0.1),
    MovingAverage(KL(), 0.9),
    GroupDRO(3, 0.1),
    Pointwise(abs),
]


def test_the_default_is_the_papers_pointwise_weighting_with_tau_one():
    assert KL() == KL(tau=1.0, scale=None, normalize=False)
    assert KL().effective_scale == 0.5


@pytest.mark.parametrize("tau", [1.0, 3.0, 1 / 3, 1 / 9, 100])
def test_the_scale_is_one_over_tau_plus_one_unless_given(tau):
    assert KL(tau).effective_scale == 1 / (tau + 1)
    assert KL(tau, scale=0.25).effective_scale == 0.25


def test_a_scale_of_zero_is_kept_and_not_taken_for_none_given():
    assert KL(scale=0).effective_scale == 0


def test_an_infinite_tau_with_a_scale_clips_nothing():
    weighting = KL(math.inf, scale=2.0)
    assert math.isinf(weighting.tau)
    assert weighting.effective_scale == 2.0


def test_an_infinite_tau_without_a_scale_is_refused_and_told_the_fix():
    with pytest.raises(ValueError, match=r"tau=inf .* give scale too"):
        KL(math.inf)


@pytest.mark.parametrize("tau", [0, 0.0, -0.0, -1.0, math.nan, -math.inf])
def test_a_tau_that_is_not_positive_is_refused(tau):
    with pytest.raises(ValueError, match="tau must be a positive number, got"):
        KL(tau)


@pytest.mark.parametrize("tau", ["1.0", True, 1j, [1.0]])
def test_a_tau_that_is_no_number_is_refused(tau):
    with pytest.raises(TypeError, match="tau must be a number, got"):
        KL(tau)


def test_a_negative_scale_clips_nothing_unless_tau_is_given():
    assert KL(scale=-0.7) == KL(math.inf, scale=-0.7)
    assert KL(scale=-0.7).clip == math.inf
    assert KL(2.0, scale=-0.7).clip == 2.0
    assert KL(scale=-0.7).effective_scale == -0.7


@pytest.mark.parametrize("scale", [-math.inf, math.nan, math.inf])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match=r"scale must be a finite number, or None for 1 / \(tau \+ 1\), got"):
        KL(scale=scale)


@pytest.mark.parametrize("scale", ["0.5", False])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(TypeError, match="scale must be a number"):
        KL(scale=scale)


@pytest.mark.parametrize("normalize", [1, None, "yes"])
def test_normalize_must_be_a_bool(normalize):
    with pytest.raises(TypeError, match="normalize must be True or False"):
        KL(normalize=normalize)


def test_scale_and_normalize_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        KL(1.0, 0.5)


@pytest.mark.parametrize("relative", [1, None, "yes"])
def test_relative_must_be_a_bool(relative):
    with pytest.raises(TypeError, match="relative must be True or False"):
        MidrangeKL(1.0, relative)


NOT_FINITE = [math.nan, math.inf, -math.inf]

SETTINGS = {
    # What makes a member of a value, its name, values outside its range, values at its edge, the range.
    "KLBall": (KLBall, "radius", [-1e-9, math.nan, -math.inf], [0, math.inf], "a number >= 0"),
    "ChiSquareBall": (ChiSquareBall, "radius", [-1e-9, math.nan, -math.inf], [0, math.inf], "a number >= 0"),
    "ChiSquare": (ChiSquare, "gamma", [0, -1.0, *NOT_FINITE], [1e-9], "a positive, finite number"),
    "MidrangeKL": (MidrangeKL, "scale", NOT_FINITE, [-1.0, 0], "a finite number"),
    "CVaR alpha": (CVaR, "alpha", [0, -0.1, 1.1, *NOT_FINITE], [1e-9, 1], r"in \(0, 1\]"),
    "CVaR smoothing": (partial(CVaR, 0.5), "smoothing", [-0.1, *NOT_FINITE], [0], "a finite number >= 0"),
    "Focal": (Focal, "gamma", [-0.1, *NOT_FINITE], [0], "a finite number >= 0"),
    "Threshold": (Threshold, "max_loss", NOT_FINITE, [0, -1.0], "a finite number"),
    "Trimmed": (partial(Trimmed, KL()), "fraction", [-0.1, 1, *NOT_FINITE], [0, 0.99], r"in \[0, 1\)"),
    "MovingAverage": (
        partial(MovingAverage, KL()),
        "decay",
        [-0.1, 1, *NOT_FINITE],
        [0, 0.99],
        r"in \[0, 1\)",
    ),
    "GroupDRO": (partial(GroupDRO, 2), "step_size", [-0.1, *NOT_FINITE], [0], "a finite number >= 0"),
}


@pytest.mark.parametrize(("make", "name", "outside", "edge", "says"), SETTINGS.values(), ids=SETTINGS)
def test_a_number_outside_its_range_is_refused_by_name(make, name, outside, edge, says):
    for value in outside:
        with pytest.raises(ValueError, match=rf"^{name} must be {says}.*, got {value}"):
            make(value)
    for value in edge:
        assert getattr(make(value), name) == value


@pytest.mark.parametrize(("make", "name"), [case[:2] for case in SETTINGS.values()], ids=SETTINGS)
@pytest.mark.parametrize("value", ["0.1", None, True, [0.1]], ids=str)
def test_what_is_no_number_is_refused_by_name(make, name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be a number, got"):
        make(value)


@pytest.mark.parametrize("groups", ["2", None, True, 2.0])
def test_a_number_of_groups_that_is_no_integer_is_refused(groups):
    with pytest.raises(TypeError, match="groups must be the number of groups, an integer, got"):
        GroupDRO(groups, 0.1)


@pytest.mark.parametrize("groups", [0, -3])
def test_a_number_of_groups_below_one_is_refused(groups):
    with pytest.raises(ValueError, match=f"groups must be the number of groups, at least 1, got {groups}"):
        GroupDRO(groups, 0.1)


@pytest.mark.parametrize(
    "make", [lambda inner: Trimmed(inner, 0.1), lambda inner: MovingAverage(inner, 0.1), Excess, EntropyGate]
)
@pytest.mark.parametrize("inner", [1.0, KL, None], ids=str)
def test_an_inner_weighting_that_is_none_is_refused(make, inner):
    with pytest.raises(TypeError, match=r"weighting must be an rgd\.Weighting, such as rgd\.KL"):
        make(inner)


@pytest.mark.parametrize("inner", [KL(normalize=True), KLBall(0.1), GroupDRO(2, 0.1)], ids=str)
def test_a_moving_average_of_weights_that_depend_on_the_batch_is_refused(inner):
    with pytest.raises(ValueError, match="weighting must be pointwise"):
        MovingAverage(inner, 0.1)


def test_a_function_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match=r"function must be a function of the losses, got 1\.0"):
        Pointwise(1.0)


@pytest.mark.parametrize("needs", ["entropy", ["entropy"], ("correct",), ("entropy", "loss"), None], ids=str)
def test_a_need_that_no_batch_has_is_refused_where_the_class_is_made(needs):
    with pytest.raises(TypeError, match="needs of Curious must be a tuple of names out of 'entropy' and"):
        type("Curious", (Weighting,), {"needs": needs, "weights": lambda self, batch: batch.losses})
    assert type("Modest", (Weighting,), {"needs": ("reference", "entropy"), "weights": None})


def test_a_radius_of_zero_or_infinity_is_allowed():
    assert KLBall(0).radius == 0
    assert math.isinf(KLBall(math.inf).radius)


@pytest.mark.parametrize("number", [np.float32(2), np.float64(2), np.int64(2), 2])
def test_numbers_of_numpy_count_as_numbers_and_are_kept_as_floats(number):
    for kept in (KL(number).tau, KL(scale=number).scale, KLBall(number).radius):
        assert type(kept) is float
        assert kept == 2.0


@pytest.mark.parametrize("weighting", MEMBERS, ids=str)
def test_a_weighting_is_a_value(weighting):
    assert pickle.loads(pickle.dumps(weighting)) == weighting
    assert copy.deepcopy(weighting) == weighting
    assert hash(copy.copy(weighting)) == hash(weighting)
    name = dataclasses.fields(weighting)[0].name if dataclasses.fields(weighting) else "tau"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(weighting, name, 5.0)


@pytest.mark.parametrize("weighting", MEMBERS[:-1], ids=str)
def test_a_weighting_reads_as_the_code_that_makes_it(weighting):
    assert eval(str(weighting), {**vars(rgd), "inf": math.inf}) == weighting


def test_different_weightings_are_not_equal():
    assert len(set(MEMBERS)) == len(MEMBERS)
    assert KLBall(0.3) != ChiSquareBall(0.3)


def test_only_the_members_that_remember_are_stateful():
    stateful = [weighting for weighting in MEMBERS if weighting.stateful]
    assert stateful == [MovingAverage(KL(), 0.9), GroupDRO(3, 0.1)]
    assert Trimmed(GroupDRO(2, 0.1), 0.1).stateful
    for weighting in MEMBERS:
        if not weighting.stateful:
            assert weighting.init() == ()


def test_a_clip_is_the_loss_from_which_on_weights_are_equal():
    assert KL(2.0).clip == 2.0
    assert MovingAverage(KL(2.0), 0.9).clip == 2.0
    assert Excess(KL(2.0)).clip == 2.0
    assert EntropyGate(KL(2.0)).clip == 2.0
    assert {weighting.clip for weighting in (ERM(), KLBall(0.1), CVaR(0.1), Threshold(1.0))} == {math.inf}


def test_neither_tau_nor_weighting_means_the_default():
    assert resolve_weighting(None, None) == KL(tau=1.0)


def test_tau_is_short_for_a_kl_weighting():
    assert resolve_weighting(None, 0.2) == KL(tau=0.2)


def test_scale_is_short_for_a_kl_weighting_and_chooses_the_clip_where_no_tau_is_given():
    assert resolve_weighting(None, scale=-0.7) == KL(math.inf, scale=-0.7)
    assert resolve_weighting(None, scale=0.7) == KL(1.0, scale=0.7)
    assert resolve_weighting(None, 3.0, -0.7) == KL(3.0, scale=-0.7)


@pytest.mark.parametrize("weighting", MEMBERS, ids=str)
def test_a_given_weighting_is_used_as_it_is(weighting):
    assert resolve_weighting(weighting) is weighting


def test_both_tau_and_weighting_are_refused_even_where_they_agree():
    with pytest.raises(ValueError, match="tau or weighting, not both"):
        resolve_weighting(KL(1.0), 1.0)


def test_both_scale_and_weighting_are_refused_even_where_they_agree():
    with pytest.raises(ValueError, match=r"scale or weighting, not both: .*rgd\.KL\(scale=x\)"):
        resolve_weighting(KL(scale=-0.7), scale=-0.7)


@pytest.mark.parametrize("weighting", [0.5, "kl", KL, object(), Weighting])
def test_a_weighting_of_another_type_is_refused(weighting):
    with pytest.raises(
        TypeError, match=r"weighting must be an (rgd\.Weighting, such|instance of rgd\.Weighting)"
    ):
        resolve_weighting(weighting)


@pytest.mark.parametrize(("number", "name"), [(0.5, "tau"), (-0.5, "scale"), (0, "scale")])
def test_a_bare_number_as_weighting_is_told_of_the_setting_it_may_be(number, name):
    with pytest.raises(TypeError, match=f"did you mean {name}={number}"):
        resolve_weighting(number)


def test_a_class_in_place_of_a_weighting_is_told_to_call_it():
    with pytest.raises(TypeError, match=r"got the class KL: call it, as in KL\(\.\.\.\)"):
        resolve_weighting(KL)


# The base class.


@dataclasses.dataclass(frozen=True)
class Softer(Weighting):
    power: float = 0.5
    name: str = "softer"
    pointwise = True

    def weights(self, batch):
        return (1 + batch.losses) ** self.power


def test_a_users_own_weighting_runs_as_it_stands():
    np.testing.assert_array_equal(rgd.sample_weights(np.array([0.0, 3.0]), Softer()), [1.0, 2.0])
    assert rgd.reweighted_mean(np.array([0.0, 3.0]), Softer()) == 3.0


def test_a_weighting_without_a_formula_says_what_to_define():
    @dataclasses.dataclass(frozen=True)
    class Nothing(Weighting):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing must define weights\(self, batch\)"):
        rgd.sample_weights(np.ones(2), Nothing())


def test_weights_of_another_shape_than_the_losses_are_refused():
    @dataclasses.dataclass(frozen=True)
    class One(Weighting):
        def weights(self, batch):
            return batch.mean(batch.losses)

    with pytest.raises(
        ValueError, match=r"One\.weights must return one weight for each loss, shape \(2,\), got \(\)"
    ):
        rgd.sample_weights(np.ones(2), One())


def test_the_weights_of_a_member_that_remembers_are_not_had_without_its_state():
    with pytest.raises(ValueError, match=r"depend on its state: call step\(batch, state\)"):
        GroupDRO(2, 0.1).weights(rgd.Batch(np.ones(2)))


def test_a_kernel_counts_only_beside_the_weights_it_computes():
    @dataclasses.dataclass(frozen=True)
    class Halved(KL):
        def weights(self, batch):
            return 0.5 * super().weights(batch)

    @dataclasses.dataclass(frozen=True)
    class Renamed(KL):
        pass

    assert kernel_of(Halved()) is None
    assert kernel_of(Renamed()) == kernel_of(KL()) == ("kl", (1.0, 0.5, 0.0))
    np.testing.assert_array_equal(rgd.sample_weights(np.zeros(2), Halved()), [0.5, 0.5])
    assert kernel_of(KLBall(0.1)) == ("kl_ball", (0.1,))
    assert kernel_of(ERM()) == ("kl", (math.inf, 0.0, 0.0))


def test_numbers_are_the_fields_that_a_schedule_may_change():
    assert numbers_of(Softer) == {"power"}
    assert numbers_of(KL) == {"tau", "scale"}
    assert numbers_of(GroupDRO) == {"step_size"}
    doubled = map_numbers(Trimmed(CVaR(0.1, smoothing=0.2), 0.3), lambda number: 2 * number)
    assert doubled == Trimmed(CVaR(0.2, smoothing=0.4), 0.6)
    assert map_numbers(KL(2.0), lambda number: 2 * number).scale is None


def test_every_subclass_is_observed_those_defined_later_too():
    seen = []
    observe_subclasses(seen.append)

    class Later(Softer):
        pass

    assert Later in seen
    assert {KL, GroupDRO, Softer} <= set(seen)
    assert len(seen) == len(set(seen))
