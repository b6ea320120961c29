"""`returns=`: entropy, logsumexp and the first class of the logits, against `rgd.reference`."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import rgd
import rgd.reference
import rgd.torch
import torch
from linear_heads import Case
from rgd.torch import LinearRGDLoss, RGDLoss, backend, cross_entropy, linear_cross_entropy
from torch.nn import functional as F

NAMES = ("entropy", "logsumexp", "correct")
BACKENDS = ["rust", "composite"]
C = 7
MASK = torch.arange(15).view(5, 3) % 4 != 1
OPTIONS = {
    "plain": {},
    "adjusted": {"logit_adjustment": torch.tensor([0.0, -1.0, -math.inf, 0.5, 2.0, 0.0, 1.0])},
    "weighted": {"weight": torch.linspace(0.5, 2.0, C), "label_smoothing": 0.1, "z_loss": 0.05},
    "masked": {"where": MASK, "reduction": "none"},
    "measured": {"sample_weight": torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0])},
    "by sample": {"per": "sample", "weighting": rgd.CVaR(0.5)},
    "of steps": {"weighting": rgd.MovingAverage(rgd.KL(), 0.5)},
}


def batch(dtype=torch.float64, *shape):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(*(shape or (5, C, 3)), generator=generator, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(0, C, logits[:, 0].shape, generator=generator)
    target[0] = logits.argmax(1)[0]
    target[2, 1] = -100
    # Of equal logits the first counts.
    logits[3, :, 0] = 0.0
    target[3, 0] = 0
    logits[4, :, 0] = 0.0
    target[4, 0] = 1
    return logits.requires_grad_(), target


def expected_of(logits, target, options):
    where = options.get("where")
    if "sample_weight" in options:
        where = (options["sample_weight"] != 0)[:, None].expand(logits[:, 0].shape)
    adjustment = options.get("logit_adjustment")
    return rgd.reference.cross_entropy_extras(
        logits.detach().double().numpy(),
        target.numpy(),
        logit_adjustment=None if adjustment is None else adjustment.double().numpy(),
        where=None if where is None else where.numpy(),
    )


def assert_extras(found, expected, close=1e-12):
    assert list(found) == list(NAMES)
    for name in NAMES:
        assert not found[name].requires_grad
        assert found[name].dtype is (torch.bool if name == "correct" else found["entropy"].dtype)
        np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=close, atol=close)


def options_in(dtype, name):
    """The options, whose numbers of classes are in the dtype that losses are computed in."""
    of_classes = ("weight", "logit_adjustment")
    return {key: one.to(dtype) if key in of_classes else one for key, one in OPTIONS[name].items()}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", BACKENDS)
def test_extras_are_those_of_the_reference_and_change_nothing_else(kind, name):
    logits, target = batch()
    options = options_in(torch.float64, name)
    state = options["weighting"].init() if name == "of steps" else None
    with backend(kind):
        plain = cross_entropy(logits, target, state=state, **options)
        loss, extras = cross_entropy(logits, target, state=state, returns=NAMES, **options)
    if state is not None:
        plain, (extras, after) = plain[0], extras
        assert float(after["log_mean"] if isinstance(after, dict) else torch.as_tensor(after[0])) != 0
    assert torch.equal(loss, plain)
    for one, other in zip(
        torch.autograd.grad(loss.sum(), logits), torch.autograd.grad(plain.sum(), logits), strict=True
    ):
        assert torch.equal(one, other)
    assert_extras(extras, expected_of(logits, target, options))
    assert not any(one[2, 1] for one in extras.values())
    if name == "plain":
        assert bool(extras["correct"][0].all())
        assert bool(extras["correct"][3, 0])
        assert not bool(extras["correct"][4, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BACKENDS)
def test_half_precision_is_computed_in_float32(kind, dtype):
    logits, target = batch(dtype, 5, 300, 2)
    with backend(kind):
        _, extras = cross_entropy(logits, target, returns=NAMES)
    # Sums of 300 numbers, and logits up to 12: their products carry eps each.
    assert_extras(extras, expected_of(logits, target, {}), close=300 * 12 * torch.finfo(torch.float32).eps)
    assert extras["entropy"].dtype is torch.float32


@pytest.mark.parametrize("kind", BACKENDS)
def test_class_probabilities_have_the_most_probable_class(kind):
    logits, _ = batch()
    target = torch.softmax(torch.randn(5, C, 3, generator=torch.Generator().manual_seed(1)).double(), 1)
    target[1] = 1 / C  # all alike: the first
    for options in ({}, {"sample_weight": OPTIONS["measured"]["sample_weight"]}):
        with backend(kind):
            _, extras = cross_entropy(logits, target, returns=NAMES, **options)
        assert_extras(extras, expected_of(logits, target, options))


@pytest.mark.parametrize("kind", BACKENDS)
def test_infinite_and_unknown_logits_have_their_limits(kind):
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[0.0, -inf, 0.0], [0.0, inf, 1.0], [0.0, nan, 1.0], [nan, 0.0, 0.0]])
    with backend(kind):
        _, extras = cross_entropy(logits, torch.tensor([0, 1, 2, 0]), returns=NAMES)
    expected = {
        "entropy": torch.tensor([math.log(2), nan, nan, nan]),
        "logsumexp": torch.tensor([math.log(2), inf, nan, nan]),
        "correct": torch.tensor([True, True, False, False]),
    }
    torch.testing.assert_close(extras, expected, equal_nan=True)


@pytest.mark.parametrize("shape", [(C,), (6, C), (0, C), (2, 3, 1)])
@pytest.mark.parametrize("kind", BACKENDS)
def test_every_shape_has_extras_of_its_targets_shape(kind, shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    axis = min(len(shape) - 1, 1)
    target = logits.argmax(axis) if logits.numel() else torch.zeros(0, dtype=torch.long)
    with backend(kind):
        _, extras = cross_entropy(logits, target, returns=("correct", "entropy"))
    assert list(extras) == ["correct", "entropy"]
    assert {one.shape for one in extras.values()} == {target.shape}
    assert bool(extras["correct"].all())


# --- linear heads ---


HEADS = {
    "one pass": {},
    "capped and shifted": {"logit_softcap": 2.0, "shift": True},
    "two passes": {"per": "sample", "weighting": rgd.KLBall(0.1)},
    "elements": {"reduction": "none", "label_smoothing": 0.1},
    "masked": {"where": torch.arange(15).view(3, 5) % 3 != 1, "z_loss": 0.01},
    "a formula": {"weighting": rgd.Pointwise(lambda losses: 1 / (1 + losses))},
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_linear_head_returns_what_its_logits_have(kind, name, compiled):
    if compiled and name == "a formula":
        pytest.skip("a compiled graph cannot hold a function of the user")
    torch.compiler.reset()
    case, options = Case(), {**HEADS[name], "chunk_bytes": 8 * 11 * 2}
    case.target[1, 2] = -100

    def call(returns=NAMES, **more):
        return linear_cross_entropy(
            case.input, case.weight, case.target, linear_bias=case.bias, returns=returns, **options, **more
        )

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    with backend(kind):
        loss, extras = function()
        plain = call(())
        mine, other = (torch.autograd.grad(one.sum(), case.trained) for one in (loss, plain))
    torch.testing.assert_close((loss, *mine), (plain, *other), rtol=1e-13, atol=1e-13)
    logits, target = F.linear(case.input, case.weight, case.bias).detach(), case.target
    if "logit_softcap" in options:
        logits = 2.0 * torch.tanh(logits / 2.0)
        logits, target = logits[:, :-1], target[:, 1:]
    assert_extras(extras, expected_of(logits.movedim(-1, 1), target, options))


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_head_without_targets_that_count_returns_zeros(kind):
    case = Case()
    with backend(kind):
        _, extras = case.chunked(torch.full((3, 5), -100), returns=NAMES)
    assert not any(bool(one.any()) for one in extras.values())
    assert {one.shape for one in extras.values()} == {(3, 5)}


# --- compiled, transformed ---


@pytest.mark.parametrize("name", ["plain", "adjusted", "masked", "by sample"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_a_compiled_call_returns_the_same(kind, name):
    torch.compiler.reset()
    logits, target = batch()
    options = options_in(torch.float64, name)

    def call(logits):
        return cross_entropy(logits, target, returns=NAMES, **options)

    with backend(kind):
        loss, extras = torch.compile(call, fullgraph=True, backend="aot_eager")(logits)
        plain, _ = call(logits)
        mine, other = (torch.autograd.grad(one.sum(), logits) for one in (loss, plain))
    torch.testing.assert_close((loss, mine), (plain, other), rtol=1e-13, atol=1e-13)
    assert_extras(extras, expected_of(logits, target, options))


def test_transforms_return_extras_beside_the_gradient():
    logits, target = batch()
    target[2, 1] = 0

    def loss(one, label):
        return cross_entropy(one.unsqueeze(0), label.unsqueeze(0), returns=NAMES)

    with backend() as ran:
        grads, extras = torch.func.vmap(torch.func.grad(loss, has_aux=True))(logits.detach(), target)
    assert set(ran) == {"composite"}
    assert grads.shape == logits.shape
    assert_extras({name: one.squeeze(1) for name, one in extras.items()}, expected_of(logits, target, {}))


def test_logits_that_the_gradient_overwrites_are_read_before():
    for kind in BACKENDS:
        logits, target = batch()
        expected = expected_of(logits, target, {})
        layer = logits * 1.0
        with backend(kind):
            loss, extras = cross_entropy(layer, target, inplace=True, returns=NAMES)
        loss.backward()
        assert_extras(extras, expected)


# --- what is refused ---


@pytest.mark.parametrize(
    ("returns", "error", "message"),
    [
        ("entropy", TypeError, r"give returns=\('entropy',\)"),
        (("entropy", "nothing"), ValueError, "out of 'entropy', 'logsumexp', 'correct'"),
        (("entropy", "entropy"), ValueError, "each at most once"),
        (3, TypeError, "a tuple of names"),
        (None, TypeError, "a tuple of names"),
    ],
)
def test_names_that_are_not_known_are_refused(returns, error, message):
    logits, target = batch()
    case = Case()
    for call in (
        lambda: cross_entropy(logits, target, returns=returns),
        lambda: case.chunked(returns=returns),
        lambda: RGDLoss(returns=returns),
        lambda: LinearRGDLoss(3, 4, returns=returns),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_base_loss_has_no_logits_to_return_anything_of():
    with pytest.raises(ValueError, match="returns are of the logits"):
        RGDLoss(base=torch.nn.MSELoss(reduction="none"), returns=("entropy",))


# --- modules ---


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_module_keeps_the_extras_of_its_last_call(kind):
    logits, target = batch()
    criterion = RGDLoss(returns=NAMES)
    assert criterion.extras is None
    assert criterion.returns == NAMES
    with backend(kind):
        for _ in range(3):  # the later ones might take the short way
            criterion(logits * 1.0, target).backward()
        assert_extras(criterion.extras, expected_of(logits, target, {}))
        criterion.eval()
        with torch.no_grad():
            criterion(logits * 2, target)
    assert_extras(criterion.extras, expected_of(logits * 2, target, {}))
    assert criterion.stats().count == 14
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert other.extras is None
        assert other.returns == NAMES
    assert "returns=('entropy', 'logsumexp', 'correct')" in repr(criterion)


def test_a_module_of_a_linear_head_keeps_them_too():
    case = Case()
    criterion = LinearRGDLoss(linear_weight=torch.nn.Parameter(case.weight.detach()), returns=("correct",))
    criterion(case.input, case.target).backward()
    expected = expected_of(F.linear(case.input, case.weight).movedim(-1, 1), case.target, {})
    assert list(criterion.extras) == ["correct"]
    np.testing.assert_array_equal(criterion.extras["correct"].numpy(), expected["correct"])


def test_nothing_is_left_behind_by_a_transform_or_an_export():
    logits, target = batch()
    target[2, 1] = 0
    criterion = RGDLoss(returns=NAMES)
    criterion(logits, target)
    torch.func.vmap(criterion)(logits.detach().unsqueeze(1), target.unsqueeze(1))
    assert criterion.extras is None
    fresh = RGDLoss(returns=NAMES)
    exported = torch.export.export(fresh, (logits.detach(), target))
    assert fresh.extras is None
    torch.testing.assert_close(exported.module()(logits.detach(), target), fresh(logits.detach(), target))


def test_a_loss_that_asks_for_nothing_keeps_nothing():
    logits, target = batch()
    criterion = RGDLoss()
    criterion(logits, target)
    assert criterion.extras is None
    assert criterion.returns == ()


def test_a_call_that_asks_for_nothing_computes_nothing(monkeypatch):
    from rgd.torch.backends import _extras, rust  # noqa: PLC0415

    def refuse(*given):
        raise AssertionError("extras that nobody asked for")

    monkeypatch.setattr(_extras, "extras_by_formula", refuse)
    monkeypatch.setattr(rust.Rust, "extras", refuse)
    logits, target = batch()
    case = Case()
    calls = (
        lambda returns: cross_entropy(logits, target, returns=returns),
        lambda returns: RGDLoss(returns=returns)(logits, target),
        lambda returns: case.chunked(returns=returns),
        lambda returns: case.chunked(returns=returns, weighting=rgd.CVaR(0.5)),
    )
    for kind in BACKENDS:
        for call in calls:
            with backend(kind):
                call(())
                with pytest.raises(AssertionError, match="nobody asked for"):
                    call(("correct",))


def test_a_compiled_module_keeps_its_extras():
    torch.compiler.reset()
    logits, target = batch()
    criterion = RGDLoss(returns=NAMES)
    torch.compile(criterion, fullgraph=True, backend="aot_eager")(logits, target).backward()
    assert_extras(criterion.extras, expected_of(logits, target, {}))


# --- weightings that read the entropy ---


@dataclasses.dataclass(frozen=True)
class Unsure(rgd.Weighting):
    """The entropy over its largest value, to a power."""

    power: float = 1.0

    pointwise = True
    needs = ("entropy",)

    def weights(self, batch):
        return (batch.entropy / math.log(batch.classes)) ** self.power


@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_weighting_may_read_the_entropy(kind, per, compiled):
    torch.compiler.reset()
    logits, target = batch()
    entropy = torch.as_tensor(expected_of(logits, target, {})["entropy"])
    counted = target != -100
    if per == "sample":
        entropy = (entropy.sum(1) / counted.sum(1)).unsqueeze(1)
    losses = F.cross_entropy(logits, target, reduction="none")
    expected = (entropy / math.log(C) * losses).sum() / counted.sum()
    function = (
        torch.compile(cross_entropy, fullgraph=True, backend="aot_eager") if compiled else cross_entropy
    )
    with backend(kind):
        found = function(logits, target, weighting=Unsure(), per=per)
        mine, other = (torch.autograd.grad(one, logits) for one in (found, expected))
        torch.testing.assert_close((found, *mine), (expected, *other), rtol=1e-12, atol=1e-14)
        case = Case()
        whole, chunked = (
            way(weighting=Unsure(), per=per, logit_softcap=2.0) for way in (case.whole, case.chunked)
        )
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-14)


def test_losses_without_logits_have_no_entropy():
    losses = torch.ones(3)
    for call in (
        lambda: rgd.torch.sample_weights(losses, Unsure()),
        lambda: RGDLoss(base=torch.nn.MSELoss(reduction="none"), weighting=Unsure()),
    ):
        with pytest.raises(ValueError, match="Unsure reads the entropy of the logits"):
            call()
