"""Exponential weights, the weighting of Re-weighted Gradient Descent."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

import array_api_compat

from rgd.weightings._base import Kernel, Weighting, is_array, readable, setting
from rgd.weightings._batch import Batch
from rgd.weightings._limits import difference, times


@dataclasses.dataclass(frozen=True)
class KL(Weighting):
    """Exponential weights, `w_i = exp(s * min(l_i, tau))`, with the dial `s`.

    With `s > 0` hard samples get larger weights: this is Re-weighted Gradient Descent, distributionally
    robust optimization with a Kullback-Leibler penalty. `s = 0` is plain training. With `s < 0` samples of
    large loss get smaller weights, which resists wrong labels. For `l = -log p` and `s = -q` the gradient is
    that of generalized cross-entropy, `(1 - p^q) / q`, and for `s = -1` the weight is the label's
    probability.

    With `normalize=True` the weights are divided by their mean over the batch, so that they average to one.

    Args:
        tau: Clipping factor, a positive number in units of the loss: a loss above `tau` has the weight of a
            loss of `tau`. `math.inf` clips nothing, and then `scale` must be given. None stands for 1, or for
            infinity if `scale` is negative.
        scale: Scaling factor `s`, a finite number in units of 1/loss; None stands for the paper's
            `1 / (tau + 1)`.
        normalize: Whether the weights of a batch are divided by their mean. With `tau=math.inf` and
            `scale=1/gamma` they are then the exact solution of `max_q <q, l> - gamma * KL(q || p)`, divided
            by `p`; with a negative scale they are TERM's negative tilt.

    Raises:
        TypeError: If a setting is not a number (or, for `normalize`, not a bool).
        ValueError: If `tau` is not positive, `scale` is not finite, or `tau` is infinite and `scale` is not
            given.

    Example:
        >>> import rgd
        >>> rgd.KL(tau=3.0).effective_scale
        0.25
        >>> rgd.KL(scale=-0.7).tau
        inf
        >>> rgd.KL(tau=-1.0)
        Traceback (most recent call last):
        ...
        ValueError: tau must be a positive number, got -1.0: for a negative scale, rgd.KL(scale=-1.0)

    References:
        Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally
        Robust Optimization", TMLR 2024, arXiv 2306.09222: Algorithm 1 (pointwise weights) and Proposition 3.1
        (the KL penalty's solution).
        Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
        NeurIPS 2018, section 3 (negative scale).
        Wu et al., "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
        Rectification", 2025 ("dynamic fine-tuning": `scale=-1`).
        Li, Beirami, Sanjabi, Smith, "Tilted Empirical Risk Minimization", ICLR 2021 (negative scale with
        `normalize=True`).
    """

    kernel_name = "kl"

    tau: float = setting("a positive number", lambda tau: tau > 0, default=None, optional=True)
    _: dataclasses.KW_ONLY
    scale: float | None = setting(
        "a finite number",
        lambda scale: (scale > -math.inf) & (scale < math.inf),
        default=None,
        optional=True,
        alternative=", or None for 1 / (tau + 1)",
    )
    normalize: bool = False

    def __post_init__(self) -> None:
        tau: Any = self.tau
        if isinstance(tau, numbers.Real) and tau < 0 and self.scale is None:
            raise ValueError(
                f"tau must be a positive number, got {float(tau)}: for a negative scale, "
                f"rgd.KL(scale={float(tau)})"
            )
        super().__post_init__()
        scale: Any = self.scale
        if self.tau is None:  # pyright: ignore[reportUnnecessaryComparison]
            if is_array(scale):  # it may be traced; its sign decides, if it is known
                tau = array_api_compat.array_namespace(scale).where(scale < 0, math.inf, 1.0)
            else:
                tau = 1.0 if scale is None or scale >= 0 else math.inf
            object.__setattr__(self, "tau", tau)
        if self.scale is None and any(math.isinf(tau) for tau in readable(self.tau)):
            raise ValueError(
                "tau=inf clips nothing, and its scale 1 / (tau + 1) would be 0, which is no re-weighting: "
                "give scale too, as in KL(tau=math.inf, scale=1.0)"
            )
        if not isinstance(self.normalize, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"normalize must be True or False, got {self.normalize!r}")

    @property
    def pointwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether each weight depends on its own loss alone, which is so if they are not normalised."""
        return not self.normalize

    @property
    def mean_one(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the weights average to one, which is so if they are normalised."""
        return self.normalize

    @property
    def clip(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The loss above which the weight no longer changes: `tau`."""
        return self.tau

    @property
    def effective_scale(self) -> float:
        """The factor that multiplies the clipped loss: `scale`, or `1 / (tau + 1)` if none was given."""
        return 1.0 / (self.tau + 1.0) if self.scale is None else self.scale

    def with_scale(self, scale: float | None) -> KL:
        """The same weighting with another scale.

        If the sign changes while `tau` is the default of the old sign, `tau` becomes that of the new sign.
        """
        new = dataclasses.replace(self, tau=None, scale=scale)
        tau = self.tau if self.tau != KL(scale=self.scale).tau else new.tau
        return dataclasses.replace(new, tau=tau)

    def numbers_fit(self) -> Any:
        """A traced `tau` may be infinite only if a scale was given, as at construction."""
        return True if self.scale is not None or not is_array(self.tau) else self.tau < math.inf

    def log_weights(self, batch: Batch) -> Any:
        """The exponent `s * min(l, tau)`, less the logarithm of its mean where weights are normalised."""
        exponent = self._exponent(batch)
        return exponent - batch.xp.log(batch.mean(batch.xp.exp(exponent))) if self.normalize else exponent

    def weights(self, batch: Batch) -> Any:
        """`exp(s * min(l, tau))`, divided by its mean with `normalize=True`."""
        weights = batch.xp.exp(self._exponent(batch))
        return weights / batch.mean(weights) if self.normalize else weights

    def kernel(self) -> Kernel:
        """The kernel `kl`: `tau`, the scale, and 1 where weights are normalised."""
        return self.kernel_name, (self.tau, self.effective_scale, 1.0 if self.normalize else 0.0)

    @classmethod
    def of_kernel(cls, numbers: tuple[float, ...]) -> KL:
        """The weighting of a kernel's numbers."""
        tau, scale, normalize = numbers
        return cls(tau, scale=scale, normalize=bool(normalize))

    @property
    def is_plain(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every weight is 1, which is so at scale 0."""
        return self.effective_scale == 0.0

    def _exponent(self, batch: Batch) -> Any:
        """`s * min(l, tau)`; with `normalize=True` less its largest value."""
        xp, losses, scale = batch.xp, batch.losses, self.effective_scale
        clipped = xp.where(losses > self.tau, self.tau, losses)
        if self.normalize:
            # Subtract the clipped loss of the largest weight, so that nothing overflows.
            heaviest = xp.where(batch.scalar(scale) < 0, batch.min(clipped), batch.max(clipped))
            clipped = difference(xp, clipped, heaviest)
        return times(xp, scale, clipped)
