"""Boosted trees: does re-weighting by loss help LightGBM on the small tables of KEEL?

Asked: as in `tabular.py`, of boosted trees instead of a network, through `rgd.boosting`.

Data: KEEL's sets, fetched and split as `tabular.py` does: the balanced ones, and of the imbalanced ones one
version of each original, that with the most rows of the rare class. Of larger sets 1100 rows are drawn.

Arms: as in `tabular.py`. Plain training is the logistic loss, or for more than two classes the softmax
cross-entropy, of `rgd.boosting` with every weight 1: the same code path. The tuned tau is compared with plain
training that chose among three starts; these trees have no random start, so all three are one. A batch is all
training rows, so mean-one weights have mean one over them.

Protocol: three splits of each data set; 30 rounds of trees of at most 7 leaves, a tree a class where there
are more than two, all of them used. The learning rate and, as `weight_decay` in the tables, LightGBM's
`lambda_l2` are chosen for every arm by every split of a data set, by its validation accuracy, balanced
accuracy for imbalanced sets, and by its mean validation loss, as in `tabular.py`. A run in the table is a
data set. Intervals and p are over the originals, as in `tabular.py`.

Run it with `make evidence ROW=trees`, or `python examples/evidence/trees.py --full`. It needs `lightgbm`.
`--openml` and `--tabarena` take data sets of OpenML, as in `tabular.py`; names become columns of 0 and 1.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import rgd
import rgd.boosting
import tabular
import torch
from harness import Arm, Cell, Claim, Grid, Outcome, Problem, Row, Table
from harness.pictures import save

SPLITS, ROUNDS, LEAVES, MOST_ROWS = 3, 30, 7, 1100


def boost(
    problem: Problem, arm: Arm, seeds: Sequence[int], cells: Sequence[Cell], snapshots: Sequence[int]
) -> dict[tuple[int, Cell], list[Outcome]]:
    """LightGBM, one model after the other."""
    import lightgbm  # noqa: PLC0415

    if snapshots:
        raise ValueError("all trees are used: there are no snapshots")
    weighting, classes = arm.weighting or rgd.ERM(), problem.outputs
    objective = rgd.boosting.logistic(weighting) if classes == 2 else rgd.boosting.softmax(classes, weighting)
    fixed = {
        "num_leaves": LEAVES, "min_data_in_leaf": 5, "num_threads": 1, "verbosity": -1,
        "num_class": 1 if classes == 2 else classes,
    }  # fmt: skip
    outcomes: dict[tuple[int, Cell], list[Outcome]] = {}
    for seed in seeds:
        data = problem.draw(seed)
        labels = data.train.target.double().numpy()
        rows = lightgbm.Dataset(data.train.inputs.numpy(), labels, params=fixed, free_raw_data=False)
        for cell in cells:
            begin, seen = time.process_time(), list[float]()

            def gradients(margins: npt.NDArray[np.float64], rows: Any, seen: list[float] = seen) -> Any:
                seen.append(float(objective.weights(rows.get_label(), margins).mean()))
                return objective(margins, rows)

            settings = {
                **fixed, "objective": gradients, "learning_rate": cell.learning_rate,
                "lambda_l2": cell.weight_decay, "seed": seed,
            }  # fmt: skip
            model = lightgbm.train(settings, rows, problem.epochs, keep_training_booster=True)
            outputs = [logits(model.predict(part.inputs.numpy(), raw_score=True)) for part in data[1:]]
            validation, test = (
                {name: v.item() for name, v in problem.metrics(out, part, (outputs[0], data[1])).items()}
                for out, part in zip(outputs, data[1:], strict=True)
            )
            seconds = time.process_time() - begin
            outcomes[seed, cell] = [Outcome(validation, test, float(np.mean(seen)), seconds)]
    return outcomes


def logits(margins: Any) -> torch.Tensor:
    """Outputs (1, n, C) from margins (n, C), or (n,) of two classes."""
    given = torch.tensor(margins).float()
    return (torch.stack([torch.zeros_like(given), given], 1) if given.ndim == 1 else given)[None]


TREES = tabular.Learner(
    Grid((0.05, 0.1, 0.2, 0.4), (0.0, 1.0, 2.0, 4.0, 8.0)), SPLITS, boost, MOST_ROWS,
    rounds=ROUNDS, versions=1, starts=1,
)  # fmt: skip


def picture(table: Table, path: pathlib.Path) -> None:
    save(tabular.bars(table, "LightGBM: RGD (tau 1) against the plain loss"), path, table)


def sentence(table: Table) -> str:
    parts = [tabular.said(table, *setting) for setting in tabular.settings(table)]
    return f"LightGBM, RGD (tau 1) against the plain loss. {'. '.join(parts)}."


run = functools.partial(tabular.run, learner=TREES)
ROW = Row(
    "trees",
    "Boosted trees on tables of KEEL",
    Claim("balanced sets", tabular.RGD, "accuracy", "RGD raises the accuracy of boosted trees."),
    tabular.METRICS,
    run,
    picture,
    sentence,
    tabular.own_options,
    tabled=tabular.by_accuracy,
)

if __name__ == "__main__":
    tabular.command_line(ROW, TREES, sys.argv[1:])
