"""Loss-based re-weighting for NumPy and any CPU array of DLPack: weights, the re-weighted mean, statistics.

`rgd.torch` and `rgd.jax` are the same for PyTorch and JAX, with gradients. This module imports neither.

Example:
    >>> import numpy as np, rgd
    >>> losses = np.array([0.1, 0.2, 4.0])
    >>> rgd.sample_weights(losses, tau=1.0).round(3)
    array([1.051, 1.105, 1.649])

References:
    Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally Robust
    Optimization", TMLR 2024, arXiv 2306.09222.
"""

# First: it refuses an interpreter that NumPy would refuse in words of its own.
from rgd import _main_interpreter  # noqa: F401  # pyright: ignore[reportUnusedImport]

# isort: split
from rgd._numpy import reweighted_mean, sample_weights, weight_stats
from rgd.class_counts import class_balanced, log_prior
from rgd.stats import GroupStats, WeightStats
from rgd.weightings import (
    ERM,
    KL,
    Batch,
    ChiSquare,
    ChiSquareBall,
    CVaR,
    Focal,
    GroupDRO,
    KLBall,
    MidrangeKL,
    MovingAverage,
    Pointwise,
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
    "Focal",
    "GroupDRO",
    "GroupStats",
    "KLBall",
    "MidrangeKL",
    "MovingAverage",
    "Pointwise",
    "Trimmed",
    "WeightStats",
    "Weighting",
    "class_balanced",
    "log_prior",
    "reweighted_mean",
    "sample_weights",
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


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata  # noqa: PLC0415

    try:
        version = metadata.version("rgd")
    except metadata.PackageNotFoundError:
        version = "0+unknown"
    globals()["__version__"] = version
    return version
