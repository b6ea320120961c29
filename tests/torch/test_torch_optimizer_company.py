"""`rgd.torch.RGD` beside hooks, learning rate schedulers, `GradScaler`, clipping and averaging."""

import inspect
import math

import pytest
import torch
from optimizing import OPTIMIZERS, batches, gradients_of, make_model, parameters_of, per_sample, sgd, train
from rgd.torch import RGD, reweighted_mean, sample_weights
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook

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
