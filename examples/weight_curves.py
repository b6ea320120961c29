"""The weights of every weighting against the loss: the picture of docs/mathematics.md.

Each panel shows one weighting on the same 60 losses, the quantiles of an exponential distribution.
Run it with `python examples/weight_curves.py`; it takes seconds.
"""

from __future__ import annotations

import argparse
import math
import pathlib

import matplotlib as mpl
import numpy as np
import rgd
from matplotlib import pyplot as plt

PANELS: dict[str, dict[str, rgd.Weighting]] = {
    "KL, the dial": {
        "scale=-1": rgd.KL(scale=-1.0),
        "scale=-0.5": rgd.KL(scale=-0.5),
        "scale=0.3, tau=inf": rgd.KL(math.inf, scale=0.3),
    },
    "KL with a clip": {"tau=1": rgd.KL(tau=1.0), "tau=3": rgd.KL(tau=3.0)},
    "KL, normalize=True, tau=inf": {
        "scale=-0.5": rgd.KL(math.inf, scale=-0.5, normalize=True),
        "scale=0.5": rgd.KL(math.inf, scale=0.5, normalize=True),
    },
    "KLBall": {"radius=0.1": rgd.KLBall(0.1), "radius=0.5": rgd.KLBall(0.5)},
    "ChiSquare": {"gamma=3": rgd.ChiSquare(3.0), "gamma=1": rgd.ChiSquare(1.0)},
    "ChiSquareBall": {"radius=0.2": rgd.ChiSquareBall(0.2), "radius=1": rgd.ChiSquareBall(1.0)},
    "CVaR": {"alpha=0.3": rgd.CVaR(0.3), "alpha=0.3, smoothing=0.5": rgd.CVaR(0.3, smoothing=0.5)},
    "MidrangeKL": {"scale=0.5": rgd.MidrangeKL(0.5), "scale=1": rgd.MidrangeKL(1.0)},
    "Focal and Threshold": {"Focal(1)": rgd.Focal(1.0), "Threshold(2)": rgd.Threshold(2.0)},
    "Trimmed": {
        "ERM(), 0.2": rgd.Trimmed(rgd.ERM(), 0.2),
        "KL(scale=-0.5), 0.1": rgd.Trimmed(rgd.KL(scale=-0.5), 0.1),
    },
    "MovingAverage, decay=0.9": {
        "KL(scale=-0.5)": rgd.MovingAverage(rgd.KL(scale=-0.5), 0.9),
        "KL(inf, scale=0.5)": rgd.MovingAverage(rgd.KL(math.inf, scale=0.5), 0.9),
    },
    "GroupDRO, every third in group 1": {
        "step_size=0": rgd.GroupDRO(2, step_size=0.0),
        "step_size=0.5": rgd.GroupDRO(2, step_size=0.5),
    },
}
"""For each panel, the settings and the weighting of each curve."""


def weights_of(weighting: rgd.Weighting, losses: np.ndarray) -> np.ndarray:
    """The weights of a batch. A weighting that remembers has seen the same batch once before."""
    groups = (np.arange(losses.size) % 3 == 0).astype(int) if isinstance(weighting, rgd.GroupDRO) else None
    if not weighting.stateful:
        return rgd.sample_weights(losses, weighting, groups=groups)
    _, state = rgd.sample_weights(losses, weighting, groups=groups, state=weighting.init())
    return rgd.sample_weights(losses, weighting, groups=groups, state=state)[0]


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description="The weights of every weighting against the loss")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder of the picture"
    )
    options = parser.parse_args()
    mpl.use("agg")

    losses = -1.2 * np.log1p(-(np.arange(60) + 0.5) / 60)
    figure, axes = plt.subplots(4, 3, figsize=(9.5, 10), sharex=True, layout="constrained")
    for ax, (title, weightings) in zip(axes.flat, PANELS.items(), strict=True):
        ax.axhline(1, color="0.6", linewidth=1, linestyle="--")
        most = 1.0
        for (label, weighting), marker in zip(weightings.items(), "o^s", strict=False):
            weights = weights_of(weighting, losses)
            ax.plot(losses, weights, marker, markersize=3.5, alpha=0.8, label=label)
            most = max(most, weights.max())
        ax.set_title(title, fontsize=11)
        ax.set_ylim(-0.04 * most, (1.1 + 0.14 * len(weightings)) * most)  # room for the legend
        ax.legend(fontsize=8.5, loc="upper left", frameon=False)
    for ax in axes[-1]:
        ax.set_xlabel("loss")
    for ax in axes[:, 0]:
        ax.set_ylabel("weight")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "mathematics.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(path)


if __name__ == "__main__":
    main()
