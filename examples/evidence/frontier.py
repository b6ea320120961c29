"""The whole family: what does each weighting give for the worst tenth, and what does it cost in the mean?

Asked: which members of rgd lie on the frontier of mean test loss against the loss of the worst tenth of the
test samples, once learning rate and weight decay are tuned for each?

Arms: plain training, and the members in `ARMS`, each compared with plain training. Every arm is shown twice,
plain training too: where the mean validation loss chose learning rate and weight decay, and where the worst
tenth of the validation losses did. RGD's weights divided by their mean, and plain training times RGD's mean
weight, are among the arms; on the digits also the superquantile of the package sqwash (Laguel et al., 2021),
which is CVaR under another name. What a step costs with each member is in `docs/speed.md`, by
`benches/weightings.py`.

Protocol: scikit-learn's digits (500 training, 300 validation, 997 test images), cross-entropy; and diabetes
(200, 100, 142 rows of 10 numbers), squared error of the standardised target. A multilayer perceptron with 64
hidden units, SGD with momentum 0.9, batches of 32, a cosine schedule over 30 epochs; the last step's network
is measured. Each seed chooses learning rate and weight decay of every arm on its own validation part.
"scaled_" is after temperature scaling on the validation data, digits only.

Run it with `make evidence ROW=frontier`, or `python examples/evidence/frontier.py --full`. It needs `sqwash`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import rgd
import torch
from harness import (
    Arm,
    Claim,
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
from harness.losses import cross_entropy
from harness.pictures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, name_points, pyplot, save
from sklearn.datasets import load_diabetes
from torch import Tensor

PLAIN, RGD, CLAIMED = "plain", "KL(tau=1)", "CVaR(0.5)"
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
PEER = "superquantile(0.5) of sqwash"
# The beginning of an arm's name; what the legend calls it, and its colour.
FAMILIES = {
    "plain x": ("placebo", GREY),
    "KL(": ("KL", BLUE),
    "KLBall": ("KLBall", GREEN),
    "ChiSquare": ("ChiSquareBall", PURPLE),
    "CVaR": ("CVaR, superquantile", ORANGE),
    "superquantile": ("CVaR, superquantile", ORANGE),
    "Focal": ("Focal", "#e69f00"),
    "Midrange": ("MidrangeKL", "#56b4e9"),
    "Trimmed": ("Trimmed", "#8c564b"),
}
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


def reduced(losses: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Losses (M, B) times the weights whose mean has the gradient of a peer's reduction of each row (B,)."""
    rows = losses.detach().requires_grad_()
    reductions = torch.stack([reduce(row) for row in rows])
    (weights,) = torch.autograd.grad(reductions.sum(), rows)
    return losses.shape[1] * weights * losses


@functools.cache
def sqwash() -> Any:
    """The package, whose import warns of its own docstrings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("sqwash")


def superquantile(outputs: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Cross-entropy (M, B) weighted by sqwash's superquantile of the worst half."""
    del counts
    reduce = sqwash().reduce_superquantile
    return reduced(cross_entropy(outputs, target), lambda row: reduce(row, 0.5))


def run(session: Session) -> list[Result]:
    grid = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.001, 0.002, 0.004, 0.008, 0.016))
    small = Grid((0.00625, 0.0125, 0.025, 0.05), (0.0, 0.004, 0.008, 0.016, 0.032, 0.064))
    arms = {k: v for k, v in ARMS.items() if not session.quick or k in (RGD, "CVaR(0.5)", "KLBall(0.1)")}
    session.expect(len(problems(session.quick)) * (len(arms) + 3) + 1, grid)
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
            if data == "digits":
                peer = Arm(PEER, loss=superquantile)
                results.append(Result(here, session.sweep(task, peer, begin), PLAIN))
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    settings = table.settings()
    handles: dict[str, Any] = {}
    figure, axes = plt.subplots(
        -(-len(settings) // 2), 2, figsize=(12, 5.2 * -(-len(settings) // 2)), squeeze=False
    )
    named: list[tuple[Any, dict[str, list[float]], list[list[float]]]] = []
    for panel, here in zip(axes.flat, settings, strict=False):
        arms = table.arms(here)
        points = {arm: [table.line(here, arm, m).mean for m in ("mean_loss", "worst_tenth")] for arm in arms}
        for arm, (mean, tail) in points.items():
            line = table.line(here, arm, "worst_tenth")
            family = (found for start, found in FAMILIES.items() if arm.startswith(start))
            word, color = ("plain", INK) if arm == PLAIN else next(family)
            full = color if arm == PLAIN or line.outside else "white"
            shape = "s" if arm == PLAIN else "o"
            (drawn,) = panel.plot(mean, tail, shape, color=color, markerfacecolor=full)
            handles.setdefault(word, drawn)
        panel.set_title(here, loc="left", fontsize=11)
        panel.set_xlabel("mean test loss")
        panel.set_ylabel("loss of the worst tenth")
        panel.grid(color="#e3e6eb")
        panel.tick_params(length=0)
        panel.margins(x=0.25, y=0.12)
        ends = [choose(points, key=lambda arm: points[arm][k]) for choose in (min, max) for k in (0, 1)]
        chosen = dict.fromkeys([PLAIN, RGD, CLAIMED, *ends])
        named.append((panel, {short(arm): points[arm] for arm in chosen}, list(points.values())))
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        columnspacing=1.2,
    )
    figure.suptitle(
        f"Left and down is better; {table.lines[0].seeds} seeds; "
        "hollow: the worst tenth does not differ from plain's",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    for names in named:
        name_points(*names)
    save(figure, path, table)


def short(arm: str) -> str:
    """The name of an arm in the picture."""
    return "placebo" if arm.startswith("plain x") else arm


def sentence(table: Table) -> str:
    def better(setting: str, *metrics: str) -> str:
        found = [
            f"{line.arm} {line.shown()}"
            for line in table.compared()
            if line.setting == setting and line.metric in metrics and line.outside and line.better
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
        "Which lower the loss of the worst tenth, with a 95% interval that excludes 0, against plain "
        f"training tuned by the same number? {'. '.join(parts)}."
    )


METRICS = ("mean_loss", "worst_tenth", "scaled_mean_loss", "scaled_worst_tenth")
ROW = Row(
    "frontier",
    "The whole family: mean against worst tenth",
    Claim(
        f"digits, {CHOSEN_BY['worst_tenth']}",
        CLAIMED,
        "worst_tenth",
        "CVaR(0.5) lowers the loss of the worst tenth, where that tail chooses the rates.",
    ),
    METRICS,
    run,
    picture,
    sentence,
)

if __name__ == "__main__":
    main(ROW)
