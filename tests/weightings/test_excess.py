"""`rgd.Excess` and `reference=`, in all fronts: weights by the loss less that of a reference model."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rgd
import rgd.jax
import rgd.reference as oracle
import rgd.torch
import torch
from family import EPS, label
from x64 import enable_x64

N, T, C, D = 6, 5, 7, 3
WEIGHTINGS = [
    rgd.Excess(rgd.CVaR(0.6)),
    rgd.Excess(rgd.KL(math.inf, scale=1.0)),
    rgd.Excess(rgd.KL(0.3)),
    rgd.Excess(rgd.KL(scale=-1.0, normalize=True)),
    rgd.Excess(rgd.Threshold(-0.1)),
    rgd.Trimmed(rgd.Excess(rgd.CVaR(0.5)), 0.2),
    rgd.Excess(rgd.Trimmed(rgd.KLBall(0.1), 0.2)),
]
weightings = pytest.mark.parametrize("weighting", WEIGHTINGS, ids=label)


@pytest.fixture(autouse=True)
def _double_precision():
    with enable_x64(True):
        yield


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def close(actual, expected, terms, scale=1.0):
    """Equal but for the roundings of sums of so many terms, and of the search for the root of a ball."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=(64 * terms * EPS + 1e-13) * scale)


@weightings
def test_every_front_weights_by_the_excess(weighting):
    losses, reference = np.abs(numbers(N, T)), np.abs(numbers(N, T, seed=1))
    expected = oracle.sample_weights(losses, weighting, reference=reference)
    assert np.ptp(expected) > 0.1
    in_torch = rgd.torch.sample_weights(
        torch.tensor(losses), weighting, reference=torch.tensor(reference, requires_grad=True)
    )
    assert not in_torch.requires_grad
    for weights in (
        rgd.sample_weights(losses, weighting, reference=reference),
        in_torch,
        rgd.jax.sample_weights(losses, weighting, reference=reference),
        jax.jit(lambda x, r: rgd.jax.sample_weights(x, weighting, reference=r))(losses, reference),
    ):
        close(weights, expected, N * T, expected.max())


@weightings
def test_the_excess_is_a_difference_of_losses(weighting):
    losses, reference = np.abs(numbers(N, T)), np.abs(numbers(N, T, seed=1))
    if isinstance(weighting, rgd.Excess):
        expected = oracle.sample_weights(losses - reference, weighting.weighting)
        assert np.array_equal(oracle.sample_weights(losses, weighting, reference=reference), expected)


@weightings
@pytest.mark.parametrize("per", ["element", "sample"])
def test_cross_entropy_of_every_front_is_that_of_the_oracle(weighting, per):
    logits, labels = numbers(N, T, C), np.random.default_rng(2).integers(0, C, (N, T))
    reference, p = np.abs(numbers(N, T, seed=3)), np.array([1.0, 2.0, 0.0, 1.0, 0.5, 3.0])
    labels[0, 1] = labels[3] = -100
    reference[0, 1] = reference[2, 2] = np.nan  # ignored, or of no measure
    given = {"weighting": weighting, "per": per}
    arrays = {"sample_weight": p, "reference": reference}
    by_class = np.moveaxis(logits, -1, 1)
    expected = oracle.cross_entropy(by_class, labels, **given, **arrays)
    gradient = np.moveaxis(oracle.cross_entropy_grad(by_class, labels, **given, **arrays), 1, -1)

    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    for backend in ("rust", "composite"):
        own = torch.tensor(by_class, requires_grad=True)
        with rgd.torch.backend(backend):
            objective = rgd.torch.cross_entropy(own, torch.tensor(labels), **given, **tensors)
            objective.backward()
        close(objective.detach(), expected, N * T, 10)
        close(own.grad.movedim(1, -1), gradient, N * T, 10)
    value = jax.jit(jax.value_and_grad(lambda z: rgd.jax.cross_entropy(z, labels, **given, **arrays)))
    objective, own = value(logits)
    close(objective, expected, N * T, 10)
    close(own, gradient, N * T, 10)


