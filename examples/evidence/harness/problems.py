"""The data of every seed, the network, the loss and the metrics of what is learnt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor

# From 1/8 to 8 in steps of 15%.
TEMPERATURES = torch.logspace(-3, 3, 31, base=2.0)


class Part(NamedTuple):
    """Inputs (n, d), targets (n,) and groups (n,) of one seed, or with an axis of seeds in front."""

    inputs: Tensor
    target: Tensor
    groups: Tensor


class Data(NamedTuple):
    """The three parts. Training data train, validation data choose, test data only measure."""

    train: Part
    validation: Part
    test: Part


Metrics = dict[str, Tensor]


class Problem(Protocol):
    """What `train` needs to know. `draw` must give parts of the same sizes for every seed."""

    name: str
    draw: Callable[[int], Data]
    features: int
    outputs: int
    hidden: tuple[int, ...]
    epochs: int
    batch_size: int
    select: str

    def key(self) -> str:
        """What decides the result of a run, as text."""
        ...

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Losses (..., n) of outputs (..., n, C) and targets (..., n)."""
        ...

    def metrics(self, outputs: Tensor, part: Part, validation: tuple[Tensor, Part]) -> Metrics:
        """Metrics of outputs (K, n, C) on a part of one seed, each of shape (K,)."""
        ...


def worst_tenth(losses: Tensor) -> Tensor:
    """Mean of the largest tenth of the losses (..., n)."""
    return losses.topk(max(1, round(0.1 * losses.shape[-1])), dim=-1).values.mean(-1)


@dataclasses.dataclass(frozen=True)
class Classification:
    """A multilayer perceptron that learns classes."""

    name: str
    draw: Callable[[int], Data]
    features: int
    outputs: int
    hidden: tuple[int, ...] = (64,)
    epochs: int = 30
    batch_size: int = 32
    select: str = "accuracy"

    def key(self) -> str:
        return f"{self.name} {self.features} {self.outputs} {self.hidden} {self.epochs} {self.batch_size}"

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        flat = F.cross_entropy(outputs.flatten(0, -2), target.flatten(), reduction="none")
        return flat.view(target.shape)

    def metrics(self, outputs: Tensor, part: Part, validation: tuple[Tensor, Part]) -> Metrics:
        """Accuracy, of the worst class and group too; mean loss and worst tenth, as they are and scaled."""
        target = part.target.expand(outputs.shape[:-1])
        losses = self.losses(outputs, target)
        right = (outputs.argmax(-1) == target).double()
        right[~losses.isfinite()] = torch.nan  # a network that diverged is not right by chance
        by_class = [right[:, part.target == c].mean(1) for c in part.target.unique().tolist()]
        by_group = [right[:, part.groups == g].mean(1) for g in part.groups.unique().tolist()]
        classes = torch.stack(by_class)
        scaled = outputs / self.temperature(*validation)[:, None, None]
        return {
            "accuracy": right.mean(1),
            "balanced_accuracy": classes.mean(0),
            "worst_class_accuracy": classes.amin(0),
            "worst_group_accuracy": torch.stack(by_group).amin(0),
            "mean_loss": losses.mean(1),
            "worst_tenth": worst_tenth(losses),
            "scaled_mean_loss": self.losses(scaled, target).mean(1),
            "scaled_worst_tenth": worst_tenth(self.losses(scaled, target)),
        }

    def temperature(self, outputs: Tensor, part: Part) -> Tensor:
        """The temperature (K,) with the smallest mean loss on the validation data."""
        target = part.target.expand(outputs.shape[:-1])
        losses = torch.stack([self.losses(outputs / t, target).mean(1) for t in TEMPERATURES])
        return TEMPERATURES[losses.nan_to_num(torch.inf).argmin(0)]


@dataclasses.dataclass(frozen=True)
class Regression:
    """Squared error; a linear model where `hidden` is empty."""

    name: str
    draw: Callable[[int], Data]
    features: int
    outputs: int = 1
    hidden: tuple[int, ...] = ()
    epochs: int = 30
    batch_size: int = 32
    select: str = "mean_loss"

    def key(self) -> str:
        return f"{self.name} {self.features} {self.hidden} {self.epochs} {self.batch_size}"

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs.squeeze(-1) - target).square()

    def metrics(self, outputs: Tensor, part: Part, validation: tuple[Tensor, Part]) -> Metrics:
        """Mean squared error; of the worst tenth of the samples; of the worst group."""
        del validation
        losses = self.losses(outputs, part.target)
        groups = [losses[:, part.groups == g].mean(1) for g in part.groups.unique().tolist()]
        return {
            "mean_loss": losses.mean(1),
            "worst_tenth": worst_tenth(losses),
            "worst_group_loss": torch.stack(groups).amax(0),
        }


