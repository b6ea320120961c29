"""`rgd.EntropyGate`, in all fronts that have logits: weights times the entropy over its largest value."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rgd
import rgd.boosting
import rgd.jax
import rgd.optax
import rgd.reference as oracle
import rgd.torch
import torch
from devices import outcomes_on_four_devices
from family import EPS, label
from rgd.torch import RGD, LinearRGDLoss, RGDLoss
from rgd.torch.linear import _chunks
from torch.nn import functional as F
from x64 import enable_x64

N, T, C, D = 6, 5, 7, 3
GATE = rgd.EntropyGate(rgd.ERM())
WEIGHTINGS = [
    GATE,
    rgd.EntropyGate(rgd.KL(math.inf, scale=0.5)),
    rgd.EntropyGate(rgd.KL(scale=-0.7)),
    rgd.EntropyGate(rgd.Focal(2.0)),
    rgd.EntropyGate(rgd.CVaR(0.6)),
    rgd.Trimmed(rgd.EntropyGate(rgd.KL()), 0.2),
    rgd.EntropyGate(rgd.Trimmed(rgd.KLBall(0.1), 0.2)),
]
weightings = pytest.mark.parametrize("weighting", WEIGHTINGS, ids=label)


@pytest.fixture(autouse=True)
def _double_precision():
    with enable_x64(True):
        yield


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def batch():
    logits, labels = 3 * numbers(N, T, C), np.random.default_rng(2).integers(0, C, (N, T))
    labels[0, 1] = labels[3] = -100
    return logits, labels


def close(actual, expected, terms, scale=1.0):
    """Equal but for the roundings of sums of so many terms, and of the search for the root of a ball."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=(64 * terms * EPS + 1e-13) * scale)


def by_class(logits):
    return np.moveaxis(logits, -1, 1)


def gate_of(logits):
    """The entropy over log C, in torch operations."""
    log_q = F.log_softmax(logits, -1)
    return -(log_q.exp() * log_q).sum(-1) / math.log(logits.shape[-1])


# --- the numbers ---


OPTIONS = {
    "plain": {},
    "measured": {"sample_weight": np.array([1.0, 2.0, 0.0, 1.0, 0.5, 3.0])},
    "adjusted": {"logit_adjustment": np.array([0.0, -1.0, -math.inf, 0.5, 2.0, 0.0, 1.0])},
    "class weights": {"weight": np.linspace(0.5, 2.0, C), "label_smoothing": 0.1, "z_loss": 0.05},
}


@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize(
    ("weighting", "name"),
    [
        *((one, "plain") for one in WEIGHTINGS),
        *((WEIGHTINGS[1], name) for name in OPTIONS if name != "plain"),
    ],
    ids=label,
)
def test_cross_entropy_of_every_front_is_that_of_the_oracle(weighting, per, name):
    options = OPTIONS[name]
    logits, labels = batch()
    if "logit_adjustment" in options:
        labels[labels == 2] = 0  # the class that is ruled out
    arrays = {key: one for key, one in options.items() if isinstance(one, np.ndarray)}
    given = {**options, "weighting": weighting, "per": per}
    expected = oracle.cross_entropy(by_class(logits), labels, **given)
    gradient = np.moveaxis(oracle.cross_entropy_grad(by_class(logits), labels, **given), 1, -1)
    assert (
        abs(expected - oracle.cross_entropy(by_class(logits), labels, **{**given, "weighting": rgd.ERM()}))
        > 0.1
    )

    tensors = {**given, **{key: torch.tensor(one) for key, one in arrays.items()}}
    for backend in ("rust", "composite"):
        own = torch.tensor(by_class(logits), requires_grad=True)
        with rgd.torch.backend(backend):
            objective = rgd.torch.cross_entropy(own, torch.tensor(labels), **tensors)
            objective.backward()
        close(objective.detach(), expected, N * T, 10)
        close(own.grad.movedim(1, -1), gradient, N * T, 10)
    value = jax.jit(jax.value_and_grad(lambda z: rgd.jax.cross_entropy(z, labels, **given)))
    objective, own = value(logits)
    close(objective, expected, N * T, 10)
    close(own, gradient, N * T, 10)


