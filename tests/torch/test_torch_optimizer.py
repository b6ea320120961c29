"""`rgd.torch.RGD` against the wrapped optimizer stepping on gradients composed from torch operations."""

import copy
import io
import math
import pickle

import pytest
import rgd
import torch
from optimizing import OPTIMIZERS, batches, gradients_of, make_model, parameters_of, per_sample, sgd, train
from rgd.torch import RGD, RGDLoss, reweighted_mean
from torch.nn import functional as F
from torch.optim import lr_scheduler


def composed(losses, tau=1.0):
    """The objective of Algorithm 1, from torch operations."""
    weights = torch.exp(losses.detach().clamp(max=tau) / (tau + 1))
    return (weights * losses).mean()


# --- the step ---


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_the_wrapped_optimizer_on_the_composed_objective(name):
    model, twin = make_model(), make_model()
    optimizer = RGD(OPTIMIZERS[name](model.parameters()), tau=0.7)
    plain = OPTIMIZERS[name](twin.parameters())
    for inputs, target in batches():
        optimizer.zero_grad()
        optimizer.backward(per_sample(model, inputs, target))
        plain.zero_grad()
        composed(per_sample(twin, inputs, target), tau=0.7).backward()
        for mine, other in zip(gradients_of(model), gradients_of(twin), strict=True):
            # A gradient is a sum of 12 products; weights of both sides are right to 4 ulp.
            torch.testing.assert_close(mine, other, rtol=16 * 2**-23, atol=16 * 2**-23)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad.copy_(q.grad)  # so that Adam's division by small moments does not magnify the last bit
        optimizer.step()
        plain.step()
        for mine, other in zip(parameters_of(model), parameters_of(twin), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize(
    "weighting", [rgd.KL(2.0), rgd.KL(0.5, scale=0.0), rgd.KL(normalize=True), rgd.KLBall(0.1)], ids=str
)
def test_the_objective_is_the_reweighted_mean_of_any_weighting(weighting):
    model = make_model()
    optimizer = sgd(model, weighting=weighting)
    losses = per_sample(model, *next(batches()))
    assert torch.equal(optimizer.objective(losses), reweighted_mean(losses, weighting))


def test_backward_returns_the_objective_without_grad():
    model = make_model()
    optimizer = sgd(model)
    losses = per_sample(model, *next(batches()))
    objective = optimizer.backward(losses)
    assert not objective.requires_grad
    assert torch.equal(objective, reweighted_mean(losses.detach()))


def test_backward_keeps_the_graph_when_asked():
    model = make_model()
    optimizer = sgd(model)
    losses = per_sample(model, *next(batches()))
    optimizer.backward(losses, retain_graph=True)
    once = gradients_of(model)
    optimizer.backward(losses, retain_graph=False)
    for gradient, twice in zip(once, gradients_of(model), strict=True):
        assert torch.equal(2 * gradient, twice)


def test_backward_creates_a_graph_of_the_gradient_when_asked():
    x = torch.tensor([3.0], requires_grad=True)
    optimizer = RGD(torch.optim.SGD([x], lr=0.1), weighting=rgd.KL(scale=0.0))
    with pytest.warns(UserWarning, match="create_graph=True"):
        optimizer.backward(x**3, create_graph=True)
    (second,) = torch.autograd.grad(x.grad, x)
    assert second.item() == 18.0
    x.grad = None


def test_tau_defaults_to_one():
    assert sgd(make_model()).weighting == rgd.KL(tau=1.0)


def test_the_weighting_may_change_during_training():
    model = make_model()
    optimizer = sgd(model)
    losses = per_sample(model, *next(batches()))
    optimizer.weighting = rgd.KL(tau=3.0)
    assert torch.equal(optimizer.objective(losses), reweighted_mean(losses, tau=3.0))


def test_rgd_over_losses_equals_rgd_loss_with_the_bare_optimizer():
    model, twin = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    optimizer, bare = sgd(model), torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    criterion = RGDLoss()
    for inputs, target in batches(dtype=torch.float64):
        optimizer.zero_grad()
        optimizer.backward(per_sample(model, inputs, target))
        optimizer.step()
        bare.zero_grad()
        criterion(twin(inputs), target).backward()
        bare.step()
    for mine, other in zip(parameters_of(model), parameters_of(twin), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


# --- closures ---


def test_lbfgs_evaluates_the_closure_many_times_and_descends():
    model = make_model(dtype=torch.float64)
    optimizer = RGD(
        torch.optim.LBFGS(model.parameters(), max_iter=30, line_search_fn="strong_wolfe"), tau=1.0
    )
    inputs, target = next(batches(dtype=torch.float64))
    evaluations = []

    def closure():
        evaluations.append(1)
        return per_sample(model, inputs, target)

    first = optimizer.step(closure)
    assert len(evaluations) > 5
    with torch.no_grad():
        assert optimizer.objective(per_sample(model, inputs, target)) < 0.1 * first


def test_lbfgs_step_equals_lbfgs_on_the_composed_objective():
    model, twin = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    optimizer = RGD(torch.optim.LBFGS(model.parameters(), max_iter=3))
    plain = torch.optim.LBFGS(twin.parameters(), max_iter=3)
    inputs, target = next(batches(dtype=torch.float64))

    def scalar_closure():
        plain.zero_grad()
        objective = composed(per_sample(twin, inputs, target))
        objective.backward()
        return objective.detach()

    mine = optimizer.step(lambda: per_sample(model, inputs, target))
    theirs = plain.step(scalar_closure)
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=0)
    for p, q in zip(parameters_of(model), parameters_of(twin), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("clears", [False, True], ids=["leaves the gradients alone", "clears the gradients"])
def test_a_closure_may_but_need_not_clear_the_gradients(clears):
    model, twin = make_model(), make_model()
    optimizer, other = sgd(model), sgd(twin)
    inputs, target = next(batches())

    def closure():
        if clears:
            optimizer.zero_grad()
        return per_sample(model, inputs, target)

    model[0].weight.grad = torch.full_like(model[0].weight, 1e3)
    objective = optimizer.step(closure)
    assert torch.equal(objective, other.backward(per_sample(twin, inputs, target)))
    other.step()
    for p, q in zip(parameters_of(model), parameters_of(twin), strict=True):
        assert torch.equal(p, q)


def test_a_closure_runs_with_grad_enabled_inside_no_grad():
    model = make_model()
    inputs, target = next(batches())
    with torch.no_grad():
        sgd(model).step(lambda: per_sample(model, inputs, target))


@pytest.mark.parametrize("returned", [0.5, torch.tensor(0.5), torch.tensor(0.5, requires_grad=True)], ids=str)
def test_a_closure_that_returns_a_scalar_is_refused_with_a_hint(returned):
    with pytest.raises(ValueError, match=r'closure returned one number.*reduction="none".*RGDLoss'):
        sgd(make_model()).step(lambda: returned)


def test_a_closure_that_returns_nothing_without_a_backward_is_refused():
    with pytest.raises(TypeError, match=r"the closure returned None, and there has been no backward"):
        sgd(make_model()).step(lambda: None)


def test_a_closure_that_returns_losses_without_grad_is_refused():
    with pytest.raises(RuntimeError, match="losses does not require grad"):
        sgd(make_model()).step(lambda: torch.ones(3))


def test_a_closure_whose_losses_do_not_depend_on_the_parameters_is_refused():
    other = make_model(1)
    with pytest.raises(RuntimeError, match="no parameter of this optimizer has a gradient"):
        sgd(make_model()).step(lambda: per_sample(other, *next(batches())))


# --- it is the wrapped optimizer, seen through a window ---


def test_rgd_is_a_torch_optimizer():
    assert isinstance(sgd(make_model()), torch.optim.Optimizer)


def test_groups_state_and_defaults_are_the_wrapped_optimizers_own():
    model = make_model()
    optimizer = sgd(model)
    inner = optimizer.optimizer
    train(model, optimizer, 1)
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(inner, name)
    inner.load_state_dict(inner.state_dict())  # makes new groups and a new state
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(inner, name)
    optimizer.param_groups[0]["lr"] = 0.5
    assert inner.param_groups[0]["lr"] == 0.5
    optimizer.state = new = {}
    assert inner.state is new


def test_a_group_added_to_the_wrapper_is_stepped():
    first, second = make_model(0), make_model(1)
    optimizer = sgd(first)
    optimizer.add_param_group({"params": second.parameters(), "lr": 0.01})
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [0.1, 0.01]
    before = parameters_of(second)
    inputs, target = next(batches())
    optimizer.backward(per_sample(second, inputs, target))
    optimizer.step()
    assert not torch.equal(before[0], parameters_of(second)[0])


def test_zero_grad_clears_or_zeroes():
    model = make_model()
    optimizer = sgd(model)
    optimizer.backward(per_sample(model, *next(batches())))
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_repr_names_the_weighting_and_the_wrapped_optimizer():
    text = repr(sgd(make_model(), tau=2.0))
    assert "RGD" in text
    assert "KL(tau=2.0" in text
    assert "SGD" in text
    assert "lr: 0.1" in text


def test_attributes_of_the_wrapped_optimizer_are_found():
    class WithModes(torch.optim.SGD):
        def train(self):
            return "training"

    optimizer = RGD(WithModes(make_model().parameters(), lr=0.1))
    assert optimizer.train() == "training"
    assert not hasattr(optimizer, "eval")
    with pytest.raises(AttributeError, match="no_such_thing"):
        optimizer.no_such_thing  # noqa: B018


# --- checkpoints and copies ---


@pytest.mark.parametrize("saver", ["wrapped", "bare"])
@pytest.mark.parametrize("loader", ["wrapped", "bare"])
def test_checkpoints_of_wrapper_and_wrapped_load_into_each_other(saver, loader):
    model, twin = make_model(), make_model()
    optimizer = RGD(torch.optim.AdamW(model.parameters(), lr=0.01))
    train(model, optimizer)
    checkpoint = io.BytesIO()
    source = optimizer if saver == "wrapped" else optimizer.optimizer
    torch.save({"model": model.state_dict(), "optimizer": source.state_dict()}, checkpoint)
    checkpoint.seek(0)
    loaded = torch.load(checkpoint, weights_only=True)

    twin.load_state_dict(loaded["model"])
    resumed = RGD(torch.optim.AdamW(twin.parameters(), lr=1.0))
    (resumed if loader == "wrapped" else resumed.optimizer).load_state_dict(loaded["optimizer"])
    train(model, optimizer)
    train(twin, resumed)
    for p, q in zip(parameters_of(model), parameters_of(twin), strict=True):
        assert torch.equal(p, q)


def test_pickled_wrapper_keeps_weighting_groups_and_state():
    model = make_model()
    optimizer = sgd(model, tau=2.0)
    train(model, optimizer)
    twin, restored = pickle.loads(pickle.dumps((model, optimizer)))
    assert restored.weighting == rgd.KL(2.0)
    assert restored.param_groups[0]["params"][0] is twin[0].weight
    train(model, optimizer)
    train(twin, restored)
    assert torch.equal(model[0].weight, twin[0].weight)


def test_deepcopied_wrapper_trains_the_copied_model_alone():
    model = make_model()
    optimizer = sgd(model)
    lr_scheduler.StepLR(optimizer, 1)  # which leaves a patched step on the wrapper
    train(model, optimizer)
    before = parameters_of(model)
    twin, other = copy.deepcopy((model, optimizer))
    train(twin, other)
    assert torch.equal(before[0], model[0].weight)
    assert not torch.equal(before[0], twin[0].weight)


def test_distributed_checkpoint_initialises_and_saves_the_wrapper():
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = make_model()
    optimizer = RGD(torch.optim.AdamW(model.parameters()))
    saved = state_dict.get_optimizer_state_dict(model, optimizer)
    assert "0.weight" in saved["state"]
    assert set(saved["state"]["0.weight"]) == {"step", "exp_avg", "exp_avg_sq"}


def test_plain_training_through_the_wrapper_is_warned_of_once():
    model = make_model()
    optimizer = sgd(model)
    inputs, target = next(batches())
    F.cross_entropy(model(inputs), target).backward()
    with pytest.warns(UserWarning, match="no objective was asked for: .* plain training"):
        optimizer.step()
    optimizer.step()  # a second warning would be an error here
    other = make_model()
    asked = sgd(other)
    asked.backward(per_sample(other, inputs, target))
    asked.step()


# --- bad input ---


def test_a_step_before_backward_that_would_be_lost_is_refused():
    model = make_model()
    optimizer = sgd(model)
    optimizer.objective(per_sample(model, *next(batches())))
    with pytest.raises(RuntimeError, match=r"the step would be lost: call optimizer\.backward"):
        optimizer.step()


def test_a_step_after_which_the_gradients_were_cleared_is_as_idle_as_torchs():
    model = make_model()
    optimizer = sgd(model)
    optimizer.backward(per_sample(model, *next(batches())))
    optimizer.step()
    optimizer.zero_grad()
    before = parameters_of(model)
    optimizer.step()
    assert all(map(torch.equal, before, parameters_of(model)))


def test_losses_of_another_graph_are_refused_at_the_step():
    optimizer, other = sgd(make_model(0)), make_model(1)
    optimizer.backward(per_sample(other, *next(batches())))
    with pytest.raises(RuntimeError, match="computed from the parameters that the optimizer was given"):
        optimizer.step()


def test_a_step_without_any_objective_is_as_idle_as_torchs():
    model = make_model()
    before = parameters_of(model)
    sgd(model).step()
    assert torch.equal(before[0], model[0].weight)


def test_an_objective_computed_without_grad_asks_for_no_backward():
    model = make_model()
    optimizer = sgd(model)
    with torch.no_grad():
        optimizer.objective(per_sample(model, *next(batches())))
    optimizer.step()


def test_losses_without_grad_are_refused_by_backward():
    with pytest.raises(RuntimeError, match="losses does not require grad"):
        sgd(make_model()).backward(torch.ones(3))


@pytest.mark.parametrize("method", ["objective", "backward"])
def test_scalar_losses_are_refused_with_a_hint(method):
    model = make_model()
    loss = per_sample(model, *next(batches())).mean()
    with pytest.raises(ValueError, match='reduction="none"'):
        getattr(sgd(model), method)(loss)


def test_a_nested_wrapper_is_refused():
    with pytest.raises(ValueError, match="weigh every loss twice"):
        RGD(sgd(make_model()))


def test_a_wrapper_within_another_wrapper_is_refused():
    class Accelerated(torch.optim.SGD):
        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups[0]["params"])
            self.optimizer = optimizer

    with pytest.raises(ValueError, match="weigh every loss twice"):
        RGD(Accelerated(sgd(make_model())))


def test_tau_and_weighting_together_are_refused():
    with pytest.raises(ValueError, match="give tau or weighting, not both"):
        sgd(make_model(), tau=1.0, weighting=rgd.KL())


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_a_tau_that_is_not_positive_is_refused(tau):
    with pytest.raises(ValueError, match="tau must be a positive number"):
        sgd(make_model(), tau=tau)


@pytest.mark.parametrize(
    ("given", "named"),
    [(torch.optim.SGD, "SGD"), (lambda: 0, "function"), (make_model(), "Sequential"), (None, "NoneType")],
)
def test_what_is_no_optimizer_is_refused(given, named):
    with pytest.raises(TypeError, match=f"optimizer must be a torch.optim.Optimizer.*{named}"):
        RGD(given)
