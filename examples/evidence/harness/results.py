"""Results as CSV: what every run reached, and the statistics that follow from it.

`<name>_runs.csv` holds a line for each setting, arm and seed. `<name>.csv` holds a line for each setting, arm
and metric, and is computed from the first alone, so that anyone can check it without training. Both begin
with the command, the versions and the time.

Where a setting holds many data sets, a run stands for one of them, and its "seed" reads "family/data set":
the column `seeds` counts data sets, and `statistics.compare_over_families` gives intervals and p.
"""

from __future__ import annotations

import csv
import hashlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from harness.problems import higher_is_better
from harness.statistics import DETECTABLE, Vector, compare, compare_over_families, detectable, interval
from harness.sweep import Chosen

RUN_COLUMNS = ("setting", "arm", "baseline", "learning_rate", "weight_decay", "grid", "mean_weight", "seed")
COLUMNS = (
    "setting", "arm", "metric", "seeds", "mean", "half", "baseline", "difference", "difference_half", "p",
    "detectable",
)  # fmt: skip


class Result(NamedTuple):
    """An arm in a setting, and the arm of the same setting that it is compared with, if any."""

    setting: str
    chosen: Chosen
    baseline: str = ""
    snapshot: int = -1


class Line(NamedTuple):
    """A metric of an arm in a setting: mean and half of the 95% interval, the difference to the baseline.

    `detectable` is the difference that this number of seeds cannot miss: see `statistics.detectable`.
    """

    setting: str
    arm: str
    metric: str
    seeds: int
    mean: float
    half: float
    baseline: str
    difference: float
    difference_half: float
    p: float
    detectable: float

    @property
    def outside(self) -> bool:
        """Whether the 95% interval of the difference excludes 0."""
        return abs(self.difference) > self.difference_half

    @property
    def better(self) -> bool:
        """Whether the difference points to the better side of its metric."""
        return (self.difference > 0) == higher_is_better(self.metric)

    @property
    def unit(self) -> float:
        """What a difference is multiplied by to be shown: 100 for an accuracy, which is told in points."""
        return 100.0 if higher_is_better(self.metric) else 1.0

    def points(self) -> str:
        """The difference in points of 1/100, for a sentence."""
        return self.shown(100, ".1f")

    def shown(self, factor: float = 1, form: str = ".3f") -> str:
        """The difference and half of its interval, for a sentence."""
        return f"{factor * self.difference:+{form}} ± {factor * self.difference_half:{form}}"

    def said(self) -> str:
        """The difference in the unit of its metric: points for an accuracy."""
        return self.points() if higher_is_better(self.metric) else self.shown()


