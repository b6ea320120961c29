"""The state of a weighting that remembers: kept as precise as it is, and refused where it is another's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rgd
import rgd.jax
import rgd.optax
import torch
from rgd.torch import RGD, LinearRGDLoss, RGDLoss, cross_entropy, reweighted_mean, sample_weights


@dataclasses.dataclass(frozen=True)
class RunningMean(rgd.Weighting):
    """Remembers a running mean of the losses; how it begins is a setting."""

    start: object = 0.0

    def init(self):
        return {"inner": ({"mean": self.start},), "batches": 0}

    def step(self, batch, state):
        mean = 0.5 * state["inner"][0]["mean"] + 0.5 * batch.mean(batch.losses)
        return batch.xp.ones_like(batch.losses), {"inner": ({"mean": mean},), "batches": state["batches"] + 1}


LOSSES = [1.0, 2.0]
LOGITS = torch.zeros(2, 3, requires_grad=True)
TARGET = torch.arange(2)


def numpy_front(weighting, state):
    return rgd.sample_weights(np.array(LOSSES), weighting, state=state)[1]


def numpy_mean(weighting, state):
    return rgd.reweighted_mean(np.array(LOSSES), weighting, state=state)[1]


def torch_front(weighting, state):
    return sample_weights(torch.tensor(LOSSES), weighting, state=state)[1]


def torch_mean(weighting, state):
    return reweighted_mean(torch.tensor(LOSSES), weighting, state=state)[1]


def jax_front(weighting, state):
    return rgd.jax.sample_weights(jnp.array(LOSSES), weighting, state=state)[1]


def jax_jitted(weighting, state):
    call = jax.jit(lambda losses, state: rgd.jax.sample_weights(losses, weighting, state=state))
    return call(jnp.array(LOSSES), state)[1]


FUNCTIONS = [numpy_front, numpy_mean, torch_front, torch_mean, jax_front, jax_jitted]
SOUGHT = r"begins with an integer, and RunningMean\.step returns a real number .* such as 0\.0"


@pytest.mark.parametrize("call", FUNCTIONS)
def test_a_running_mean_that_begins_with_a_real_number_is_kept(call):
    weighting = RunningMean(0.0)
    state = weighting.init()
    for _ in range(3):
        state = call(weighting, state)
    assert float(state["inner"][0]["mean"]) == 1.3125
    assert int(state["batches"]) == 3


@pytest.mark.parametrize("start", [0, np.zeros((), np.int8), np.zeros((), bool)], ids=["int", "int8", "bool"])
@pytest.mark.parametrize("call", FUNCTIONS)
def test_a_state_that_would_be_cut_is_refused(call, start):
    weighting = RunningMean(start)
    sought = SOUGHT if start.__class__ is not np.ndarray or start.dtype != bool else "such as 0.0"
    with pytest.raises(TypeError, match=sought):
        call(weighting, weighting.init())


@pytest.mark.parametrize(
    "step",
    [
        lambda: RGDLoss(weighting=RunningMean(0))(LOGITS, TARGET),
        lambda: LinearRGDLoss(3, 3, weighting=RunningMean(0))(LOGITS, TARGET),
        lambda: cross_entropy(LOGITS, TARGET, weighting=RunningMean(0), state=RunningMean(0).init()),
        lambda: RGD(torch.optim.SGD([LOGITS], lr=0.1), RunningMean(0)).backward(LOGITS.sum(1)),
        lambda: rgd.jax.cross_entropy(
            jnp.zeros((2, 3)), jnp.arange(2), weighting=RunningMean(0), state=RunningMean(0).init()
        ),
    ],
    ids=["module", "linear", "function", "optimizer", "jax"],
)
def test_a_module_an_optimizer_or_a_fused_loss_refuses_it_too(step):
    with pytest.raises(Exception, match=SOUGHT):
        step()


def test_a_compiled_module_refuses_it_too():
    compiled = torch.compile(RGDLoss(weighting=RunningMean(0)), fullgraph=True)
    # torch 2.8 names no more than that there was an exception.
    with pytest.raises(Exception, match=f"Observed exception|{SOUGHT}"):
        compiled(LOGITS, TARGET)


def test_a_transformation_of_optax_refuses_it_too():
    update = rgd.optax.rgd(optax.sgd(0.1), RunningMean(0))
    params = jnp.zeros(3)
    with pytest.raises(TypeError, match=SOUGHT):
        update.update(jnp.ones((2, 3)), update.init(params), params, losses=jnp.array(LOSSES))


WRONG = [
    ({"share": np.ones(2)}, r"expected a dict of \['shares'\], got a dict of \['share'\]"),
    ({"shares": np.ones(3)}, r"expected shape \(2,\), got shape \(3,\)"),
    ({"shares": np.ones(2, int)}, "expected a real number, got an integer"),
    (np.ones(2), r"expected a dict of \['shares'\], got shape \(2,\)"),
    ((), r"expected a dict of \['shares'\], got a tuple of 0"),
]


@pytest.mark.parametrize(("state", "message"), WRONG, ids=[message for _, message in WRONG])
@pytest.mark.parametrize("front", ["numpy", "torch", "jax"])
def test_a_function_refuses_a_state_that_is_not_its_weightings(front, state, message):
    weighting, groups = rgd.GroupDRO(2, 0.1), [0, 1]
    calls = {
        "numpy": lambda: rgd.sample_weights(
            np.array(LOSSES), weighting, groups=np.array(groups), state=state
        ),
        "torch": lambda: sample_weights(
            torch.tensor(LOSSES), weighting, groups=torch.tensor(groups), state=state
        ),
        "jax": lambda: rgd.jax.sample_weights(
            jnp.array(LOSSES), weighting, groups=jnp.array(groups), state=state
        ),
    }
    with pytest.raises(ValueError, match=rf"state is not one of GroupDRO: .*weighting\.init\(\).*{message}"):
        calls[front]()