@pytest.mark.parametrize("per", ["element", "sample"])
@weightings
def test_linear_heads_of_every_front_are_those_of_the_oracle(weighting, per):
    hidden, head = numbers(N, T, D), 3 * numbers(C, D, seed=4)
    _, labels = batch()
    given = {"weighting": weighting, "per": per}
    cap = 2.0
    logits = by_class((cap * np.tanh(hidden @ head.T / cap))[:, :-1])
    expected = oracle.cross_entropy(logits, labels[:, 1:], **given)
    by_logits = np.moveaxis(oracle.cross_entropy_grad(logits, labels[:, 1:], **given), 1, -1)
    by_logits *= 1 - (np.moveaxis(logits, 1, -1) / cap) ** 2
    of_head = np.einsum("ntc,ntd->cd", by_logits, hidden[:, :-1])

    given |= {"shift": True, "chunk_bytes": 3 * C * 8, "logit_softcap": cap}
    for backend in ("rust", "composite"):
        own = torch.tensor(head, requires_grad=True)
        with rgd.torch.backend(backend):
            objective = rgd.torch.linear_cross_entropy(
                torch.tensor(hidden), own, torch.tensor(labels), **given
            )
            objective.backward()
        close(objective.detach(), expected, N * T, 10)
        close(own.grad, of_head, N * T, 30)

    def objective_of(kernel):
        return rgd.jax.linear_cross_entropy(hidden, kernel, labels, **given)

    objective, own = jax.jit(jax.value_and_grad(objective_of))(head.T)
    close(objective, expected, N * T, 10)
    close(own.T, of_head, N * T, 30)


@weightings
def test_sequences_that_share_a_row_have_their_mean_entropies(weighting):
    logits, labels = batch()
    segments = np.array([[0, 0, 1, 1, -1]] * N)
    given = {"weighting": weighting, "per": "sample"}
    expected = oracle.cross_entropy(by_class(logits), labels, segments=segments, **given)
    assert expected != oracle.cross_entropy(by_class(logits), labels, **given)
    inputs = torch.tensor(by_class(logits), requires_grad=True), torch.tensor(labels)
    of_torch = {**given, "segments": torch.tensor(segments)}
    for backend in ("rust", "composite"):
        with rgd.torch.backend(backend):
            close(rgd.torch.cross_entropy(*inputs, **of_torch).detach(), expected, N * T, 10)
    head = torch.eye(C, dtype=torch.float64)
    objective = rgd.torch.linear_cross_entropy(torch.tensor(logits), head, inputs[1], **of_torch)
    close(objective, expected, N * T, 10)
    given["segments"] = segments
    close(rgd.jax.cross_entropy(logits, labels, **given), expected, N * T, 10)
    close(rgd.jax.linear_cross_entropy(logits, np.eye(C), labels, **given), expected, N * T, 10)


def test_the_gate_alone_is_the_entropy_over_its_largest_value():
    logits = torch.tensor(numbers(20, C), requires_grad=True)
    target = torch.tensor(np.random.default_rng(2).integers(0, C, 20))
    losses = F.cross_entropy(logits, target, reduction="none")
    expected = (gate_of(logits).detach() * losses).mean()
    found = rgd.torch.cross_entropy(logits, target, weighting=GATE)
    close(found.detach(), expected.detach(), 20, 10)
    close(*(torch.autograd.grad(one, logits)[0] for one in (found, expected)), 20, 10)
    criterion = RGDLoss(weighting=GATE, returns=("entropy",))
    criterion(logits, target)
    close(criterion.last_weights, gate_of(logits).detach(), C, 10)
    close(criterion.last_weights, criterion.extras["entropy"] / math.log(C), C, 10)


def test_where_20_classes_have_all_the_mass_the_weights_are_those_of_the_paper_by_a_factor():
    """arXiv 2601.02151: the entropy of the 20 largest logits, over log(20)."""
    classes, kept = 500, 20
    logits = torch.full((6, classes), -1000.0, dtype=torch.float64)
    logits[:, :kept] = torch.tensor(numbers(6, kept))
    paper = gate_of(logits.topk(kept, 1).values)
    criterion = RGDLoss(weighting=GATE, evaluate="weighted")
    criterion(logits, torch.zeros(6, dtype=torch.long))
    close(criterion.last_weights, paper * math.log(kept) / math.log(classes), classes)
    logits[:, kept:] = logits[:, :1]
    criterion(logits, torch.zeros(6, dtype=torch.long))
    assert bool((criterion.last_weights > 0.9).all())


