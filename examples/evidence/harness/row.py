"""The command line that every program has, and what it does with the results."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import rgd
import torch
from tqdm import tqdm

from harness.arms import Arm
from harness.problems import Problem, higher_is_better
from harness.results import Line, Result, Table
from harness.statistics import LEVEL
from harness.store import Store
from harness.sweep import Chosen, Grid, Trainer, sweep, tuned
from harness.train import train

FOLDER = pathlib.Path(__file__).parents[1]
SEEDS, QUICK_SEEDS = 12, 2
FULL_GRID = Grid()
QUICK_GRID = Grid((0.05, 0.2, 0.8), (0.0, 0.01), rate_factor=4.0, decay_factor=10.0)


@dataclasses.dataclass
class Session:
    """How large a run of a program is, and where its finished trainings are."""

    quick: bool
    store: Store
    progress: tqdm | None = None
    seeds: int = SEEDS

    def expect(self, arms: int, grid: Grid = FULL_GRID, quick: Grid = QUICK_GRID) -> None:
        """Tells the progress bar how many arms there will be; what the grids grow by comes on top."""
        if self.progress is not None:
            self.progress.total = arms * self.seeds * len(self.grid(grid, quick).cells())
            self.progress.refresh()

    def grid(self, full: Grid, quick: Grid = QUICK_GRID) -> Grid:
        """The grid to begin with; a small one for a quick run."""
        return quick if self.quick else full

    def sweep(
        self,
        problem: Problem,
        arm: Arm,
        grid: Grid = FULL_GRID,
        snapshots: Sequence[int] = (),
        trainer: Trainer = train,
        *,
        quick: Grid = QUICK_GRID,
        stop_early: bool = False,
        one_by_one: bool = False,
    ) -> Chosen:
        """Tunes an arm: see `harness.sweep.sweep`. A quick run begins with the grid `quick`."""
        return sweep(
            problem, arm, grid=self.grid(grid, quick), seeds=self.seeds, store=self.store,
            snapshots=snapshots, stop_early=stop_early, edges=self.quick, progress=self.progress,
            trainer=trainer, one_by_one=one_by_one,
        )  # fmt: skip

    def as_many_runs(
        self, problem: Problem, arm: Arm, times: int, grid: Grid = FULL_GRID, **options: Any
    ) -> Chosen:
        """Plain training that chooses among `times` starts, for an arm that chose among as many settings."""
        starts = [self.sweep(problem, arm.started(k), grid, **options) for k in range(times)]
        return tuned(arm.name, starts, problem.select)


class Reported(NamedTuple):
    """A gain that the paper reports.

    Args:
        points: Of accuracy, or of the benchmark's score.
        where: On what.
        arm: The arm that stands for it here, where it is not that of the claim.
        metric: The metric that stands for it here, where it is not that of the claim.
    """

    points: float
    where: str
    arm: str = ""
    metric: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a program says in advance: that an arm is better than its baseline, by one metric in one setting.

    It is tested by the paired t test, two-sided, with Holm's correction over all rows. Everything else in a
    table is description.

    Args:
        setting: Of the table.
        arm: Of the table.
        metric: That the rates were chosen by, or of the same kind.
        words: The claim as a sentence.
        paper: What the paper reports for this kind of task; None where it reports nothing.
    """

    setting: str
    arm: str
    metric: str
    words: str
    paper: Reported | None = None

    def line(self, table: Table) -> Line:
        """What was measured."""
        return table.line(self.setting, self.arm, self.metric)

    def holds(self, table: Table, p: float) -> bool:
        """Whether the difference is on the better side, with `p` adjusted for the number of rows."""
        return self.line(table).better and p < LEVEL

    def of_paper(self, table: Table) -> str:
        """What the row says of the paper's figure: could not have told, excluded here, or within."""
        if self.paper is None:
            return ""
        line = table.line(self.setting, self.paper.arm or self.arm, self.paper.metric or self.metric)
        shown = f"The paper's +{self.paper.points:g} points ({self.paper.where})"
        if self.paper.points > line.unit * (line.difference + line.difference_half):
            said = "excluded here"
        elif self.paper.points < line.unit * line.detectable:
            said = "this row could not have told"
        else:
            said = "within the interval"
        if self.paper.metric:
            said += f" (of {self.paper.metric.replace('_', ' ')}, {line.said()})"
        return f"{shown}: {said}."