@weightings
@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("chunk_bytes", [None, 3 * C * 8])
def test_linear_heads_of_every_front_are_those_of_the_oracle(weighting, per, chunk_bytes):
    hidden, head = numbers(N, T, D), numbers(C, D, seed=4)
    labels = np.random.default_rng(2).integers(0, C, (N, T))
    labels[0, 1] = labels[3] = -100
    reference = np.abs(numbers(N, T - 1, seed=3))
    given = {"weighting": weighting, "per": per}
    logits = np.moveaxis((hidden @ head.T)[:, :-1], -1, 1)
    expected = oracle.cross_entropy(logits, labels[:, 1:], **given, reference=reference)
    by_logits = np.moveaxis(
        oracle.cross_entropy_grad(logits, labels[:, 1:], **given, reference=reference), 1, -1
    )
    of_head = np.einsum("ntc,ntd->cd", by_logits, hidden[:, :-1])

    given |= {"shift": True, "chunk_bytes": chunk_bytes}
    for backend in ("rust", "composite"):
        own = torch.tensor(head, requires_grad=True)
        with rgd.torch.backend(backend):
            objective = rgd.torch.linear_cross_entropy(
                torch.tensor(hidden), own, torch.tensor(labels), **given, reference=torch.tensor(reference)
            )
            objective.backward()
        close(objective.detach(), expected, N * T, 10)
        close(own.grad, of_head, N * T, 30)
    # "none" of JAX has a last entry, which stands for nothing.
    padded = np.pad(reference, ((0, 0), (0, 1)), constant_values=np.nan)

    def objective_of(kernel):
        return rgd.jax.linear_cross_entropy(hidden, kernel, labels, **given, reference=padded)

    objective, own = jax.jit(jax.value_and_grad(objective_of))(head.T)
    close(objective, expected, N * T, 10)
    close(own.T, of_head, N * T, 30)


@weightings
def test_sequences_that_share_a_row_are_compared_by_their_means(weighting):
    logits, labels = numbers(N, T, C), np.random.default_rng(2).integers(0, C, (N, T))
    labels[0, 1] = labels[3] = -100
    reference = 1 + np.abs(numbers(N, T, seed=3))
    segments = np.array([[0, 0, 1, 1, -1]] * N)
    given = {"weighting": weighting, "per": "sample"}
    arrays = {"segments": segments, "reference": reference}
    by_class = np.moveaxis(logits, -1, 1)
    expected = oracle.cross_entropy(by_class, labels, **given, **arrays)
    assert expected != oracle.cross_entropy(by_class, labels, **given, reference=reference)
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    inputs = torch.tensor(by_class, requires_grad=True), torch.tensor(labels)
    for backend in ("rust", "composite"):
        with rgd.torch.backend(backend):
            close(rgd.torch.cross_entropy(*inputs, **given, **tensors).detach(), expected, N * T, 10)
    close(rgd.jax.cross_entropy(logits, labels, **given, **arrays), expected, N * T, 10)
    head = torch.eye(C, dtype=torch.float64)
    hidden = torch.tensor(logits)
    objective = rgd.torch.linear_cross_entropy(hidden, head, inputs[1], **given, **tensors)
    close(objective, expected, N * T, 10)
    in_jax = rgd.jax.linear_cross_entropy(logits, np.eye(C), labels, **given, **arrays)
    close(in_jax, expected, N * T, 10)
    criterion = rgd.torch.RGDLoss(**given)
    criterion(*inputs, **tensors)
    stats = criterion.stats()
    assert stats.count == 2 * N - 2
    if weighting == rgd.Excess(rgd.KL(0.3)):
        losses = oracle.cross_entropy_losses(by_class, labels)
        excess = [
            np.mean((losses - reference)[row][kept])
            for row in range(N)
            for number in (0, 1)
            if np.any(kept := (segments[row] == number) & (labels[row] != -100))
        ]
        close(stats.clipped_share, np.mean(np.array(excess) > 0.3), N)


def test_rho_1_divides_by_the_tokens_that_it_selects():
    """Lin et al. 2024, section 2.2: the sum over the top k% by excess loss, divided by their number."""
    losses, reference = np.abs(numbers(20)), np.abs(numbers(20, seed=1))
    fraction = 0.6
    selected = np.argsort(reference - losses)[: round(20 * fraction)]
    paper = np.sum(losses[selected]) / (20 * fraction)
    weighting = rgd.Excess(rgd.CVaR(fraction))
    close(rgd.reweighted_mean(losses, weighting, reference=reference), paper, 20, 3)
    tensor = torch.tensor(losses, requires_grad=True)
    objective = rgd.torch.reweighted_mean(tensor, weighting, reference=torch.tensor(reference))
    objective.backward()
    close(objective.detach(), paper, 20, 3)
    expected = np.zeros(20)
    expected[selected] = 1 / (20 * fraction)
    close(tensor.grad, expected, 20)
    close(rgd.jax.reweighted_mean(losses, weighting, reference=reference), paper, 20, 3)


