"""Suspects: which labels are wrong, by the losses of one training, against confident learning (cleanlab).

Asked: of the samples that `rgd.suspects` names, how many have a right label, and how many wrong labels does
it miss, compared with cleanlab, which needs five further trainings?

Every method names as many samples as there are wrong labels, k. Then `false_share`, the share of right labels
among the samples named, equals `missed_share`, the share of wrong labels not named: one minus the precision
and one minus the recall. `first_half_false_share` is the false share of the k / 2 most suspicious samples.
Lower is better. The arm "cleanlab, own number" names as many samples as cleanlab finds.

Arms that need one training name the samples with the largest plain losses, averaged over all epochs by
`rgd.torch.LossHistory`: plain cross-entropy; s = -0.7 throughout (`rgd.KL(scale=-0.7)`); the dial turned from
0 to -1 in the first half of the training; and a control, plain training times the mean weight of s = -0.7,
which is compared with plain training. "last third" takes the mean over the last third of the steps, from the
same training.

Arms that need five trainings leave a fifth of the data out of each, and use its probabilities. "held-out
loss" names the largest losses. "cleanlab" names what `cleanlab.filter.find_label_issues` finds by confident
learning, ranked by self-confidence; the list is cut at k, or filled up to k by the label quality scores of
`cleanlab.rank`. "cleanlab on s = -0.7" trains the five networks with the dial. cleanlab is the baseline of
all but the control.

Protocol: data, wrong labels, network and training are those of `ramp.py`: digits (500 training images) and
MNIST-1D (2500 curves), 30% of the labels moved to the next class, or 40% to any other. Samples are named
among the training data. Each seed chooses learning rate and weight decay of every arm by its own validation
accuracy, and the validation labels are wrong too. The chosen cell is trained once more to record the losses,
which a user does in the first training. cleanlab's five trainings take the cell of plain training. The column
`grid` tells the number of trainings. There is no text task: `text.py` trains one network after the other, so
that five folds would take hours.

Run it with `make evidence ROW=suspects`, or `python examples/evidence/suspects.py --full`. It needs the
package `cleanlab`; a quick run leaves its arms out where that is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import time
from collections.abc import Callable, Sequence
from importlib import metadata

import numpy as np
import numpy.typing as npt
import rgd
import torch
from harness import (
    Arm,
    Cell,
    Chosen,
    Claim,
    Classification,
    Data,
    Grid,
    Outcome,
    Part,
    Problem,
    Ramp,
    Result,
    Row,
    Session,
    Table,
    digits,
    main,
    mnist1d,
    train,
)
from harness.arms import times_mean_weight
from harness.losses import cross_entropy
from harness.pictures import BLUE, GREY, ORANGE, pyplot, save
from harness.sweep import Trainer, run_cells
from rgd.torch import LossHistory
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

PLAIN, DIAL, RAMP = "plain", "s = -0.7", "ramp to -1"
LAST = ", last third"
HELD_OUT, CLEANLAB, OWN_NUMBER = "held-out loss", "cleanlab", "cleanlab, own number"
CLEANLAB_ON_DIAL = f"cleanlab on {DIAL}"
NOISES = {"30% pairs": (0.3, True), "40% uniform": (0.4, False)}
DATA = {"digits": digits, "MNIST-1D": mnist1d}
METRICS = ("false_share", "missed_share", "first_half_false_share")
FOLDS = 5
GRID = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.001, 0.002, 0.004, 0.008, 0.016))

Indices = npt.NDArray[np.int64]


def setting(data: str, noise: str) -> str:
    """What the tables call it."""
    return f"{data}, {noise}"


# --- what is named, and how well ---


@dataclasses.dataclass(frozen=True)
class Truth:
    """Which training labels of a seed are wrong, by the same split with right labels."""

    noisy: Problem
    right: Problem

    def wrong(self, seed: int) -> npt.NDArray[np.bool_]:
        """Whether each training label is wrong, (n,)."""
        noisy, right = (problem.draw(seed).train for problem in (self.noisy, self.right))
        if not torch.equal(noisy.inputs, right.inputs):
            raise ValueError(f"{self.noisy.name} and {self.right.name} split seed {seed} differently")
        return (noisy.target != right.target).numpy()


def scored(named: Indices, wrong: npt.NDArray[np.bool_]) -> dict[str, float]:
    """The metrics of the samples named, the most suspicious first, where `wrong` (n,) are mislabelled."""
    found = wrong[named]
    half = found[: max(1, int(wrong.sum()) // 2)]
    return {
        "false_share": 1 - float(found.mean()) if len(found) else 0.0,
        "missed_share": 1 - float(found.sum() / wrong.sum()),
        "first_half_false_share": 1 - float(half.mean()) if len(half) else 0.0,
    }


# --- by the losses of one training ---


class Recorder:
    """Cross-entropy that keeps the losses of every sample, over all steps and over the last third of them."""

    def __init__(self, steps: int) -> None:
        self.first_of_last = steps - steps // 3
        self.done = 0
        self.whole, self.last = LossHistory(0), LossHistory(0)

    def begin(self, models: int, samples: int, classes: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function of outputs (M, B, C), targets (M, B) and samples (M, B) that gives losses (M, B)."""
        del classes
        self.whole, self.last = LossHistory(models * samples), LossHistory(models * samples)
        begins = samples * torch.arange(models)[:, None]

        def losses(outputs: Tensor, target: Tensor, index: Tensor) -> Tensor:
            values = cross_entropy(outputs, target)
            places = (begins + index).flatten()
            self.whole.update(places, values.flatten())
            if self.done >= self.first_of_last:
                self.last.update(places, values.flatten())
            self.done += 1
            return values

        return losses


