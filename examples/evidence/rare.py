"""Rare directions: does re-weighting learn what few samples show, and what do noise and outliers do to it?

Asked, after Figure 4 of the paper, whose data are not published: in linear regression where some directions
of the input occur rarely, how do the squared errors in frequent and in rare directions fall over the steps?

Arms: plain least squares; RGD (`rgd.KL(tau=1)`) and with tau = 3; RGD with the opposite sign, which weights
large errors less, but with the same clip; `rgd.KL(scale=s)` with s = -0.02 and -0.1, which have none (added
after a first look at the others). Controls: RGD's weights divided by their mean over the batch; plain
training times RGD's mean weight; Huber's loss with delta 1 and the absolute error, which are made for
outliers. Each is compared with plain training.

Protocol: 20 dimensions. A sample is standard normal in the first ten and 0 in the others, or, one in 200, the
other way round. The true coefficients are standard normal. Three settings: noise of deviation 0.1; noise of
deviation 1; noise of 0.1 where 5% of the targets are outliers, moved by a normal number of deviation 10. One
pass over 16000 samples in batches of 32, 500 steps; SGD with momentum 0.9 and a cosine schedule. Each of 12
seeds chooses learning rate and weight decay of every arm by the mean squared error at the last step on its
own 4000 validation samples; the steps before are on the way to it. The error falls as an exponential of the
learning rate, so the grid is fine here: ten values a decade. Validation data are made as training data are,
outliers included. The test has 2000 samples without noise or outliers, half of them rare: its squared errors
are the squared errors of the coefficients. Errors differ by factors between seeds, so the logarithm of the
rare error is compared as well: its difference is the logarithm of a ratio.

A fourth setting breaks the rule, to show what it is for: noise of 0.1, and one learning rate for all arms,
smaller than the best, as where nobody tunes it.

Run it with `make evidence ROW=rare`, or `python examples/evidence/rare.py --full`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib

import rgd
import torch
from harness import (
    Arm,
    Cell,
    Chosen,
    Claim,
    Data,
    Grid,
    Part,
    Regression,
    Result,
    Row,
    Session,
    Table,
    main,
    untuned,
)
from harness.arms import mean_one, opposite_sign, times_mean_weight
from harness.pictures import BLUE, GREY, ORANGE, pyplot, save

DIMENSIONS, SHARE = 10, 0.005
TRAINING, VALIDATION, TEST, BATCH = 16000, 4000, 2000, 32
SNAPSHOTS = (25, 50, 100, 150, 200, 300, 400)
LAST = TRAINING // BATCH
UNTUNED, SHARED = "noise 0.1, NOT TUNED", Cell(0.08, 0.0)
SETTINGS = {
    "noise 0.1": (0.1, 0.0),
    "noise 1": (1.0, 0.0),
    "noise 0.1, 5% outliers": (0.1, 0.05),
    UNTUNED: (0.1, 0.0),
}
NEGATIVE = (-0.02, -0.1)
PLAIN, RGD, HUBER, ABSOLUTE = "plain", "RGD, tau 1", "Huber loss", "absolute error"


def huber(outputs: torch.Tensor, target: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Twice Huber's loss with delta 1 (Huber 1964), which is the squared error up to an error of 1."""
    del counts
    error = (outputs.squeeze(-1) - target).abs()
    return torch.where(error <= 1, error.square(), 2 * error - 1)