def test_a_gate_that_is_shut_makes_an_infinite_weight_zero():
    shut = rgd.Batch(np.array([math.inf, 1.0]), entropy=np.array([0.0, math.log(2)]), classes=2)
    steep = rgd.EntropyGate(rgd.KL(math.inf, scale=1.0))
    with np.errstate(all="ignore"):
        assert steep.weights(shut).tolist() == [0.0, math.e]
        assert steep.log_weights(shut).tolist() == [-math.inf, 1.0]
        unknown = rgd.Batch(np.array([math.nan]), entropy=np.zeros(1), classes=2)
        assert np.isnan(steep.weights(unknown)).all()
        assert np.isnan(steep.log_weights(unknown)).all()
    both = {"entropy": np.array([0.0, math.log(2)]), "classes": 2}
    assert oracle.sample_weights(np.array([math.inf, 1.0]), steep, **both).tolist() == [0.0, math.e]


@pytest.mark.parametrize("inner", [rgd.KL(0.5), rgd.CVaR(0.3), rgd.MovingAverage(rgd.KL(), 0.9)], ids=label)
def test_a_gate_has_the_properties_of_its_weighting_but_for_the_mean(inner):
    gate = rgd.EntropyGate(inner)
    assert (gate.pointwise, gate.stateful, gate.clip) == (inner.pointwise, inner.stateful, inner.clip)
    assert gate.init() == inner.init()
    assert not gate.mean_one
    assert not gate.is_plain


def test_a_state_of_the_inner_weighting_goes_through():
    logits, labels = batch()
    weighting = rgd.EntropyGate(rgd.MovingAverage(rgd.KL(), 0.5))
    expected, after = oracle.cross_entropy(
        by_class(logits), labels, weighting=weighting, state=weighting.init()
    )
    criterion = RGDLoss(weighting=weighting)
    objective = criterion(torch.tensor(by_class(logits), requires_grad=True), torch.tensor(labels))
    close(objective.detach(), expected, N * T, 10)
    close(criterion.state_dict()["weighting_state.log_mean"], after["log_mean"], N * T, 10)
    options = {"weighting": weighting, "state": weighting.init()}
    objective, new = jax.jit(lambda z: rgd.jax.cross_entropy(z, labels, **options))(logits)
    close(objective, expected, N * T, 10)
    close(new["log_mean"], after["log_mean"], N * T, 10)


# --- one pass ---


def test_a_linear_head_takes_one_pass(monkeypatch):
    passes = []
    for name in ("in_one_pass", "losses_in_chunks", "gradients_in_chunks"):
        plain = getattr(_chunks, name)
        watched = lambda *given, plain=plain, name=name: passes.append(name) or plain(*given)  # noqa: E731
        monkeypatch.setattr(f"rgd.torch.linear._call.{name}", watched)
    hidden, head = torch.tensor(numbers(N, D)), torch.tensor(numbers(C, D), requires_grad=True)
    for inner, expected in (
        (rgd.KL(), ["in_one_pass"]),
        (rgd.CVaR(0.5), ["losses_in_chunks", "gradients_in_chunks"]),
    ):
        objective = rgd.torch.linear_cross_entropy(
            hidden, head, torch.arange(N), weighting=rgd.EntropyGate(inner)
        )
        objective.backward()
        assert passes == expected
        passes.clear()


@pytest.mark.parametrize(("inner", "products"), [(rgd.KL(), 3), (rgd.CVaR(0.5), 4)], ids=str)
def test_a_linear_head_of_jax_takes_one_pass(inner, products):
    _, labels = batch()

    def objective(hidden, kernel):
        weighting = rgd.EntropyGate(inner)
        return rgd.jax.linear_cross_entropy(hidden, kernel, labels, weighting=weighting)

    program = str(jax.make_jaxpr(jax.grad(objective, (0, 1)))(numbers(N, T, D), numbers(D, C)))
    assert program.count("dot_general") == products


# --- several devices ---

PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P

import rgd, rgd.jax as rj

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
inputs, kernel = jnp.asarray(rng.standard_normal((8, 4))), jnp.asarray(rng.standard_normal((4, 6)))
labels = jnp.asarray(rng.integers(0, 6, 8)).at[3].set(-100)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "classes"))