def recorded(
    problem: Problem, arm: Arm, seeds: Sequence[int], cells: Sequence[Cell]
) -> tuple[Tensor, Tensor, dict[tuple[int, Cell], list[Outcome]]]:
    """Mean losses (S, K, n) over a training and over its last third, and what the networks reached."""
    samples = len(problem.draw(seeds[0]).train.target)
    recorder = Recorder(samples // problem.batch_size * problem.epochs)
    outcomes = train(problem, dataclasses.replace(arm, loss=recorder), seeds, cells)
    whole, last = (h.mean().view(len(seeds), len(cells), -1) for h in (recorder.whole, recorder.last))
    return whole, last, outcomes


def by_losses(
    problem: Problem,
    arm: Arm,
    seeds: Sequence[int],
    cells: Sequence[Cell],
    snapshots: Sequence[int] = (),
    *,
    truth: Truth,
) -> dict[tuple[int, Cell], list[Outcome]]:
    """How well losses name wrong labels: first those of the whole training, then those of its last third."""
    del snapshots
    whole, last, trained = recorded(problem, arm, seeds, cells)
    outcomes: dict[tuple[int, Cell], list[Outcome]] = {}
    for s, seed in enumerate(seeds):
        wrong = truth.wrong(seed)
        for c, cell in enumerate(cells):
            named = [rgd.suspects(losses[s, c], k=int(wrong.sum())).indices for losses in (whole, last)]
            reached = trained[seed, cell][-1]
            outcomes[seed, cell] = [reached._replace(test=scored(some, wrong)) for some in named]
    return outcomes


# --- by the probabilities of the fifth left out ---


class Fold(Classification):
    """A problem whose test data are a fold of the training data, and whose metric is the probabilities."""

    def metrics(self, outputs: Tensor, part: Part, validation: tuple[Tensor, Part]) -> dict[str, Tensor]:
        """Probabilities (K, n, C)."""
        del part, validation
        return {"probabilities": outputs.double().softmax(-1)}


def folds(train: Part, seed: int) -> list[tuple[Indices, Indices]]:
    """The samples to train with and those left out, five times, with the given labels spread evenly."""
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(train.target)), train.target.numpy()))


def without_fold(draw: Callable[[int], Data], number: int, seed: int) -> Data:
    """Training data without a fold, and the fold."""
    train = draw(seed).train
    kept, left_out = (Part(*(x[rows] for x in train)) for rows in folds(train, seed)[number])
    return Data(kept, left_out, left_out)


def held_out_probabilities(
    problem: Problem, arm: Arm, seeds: Sequence[int], cell: Cell
) -> tuple[dict[int, npt.NDArray[np.float64]], dict[int, float]]:
    """Probabilities (n, C) of every training sample by the network of the four folds that it is not in.

    And the mean weight of the five trainings; both by seed.
    """
    found = {seed: np.zeros((len(problem.draw(seed).train.target), problem.outputs)) for seed in seeds}
    weights = dict.fromkeys(seeds, 0.0)
    for number in range(FOLDS):
        fold = Fold(
            f"{problem.name}, without fold {number}", functools.partial(without_fold, problem.draw, number),
            problem.features, problem.outputs, problem.hidden, problem.epochs, problem.batch_size,
        )  # fmt: skip
        trained = train(fold, arm, seeds, [cell])
        for seed in seeds:
            _, rows = folds(problem.draw(seed).train, seed)[number]
            reached = trained[seed, cell][-1]
            found[seed][rows] = reached.test["probabilities"]
            weights[seed] += reached.mean_weight / FOLDS
    return found, weights


