"""The choice of learning rate and weight decay, the same for every arm.

Each seed chooses for itself: it has its own split, takes the cell with the best score on its own validation
part, and is measured on its own test part. Nothing is pooled over seeds, so no choice is shared by their
differences, and the interval over them holds. Test data choose nothing.

The best cell of a seed must lie inside the grid. Where it lies at an edge, the grid of that seed grows by one
value there, for all values of the other axis, until it does not. No weight decay at all, 0, is no edge: there
is nothing below it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from harness.arms import Arm
from harness.problems import Problem, higher_is_better
from harness.store import Store
from harness.train import Cell, Outcome, train

SEEDS_AT_ONCE = 12
MOST_WIDENINGS = 16

Trainer = Callable[
    [Problem, Arm, Sequence[int], Sequence[Cell], Sequence[int]], dict[tuple[int, Cell], list[Outcome]]
]


class EdgeError(RuntimeError):
    """The best learning rate or weight decay stayed at the edge of the grid however far the grid grew."""


class Grid(NamedTuple):
    """Values to try, in increasing order, and the factor by which an axis grows."""

    learning_rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    weight_decays: tuple[float, ...] = (0.0, 0.001, 0.002, 0.004, 0.008, 0.016)
    rate_factor: float = 2.0
    decay_factor: float = 2.0
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

    def neighbours(self, cell: Cell) -> list[Cell]:
        """The cells that differ by at most one step on either axis, `cell` among them."""
        axes = ((self.learning_rates, cell.learning_rate), (self.weight_decays, cell.weight_decay))
        near = [axis[max(0, axis.index(own) - 1) : axis.index(own) + 2] for axis, own in axes]
        return [Cell(rate, decay) for rate in near[0] for decay in near[1]]

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


class Choice(NamedTuple):
    """The cell that a seed chose, its score on the seed's validation part, and the grid that it lies in."""

    cell: Cell
    score: float  # the larger, the better
    grid: str


@dataclasses.dataclass(frozen=True)
class Chosen:
    """An arm on a problem: what each seed chose, and what it reached with that."""

    problem: str
    arm: Arm
    seeds: tuple[int | str, ...]  # or the data set, as "family/data set"
    choices: tuple[Choice, ...]  # of each seed
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
    snapshots: Sequence[int] = (),
    stop_early: bool = False,
    most_widenings: int = MOST_WIDENINGS,
    edges: bool = False,
    trainer: Trainer = train,
    progress: tqdm | None = None,
    one_by_one: bool = False,
) -> Chosen:
    """Tunes an arm on a problem, seed by seed, and gives what each seed reached with its choice.

    Args:
        problem: What is learnt.
        arm: How.
        grid: Where to begin; it grows for each seed as far as needed.
        seeds: Seeds 0 to `seeds - 1` are trained and measured.
        store: Finished runs are taken from it and added to it.
        snapshots: Further steps at which to measure. The last step chooses.
        stop_early: Whether a seed chooses the snapshot as well, by the same validation score.
        most_widenings: How often the grid of a seed may grow.
        edges: Whether the best cell is taken even where it lies at an edge, for a smoke test.
        trainer: What trains.
        progress: A bar that shows which arm is trained.
        one_by_one: Whether the trainer gets one run at a time and each is kept as soon as it is finished.

    Raises:
        EdgeError: If a seed's best cell is at the edge after `most_widenings`, or if all of its runs
        diverged.
    """
    sign = 1 if higher_is_better(problem.select) else -1
    grids = dict.fromkeys(range(seeds), grid)
    chosen: dict[int, tuple[Choice, tuple[Outcome, ...]]] = {}
    for widening in range(most_widenings + 1):
        for some in alike(grids):
            own = grids[some[0]]
            found = run_cells(
                problem, arm, some, own.cells(), store, snapshots, trainer, progress, one_by_one
            )
            for seed in some:
                scores, when = scored(
                    {cell: found[seed, cell] for cell in own.cells()}, problem.select, sign, stop_early
                )
                best = best_of(scores, own)
                # Where every cell diverged, the first stands for the best: the grid grows to smaller steps.
                diverged = scores[best] == -math.inf
                grown = own.grown(own.cells()[0] if diverged else best)
                if grown == own or edges:
                    shown = f"{own}, widened {widening}x" if widening else str(own)
                    shown += ", at an edge" if grown != own else ""
                    outcomes = found[seed, best]
                    kept = (outcomes[when[best]],) if stop_early else tuple(outcomes)
                    chosen[seed] = Choice(best, sign * scores[best], shown), kept
                    del grids[seed]
                elif widening < most_widenings:
                    grids[seed] = grown
                else:
                    what = "every cell diverged" if diverged else f"the best cell, {best}, is at the edge"
                    raise EdgeError(
                        f"{arm.name} on {problem.name}, seed {seed}: {what} after {most_widenings} "
                        f"widenings, on {own}. Begin with a grid nearer to the best values, or allow more "
                        "widenings."
                    )
        if not grids:
            break
    return collected(problem, arm, chosen)


