"""The tail in the statistics, statistics over many calls, and the warning that weights cannot matter."""

import copy
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rgd
import rgd.jax
import torch
from rgd import reference
from rgd.torch import RGD, RGDLoss, backend, weight_stats
from torch.nn import functional as F
from x64 import enable_x64

EPS = np.finfo(np.float64).eps


def batch(count=60, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (count,), generator=generator)


# --- the worst tenth ---


@pytest.mark.parametrize("base", [None, "ones and zeros", "numbers"])
@pytest.mark.parametrize("count", [1, 7, 10, 64, 1000])
def test_every_front_gives_the_mean_loss_of_the_worst_tenth_of_the_mass(base, count):
    rng = np.random.default_rng(count)
    losses, weights = rng.exponential(size=count).round(1), rng.uniform(0, 2, count)  # with ties
    p = {None: None, "ones and zeros": (rng.random(count) > 0.4) * 1.0, "numbers": 3 * rng.random(count)}[
        base
    ]
    if p is not None:
        p[0] = 1.0
    expected = reference.weight_stats(losses, weights, sample_weight=p).worst_tenth
    # The tail is at most a tenth of n terms, taken from n partial sums of the mass.
    close = {"rel": 20 * (count + 8) * EPS}
    assert rgd.weight_stats(losses, weights, sample_weight=p).worst_tenth == pytest.approx(expected, **close)
    tensors = [None if one is None else torch.from_numpy(one) for one in (losses, weights, p)]
    of_torch = weight_stats(tensors[0], tensors[1], sample_weight=tensors[2])
    assert of_torch.worst_tenth == pytest.approx(expected, **close)
    with enable_x64(True):
        of_jax = jax.jit(rgd.jax.weight_stats)(losses, weights, sample_weight=p).worst_tenth
    assert float(of_jax) == pytest.approx(expected, **close)


def test_the_worst_tenth_of_known_losses():
    assert rgd.weight_stats(np.arange(20.0), np.ones(20)).worst_tenth == 18.5
    # A mass of 1.5: 9 once, and half of 8.
    assert rgd.weight_stats(np.arange(10.0), np.ones(10), sample_weight=np.full(10, 1.5)).worst_tenth == 9.0
    assert rgd.weight_stats(np.arange(15.0), np.ones(15)).worst_tenth == pytest.approx((14 + 6.5) / 1.5)


def test_the_worst_tenth_of_infinite_losses_is_infinite_and_of_nan_or_nothing_nan():
    for losses, expected in (([1.0, math.inf], math.inf), ([1.0, math.nan], math.nan), ([], math.nan)):
        for p in (None, np.linspace(1, 2, len(losses))):
            array = np.array(losses)
            given = {"sample_weight": p}
            for stats in (
                rgd.weight_stats(array, np.ones(len(losses)), **given),
                reference.weight_stats(array, np.ones(len(losses)), **given),
                rgd.jax.weight_stats(jnp.array(array), jnp.ones(len(losses)), **given),
            ):
                np.testing.assert_equal(float(stats.worst_tenth), expected)
    masked = rgd.weight_stats(np.array([1.0, math.nan]), np.ones(2), where=np.array([True, False]))
    assert masked.worst_tenth == 1.0


def test_the_tail_of_operations_on_other_devices_is_that_of_the_cpu(monkeypatch):
    from rgd.torch import stats  # noqa: PLC0415

    losses, base = torch.rand(101, dtype=torch.float64), torch.rand(101, dtype=torch.float64)
    base[::3] = 0

    class Elsewhere(torch.Tensor):
        """Takes the path of tensors that NumPy cannot read."""

    for mass in (None, base):
        expected = stats.tail_of(losses, mass)
        got = stats.tail_of(losses.as_subclass(Elsewhere), mass)
        assert got == pytest.approx(expected, rel=101 * 20 * EPS)
    assert math.isnan(stats.tail_of(torch.tensor([1.0, math.nan]).as_subclass(Elsewhere), None))