CALLS = {
    "NumPy weights": lambda m, r: rgd.sample_weights(np.ones(3), m, reference=r),
    "NumPy mean": lambda m, r: rgd.reweighted_mean(np.ones(3), m, reference=r),
    "NumPy statistics": lambda m, r: rgd.weight_stats(np.ones(3), np.ones(3), m, reference=r),
    "torch weights": lambda m, r: rgd.torch.sample_weights(torch.ones(3), m, reference=tensor(r)),
    "torch mean": lambda m, r: rgd.torch.reweighted_mean(torch.ones(3), m, reference=tensor(r)),
    "torch statistics": lambda m, r: rgd.torch.weight_stats(
        torch.ones(3), torch.ones(3), m, reference=tensor(r)
    ),
    "cross_entropy": lambda m, r: rgd.torch.cross_entropy(
        torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), weighting=m, reference=tensor(r)
    ),
    "RGDLoss": lambda m, r: rgd.torch.RGDLoss(weighting=m)(
        torch.zeros(3, 2, requires_grad=True), torch.zeros(3, dtype=torch.long), reference=tensor(r)
    ),
    "RGDLoss of a base": lambda m, r: rgd.torch.RGDLoss(weighting=m, base=lambda x: x)(
        torch.ones(3, requires_grad=True), reference=tensor(r)
    ),
    "LinearRGDLoss": lambda m, r: rgd.torch.LinearRGDLoss(2, 4, weighting=m)(
        torch.ones(3, 2), torch.zeros(3, dtype=torch.long), reference=tensor(r)
    ),
    "linear_cross_entropy": lambda m, r: rgd.torch.linear_cross_entropy(
        torch.ones(3, 2), torch.ones(4, 2), torch.zeros(3, dtype=torch.long), weighting=m, reference=tensor(r)
    ),
    "RGD": lambda m, r: rgd.torch.RGD(torch.optim.SGD([torch.ones(1)], lr=1.0), m).objective(
        torch.ones(3), reference=tensor(r)
    ),
    "JAX weights": lambda m, r: rgd.jax.sample_weights(jnp.ones(3), m, reference=r),
    "JAX mean": lambda m, r: rgd.jax.reweighted_mean(jnp.ones(3), m, reference=r),
    "JAX statistics": lambda m, r: rgd.jax.weight_stats(jnp.ones(3), jnp.ones(3), m, reference=r),
    "JAX cross_entropy": lambda m, r: rgd.jax.cross_entropy(
        jnp.zeros((3, 2)), jnp.zeros(3, int), weighting=m, reference=r
    ),
    "JAX linear": lambda m, r: rgd.jax.linear_cross_entropy(
        jnp.ones((3, 2)), jnp.ones((2, 4)), jnp.zeros(3, int), weighting=m, reference=r
    ),
    "JAX value_and_grad": lambda m, r: rgd.jax.value_and_grad(lambda x: x, weighting=m)(
        jnp.ones(3), reference=r
    ),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def tensor(reference):
    return torch.tensor(reference) if isinstance(reference, np.ndarray) else reference


@calls
def test_an_excess_without_a_reference_says_what_to_give(call):
    for weighting in (
        rgd.Excess(rgd.KL()),
        rgd.Excess(rgd.CVaR(0.5)),
        rgd.Trimmed(rgd.Excess(rgd.KL()), 0.1),
    ):
        with pytest.raises(ValueError, match="give reference= with the losses, of their shape"):
            call(weighting, None)


@calls
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.CVaR(0.5), rgd.Pointwise(abs)], ids=label)
def test_a_reference_that_no_excess_compares_with_is_refused(call, weighting):
    with pytest.raises(ValueError, match=re.escape(f"give weighting=rgd.Excess({weighting}), or leave")):
        call(weighting, np.ones(3))


@calls
def test_a_reference_that_does_not_fit_is_refused(call):
    weighting = rgd.Excess(rgd.KL())
    for wrong in (np.ones(4), np.ones((3, 1)), np.ones(())):
        with pytest.raises(ValueError, match="reference must have the shape of the losses, \\(3,\\), got"):
            call(weighting, wrong)
    for number in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"reference must hold finite losses .* got {number}"):
            call(weighting, np.array([1.0, number, 1.0]))
    with pytest.raises(TypeError, match="reference must"):
        call(weighting, np.ones(3, int))


def test_what_takes_no_part_may_have_any_reference():
    losses, reference = np.array([1.0, 2.0, 3.0]), np.array([0.5, np.nan, 1.0])
    where, weighting = np.array([True, False, True]), rgd.Excess(rgd.CVaR(0.5))
    expected = [0.0, 0.0, 2.0]
    assert rgd.sample_weights(losses, weighting, where=where, reference=reference).tolist() == expected
    tensors = [torch.tensor(one) for one in (losses, where, reference)]
    given = dict(zip(("where", "reference"), tensors[1:], strict=True))
    assert rgd.torch.sample_weights(tensors[0], weighting, **given).tolist() == expected
    in_jax = rgd.jax.sample_weights(losses, weighting, where=where, reference=reference)
    assert in_jax.tolist() == expected