def by_cleanlab(labels: Indices, probabilities: npt.NDArray[np.float64]) -> tuple[Indices, Indices]:
    """What confident learning takes for wrong, the most suspicious first; and all samples, those in front."""
    from cleanlab.filter import find_label_issues  # noqa: PLC0415
    from cleanlab.rank import get_label_quality_scores  # noqa: PLC0415

    found = find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    order = np.argsort(get_label_quality_scores(labels, probabilities), kind="stable")
    return found, np.concatenate([found, order[~np.isin(order, found)]])


def by_folds(
    problem: Problem,
    arm: Arm,
    seeds: Sequence[int],
    cells: Sequence[Cell],
    snapshots: Sequence[int] = (),
    *,
    truth: Truth,
    cleanlab: bool,
) -> dict[tuple[int, Cell], list[Outcome]]:
    """How well five trainings name wrong labels: by held-out loss, by cleanlab, by cleanlab's own number."""
    del snapshots
    outcomes: dict[tuple[int, Cell], list[Outcome]] = {}
    for cell in cells:
        begin = time.process_time()
        probabilities, weights = held_out_probabilities(problem, arm, seeds, cell)
        share = (time.process_time() - begin) / len(seeds)
        for seed in seeds:
            wrong, labels = truth.wrong(seed), problem.draw(seed).train.target.numpy()
            own = np.maximum(probabilities[seed][np.arange(len(labels)), labels], np.finfo(np.float64).tiny)
            count = int(wrong.sum())
            named = [rgd.suspects(-np.log(own), k=count).indices]
            if cleanlab:
                found, order = by_cleanlab(labels, probabilities[seed])
                named += [order[:count], found]
            outcomes[seed, cell] = [Outcome({}, scored(some, wrong), weights[seed], share) for some in named]
    return outcomes


# --- the comparison ---


def has_cleanlab(session: Session) -> bool:
    """Whether cleanlab is there.

    Raises:
        SystemExit: If it is not, unless the run is a quick one.
    """
    if importlib.util.find_spec("cleanlab") is not None:
        return True
    if session.quick:
        print("cleanlab is not installed: its arms are left out")
        return False
    raise SystemExit("this program needs the package cleanlab: run `pip install cleanlab`")


def at_chosen(
    session: Session, problem: Problem, chosen: Chosen, trainer: Trainer, *, how: str, trainings: str
) -> Chosen:
    """What `trainer` reaches at the cells that the seeds chose; `how` names its runs in the store."""
    other = dataclasses.replace(problem, name=f"{problem.name}, {how}")
    outcomes: dict[int, tuple[Outcome, ...]] = {}
    cells = dict(zip(chosen.seeds, (choice.cell for choice in chosen.choices), strict=True))
    for cell in dict.fromkeys(cells.values()):
        seeds = [seed for seed, own in cells.items() if own == cell]
        found = run_cells(other, chosen.arm, seeds, [cell], session.store, (), trainer, session.progress)
        outcomes |= {seed: tuple(found[seed, cell]) for seed in seeds}
    choices = tuple(choice._replace(grid=f"{choice.grid}; {trainings}") for choice in chosen.choices)
    return dataclasses.replace(
        chosen, choices=choices, outcomes=tuple(outcomes[seed] for seed in chosen.seeds)
    )


def compare(session: Session, here: str, problem: Problem, truth: Truth, cleanlab: bool) -> list[Result]:
    """All arms in a setting."""
    plain = session.sweep(problem, Arm(PLAIN), GRID)
    dial = session.sweep(problem, Arm(DIAL, rgd.KL(scale=-0.7)), GRID)
    ramp = session.sweep(problem, Arm(RAMP, Ramp(-1.0)), GRID)
    placebo = session.sweep(problem, times_mean_weight(dial.arm, dial.mean_weight), GRID)
    one, five = "1 training", f"{FOLDS} trainings on {FOLDS - 1}/{FOLDS}"
    losses = functools.partial(by_losses, truth=truth)
    folded = functools.partial(by_folds, truth=truth, cleanlab=cleanlab)
    version = f"folds, cleanlab {metadata.version('cleanlab') if cleanlab else 'left out'}"
    of_folds = at_chosen(session, problem, plain, folded, how=version, trainings=five)
    baseline = CLEANLAB if cleanlab else HELD_OUT
    first = Result(here, of_folds.renamed(baseline), snapshot=int(cleanlab))
    results = [first]
    if cleanlab:
        on_dial = at_chosen(session, problem, dial, folded, how=version, trainings=five)
        results += [
            Result(here, of_folds.renamed(OWN_NUMBER), CLEANLAB, 2),
            Result(here, of_folds.renamed(HELD_OUT), CLEANLAB, 0),
            Result(here, on_dial.renamed(CLEANLAB_ON_DIAL), CLEANLAB, 1),
        ]
    for chosen in (plain, dial, ramp, placebo):
        found = at_chosen(session, problem, chosen, losses, how="suspects by losses", trainings=one)
        results.append(Result(here, found, PLAIN if chosen is placebo else baseline, 0))
        if chosen is not placebo:
            results.append(Result(here, found.renamed(chosen.arm.name + LAST), baseline, 1))
    return results