def higher_is_better(metric: str) -> bool:
    """Whether a metric counts what is right; all others are losses."""
    return metric.endswith("accuracy")


def stack(parts: list[Data]) -> Data:
    """The data of several seeds, with the seeds in front."""
    return Data(*(Part(*map(torch.stack, zip(*part, strict=True))) for part in zip(*parts, strict=True)))


# --- data sets ---


@functools.cache
def load(name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Inputs, digits scaled to [0, 1], other columns to mean 0 and deviation 1; and classes."""
    inputs, target = getattr(datasets, f"load_{name}")(return_X_y=True)
    inputs = inputs / 16 if name == "digits" else (inputs - inputs.mean(0)) / inputs.std(0)
    return inputs, target.astype(np.int64)


@functools.cache
def load_mnist1d() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """MNIST-1D: ten kinds of noisy curves, inputs (5000, 40) and classes (5000,)."""
    try:
        from mnist1d.data import make_dataset  # noqa: PLC0415
    except ImportError:
        raise SystemExit("this program needs the package mnist1d: run `pip install mnist1d`") from None
    made = make_dataset()
    inputs, target = (np.concatenate([made[name], made[f"{name}_test"]]) for name in ("x", "y"))
    return inputs, target.astype(np.int64)


def flip(
    labels: npt.NDArray[np.int64],
    share: float,
    classes: int,
    random: np.random.Generator,
    pairs: bool = False,
) -> None:
    """Replaces a share of the labels in place: by any other class alike, or by the next class (`pairs`)."""
    chosen = random.permutation(len(labels))[: round(share * len(labels))]
    moved = np.ones(len(chosen), np.int64) if pairs else random.integers(1, classes, len(chosen))
    labels[chosen] = (labels[chosen] + moved) % classes


def split(  # noqa: PLR0917
    name: str,
    seed: int,
    sizes: tuple[int, int],
    noise: float = 0.0,
    keep: npt.NDArray[np.intp] | None = None,
    pairs: bool = False,
) -> Data:
    """A random split into training, validation and test data, the first two with wrong labels.

    Args:
        name: A data set of scikit-learn, or "mnist1d".
        seed: A seed gives the same split at every noise.
        sizes: Training and validation samples; the others are the test.
        noise: Share of wrong labels among training and validation labels. Test labels are right.
        keep: The rows to split; None for all.
        pairs: Whether a wrong label is the next class, instead of any other.
    """
    inputs, target = load_mnist1d() if name == "mnist1d" else load(name)
    random = np.random.default_rng([11, seed])
    rows = random.permutation(np.arange(len(target)) if keep is None else keep)
    parts: list[Part] = []
    ends = np.cumsum(sizes)
    for k, chosen in enumerate(np.split(rows, ends)):
        labels = target[chosen].copy()
        if k < 2:
            flip(labels, noise, int(target.max()) + 1, np.random.default_rng([12 + k, seed]), pairs)
        x, y = torch.tensor(inputs[chosen], dtype=torch.float32), torch.tensor(labels)
        parts.append(Part(x, y, torch.zeros_like(y)))
    return Data(*parts)


def digits(
    noise: float = 0.0, sizes: tuple[int, int] = (500, 300), epochs: int = 30, pairs: bool = False
) -> Classification:
    """scikit-learn's 1797 handwritten digits, 8 by 8 pixels, with wrong labels in training and validation."""
    draw = functools.partial(split, "digits", sizes=sizes, noise=noise, pairs=pairs)
    return Classification(f"digits, noise {noise:g}, pairs {pairs}, {sizes}", draw, 64, 10, epochs=epochs)


def mnist1d(
    noise: float = 0.0, sizes: tuple[int, int] = (2500, 1000), epochs: int = 30, pairs: bool = False
) -> Classification:
    """MNIST-1D (Greydanus & Kobak, ICML 2024): 5000 curves of 40 numbers; wrong labels as in `digits`."""
    draw = functools.partial(split, "mnist1d", sizes=sizes, noise=noise, pairs=pairs)
    return Classification(f"MNIST-1D, noise {noise:g}, pairs {pairs}, {sizes}", draw, 40, 10, epochs=epochs)


def breast_cancer(
    noise: float = 0.0, sizes: tuple[int, int] = (200, 200), epochs: int = 30
) -> Classification:
    """Wisconsin breast cancer: 569 rows of 30 numbers, two classes, with wrong labels as in `digits`."""
    draw = functools.partial(split, "breast_cancer", sizes=sizes, noise=noise)
    return Classification(f"breast cancer, noise {noise:g}, {sizes}", draw, 30, 2, epochs=epochs)
