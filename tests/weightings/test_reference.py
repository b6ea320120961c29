"""The reference against mpmath, against torch's own cross-entropy, and against what the equations imply."""

import ast
import itertools
import math
import textwrap
import warnings

import exact
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rgd import KL, ChiSquareBall, CVaR, GroupDRO, KLBall, MovingAverage, Trimmed, reference

EPS = np.finfo(np.float64).eps
ERM = KL(scale=0.0)
WEIGHTINGS = [
    KL(1.0),
    KL(1 / 9),
    KL(5.0, normalize=True),
    KL(math.inf, scale=1.5, normalize=True),
    KLBall(0.05),
    KLBall(1.0),
    KL(scale=-0.7),
    ChiSquareBall(0.3),
    CVaR(0.3),
    CVaR(0.3, smoothing=0.5),
    Trimmed(KL(2.0), 0.25),
]
SHAPES = [(5,), (6, 5), (4, 5, 3), (2, 5, 3, 2)]


def make_problem(shape, seed=0, ignore_index=None):
    """Logits, class indices, class probabilities and class weights."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3.0, size=shape)
    class_axis = 0 if len(shape) == 1 else 1
    target_shape = shape[:class_axis] + shape[class_axis + 1 :]
    target = rng.integers(0, shape[class_axis], size=target_shape)
    if ignore_index is not None and target.size > 1:
        target.reshape(-1)[:: max(target.size // 3, 2)] = ignore_index
    probabilities = rng.dirichlet(np.ones(shape[class_axis]), size=target_shape)
    weight = rng.uniform(0.2, 2.0, size=shape[class_axis])
    return logits, target, np.moveaxis(probabilities, -1, class_axis), weight


# Weights.


def test_pointwise_weights_of_known_losses():
    losses = [0.0, 0.5, 1.0, 2.0, -1.0]
    expected = [1.0, math.exp(0.25), math.exp(0.5), math.exp(0.5), math.exp(-0.5)]
    np.testing.assert_allclose(reference.sample_weights(losses, KL(1.0)), expected, rtol=2 * EPS)


def test_normalised_weights_of_known_losses():
    losses = [0.0, math.log(2.0), math.log(3.0)]
    weights = reference.sample_weights(losses, KL(math.inf, scale=1.0, normalize=True))
    np.testing.assert_allclose(weights, [0.5, 1.0, 1.5], rtol=4 * EPS)


def test_the_ball_of_two_losses_solves_the_binary_entropy():
    q = 0.8
    radius = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))
    np.testing.assert_allclose(reference.sample_weights([7.0, -2.0], KLBall(radius)), [1.6, 0.4], rtol=1e-13)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
# More orders of magnitude take more digits, and more time: one example has them.
@example(losses=[0.0, 3e-233, -6e-161])
@given(losses=st.lists(st.floats(1e-12, 20) | st.floats(-20, -1e-12) | st.just(0.0), min_size=1, max_size=12))
def test_weights_agree_with_mpmath(weighting, losses):
    got = reference.sample_weights(losses, weighting)
    expected, slack = exact.weights(losses, weighting)
    # An exponent x, rounded, moves exp(x) by |x| units in the last place, and the losses span at most 40.
    largest = 1.5 * 40
    for value, target, allowance in zip(got, expected, slack, strict=True):
        rounding = (largest + len(losses) + 8) * EPS * target + math.ulp(0.0)
        assert abs(value - target) <= rounding + allowance


@pytest.mark.parametrize("radius", [1e-8, 1e-4, 0.1, 1.0, 2.0])
@pytest.mark.parametrize(
    "losses", [[0.0, 1.0, 2.0, 3.0, 9.0, 9.0, 1.0, 0.5], list(np.geomspace(1e-6, 1e6, 40))]
)
def test_the_balls_weights_lie_on_its_surface_or_on_the_largest_losses(losses, radius):
    weights = reference.sample_weights(losses, KLBall(radius))
    largest = np.asarray(losses) == max(losses)
    if radius >= math.log(len(losses) / largest.sum()):
        np.testing.assert_array_equal(weights, largest * len(losses) / largest.sum())
    else:
        assert abs(exact.divergence(weights) / radius - 1) <= exact.BALL_TOLERANCE


def test_the_balls_weights_do_not_depend_on_the_losses_unit_or_origin():
    losses = np.random.default_rng(1).exponential(size=20)
    weights = reference.sample_weights(losses, KLBall(0.3))
    for factor, shift in itertools.product([1e-3, 8.0, 1e300], [0.0, 5.0]):
        other = reference.sample_weights(factor * (losses + shift), KLBall(0.3))
        # A shift rounds each loss by 6 eps, which the root's inverse temperature, below 3 here, multiplies.
        np.testing.assert_allclose(other, weights, rtol=1e-13)


def test_no_other_distribution_in_the_ball_has_a_larger_mean_loss():
    rng = np.random.default_rng(2)
    losses, radius = rng.exponential(size=6), 0.2
    best = reference.reweighted_mean(losses, KLBall(radius))
    for _ in range(2000):
        q = rng.dirichlet(np.full(6, rng.choice([0.5, 3.0, 30.0])))
        if np.sum(q * np.log(6 * q)) <= radius:
            assert q @ losses <= best * (1 + 1e-10)


def test_normalised_weights_are_the_gradient_of_the_kl_penalised_objective():
    losses, gamma, step = np.random.default_rng(3).normal(size=7), 0.7, 1e-5
    weights = reference.sample_weights(losses, KL(math.inf, scale=1 / gamma, normalize=True))

    def soft_maximum(losses):
        return gamma * math.log(np.mean(np.exp(losses / gamma)))

    for i, unit in enumerate(np.eye(7)):
        slope = (soft_maximum(losses + step * unit) - soft_maximum(losses - step * unit)) / (2 * step)
        # Central differences: step^2 times the third derivative, at most 1 / gamma^2, and eps / step.
        assert slope == pytest.approx(weights[i] / 7, abs=step**2 / gamma**2 + 4 * EPS / step)


@pytest.mark.parametrize("weighting", [ERM, KL(scale=0.0, normalize=True), KLBall(0.0)], ids=str)
def test_no_re_weighting_is_exactly_one_even_for_infinite_losses(weighting):
    losses = np.array([0.0, -3.0, 1e300, math.inf])
    np.testing.assert_array_equal(reference.sample_weights(losses, weighting), np.ones(4))


def test_a_nan_loss_makes_only_its_own_pointwise_weight_nan():
    weights = reference.sample_weights([1.0, math.nan, 2.0], KL())
    np.testing.assert_array_equal(np.isnan(weights), [False, True, False])
    assert math.isnan(reference.sample_weights([math.nan], ERM)[0])


@pytest.mark.parametrize("weighting", [KL(normalize=True), KLBall(0.1), KLBall(0.0)], ids=str)
def test_a_nan_loss_makes_all_weights_nan_that_depend_on_the_batch(weighting):
    assert np.all(np.isnan(reference.sample_weights([1.0, math.nan, 2.0], weighting)))


def test_an_infinite_loss_has_the_weight_of_tau():
    weights = reference.sample_weights([0.0, math.inf, -math.inf], KL(2.0))
    np.testing.assert_allclose(weights, [1.0, math.exp(2.0 / 3.0), 0.0], rtol=2 * EPS)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_masked_losses_weigh_nothing_and_change_no_other_weight(weighting):
    losses = np.array([[0.3, 5.0, math.nan], [1.0, math.inf, 0.1]])
    where = np.isfinite(losses)
    weights = reference.sample_weights(losses, weighting, where)
    np.testing.assert_array_equal(weights[~where], 0.0)
    np.testing.assert_array_equal(weights[where], reference.sample_weights(losses[where], weighting))
    mean = reference.reweighted_mean(losses, weighting, where)
    assert mean == pytest.approx(np.mean(weights[where] * losses[where]), rel=8 * EPS)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_nothing_to_weigh_gives_no_weights_and_a_mean_of_nan(weighting):
    assert reference.sample_weights(np.empty((0, 3)), weighting).shape == (0, 3)
    assert math.isnan(reference.reweighted_mean([], weighting))
    assert math.isnan(reference.reweighted_mean([1.0], weighting, where=[False]))


def test_scalar_loss_is_refused_with_a_hint():
    for function in (reference.sample_weights, reference.reweighted_mean):
        with pytest.raises(ValueError, match='reduction="none"'):
            function(0.7, KL())


def test_weight_stats_of_equal_weights():
    stats = reference.weight_stats([1.0, 2.0, 6.0], [1.0, 1.0, 1.0], ERM)
    assert (stats.count, stats.mean_loss, stats.objective, stats.max_weight) == (3, 3.0, 3.0, 1.0)
    assert stats.effective_sample_size == pytest.approx(3.0, rel=4 * EPS)
    assert stats.kl_to_uniform == pytest.approx(0.0, abs=4 * EPS)
    assert stats.clipped_share == pytest.approx(2 / 3)


def test_weight_stats_of_all_weight_on_one_sample():
    stats = reference.weight_stats([1.0, 2.0, 6.0, 3.0], [0.0, 0.0, 4.0, 0.0], KLBall(5.0))
    assert stats.effective_sample_size == 1.0
    assert stats.kl_to_uniform == math.log(4)
    assert (stats.objective, stats.max_weight, stats.clipped_share) == (6.0, 4.0, 0.0)


def test_weight_stats_of_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"weights must have the shape of losses, \(3,\), got \(2,\)"):
        reference.weight_stats([1.0, 2.0, 6.0], [1.0, 1.0])


def test_weight_stats_of_an_integer_mass_are_those_of_the_samples_repeated():
    losses, weights, times = (
        np.array([0.5, 3.0, 1.0, 9.0]),
        np.array([0.4, 2.0, 1.0, 5.0]),
        np.array([3, 1, 2, 0]),
    )
    weighted = reference.weight_stats(losses, weights, KL(2.0), sample_weight=times)
    repeated = reference.weight_stats(np.repeat(losses, times), np.repeat(weights, times), KL(2.0))
    for name in ("mean_loss", "objective", "kl_to_uniform", "max_weight", "clipped_share", "mean_weight"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name), rel=16 * EPS)
    # Three samples have mass, which are six repeated.
    assert (weighted.count, repeated.count) == (3, 6)
    assert weighted.effective_sample_size / 3 == pytest.approx(
        repeated.effective_sample_size / 6, rel=16 * EPS
    )


def test_weight_stats_of_masked_samples_are_those_of_the_rest():
    losses, weights, taken = (
        np.array([0.5, math.nan, 1.0]),
        np.array([0.4, 7.0, 1.6]),
        np.array([True, False, True]),
    )
    stats = reference.weight_stats(losses, weights, KL(), where=taken)
    assert stats == reference.weight_stats(losses[taken], weights[taken], KL())


def test_weight_stats_of_groups():
    stats = reference.weight_stats(
        [1.0, 3.0, 5.0, 7.0], [1.0, 2.0, 3.0, 9.0], sample_weight=[1.0, 2.0, 1.0, 0.0], groups=[2, 2, 0, 1]
    )
    mean_loss, share, count = stats.groups.mean_loss, stats.groups.weight_share, stats.groups.count
    np.testing.assert_array_equal(mean_loss, [5.0, math.nan, 7 / 3])
    np.testing.assert_array_equal(share, [3 / 8, 0.0, 5 / 8])
    np.testing.assert_array_equal(count, [1, 0, 2])


def test_formulas_in_the_modules_docstring_are_python():
    blocks = code_blocks(reference.__doc__)
    assert len(blocks) == 3
    for block in blocks:
        ast.parse(block)


def code_blocks(docstring):
    """The indented blocks of a docstring that do not belong to a section such as "References:"."""
    paragraphs = docstring.split("\n\n")
    return [textwrap.dedent(block) for block in paragraphs if block.startswith("    ")]


# Cross-entropy, against torch.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "indices with some ignored", "probabilities"])
def test_unweighted_value_and_gradient_are_those_of_torch(shape, reduction, label_smoothing, weighted, kind):
    torch = pytest.importorskip("torch")
    logits, target, probabilities, weight = make_problem(shape, ignore_index=2 if "ignored" in kind else None)
    target = probabilities if kind == "probabilities" else target
    options = {
        "weight": weight if weighted else None,
        "ignore_index": 2 if "ignored" in kind else -100,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    value = reference.cross_entropy(logits, target, weighting=ERM, **options)
    gradient = reference.cross_entropy_grad(logits, target, weighting=ERM, **options)

    torch_logits = torch.tensor(logits, requires_grad=True)
    if weighted:
        options["weight"] = torch.tensor(weight)
    expected = torch.nn.functional.cross_entropy(torch_logits, torch.tensor(target), **options)
    expected.sum().backward()
    assert value.shape == tuple(expected.shape)
    # Sums of at most 60 terms; torch's gradient loses digits where p_k - 1 cancels, hence the absolute part.
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=64 * EPS, atol=64 * EPS)
    np.testing.assert_allclose(gradient, torch_logits.grad.numpy(), rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_value_and_gradient_are_those_of_the_formula_composed_from_torch(weighting, reduction, per, kind):
    torch = pytest.importorskip("torch")
    logits, target, probabilities, weight = make_problem((4, 5, 3), seed=4, ignore_index=1)
    target[2] = 1
    target = probabilities if kind == "probabilities" else target
    options = {"ignore_index": 1 if kind == "indices" else -100, "label_smoothing": 0.2}
    value = reference.cross_entropy(
        logits, target, weight, reduction=reduction, weighting=weighting, per=per, **options
    )
    gradient = reference.cross_entropy_grad(
        logits, target, weight, reduction=reduction, weighting=weighting, per=per, **options
    )

    torch_logits = torch.tensor(logits, requires_grad=True)
    losses = torch.nn.functional.cross_entropy(
        torch_logits, torch.tensor(target), torch.tensor(weight), reduction="none", **options
    )
    plain = losses.detach().numpy()
    counted = np.ones(plain.shape, dtype=bool) if kind == "probabilities" else target != 1
    if per == "element":
        weights = reference.sample_weights(plain, weighting, counted)
    else:
        number = counted.sum(1)
        means = plain.sum(1) / np.maximum(number, 1)
        weights = reference.sample_weights(means, weighting, number > 0)[:, None]
    objective = torch.tensor(weights) * losses
    if reduction != "none":
        objective = objective.sum()
    if reduction == "mean":
        objective = objective / (weight[target[counted]].sum() if kind == "indices" else losses.numel())
    objective.sum().backward()
    # The ball's root carries the losses' rounding into all weights, through inverse temperatures below 10.
    np.testing.assert_allclose(value, objective.detach().numpy(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(gradient, torch_logits.grad.numpy(), rtol=1e-12, atol=1e-13)


def test_losses_are_those_of_torch_without_reduction_and_zero_where_ignored():
    torch = pytest.importorskip("torch")
    logits, target, _, weight = make_problem((4, 5, 3), seed=5, ignore_index=0)
    losses = reference.cross_entropy_losses(logits, target, weight, ignore_index=0, label_smoothing=0.3)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits),
        torch.tensor(target),
        torch.tensor(weight),
        ignore_index=0,
        label_smoothing=0.3,
        reduction="none",
    )
    np.testing.assert_allclose(losses, expected.numpy(), rtol=16 * EPS)
    np.testing.assert_array_equal(losses[target == 0], 0.0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "logits",
    [
        [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [3.0, 2.0, 1.0]],
        [[1.0, -math.inf, 0.0], [2.0, -math.inf, 1.0], [0.0, -math.inf, 0.0]],
        [[1.0, math.nan, 0.0], [2.0, 1.0, 1.0], [0.0, 1.0, 0.0]],
        [[1.0, math.inf, 0.0], [2.0, 1.0, 1.0], [0.0, 1.0, 0.0]],
        [[-math.inf, -math.inf, -math.inf], [2.0, 1.0, 1.0], [0.0, 1.0, 0.0]],
    ],
    ids=["1e4", "-inf column", "nan", "inf", "-inf row"],
)
@pytest.mark.parametrize("target", [[0, 2, 0], [1, 0, 2], [-100, 1, -100], [-100, -100, -100]], ids=str)
def test_extreme_logits_give_what_torch_gives(logits, target, reduction, label_smoothing):
    torch = pytest.importorskip("torch")
    logits, target = np.array(logits), np.array(target)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    torch_logits = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(torch_logits, torch.tensor(target), **options)
    value = reference.cross_entropy(logits, target, weighting=ERM, **options)
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=8 * EPS, atol=8 * EPS)
    expected.sum().backward()
    gradient = reference.cross_entropy_grad(logits, target, weighting=ERM, **options)
    finite = np.isfinite(logits).all(axis=1)
    np.testing.assert_allclose(
        gradient[finite], torch_logits.grad.numpy()[finite], rtol=8 * EPS, atol=8 * EPS
    )


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_an_empty_batch_gives_what_torch_gives(shape, reduction, per, kind):
    torch = pytest.importorskip("torch")
    logits = np.empty(shape)
    target = np.empty(shape) if kind == "probabilities" else np.empty(shape[:1] + shape[2:], dtype=np.int64)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(target), reduction=reduction
    )
    value = reference.cross_entropy(logits, target, reduction=reduction, per=per)
    np.testing.assert_array_equal(value, expected.numpy())
    assert reference.cross_entropy_grad(logits, target, reduction=reduction, per=per).shape == shape


@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_with_every_target_ignored_the_mean_is_nan_and_the_gradient_zero(weighting, per):
    logits, target = np.zeros((3, 4)), np.full(3, -100)
    assert math.isnan(reference.cross_entropy(logits, target, weighting=weighting, per=per))
    assert reference.cross_entropy(logits, target, weighting=weighting, per=per, reduction="sum") == 0
    np.testing.assert_array_equal(
        reference.cross_entropy_grad(logits, target, weighting=weighting, per=per), np.zeros((3, 4))
    )


def test_a_sample_shares_one_weight_from_the_mean_over_its_targets_not_ignored():
    logits = np.zeros((2, 2, 3))
    logits[0, 0, 0] = 5.0
    target = np.array([[1, -100, 0], [-100, -100, 1]])
    losses = reference.cross_entropy_losses(logits, target)
    values = reference.cross_entropy(logits, target, weighting=KL(10.0), per="sample", reduction="none")
    first = math.exp((losses[0, 0] + losses[0, 2]) / 2 / 11)
    second = math.exp(losses[1, 2] / 11)
    expected = [[first * losses[0, 0], 0.0, first * losses[0, 2]], [0.0, 0.0, second * losses[1, 2]]]
    np.testing.assert_allclose(values, expected, rtol=8 * EPS)


MASSES = np.array([2, 0, 1, 3])


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_an_integer_mass_is_as_a_sample_repeated(weighting, reduction, per, kind):
    logits, target, probabilities, weight = make_problem((4, 5, 3), seed=6, ignore_index=1)
    target = probabilities if kind == "probabilities" else target
    options = {"ignore_index": 1 if kind == "indices" else -100, "per": per}
    options |= {"weighting": weighting, "reduction": reduction}
    value = reference.cross_entropy(logits, target, weight, sample_weight=MASSES, **options)
    gradient = reference.cross_entropy_grad(logits, target, weight, sample_weight=MASSES, **options)
    repeated = np.repeat(logits, MASSES, axis=0), np.repeat(target, MASSES, axis=0), weight
    # A ball's root carries the rounding of its sums into all weights, through inverse temperatures below 10.
    np.testing.assert_allclose(value, reference.cross_entropy(*repeated, **options), rtol=1e-12)
    expected = reference.cross_entropy_grad(*repeated, **options)
    starts = np.cumsum(MASSES) - MASSES
    for sample in np.flatnonzero(MASSES):
        total = MASSES[sample] * expected[starts[sample]]
        np.testing.assert_allclose(gradient[sample], total, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(gradient[MASSES == 0], 0.0)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("per", ["element", "sample"])
def test_a_masked_target_is_as_an_ignored_one(weighting, reduction, per):
    logits, target, _, weight = make_problem((4, 5, 3), seed=7)
    taken = np.random.default_rng(8).uniform(size=target.shape) < 0.6
    options = {"weighting": weighting, "reduction": reduction, "per": per}
    for function in (reference.cross_entropy, reference.cross_entropy_grad):
        got = function(logits, target, weight, where=taken, **options)
        np.testing.assert_array_equal(got, function(logits, np.where(taken, target, -100), weight, **options))
    if per == "element":
        got = reference.cross_entropy(logits, target, weight, sample_weight=taken.astype(float), **options)
        np.testing.assert_array_equal(
            got, reference.cross_entropy(logits, target, weight, where=taken, **options)
        )


def test_masked_class_probabilities_leave_the_mean_to_the_rest():
    logits, _, probabilities, _ = make_problem((6, 5), seed=9)
    taken = np.array([True, True, False, True, False, False])
    value = reference.cross_entropy(logits, probabilities, where=taken)
    assert value == pytest.approx(reference.cross_entropy(logits[taken], probabilities[taken]), rel=8 * EPS)


def test_the_mean_divides_by_the_mass_of_the_class_weights():
    logits, target, _, weight = make_problem((6, 5), seed=10)
    base = np.array([0.5, 2.0, 1.0, 0.25, 3.0, 1.5])
    losses = reference.cross_entropy_losses(logits, target, weight)
    expected = np.sum(base * np.exp(np.minimum(losses, 1) / 2) * losses) / np.sum(base * weight[target])
    assert reference.cross_entropy(logits, target, weight, sample_weight=base) == pytest.approx(
        expected, rel=16 * EPS
    )
    elements = reference.cross_entropy(logits, target, weight, sample_weight=base, reduction="none")
    np.testing.assert_allclose(elements, base * np.exp(np.minimum(losses, 1) / 2) * losses, rtol=8 * EPS)


def test_an_infinite_loss_of_weight_zero_gives_neither_value_nor_gradient():
    logits, target = np.array([[-math.inf, 0.0], [0.0, 0.0]]), np.array([0, 0])
    options = {"weighting": KL(scale=-1.0), "reduction": "sum"}
    assert reference.cross_entropy(logits, target, **options) == pytest.approx(math.log(2) / 2, rel=4 * EPS)
    gradient = reference.cross_entropy_grad(logits, target, **options)
    np.testing.assert_allclose(gradient, [[0.0, 0.0], [-0.25, 0.25]], rtol=4 * EPS)


def test_the_gradient_of_what_takes_no_part_is_zero_or_nan_where_logits_are():
    logits, target = np.array([[1.0, 0.0], [math.nan, 0.0], [0.0, 1.0]]), np.zeros(3, int)
    for options in ({"where": [True, False, False]}, {"sample_weight": [1.0, 0.0, 0.0]}):
        gradient = reference.cross_entropy_grad(logits, target, **options)
        assert np.isfinite(gradient[0]).all()
        assert np.isnan(gradient[1]).all()
        np.testing.assert_array_equal(gradient[2], [0.0, 0.0])


@pytest.mark.parametrize("per", ["element", "sample"])
def test_a_weighting_that_remembers_hands_its_state_on(per):
    logits, target, _, _ = make_problem((4, 5, 3), seed=11)
    weighting, groups = GroupDRO(3, 0.5), np.array([0, 2, 2, 0])
    losses = reference.cross_entropy_losses(logits, target)
    seen = losses if per == "element" else losses.mean(1)
    state = weighting.init()
    for _ in range(2):
        weights, expected = reference.sample_weights(seen, weighting, groups=groups, state=state)
        options = {"weighting": weighting, "per": per, "groups": groups, "state": state}
        value, after = reference.cross_entropy(logits, target, **options)
        gradient, other = reference.cross_entropy_grad(logits, target, **options)
        for got in (after, other):
            np.testing.assert_array_equal(got["shares"], expected["shares"])
        weights = np.broadcast_to(np.reshape(weights, (4, -1)), losses.shape)
        assert value == pytest.approx(np.mean(weights * losses), rel=16 * EPS)
        plain = reference.cross_entropy_grad(logits, target, weighting=ERM)
        np.testing.assert_allclose(gradient, weights[:, None] * plain, rtol=8 * EPS)
        mean, _ = reference.reweighted_mean(seen, weighting, groups=groups, state=state)
        assert mean == pytest.approx(np.mean(weights * losses), rel=16 * EPS)
        state = after


def test_a_weighting_that_remembers_is_refused_without_its_state():
    with pytest.raises(ValueError, match=r"needs its state: give state=weighting\.init\(\)"):
        reference.cross_entropy(np.zeros((2, 3)), [0, 1], weighting=MovingAverage(KL(), 0.9))


def test_a_target_out_of_range_is_named_with_its_position():
    with pytest.raises(IndexError, match=r"target 3 at \(1, 0\) is out of range for 3 classes"):
        reference.cross_entropy(np.zeros((2, 3, 2)), np.array([[0, 1], [3, 0]]))


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, "logits must have a class axis", (1.0, 0), {}),
        (ValueError, r"target must have shape \(2,\)", (np.zeros((2, 3)), np.zeros(3, int)), {}),
        (TypeError, "target must be integer", (np.zeros((2, 3)), np.zeros(2)), {}),
        (TypeError, "floating class probabilities", (np.zeros((2, 3)), np.zeros((2, 3), int)), {}),
        (
            ValueError,
            "ignore_index does not apply",
            (np.zeros((2, 3)), np.zeros((2, 3))),
            {"ignore_index": 0},
        ),
        (ValueError, "weight must have one entry a class", (np.zeros((2, 3)), [0, 1], np.ones(2)), {}),
        (ValueError, "label_smoothing must be in", (np.zeros((2, 3)), [0, 1]), {"label_smoothing": 1.5}),
        (ValueError, "reduction must be", (np.zeros((2, 3)), [0, 1]), {"reduction": "average"}),
        (ValueError, "per must be", (np.zeros((2, 3)), [0, 1]), {"per": "row"}),
        (
            ValueError,
            r"sample_weight must have shape \(2,\)",
            (np.zeros((2, 3, 4)), np.zeros((2, 4), int)),
            {"per": "sample", "sample_weight": np.ones((2, 4))},
        ),
        (
            ValueError,
            "sample_weight must hold finite numbers >= 0, got -1",
            (np.zeros((2, 3)), [0, 1]),
            {"sample_weight": [1.0, -1.0]},
        ),
    ],
)
def test_bad_input_to_the_cross_entropy_is_refused(error, message, arguments, options):
    with pytest.raises(error, match=message):
        reference.cross_entropy(*arguments, **options)


def test_no_input_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weighting in [*WEIGHTINGS, KL(math.inf, scale=9.0), ERM]:
            for losses in ([], [math.inf, 1e308, -1e308], [math.nan], [-math.inf, 0.0], [1e308, -1e308]):
                reference.sample_weights(losses, weighting)
                reference.reweighted_mean(losses, weighting)
                reference.weight_stats(losses, reference.sample_weights(losses, weighting), weighting)
