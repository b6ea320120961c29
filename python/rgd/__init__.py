"""Weight each sample by its own loss, against wrong labels or for hard samples: PyTorch, JAX and NumPy.

Where to begin:

- `rgd.torch`: `RGDLoss` in place of `nn.CrossEntropyLoss`, `RGD` around any optimizer, and functions.
- `rgd.jax`: the same as pure functions; `rgd.optax` for optimizers.
- `rgd` itself: `sample_weights`, `reweighted_mean` and `weight_stats` for NumPy arrays and any CPU array that
  supports DLPack, without gradients.

Every part takes these weightings, but for the two that need more than losses, `Excess` and `EntropyGate`:

- `KL`: `exp(scale * min(loss, tau))`, the dial; a negative scale resists wrong labels.
- `ERM`: all weights are 1, plain training.
- `CVaR`: the worst share of the batch.
- `KLBall`, `ChiSquare`, `ChiSquareBall`, `MidrangeKL`: other worst cases.
- `Focal`: less weight for samples that are predicted well.
- `Trimmed`: leaves out the largest losses; `Threshold`: leaves out all losses above a number.
- `Excess`: weights a sample by its loss minus that of a reference model.
- `EntropyGate`: weights times the entropy of the logits, where a call has logits.
- `GroupDRO`: the worst of known groups.
- `MovingAverage`: weights over their running mean.
- `Pointwise`: a function of the loss that you give. For more, subclass `Weighting`.

`help(rgd.KL)` shows the formula of `KL`; every weighting has such a text. `suspects` lists the samples that
look mislabelled; `log_prior` and `class_balanced` are for rare classes. The modules `torch`, `jax`, `optax`,
`boosting`, `sklearn`, `plot`, `testing` and `integrations` are imported when they are first used.

Example:
    >>> import numpy as np, rgd
    >>> losses = np.array([0.1, 0.2, 4.0])
    >>> rgd.sample_weights(losses, tau=1.0).round(3)
    array([1.051, 1.105, 1.649])

References:
    Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally Robust
    Optimization", TMLR 2024, arXiv 2306.09222.
"""

from typing import Any

# This import comes first: it refuses a subinterpreter with a clear message, before NumPy fails in it.
from rgd import _main_interpreter  # noqa: F401  # pyright: ignore[reportUnusedImport]

# isort: split
from rgd._numpy import reweighted_mean, sample_weights, weight_stats
from rgd._suspects import Suspects, suspects
from rgd.class_counts import class_balanced, log_prior
from rgd.stats import GroupStats, WeightStats
from rgd.weightings import (
    ERM,
    KL,
    Batch,
    ChiSquare,
    ChiSquareBall,
    CVaR,
    EntropyGate,
    Excess,
    Focal,
    GroupDRO,
    KLBall,
    MidrangeKL,
    MovingAverage,
    Pointwise,
    Threshold,
    Trimmed,
    Weighting,
)

__all__ = [
    "ERM",
    "KL",
    "Batch",
    "CVaR",
    "ChiSquare",
    "ChiSquareBall",
    "EntropyGate",
    "Excess",
    "Focal",
    "GroupDRO",
    "GroupStats",
    "KLBall",
    "MidrangeKL",
    "MovingAverage",
    "Pointwise",
    "Suspects",
    "Threshold",
    "Trimmed",
    "WeightStats",
    "Weighting",
    "class_balanced",
    "log_prior",
    "reweighted_mean",
    "sample_weights",
    "suspects",
    "weight_stats",
]

__version__: str

_MODULES = frozenset(
    (
        "boosting",
        "class_counts",
        "integrations",
        "jax",
        "optax",
        "plot",
        "reference",
        "sklearn",
        "stats",
        "testing",
        "torch",
        "weightings",
    )
)


def __dir__() -> list[str]:
    """The public names, and the public modules that have been imported."""
    return sorted([*__all__, "__version__", *_MODULES.intersection(globals())])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return _imported(name)
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata  # noqa: PLC0415

    try:
        version = metadata.version("rgd")
    except metadata.PackageNotFoundError:
        version = "0+unknown"
    globals()["__version__"] = version
    return version


def _imported(name: str) -> Any:
    """A public module, imported now.

    Raises:
        AttributeError: If a library that it needs is not installed.
    """
    import importlib  # noqa: PLC0415

    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == __name__:
            raise
        raise AttributeError(
            f"rgd.{name} needs {error.name}, which is not installed: pip install {error.name}"
        ) from error
