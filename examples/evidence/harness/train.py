"""Training of many small networks at once: one batched tensor program over seeds and grid cells.

Model `s * K + k` is seed `s` with cell `k`. Every parameter has an axis of models in front, so a layer of all
models is one batched matrix product. Data, initial parameters and the order of minibatches depend on the
seed alone: all cells of a grid, and all arms, share them.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import rgd
import torch
from rgd.torch import sample_weights
from torch import Tensor
from torch.utils._pytree import tree_map

from harness.arms import Arm, Memory, Ramp
from harness.problems import Data, Part, Problem, stack

MOMENTUM = 0.9


class Cell(NamedTuple):
    """What is tuned for every arm."""

    learning_rate: float
    weight_decay: float


class Outcome(NamedTuple):
    """What a run reached: metrics on validation and test data, and the mean of all weights it used."""

    validation: dict[str, float]
    test: dict[str, float]
    mean_weight: float
    seconds: float


def initial(sizes: Sequence[int], seeds: Sequence[int], copies: int) -> list[Tensor]:
    """Weights (M, in, out) and biases (M, 1, out) of each layer, uniform as those of `torch.nn.Linear`."""
    layers: list[list[Tensor]] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(1000 + seed)
        parameters: list[Tensor] = []
        for rows, columns in itertools.pairwise(sizes):
            bound = 1 / math.sqrt(rows)
            parameters += [
                bound * (2 * torch.rand(shape, generator=generator) - 1)
                for shape in ((rows, columns), (1, columns))
            ]
        layers.append(parameters)
    return [torch.stack(same).repeat_interleave(copies, 0) for same in zip(*layers, strict=True)]


def forward(parameters: Sequence[Tensor], inputs: Tensor, cosine: bool = False) -> Tensor:
    """Outputs (M, n, C) of inputs (M, n, d); ReLU between the layers."""
    hidden = inputs
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        hidden = torch.baddbmm(bias, hidden, weight).relu()
    if cosine:
        return torch.bmm(
            torch.nn.functional.normalize(hidden, dim=2),
            torch.nn.functional.normalize(parameters[-2], dim=1),
        )
    return torch.baddbmm(parameters[-1], hidden, parameters[-2])


def mixtures(seeds: Sequence[int], steps: int, alpha: float) -> Tensor:
    """What mixup leaves of each sample at each step, Beta(alpha, alpha), (S, steps)."""
    drawn = [np.random.default_rng([51, seed]).beta(alpha, alpha, steps) for seed in seeds]
    return torch.tensor(np.stack(drawn), dtype=torch.get_default_dtype())


def balanced(seeds: Sequence[int], groups: Tensor, batch_size: int, steps: int) -> Tensor:
    """Samples (S, steps, B) of groups (S, n), drawn with replacement, all groups with the same chance."""
    drawn: list[Tensor] = []
    for seed, own in zip(seeds, groups, strict=True):
        generator = torch.Generator().manual_seed(2000 + seed)
        chance = 1 / torch.bincount(own)[own].double()
        drawn.append(torch.multinomial(chance, steps * batch_size, replacement=True, generator=generator))
    return torch.stack(drawn).view(len(seeds), steps, batch_size)


def orders(seeds: Sequence[int], samples: int, batch_size: int, epochs: int) -> Tensor:
    """The samples of each step of each seed, (S, steps, B). What does not fill a batch waits an epoch."""
    batches = samples // batch_size
    steps: list[Tensor] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(2000 + seed)
        epoch = [torch.randperm(samples, generator=generator)[: batches * batch_size] for _ in range(epochs)]
        steps.append(torch.cat(epoch).view(-1, batch_size))
    return torch.stack(steps)


class Weigher:
    """Weights (M, B) of losses (M, B), each model's batch by itself; keeps states between batches."""

    def __init__(self, weighting: rgd.Weighting | Ramp | None, models: int) -> None:
        self.weighting = weighting
        self.state: Any = None
        if isinstance(weighting, rgd.Weighting) and weighting.stateful:
            self.state = tree_map(
                lambda leaf: torch.stack([torch.as_tensor(leaf)] * models), weighting.init()
            )

    def __call__(self, losses: Tensor, groups: Tensor, done: float = 1.0) -> Tensor:
        """`done` is the share of the steps that is over, for a weighting that changes."""
        weighting = self.weighting.at(done) if isinstance(self.weighting, Ramp) else self.weighting
        if weighting is None:
            return torch.ones_like(losses)
        if self.state is not None:
            weights, self.state = torch.vmap(
                lambda loss, group, state: sample_weights(loss, weighting, groups=group, state=state)
            )(losses, groups, self.state)
            return weights
        if weighting.pointwise:
            return sample_weights(losses, weighting)
        return torch.vmap(lambda loss: sample_weights(loss, weighting))(losses)


