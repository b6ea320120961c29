"""Class imbalance: does re-weighting by loss help rare classes, alone or on top of the methods made for them?

Asked: with few samples of some classes, which method gives the best balanced accuracy and the best worst
class, and what does RGD add to each?

Arms: cross-entropy; focal loss; class-balanced weights; logit adjustment, of which the balanced softmax is
the same loss in other words; LDAM; RGD (`rgd.KL(tau=1)`); and RGD on top of each, which is compared with what
it stands on. The others are compared with cross-entropy. Controls: RGD with weights divided by their mean,
cross-entropy times RGD's mean weight, and RGD with the opposite sign. RGD's weights are rgd's; the other
methods are in `harness/losses.py` with their papers, class-balanced weights with beta 0.999
(`rgd.class_balanced(counts, beta=0.999)`).

Data: scikit-learn's digits, and MNIST-1D (Greydanus & Kobak, ICML 2024), ten kinds of noisy curves of 40
numbers, which the package `mnist1d` makes. The most frequent class has 110 training samples (MNIST-1D: 340),
the others fewer, in geometric steps, down to that number divided by the imbalance factor, and 1 at least.
Which class is rare is drawn anew for each seed. Validation (20 samples a class; 60) and test (40; 100) are
balanced, for every factor.

Protocol: a multilayer perceptron with 64 hidden units, some 400 steps (MNIST-1D: 800) of SGD with momentum
0.9 and a cosine schedule, batches of 32; the last step's network is measured. Each seed chooses learning rate
and weight decay of every arm by its own validation accuracy. "worst_group_accuracy" is the smallest accuracy
of the three most frequent, the four middle and the three rarest classes.

Run it with `make evidence ROW=imbalance`, or `python examples/evidence/imbalance.py --full`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import rgd
import torch
from harness import Arm, Claim, Classification, Data, Grid, Part, Result, Row, Session, Table, main
from harness.arms import mean_one, opposite_sign, times_mean_weight
from harness.losses import class_balanced, focal, ldam, logit_adjusted
from harness.pictures import differences, pyplot, save
from harness.problems import load, load_mnist1d

CLASSES, BATCH = 10, 32
METRICS = ("balanced_accuracy", "worst_class_accuracy", "worst_group_accuracy")
PLAIN, RGD = "cross-entropy", "RGD"
BASES = {
    PLAIN: Arm(PLAIN),
    "focal loss": Arm("focal loss", loss=focal),
    "class-balanced": Arm("class-balanced", class_weights=class_balanced),
    "logit adjustment": Arm("logit adjustment", loss=logit_adjusted),
    "LDAM": Arm("LDAM", loss=ldam, cosine=True),
}


class Source(NamedTuple):
    """Where samples come from, and how many of them."""

    name: str
    load: Callable[[], tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]
    factors: tuple[float, ...]
    largest: int  # training samples of the most frequent class
    validation: int  # samples of each class
    test: int
    steps: int

    def setting(self, factor: float) -> str:
        """What the tables call it."""
        return f"{self.name}, factor {factor:g}"

    def class_sizes(self, factor: float) -> list[int]:
        """Training samples of the most frequent class first."""
        return [max(1, round(self.largest * factor ** (-k / (CLASSES - 1)))) for k in range(CLASSES)]


SOURCES = (
    Source("digits", functools.partial(load, "digits"), (10, 50), 110, 20, 40, 400),
    Source("MNIST-1D", load_mnist1d, (10, 50), 340, 60, 100, 800),
)


def draw(seed: int, source: Source, factor: float) -> Data:
    """Long-tailed training data, balanced validation and test data; groups say how frequent a class is."""
    inputs, target = source.load()
    random = np.random.default_rng([21, seed])
    parts: list[list[np.ndarray]] = [[], [], []]
    group_of = np.zeros(CLASSES, np.int64)
    sizes = source.class_sizes(factor)
    for rank, (label, size) in enumerate(zip(random.permutation(CLASSES), sizes, strict=True)):
        rows = random.permutation(np.flatnonzero(target == label))
        test, validation, rest = np.split(rows, [source.test, source.test + source.validation])
        group_of[label] = (rank > 2) + (rank > 6)
        for part, chosen in zip(parts, (rest[:size], validation, test), strict=True):
            part.append(chosen)
    return Data(
        *(
            Part(
                torch.tensor(inputs[rows], dtype=torch.float32),
                torch.tensor(target[rows]),
                torch.tensor(group_of[target[rows]]),
            )
            for rows in map(np.concatenate, parts)
        )
    )


def problem(source: Source, factor: float, quick: bool) -> Classification:
    """About `source.steps` steps, whatever the number of samples."""
    epochs = round((20 if quick else source.steps) / (sum(source.class_sizes(factor)) // BATCH))
    return Classification(
        source.setting(factor), functools.partial(draw, source=source, factor=factor),
        source.load()[0].shape[1], CLASSES, epochs=max(1, epochs), batch_size=BATCH,
    )  # fmt: skip


def run(session: Session) -> list[Result]:
    grid = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.001, 0.002, 0.004, 0.008, 0.016))
    settings = [(source, f) for source in SOURCES for f in ((50,) if session.quick else source.factors)]
    session.expect(len(settings) * (2 * len(BASES) + 3), grid)
    results: list[Result] = []
    for source, factor in settings:
        task, here = problem(source, factor, session.quick), source.setting(factor)
        for base, arm in BASES.items():
            results.append(Result(here, session.sweep(task, arm, grid), "" if base == PLAIN else PLAIN))
            on_top = RGD if base == PLAIN else f"{RGD} on {base}"
            weighted = dataclasses.replace(arm, name=on_top, weighting=rgd.KL(tau=1.0))
            chosen = session.sweep(task, weighted, grid)
            results.append(Result(here, chosen, base))
            if base == PLAIN:
                controls = (
                    mean_one(weighted),
                    times_mean_weight(weighted, chosen.mean_weight),
                    opposite_sign(weighted),
                )
                results += [Result(here, session.sweep(task, control, grid), PLAIN) for control in controls]
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    sources = [s for s in SOURCES if s.setting(50) in table.settings()]
    figure, axes = plt.subplots(1, len(sources), figsize=(11, 4.4), squeeze=False)
    for panel, source in zip(axes[0], sources, strict=True):
        here = source.setting(50)
        arms = [arm for arm in table.arms(here) if arm != PLAIN]
        lines = [table.line(here, arm, "balanced_accuracy") for arm in arms]
        differences(panel, lines, markersize=5)
        words = [arm.replace("plain x mean weight of RGD", "placebo of RGD") for arm in arms]
        panel.set_yticks(range(0, -len(arms), -1), words if panel is axes[0][0] else [])
        panel.set_ylim(0.6 - len(arms), 0.6)
        panel.set_title(here, loc="left", fontsize=11)
        panel.set_xlabel("balanced accuracy, points")
        panel.grid(axis="x", color="#e3e6eb")
        panel.tick_params(length=0)
    figure.suptitle(
        "Rare classes: difference to cross-entropy; 'RGD on ...': to what it is on; "
        f"{table.lines[0].seeds} seeds",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def sentence(table: Table) -> str:
    def points(source: Source, *arms: str) -> str:
        lines = {arm: table.line(source.setting(50), arm, "balanced_accuracy") for arm in arms}
        return ", ".join(f"{arm} {line.points()}" for arm, line in lines.items())

    parts = [
        f"{source.name}, against cross-entropy: "
        f"{points(source, 'class-balanced', 'logit adjustment', 'LDAM', 'focal loss', RGD)}; "
        "against what it stands on: "
        f"{points(source, f'{RGD} on logit adjustment', f'{RGD} on class-balanced')}"
        for source in SOURCES
    ]
    return f"Balanced accuracy at factor 50, in points. {'. '.join(parts)}."


ROW = Row(
    "imbalance",
    "Class imbalance",
    Claim(
        SOURCES[0].setting(50),
        "logit adjustment",
        "balanced_accuracy",
        "With classes rarer by up to 50, logit adjustment raises balanced accuracy.",
    ),
    METRICS,
    run,
    picture,
    sentence,
)

if __name__ == "__main__":
    main(ROW)
