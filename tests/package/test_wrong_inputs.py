"""Wrong inputs of tired users, in every front: one reading of the message tells what to do."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rgd
import rgd.boosting
import rgd.jax
import rgd.optax
import torch
from rgd import plot
from rgd.torch import (
    RGD,
    LinearRGDLoss,
    RGDLoss,
    WeightingSchedule,
    cross_entropy,
    linear_cross_entropy,
    reweighted_mean,
    sample_weights,
)
from torch import nn

LOGITS = torch.zeros(4, 3, requires_grad=True)
TARGET = torch.arange(4) % 3
LOSSES = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
HIDDEN, HEAD = torch.zeros(4, 2), torch.zeros(3, 2)
ARRAY = np.array([0.5, 1.0, 2.0])
JAX_LOGITS, JAX_LABELS = jnp.zeros((4, 3)), jnp.arange(4) % 3
PARAMETER = torch.zeros(2, requires_grad=True)
SGD = torch.optim.SGD([PARAMETER], lr=0.1)


def optax_update(outside=False, **given):
    tx = rgd.optax.rgd(optax.sgd(0.1), tau=1.0)
    tx = optax.apply_if_finite(tx, 3) if outside else tx
    params = jnp.zeros(2)
    return tx.update(jnp.ones((3, 2)), tx.init(params), params, **given)


# What was given, the call, the kind of error, and what the message must name.
WRONG = [
    # Losses that are no losses of samples.
    ("a mean for losses, torch", lambda: reweighted_mean(LOSSES.mean()), ValueError, 'reduction="none"'),
    ("a mean for losses, numpy", lambda: rgd.sample_weights(ARRAY.mean()), ValueError, "reduc"),
    (
        "a mean for losses, jax",
        lambda: rgd.jax.sample_weights(jnp.asarray(ARRAY).mean()),
        ValueError,
        r"jnp\.mean",
    ),
    ("a mean for losses, RGD", lambda: RGD(SGD).backward(PARAMETER.mean()), ValueError, 'reduction="none"'),
    ("a mean for losses, optax", lambda: optax_update(losses=jnp.float32(1.0)), ValueError, r"\(batch,\)"),
    ("a base that averages", lambda: RGDLoss(base=nn.MSELoss()), ValueError, 'reduction="none"'),
    ("a base that is a class", lambda: RGDLoss(base=nn.MSELoss), TypeError, r'MSELoss\(reduction="none"\)'),
    ("a base that is an RGDLoss", lambda: RGDLoss(base=RGDLoss()), ValueError, "the inner RGDLoss alone"),
    ("losses as integers", lambda: sample_weights(torch.arange(3)), TypeError, r"\.float\(\)"),
    ("losses as a list, torch", lambda: sample_weights([0.5, 1.0]), TypeError, r"torch\.as_tensor\(losses\)"),
    ("losses as an array, torch", lambda: sample_weights(ARRAY), TypeError, r"torch\.as_tensor\(losses\)"),
    ("losses without a graph", lambda: RGD(SGD).backward(torch.ones(3)), RuntimeError, "detach"),
    # Logits and targets.
    ("swapped", lambda: RGDLoss()(TARGET, LOGITS), TypeError, r"swapped.*loss\(logits, target\)"),
    ("swapped, function", lambda: cross_entropy(TARGET, LOGITS), TypeError, "swapped"),
    (
        "logits as an array",
        lambda: RGDLoss()(np.zeros((4, 3)), TARGET),
        TypeError,
        r"torch\.as_tensor\(input\)",
    ),
    (
        "logits as a list",
        lambda: cross_entropy([[0.0, 1.0]], TARGET[:1]),
        TypeError,
        r"torch\.as_tensor\(input\)",
    ),
    ("target as a list", lambda: RGDLoss()(LOGITS, [0, 1, 2, 0]), TypeError, r"torch\.as_tensor\(target\)"),
    ("target as an array", lambda: RGDLoss()(LOGITS, np.arange(4)), TypeError, r"torch\.as_tensor\(target\)"),
    ("no target", lambda: RGDLoss()(LOGITS), TypeError, "no target"),
    ("target as floats", lambda: RGDLoss()(LOGITS, TARGET.float()), ValueError, "must be integers"),
    ("one-hot integers", lambda: RGDLoss()(LOGITS, torch.eye(3).long()[TARGET]), ValueError, "argmax"),
    ("binary logits", lambda: RGDLoss()(LOGITS[:, 0], TARGET % 2), ValueError, "BCEWithLogitsLoss"),
    (
        "classes last",
        lambda: RGDLoss()(torch.zeros(2, 5, 3), torch.zeros(2, 5).long()),
        ValueError,
        "transpose",
    ),
    ("too few targets", lambda: RGDLoss()(LOGITS, TARGET[:3]), ValueError, r"must have shape \(4,\)"),
    (
        "a label too large, torch",
        lambda: RGDLoss()(LOGITS, TARGET + 2),
        IndexError,
        "3.*0 to 2.*ignore_index",
    ),
    (
        "a label too large, linear",
        lambda: linear_cross_entropy(HIDDEN, HEAD, TARGET + 2),
        IndexError,
        "3.*0 to 2.*ignore_index",
    ),
    (
        "a label too large, jax",
        lambda: rgd.jax.cross_entropy(JAX_LOGITS, JAX_LABELS + 2),
        IndexError,
        "3.*0 to 2.*ignore_index",
    ),
    (
        "a label too large, jax, linear",
        lambda: rgd.jax.linear_cross_entropy(jnp.zeros((4, 2)), jnp.zeros((2, 3)), JAX_LABELS + 2),
        IndexError,
        "3.*0 to 2.*ignore_index",
    ),
    # Settings of the weighting.
    ("a negative tau, KL", lambda: rgd.KL(-0.7), ValueError, r"rgd\.KL\(scale=-0\.7\)"),
    ("a negative tau, RGDLoss", lambda: RGDLoss(tau=-0.7), ValueError, r"rgd\.KL\(scale=-0\.7\)"),
    ("a negative tau, RGD", lambda: RGD(SGD, tau=-0.7), ValueError, r"rgd\.KL\(scale=-0\.7\)"),
    (
        "a negative tau, jax",
        lambda: rgd.jax.sample_weights(jnp.ones(2), tau=-0.7),
        ValueError,
        "KL.scale=-0.7",
    ),
    ("an infinite tau alone", lambda: rgd.KL(math.inf), ValueError, "scale"),
    ("both tau and weighting", lambda: RGDLoss(tau=1.0, weighting=rgd.KL()), ValueError, "not both"),
    ("a weighting that is a class", lambda: RGDLoss(weighting=rgd.ERM), TypeError, r"ERM\(\.\.\.\)"),
    ("a number as weighting", lambda: RGD(SGD, 1.0), TypeError, "tau=1.0"),
    ("a weighting as weight", lambda: RGDLoss(rgd.KL()), TypeError, "weighting="),
    ("a number as weight", lambda: RGDLoss(1.0), TypeError, "tau=1.0"),
    ("alpha in percent", lambda: rgd.CVaR(10), ValueError, "alpha"),
    ("a radius below 0", lambda: rgd.KLBall(-1.0), ValueError, "radius"),
    (
        "groups that were not given",
        lambda: RGDLoss(weighting=rgd.GroupDRO(2, 0.1))(LOGITS, TARGET),
        ValueError,
        "groups=",
    ),
    (
        "a state that was not given",
        lambda: cross_entropy(LOGITS, TARGET, weighting=rgd.MovingAverage(rgd.KL(), 0.9)),
        ValueError,
        r"weighting\.init\(\)",
    ),
    (
        "a schedule of no weighting",
        lambda: WeightingSchedule(nn.ReLU(), lambda step: rgd.KL()),
        TypeError,
        "RGDLoss",
    ),
    # Masks, sample weights, groups, class weights.
    ("a mask of integers", lambda: RGDLoss()(LOGITS, TARGET, where=TARGET), TypeError, "where=mask > 0"),
    ("a mask of another shape", lambda: RGDLoss()(LOGITS, TARGET, where=TARGET[:2] > 0), ValueError, "shape"),
    ("negative sample weights", lambda: RGDLoss()(LOGITS, TARGET, sample_weight=-TARGET), ValueError, ">= 0"),
    (
        "sample weights as a list",
        lambda: RGDLoss()(LOGITS, TARGET, sample_weight=[1.0] * 4),
        TypeError,
        r"torch\.as_tensor\(sample_weight\)",
    ),
    (
        "groups as a list",
        lambda: RGDLoss()(LOGITS, TARGET, groups=[0, 1, 0, 1]),
        TypeError,
        r"torch\.as_tensor\(groups\)",
    ),
    (
        "groups as floats",
        lambda: RGDLoss()(LOGITS, TARGET, groups=TARGET.float()),
        TypeError,
        r"groups\.long\(\)",
    ),
    ("class weights as a list", lambda: RGDLoss([1.0, 1.0, 2.0]), TypeError, r"torch\.as_tensor\(weight\)"),
    ("too few class weights", lambda: RGDLoss(torch.ones(2))(LOGITS, TARGET), ValueError, "3 classes, got 2"),
    ("class weights of integers", lambda: RGDLoss(torch.ones(3).long()), TypeError, r"\.float\(\)"),
    # Optimizers.
    (
        "parameters for an optimizer",
        lambda: RGD([PARAMETER], lr=0.1),
        TypeError,
        r"RGD\(torch\.optim\.AdamW\(",
    ),
    (
        "a generator of parameters",
        lambda: RGD(nn.Linear(1, 1).parameters(), lr=0.1),
        TypeError,
        r"torch\.optim\.AdamW",
    ),
    ("an optimizer's class", lambda: RGD(torch.optim.SGD), TypeError, r"RGD\(torch\.optim\.SGD\(model"),
    ("an optimizer wrapped twice", lambda: RGD(RGD(SGD)), ValueError, "wrapped in RGD already"),
    ("an optax optimizer that was not called", lambda: rgd.optax.rgd(optax.adam), TypeError, "adam"),
    ("no losses for optax", optax_update, ValueError, "losses=losses"),
    (
        "apply_if_finite around rgd",
        lambda: optax_update(losses=jnp.ones(3), outside=True),
        TypeError,
        r"rgd\.optax\.rgd\(optax\.apply_if_finite\(inner, n\)\)",
    ),
    # Tensors of another library.
    ("a tensor for jax", lambda: rgd.jax.sample_weights(torch.ones(3)), TypeError, r"rgd\.torch"),
    (
        "a tensor for jax's loss",
        lambda: rgd.jax.cross_entropy(LOGITS.detach(), TARGET),
        TypeError,
        r"rgd\.torch",
    ),
    ("a jax array for torch", lambda: sample_weights(jnp.ones(3)), TypeError, r"torch\.as_tensor\(losses\)"),
    (
        "a weighting in the place of the bias",
        lambda: rgd.jax.linear_cross_entropy(jnp.zeros((4, 2)), jnp.zeros((2, 3)), JAX_LABELS, rgd.ERM()),
        TypeError,
        "weighting=",
    ),
    ("a list for numpy", lambda: rgd.sample_weights([0.5, 1.0]), TypeError, r"np\.(as)?array"),
    # The linear head.
    (
        "a module for its weight",
        lambda: linear_cross_entropy(HIDDEN, nn.Linear(2, 3), TARGET),
        TypeError,
        r"head\.weight",
    ),
    (
        "a transposed head",
        lambda: linear_cross_entropy(HIDDEN, HEAD.t(), TARGET),
        ValueError,
        r"linear_weight\.t\(\)",
    ),
    (
        "one sample without its axis",
        lambda: linear_cross_entropy(HIDDEN[0], HEAD, TARGET[0]),
        ValueError,
        "unsqueeze",
    ),
    ("a head without its size", LinearRGDLoss, TypeError, r"LinearRGDLoss\.tie\(lm_head\)"),
    (
        "a parameter to tie",
        lambda: LinearRGDLoss.tie(nn.Parameter(HEAD)),
        TypeError,
        "linear_weight=parameter",
    ),
    # Others.
    (
        "a loss as compute_loss_func",
        lambda: RGDLoss()(LOGITS, TARGET, num_items_in_batch=4),
        TypeError,
        "rgd_loss_func",
    ),
    ("statistics before a call", lambda: RGDLoss().stats(), RuntimeError, "there has been none yet"),
    ("totals that were not asked for", lambda: RGDLoss().stats(total=True), RuntimeError, r"reset_stats\(\)"),
    ("a picture of no losses", lambda: plot.largest_losses(torch.zeros(0)), ValueError, r"\(N,\)"),
]


@pytest.mark.parametrize(("call", "kind", "named"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_wrong_input_is_told_what_to_do(call, kind, named):
    with pytest.raises(kind, match=f"(?s){named}"):
        call()


def test_the_table_has_sixty_rows():
    assert len({row[0] for row in WRONG}) == len(WRONG) >= 60


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16]
)
def test_labels_and_groups_of_any_integer_dtype_are_taken(dtype):
    criterion = RGDLoss(weighting=rgd.GroupDRO(3, 0.1))
    expected = RGDLoss(weighting=rgd.GroupDRO(3, 0.1))(LOGITS, TARGET, groups=TARGET)
    assert torch.equal(criterion(LOGITS, TARGET.to(dtype), groups=TARGET.to(dtype)), expected)
    head = linear_cross_entropy(HIDDEN, HEAD, TARGET.to(dtype))
    assert torch.equal(head, linear_cross_entropy(HIDDEN, HEAD, TARGET))


def test_arrays_of_class_counts_are_taken_as_they_are():
    counts = [90, 9, 1]
    for name, values in (("weight", rgd.class_balanced(counts)), ("logit_adjustment", rgd.log_prior(counts))):
        expected = RGDLoss(**{name: torch.as_tensor(values, dtype=torch.float32)})(LOGITS, TARGET)
        for criterion in (RGDLoss(**{name: values}), LinearRGDLoss(2, 3, **{name: values})):
            assert name in criterion.state_dict()
        assert torch.equal(RGDLoss(**{name: values})(LOGITS, TARGET), expected)
        assert torch.equal(cross_entropy(LOGITS, TARGET, **{name: values}), expected)
