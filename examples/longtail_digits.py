"""Long-tailed digits: the same training with CrossEntropyLoss and with RGDLoss.

scikit-learn's handwritten digits are cut so that digit k keeps `100 * imbalance ** (-k / 9)` training images:
100 zeros and, at an imbalance of 100, one nine. A small network is trained on them, and tested on 50 images
of every digit.

How the losses are compared:

- The test images are the same for every run and are not used for tuning. The validation images, 24 a digit,
  and the training images are drawn again from the others for each seed.
- Each loss gets its own learning rate: the one of `LEARNING_RATES` with the best validation accuracy,
  averaged over the seeds. The grid, the number of runs and of epochs are the same for all. tau stays at its
  default, 1.
- With one seed all losses get the same images, the same initial network and the same order of minibatches,
  so the difference between two losses is taken seed by seed.
- "Normalised" is RGD with weights that average to one over the minibatch. It separates re-weighting from the
  effect of a mean weight above one, which acts like a larger learning rate and a weaker weight decay.
- There are three weight decays, because they decide the outcome. Without weight decay, the network fits every
  training image, all losses go to zero and all weights to one.

Weight decay is fixed here and not tuned, and re-weighting gains. If it is tuned for each loss, re-weighting
does not gain (`examples/evidence/imbalance.py`).

Run `python examples/longtail_digits.py --help`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import rgd
import torch
from rgd.torch import RGDLoss
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

CLASSES = 10
TEST_PER_CLASS, VALIDATION_PER_CLASS, LARGEST_CLASS = 50, 24, 100
LEARNING_RATES = (0.1, 0.2, 0.4, 0.8)
WEIGHT_DECAYS = (0.0, 0.005, 0.02)
LOSSES = ("CrossEntropyLoss", "RGDLoss", "RGDLoss, normalised")


class Setting(NamedTuple):
    """The settings of a training, without the loss, its learning rate and the seed."""

    imbalance: float
    weight_decay: float


class Run(NamedTuple):
    """One training."""

    setting: Setting
    loss: str
    learning_rate: float
    seed: int
    tau: float
    epochs: int


class Accuracy(NamedTuple):
    """Per-class accuracy, of shape (CLASSES,), or (seeds, CLASSES) for several runs."""

    validation: npt.NDArray[np.float64]
    test: npt.NDArray[np.float64]


class Arm(NamedTuple):
    """One loss in one setting, at the learning rate that validation chose for it."""

    setting: Setting
    loss: str
    learning_rate: float
    accuracy: Accuracy


# --- data ---


def class_sizes(imbalance: float) -> list[int]:
    return [round(LARGEST_CLASS * imbalance ** (-k / (CLASSES - 1))) for k in range(CLASSES)]


def split(imbalance: float, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images (n, 64) and labels (n,) for training, validation and test."""
    images, labels = load_digits(return_X_y=True)
    same_for_all, of_this_seed = np.random.default_rng(0), np.random.default_rng([1, seed])
    parts: list[list[npt.NDArray[np.intp]]] = [[], [], []]
    for k, size in enumerate(class_sizes(imbalance)):
        indices = same_for_all.permutation(np.flatnonzero(labels == k))
        test, rest = np.split(indices, [TEST_PER_CLASS])
        validation, rest = np.split(of_this_seed.permutation(rest), [VALIDATION_PER_CLASS])
        for part, chosen in zip(parts, (rest[:size], validation, test), strict=True):
            part.append(chosen)
    return [
        (torch.tensor(images[i] / 16, dtype=torch.float32), torch.tensor(labels[i]))
        for i in map(np.concatenate, parts)
    ]


# --- training ---


def criterion(loss: str, tau: float) -> nn.Module:
    if loss == "CrossEntropyLoss":
        return nn.CrossEntropyLoss()
    return RGDLoss(weighting=rgd.KL(tau, normalize=loss.endswith("normalised")))


