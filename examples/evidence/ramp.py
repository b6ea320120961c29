"""The ramp: the dial turned from 0 to -1 during the first half of the training, against wrong labels.

Asked: by how much does it raise test accuracy where a third of the labels is wrong, how does it compare with
a constant s and with what others do against wrong labels, and what does it cost where all labels are right?

Arms: plain cross-entropy; s = -0.5 and s = -0.7 throughout (`rgd.KL(scale=s)`); the ramp to -1 and to -1.5,
which is `rgd.torch.WeightingSchedule(criterion, lambda t: rgd.KL(scale=-min(1.0, 2 * t / T)))` with t the
step and T the number of steps. Controls, each compared with plain training too: plain training times the mean
weight of the ramp, and of s = -0.7; early stopping (every tenth of the training is measured, and each seed
takes the best step by its validation labels, as it takes the best rate); label smoothing of 0.2 and 0.5;
mixup with alpha = 1; symmetric cross-entropy; early-learning regularisation. "ramp on smoothing" is compared
with smoothing. The losses of others are in `harness/losses.py`, with their papers and the numbers of those.

Protocol: scikit-learn's digits (500 training, 300 validation, 997 test images) and MNIST-1D (2500, 1000, 1500
curves). Wrong labels are in training AND validation data: nobody has clean labels to choose with. "pairs"
flips a label to the next class, "uniform" to any other. Test labels are right. A multilayer perceptron with
64 hidden units, SGD with momentum 0.9, batches of 32, a cosine schedule over 30 epochs; the last step's
network is measured. Every seed has its own split, wrong labels, initial network and order of batches, and
chooses learning rate and weight decay of every arm by its own validation accuracy.

Run it with `make evidence ROW=ramp`, or `python examples/evidence/ramp.py --full`.
"""

from __future__ import annotations

import pathlib

import rgd
from harness import Arm, Claim, Grid, Problem, Ramp, Result, Row, Session, Table, digits, main, mnist1d
from harness.arms import times_mean_weight
from harness.losses import EarlyLearning, Smoothed, SymmetricCrossEntropy
from harness.pictures import differences, pyplot, save

PLAIN, RAMP, CONSTANT = "plain", "ramp to -1", "s = -0.7"
EARLY = "early-learning regularisation"
STOPPED, SMOOTHED, RAMP_ON_SMOOTHED = "early stopping", "smoothing 0.2", "ramp on smoothing 0.2"
NOISES = {"right labels": (0.0, False), "30% pairs": (0.3, True), "40% uniform": (0.4, False)}
DATA = {"digits": digits, "MNIST-1D": mnist1d}
ARMS = (
    Arm("s = -0.5", rgd.KL(scale=-0.5)),
    Arm(CONSTANT, rgd.KL(scale=-0.7)),
    Arm(RAMP, Ramp(-1.0)),
    Arm("ramp to -1.5", Ramp(-1.5)),
    Arm(SMOOTHED, loss=Smoothed(0.2)),
    Arm("smoothing 0.5", loss=Smoothed(0.5)),
    Arm("mixup", mixup=1.0),
    Arm("symmetric cross-entropy", loss=SymmetricCrossEntropy()),
    Arm(EARLY, loss=EarlyLearning()),
)
CONTROLLED = (RAMP, CONSTANT)
METRICS = ("accuracy", "worst_class_accuracy")
# Losses that are far from cross-entropy's in size want other rates.
GRID = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.001, 0.002, 0.004, 0.008, 0.016))


def setting(data: str, noise: str) -> str:
    """What the tables call it."""
    return f"{data}, {noise}"


