"""The whole family: what does each weighting give for the worst tenth, and what does it cost in the mean?

Asked: which members of rgd lie on the frontier of mean test loss against the loss of the worst tenth of the
test samples, once learning rate and weight decay are tuned for each?

Arms: plain training, and the members in `ARMS`. Each is compared with plain training. Control: plain training
tuned for the tail, for every arm is shown twice: its learning rate and weight decay are those with the best
validation mean loss, or those with the best validation loss of the worst tenth. RGD's weights divided by
their mean, and plain training times RGD's mean weight, are among the arms.

Protocol: scikit-learn's digits (500 training, 300 validation, 997 test images), cross-entropy; and diabetes
(200, 100, 142 rows of 10 numbers), squared error of the standardised target. A multilayer perceptron with 64
hidden units, SGD with momentum 0.9, batches of 32, a cosine schedule over 30 epochs; the last step's network
is measured. Learning rate and weight decay are chosen for every arm by the mean over 12 seeds, and lie inside
their grid. "scaled_" is after temperature scaling on the validation data, digits only.

Run it with `make evidence ROW=frontier`, or `python examples/evidence/frontier.py --full`.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib

import numpy as np
import rgd
import torch
from harness import (
    Arm,
    Classification,
    Data,
    Grid,
    Part,
    Regression,
    Result,
    Row,
    Session,
    Table,
    digits,
    main,
)
from harness.arms import mean_one, times_mean_weight
from harness.pictures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, pyplot, save
from sklearn.datasets import load_diabetes

PLAIN, RGD = "plain", "KL(tau=1)"
ARMS: dict[str, rgd.Weighting] = {
    RGD: rgd.KL(1.0),
    "KL(tau=3)": rgd.KL(3.0),
    "KL(inf, scale=0.5)": rgd.KL(math.inf, scale=0.5),
    "KL(inf, scale=-0.5)": rgd.KL(math.inf, scale=-0.5),
    "KL(inf, scale=0.5), normalised": rgd.KL(math.inf, scale=0.5, normalize=True),
    "KLBall(0.1)": rgd.KLBall(0.1),
    "KLBall(0.5)": rgd.KLBall(0.5),
    "ChiSquareBall(0.1)": rgd.ChiSquareBall(0.1),
    "ChiSquareBall(0.5)": rgd.ChiSquareBall(0.5),
    "CVaR(0.5)": rgd.CVaR(0.5),
    "CVaR(0.1)": rgd.CVaR(0.1),
    "Focal(1)": rgd.Focal(1.0),
    "MidrangeKL(0.5)": rgd.MidrangeKL(0.5),
    "Trimmed(KL(tau=1), 0.05)": rgd.Trimmed(rgd.KL(1.0), 0.05),
}
FAMILIES = {
    "KL(": BLUE, "KLBall": GREEN, "ChiSquare": PURPLE, "CVaR": ORANGE, "Focal": "#e69f00",
    "Midrange": "#56b4e9", "Trimmed": INK,
}  # fmt: skip
CHOSEN_BY = {"mean_loss": "chosen by mean loss", "worst_tenth": "chosen by the worst tenth"}


def diabetes(seed: int) -> Data:
    """A random split: 200 rows to train, 100 to validate, 142 to test."""
    inputs, target = load_diabetes(return_X_y=True, scaled=True)
    rows = np.random.default_rng([31, seed]).permutation(len(target))
    inputs, target = inputs / inputs.std(0), (target - target.mean()) / target.std()
    parts: list[Part] = []
    for chosen in np.split(rows, (200, 300)):
        x, y = (torch.tensor(a[chosen], dtype=torch.float32) for a in (inputs, target))
        parts.append(Part(x, y, torch.zeros(len(y))))
    return Data(*parts)


def problems(quick: bool) -> dict[str, Classification | Regression]:
    epochs = 3 if quick else 30
    found: dict[str, Classification | Regression] = {"digits": digits(epochs=epochs)}
    if not quick:
        found["diabetes"] = Regression("diabetes", diabetes, 10, hidden=(64,), epochs=epochs)
    return found


def run(session: Session) -> list[Result]:
    grid = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.001, 0.004, 0.016))
    small = Grid((0.00625, 0.0125, 0.025, 0.05), (0.0, 0.004, 0.016, 0.064))
    arms = {k: v for k, v in ARMS.items() if not session.quick or k in (RGD, "CVaR(0.5)", "KLBall(0.1)")}
    session.expect(len(problems(session.quick)) * (len(arms) + 3), grid)
    results: list[Result] = []
    for data, problem in problems(session.quick).items():
        for select, how in CHOSEN_BY.items():
            task, here = dataclasses.replace(problem, select=select), f"{data}, {how}"
            begin = grid if data == "digits" else small
            results.append(Result(here, session.sweep(task, Arm(PLAIN), begin)))
            for name, weighting in arms.items():
                arm = Arm(name, weighting)
                chosen = session.sweep(task, arm, begin)
                results.append(Result(here, chosen, PLAIN))
                if name == RGD:
                    for control in (mean_one(arm), times_mean_weight(arm, chosen.mean_weight)):
                        results.append(Result(here, session.sweep(task, control, begin), PLAIN))
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    settings, arms = table.settings(), [arm for arm in table.arms(table.settings()[0]) if arm != PLAIN]
    panels = {"mean_loss": "mean loss", "worst_tenth": "worst tenth"}
    figure, axes = plt.subplots(
        2, len(settings), figsize=(1.6 + 3.4 * len(settings), 9), squeeze=False, sharey=True
    )
    for column, setting in zip(axes.T, settings, strict=True):
        for panel, (metric, label) in zip(column, panels.items(), strict=True):
            panel.axvline(0, color=GREY, linewidth=1)
            for k, arm in enumerate(arms):
                line = table.line(setting, arm, metric)
                color = next((c for start, c in FAMILIES.items() if arm.startswith(start)), GREY)
                panel.errorbar(
                    line.difference, -k, xerr=line.difference_half, fmt="D" if line.finding else "o",
                    color=color, markersize=5, elinewidth=1,
                )  # fmt: skip
            panel.set_title(f"{setting}:\n{label}", loc="left", fontsize=10)
            panel.grid(axis="x", color="#e3e6eb")
            panel.tick_params(length=0)
            panel.set_yticks([-k for k in range(len(arms))], arms)
    figure.suptitle(
        f"Test loss, difference to plain training: {table.lines[0].seeds} seeds, 95% intervals; "
        "left is better; diamond: p < .001; before temperature scaling",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def sentence(table: Table) -> str:
    def better(setting: str, *metrics: str) -> str:
        found = [
            f"{line.arm} {line.shown()}"
            for line in table.findings()
            if line.setting == setting and line.metric in metrics and line.difference < 0
        ]
        return ", ".join(found) or "none"

    parts: list[str] = []
    for setting in table.settings():
        own = table.line(setting, RGD, "worst_tenth")
        part = f"{setting}: {better(setting, 'worst_tenth')} ({RGD} {own.shown()})"
        if table.has(setting, "scaled_worst_tenth"):
            part += f"; after temperature scaling {better(setting, 'scaled_worst_tenth')}"
        parts.append(part)
    return (
        "Which lower the loss of the worst tenth, as a finding, against plain training tuned by the same "
        f"number? {'. '.join(parts)}."
    )


METRICS = ("mean_loss", "worst_tenth", "scaled_mean_loss", "scaled_worst_tenth")
ROW = Row("frontier", "The whole family: mean against worst tenth", METRICS, run, picture, sentence)

if __name__ == "__main__":
    main(ROW)
