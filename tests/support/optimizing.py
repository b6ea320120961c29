"""Small trainings for the tests of `RGD`."""

import torch
from rgd.torch import RGD
from torch import nn
from torch.nn import functional as F

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