class Table:
    """The runs of a program, and their statistics, with the header of the file.

    A metric that a problem does not have is left empty in its runs, and has no line.
    """

    def __init__(self, header: dict[str, str], metrics: Sequence[str], runs: list[dict[str, str]]) -> None:
        self.header = header
        self.metrics = tuple(metrics)
        self.runs = runs
        self.by_arm: dict[tuple[str, str], list[dict[str, str]]] = {}
        for run in runs:
            self.by_arm.setdefault((run["setting"], run["arm"]), []).append(run)
        self.lines = self._summary()
        outside = sum(line.outside for line in self.compared())
        self.header["comparisons"] = f"{len(self.compared())}; the 95% interval excludes 0 in {outside}"

    @classmethod
    def of(cls, header: dict[str, str], metrics: Sequence[str], results: Iterable[Result]) -> Table:
        """The table of what was trained."""
        runs: list[dict[str, str]] = []
        for setting, chosen, baseline, snapshot in results:
            for k, (seed, choice) in enumerate(zip(chosen.seeds, chosen.choices, strict=True)):
                outcome = chosen.outcomes[k][snapshot]
                values = (
                    setting, chosen.arm.name, baseline, f"{choice.cell.learning_rate:g}",
                    f"{choice.cell.weight_decay:g}", choice.grid, f"{outcome.mean_weight:.5g}", str(seed),
                )  # fmt: skip
                measured = {m: f"{outcome.test[m]:.7g}" if m in outcome.test else "" for m in metrics}
                runs.append(dict(zip(RUN_COLUMNS, values, strict=True)) | measured)
        return cls(header, metrics, runs)

    @classmethod
    def read(cls, path: pathlib.Path) -> Table:
        """The table whose runs are in `<name>_runs.csv`; `path` is that of `<name>.csv`."""
        header, text = split_header(runs_path(path))
        runs = list(csv.DictReader(text))
        metrics = [column for column in runs[0] if column not in RUN_COLUMNS]
        return cls(header, metrics, runs)

    def compared(self) -> list[Line]:
        """The lines of arms that have a baseline."""
        return [line for line in self.lines if line.baseline]

    def values(self, setting: str, arm: str, metric: str) -> Vector:
        """A metric of each seed."""
        runs = self.by_arm.get((setting, arm))
        if runs is None:
            raise KeyError(f"no runs of arm {arm!r} in setting {setting!r}")
        return np.array([float(run[metric]) for run in runs])

    def families(self, setting: str, arm: str) -> list[str]:
        """The family of each data set, where the runs stand for data sets; empty where they are seeds."""
        seeds = [r["seed"] for r in self.runs if (r["setting"], r["arm"]) == (setting, arm)]
        return [seed.partition("/")[0] for seed in seeds] if "/" in seeds[0] else []

    def line(self, setting: str, arm: str, metric: str) -> Line:
        """The statistics of one metric of one arm. `arm` may be the beginning of its name."""
        lines = [line for line in self.lines if (line.setting, line.metric) == (setting, metric)]
        for line in lines:
            if line.arm == arm:
                return line
        for line in lines:
            if line.arm.startswith(arm):
                return line
        raise KeyError(f"no line of arm {arm!r}, metric {metric!r} in setting {setting!r}")

    def has(self, setting: str, metric: str) -> bool:
        """Whether a metric was measured in a setting."""
        return any((line.setting, line.metric) == (setting, metric) for line in self.lines)

    def settings(self) -> list[str]:
        """In the order of the file."""
        return list(dict.fromkeys(setting for setting, _ in self.by_arm))

    def arms(self, setting: str) -> list[str]:
        """In the order of the file."""
        return [arm for here, arm in self.by_arm if here == setting]

    def against(self, setting: str, arm: str, other: str, metric: str) -> Line:
        """The statistics of an arm, compared with another arm than its baseline."""
        line = self.line(setting, arm, metric)
        names = ("baseline", "difference", "difference_half", "p", "detectable")
        found = (other, *self._difference(setting, line.arm, other, metric))
        return line._replace(**dict(zip(names, found, strict=True)))

    def _difference(
        self, setting: str, arm: str, baseline: str, metric: str
    ) -> tuple[float, float, float, float]:
        """Mean difference, half of its interval, p, and what could not have been missed."""
        values, others = self.values(setting, arm, metric), self.values(setting, baseline, metric)
        families = self.families(setting, arm)
        paired = compare_over_families(values, others, families) if families else compare(values, others)
        # The deviation over families is that of 12 pairs.
        deviations = DETECTABLE if families else detectable(len(values))
        return (*paired[:3], deviations * paired.deviation)

    def _summary(self) -> list[Line]:
        lines: list[Line] = []
        for (setting, arm), (run, *_) in self.by_arm.items():
            for metric in (m for m in self.metrics if run[m]):
                values = self.values(setting, arm, metric)
                families = self.families(setting, arm)
                nan = float("nan")
                difference = (nan, nan, nan, nan)
                if run["baseline"]:
                    difference = self._difference(setting, arm, run["baseline"], metric)
                mean, half = (
                    compare_over_families(values, np.zeros_like(values), families)[:2]
                    if families
                    else interval(values)
                )
                lines.append(
                    Line(setting, arm, metric, len(values), mean, half, run["baseline"], *difference)
                )
        return lines

    def write(self, path: pathlib.Path) -> None:
        """Writes `<name>.csv` and `<name>_runs.csv`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.summary_text())
        rows = [[run[column] for column in (*RUN_COLUMNS, *self.metrics)] for run in self.runs]
        runs_path(path).write_text(csv_text(self.header, (*RUN_COLUMNS, *self.metrics), rows))

    def summary_text(self) -> str:
        """The text of `<name>.csv`."""
        return csv_text(self.header, COLUMNS, [[shown(value) for value in line] for line in self.lines])

    def fingerprint(self) -> str:
        """Of the statistics; pictures carry it, so that an old picture beside a new table is seen."""
        rows = csv_text({}, COLUMNS, [[shown(value) for value in line] for line in self.lines])
        return hashlib.sha256(rows.encode()).hexdigest()


def shown(value: str | float) -> str:
    """Five digits; nothing for what is not there."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.5g}"  # noqa: PLR0124
    return str(value)


def csv_text(header: dict[str, str], columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of comment, then CSV."""
    lines = [f"# {key}: {value}" for key, value in header.items()]
    table = [",".join(quoted(value) for value in row) for row in (columns, *rows)]
    return "\n".join([*lines, *table]) + "\n"


def quoted(value: str) -> str:
    """As CSV asks where a value holds a comma."""
    return f'"{value}"' if "," in value else value


def split_header(path: pathlib.Path) -> tuple[dict[str, str], list[str]]:
    """The comments of a file as a dictionary, and its other lines."""
    lines = path.read_text().splitlines()
    comments = [line[2:].split(": ", 1) for line in lines if line.startswith("# ")]
    return dict(comments), [line for line in lines if not line.startswith("# ")]


def runs_path(path: pathlib.Path) -> pathlib.Path:
    """`<name>_runs.csv` beside `<name>.csv`."""
    return path.with_name(f"{path.stem}_runs.csv")
