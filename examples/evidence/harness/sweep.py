"""The choice of learning rate and weight decay, the same for every arm.

A cell's score is the mean over the seeds of a metric on validation data; test data choose nothing. The best
cell must lie inside the grid. Where it lies at an edge, the grid grows by one value there, for all values of
the other axis, until it does not. No weight decay at all, 0, is no edge: there is nothing below it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from harness.arms import Arm
from harness.problems import Problem, higher_is_better
from harness.store import Store
from harness.train import Cell, Outcome, train

SEEDS_AT_ONCE = 12
MOST_WIDENINGS = 6

Trainer = Callable[
    [Problem, Arm, Sequence[int], Sequence[Cell], Sequence[int]], dict[tuple[int, Cell], list[Outcome]]
]


class EdgeError(RuntimeError):
    """The best learning rate or weight decay stayed at the edge of the grid however far the grid grew."""


class Grid(NamedTuple):
    """Values to try, in increasing order, and the factor by which an axis grows."""

    learning_rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    weight_decays: tuple[float, ...] = (0.0, 0.001, 0.004, 0.016)
    rate_factor: float = 2.0
    decay_factor: float = 4.0
    one_axis: bool = False  # where time forces it: the learning rate alone is tuned, the decay held

    def cells(self) -> list[Cell]:
        """Every pair."""
        return [Cell(rate, decay) for rate in self.learning_rates for decay in self.weight_decays]

    def grown(self, best: Cell) -> Grid:
        """The grid with one value more at each edge that `best` lies at; the same grid if it lies inside."""
        rates, decays = self.learning_rates, self.weight_decays
        if best.learning_rate == min(rates):
            rates = (tidy(rates[0] / self.rate_factor), *rates)
        elif best.learning_rate == max(rates):
            rates = (*rates, tidy(rates[-1] * self.rate_factor))
        if self.one_axis:
            return self._replace(learning_rates=rates)
        if best.weight_decay == max(decays):
            last = decays[-1] * self.decay_factor
            decays = (*decays, tidy(last) if last > 0 else 1e-3)
        elif best.weight_decay == min(decays) and best.weight_decay > 0:
            decays = (tidy(decays[0] / self.decay_factor), *decays)
        return self._replace(learning_rates=rates, weight_decays=decays)

    def __str__(self) -> str:
        rates, decays = self.learning_rates, self.weight_decays
        if self.one_axis:
            return f"{len(rates)} rates {rates[0]:g} to {rates[-1]:g}; decay {decays[0]:g} not tuned"
        shown = [
            f"{len(axis)} {name} {axis[0]:g} to {axis[-1]:g}"
            for name, axis in (("rates", rates), ("decays", decays))
        ]
        return ", ".join(shown)


def tidy(value: float) -> float:
    """Rounded to six digits, so that 0.1 * 2 / 2 is found again in a cache."""
    return float(f"{value:.6g}")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """An arm on a problem, at the learning rate and weight decay that validation chose for it."""

    problem: str
    arm: Arm
    cell: Cell
    grid: str
    score: float
    seeds: tuple[int | str, ...]  # or the data set, as "family/data set"
    outcomes: tuple[tuple[Outcome, ...], ...]  # of each seed, at each snapshot

    @property
    def mean_weight(self) -> float:
        """Mean weight over all steps and seeds."""
        return float(np.mean([outcome[-1].mean_weight for outcome in self.outcomes]))

    def metrics(self) -> list[str]:
        """The names of what was measured."""
        return list(self.outcomes[0][-1].test)

    def test(self, metric: str, snapshot: int = -1) -> npt.NDArray[np.float64]:
        """A metric on the test data, of each seed, (S,)."""
        return np.array([outcome[snapshot].test[metric] for outcome in self.outcomes])

    def renamed(self, name: str) -> Chosen:
        """The same under another name in tables."""
        return dataclasses.replace(self, arm=dataclasses.replace(self.arm, name=name))


def sweep(
    problem: Problem,
    arm: Arm,
    *,
    grid: Grid,
    seeds: int,
    store: Store,
    budget: int = 1,
    snapshots: Sequence[int] = (),
    most_widenings: int = MOST_WIDENINGS,
    trainer: Trainer = train,
    progress: tqdm | None = None,
    tuning_seeds: int | None = None,
    one_by_one: bool = False,
) -> Chosen:
    """Tunes an arm on a problem, and gives what the chosen cell reached.

    Args:
        problem: What is learnt.
        arm: How.
        grid: Where to begin; it grows as far as needed.
        seeds: Seeds 0 to `seeds - 1` are trained and measured.
        store: Finished runs are taken from it and added to it.
        budget: Plain training is given this many times as many runs: further seeds, which choose the cell
            together with the others and are not measured. For comparisons with an arm that tunes one more
            setting over `budget` values.
        snapshots: Further steps at which to measure. The last step chooses.
        most_widenings: How often the grid may grow.
        trainer: What trains.
        progress: A bar that shows which arm is trained.
        tuning_seeds: How many of the seeds choose the cell, where a run takes minutes; None for all of them.
        one_by_one: Whether the trainer gets one run at a time and each is kept as soon as it is finished.

    Raises:
        EdgeError: If the best cell is at the edge after `most_widenings`, or if in every cell a run diverged.
    """
    everything = range((seeds if tuning_seeds is None else tuning_seeds) * budget)
    higher = higher_is_better(problem.select)
    for widening in range(most_widenings + 1):
        cells = grid.cells()
        found = run_cells(problem, arm, everything, cells, store, snapshots, trainer, progress, one_by_one)
        scores = {cell: score([found[s, cell] for s in everything], problem.select, higher) for cell in cells}
        best = max(cells, key=lambda cell: scores[cell])
        diverged = scores[best] == -math.inf
        # Where every cell diverged, the first stands for the best: the grid grows towards smaller steps.
        grown = grid.grown(cells[0] if diverged else best)
        if grown == grid:
            if tuning_seeds is not None:
                found = run_cells(
                    problem, arm, range(seeds), [best], store, snapshots, trainer, progress, one_by_one
                )
            outcomes = tuple(tuple(found[s, best]) for s in range(seeds))
            grown_by = f"{grid}, widened {widening}x" if widening else str(grid)
            if tuning_seeds is not None:
                grown_by += f", chosen by {tuning_seeds} seed{'s' * (tuning_seeds > 1)}"
            sign = 1 if higher else -1
            value = sign * scores[best]
            return Chosen(problem.name, arm, best, grown_by, value, tuple(range(seeds)), outcomes)
        grid = grown
    what = "every cell diverged" if diverged else f"the best cell, {best}, is still at the edge"
    raise EdgeError(
        f"{arm.name} on {problem.name}: {what} after {most_widenings} widenings, on {grid}. "
        "Begin with a grid nearer to the best values, or allow more widenings."
    )


def run_cells(  # noqa: PLR0917
    problem: Problem,
    arm: Arm,
    seeds: Sequence[int],
    cells: Sequence[Cell],
    store: Store,
    snapshots: Sequence[int],
    trainer: Trainer,
    progress: tqdm | None,
    one_by_one: bool = False,
) -> dict[tuple[int, Cell], list[Outcome]]:
    """The outcomes of every seed and cell; trains those that the store does not have, many at once."""
    found: dict[tuple[int, Cell], list[Outcome]] = {}
    together: list[tuple[Sequence[int], Sequence[Cell]]] = [
        (seeds[begin : begin + SEEDS_AT_ONCE], cells) for begin in range(0, len(seeds), SEEDS_AT_ONCE)
    ]
    if one_by_one:
        together = [([seed], [cell]) for seed in seeds for cell in cells]
    for some, these in together:
        keys = {(s, c): store.key(problem, arm, s, c, snapshots) for s in some for c in these}
        known = {run: store.get(key) for run, key in keys.items()}
        missing = [c for c in these if any(known[s, c] is None for s in some)]
        if missing:
            if progress is not None:
                progress.set_postfix_str(f"{problem.name}: {arm.name}")
            new = trainer(problem, arm, some, missing, snapshots)
            store.add((keys[run], outcomes) for run, outcomes in new.items())
            known.update(new)
            if progress is not None:
                progress.update(len(new))
        found.update({run: outcomes for run, outcomes in known.items() if outcomes is not None})
    return found


def score(runs: Sequence[list[Outcome]], metric: str, higher: bool) -> float:
    """Mean over the seeds, larger is better; minus infinity if a run diverged."""
    mean = float(np.mean([outcomes[-1].validation[metric] for outcomes in runs]))
    if not math.isfinite(mean):
        return -math.inf
    return mean if higher else -mean


def untuned(
    problem: Problem,
    arm: Arm,
    cell: Cell,
    *,
    seeds: int,
    store: Store,
    snapshots: Sequence[int] = (),
    trainer: Trainer = train,
    progress: tqdm | None = None,
    one_by_one: bool = False,
) -> Chosen:
    """An arm at a learning rate and weight decay that nothing chose, to show what tuning changes.

    No evidence for an arm: tables mark it in the column `grid`.
    """
    found = run_cells(problem, arm, range(seeds), [cell], store, snapshots, trainer, progress, one_by_one)
    outcomes = tuple(tuple(found[s, cell]) for s in range(seeds))
    return Chosen(problem.name, arm, cell, "NOT TUNED", math.nan, tuple(range(seeds)), outcomes)


def tuned(name: str, candidates: Sequence[Chosen], select: str) -> Chosen:
    """The candidate with the best validation score, as an arm of its own.

    It chose among `len(candidates)` settings: compare it with plain training swept with that `budget`.
    """
    sign = 1 if higher_is_better(select) else -1
    best = max(candidates, key=lambda chosen: sign * chosen.score)
    return best.renamed(f"{name} ({best.arm.name})")
