"""MAML of many models at once: what is learnt, the inner steps, the meta-steps over weighted tasks.

A meta-step adapts the parameters p to each task t of a meta-batch by gradient steps, and descends on
mean_t w_t l_t(p_t), where p_t are the adapted parameters, l_t the loss on the task's other points and w_t the
weight that the arm gives to l_t.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import trange

from harness.arms import Arm
from harness.few_shot import Tasks
from harness.problems import worst_tenth
from harness.train import Cell, Outcome, Weigher

TRAIN, VALIDATION, TEST = range(3)
LONG = 2000  # meta-steps from which on they have a progress bar of their own
NOT_IN_KEY = ("parts", "at_once", "device")

# Tasks, given the part and how many.
Draw = Callable[[int, int], Tasks]


@dataclasses.dataclass(frozen=True, eq=False)
class MetaProblem:
    """What tasks are drawn from, what learns them, and how."""

    name: str
    steps: int
    inner_rate: float
    tasks: int = 16
    inner_steps: int = 1
    first_order: bool = False
    validation: int = 200
    test: int = 300
    at_once: int = 20  # tasks that are measured together, to save memory
    device: str = "cpu"
    select: str = "mean_loss"

    def key(self) -> str:
        """What decides the result of a run, as text."""
        return str([getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_IN_KEY])

    def drawer(self, seed: int) -> Draw:
        """Gives the tasks of a seed, validation and test tasks first."""
        raise NotImplementedError

    def initial(self, seeds: Sequence[int], copies: int) -> list[Tensor]:
        """Parameters, with an axis of models in front."""
        raise NotImplementedError

    def outputs(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        """Of one network, for points (n, ...)."""
        raise NotImplementedError

    def scores(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The loss of a task, and what else is measured."""
        raise NotImplementedError


def adapted(problem: MetaProblem, parameters: Sequence[Tensor], task: Tasks) -> tuple[Tensor, ...]:
    """The parameters of one network after the inner steps on a task's points."""

    def loss(moved: Sequence[Tensor]) -> Tensor:
        return problem.scores(problem.outputs(moved, task.x), task.y)["loss"]

    moved = tuple(parameters)
    for _ in range(problem.inner_steps):
        gradients = torch.func.grad(loss)(moved)
        if problem.first_order:
            gradients = tuple(g.detach() for g in gradients)
        moved = tuple(p - problem.inner_rate * g for p, g in zip(moved, gradients, strict=True))
    return moved


def task_scores(problem: MetaProblem, parameters: Sequence[Tensor], tasks: Tasks) -> dict[str, Tensor]:
    """Scores (M, T), after adaptation, of the networks of M models on their T tasks each."""
    tasks = Tasks(*(values.to(problem.device) for values in tasks))

    def of_one(parameters: Sequence[Tensor], task: Tasks) -> dict[str, Tensor]:
        moved = adapted(problem, parameters, task)
        return problem.scores(problem.outputs(moved, task.x_query), task.y_query)

    return torch.vmap(torch.vmap(of_one, in_dims=(None, 0)))(parameters, tasks)


def meta_train(
    problem: MetaProblem,
    arm: Arm,
    seeds: Sequence[int],
    cells: Sequence[Cell],
    snapshots: Sequence[int] = (),
) -> dict[tuple[int, Cell], list[Outcome]]:
    """MAML of all seeds and cells at once; see `harness.train.train`."""
    clock = time.process_time if problem.device == "cpu" else time.perf_counter
    begin = clock()
    copies, models = len(cells), len(seeds) * len(cells)
    drawers = [problem.drawer(seed) for seed in seeds]

    def of_every_seed(part: int, tasks: int) -> Tasks:
        drawn = [draw(part, tasks) for draw in drawers]
        return Tasks(*(torch.stack(same).repeat_interleave(copies, 0) for same in zip(*drawn, strict=True)))

    validation, test = of_every_seed(VALIDATION, problem.validation), of_every_seed(TEST, problem.test)
    starts = [arm.seed(seed) for seed in seeds]
    parameters = [p.to(problem.device).requires_grad_() for p in problem.initial(starts, copies)]
    rate, decay = (
        torch.tensor([cell[k] for _ in seeds for cell in cells], device=problem.device) for k in (0, 1)
    )
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    weigher, weight_sum = Weigher(arm.weighting, models), torch.zeros(models, dtype=torch.float64)
    for step in trange(problem.steps, desc="meta-steps", leave=False, disable=problem.steps < LONG):
        losses = task_scores(problem, parameters, of_every_seed(TRAIN, problem.tasks))["loss"]
        weights = weigher(losses.detach(), torch.zeros_like(losses, dtype=torch.long))
        weight_sum += weights.mean(1).cpu()
        gradients = torch.autograd.grad((weights * losses).mean(1).sum(), parameters)
        speed = rate * (0.5 + 0.5 * math.cos(math.pi * step / problem.steps))
        with torch.no_grad():
            for p, m, v, gradient in zip(parameters, first, second, gradients, strict=True):
                of_model = (models, *[1] * (p.ndim - 1))
                g = torch.addcmul(gradient, decay.view(of_model), p)
                m.lerp_(g, 0.1)
                v.lerp_(g.square(), 0.001)
                corrected = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                p.sub_(speed.view(of_model) * m / (1 - 0.9 ** (step + 1)) / corrected)
    measured = [measure(problem, parameters, tasks) for tasks in (validation, test)]
    share, mean_weights = (clock() - begin) / models, (weight_sum / problem.steps).tolist()
    outcomes: dict[tuple[int, Cell], list[Outcome]] = {}
    for s, seed in enumerate(seeds):
        for k, cell in enumerate(cells):
            model = s * copies + k
            parts = ({name: values[model] for name, values in part.items()} for part in measured)
            outcomes[seed, cell] = [Outcome(*parts, mean_weights[model], share)]
    return outcomes


@torch.no_grad()
def measure(problem: MetaProblem, parameters: Sequence[Tensor], tasks: Tasks) -> dict[str, list[float]]:
    """Means over the tasks and over the worst tenth of them, of each model."""
    blocks = zip(*(part.split(problem.at_once, 1) for part in tasks), strict=True)
    found = [task_scores(problem, parameters, Tasks(*block)) for block in blocks]
    scores = {name: torch.cat([block[name] for block in found], 1) for name in found[0]}
    metrics = {"mean_loss": scores["loss"].mean(1), "worst_tenth": worst_tenth(scores["loss"])}
    if "accuracy" in scores:
        metrics["accuracy"] = scores["accuracy"].mean(1)
        metrics["worst_tenth_accuracy"] = -worst_tenth(-scores["accuracy"])
    return {name: values.tolist() for name, values in metrics.items()}
