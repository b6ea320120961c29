"""The weightings check their own numbers, wherever they are used."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
from rgd.weightings import KL, KLBall, resolve_weighting


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


@pytest.mark.parametrize("tau", ["1.0", None, True, 1j, [1.0]])
def test_a_tau_that_is_no_number_is_refused(tau):
    with pytest.raises(TypeError, match="tau must be a number, got"):
        KL(tau)


@pytest.mark.parametrize("scale", [-0.5, math.nan, math.inf])
def test_a_scale_that_is_negative_or_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be a finite number >= 0"):
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


@pytest.mark.parametrize("radius", [-1e-9, math.nan, -math.inf])
def test_a_radius_that_is_negative_or_nan_is_refused(radius):
    with pytest.raises(ValueError, match="radius must be a number >= 0"):
        KLBall(radius)


@pytest.mark.parametrize("radius", ["0.1", None, True])
def test_a_radius_that_is_no_number_is_refused(radius):
    with pytest.raises(TypeError, match="radius must be a number"):
        KLBall(radius)


def test_a_radius_of_zero_or_infinity_is_allowed():
    assert KLBall(0).radius == 0
    assert math.isinf(KLBall(math.inf).radius)


@pytest.mark.parametrize("number", [np.float32(2), np.float64(2), np.int64(2), 2])
def test_numbers_of_numpy_count_as_numbers_and_are_kept_as_floats(number):
    for kept in (KL(number).tau, KL(scale=number).scale, KLBall(number).radius):
        assert type(kept) is float
        assert kept == 2.0


@pytest.mark.parametrize("weighting", [KL(), KL(2.0, scale=0.1, normalize=True), KLBall(0.3)])
def test_a_weighting_is_a_value(weighting):
    assert pickle.loads(pickle.dumps(weighting)) == weighting
    assert copy.deepcopy(weighting) == weighting
    assert hash(copy.copy(weighting)) == hash(weighting)
    name = dataclasses.fields(weighting)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(weighting, name, 5.0)


def test_neither_tau_nor_weighting_means_the_default():
    assert resolve_weighting(None, None) == KL(tau=1.0)


def test_tau_is_short_for_a_kl_weighting():
    assert resolve_weighting(0.2, None) == KL(tau=0.2)


@pytest.mark.parametrize("weighting", [KL(), KLBall(0.1)])
def test_a_given_weighting_is_used_as_it_is(weighting):
    assert resolve_weighting(None, weighting) is weighting


def test_both_tau_and_weighting_are_refused_even_where_they_agree():
    with pytest.raises(ValueError, match="tau or weighting, not both"):
        resolve_weighting(1.0, KL(1.0))


@pytest.mark.parametrize("weighting", [0.5, "kl", KL, object()])
def test_a_weighting_of_another_type_is_refused(weighting):
    with pytest.raises(TypeError, match=r"weighting must be an rgd\.KL or an rgd\.KLBall"):
        resolve_weighting(None, weighting)


def test_a_bare_number_as_weighting_is_told_of_tau():
    with pytest.raises(TypeError, match=r"did you mean tau=0\.5"):
        resolve_weighting(None, 0.5)
