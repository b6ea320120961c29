"""Groups in the torch front, in `GroupDRO` and in the statistics, for every member of the family."""

import dataclasses

import numpy as np
import pytest
import rgd
import torch
import torch.nn.functional as F
from family import members
from rgd import KL, CVaR, GroupDRO, reference
from rgd.torch import RGD, RGDLoss, backend, reweighted_mean, sample_weights, weight_stats
from torch_family import (
    GROUPS,
    N,
    T,
    arrays,
    assert_same_stats,
    both_backends,
    calls,
    every_member,
    extras,
    first,
    problem,
)

# --- groups ---


@both_backends
def test_group_dro_gains_weight_for_the_group_of_large_loss(name):
    losses = torch.tensor([0.1, 0.2, 3.0, 2.0, 0.3], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 0])
    weighting = GroupDRO(3, 0.5)  # group 2 is absent
    q = torch.tensor([1 / 3] * 3, dtype=torch.float64)
    criterion = RGDLoss(weighting=weighting, base=lambda x: x)
    parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = RGD(torch.optim.SGD([parameter], lr=0.1), weighting)
    state = weighting.init()
    for _ in range(3):
        q = q * torch.exp(0.5 * torch.tensor([0.2, 2.5, 0.0], dtype=torch.float64))
        q /= q.sum()
        expected = q[0] * 0.2 + q[1] * 2.5
        with backend(name):
            objective = criterion(losses, groups=groups)
            mean, state = reweighted_mean(losses, weighting, groups=groups, state=state)
            descended = optimizer.objective(losses * parameter, groups=groups)
        for value in (objective, mean, descended.detach()):
            torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(state["shares"], q, rtol=1e-14, atol=0)
    torch.testing.assert_close(criterion.weighting_state.shares, q, rtol=1e-14, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["weighting_state"]["shares"], q, rtol=1e-14, atol=0)


@both_backends
def test_groups_of_samples_serve_all_their_targets(name):
    logits, target, _, _ = problem("indices")
    by_sample = torch.arange(N) % GROUPS
    weighting = GroupDRO(GROUPS, 0.5)
    with backend(name):
        for dtype in (torch.int64, torch.int32, torch.uint8):
            one = RGDLoss(weighting=weighting)(logits, target, groups=by_sample.to(dtype))
            each = RGDLoss(weighting=weighting)(logits, target, groups=by_sample[:, None].expand(N, T))
            assert torch.equal(one, each)


@calls
@both_backends
def test_groups_that_are_missing_or_out_of_range_are_refused(call, name):
    weighting = GroupDRO(2, 0.1)
    with backend(name):
        with pytest.raises(ValueError, match=r"GroupDRO needs the group of each sample: give groups="):
            call(weighting)
        for wrong, said in ([0, 1, 2, 0], "0 to 2"), ([0, 1, -1, 0], "-1 to 1"):
            with pytest.raises(
                ValueError, match=rf"groups must lie in 0\.\.1 for GroupDRO\(groups=2\), got {said}"
            ):
                call(weighting, groups=torch.tensor(wrong))


@calls
def test_groups_of_the_wrong_kind_are_refused(call):
    weighting = GroupDRO(2, 0.1)
    for wrong, error, said in [
        ([0, 1, 0, 1], TypeError, r"groups must be a torch\.Tensor of integers, got list"),
        (torch.zeros(4), TypeError, r"groups must be a torch\.Tensor of integers, got torch\.float32"),
        (torch.zeros(4, dtype=torch.bool), TypeError, r"of integers, got torch\.bool"),
        (
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            r"groups must have the shape of the losses, \(4,\), .* got \(3,\)",
        ),
        (
            torch.zeros(4, dtype=torch.int64, device="meta"),
            ValueError,
            r"losses are on cpu and groups on meta: move",
        ),
    ]:
        with pytest.raises(error, match=said):
            call(weighting, groups=wrong)


