"""The linear head over several processes (gloo): a split vocabulary, data parallelism, sharded parameters."""

import pytest
import rgd
import torch
import torch.distributed as dist
from family import label
from rgd.torch import LinearRGDLoss, linear_cross_entropy
from rgd.torch.backends import _formulas
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

B, T, D, C = 4, 3, 6, 12
WEIGHTINGS = [rgd.KL(1.0), rgd.Focal(2.0), rgd.KLBall(0.1), rgd.CVaR(0.3)]
# Sums of at most 72 products in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(C, D, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(C, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(C, (B, T), generator=generator)
    target[0, 1] = -100
    return input, weight, bias, target


def results(input, head, bias, target, **options):
    trained = [one.clone().requires_grad_() for one in (input, head, bias)]
    objective = linear_cross_entropy(trained[0], trained[1], target, linear_bias=trained[2], **options)
    above = torch.linspace(1.0, 2.0, objective.numel(), dtype=objective.dtype).view(objective.shape)
    (objective * above).sum().backward()
    return [objective.detach(), *(one.grad for one in trained)]


# --- a split vocabulary ---


def slices(rank, size, sizes, options, dtype=torch.float64):
    input, weight, bias, target = tensors(dtype)
    first = sum(sizes[:rank])
    own = slice(first, first + sizes[rank])
    return results(input, weight[own], bias[own], target, vocab_group=dist.group.WORLD, sync=False, **options)


def check_slices(run, sizes, options, *, close=CLOSE, dtype=torch.float64):
    expected = results(*tensors(dtype), **options)
    outcomes = run(len(sizes), slices, sizes, options, dtype)
    for objective, of_input, *_ in outcomes:
        torch.testing.assert_close(objective, expected[0], **close)
        torch.testing.assert_close(of_input, expected[1], **close)
    for place in (2, 3):
        whole = torch.cat([outcome[place] for outcome in outcomes])
        torch.testing.assert_close(whole, expected[place], **close)


@pytest.mark.parametrize("sizes", [[6, 6], [4, 4, 4]], ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=label)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_slices_of_a_vocabulary_equal_the_whole(run, reduction, weighting, sizes):
    check_slices(run, sizes, {"weighting": weighting, "reduction": reduction, "chunk_bytes": 8 * 12 * 2})


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.2},
        {"label_smoothing": 0.2, "weight": torch.linspace(0.5, 1.5, C)},
        {"weight": torch.linspace(0.5, 1.5, C), "logit_softcap": 2.0},
        {"shift": True, "per": "sample"},
        {"logit_adjustment": torch.linspace(-1.0, 2.0, C), "label_smoothing": 0.1},
        {"sample_weight": torch.tensor([1.0, 0.0, 2.0, 0.5])},
    ],
    ids=str,
)
def test_options_over_slices_equal_those_of_the_whole(run, options):
    check_slices(run, [6, 6], options)


def test_a_class_without_mass_and_of_logit_minus_infinity_costs_nothing_in_its_slice(run):
    mass, adjustment = torch.linspace(0.5, 1.5, C), torch.zeros(C)
    gone = [int(tensors()[3][0, 0]), 9]  # the class of a label, and one of the other slice perhaps
    mass[gone], adjustment[gone] = 0.0, -torch.inf
    options = {"weight": mass, "logit_adjustment": adjustment, "label_smoothing": 0.2}
    assert results(*tensors(), **options)[0].isfinite()
    check_slices(run, [6, 6], options)


def narrow_labels(rank, size):
    generator = torch.Generator().manual_seed(0)
    input, weight = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (4, 300))
    target = torch.tensor([255, 0, 128, 44], dtype=torch.uint8)  # 300 is 44 in eight bits
    options = {"vocab_group": dist.group.WORLD, "sync": False}
    own = weight[150 * rank : 150 * (rank + 1)]
    return [linear_cross_entropy(input, own, one, **options) for one in (target, target.long())]


def test_labels_of_a_dtype_that_cannot_hold_the_number_of_classes_are_taken(run):
    for narrow, wide in run(2, narrow_labels):
        assert narrow == wide


@pytest.mark.parametrize("sizes", [[5, 7], [3, 8, 1]], ids=str)
def test_slices_may_differ_in_size(run, sizes):
    check_slices(run, sizes, {"chunk_bytes": 8 * 12})


def test_slices_in_bfloat16_are_near_the_whole(run):
    eps = torch.finfo(torch.bfloat16).eps
    check_slices(run, [6, 6], {}, close={"rtol": 8 * eps, "atol": 8 * eps}, dtype=torch.bfloat16)