def head(inner, **axes):
    options = {"weighting": rgd.EntropyGate(inner), "chunk_bytes": 100}
    operands = inputs, kernel

    def alone(operands):
        return rj.linear_cross_entropy(*operands, labels, **options)

    def mapped(operands):
        specs = P("data"), P(None, "classes" if axes else None), P("data")
        function = lambda *given: rj.linear_cross_entropy(*given, axis_name="data", **axes, **options)
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P())(*operands, labels)

    expected, gradients = jax.value_and_grad(alone)(operands)
    objective, others = jax.jit(jax.value_and_grad(mapped))(operands)
    # Sums of 8 and of 6 numbers in another order.
    for one, other in zip((objective, *others), (expected, *gradients)):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-14)

def rows(inner):
    weighting = rgd.EntropyGate(inner)
    function = lambda x, y: rj.cross_entropy(x, y, axis_name="data", weighting=weighting)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())
    expected = rj.cross_entropy(inputs @ kernel, labels, weighting=weighting)
    np.testing.assert_allclose(jax.jit(mapped)(inputs @ kernel, labels), expected, rtol=1e-13)

CHECKS = {}
for name, inner in (("pointwise", rgd.KL()), ("of the batch", rgd.CVaR(0.5))):
    CHECKS[f"{name}, rows"] = lambda inner=inner: rows(inner)
    CHECKS[f"{name}, head"] = lambda inner=inner: head(inner)
    CHECKS[f"{name}, classes"] = lambda inner=inner: head(inner, vocab_axis_name="classes")
