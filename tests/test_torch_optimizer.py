"""`rgd.torch.RGD` against the wrapped optimizer stepping on gradients composed from torch operations."""

import copy
import inspect
import io
import math
import pickle

import pytest
import rgd
import torch
from rgd.torch import RGD, RGDLoss, reweighted_mean, sample_weights
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook

STEPS = 4

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": torch.optim.RMSprop,
    "Rprop": torch.optim.Rprop,
}


def make_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batches(count=STEPS, size=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield (
            torch.randn(size, 5, generator=generator, dtype=dtype),
            torch.randint(3, (size,), generator=generator),
        )


def per_sample(model, inputs, target):
    return F.cross_entropy(model(inputs), target, reduction="none")


def composed(losses, tau=1.0):
    """The objective of Algorithm 1, from torch operations."""
    weights = torch.exp(losses.detach().clamp(max=tau) / (tau + 1))
    return (weights * losses).mean()


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def gradients_of(model):
    return [p.grad.clone() for p in model.parameters()]


def sgd(model, **settings):
    return RGD(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **settings)


def train(model, optimizer, count=STEPS):
    for inputs, target in batches(count):
        optimizer.zero_grad()
        optimizer.backward(per_sample(model, inputs, target))
        optimizer.step()


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


# --- hooks ---


@pytest.mark.parametrize("register_on", ["wrapper", "wrapped"])
def test_step_hooks_run_once_a_step_wherever_registered(register_on):
    model = make_model()
    optimizer = sgd(model)
    target = optimizer if register_on == "wrapper" else optimizer.optimizer
    calls = []
    target.register_step_pre_hook(lambda opt, args, kwargs: calls.append(("pre", opt)))
    handle = target.register_step_post_hook(lambda opt, args, kwargs: calls.append(("post", opt)))
    train(model, optimizer, 1)
    assert calls == [("pre", optimizer.optimizer), ("post", optimizer.optimizer)]
    handle.remove()
    train(model, optimizer, 1)
    assert len(calls) == 3


def test_global_step_hooks_run_once_a_step():
    model = make_model()
    optimizer = sgd(model)
    calls = []
    hook = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    try:
        train(model, optimizer, 1)
    finally:
        hook.remove()
    assert len(calls) == 1


def test_state_dict_hooks_run():
    optimizer = sgd(make_model())
    calls = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("loaded"))
    saved = optimizer.state_dict()
    assert saved["note"] == 1
    optimizer.load_state_dict(saved)
    assert calls == ["save", "load", "loaded"]


# --- the company it keeps ---

EPOCHS = 6
SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, EPOCHS),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=EPOCHS + 1),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, 0.1, total_iters=2),
            lr_scheduler.CosineAnnealingLR(o, 4),
        ],
        milestones=[2],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_tried():
    public = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value)
        and issubclass(value, lr_scheduler.LRScheduler)
        and value is not lr_scheduler.LRScheduler
        and not name.startswith("_")
    }
    assert public <= set(SCHEDULERS)


# SequentialLR of torch 2.8 draws this on itself.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.filterwarnings("ignore:RGD makes a step")  # rates are set whatever the gradients are
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_same_rates_as_on_the_bare_optimizer(name):
    rates = []
    for wrap in (RGD, lambda optimizer: optimizer):
        model = make_model()
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for inputs, target in batches(EPOCHS):
            optimizer.zero_grad()
            reweighted_mean(per_sample(model, inputs, target)).backward()
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append(optimizer.param_groups[0]["lr"])
        rates.append(seen)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1


def test_a_scheduler_made_before_wrapping_sees_the_steps():
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(inner, 1)
    train(model, RGD(inner), 1)
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.01)]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "AdamW fused"])
def test_grad_scaler_scales_and_unscales(name):
    model, twin = make_model(), make_model()
    optimizer, plain = RGD(OPTIMIZERS[name](model.parameters())), RGD(OPTIMIZERS[name](twin.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for inputs, target in batches():
        optimizer.zero_grad()
        scaler.scale(optimizer.objective(per_sample(model, inputs, target))).backward()
        scaler.step(optimizer)
        scaler.update()
        plain.zero_grad()
        plain.backward(per_sample(twin, inputs, target))
        plain.step()
    for p, q in zip(parameters_of(model), parameters_of(twin), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("name", ["SGD", "AdamW fused"])
def test_grad_scaler_skips_a_step_with_an_infinite_gradient(name):
    model = make_model()
    optimizer = RGD(OPTIMIZERS[name](model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = parameters_of(model)
    inputs, target = next(batches())
    scaler.scale(optimizer.objective(per_sample(model, inputs, target))).backward()
    model[0].weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    for p, q in zip(before, parameters_of(model), strict=True):
        assert torch.equal(p, q)
    optimizer.zero_grad()
    scaler.scale(optimizer.objective(per_sample(model, inputs, target))).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before[0], parameters_of(model)[0])


def test_clipped_gradients_are_what_is_stepped_on():
    model = make_model()
    optimizer = RGD(torch.optim.SGD(model.parameters(), lr=1.0))
    before = parameters_of(model)
    optimizer.backward(per_sample(model, *next(batches())))
    nn.utils.clip_grad_norm_((p for g in optimizer.param_groups for p in g["params"]), 0.01)
    optimizer.step()
    moved = torch.cat([(p - q).flatten() for p, q in zip(before, parameters_of(model), strict=True)])
    # Coordinates below 1 are known to 2^-24 each, and there are 75.
    assert moved.norm().item() == pytest.approx(0.01, abs=75**0.5 * 2**-24)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulated_gradients_equal_those_of_the_large_batch(parts):
    model, twin = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    optimizer, whole = sgd(model), sgd(twin)
    inputs, target = next(batches(dtype=torch.float64))
    whole.backward(per_sample(twin, inputs, target))
    for some_inputs, some_target in zip(inputs.chunk(parts), target.chunk(parts), strict=True):
        (optimizer.objective(per_sample(model, some_inputs, some_target)) / parts).backward()
    for mine, other in zip(gradients_of(model), gradients_of(twin), strict=True):
        # Both are sums of 12 products, added in another order.
        torch.testing.assert_close(mine, other, rtol=12 * 2**-52, atol=12 * 2**-52)


def test_swa_averages_a_model_trained_by_the_wrapper():
    model = make_model()
    optimizer = sgd(model)
    averaged = swa_utils.AveragedModel(model)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(4):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
        total = [t + p for t, p in zip(total, parameters_of(model), strict=True)]
    for t, p in zip(total, averaged.module.parameters(), strict=True):
        torch.testing.assert_close(t / 4, p.detach(), rtol=8 * 2**-23, atol=8 * 2**-23)


def test_multi_dimensional_losses_are_weighed_one_by_one():
    x = torch.tensor([[0.0, 2.0], [0.5, 9.0]], requires_grad=True)
    optimizer = RGD(torch.optim.SGD([x], lr=1.0))
    optimizer.backward(x * 1.0)
    assert torch.equal(x.grad, sample_weights(x.detach()) / 4)


# --- bad input ---


def test_a_step_before_backward_that_would_be_lost_is_refused():
    model = make_model()
    optimizer = sgd(model)
    optimizer.objective(per_sample(model, *next(batches())))
    with pytest.raises(RuntimeError, match=r"the step would be lost: call optimizer\.backward"):
        optimizer.step()


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