def absolute(outputs: torch.Tensor, target: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The absolute error."""
    del counts
    return (outputs.squeeze(-1) - target).abs()


@dataclasses.dataclass(frozen=True)
class RareDirections(Regression):
    """A linear model, measured by the squared error in frequent and in rare directions."""

    def metrics(self, outputs: torch.Tensor, part: Part, validation: tuple[torch.Tensor, Part]):
        del validation
        losses = self.losses(outputs, part.target)
        rare = part.groups == 1
        return {
            "mean_loss": losses.mean(1),
            "frequent_loss": losses[:, ~rare].mean(1),
            "rare_loss": losses[:, rare].mean(1),
            "log_rare_loss": losses[:, rare].mean(1).log(),
        }


def draw(seed: int, noise: float, outliers: float, training: int) -> Data:
    """Samples in frequent or in rare directions; the group tells the rare ones (1) from the others (0)."""
    generator = torch.Generator().manual_seed(3000 + seed)
    normal = functools.partial(torch.randn, generator=generator)
    truth = normal(2, DIMENSIONS)
    parts: list[Part] = []
    for n, share, right in ((TEST, 0.5, True), (VALIDATION, SHARE, False), (training, SHARE, False)):
        rare = (torch.rand(n, generator=generator) < share).long()
        x = normal(n, DIMENSIONS)
        target = (x * truth[rare]).sum(1)
        if not right:
            moved = 10 * normal(n) * (torch.rand(n, generator=generator) < outliers)
            target += noise * normal(n) + moved
        inputs = torch.stack([x * (rare == side)[:, None] for side in (0, 1)], 1).flatten(1)
        parts.append(Part(inputs, target, rare))
    return Data(*reversed(parts))


def run(session: Session) -> list[Result]:
    rates = tuple(round(10 ** (k / 10), 4) for k in range(-20, -5))
    grid = Grid(rates, (0.0, 1e-4, 2e-4, 4e-4, 8e-4), rate_factor=10**0.1)
    settings = {k: v for k, v in SETTINGS.items() if v == (0.1, 0.0)} if session.quick else SETTINGS
    session.expect(len(settings) * (8 + len(NEGATIVE)), grid)
    training, snapshots = (50 * BATCH, SNAPSHOTS[:1]) if session.quick else (TRAINING, SNAPSHOTS)
    results: list[Result] = []
    for here, (noise, outliers) in settings.items():
        problem = RareDirections(
            here,
            functools.partial(draw, noise=noise, outliers=outliers, training=training),
            2 * DIMENSIONS,
            epochs=1,
            batch_size=BATCH,
        )

        def best(arm: Arm, problem: Regression = problem, here: str = here) -> Chosen:
            if here == UNTUNED:
                options = {"seeds": session.seeds, "store": session.store, "snapshots": snapshots}
                return untuned(problem, arm, SHARED, **options)
            return session.sweep(problem, arm, grid, snapshots)

        rgd_arm = Arm(RGD, rgd.KL(1.0))
        plain, weighted = best(Arm(PLAIN)), best(rgd_arm)
        others = (
            Arm("RGD, tau 3", rgd.KL(3.0)),
            mean_one(rgd_arm),
            times_mean_weight(rgd_arm, weighted.mean_weight),
            opposite_sign(rgd_arm),
            *(Arm(f"s = {s:g}, no clip", rgd.KL(scale=s)) for s in NEGATIVE),
            Arm(HUBER, loss=huber),
            Arm(ABSOLUTE, loss=absolute),
        )
        chosen = [plain, weighted, *map(best, others)]
        for k, step in enumerate((*snapshots, training // BATCH)):
            results += [Result(f"{here}, step {step}", c, "" if c is plain else PLAIN, k) for c in chosen]
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    steps = {here: int(here.rsplit(" ", 1)[1]) for here in table.settings()}
    settings = [here for here in steps if steps[here] == max(steps.values())]
    figure, axes = plt.subplots(1, len(settings), figsize=(3 + 2.6 * len(settings), 3.9), squeeze=False)
    for panel, here in zip(axes[0], settings, strict=True):
        arms = [arm for arm in table.arms(here) if arm != PLAIN]
        panel.axvline(1, color=GREY, linewidth=1)
        for k, arm in enumerate(arms):
            line = table.line(here, arm, "log_rare_loss")
            ratio, low, high = (math.exp(line.difference + s * line.difference_half) for s in (0, -1, 1))
            color = BLUE if line.better else ORANGE
            panel.errorbar(
                ratio, -k, xerr=[[ratio - low], [high - ratio]], fmt="o", color=color, markersize=5,
                markerfacecolor=color if line.outside else "white",
            )  # fmt: skip
        words = [arm.replace("plain x mean weight of RGD, tau 1", "placebo of RGD, tau 1") for arm in arms]
        panel.set_yticks(range(0, -len(arms), -1), words if panel is axes[0][0] else [])
        panel.set_ylim(0.6 - len(arms), 0.6)
        panel.set_xscale("log")
        low, high = panel.get_xlim()
        ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 5, 10, 20) if low < tick < high]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_title(here.rsplit(", step", 1)[0], loc="left", fontsize=10)
        panel.grid(axis="x", color="#e3e6eb")
        panel.tick_params(length=0)
    figure.supxlabel("squared error in rare directions over that of plain training", fontsize=10)
    figure.suptitle(
        f"Rare directions after {max(steps.values())} steps: ratio to plain training, 95% interval, "
        f"{table.lines[0].seeds} seeds",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def sentence(table: Table) -> str:
    def ratio(here: str, arm: str) -> str:
        line = table.line(here, arm, "log_rare_loss")
        low, high = (math.exp(line.difference + sign * line.difference_half) for sign in (-1, 1))
        return f"{math.exp(line.difference):.2f} [{low:.2f}, {high:.2f}]"

    parts: list[str] = []
    for group in SETTINGS:
        here = f"{group}, step {LAST}"
        if here in table.settings():
            ratios = (
                f"RGD {ratio(here, RGD)}, with mean-one weights {ratio(here, f'{RGD}, mean one')}, opposite "
                f"sign {ratio(here, f'{RGD}, opposite sign')}, s = -0.1 without a clip "
                f"{ratio(here, f's = {NEGATIVE[-1]:g}')}, Huber's loss {ratio(here, HUBER)}"
            )
            parts.append(f"{group.replace('NOT TUNED', 'one rate for all, NOT TUNED')}: {ratios}")
    return (
        f"Squared error in rare directions after {LAST} steps as a multiple of plain training's. "
        f"{'; '.join(parts)}."
    )


ROW = Row(
    "rare",
    "Rare directions (Figure 4)",
    Claim(
        f"noise 0.1, 5% outliers, step {LAST}",
        f"{RGD}, opposite sign",
        "log_rare_loss",
        "With 5% outliers, RGD's opposite sign, clipped at tau = 1, lowers the error in rare directions.",
    ),
    ("mean_loss", "frequent_loss", "rare_loss", "log_rare_loss"),
    run,
    picture,
    sentence,
)

if __name__ == "__main__":
    main(ROW)