def test_a_group_out_of_range_makes_its_weight_nan_where_values_cannot_be_read():
    weighting = GroupDRO(2, 0.1)
    losses, groups = torch.ones(1, 3), torch.tensor([[0, 1, 2]])
    state = {"shares": torch.full((1, 2), 0.5)}
    weights, _ = torch.vmap(lambda x, g, s: sample_weights(x, weighting, groups=g, state=s))(
        losses, groups, state
    )
    assert weights.isnan().tolist() == [[False, False, True]]


# --- statistics ---


@every_member
def test_statistics_are_those_of_numpy(weighting):
    losses = torch.tensor(np.random.default_rng(7).gamma(1.0, 1.5, (N, T)))
    weights = first(sample_weights(losses, weighting, **extras(weighting, "element")), weighting)
    where = torch.arange(N * T).view(N, T) % 4 != 0
    for options in (
        {},
        {"where": where},
        {"sample_weight": torch.arange(N) / 4},
        {"where": where, "sample_weight": torch.rand(N, T).double(), "groups": torch.arange(N) % 4 * 2},
    ):
        stats = weight_stats(losses, weights, weighting, **options)
        expected = rgd.weight_stats(losses.numpy(), weights.numpy(), weighting, **arrays(options))
        assert_same_stats(stats, expected, N * T)


@both_backends
@pytest.mark.parametrize("per", ["element", "sample"])
@members([KL(1.0), KL(1.0, normalize=True), CVaR(0.3), GroupDRO(GROUPS, 0.5)])
def test_the_loss_describes_its_groups_and_base_measure(weighting, per, name):
    logits, target, _, _ = problem("indices")
    p = torch.linspace(0.0, 2.0, N, dtype=torch.float64)
    groups = torch.arange(N) % GROUPS
    criterion = RGDLoss(weighting=weighting, per=per)
    with backend(name):
        criterion(logits, target, sample_weight=p, groups=groups)
    losses = F.cross_entropy(logits, target, reduction="none")
    kept = target != -100
    if per == "sample":
        losses, kept, base, members_of = losses.sum(1) / kept.sum(1).clamp(min=1), kept.any(1), p, groups
    else:
        base, members_of = p[:, None].expand(N, T), groups[:, None].expand(N, T)
    given = {"sample_weight": base.numpy(), "groups": members_of.numpy()}
    where = kept.numpy()
    state = {"state": weighting.init()} if weighting.stateful else {}
    weights = first(reference.sample_weights(losses.numpy(), weighting, where, **given, **state), weighting)
    expected = reference.weight_stats(losses.numpy(), weights, weighting, where=where, **given)
    stats = criterion.stats()
    if per == "sample":
        # The objective is over targets, all of a sample's with its weight.
        of_targets = F.cross_entropy(logits, target, reduction="none").sum(1).numpy()
        mass = float((p[:, None] * (target != -100)).sum())
        plain, weighted = (
            float(np.sum(p.numpy() * of_targets)),
            float(np.sum(p.numpy() * weights * of_targets)),
        )
        expected = dataclasses.replace(expected, mean_loss=plain / mass, objective=weighted / mass)
    assert_same_stats(stats, expected, N * T)
    assert stats == criterion.stats(groups=groups)
    other = criterion.stats(groups=torch.zeros(N, dtype=torch.int64))
    assert other.groups.count == (stats.count,)
    assert other.groups.weight_share == pytest.approx((1.0,))


def test_groups_of_statistics_are_checked():
    criterion = RGDLoss()
    criterion(torch.zeros(4, 3), torch.arange(4) % 3)
    assert criterion.stats().groups is None
    with pytest.raises(ValueError, match=r"groups must be integers >= 0, got -1"):
        criterion.stats(groups=torch.tensor([0, -1, 0, 0]))
    with pytest.raises(ValueError, match=r"groups must have the shape of the losses, \(4,\)"):
        criterion.stats(groups=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"groups must be a torch\.Tensor of integers"):
        criterion.stats(groups=[0, 1, 0, 1])
