"""Boosted trees: does re-weighting by loss help LightGBM on the small tables of KEEL?

Asked: as in `tabular.py`, of boosted trees instead of a network, through `rgd.boosting`.

Data: KEEL's sets of two classes, fetched and split as `tabular.py` does: the balanced ones of at most 1100
rows, and of the imbalanced ones one version of each original, that with the most rows of the rare class.

Arms: the logistic loss (`rgd.boosting.logistic` with every weight 1, the same code path); RGD (tau = 1); the
control, the logistic loss times RGD's mean weight on that data set. No arm tunes tau.

Protocol: three splits of each data set; 60 trees of at most 7 leaves, all of them used. The learning rate
and, as `weight_decay` in the tables, LightGBM's `lambda_l2` are chosen for every arm on every data set by the
mean validation accuracy, balanced accuracy for imbalanced sets, and lie inside their grid; among equals a
ten-thousandth of the mean loss decides. A run in the table is a data set. Intervals and p are over the
originals, as in `tabular.py`.

Run it with `make evidence ROW=trees`, or `python examples/evidence/trees.py --full`. It needs `lightgbm`.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import rgd
import rgd.boosting
import tabular
import torch
from harness import (
    Arm,
    Cell,
    EdgeError,
    Grid,
    Outcome,
    Problem,
    Result,
    Row,
    Session,
    Table,
    main,
    sweep,
    times_mean_weight,
)
from harness.pictures import save

PLAIN, RGD, CONTROL = tabular.PLAIN, tabular.RGD, tabular.CONTROL
SPLITS, QUICK_SPLITS, TREES, LEAVES, MOST_ROWS, WIDENINGS = 3, 2, 60, 7, 1100, 10


def boost(
    problem: Problem, arm: Arm, seeds: Sequence[int], cells: Sequence[Cell], snapshots: Sequence[int]
) -> dict[tuple[int, Cell], list[Outcome]]:
    """LightGBM, one model after the other."""
    import lightgbm  # noqa: PLC0415

    if snapshots:
        raise ValueError("all trees are used: there are no snapshots")
    objective = rgd.boosting.logistic(weighting=arm.weighting or rgd.ERM())
    outcomes: dict[tuple[int, Cell], list[Outcome]] = {}
    for seed in seeds:
        data = problem.draw(seed)
        labels = data.train.target.double().numpy()
        for cell in cells:
            begin, seen = time.process_time(), list[float]()

            def gradients(margins: npt.NDArray[np.float64], rows: Any, seen: list[float] = seen) -> Any:
                seen.append(float(objective.weights(rows.get_label(), margins).mean()))
                return objective(margins, rows)

            settings = {
                "objective": gradients, "learning_rate": cell.learning_rate, "lambda_l2": cell.weight_decay,
                "num_leaves": LEAVES, "min_data_in_leaf": 5, "num_threads": 1, "verbosity": -1, "seed": seed,
            }  # fmt: skip
            rows = lightgbm.Dataset(data.train.inputs.numpy(), labels, params={"verbosity": -1})
            model = lightgbm.train(settings, rows, TREES)
            outputs = [logits(model.predict(part.inputs.numpy(), raw_score=True)) for part in data[1:]]
            validation, test = (
                {name: v.item() for name, v in problem.metrics(out, part, (outputs[0], data[1])).items()}
                for out, part in zip(outputs, data[1:], strict=True)
            )
            seconds = time.process_time() - begin
            outcomes[seed, cell] = [Outcome(validation, test, float(np.mean(seen)), seconds)]
    return outcomes


def logits(margins: Any) -> torch.Tensor:
    """Outputs (1, n, 2) of two classes from margins (n,)."""
    second = torch.tensor(margins).float()
    return torch.stack([torch.zeros_like(second), second], 1)[None]


def chosen_sets(folder: pathlib.Path, kind: str) -> list[pathlib.Path]:
    """The files that are used: see the module's docstring."""
    found: dict[str, tuple[int, pathlib.Path]] = {}
    for path in tabular.chosen_sets(folder, kind):
        counts = Counter(row[-1] for row in tabular.read(path))
        if len(counts) == 2 and (kind == "imbalanced" or sum(counts.values()) <= MOST_ROWS):
            candidate = (min(counts.values()), path)
            name = tabular.original(path.stem, kind)
            found[name] = max(found.get(name, candidate), candidate)
    return [path for _, path in found.values()]


def run(session: Session) -> list[Result]:
    grid = Grid((0.03, 0.1, 0.3), (0.0, 1.0, 10.0), rate_factor=3.0, decay_factor=10.0)
    options = {
        "grid": grid, "store": session.store, "seeds": QUICK_SPLITS if session.quick else SPLITS,
        "most_widenings": WIDENINGS, "progress": session.progress, "trainer": boost,
    }  # fmt: skip
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = tabular.pretended(pathlib.Path(temporary) / "keel") if session.quick else tabular.fetch()
        for kind in tabular.CHOSEN_BY:
            for path in chosen_sets(folder, kind):
                task = tabular.problem(path, kind, steps=0)
                try:
                    plain = sweep(task, Arm(PLAIN), **options)
                    weighted = sweep(task, Arm(RGD, rgd.KL(1.0)), **options)
                    control = sweep(task, times_mean_weight(weighted.arm, weighted.mean_weight), **options)
                except EdgeError as error:  # the set is left out for all arms
                    print(f"left out: {error}", file=sys.stderr)
                    continue
                seed = f"{tabular.original(path.stem, kind)}/{path.stem}"
                arms = (plain, PLAIN, ""), (weighted, RGD, PLAIN), (control, CONTROL, PLAIN)
                for chosen, name, base in arms:
                    results.append(Result(f"{kind} sets", tabular.averaged(chosen, name, seed), base))
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    save(tabular.bars(table, "LightGBM on KEEL: RGD (tau 1) against the logistic loss"), path, table)


def sentence(table: Table) -> str:
    parts = [tabular.said(table, kind) for kind in tabular.CHOSEN_BY]
    return f"LightGBM, RGD (tau 1) against the logistic loss. {'. '.join(parts)}."


ROW = Row("trees", "Boosted trees on tables of KEEL", tabular.METRICS, run, picture, sentence)

if __name__ == "__main__":
    main(ROW)
