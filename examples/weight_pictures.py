"""Draws the pictures of docs/torch.md: the weights over a training.

A small network learns long-tailed digits with RGDLoss: 100 zeros, 60 ones, and so on down to a single nine.
Five of the zeros are given a wrong label. Each epoch the weights of all training images are kept; at the end
`rgd.plot` draws the weight of each image against its loss, the weights over the training, and the
heaviest images.

Run it with `python examples/weight_pictures.py`; it takes seconds.
"""

from __future__ import annotations

import argparse
import pathlib

import matplotlib as mpl
import numpy as np
import torch
from longtail_digits import class_sizes
from matplotlib import pyplot as plt
from rgd import plot
from rgd.torch import RGDLoss, sample_weights
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

TAU = 2.0
IMBALANCE = 100
WRONG = 5


def training_images() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images (n, 8, 8) with values from 0 to 1, labels (n,), and a name for each image."""
    images, digits = load_digits(return_X_y=True)
    chosen = np.concatenate(
        [np.flatnonzero(digits == k)[:size] for k, size in enumerate(class_sizes(IMBALANCE))]
    )
    digits = digits[chosen]
    labels = digits.copy()
    labels[:WRONG] = np.arange(1, WRONG + 1)
    names = [
        f"a {digit}" if digit == label else f"a {digit}, labelled {label}"
        for digit, label in zip(digits, labels, strict=True)
    ]
    return torch.tensor(images[chosen] / 16, dtype=torch.float32).view(-1, 8, 8), torch.tensor(labels), names


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of the weights over a training with RGDLoss")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder of the pictures"
    )
    options = parser.parse_args()
    mpl.use("agg")

    images, labels, names = training_images()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    criterion = RGDLoss(tau=TAU)

    history: list[torch.Tensor] = []
    for _ in tqdm(range(options.epochs), desc="training", unit="epoch"):
        for batch in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            criterion(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            history.append(F.cross_entropy(model(images), labels, reduction="none"))

    losses, weights = history[-1], [sample_weights(losses, tau=TAU) for losses in history]
    axes = {
        "weight_curve": plot.weight_curve(tau=TAU, losses=losses),
        "weight_history": plot.weight_history(weights, steps=range(1, len(weights) + 1)),
        "heaviest_samples": plot.heaviest_samples(losses, tau=TAU, count=8, names=names, images=images),
    }
    axes["weight_history"].set_xlabel("epoch")
    options.output.mkdir(parents=True, exist_ok=True)
    for name, ax in axes.items():
        path = options.output / f"{name}.png"
        ax.figure.savefig(path, dpi=120)
        plt.close(ax.figure)
        print(path)


if __name__ == "__main__":
    main()