def collected(problem: Problem, arm: Arm, chosen: dict[int, tuple[Choice, tuple[Outcome, ...]]]) -> Chosen:
    """The seeds in their order."""
    choices, outcomes = zip(*(chosen[seed] for seed in sorted(chosen)), strict=True)
    return Chosen(problem.name, arm, tuple(sorted(chosen)), choices, outcomes)


def alike(grids: dict[int, Grid]) -> list[list[int]]:
    """The seeds, those of the same grid together."""
    return [[seed for seed in grids if grids[seed] == grid] for grid in dict.fromkeys(grids.values())]


def scored(
    outcomes: dict[Cell, list[Outcome]], metric: str, sign: int, stop_early: bool
) -> tuple[dict[Cell, float], dict[Cell, int]]:
    """The score of each cell on validation data, the larger the better, and the snapshot that has it.

    A run that diverged has minus infinity.
    """
    scores: dict[Cell, float] = {}
    when: dict[Cell, int] = {}
    for cell, measured in outcomes.items():
        values = [sign * o.validation[metric] for o in (measured if stop_early else measured[-1:])]
        finite = [value if math.isfinite(value) else -math.inf for value in values]
        scores[cell] = max(finite)
        when[cell] = finite.index(scores[cell]) if stop_early else -1
    return scores, when


def best_of(scores: dict[Cell, float], grid: Grid) -> Cell:
    """The cell with the best score; among equals, the one whose neighbours have the best mean score.

    A small validation part gives many cells the same accuracy. The middle of such a plateau is taken, where
    the first cell of the list would favour small rates.
    """
    best = max(scores.values())
    if best == -math.inf:
        return next(iter(scores))

    def around(cell: Cell) -> float:
        return float(np.mean([scores[near] for near in grid.neighbours(cell)]))

    return max((cell for cell, score in scores.items() if score == best), key=around)


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
    keys = {(s, c): store.key(problem, arm, s, c, snapshots) for s in seeds for c in cells}
    found = {run: outcomes for run, key in keys.items() if (outcomes := store.get(key)) is not None}
    missing = [run for run in keys if run not in found]
    if progress is not None and missing:
        progress.set_postfix_str(f"{problem.name}: {arm.name}")
    for some, these in together(missing, one_by_one):
        new = trainer(problem, arm, some, these, snapshots)
        store.add((keys[run], outcomes) for run, outcomes in new.items())
        found.update(new)
        if progress is not None:
            progress.update(len(new))
    return found


def together(runs: Iterable[tuple[int, Cell]], one_by_one: bool) -> list[tuple[list[int], list[Cell]]]:
    """Runs in blocks for the trainer: some seeds, all with the same cells."""
    if one_by_one:
        return [([seed], [cell]) for seed, cell in runs]
    cells_of: dict[int, list[Cell]] = {}
    for seed, cell in runs:
        cells_of.setdefault(seed, []).append(cell)
    seeds_of: dict[tuple[Cell, ...], list[int]] = {}
    for seed, cells in cells_of.items():
        seeds_of.setdefault(tuple(cells), []).append(seed)
    return [
        (seeds[begin : begin + SEEDS_AT_ONCE], list(cells))
        for cells, seeds in seeds_of.items()
        for begin in range(0, len(seeds), SEEDS_AT_ONCE)
    ]


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
    choice = Choice(cell, math.nan, "NOT TUNED")
    return collected(problem, arm, {s: (choice, tuple(found[s, cell])) for s in range(seeds)})


def retrained(
    problem: Problem,
    arm: Arm,
    cells: Sequence[Cell],
    *,
    store: Store,
    progress: tqdm | None = None,
) -> Chosen:
    """An arm at the cells that an earlier sweep chose, one for each seed."""
    chosen: dict[int, tuple[Choice, tuple[Outcome, ...]]] = {}
    for cell in dict.fromkeys(cells):
        some = [seed for seed, own in enumerate(cells) if own == cell]
        found = run_cells(problem, arm, some, [cell], store, (), train, progress)
        chosen |= {s: (Choice(cell, math.nan, "chosen before"), tuple(found[s, cell])) for s in some}
    return collected(problem, arm, chosen)


def tuned(name: str, candidates: Sequence[Chosen], select: str) -> Chosen:
    """Each seed's candidate with the best validation score, as an arm of its own.

    It chose among `len(candidates)` settings: compare it with plain training that chose among as many starts,
    `tuned(name, [sweep(plain.started(k)) for k in range(len(candidates))])`. Candidates of the same score are
    taken in their order.
    """
    sign = 1 if higher_is_better(select) else -1
    first = candidates[0]
    winners = [
        max(candidates, key=lambda chosen: sign * chosen.choices[k].score) for k in range(len(first.seeds))
    ]
    return dataclasses.replace(
        first,
        arm=dataclasses.replace(first.arm, name=name),
        choices=tuple(
            winner.choices[k]._replace(grid=f"{winner.arm.name}: {winner.choices[k].grid}")
            for k, winner in enumerate(winners)
        ),
        outcomes=tuple(winner.outcomes[k] for k, winner in enumerate(winners)),
    )
