"""`rgd.log_prior` and `rgd.class_balanced`: their formulas, what they read, what they refuse."""

import math

import numpy as np
import pytest
import rgd
import torch

EPS = np.finfo(np.float64).eps
COUNTS = [900, 90, 10, 1]


def test_the_log_prior_is_the_logarithm_of_the_shares():
    prior = rgd.log_prior(COUNTS)
    assert prior.dtype == np.float64
    np.testing.assert_allclose(prior, [math.log(n / 1001) for n in COUNTS], rtol=8 * EPS)
    assert np.exp(prior).sum() == pytest.approx(1.0, abs=8 * EPS)


def test_a_class_without_samples_has_the_prior_zero():
    np.testing.assert_array_equal(rgd.log_prior([2, 0]), [0, -np.inf])


@pytest.mark.parametrize("scale", [1e-310, 1e-300, 0.25, 1e305])
def test_only_proportions_count_for_the_log_prior(scale):
    # A subnormal number has lost digits before it is read.
    relative = 1e-3 if scale < 1e-305 else 8 * EPS
    np.testing.assert_allclose(
        rgd.log_prior(scale * np.array([2.0, 3.0, 5.0])), rgd.log_prior([2, 3, 5]), rtol=relative
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999, 1 - 1e-12])
def test_class_balanced_weights_follow_the_equation_and_sum_to_the_number_of_classes(beta):
    weights = rgd.class_balanced(COUNTS, beta)
    # The effective number, (1 - beta^n) / (1 - beta), as the sum of powers that it is.
    effective = np.array([math.fsum(beta**k for k in range(n)) for n in COUNTS])
    expected = len(COUNTS) / effective / np.sum(1 / effective)
    np.testing.assert_allclose(weights, expected, rtol=max(COUNTS) * EPS)
    assert weights.sum() == pytest.approx(len(COUNTS), rel=8 * EPS)
    assert weights.dtype == np.float64


def test_the_default_beta_is_that_of_the_paper():
    np.testing.assert_array_equal(rgd.class_balanced(COUNTS), rgd.class_balanced(COUNTS, beta=0.9999))


@pytest.mark.parametrize("function", [rgd.log_prior, rgd.class_balanced])
def test_lists_arrays_and_tensors_are_read_alike(function):
    jnp = pytest.importorskip("jax.numpy")
    expected = function(np.array(COUNTS))
    for given in (
        COUNTS,
        tuple(COUNTS),
        torch.tensor(COUNTS),
        torch.tensor(COUNTS).float(),
        jnp.array(COUNTS),
    ):
        result = function(given)
        assert isinstance(result, np.ndarray)
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("function", [rgd.log_prior, rgd.class_balanced])
@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([3, -1], ValueError, "finite numbers >= 0, got -1.0 for class 1"),
        ([math.nan, 1.0], ValueError, "got nan for class 0"),
        ([1.0, math.inf], ValueError, "got inf for class 1"),
        ([], ValueError, "shape \\(C,\\), got shape \\(0,\\)"),
        (5, ValueError, "got shape \\(\\).*bincount"),
        ([[1, 2]], ValueError, "got shape \\(1, 2\\)"),
        (["a"], TypeError, "array of numbers"),
        ([True, False], TypeError, "array of numbers, got bool"),
        ([[1], [2, 3]], TypeError, "cannot be read"),
    ],
    ids=str,
)
def test_counts_that_are_none_are_refused(function, counts, error, message):
    with pytest.raises(error, match=message):
        function(counts)


def test_counts_of_zero_alone_have_no_prior():
    with pytest.raises(ValueError, match="counts must hold a positive number"):
        rgd.log_prior([0, 0])


def test_a_class_without_samples_has_no_balanced_weight():
    with pytest.raises(
        ValueError, match=r"class 1 has no sample: leave it out, or give np.maximum\(counts, 1\)"
    ):
        rgd.class_balanced([3, 0, 2])


@pytest.mark.parametrize("beta", [1.0, -0.1, math.nan, 2])
def test_a_beta_out_of_range_is_refused(beta):
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\)"):
        rgd.class_balanced(COUNTS, beta)


def test_a_beta_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match="beta must be a number"):
        rgd.class_balanced(COUNTS, "0.9")


def test_a_tensor_on_another_device_is_refused_with_the_reason():
    with pytest.raises(TypeError, match="counts cannot be read as a NumPy array"):
        rgd.log_prior(torch.ones(3, device="meta"))