def run(session: Session) -> list[Result]:
    cleanlab = has_cleanlab(session)
    data = ("digits",) if session.quick else DATA
    noises = {"30% pairs": NOISES["30% pairs"]} if session.quick else NOISES
    session.expect(4 * len(data) * len(noises), GRID)
    results: list[Result] = []
    for name in data:
        for words, (noise, pairs) in noises.items():
            epochs = {"epochs": 2} if session.quick else {}
            problem = DATA[name](noise, pairs=pairs, **epochs)
            truth = Truth(problem, DATA[name](0.0, **epochs))
            results += compare(session, setting(name, words), problem, truth, cleanlab)
    return results


# --- what came out ---


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    settings = table.settings()
    columns = min(2, len(settings))
    rows = -(-len(settings) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.4 * columns, 1 + 3.2 * rows), squeeze=False, sharey=True
    )
    for panel, here in zip(axes.flat, settings, strict=True):
        arms = [arm for arm in table.arms(here) if arm != OWN_NUMBER]
        for k, arm in enumerate(arms):
            line = table.line(here, arm, "false_share")
            compared = line.baseline == arms[0]
            color = GREY if not compared else BLUE if line.better else ORANGE
            face = color if line.outside or not line.baseline else "white"
            panel.errorbar(
                [100 * line.mean], [-k], xerr=[100 * line.half], fmt="o", color=color, markerfacecolor=face,
                markersize=5,
            )  # fmt: skip
        panel.axvline(
            100 * table.line(here, arms[0], "false_share").mean, color=GREY, linewidth=0.8, zorder=0
        )
        words = [arm.replace("plain x mean weight of", "placebo of") for arm in arms]
        panel.set_yticks(range(0, -len(arms), -1), words)
        panel.set_ylim(0.6 - len(arms), 0.6)
        panel.set_xlim(left=0)
        panel.set_title(f"{here} wrong", loc="left", fontsize=11)
        panel.tick_params(length=0)
        panel.grid(axis="x", color="#e3e6eb")
    for panel in axes[-1]:
        panel.set_xlabel("right labels among the samples named, %")
    baseline = table.arms(settings[0])[0]
    figure.suptitle(
        f"Wrong labels found, 95% interval, {table.lines[0].seeds} seeds. "
        f"Filled: differs from {baseline}, the placebo from plain",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def sentence(table: Table) -> str:
    parts: list[str] = []
    for here in table.settings():
        baseline, *arms = table.arms(here)
        words = [f"{baseline} {100 * table.line(here, baseline, 'false_share').mean:.1f}%"]
        words += [
            f"{arm} {100 * line.mean:.1f}% ({line.shown(100, '.1f')})"
            for arm in (DIAL, RAMP, PLAIN, CLEANLAB_ON_DIAL)
            if arm in arms
            for line in [table.line(here, arm, "false_share")]
        ]
        parts.append(f"{here}: {', '.join(words)}")
    baseline = table.arms(table.settings()[0])[0]
    return (
        "Right labels among as many suspects as there are wrong labels, in brackets the difference to "
        f"{baseline} in points. {'. '.join(parts)}. The losses come from one training, and {baseline} takes "
        f"{FOLDS} further ones. Where labels are flipped in pairs, the dial makes most of the difference: "
        f"with it, {baseline} comes close."
    )


ROW = Row(
    "suspects",
    "Wrong labels found by loss, against cleanlab",
    Claim(
        setting("digits", "30% pairs"),
        DIAL,
        "false_share",
        "By the losses of one training with the dial, fewer right labels are suspected than by cleanlab.",
    ),
    METRICS,
    run,
    picture,
    sentence,
)

if __name__ == "__main__":
    main(ROW)