@pytest.mark.parametrize("per", ["element", "sample"])
def test_with_class_weights_the_worst_tenth_is_divided_as_the_mean_loss(per):
    logits, target = torch.zeros(20, 3, 4, dtype=torch.float64), torch.arange(80).reshape(20, 4) % 3
    criterion = RGDLoss(torch.full((3,), 7.0, dtype=torch.float64), per=per)
    criterion(logits, target)
    stats = criterion.stats()
    assert stats.mean_loss == pytest.approx(math.log(3))
    assert stats.worst_tenth == pytest.approx(math.log(3))


def test_the_tail_is_in_the_dict():
    criterion = RGDLoss()
    logits, target = batch()
    criterion(logits, target)
    losses = F.cross_entropy(logits, target, reduction="none")
    tail = losses.sort(descending=True).values[:6].mean().item()
    assert criterion.stats().to_dict("rgd/")["rgd/worst_tenth"] == pytest.approx(tail, rel=60 * EPS)


# --- statistics over many calls ---

SIZES = [10, 1, 30, 19]


def split(*tensors):
    return zip(*(tensor.split(SIZES) for tensor in tensors), strict=True)


def same(stats, expected):
    """The same but for the order of the sums, and without what is not in sums."""
    assert stats.worst_tenth is None
    assert stats.count == expected.count
    names = set(expected.keys()) - {"worst_tenth", "count", "groups"}
    for name in names:
        assert getattr(stats, name) == pytest.approx(getattr(expected, name), rel=60 * 8 * EPS, abs=60 * EPS)


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("options", [{}, {"per": "sample"}, {"weight": torch.linspace(0.5, 2, 5).double()}])
def test_the_total_of_many_calls_is_that_of_one_over_all_of_them(name, options):
    logits, target = batch()
    logits, target = (
        logits[..., None].expand(-1, -1, 3) * torch.linspace(0.5, 2, 3),
        target[:, None].repeat(1, 3),
    )
    target[5:9] = -100
    p = torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    criterion, whole = RGDLoss(**options), RGDLoss(**options)
    with backend(name):
        whole(logits, target, sample_weight=p)
        criterion(logits, target)  # before the reset: counts for nothing
        for _ in range(2):
            criterion.reset_stats()
            for rows, labels, mass in split(logits, target, p):
                criterion(rows, labels, sample_weight=mass)
            same(criterion.stats(total=True), whole.stats())
    criterion.eval()(logits.clone().requires_grad_(), target)
    assert criterion.stats(total=True).count == whole.stats().count


def test_a_total_is_gathered_in_a_compiled_graph_without_compiling_again():
    logits, target = batch()
    criterion, whole = RGDLoss(), RGDLoss()
    whole(logits, target)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    criterion.reset_stats()
    with torch._dynamo.config.patch(error_on_recompile=False):
        compiled(logits[:20], target[:20])
        compiled(logits[20:40], target[20:40])
    with torch._dynamo.config.patch(error_on_recompile=True):
        criterion.reset_stats()
        for start in (0, 20, 40):
            compiled(logits[start : start + 20], target[start : start + 20])
    same(criterion.stats(total=True), whole.stats())


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("compiles", [True, False])
def test_the_largest_weight_of_a_total_is_that_of_any_call(compiles, order):
    logits, target = batch()
    calls = [(logits[:20], target[:20]), (0.01 * logits[20:40], target[20:40])][::order]
    criterion = RGDLoss(weighting=rgd.KL(4.0))
    criterion.reset_stats()
    torch._dynamo.reset()
    call = torch.compile(criterion, fullgraph=True, backend="eager") if compiles else criterion
    largest = []
    # The sums are a tensor in a graph, and of torch operations with a base measure; else they are numbers.
    with backend(None if compiles else "composite"):
        for rows, labels in calls:
            call(rows, labels, sample_weight=torch.ones(20))
            largest.append(float(criterion.last_weights.max()))
    assert abs(largest[0] - largest[1]) > 0.5
    assert criterion.stats(total=True).max_weight == pytest.approx(max(largest), rel=EPS)