def tenths(problem: Problem, training: int) -> tuple[int, ...]:
    """The steps at which early stopping measures, the last one aside."""
    steps = training // problem.batch_size * problem.epochs
    return tuple(sorted({max(1, steps * k // 10) for k in range(1, 10)} - {steps}))


def run(session: Session) -> list[Result]:
    data = ("digits",) if session.quick else DATA
    noises = {"30% pairs": NOISES["30% pairs"]} if session.quick else NOISES
    arms = ARMS[2:3] if session.quick else ARMS
    session.expect(len(data) * len(noises) * (len(arms) + 3 + len(CONTROLLED)), GRID)
    results: list[Result] = []
    for name in data:
        for words, (noise, pairs) in noises.items():
            problem = DATA[name](noise, pairs=pairs, **({"epochs": 2} if session.quick else {}))
            here = setting(name, words)
            results.append(Result(here, session.sweep(problem, Arm(PLAIN), GRID)))
            found = {arm.name: session.sweep(problem, arm, GRID) for arm in arms}
            steps = tenths(problem, len(problem.draw(0).train.target))
            found[STOPPED] = session.sweep(problem, Arm(STOPPED), GRID, steps, stop_early=True)
            results += [Result(here, chosen, PLAIN) for chosen in found.values()]
            for arm in (arm for arm in arms if arm.name in CONTROLLED):
                control = times_mean_weight(arm, found[arm.name].mean_weight)
                results.append(Result(here, session.sweep(problem, control, GRID), PLAIN))
            if not session.quick:
                both = Arm(RAMP_ON_SMOOTHED, Ramp(-1.0), loss=Smoothed(0.2))
                results.append(Result(here, session.sweep(problem, both, GRID), SMOOTHED))
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    data = list(dict.fromkeys(here.split(", ")[0] for here in table.settings()))
    noises = [n for n in NOISES if setting(data[0], n) in table.settings() and n != "right labels"]
    figure, axes = plt.subplots(
        len(data), len(noises), figsize=(10.5, 1 + 3.2 * len(data)), squeeze=False, sharex=True
    )
    for row, name in zip(axes, data, strict=True):
        for panel, noise in zip(row, noises, strict=True):
            here = setting(name, noise)
            arms = [arm for arm in table.arms(here) if arm not in {PLAIN, RAMP_ON_SMOOTHED}]
            lines = [table.line(here, arm, "accuracy") for arm in arms]
            differences(panel, lines, markersize=5)
            words = [arm.replace("plain x mean weight of", "placebo of") for arm in arms]
            panel.set_yticks(range(0, -len(arms), -1), words if panel is row[0] else [])
            panel.set_ylim(0.6 - len(arms), 0.6)
            panel.set_title(f"{here} wrong", loc="left", fontsize=11)
            panel.tick_params(length=0)
            panel.grid(axis="x", color="#e3e6eb")
    for panel in axes[-1]:
        panel.set_xlabel("test accuracy against plain training, points")
    figure.suptitle(
        f"Wrong labels: difference to plain training, 95% interval, {table.lines[0].seeds} seeds",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def sentence(table: Table) -> str:
    parts: list[str] = []
    for here in table.settings():
        shown = [(RAMP, "the ramp"), (CONSTANT, "s = -0.7"), (STOPPED, "early stopping")]
        shown += [(arm, arm) for arm in ("smoothing 0.5", "symmetric cross-entropy", EARLY)]
        words = ", ".join(
            f"{word} {table.line(here, arm, 'accuracy').points()}"
            for arm, word in shown
            if arm in table.arms(here)
        )
        if CONSTANT in table.arms(here):
            words += f"; the ramp against s = -0.7 {table.against(here, RAMP, CONSTANT, 'accuracy').points()}"
        parts.append(f"{here}: {words}")
    return f"Test accuracy against plain training, in points. {'. '.join(parts)}."


ROW = Row(
    "ramp",
    "Wrong labels: the dial as a ramp, and what others do",
    Claim(
        setting("digits", "30% pairs"),
        RAMP,
        "accuracy",
        "With 30% wrong labels, turning the dial from 0 to -1 raises test accuracy.",
    ),
    METRICS,
    run,
    picture,
    sentence,
)

if __name__ == "__main__":
    main(ROW)
