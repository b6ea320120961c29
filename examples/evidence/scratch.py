"""Polluted text from scratch: is a prior needed?

Asked: without a network that was trained on clean text before, do weights that favour small losses make use
of a pool of which 70% is shuffled characters, or are the few clean sequences better alone?

Data and network are those of `polluted.py`: 300 clean sequences and a pool of 4800, 70% of which have their
characters shuffled within the sequence; 300 clean sequences choose and 400 test, drawn anew for every seed.
Here every arm begins with a new network, and no arm has a reference model.

Arms: the 300 clean sequences alone, the baseline of all others. On clean and pool together: plain
cross-entropy; s = -1 and s = -3, `rgd.KL(scale=s, normalize=True)` with a sequence weighted by its mean loss.
The weights of both have mean one, so that their placebo is plain training itself.

Protocol: 572 steps for every arm, as many as the prior of `polluted.py` and what goes on from it take
together: 2.7 passes over clean and pool, or 48 over the clean sequences. SGD with momentum 0.9, batches of
24 sequences, a cosine schedule; the last step's network is measured. Every seed has its own text, initial
network and order of batches, and chooses learning rate and weight decay of every arm by its own clean
validation sequences: "by accuracy" by their accuracy, "by mean loss" by their loss, among the same trainings.
"worst_tenth" is the mean loss of the tenth of the test sequences with the largest losses.

Run it with `make evidence ROW=scratch`, or `python examples/evidence/scratch.py --full`.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import rgd
from harness import Cell, Claim, Grid, Outcome, Result, Row, Session, Table, main
from polluted import (
    BY_ACCURACY,
    CLEAN,
    DIAL,
    METRICS,
    PLAIN,
    QUICK,
    REPORTED,
    Polluted,
    SequenceArm,
    Sizes,
    draw,
    reported,
    train,
)

MILD = "s = -1"
ARMS = (
    SequenceArm(PLAIN),
    SequenceArm(MILD, rgd.KL(scale=-1.0, normalize=True)),
    SequenceArm(DIAL, rgd.KL(scale=-3.0, normalize=True)),
)
GRIDS = {
    "grid": Grid((0.4, 0.8, 1.6), (0.0005, 0.001, 0.002)),
    "quick": Grid((0.4, 0.8), (0.001, 0.002)),
}


def by_cell(
    problem: Polluted,
    arm: SequenceArm,
    seeds: Sequence[int],
    cells: Sequence[Cell],
    snapshots: Sequence[int] = (),
) -> dict[tuple[int, Cell], list[Outcome]]:
    """Trains the networks of one cell at a time: the numbers of so few fit into the processor's cache."""
    return {
        run: outcomes
        for cell in cells
        for run, outcomes in train(problem, arm, seeds, [cell], snapshots).items()
    }


def run(session: Session) -> list[Result]:
    sizes = QUICK if session.quick else Sizes()
    session.expect(len(ARMS) + 1, **GRIDS)  # both settings choose among the same trainings
    results: list[Result] = []
    for here, (select, metrics) in REPORTED.items():
        problem = Polluted(here, sizes, select, scratch=True)
        sweep = functools.partial(session.sweep, problem, trainer=by_cell, **GRIDS)
        results.append(Result(here, reported(sweep(SequenceArm(CLEAN, on="first")), metrics)))
        results.extend(Result(here, reported(sweep(arm), metrics), CLEAN) for arm in ARMS)
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    names = [arm.name for arm in ARMS]
    draw(table, path, names, "The same pool without a prior: against the clean sequences alone")


def sentence(table: Table) -> str:
    lines = {
        metric: {arm.name: table.line(here, arm.name, metric) for arm in ARMS}
        for here, (_, metrics) in REPORTED.items()
        for metric in metrics
    }
    told = {
        metric: ", ".join(f"{arm} {line.said()}" for arm, line in lines[metric].items()) for metric in METRICS
    }
    better = [arm for arm, line in lines["accuracy"].items() if line.better and line.outside]
    alone = 100 * table.line(BY_ACCURACY, CLEAN, "accuracy").mean
    found = f"{' and '.join(better)} gained accuracy" if better else "no weighting gained accuracy"
    against_plain = table.against(BY_ACCURACY, DIAL, PLAIN, "accuracy").points()
    return (
        f"From scratch, {found} over the {CLEAN} ({alone:.1f}%). Against these, accuracy in points: "
        f"{told['accuracy']}. Mean loss in nats a character: {told['mean_loss']}. Worst tenth: "
        f"{told['worst_tenth']}. Against plain training on clean and pool, {DIAL} has {against_plain} points."
    )


ROW = Row(
    "scratch",
    "Polluted text from scratch",
    Claim(
        BY_ACCURACY,
        DIAL,
        "accuracy",
        "Without a prior, s = -3 on clean and pool beats the clean sequences alone.",
    ),
    METRICS,
    run,
    picture,
    sentence,
)

if __name__ == "__main__":
    main(ROW)