def train(
    problem: Problem, arm: Arm, seeds: Sequence[int], cells: Sequence[Cell], snapshots: Sequence[int] = ()
) -> dict[tuple[int, Cell], list[Outcome]]:
    """SGD with momentum 0.9 and a cosine schedule down to 0; the last step's network is measured.

    Args:
        problem: Data, network, epochs.
        arm: Loss and weighting.
        seeds: One training of each cell for each seed.
        cells: Learning rates and weight decays. Decay is added to the gradient, as `torch.optim.SGD` does.
        snapshots: Steps after which networks are measured as well; the last step always is.

    Returns:
        For each seed and cell the outcomes at the snapshots, in their order, and at the end.
    """
    begin = time.process_time()
    data = stack([problem.draw(seed) for seed in seeds])
    copies, models = len(cells), len(seeds) * len(cells)
    starts = [arm.seed(seed) for seed in seeds]
    parameters = initial((problem.features, *problem.hidden, problem.outputs), starts, copies)
    velocities = [torch.zeros_like(p) for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_()
    rate, decay = (
        torch.tensor([cell[k] for _ in seeds for cell in cells]).view(models, 1, 1) for k in (0, 1)
    )
    counts = class_counts(data.train.target, problem.outputs).repeat_interleave(copies, 0)
    class_weights = None if arm.class_weights is None else arm.class_weights(counts)
    weigher = Weigher(arm.weighting, models)
    weight_sum = torch.zeros(models, dtype=torch.float64)
    samples = data.train.target.shape[1]
    batches = orders(starts, samples, problem.batch_size, problem.epochs)
    steps = batches.shape[1]
    if arm.balance:
        batches = balanced(starts, data.train.groups, problem.batch_size, steps)
    shares = mixtures(starts, steps, arm.mixup) if arm.mixup else None
    loss_of = loss_function(problem, arm, models, samples, counts)
    seed_axis = torch.arange(len(seeds))[:, None]
    outcomes: dict[tuple[int, Cell], list[Outcome]] = {(s, c): [] for s in seeds for c in cells}
    for step in range(steps):
        chosen = batches[:, step]
        inputs, target, groups = (part[seed_axis, chosen].repeat_interleave(copies, 0) for part in data.train)
        index = chosen.repeat_interleave(copies, 0)
        if shares is None:
            losses = loss_of(forward(parameters, inputs, arm.cosine), target, index)
        else:
            # Each sample is mixed with its neighbour in the batch, whose order is random.
            share = shares[:, step].repeat_interleave(copies)[:, None]
            mixed = share[..., None] * inputs + (1 - share[..., None]) * inputs.roll(1, 1)
            outputs = forward(parameters, mixed, arm.cosine)
            own, neighbour = (loss_of(outputs, labels, index) for labels in (target, target.roll(1, 1)))
            losses = share * own + (1 - share) * neighbour
        mass: Tensor | float = float(problem.batch_size)
        if class_weights is not None:
            of_sample = class_weights.gather(1, target)
            losses, mass = of_sample * losses, of_sample.sum(1, keepdim=True)
        weights = weigher(losses.detach(), groups, step / steps)
        weight_sum += weights.mean(1)
        # A layer of cosines has no bias: its gradient is 0.
        objective = (weights * losses / mass).sum()
        gradients = torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True)
        speed = rate * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.no_grad():
            for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
                velocity.mul_(MOMENTUM).add_(torch.addcmul(gradient, decay, parameter))
                parameter.addcmul_(speed, velocity, value=-1)
        if step + 1 in snapshots or step + 1 == steps:
            share = (time.process_time() - begin) / models
            mean_weights = (weight_sum / (step + 1)).tolist()
            for s, seed in enumerate(seeds):
                measured = measure(problem, parameters, data, s, copies, arm.cosine)
                for k, cell in enumerate(cells):
                    validation, test = ({m: v[k] for m, v in part.items()} for part in measured)
                    outcome = Outcome(validation, test, mean_weights[s * copies + k], share)
                    outcomes[seed, cell].append(outcome)
    return outcomes


def loss_function(
    problem: Problem, arm: Arm, models: int, samples: int, counts: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Losses (M, B) of outputs (M, B, C), targets (M, B) and the samples' numbers (M, B)."""
    loss = arm.loss
    if loss is None:
        return lambda outputs, target, index: problem.losses(outputs, target)
    if isinstance(loss, Memory):
        return loss.begin(models, samples, problem.outputs)
    return lambda outputs, target, index: loss(outputs, target, counts)


@torch.no_grad()
def measure(  # noqa: PLR0917
    problem: Problem, parameters: Sequence[Tensor], data: Data, s: int, copies: int, cosine: bool
) -> list[dict[str, list[float]]]:
    """Metrics on validation and test data of the networks of seed number `s`."""
    own = [p[s * copies : (s + 1) * copies] for p in parameters]
    validation, test = (Part(*(x[s] for x in part)) for part in (data.validation, data.test))
    outputs = [forward(own, p.inputs.expand(copies, *p.inputs.shape), cosine) for p in (validation, test)]
    calibration = (outputs[0], validation)
    return [
        {name: value.tolist() for name, value in problem.metrics(out, part, calibration).items()}
        for out, part in zip(outputs, (validation, test), strict=True)
    ]


def class_counts(target: Tensor, classes: int) -> Tensor:
    """How many samples of each class the targets (S, n) hold, (S, C); empty where they are no classes."""
    if target.is_floating_point():
        return torch.zeros(len(target), 0)
    rows = [np.bincount(row, minlength=classes) for row in target.numpy()]
    return torch.tensor(np.stack(rows), dtype=torch.get_default_dtype())