def train(run: Run) -> Accuracy:
    """SGD with momentum and a cosine schedule, minibatches of 32."""
    torch.set_num_threads(1)
    (images, labels), validation, test = split(run.setting.imbalance, run.seed)
    torch.manual_seed(run.seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    loss_function = criterion(run.loss, run.tau)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=run.learning_rate, momentum=0.9, weight_decay=run.setting.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs)
    for _ in range(run.epochs):
        for batch in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            loss_function(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return Accuracy(per_class(model, *validation), per_class(model, *test))


@torch.no_grad()
def per_class(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> npt.NDArray[np.float64]:
    right = (model(images).argmax(1) == labels).double()
    return np.array([right[labels == k].mean().item() for k in range(CLASSES)])


def best_learning_rate(
    setting: Setting, loss: str, accuracies: dict[Run, Accuracy], learning_rates: Sequence[float]
) -> Arm:
    """The learning rate of the best mean validation accuracy, and what the runs with it reached."""
    candidates: list[Arm] = []
    for rate in learning_rates:
        wanted = (setting, loss, rate)
        runs = [a for run, a in accuracies.items() if (run.setting, run.loss, run.learning_rate) == wanted]
        stacked = Accuracy(np.stack([a.validation for a in runs]), np.stack([a.test for a in runs]))
        candidates.append(Arm(setting, loss, rate, stacked))
    return max(candidates, key=lambda arm: arm.accuracy.validation.mean())


# --- report ---


def interval(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean over the first axis, and half the width of its 95% interval by Student's t."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)
    return values.mean(axis=0), np.asarray(half)


def percent(values: npt.NDArray[np.float64], sign: str = "") -> str:
    mean, half = interval(100 * values)
    return f"{mean:{sign}.1f} ± {half:.1f}"


def table(arms: Sequence[Arm]) -> str:
    """One line an arm, the difference to CrossEntropyLoss of the same setting taken seed by seed."""
    row = "{:<21} {:>6} {:>14} {:>14} {:>14} {:>14}".format
    lines: list[str] = []
    baseline = arms[0]
    for arm in arms:
        if arm.setting != baseline.setting or arm is arms[0]:
            baseline = arm
            imbalance, decay = arm.setting
            data = "balanced" if imbalance == 1 else f"long-tailed, factor {imbalance:g}"
            lines += ["", f"{data}, weight decay {decay:g}"]
            lines += [row("", "rate", "accuracy", "difference", "worst class", "difference")]
        overall, base_overall = arm.accuracy.test.mean(axis=1), baseline.accuracy.test.mean(axis=1)
        worst, base_worst = arm.accuracy.test.min(axis=1), baseline.accuracy.test.min(axis=1)
        differences = ("", "") if arm is baseline else (
            percent(overall - base_overall, "+"), percent(worst - base_worst, "+")
        )  # fmt: skip
        cells = (percent(overall), differences[0], percent(worst), differences[1])
        lines.append(row(arm.loss, f"{arm.learning_rate:g}", *cells))
    return "\n".join(lines)


def picture(arms: Sequence[Arm], path: pathlib.Path) -> None:
    """Per-class accuracy where the weight decay is largest, and accuracy against weight decay."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    ink, muted, grid = "#1f2430", "#5d6675", "#e3e6eb"
    looks = {"CrossEntropyLoss": ("#7a8699", "o"), "RGDLoss": ("#d55e00", "D")}
    plt.rcParams.update({
        "font.size": 10.5, "axes.edgecolor": grid, "axes.labelcolor": muted, "text.color": ink,
        "xtick.color": muted, "ytick.color": muted, "axes.spines.top": False, "axes.spines.right": False,
        "axes.axisbelow": True, "savefig.dpi": 160,
    })  # fmt: skip
    imbalance = max(arm.setting.imbalance for arm in arms)
    tail = [arm for arm in arms if arm.setting.imbalance == imbalance and arm.loss in looks]
    decays = sorted({arm.setting.weight_decay for arm in tail})
    seeds = len(tail[0].accuracy.test)

    figure = plt.figure(figsize=(11, 5.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)  # type: ignore[union-attr]
    grid_spec = figure.add_gridspec(2, 2, width_ratios=(2.1, 1), height_ratios=(3.4, 1))
    accuracy = figure.add_subplot(grid_spec[0, 0])
    frequency = figure.add_subplot(grid_spec[1, 0], sharex=accuracy)
    by_decay = figure.add_subplot(grid_spec[:, 1])

    shown = [arm for arm in tail if arm.setting.weight_decay == decays[-1]]
    for offset, arm in zip((-0.13, 0.13), shown, strict=True):
        color, marker = looks[arm.loss]
        mean, half = interval(100 * arm.accuracy.test)
        accuracy.errorbar(
            np.arange(CLASSES) + offset, mean, half, fmt=marker, color=color, markersize=6.5, capsize=2.5,
            elinewidth=1.4, label=arm.loss,
        )  # fmt: skip
    accuracy.set_ylim(-4, 104)
    accuracy.set_ylabel("test accuracy of the digit, %")
    accuracy.set_title(f"Digit by digit, weight decay {decays[-1]:g}", loc="left", fontsize=11, color=ink)
    accuracy.legend(frameon=False, loc="lower left", labelcolor=ink)
    accuracy.grid(axis="y", color=grid)
    accuracy.tick_params(length=0, labelbottom=False)

    sizes = class_sizes(imbalance)
    frequency.bar(range(CLASSES), sizes, color="#c9d3e0", width=0.62)
    for k, size in enumerate(sizes):
        frequency.text(k, size + 4, str(size), ha="center", va="bottom", fontsize=9, color=muted)
    frequency.set_ylim(0, 1.35 * max(sizes))
    frequency.set_yticks([])
    frequency.set_ylabel("training\nimages")
    frequency.set_xticks(range(CLASSES), [str(k) for k in range(CLASSES)])
    frequency.set_xlabel("digit")
    frequency.tick_params(length=0)
    frequency.spines["left"].set_visible(False)

    positions = np.arange(len(decays))
    for offset, (loss, (color, marker)) in zip((-0.06, 0.06), looks.items(), strict=True):
        values = [arm.accuracy.test.mean(axis=1) for arm in tail if arm.loss == loss]
        mean, half = np.array([interval(100 * v) for v in values]).T
        by_decay.errorbar(
            positions + offset, mean, half, fmt=marker, linestyle="-", color=color, markersize=6.5,
            capsize=2.5, elinewidth=1.4, linewidth=1.2,
        )  # fmt: skip
    by_decay.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    by_decay.set_xticks(positions, [f"{d:g}" for d in decays])
    by_decay.set_xlim(-0.35, len(decays) - 0.65)
    by_decay.set_xlabel("weight decay")
    by_decay.set_ylabel("test accuracy, %")
    by_decay.set_title("Mean of all digits", loc="left", fontsize=11, color=ink)
    by_decay.grid(axis="y", color=grid)
    by_decay.tick_params(length=0)

    figure.suptitle(
        f"Long-tailed digits: mean and 95% interval over {seeds} seeds, learning rate swept for each loss",
        x=0.012, ha="left", fontsize=12.5, fontweight="bold",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> list[Arm]:
    parser = argparse.ArgumentParser(description="CrossEntropyLoss against RGDLoss on long-tailed digits")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each kind, at least 2 (default: 10)")
    parser.add_argument("--tau", type=float, default=1.0, help="clipping factor of RGD (default: 1)")
    parser.add_argument("--imbalance", type=float, default=100.0, help="zeros for each nine (default: 100)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of each training (default: 60)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 2 seeds, 2 epochs")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".png"), help="the picture"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.epochs, learning_rates = 2, 2, LEARNING_RATES[:2]
    else:
        learning_rates = LEARNING_RATES
    if options.seeds < 2:
        parser.error("an interval needs --seeds of 2 or more")
    if not 1 <= options.imbalance <= 150:
        parser.error("--imbalance must be from 1 (balanced) to 150 (one nine left)")

    settings = [Setting(options.imbalance, decay) for decay in WEIGHT_DECAYS]
    if options.imbalance != 1:
        settings += [Setting(1.0, WEIGHT_DECAYS[0]), Setting(1.0, WEIGHT_DECAYS[-1])]
    runs = [
        Run(setting, loss, rate, seed, options.tau, options.epochs)
        for setting in settings
        for loss in LOSSES
        for rate in learning_rates
        for seed in range(options.seeds)
    ]
    print(
        f"{len(runs)} trainings: {options.seeds} seeds x {len(learning_rates)} learning rates x "
        f"{len(LOSSES)} losses x {len(settings)} settings, tau = {options.tau:g}"
    )
    progress = {"total": len(runs), "unit": "run", "desc": "training", "smoothing": 0.05}
    if options.jobs == 1:
        accuracies = dict(zip(runs, tqdm(map(train, runs), **progress), strict=True))
    else:
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            results = pool.map(train, runs, chunksize=2)
            accuracies = dict(zip(runs, tqdm(results, **progress), strict=True))

    arms = [
        best_learning_rate(setting, loss, accuracies, learning_rates)
        for setting in settings
        for loss in LOSSES
    ]
    print(table(arms))
    print("\nTest accuracy in %: mean ± half of the 95% interval over the seeds. Differences are to")
    print("CrossEntropyLoss, seed by seed. 'rate' is the learning rate that the validation images chose.")
    picture(arms, options.output)
    print(f"\nPicture: {options.output}")
    return arms


if __name__ == "__main__":
    main()
