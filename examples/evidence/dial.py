"""The dial: weights exp(s * loss), s from -1 to 1, against wrong labels.

Asked: where on the dial is test accuracy best, as the share of wrong labels grows?

Arms: `rgd.KL(math.inf, scale=s)` for each s in `SCALES`; s = 0 is plain cross-entropy, with which each is
compared. "tuned s" is the s that validation chose among `TUNED`, seed by seed; it is compared with plain
training that chose among three starts. Controls at no noise and at 40%, for s = -0.7 and 0.5: the same
weights divided by their mean over the batch, and plain cross-entropy times the mean weight of the re-weighted
runs. The opposite sign is on the dial.

Protocol: scikit-learn's digits (500 training, 300 validation, 997 test images) and breast cancer (200, 200,
169 rows). Wrong labels are drawn uniformly from the other classes, in training AND validation data: nobody
has clean labels to choose with. Test labels are right. A multilayer perceptron with 64 hidden units, SGD with
momentum 0.9, batches of 32, a cosine schedule over 30 epochs; the last step's network is measured. Each seed
has its own split, wrong labels, initial network and order of batches, and chooses learning rate and weight
decay of every arm by its own validation accuracy; differences are taken seed by seed.

Run it with `make evidence ROW=dial`, or `python examples/evidence/dial.py --full`.
"""

from __future__ import annotations

import math
import pathlib

import numpy as np
import rgd
from harness import (
    Arm,
    Claim,
    Grid,
    Result,
    Row,
    Session,
    Table,
    breast_cancer,
    digits,
    main,
    mean_one,
    times_mean_weight,
    tuned,
)
from harness.pictures import heat_map, pyplot, save

SCALES = (-1.0, -0.7, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
NOISES = (0.0, 0.1, 0.2, 0.4)
TUNED = (-0.7, 0.0, 0.5)
CONTROLLED_SCALES, CONTROLLED_NOISES = (-0.7, 0.5), (0.0, 0.4)
DATA = {"digits": digits, "breast cancer": breast_cancer}
PLAIN, PLAIN_BUDGET = "s = 0", "s = 0, as many runs"
METRICS = ("accuracy", "worst_class_accuracy")


def name(scale: float) -> str:
    return f"s = {scale:g}"


def weighting(scale: float) -> rgd.Weighting | None:
    return rgd.KL(math.inf, scale=scale) if scale else None


def setting(data: str, noise: float) -> str:
    return f"{data}, {100 * noise:g}% wrong labels"


def run(session: Session) -> list[Result]:
    grid = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.001, 0.002, 0.004, 0.008, 0.016))
    noises = NOISES[-1:] if session.quick else NOISES
    sets = ("digits",) if session.quick else DATA
    controls = len(CONTROLLED_SCALES) * 2 * len(CONTROLLED_NOISES)
    session.expect(len(sets) * (len(noises) * (len(SCALES) + len(TUNED) - 1) + controls), grid)
    results: list[Result] = []
    for data in sets:
        for noise in noises:
            problem, here = (
                DATA[data](noise, **({"epochs": 3} if session.quick else {})),
                setting(data, noise),
            )
            arms = {s: Arm(name(s), weighting(s)) for s in SCALES}
            dial = {s: session.sweep(problem, arm, grid) for s, arm in arms.items()}
            results += [Result(here, chosen, "" if s == 0 else PLAIN) for s, chosen in dial.items()]
            starts = 1 if session.quick else len(TUNED)
            plain = session.as_many_runs(problem, Arm(PLAIN_BUDGET), starts, grid)
            results.append(Result(here, plain, ""))
            results.append(
                Result(here, tuned("tuned s", [dial[s] for s in TUNED], problem.select), PLAIN_BUDGET)
            )
            for s in CONTROLLED_SCALES if noise in CONTROLLED_NOISES else ():
                for control in (mean_one(arms[s]), times_mean_weight(arms[s], dial[s].mean_weight)):
                    results.append(Result(here, session.sweep(problem, control, grid), PLAIN))
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    scales = [s for s in SCALES if s]
    sets = list(dict.fromkeys(s.split(",")[0] for s in table.settings()))
    figure, axes = plt.subplots(1, len(sets), figsize=(0.8 + 5.3 * len(sets), 3.4), squeeze=False)
    for panel, data in zip(axes[0], sets, strict=True):
        noises = [n for n in NOISES if setting(data, n) in table.settings()]
        lines = [[table.line(setting(data, n), name(s), "accuracy") for s in scales] for n in noises]
        heat_map(
            panel, np.array([[line.unit * line.difference for line in r] for r in lines]),
            [f"{100 * n:g}%" for n in noises], [f"{s:g}" for s in scales], limit=6,
            outside=np.array([[line.outside for line in r] for r in lines]),
        )  # fmt: skip
        panel.set_title(data, loc="left", fontsize=11)
        panel.set_xlabel("s;  weight = exp(s · loss)")
    axes[0][0].set_ylabel("wrong labels")
    figure.suptitle(
        f"Accuracy against plain training (s = 0), points, {table.lines[0].seeds} seeds; "
        "bold: the interval excludes 0",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def sentence(table: Table) -> str:
    def points(noise: float, arm: str) -> str:
        return table.line(setting("digits", noise), arm, "accuracy").points()

    parts = [
        f"{100 * noise:g}% wrong labels: "
        + ", ".join(f"s = {s:g} {points(noise, name(s))}" for s in (-0.7, 0.5, 1.0))
        + f"; the tuned s, against as many runs of plain training, {points(noise, 'tuned s')}"
        for noise in (0.4, 0.0)
        if setting("digits", noise) in table.settings()
    ]
    text = f"Digits, test accuracy against plain training, in points. {'. '.join(parts)}."
    here = setting("breast cancer", 0.4)
    if here in table.settings():
        plain = table.line(here, PLAIN, "accuracy")
        placebo = f"plain x mean weight of {name(-0.7)}"
        arms = (name(-0.7), name(0.25), name(1.0), placebo)
        shown = ", ".join(f"{arm} {table.line(here, arm, 'accuracy').points()}" for arm in arms)
        text += (
            f" Breast cancer with 40% wrong labels, where plain training reaches {100 * plain.mean:.1f}%: "
            f"{shown}; {name(-0.7)} against this placebo "
            f"{table.against(here, name(-0.7), placebo, 'accuracy').points()}. There both signs and the "
            "placebo gain, so a part of the gain is that of a smaller or larger step alone."
        )
    return text


ROW = Row(
    "dial",
    "Wrong labels: every position of the dial",
    Claim(
        setting("digits", 0.4),
        name(-0.7),
        "accuracy",
        "With 40% wrong labels, s = -0.7 raises test accuracy.",
    ),
    METRICS,
    run,
    picture,
    sentence,
)

if __name__ == "__main__":
    main(ROW)