@dataclasses.dataclass(frozen=True)
class Row:
    """One program.

    Args:
        name: Of its files.
        title: For the table of all programs.
        claim: What it says in advance; None where it checks the harness.
        metrics: What is reported. Each is compared, and each comparison counted.
        run: Trains, and gives the results.
        picture: Draws the table.
        sentence: What came out, computed from the table.
        parser: Makes the parser of the program's own options, those of its recipes; None where it has none.
        options: Those that were given, for the command in the table.
        tabled: Whether the page has a table of a setting; None where it has one of each.
        tells: Other programs whose sentence the page tells too.
    """

    name: str
    title: str
    claim: Claim | None
    metrics: tuple[str, ...]
    run: Callable[[Session], list[Result]]
    picture: Callable[[Table, pathlib.Path], None]
    sentence: Callable[[Table], str]
    parser: Callable[[], argparse.ArgumentParser] | None = None
    options: str = ""
    tabled: Callable[[str], bool] | None = None
    tells: tuple[str, ...] = ()

    @property
    def path(self) -> pathlib.Path:
        """The committed table."""
        return FOLDER / "results" / f"{self.name}.csv"


def recipe(
    row: Row, run: Callable[[Session], list[Result]], folder: str, options: str, others: Sequence[str]
) -> tuple[Row, list[str]]:
    """What `main` takes to run a program on other data or with another setting.

    Args:
        row: The program.
        run: What it does instead.
        folder: Of the results, within `results`; `--output` names another.
        options: The program's own options that were given, as the table's command shows them.
        others: The arguments that are left for `main`.
    """
    results = FOLDER / "results" / ("quick" if "--quick" in others else "") / folder
    return dataclasses.replace(row, run=run, options=f" {options}"), ["--output", str(results), *others]


def main(row: Row, arguments: Sequence[str] | None = None) -> Table:
    """Runs a program from the command line: trains, prints, writes the tables and the picture."""
    own = [] if row.parser is None else [row.parser()]
    parser = argparse.ArgumentParser(description=row.title, parents=own)
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument("--full", action="store_true", help="the committed run")
    sizes.add_argument("--quick", action="store_true", help="a smoke test: 2 seeds, few steps")
    sizes.add_argument("--redraw", action="store_true", help="statistics and picture anew from the runs' CSV")
    parser.add_argument("--output", type=pathlib.Path, help="folder for the tables and the picture")
    parser.add_argument("--fresh", action="store_true", help="train again what an earlier run had finished")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quick = "/quick" if options.quick else ""
    size = "--quick" if options.quick else "--full"
    folder = options.output or FOLDER / f"results{quick}"
    path = folder / f"{row.name}.csv"
    if options.redraw:
        table = Table.read(path)
    else:
        cache = None if options.quick else FOLDER / ".cache" / f"{row.name}.jsonl"
        if options.fresh and cache is not None:
            cache.unlink(missing_ok=True)
        store = Store(cache, FOLDER / f"{row.name}.py")
        with tqdm(desc=row.name, unit="run", smoothing=0.05, mininterval=0.5) as progress:
            session = Session(options.quick, store, progress, QUICK_SEEDS if options.quick else SEEDS)
            results = row.run(session)
        header = {
            "command": f"python examples/evidence/{row.name}.py {size}{row.options}",
            "versions": versions(),
            "time": f"{store.seconds():.0f} s of training on one core",
        }
        table = Table.of(header, row.metrics, results)
    table.write(path)
    print(text(table))
    print(f"\n{row.sentence(table)}")
    row.picture(table, path.with_suffix(".png"))
    print(f"\nTable: {path}\nPicture: {path.with_suffix('.png')}")
    return table


def versions() -> str:
    """What the numbers depend on."""
    return (
        f"rgd {rgd.__version__}, torch {torch.__version__}, numpy {np.__version__}, "
        f"Python {platform.python_version()}"
    )


def text(table: Table) -> str:
    """The table for a terminal: a block a setting, a line an arm, mean and difference of each metric."""
    width = max(len(line.arm) for line in table.lines) + 2
    lines: list[str] = []
    for setting in table.settings():
        lines += [
            "",
            setting,
            " " * width + "".join(f"{metric:>26}" for metric in table.metrics if table.has(setting, metric)),
        ]
        for arm in table.arms(setting):
            cells: list[str] = []
            for metric in table.metrics:
                if not table.has(setting, metric):
                    continue
                line = table.line(setting, arm, metric)
                scale = 100 if higher_is_better(metric) else 1
                cell = f"{scale * line.mean:.4g}"
                if line.baseline:
                    star = "*" if line.outside else " "
                    cell += f" ({scale * line.difference:+.3g} ± {scale * line.difference_half:.2g}){star}"
                cells.append(f"{cell:>26}")
            lines.append(f"{arm:<{width}}" + "".join(cells))
    lines += [
        "",
        "In brackets: the difference to the baseline and half of its 95% interval; *: it excludes 0.",
        f"Comparisons: {table.header['comparisons']}.",
    ]
    return "\n".join(lines)
