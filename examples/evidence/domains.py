"""Domains: digits at six angles, one of them never seen in training.

Asked: which weighting generalises to an angle that training does not show, by accuracy on that angle?

Arms: plain training (ERM); `rgd.GroupDRO` over the angles; `rgd.CVaR(0.3)`; RGD (`rgd.KL(tau=1)`). Controls:
RGD's weights divided by their mean, plain training times RGD's mean weight, RGD with the opposite sign. Each
is compared with plain training.

Protocol: scikit-learn's digits, turned by 0, 15, 30, 45, 60 or 75 degrees; each image is seen at one angle
only. For each angle left out, 500 training and 300 validation images at the other five, 100 and 60 of each;
the test has 200 images at the angle left out. Nothing is chosen on that angle: each seed chooses learning
rate and weight decay of every arm by its own validation accuracy on the five angles of training. 64 hidden
units, SGD with momentum 0.9, batches of 32, a cosine schedule over 30 epochs, the last step's network. "all
angles" is the mean over the six angles left out, seed by seed.

Run it with `make evidence ROW=domains`, or `python examples/evidence/domains.py --full`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import numpy as np
import rgd
import torch
from harness import (
    Arm,
    Cell,
    Choice,
    Chosen,
    Claim,
    Classification,
    Data,
    Grid,
    Part,
    Reported,
    Result,
    Row,
    Session,
    Table,
    main,
)
from harness.arms import mean_one, opposite_sign, times_mean_weight
from harness.pictures import intervals, save
from harness.problems import load
from scipy import ndimage

ANGLES = (0, 15, 30, 45, 60, 75)
TRAINING, VALIDATION, TEST = 100, 60, 200
PLAIN, RGD, ALL = "ERM", "RGD", "all angles"
ARMS = (
    Arm(PLAIN),
    Arm("GroupDRO", rgd.GroupDRO(len(ANGLES) - 1, 0.01)),
    Arm("CVaR(0.3)", rgd.CVaR(0.3)),
    Arm(RGD, rgd.KL(1.0)),
)
METRICS = ("accuracy", "worst_angle_accuracy")


def setting(angle: int) -> str:
    return f"{angle} degrees left out"


@functools.cache
def turned(angle: int) -> np.ndarray:
    """All digits, turned, (n, 64)."""
    images = load("digits")[0].reshape(-1, 8, 8)
    moved = ndimage.rotate(images, angle, axes=(2, 1), reshape=False, order=1)
    return moved.clip(0, 1).reshape(-1, 64)


def draw(seed: int, left_out: int) -> Data:
    """Images of the five other angles, whose number is the group, and a test at the angle left out."""
    target = load("digits")[1]
    rows = np.random.default_rng([41, seed]).permutation(len(target))
    test, rest = np.split(rows, [TEST])
    parts: list[list[tuple[np.ndarray, np.ndarray, int]]] = [[], []]
    for group, angle in enumerate(a for a in ANGLES if a != left_out):
        training, validation, rest = np.split(rest, [TRAINING, TRAINING + VALIDATION])
        for part, chosen in zip(parts, (training, validation), strict=True):
            part.append((turned(angle)[chosen], target[chosen], group))
    parts.append([(turned(left_out)[test], target[test], 0)])
    return Data(
        *(
            Part(
                torch.tensor(np.concatenate([x for x, _, _ in part]), dtype=torch.float32),
                torch.tensor(np.concatenate([y for _, y, _ in part])),
                torch.cat([torch.full((len(y),), group) for _, y, group in part]),
            )
            for part in parts
        )
    )


def mean_of(chosen: list[Chosen]) -> Chosen:
    """An arm's test metrics, averaged over the angles left out, seed by seed."""
    outcomes = []
    for runs in zip(*(c.outcomes for c in chosen), strict=True):
        tests = [run[-1].test for run in runs]
        mean = {m: float(np.mean([test[m] for test in tests])) for m in METRICS if m in tests[0]}
        mean["worst_angle_accuracy"] = min(test["accuracy"] for test in tests)
        weight = float(np.mean([run[-1].mean_weight for run in runs]))
        outcomes.append((runs[0][-1]._replace(test=mean, mean_weight=weight),))
    nan = float("nan")
    choice = Choice(Cell(nan, nan), nan, "as for each angle")
    return dataclasses.replace(
        chosen[0], outcomes=tuple(outcomes), choices=tuple(choice for _ in chosen[0].choices)
    )


def run(session: Session) -> list[Result]:
    grid = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.001, 0.002, 0.004, 0.008, 0.016))
    angles = (0, 75) if session.quick else ANGLES
    session.expect(len(angles) * (len(ARMS) + 3), grid)
    of_arm: dict[str, list[Chosen]] = {}
    results: list[Result] = []
    for angle in angles:
        name = f"{TRAINING} {VALIDATION} {TEST}, {setting(angle)}"
        epochs = 2 if session.quick else 30
        problem = Classification(name, functools.partial(draw, left_out=angle), 64, 10, epochs=epochs)
        chosen = [session.sweep(problem, arm, grid) for arm in ARMS]
        rgd_arm, weight = ARMS[-1], chosen[-1].mean_weight
        controls = (mean_one(rgd_arm), times_mean_weight(rgd_arm, weight), opposite_sign(rgd_arm))
        chosen += [session.sweep(problem, control, grid) for control in controls]
        for c in chosen:
            of_arm.setdefault(c.arm.name, []).append(c)
            results.append(Result(setting(angle), c, "" if c.arm.name == PLAIN else PLAIN))
    means = [Result(ALL, mean_of(c), "" if name == PLAIN else PLAIN) for name, c in of_arm.items()]
    return means + results


def picture(table: Table, path: pathlib.Path) -> None:
    arms = {
        arm: arm.replace("plain x mean weight of", "placebo of") for arm in table.arms(ALL) if arm != PLAIN
    }
    words = {"accuracy": "accuracy, mean of the angles", "worst_angle_accuracy": "accuracy, worst angle"}
    title = f"An angle left out: difference to ERM, {table.lines[0].seeds} seeds"
    save(intervals(table, arms, words, title, [ALL]), path, table)


def sentence(table: Table) -> str:
    plain = table.line(ALL, PLAIN, "accuracy")
    arms = ("GroupDRO", "CVaR(0.3)", RGD, f"{RGD}, opposite sign")

    def shown(metric: str) -> str:
        return ", ".join(f"{arm} {table.line(ALL, arm, metric).said()}" for arm in arms)

    return (
        "On the angle left out, against ERM, in points. Accuracy, mean of the angles "
        f"({100 * plain.mean:.1f}%): {shown('accuracy')}; of the worst angle: "
        f"{shown('worst_angle_accuracy')}."
    )


ROW = Row(
    "domains",
    "Domains: an angle left out",
    Claim(
        ALL,
        RGD,
        "accuracy",
        "RGD raises accuracy on an angle that training does not show.",
        Reported(0.7, "DomainBed, mean of its data sets"),
    ),
    METRICS,
    run,
    picture,
    sentence,
)

if __name__ == "__main__":
    main(ROW)
