"""Re-weighted Gradient Descent (RGD): KL-DRO sample weights for NumPy and any CPU array of DLPack.

`rgd.torch` is the same for PyTorch, with gradients. This module imports neither torch nor JAX.

Example:
    >>> import numpy as np, rgd
    >>> losses = np.array([0.1, 0.2, 4.0])
    >>> rgd.sample_weights(losses, tau=1.0).round(3)
    array([1.051, 1.105, 1.649])

References:
    Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally Robust
    Optimization", TMLR 2024, arXiv 2306.09222.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from rgd import _rgd
from rgd._arrays import Source, SupportsDLPack, available_cores, read
from rgd.diagnostics import WeightStats, clipping_factor, stats_from_sums
from rgd.weightings import KL, KLBall, Weighting, resolve_weighting

__all__ = [
    "KL",
    "KLBall",
    "WeightStats",
    "Weighting",
    "reweighted_mean",
    "sample_weights",
    "weight_stats",
]

__version__: str

_Array = TypeVar("_Array", bound=SupportsDLPack)


@overload
def sample_weights(
    losses: npt.NDArray[np.float64], weighting: Weighting | None = None, *, tau: float | None = None
) -> npt.NDArray[np.float64]: ...
@overload
def sample_weights(
    losses: npt.NDArray[np.float32 | np.float16],
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
) -> npt.NDArray[np.float32]: ...
@overload
def sample_weights(
    losses: _Array, weighting: Weighting | None = None, *, tau: float | None = None
) -> _Array: ...
def sample_weights(losses: Any, weighting: Weighting | None = None, *, tau: float | None = None) -> Any:
    """The weight of each sample: `w_i = exp(scale * min(l_i, tau))` for `KL`, and as `KLBall` says for that.

    The input is read in place, never copied. Pointwise weights (`KL` without `normalize`) each depend on
    their own loss alone, bit for bit: splitting a batch changes none of them.

    Args:
        losses: One loss a sample: float64, float32, float16 or bfloat16, of any shape but (), any strides. A
            NumPy array, a torch tensor or JAX array on the CPU, or any other CPU array (or capsule) that
            speaks DLPack.
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` is given. Normalised and
            ball weights average to one over all the elements.
        tau: Short for `weighting=KL(tau=tau)`.

    Returns:
        Weights of the losses' shape, as the kind of array that was given (NumPy for a capsule): float64 for
        float64 losses, else float32. A NaN loss has a NaN weight, and so have all losses of its batch where
        weights are normalised or from a ball.

    Raises:
        TypeError: If `losses` is no array of floating numbers, or `tau` or `weighting` is of the wrong type.
        ValueError: If `losses` is a scalar (already reduced), on another device than the CPU, requires grad,
            or is a capsule already consumed; if `tau` is not positive; if both `tau` and `weighting` are
            given.

    Example:
        >>> import numpy as np, rgd
        >>> rgd.sample_weights(np.array([0.0, 1.0, 5.0]), rgd.KL(tau=1.0)).round(4)
        array([1.    , 1.6487, 1.6487])
        >>> rgd.sample_weights(np.array([0.0, 1.0, 5.0]), rgd.KL(tau=1.0, normalize=True)).round(4)
        array([0.6981, 1.151 , 1.151 ])

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1; Proposition 3.1 and section 3 for the other weightings.
    """
    weighting = resolve_weighting(tau, weighting)
    source = read("losses", losses)
    return source.restore(_weights(source, weighting))


def reweighted_mean(
    losses: SupportsDLPack, weighting: Weighting | None = None, *, tau: float | None = None
) -> float:
    """The objective of re-weighted gradient descent, `(1/n) * sum_i w_i * l_i`.

    Args:
        losses: One loss a sample, as for `sample_weights`.
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` is given.
        tau: Short for `weighting=KL(tau=tau)`.

    Returns:
        A Python float, summed in float64 whatever the losses' dtype. NaN for no losses.

    Raises:
        TypeError, ValueError: As `sample_weights`.

    Example:
        >>> import numpy as np, rgd
        >>> losses = np.array([0.0, 2.0])
        >>> rgd.reweighted_mean(losses, rgd.KL(scale=0.0))
        1.0
        >>> round(rgd.reweighted_mean(losses, tau=1.0), 6)
        1.648721

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    weighting = resolve_weighting(tau, weighting)
    source = read("losses", losses)
    count = math.prod(source.shape)
    if not count:
        return math.nan
    weights = _weights(source, weighting)
    return _rgd.weighted_sum(source.values, weights, available_cores()) / count


def weight_stats(
    losses: SupportsDLPack, weights: SupportsDLPack, weighting: Weighting | None = None
) -> WeightStats:
    """How strongly a batch was re-weighted: effective sample size, KL to uniform and more of `WeightStats`.

    Args:
        losses: One loss a sample, as for `sample_weights`.
        weights: The weight of each, of the same shape; any floating dtype.
        weighting: What the weights came from, which tells the share of clipped losses; None if it is not
            known.

    Returns:
        The statistics, from sums taken in float64.

    Raises:
        TypeError: If `losses` or `weights` is no array of floating numbers, or `weighting` is no weighting.
        ValueError: If the shapes differ, or one of the arrays is refused by `sample_weights`.

    Example:
        >>> import numpy as np, rgd
        >>> losses = np.array([1.0, 1.0, 4.0])
        >>> stats = rgd.weight_stats(losses, rgd.sample_weights(losses, rgd.KLBall(radius=0.2)))
        >>> round(stats.kl_to_uniform, 6), round(stats.effective_sample_size, 3)
        (0.2, 2.094)
    """
    if weighting is not None:
        weighting = resolve_weighting(None, weighting)
    loss_source, weight_source = read("losses", losses), read("weights", weights)
    if loss_source.shape != weight_source.shape:
        raise ValueError(
            f"weights must have the shape of losses, {loss_source.shape}, got {weight_source.shape}: "
            "pass the losses that the weights were made from"
        )
    sums = _rgd.weight_sums(
        loss_source.values, weight_source.values, clipping_factor(weighting), available_cores()
    )
    return stats_from_sums(sums, weighting)


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


def _weights(source: Source, weighting: Weighting) -> npt.NDArray[Any]:
    weights = np.empty(source.shape, source.dtype)
    _rgd.sample_weights(source.values, weights, weighting, available_cores())
    return weights