def refusals(rank, size):
    input, weight, bias, target = tensors()
    own = slice(0, 5) if rank == 0 else slice(5, 12)
    messages = []
    wrong = target.clone()
    wrong[1, 1] = C
    for given, options in (
        (target, {"label_smoothing": 0.1}),
        (wrong, {}),
        (target, {"weight": torch.ones(5)}),
    ):
        try:
            linear_cross_entropy(
                input,
                weight[own],
                given,
                linear_bias=bias[own],
                vocab_group=dist.group.WORLD,
                sync=False,
                **options,
            )
        except (ValueError, IndexError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    try:
        linear_cross_entropy(input, weight[: 12 * rank], target, vocab_group=dist.group.WORLD, sync=False)
    except ValueError as error:
        messages.append(str(error))
    return messages


def test_what_does_not_fit_a_split_vocabulary_is_named(run):
    for messages in run(2, refusals):
        assert "label_smoothing over a vocabulary in slices of different sizes" in messages[0]
        assert messages[1].startswith("IndexError: label 12 at position [1, 1] is out of range")
        assert "one number for each of the 12 classes, got 5" in messages[2]
        assert "at least one class" in messages[3]


def with_labels_that_are_no_class(rank, size):
    input, weight, bias, target = tensors()
    own = slice(6 * rank, 6 * rank + 6)
    options = {"linear_bias": bias[own], "vocab_group": dist.group.WORLD, "sync": False, "reduction": "none"}
    sample_weight = torch.tensor([1.0, 0.0, 2.0, 0.0])
    target[1], target[3] = -1, 255
    masked = linear_cross_entropy(
        input, weight[own], target, sample_weight=sample_weight, weight=torch.ones(C), **options
    )
    with pytest.MonkeyPatch.context() as patch:
        # As on a GPU, where no value is read.
        patch.setattr(_formulas, "values_can_be_read", lambda tensor: False)
        unseen = linear_cross_entropy(input, weight[own], target, **options)
    return masked, unseen


def test_labels_that_are_no_class_count_for_nothing_or_give_nan_over_slices(run):
    input, weight, bias, target = tensors()
    target[1], target[3] = -100, -100
    options = {"linear_bias": bias, "reduction": "none"}
    sample_weight = torch.tensor([1.0, 1.0, 2.0, 1.0])
    expected = linear_cross_entropy(input, weight, target, sample_weight=sample_weight, **options)
    plain = linear_cross_entropy(input, weight, target, **options)
    plain[1], plain[3] = torch.nan, torch.nan
    for masked, unseen in run(2, with_labels_that_are_no_class):
        torch.testing.assert_close(masked, expected, **CLOSE)
        torch.testing.assert_close(unseen, plain, equal_nan=True, **CLOSE)


# --- data parallelism ---


class Model(nn.Module):
    """A body and a head whose logits are never made."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(D, D, dtype=torch.float64)
        self.criterion = LinearRGDLoss(D, C, dtype=torch.float64, **options)

    def forward(self, input, target):
        return self.criterion(torch.tanh(self.body(input)), target)


def train(rank, size, weighting):
    input, _, _, target = tensors()
    model = Model(weighting=weighting, chunk_bytes=8 * 12)
    wrapped = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    target[0, 1] = 0
    own = slice(rank * B // size, (rank + 1) * B // size)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(input[own], target[own]).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.KLBall(0.1)], ids=label)
def test_data_parallel_training_equals_one_process(run, weighting):
    expected = train(0, 1, weighting)
    for outcome in run(2, train, weighting):
        torch.testing.assert_close(outcome, expected, rtol=1e-11, atol=1e-13)


def shard(rank, size, weighting):
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (size,))
    input, _, _, target = tensors()
    target[0, 1] = 0
    model = Model(weighting=weighting)
    # The head is a unit of its own: its weight is gathered while the loss runs.
    fully_shard(model.criterion, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    own = slice(rank * B // size, (rank + 1) * B // size)
    for _ in range(3):
        optimizer.zero_grad()
        model(input[own], target[own]).backward()
        optimizer.step()
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.KLBall(0.1)], ids=label)
def test_sharded_training_equals_one_process(run, weighting):
    expected = train(0, 1, weighting)
    for outcome in run(2, shard, weighting):
        torch.testing.assert_close(outcome, expected, rtol=1e-11, atol=1e-13)


def read_outside_of_its_unit(rank, size):
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    head = torch.nn.Linear(D, C)
    fully_shard(head, mesh=init_device_mesh("cpu", (size,)))
    try:
        linear_cross_entropy(torch.zeros(2, D), head.weight, torch.zeros(2, dtype=torch.long))
    except TypeError as error:
        return str(error)
    return None


def test_a_head_read_outside_of_its_unit_is_told_to_be_one(run):
    for message in run(2, read_outside_of_its_unit):
        assert "linear_weight is a DTensor" in message
        assert "fully_shard(criterion)" in message


NAMES = ("entropy", "logsumexp", "correct")


def extras_of_slices(rank, size, sizes, options):
    input, weight, bias, target = with_equal_logits()
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    group = dist.group.WORLD if size > 1 else None
    return linear_cross_entropy(
        input,
        weight[own],
        target,
        linear_bias=bias[own],
        vocab_group=group,
        sync=False,
        returns=NAMES,
        **options,
    )[1]


def with_equal_logits():
    """Tensors of which the classes 3 and 8 have the same logits, for some targets the largest."""
    input, weight, bias, target = tensors()
    weight[3], bias[3] = weight[8], bias[8]
    target[1] = torch.tensor([3, 8, 3])
    return input, weight, bias, target


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none", "logit_softcap": 3.0}, {"logit_adjustment": torch.linspace(0, 1, C).double()}],
    ids=["one pass", "two passes", "adjusted"],
)
def test_slices_of_a_vocabulary_return_what_the_whole_has(run, options):
    expected = extras_of_slices(0, 1, [C], options)
    assert 0 < int(expected["correct"].sum()) < B * T
    for extras in run(2, extras_of_slices, [7, 5], options):
        torch.testing.assert_close(extras, expected, **CLOSE)
