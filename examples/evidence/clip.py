"""Clip and scale: what the two numbers of `rgd.KL(tau, scale=s)` do to accuracy (Figure 1).

Asked: how does test accuracy depend on the clipping factor tau and on the scale s, with right labels and with
20% wrong ones?

Arms: every pair of `TAUS` and `SCALES`, the opposite sign among them, each compared with plain cross-entropy.
Controls for tau = 1, s = 0.5, the paper's default: the same weights divided by their mean over the batch, and
plain cross-entropy times the mean weight. "tuned" is the pair of the positive scales that validation chose
among `TUNED`, seed by seed; it is compared with plain training that chose among as many starts.

Protocol: as in `dial.py`, on scikit-learn's digits: 500 training, 300 validation, 997 test images, wrong
labels in training and validation, right ones in the test; 64 hidden units, SGD with momentum 0.9, batches of
32, a cosine schedule over 30 epochs, the last step's network. Each seed chooses learning rate and weight
decay of every arm by its own validation accuracy.

Run it with `make evidence ROW=clip`, or `python examples/evidence/clip.py --full`.
"""

from __future__ import annotations

import math
import pathlib

import numpy as np
import rgd
from harness import Arm, Claim, Grid, Result, Row, Session, Table, digits, main, tuned
from harness.arms import mean_one, times_mean_weight
from harness.pictures import heat_map, pyplot, save

TAUS = (0.5, 1.0, 3.0, math.inf)
SCALES = (-0.5, 0.25, 0.5, 1.0)
NOISES = (0.0, 0.2)
DEFAULT = (1.0, 0.5)
TUNED = ((1.0, 0.5), (3.0, 0.25), (3.0, 0.5))
PLAIN, PLAIN_BUDGET = "plain", "plain, as many runs"
METRICS = ("accuracy", "worst_class_accuracy")


def name(tau: float, scale: float) -> str:
    return f"tau = {tau:g}, s = {scale:g}"


def setting(noise: float) -> str:
    return f"digits, {100 * noise:g}% wrong labels"


def run(session: Session) -> list[Result]:
    grid = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.001, 0.002, 0.004, 0.008, 0.016))
    noises = NOISES[:1] if session.quick else NOISES
    pairs = TUNED if session.quick else tuple((t, s) for t in TAUS for s in SCALES)
    session.expect(len(noises) * (len(pairs) + len(TUNED) + 2), grid)
    results: list[Result] = []
    for noise in noises:
        problem, here = digits(noise, epochs=2 if session.quick else 30), setting(noise)
        results.append(Result(here, session.sweep(problem, Arm(PLAIN), grid)))
        arms = {pair: Arm(name(*pair), rgd.KL(pair[0], scale=pair[1])) for pair in pairs}
        chosen = {pair: session.sweep(problem, arm, grid) for pair, arm in arms.items()}
        results += [Result(here, c, PLAIN) for c in chosen.values()]
        starts = 1 if session.quick else len(TUNED)
        plain = session.as_many_runs(problem, Arm(PLAIN_BUDGET), starts, grid)
        results.append(Result(here, plain))
        best = tuned("tuned", [chosen[pair] for pair in TUNED], problem.select)
        results.append(Result(here, best, PLAIN_BUDGET))
        default = arms[DEFAULT]
        for control in (mean_one(default), times_mean_weight(default, chosen[DEFAULT].mean_weight)):
            results.append(Result(here, session.sweep(problem, control, grid), PLAIN))
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    here = table.settings()
    taus = [t for t in TAUS if any(arm.startswith(f"tau = {t:g},") for arm in table.arms(here[0]))]
    scales = [s for s in SCALES if all(name(t, s) in table.arms(here[0]) for t in taus)]
    figure, axes = plt.subplots(1, len(here), figsize=(0.8 + 4.6 * len(here), 3.4), squeeze=False)
    for panel, where in zip(axes[0], here, strict=True):
        lines = [[table.line(where, name(t, s), "accuracy") for s in scales] for t in taus]
        heat_map(
            panel, np.array([[line.unit * line.difference for line in r] for r in lines]),
            [f"{t:g}" for t in taus], [f"{s:g}" for s in scales], limit=4,
            outside=np.array([[line.outside for line in r] for r in lines]),
        )  # fmt: skip
        panel.set_title(where, loc="left", fontsize=11)
        panel.set_xlabel("scale s")
    axes[0][0].set_ylabel("clipping factor tau")
    figure.suptitle(
        f"Accuracy against plain training, points, {table.lines[0].seeds} seeds; "
        "bold: the interval excludes 0",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def sentence(table: Table) -> str:
    parts = [
        f"{where}: {table.line(where, name(*DEFAULT), 'accuracy').points()} points, tuned "
        f"{table.line(where, 'tuned', 'accuracy').points()}"
        for where in table.settings()
    ]
    return (
        f"Accuracy of the paper's default, tau = 1 and s = 0.5, against plain training. {'; '.join(parts)}."
    )


ROW = Row(
    "clip",
    "Clip and scale (Figure 1)",
    Claim(setting(0.0), name(*DEFAULT), "accuracy", "With right labels, RGD's default raises accuracy."),
    METRICS,
    run,
    picture,
    sentence,
)

if __name__ == "__main__":
    main(ROW)