"""


@pytest.fixture(scope="module")
def outcomes():
    return outcomes_on_four_devices(PROGRAM)


@pytest.mark.parametrize("check", ["rows", "head", "classes"])
@pytest.mark.parametrize("inner", ["pointwise", "of the batch"])
def test_rows_and_classes_over_devices_have_the_entropy_of_one(outcomes, inner, check):
    assert outcomes[f"{inner}, {check}"] == "equal", outcomes[f"{inner}, {check}"]


# --- what is refused ---


@pytest.mark.parametrize("inner", [GATE, rgd.Trimmed(GATE, 0.1), rgd.Excess(GATE)], ids=label)
def test_a_gate_of_a_gate_is_refused(inner):
    with pytest.raises(ValueError, match="its weights are times the entropy already"):
        rgd.EntropyGate(inner)


LOSSES = torch.ones(3, requires_grad=True)
BASE = torch.nn.MSELoss(reduction="none")


CALLS = {
    "NumPy weights": lambda m: rgd.sample_weights(np.ones(3), m),
    "NumPy mean": lambda m: rgd.reweighted_mean(np.ones(3), m),
    "NumPy weights of nothing": lambda m: rgd.sample_weights(np.ones(0), m),
    "torch weights": lambda m: rgd.torch.sample_weights(LOSSES, m),
    "torch weights of nothing": lambda m: rgd.torch.sample_weights(torch.ones(0), m),
    "torch mean": lambda m: rgd.torch.reweighted_mean(LOSSES, m),
    "compiled": lambda m: torch.compile(rgd.torch.reweighted_mean, backend="eager")(LOSSES, m),
    "JAX weights": lambda m: rgd.jax.sample_weights(jnp.ones(3), m),
    "JAX weights of nothing": lambda m: rgd.jax.sample_weights(jnp.ones(0), m),
    "JAX mean": lambda m: rgd.jax.reweighted_mean(jnp.ones(3), m),
    "JAX value_and_grad": lambda m: rgd.jax.value_and_grad(lambda x: x, weighting=m),
    "batch": lambda m: m.weights(rgd.Batch(np.ones(3))),
    "logarithms": lambda m: m.log_weights(rgd.Batch(np.ones(3))),
}
INSTEAD = {
    "RGDLoss of a base": (lambda m: RGDLoss(base=BASE, weighting=m), "leave base out"),
    "RGD": (lambda m: RGD(torch.optim.SGD([torch.ones(1)], lr=1.0), m), "use rgd.torch.RGDLoss as the loss"),
    "optax": (lambda m: rgd.optax.rgd(optax.sgd(0.1), m), "take the gradient of rgd.jax.cross_entropy"),
    "optax schedule": (
        lambda m: rgd.optax.reweight(lambda count: m).update(
            jnp.ones((3, 1)), rgd.optax.reweight().init(None), losses=jnp.ones(3)
        ),
        "call cross_entropy or linear_cross_entropy",
    ),
    "boosting": (rgd.boosting.logistic, "give another weighting"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_losses_alone_have_no_entropy(call):
    of_batch = call in (CALLS["batch"], CALLS["logarithms"])
    for weighting in (GATE,) if of_batch else (GATE, rgd.Trimmed(GATE, 0.1), rgd.EntropyGate(rgd.CVaR(0.5))):
        with pytest.raises(
            ValueError, match="EntropyGate reads the entropy of the logits, which losses alone"
        ):
            call(weighting)


@pytest.mark.parametrize(("call", "instead"), INSTEAD.values(), ids=INSTEAD)
def test_what_has_losses_alone_says_what_to_use(call, instead):
    with pytest.raises(ValueError, match=f"EntropyGate reads the entropy.*{re.escape(instead)}"):
        call(rgd.Trimmed(GATE, 0.1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: RGDLoss(base=BASE, weighting=rgd.MovingAverage(rgd.KL(), 0.9)),
        lambda: RGD(torch.optim.SGD([torch.ones(1)], lr=1.0), rgd.MovingAverage(rgd.KL(), 0.9)),
    ],
    ids=["RGDLoss of a base", "RGD"],
)
def test_a_weighting_that_is_set_and_refused_leaves_the_old_one(make):
    made = make()
    weighting, state = made.weighting, made.weighting_state
    with pytest.raises(ValueError, match="EntropyGate reads the entropy"):
        made.weighting = rgd.MovingAverage(GATE, 0.9)
    assert made.weighting is weighting
    assert made.weighting_state is state


def test_a_curve_over_losses_is_refused_before_a_figure_is_made():
    plot, pyplot = pytest.importorskip("rgd.plot"), pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    with pytest.raises(ValueError, match=r"EntropyGate reads.*draw the curve of its inner weighting"):
        plot.weight_curve(GATE)
    with pytest.raises(ValueError, match="EntropyGate reads the entropy"):
        plot.heaviest_samples(np.ones(3), GATE)
    assert pyplot.get_fignums() == before


def test_scikit_learn_refuses_a_gate_before_it_fits():
    linear_model = pytest.importorskip("sklearn.linear_model")
    sklearn = pytest.importorskip("rgd.sklearn")
    model = sklearn.Reweighted(linear_model.LogisticRegression(), GATE)
    with pytest.raises(ValueError, match=r"EntropyGate reads.*give another weighting"):
        model.fit(numbers(8, 2), np.arange(8) % 2)


def test_one_class_has_no_entropy_to_divide_by():
    zeros = torch.zeros(3, dtype=torch.long)
    logits, weight = torch.zeros(3, 1, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    calls = (
        lambda: rgd.torch.cross_entropy(logits, zeros, weighting=GATE),
        lambda: rgd.torch.linear_cross_entropy(torch.ones(3, 2), weight, zeros, weighting=GATE),
        lambda: rgd.jax.cross_entropy(np.zeros((3, 1)), np.zeros(3, int), weighting=GATE),
        lambda: rgd.jax.linear_cross_entropy(
            np.ones((3, 2)), np.ones((2, 1)), np.zeros(3, int), weighting=GATE
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"divides the entropy of the logits by log\(C\).*one class"):
            call()
    with pytest.raises(ValueError, match="more than one class"):
        oracle.cross_entropy(np.zeros((3, 1)), np.zeros(3, int), weighting=GATE)


def test_an_evaluation_is_plain():
    logits, labels = batch()
    logits, labels = torch.tensor(by_class(logits)), torch.tensor(labels)
    criterion, head = RGDLoss(weighting=GATE), LinearRGDLoss(2, 4, weighting=GATE)
    with torch.no_grad():
        close(criterion(logits, labels), F.cross_entropy(logits, labels), N * T, 10)
        plain = F.cross_entropy(head.linear(torch.ones(3, 2)), torch.zeros(3, dtype=torch.long))
        found = head(torch.ones(3, 2), torch.zeros(3, dtype=torch.long))
        torch.testing.assert_close(found, plain)


def test_a_gate_counts_the_clipped_losses_of_its_weighting():
    logits, labels = batch()
    criterion = RGDLoss(weighting=rgd.EntropyGate(rgd.KL(1.5)))
    criterion(torch.tensor(by_class(logits), requires_grad=True), torch.tensor(labels))
    losses = oracle.cross_entropy_losses(by_class(logits), labels)[labels != -100]
    expected = np.mean(losses > 1.5)
    assert 0.1 < expected < 0.9
    close(criterion.stats().clipped_share, expected, N * T)
