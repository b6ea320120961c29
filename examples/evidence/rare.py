"""Rare directions: does re-weighting learn what few samples show, and what do noise and outliers do to it?

Asked (Figure 4 of the paper, made from its description): in linear regression where some directions of the
input occur rarely, how do the squared errors in frequent and in rare directions fall over the steps?

Arms: plain least squares; RGD (`rgd.KL(tau=1)`) and with tau = 3. Controls: RGD's weights divided by their
mean over the batch; plain training times RGD's mean weight; RGD with the opposite sign. Each is compared with
plain training.

Protocol: 20 directions, a sample lies along one of them with a standard normal coordinate; 10 frequent ones
share 98% of the samples, 10 rare ones 2%. The true coefficients are standard normal. Three settings: noise
of deviation 0.1; noise of deviation 1; noise of 0.1 where 5% of the targets are outliers, moved by a normal
number of deviation 10. 2000 training and 2000 validation samples, both with noise and outliers; the test has
2000 samples without either, half of them along rare directions. SGD with momentum 0.9, batches of 32, a
cosine schedule over 16 epochs, 992 steps. Learning rate and weight decay are chosen for every arm by the mean
validation loss at the last step over 12 seeds, and lie inside their grid; the steps before are on the way to
it. Validation knows rare directions as rarely as training does, and has the same outliers: where there are
outliers, that choice itself is noisy, as it is in life.

Run it with `make evidence ROW=rare`, or `python examples/evidence/rare.py --full`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import rgd
import torch
from harness import Arm, Data, Grid, Part, Regression, Result, Row, Session, Table, main
from harness.arms import mean_one, opposite_sign, times_mean_weight
from harness.pictures import BLUE, GREEN, GREY, ORANGE, pyplot, save

FREQUENT, RARE, SHARE = 10, 10, 0.02
SAMPLES, EPOCHS, BATCH = 2000, 16, 32
SNAPSHOTS = (30, 60, 120, 250, 500, 750)
LAST = EPOCHS * (SAMPLES // BATCH)
SETTINGS = {"noise 0.1": (0.1, 0.0), "noise 1": (1.0, 0.0), "noise 0.1, 5% outliers": (0.1, 0.05)}
PLAIN, RGD = "plain", "RGD, tau 1"


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
        }


def draw(seed: int, noise: float, outliers: float) -> Data:
    """Samples along one direction each; the group tells rare directions (1) from frequent ones (0)."""
    generator = torch.Generator().manual_seed(3000 + seed)
    normal = functools.partial(torch.randn, generator=generator)
    truth = normal(FREQUENT + RARE)
    parts: list[Part] = []
    for share in (SHARE, SHARE, 0.5):
        groups = (torch.rand(SAMPLES, generator=generator) < share).long()
        direction = torch.where(
            groups == 1,
            FREQUENT + torch.randint(RARE, (SAMPLES,), generator=generator),
            torch.randint(FREQUENT, (SAMPLES,), generator=generator),
        )
        inputs = torch.nn.functional.one_hot(direction, FREQUENT + RARE) * normal(SAMPLES, 1)
        target, errors = inputs @ truth, noise * normal(SAMPLES)
        moved = 10 * normal(SAMPLES) * (torch.rand(SAMPLES, generator=generator) < outliers)
        is_test = len(parts) == 2
        parts.append(Part(inputs, target if is_test else target + errors + moved, groups))
    return Data(*parts)


def run(session: Session) -> list[Result]:
    grid = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 1e-5, 1e-4, 1e-3), decay_factor=10.0)
    settings = dict(list(SETTINGS.items())[:1]) if session.quick else SETTINGS
    session.expect(len(settings) * 6, grid)
    results: list[Result] = []
    for here, (noise, outliers) in settings.items():
        problem = RareDirections(
            here,
            functools.partial(draw, noise=noise, outliers=outliers),
            FREQUENT + RARE,
            epochs=1 if session.quick else EPOCHS,
            batch_size=BATCH,
        )
        snapshots = SNAPSHOTS[:2] if session.quick else SNAPSHOTS
        rgd_arm = Arm(RGD, rgd.KL(1.0))
        plain, weighted = (session.sweep(problem, arm, grid, 1, snapshots) for arm in (Arm(PLAIN), rgd_arm))
        others = (
            Arm("RGD, tau 3", rgd.KL(3.0)),
            mean_one(rgd_arm),
            times_mean_weight(rgd_arm, weighted.mean_weight),
            opposite_sign(rgd_arm),
        )
        chosen = [plain, weighted, *(session.sweep(problem, arm, grid, 1, snapshots) for arm in others)]
        last = problem.epochs * (SAMPLES // BATCH)
        for k, step in enumerate((*snapshots, last)):
            results += [Result(f"{here}, step {step}", c, "" if c is plain else PLAIN, k) for c in chosen]
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    groups = list(dict.fromkeys(s.rsplit(", step ", 1)[0] for s in table.settings()))
    colors = {
        PLAIN: GREY, RGD: BLUE, "RGD, tau 3": "#56b4e9", f"{RGD}, mean one": GREEN,
        f"{RGD}, opposite sign": ORANGE,
    }  # fmt: skip
    figure, axes = plt.subplots(2, len(groups), figsize=(4.2 * len(groups), 6.6), squeeze=False, sharex=True)
    for column, group in zip(axes.T, groups, strict=True):
        steps = [s.rsplit(", step ", 1)[1] for s in table.settings() if s.rsplit(", step ", 1)[0] == group]
        for panel, metric in zip(column, ("frequent_loss", "rare_loss"), strict=True):
            for arm, color in colors.items():
                lines = [table.line(f"{group}, step {step}", arm, metric) for step in steps]
                panel.errorbar(
                    [float(step) for step in steps], [line.mean for line in lines],
                    [line.half for line in lines], color=color, marker="o", markersize=4, elinewidth=0.8,
                    linewidth=1.3, label=arm,
                )  # fmt: skip
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.grid(axis="y", color="#e3e6eb")
        column[0].set_title(group, loc="left", fontsize=11)
        column[1].set_xlabel("step")
    axes[0, 0].set_ylabel("squared error, frequent directions")
    axes[1, 0].set_ylabel("squared error, rare directions")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"Rare directions: mean and 95% interval over {table.lines[0].seeds} seeds", x=0.012, ha="left",
        fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def sentence(table: Table) -> str:
    parts: list[str] = []
    for group, step in ((group, step) for group in SETTINGS for step in (120, LAST)):
        here = f"{group}, step {step}"
        if here in table.settings():
            plain, line = (table.line(here, arm, "rare_loss") for arm in (PLAIN, RGD))
            parts.append(f"{here}: RGD {line.shown()} (plain {plain.mean:.3f})")
    return f"Squared error in rare directions, RGD against plain training. {'; '.join(parts)}."


ROW = Row(
    "rare",
    "Rare directions (Figure 4)",
    ("mean_loss", "frequent_loss", "rare_loss"),
    run,
    picture,
    sentence,
)

if __name__ == "__main__":
    main(ROW)