def test_a_total_is_asked_for_before_it_is_gathered():
    criterion = RGDLoss()
    criterion(*batch())
    with pytest.raises(RuntimeError, match=r"since reset_stats\(\)"):
        criterion.stats(total=True)
    criterion.reset_stats()
    empty = criterion.stats(total=True)
    assert (empty.count, math.isnan(empty.mean_loss), math.isnan(empty.max_weight)) == (0, True, True)
    assert "worst" not in str(empty)
    assert "worst_tenth" not in empty.to_dict()
    with pytest.raises(ValueError, match="without total"):
        criterion.stats(total=True, groups=torch.zeros(60, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"since reset_stats\(\)"):
        copy.deepcopy(criterion).stats(total=True)


# --- the warning ---


def test_a_loss_warns_once_where_reweighting_cannot_matter():
    fresh = torch.zeros(8, 32000, requires_grad=True), torch.arange(8)
    criterion = RGDLoss(warn=True)
    with pytest.warns(UserWarning, match=r"call 1: All weights are equal: all losses are above the clip"):
        criterion(*fresh).backward()
    criterion(*fresh)
    RGDLoss()(*fresh)


def test_a_loss_looks_at_the_first_call_and_whenever_their_number_has_doubled():
    logits, target = batch()
    fitted = 50 * F.one_hot(target, 5).double()
    criterion = RGDLoss(warn=True)
    for _ in range(4):
        criterion(logits, target)
    for _ in range(3):
        criterion(fitted, target)
    with pytest.warns(UserWarning, match="call 8: All weights are equal: the losses are near zero"):
        criterion(fitted, target)
    criterion.eval()(fitted, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RGDLoss(warn=True)(logits, target)


def test_an_optimizer_warns_in_the_same_way():
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = RGD(torch.optim.SGD([parameter], lr=0.1), warn=True)
    with pytest.warns(UserWarning, match=r"call 1: All weights are equal: all losses are above the clip"):
        optimizer.backward(torch.full((4,), 9.0) + parameter)
    optimizer.backward(torch.full((4,), 9.0) + parameter)
    optimizer = copy.deepcopy(RGD(torch.optim.SGD([parameter], lr=0.1), warn=True))
    parameter = optimizer.param_groups[0]["params"][0]
    with pytest.warns(UserWarning, match="call 1"):
        optimizer.backward(torch.full((4,), 9.0) + parameter)


def test_totals_tell_of_each_group_over_all_calls():
    criterion = RGDLoss(weighting=rgd.KL(scale=-0.7))
    criterion.reset_stats()
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(n, 3, generator=generator), torch.arange(n) % 3, torch.arange(n) % k, torch.rand(n))
        for n, k in ((7, 2), (5, 4))
    ]
    for logits, target, groups, p in batches:
        criterion(logits, target, groups=groups, sample_weight=p)
    whole = RGDLoss(weighting=rgd.KL(scale=-0.7))
    logits, target, groups, p = (torch.cat(parts) for parts in zip(*batches, strict=True))
    whole(logits, target, groups=groups, sample_weight=p)
    found, expected = criterion.stats(total=True).groups, whole.stats().groups
    assert found.count == expected.count
    assert found.mean_loss == pytest.approx(expected.mean_loss, rel=1e-6)
    assert found.weight_share == pytest.approx(expected.weight_share, rel=1e-6)
    criterion.reset_stats()
    criterion(logits, target)
    assert criterion.stats(total=True).groups is None
    criterion(logits, target, groups=groups + 10**12)
    assert criterion.stats(total=True).groups.numbers == tuple(range(10**12, 10**12 + 4))
