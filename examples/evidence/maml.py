"""Meta-learning: RGD over the losses of the tasks of a meta-batch, on sinusoids.

Asked: what does weighting the tasks by their loss after adaptation do to the mean error over test tasks and
to the error of the worst tenth of them?

Arms: MAML; MAML with RGD over the tasks (`rgd.KL(tau=1)` and `rgd.KL(tau=3)`); with `rgd.CVaR(0.5)`. Controls
for tau = 3: weights divided by their mean over the meta-batch, plain MAML times the mean weight, the opposite
sign. Each is compared with plain MAML.

Protocol: as Finn et al. (ICML 2017, section 5.1): a task is a sine of amplitude 0.1 to 5 and phase 0 to pi on
[-5, 5], 10 points to adapt to and 10 points to measure the squared error; one step of adaptation at rate
0.01, differentiated through. Smaller than theirs: two hidden layers of 32, 16 tasks a meta-batch, 500
meta-steps of Adam with a cosine schedule; the last step's network is measured on 300 test tasks. Adam's
learning rate and weight decay (added to the gradient) are chosen for every arm by the mean loss over 200
validation tasks and 12 seeds, and lie inside their grid. Tasks and initial network depend on the seed alone.

Run it with `make evidence ROW=maml`, or `python examples/evidence/maml.py --full`.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import rgd
import torch
from harness import Arm, Cell, Grid, Outcome, Result, Row, Session, Table, main
from harness.arms import mean_one, opposite_sign, times_mean_weight
from harness.pictures import BLUE, GREEN, GREY, ORANGE, PURPLE, pyplot, save
from harness.problems import worst_tenth
from harness.train import Weigher, initial
from torch import Tensor

SHOTS, HIDDEN, TASKS, STEPS, INNER_RATE = 10, 32, 16, 500, 0.01
VALIDATION, TEST = 200, 300
SIZES = (1, HIDDEN, HIDDEN, 1)
PLAIN, RGD = "MAML", "RGD, tau 3"
HERE = "sinusoids, 10 shots"


class Tasks(NamedTuple):
    """Points to adapt to and points to measure at, each (..., T, SHOTS, 1)."""

    x: Tensor
    y: Tensor
    x_query: Tensor
    y_query: Tensor


def draw(tasks: int, generator: torch.Generator) -> Tasks:
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(tasks, 2 * SHOTS, 1, generator=generator) - 5
    y = amplitude * torch.sin(x + phase)
    return Tasks(x[:, :SHOTS], y[:, :SHOTS], x[:, SHOTS:], y[:, SHOTS:])


def network(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        x = (x @ weight + bias).relu()
    return x @ parameters[-2] + parameters[-1]


def error(parameters: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (network(parameters, x) - y).square().mean()


def adapted_error(parameters: Sequence[Tensor], task: Tasks) -> Tensor:
    """The squared error of a task after one step of adaptation to its points."""
    gradients = torch.func.grad(error)(tuple(parameters), task.x, task.y)
    moved = [p - INNER_RATE * g for p, g in zip(parameters, gradients, strict=True)]
    return error(moved, task.x_query, task.y_query)


# Losses (M, T) of the networks of M models on their T tasks each.
task_losses = torch.vmap(torch.vmap(adapted_error, in_dims=(None, 0)))


@dataclasses.dataclass(frozen=True)
class Sinusoids:
    """The problem, as `sweep` needs it."""

    name: str = HERE
    steps: int = STEPS
    select: str = "mean_loss"

    def key(self) -> str:
        return f"{self.name} {SIZES} {TASKS} {self.steps} {INNER_RATE} {VALIDATION} {TEST}"


def meta_train(
    problem: Sinusoids, arm: Arm, seeds: Sequence[int], cells: Sequence[Cell], snapshots: Sequence[int] = ()
) -> dict[tuple[int, Cell], list[Outcome]]:
    """MAML of all seeds and cells at once; see `harness.train.train`."""
    begin = time.process_time()
    copies, models = len(cells), len(seeds) * len(cells)
    generators = [torch.Generator().manual_seed(4000 + seed) for seed in seeds]

    def of_every_seed(tasks: int) -> Tasks:
        drawn = [draw(tasks, generator) for generator in generators]
        return Tasks(*(torch.stack(same).repeat_interleave(copies, 0) for same in zip(*drawn, strict=True)))

    validation, test = of_every_seed(VALIDATION), of_every_seed(TEST)
    parameters = [p.requires_grad_() for p in initial(SIZES, seeds, copies)]
    rate, decay = (
        torch.tensor([cell[k] for _ in seeds for cell in cells]).view(models, 1, 1) for k in (0, 1)
    )
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    weigher, weight_sum = Weigher(arm.weighting, models), torch.zeros(models, dtype=torch.float64)
    for step in range(problem.steps):
        losses = task_losses(parameters, of_every_seed(TASKS))
        weights = weigher(losses.detach(), torch.zeros_like(losses, dtype=torch.long))
        weight_sum += weights.mean(1)
        gradients = torch.autograd.grad((weights * losses).mean(1).sum(), parameters)
        speed = rate * (0.5 + 0.5 * math.cos(math.pi * step / problem.steps))
        with torch.no_grad():
            for p, m, v, gradient in zip(parameters, first, second, gradients, strict=True):
                g = torch.addcmul(gradient, decay, p)
                m.lerp_(g, 0.1)
                v.lerp_(g.square(), 0.001)
                corrected = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                p.sub_(speed * m / (1 - 0.9 ** (step + 1)) / corrected)
    measured = [measure(parameters, tasks) for tasks in (validation, test)]
    share, mean_weights = (time.process_time() - begin) / models, (weight_sum / problem.steps).tolist()
    outcomes: dict[tuple[int, Cell], list[Outcome]] = {}
    for s, seed in enumerate(seeds):
        for k, cell in enumerate(cells):
            model = s * copies + k
            parts = ({name: values[model] for name, values in part.items()} for part in measured)
            outcomes[seed, cell] = [Outcome(*parts, mean_weights[model], share)]
    return outcomes


@torch.no_grad()
def measure(parameters: Sequence[Tensor], tasks: Tasks) -> dict[str, list[float]]:
    """Mean error over the tasks and of the worst tenth, of each model; in blocks, to save memory."""
    blocks = zip(*(part.split(20, 1) for part in tasks), strict=True)
    losses = torch.cat([task_losses(parameters, Tasks(*block)) for block in blocks], 1)
    return {"mean_loss": losses.mean(1).tolist(), "worst_tenth": worst_tenth(losses).tolist()}


def run(session: Session) -> list[Result]:
    grid = Grid((0.0025, 0.005, 0.01, 0.02), (0.0, 1e-4, 1e-3), decay_factor=10.0)
    problem = Sinusoids(steps=10) if session.quick else Sinusoids()
    session.expect(5 if session.quick else 7, grid)
    weighted = Arm(RGD, rgd.KL(3.0))
    arms = [Arm(PLAIN), weighted]
    arms += [] if session.quick else [Arm("RGD, tau 1", rgd.KL(1.0)), Arm("CVaR(0.5)", rgd.CVaR(0.5))]
    chosen = {arm.name: session.sweep(problem, arm, grid, trainer=meta_train) for arm in arms}
    mean_weight = chosen[RGD].mean_weight
    for arm in (mean_one(weighted), times_mean_weight(weighted, mean_weight), opposite_sign(weighted)):
        chosen[arm.name] = session.sweep(problem, arm, grid, trainer=meta_train)
    return [Result(HERE, c, "" if name == PLAIN else PLAIN) for name, c in chosen.items()]


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    arms = [arm for arm in table.arms(HERE) if arm != PLAIN]
    panels = {
        "mean_loss": "mean error over test tasks",
        "worst_tenth": "error of the worst tenth of the tasks",
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    for panel, (metric, label) in zip(axes, panels.items(), strict=True):
        panel.axvline(0, color=GREY, linewidth=1)
        for k, (arm, color) in enumerate(
            zip(arms, (BLUE, "#56b4e9", PURPLE, GREEN, GREY, ORANGE), strict=False)
        ):
            line = table.line(HERE, arm, metric)
            panel.errorbar(
                line.difference, k, xerr=line.difference_half, fmt="D" if line.finding else "o", color=color
            )
        panel.set_title(label, loc="left", fontsize=11)
        panel.set_xlabel("squared error, difference to plain MAML")
        panel.grid(axis="x", color="#e3e6eb")
        panel.tick_params(length=0)
    axes[0].set_yticks(range(len(arms)), arms)
    figure.suptitle(
        f"Sinusoids: difference to MAML and 95% interval, {table.lines[0].seeds} seeds; diamond: p < .001",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def sentence(table: Table) -> str:
    def shown(arm: str) -> str:
        mean, tail = (table.line(HERE, arm, metric).shown() for metric in ("mean_loss", "worst_tenth"))
        return f"{arm}: mean {mean}, worst tenth {tail}"

    mean, tail = (table.line(HERE, PLAIN, metric).mean for metric in ("mean_loss", "worst_tenth"))
    arms = [arm for arm in (RGD, f"{RGD}, mean one", "CVaR(0.5)") if arm in table.arms(HERE)]
    return (
        f"Squared error of test tasks against MAML (mean {mean:.3f}, worst tenth {tail:.3f}). "
        f"{'; '.join(map(shown, arms))}."
    )


ROW = Row("maml", "Meta-learning (MAML)", ("mean_loss", "worst_tenth"), run, picture, sentence)

if __name__ == "__main__":
    main(ROW)