def test_a_reference_that_cannot_be_read_and_is_not_finite_makes_the_weights_nan():
    weighting, losses = rgd.Excess(rgd.KL(math.inf, scale=1.0)), np.array([1.0, 2.0])

    def weigh(reference):
        return rgd.jax.sample_weights(losses, weighting, reference=reference)

    assert np.isnan(jax.jit(weigh)(np.array([1.0, np.inf]))).tolist() == [False, True]

    def compiled(losses, reference):
        return rgd.torch.sample_weights(losses, weighting, reference=reference)

    in_graph = torch.compile(compiled, backend="eager", fullgraph=True)
    weights = in_graph(torch.tensor(losses), torch.tensor([1.0, -math.inf], dtype=torch.float64))
    assert weights.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    "inner", [rgd.Focal(2.0), rgd.Trimmed(rgd.Focal(1.0), 0.1), rgd.MovingAverage(rgd.Focal(1.0), 0.9)]
)
def test_focal_weights_of_an_excess_are_refused(inner):
    with pytest.raises(ValueError, match="focal weights are powers of probabilities, and an excess may"):
        rgd.Excess(inner)


@pytest.mark.parametrize("inner", [rgd.Excess(rgd.KL()), rgd.Trimmed(rgd.Excess(rgd.KL()), 0.1)], ids=label)
def test_an_excess_of_an_excess_is_refused(inner):
    with pytest.raises(ValueError, match="its losses are less those of the reference already"):
        rgd.Excess(inner)


def test_the_clip_is_that_of_the_excess():
    losses, reference = np.abs(numbers(20)), np.abs(numbers(20, seed=1))
    p = np.random.default_rng(2).uniform(size=20)
    weighting = rgd.Excess(rgd.KL(0.2))
    weights = rgd.sample_weights(losses, weighting, reference=reference)
    expected = np.sum(p * (losses - reference > 0.2)) / np.sum(p)
    assert 0.1 < expected < 0.9
    assert expected != np.sum(p * (losses > 0.2)) / np.sum(p)
    arrays = {"sample_weight": p, "reference": reference}
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    stats = [
        oracle.weight_stats(losses, weights, weighting, **arrays),
        rgd.weight_stats(losses, weights, weighting, **arrays),
        rgd.torch.weight_stats(torch.tensor(losses), torch.tensor(weights), weighting, **tensors),
        rgd.jax.weight_stats(losses, weights, weighting, **arrays),
    ]
    for one in stats:
        close(one.clipped_share, expected, 20)
        close(one.mean_loss, np.sum(p * losses) / np.sum(p), 20, 3)


@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("base", [None, torch.nn.CrossEntropyLoss(reduction="none")])
def test_the_statistics_of_a_loss_clip_the_excess(per, base):
    logits = torch.tensor(numbers(N, C, T), requires_grad=True)
    target = torch.tensor(np.random.default_rng(2).integers(0, C, (N, T)))
    reference = torch.tensor(np.abs(numbers(N, T, seed=3))) + 1
    criterion = rgd.torch.RGDLoss(weighting=rgd.Excess(rgd.KL(0.3)), per=per, base=base)
    criterion.reset_stats()
    criterion(logits, target, reference=reference)
    losses = torch.nn.functional.cross_entropy(logits, target, reduction="none").detach()
    excess = losses - reference
    excess = excess if per == "element" else excess.mean(1)
    expected = float((excess > 0.3).double().mean())
    assert 0.1 < expected < 0.9
    reference.zero_()  # the record has kept its own
    close(criterion.stats().clipped_share, expected, N * T)
    close(criterion.stats(total=True).clipped_share, expected, N * T)


def test_an_evaluation_needs_no_reference_and_leaves_it_alone():
    criterion = rgd.torch.RGDLoss(weighting=rgd.Excess(rgd.KL()))
    linear = rgd.torch.LinearRGDLoss(2, 4, weighting=rgd.Excess(rgd.KL()))
    logits, hidden, target = torch.randn(3, 4), torch.randn(3, 2), torch.tensor([0, 1, 3])
    with torch.no_grad():
        for given in ({}, {"reference": torch.ones(3)}):
            plain = torch.nn.functional.cross_entropy(logits, target)
            assert criterion(logits, target, **given) == pytest.approx(float(plain), rel=1e-6)
            plain = torch.nn.functional.cross_entropy(linear.linear(hidden), target)
            assert linear(hidden, target, **given) == pytest.approx(float(plain), rel=1e-6)


def test_a_call_with_a_reference_does_not_go_the_short_way_of_the_last_one():
    criterion = rgd.torch.RGDLoss()
    logits, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 3])
    for _ in range(2):
        criterion(logits, target)
    with pytest.raises(ValueError, match="reference holds the losses that"):
        criterion(logits, target, reference=torch.ones(3))
