"""The weightings: which distribution over the minibatch the worst case is taken over.

Each is a small frozen dataclass that checks its own numbers. Every front (NumPy, torch, JAX) takes the same
ones. In JAX a setting may be an array or a traced value too, whose number is checked only where it is known.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from typing import Any, TypeAlias


@dataclasses.dataclass(frozen=True)
class KL:
    """Exponential weights: distributionally robust optimization with a Kullback-Leibler penalty.

    A sample with loss `l` weighs `exp(scale * min(l, tau))`. With `normalize=True` the weights are divided by
    their mean over the batch, so that they average to one.

    Args:
        tau: Clipping factor, a positive number in units of the loss: a loss above `tau` weighs no more than
            one at `tau`. `math.inf` clips nothing, and then `scale` must be given.
        scale: Scaling factor, a finite number >= 0 in units of 1/loss; `None` stands for the paper's
            `1 / (tau + 1)`. `scale=0` is plain empirical risk minimization. With `normalize=True` and
            `tau=math.inf, scale=1/gamma` the weights are the exact solution of
            `max_q <q, losses> - gamma * KL(q || uniform)`, times the batch size.
        normalize: Whether the weights of a batch are divided by their mean.

    Raises:
        TypeError: If a setting is not a number (or, for `normalize`, not a bool).
        ValueError: If `tau` is not positive, `scale` is negative or not finite, or `tau` is infinite and
            `scale` is not given.

    Example:
        >>> import rgd
        >>> rgd.KL(tau=3.0).effective_scale
        0.25
        >>> rgd.KL(tau=-1.0)
        Traceback (most recent call last):
        ...
        ValueError: tau must be a positive number, got -1.0

    References:
        Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally
        Robust Optimization", TMLR 2024, arXiv 2306.09222: Algorithm 1 (pointwise weights) and Proposition 3.1
        (the KL penalty's solution).
    """

    tau: float = 1.0
    _: dataclasses.KW_ONLY
    scale: float | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        tau = _real("tau", self.tau)
        for number in _known(tau):
            if not number > 0:
                raise ValueError(f"tau must be a positive number, got {number}")
        object.__setattr__(self, "tau", tau)
        if self.scale is not None:
            scale = _real("scale", self.scale)
            for number in _known(scale):
                if not 0 <= number < math.inf:
                    raise ValueError(
                        f"scale must be a finite number >= 0, or None for 1 / (tau + 1), got {number}"
                    )
            object.__setattr__(self, "scale", scale)
        elif any(math.isinf(number) for number in _known(tau)):
            raise ValueError(
                "tau=inf clips nothing, and its scale 1 / (tau + 1) would be 0, which is no re-weighting: "
                "give scale too, as in KL(tau=math.inf, scale=1.0)"
            )
        if not isinstance(self.normalize, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"normalize must be True or False, got {self.normalize!r}")

    @property
    def effective_scale(self) -> float:
        """The factor that multiplies the clipped loss: `scale`, or `1 / (tau + 1)` where none was given."""
        return 1.0 / (self.tau + 1.0) if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class KLBall:
    """Weights of the worst distribution within a Kullback-Leibler ball around the uniform one.

    The weights are `n * q` with `q` the solution of `max_q <q, losses>` subject to
    `KL(q || uniform) <= radius`: `q = softmax(losses / gamma)`, with `gamma` the root of
    `KL(q || uniform) = radius`. They average to one. A radius of `log(n / m)` or more, where `m` samples
    share the largest loss, puts all weight on those; equal losses get equal weights.

    Args:
        radius: Radius of the ball in nats, a number >= 0. 0 is plain empirical risk minimization.

    Raises:
        TypeError: If `radius` is not a number.
        ValueError: If `radius` is negative or NaN.

    Example:
        >>> import numpy as np, rgd
        >>> rgd.sample_weights(np.array([0.5, 0.5, 3.0]), rgd.KLBall(radius=10.0))
        array([0., 0., 3.])

    References:
        Kumar et al., arXiv 2306.09222, section 3 (the constrained form of DRO with a KL divergence).
    """

    radius: float

    def __post_init__(self) -> None:
        radius = _real("radius", self.radius)
        for number in _known(radius):
            if not number >= 0:
                raise ValueError(f"radius must be a number >= 0 (nats), got {number}")
        object.__setattr__(self, "radius", radius)


Weighting: TypeAlias = KL | KLBall


def resolve_weighting(tau: float | None, weighting: Weighting | None) -> Weighting:
    """The weighting a caller asked for by `tau=`, its short form, or by `weighting=`.

    Args:
        tau: Clipping factor of `KL(tau)`, or None.
        weighting: A weighting, or None. With neither given: `KL(tau=1.0)`.

    Raises:
        ValueError: If both are given.
        TypeError: If `weighting` is not a weighting.
    """
    if weighting is None:
        return KL() if tau is None else KL(tau)
    if tau is not None:
        raise ValueError("give tau or weighting, not both: tau=t is short for weighting=rgd.KL(tau=t)")
    given: Any = weighting
    if not isinstance(given, (KL, KLBall)):
        raise TypeError(
            f"weighting must be an rgd.KL or an rgd.KLBall, got {given!r}; did you mean tau={given!r}?"
        )
    return given


def _real(name: str, value: Any) -> Any:
    """The value as a float; a JAX array or traced value as it is."""
    if _is_jax(value):
        if value.dtype == bool:
            raise TypeError(f"{name} must be a number, got a JAX array of dtype {value.dtype}")
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _known(value: Any) -> list[float]:
    """The numbers of a setting that can be read now: of a traced value none."""
    if not _is_jax(value):
        return [value]
    if isinstance(value, sys.modules["jax"].core.Tracer):
        return []
    return [float(number) for number in value.reshape(-1)]


def _is_jax(value: Any) -> bool:
    # A JAX array cannot exist before jax is imported, and this module must not import it.
    return isinstance(value, getattr(sys.modules.get("jax"), "Array", ()))
