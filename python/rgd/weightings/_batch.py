"""The input of a weighting: the losses of a batch, their measure, and sums with this measure."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import array_api_compat


class Batch:
    """The losses of a batch, as a weighting gets them.

    `p_i`, the measure, is the caller's `sample_weight`, and 1 for each sample where none was given. A
    sample that is masked out, or whose `p_i` is 0, takes no part.

    Args:
        losses: One loss a sample, shape (n,), float32 or float64, of NumPy, torch or JAX.
        measure: The measure `p`, shape (n,), of the losses' dtype, >= 0, and 0 for a sample that takes no
            part; None for ones.
        groups: The group of each sample, integers of shape (n,), or None.
        xp: The array namespace of the losses from `array_api_compat`; None to look it up.
        concrete: Whether values can be read now, without waiting for a device or breaking a trace.
        any_size: Whether the formula is traced for batches of any size, so that it must not depend on the
            size of this batch.
        base: The old name of `measure`, for one more release.
        reference: The losses of a reference model, shape (n,), of the losses' dtype, or None.
        entropy: The entropy of the logits that each loss is of, shape (n,), of the losses' dtype, or None.
        classes: How many classes these logits have, or None.

    Attributes:
        losses: One loss a sample, shape (n,), without gradient; 0 where a sample takes no part.
        xp: The losses' array namespace (Python array API standard): write formulas with it.
        groups: As given, in at least 32 bits.
        reference: As given; 0 where a sample takes no part.
        entropy: As given; 0 where a sample takes no part.
        classes: As given.
        concrete: As given.
        any_size: As given.

    Example:
        >>> import numpy as np, rgd
        >>> batch = rgd.Batch(np.array([1.0, 3.0]), measure=np.array([3.0, 1.0]))
        >>> float(batch.count), float(batch.mean(batch.losses)), float(batch.max(batch.losses))
        (4.0, 1.5, 3.0)
    """

    def __init__(
        self,
        losses: Any,
        measure: Any = None,
        groups: Any = None,
        *,
        xp: Any = None,
        concrete: bool = False,
        any_size: bool = False,
        base: Any = None,
        reference: Any = None,
        entropy: Any = None,
        classes: int | None = None,
    ) -> None:
        if base is not None:
            if measure is not None:
                raise TypeError("give measure alone: base is its old name")
            _warn_of_base()
            measure = base
        self.xp = array_api_compat.array_namespace(losses) if xp is None else xp
        if groups is not None and groups.dtype.itemsize < 4:
            # In a narrower dtype, the group number that they are compared with would wrap.
            groups = self.xp.astype(groups, self.xp.int32)
        self.groups = groups
        self.concrete = concrete
        self.any_size = any_size
        self._measure = measure
        self._takes_part = None if measure is None else measure != 0
        self._count = None if measure is None else self.xp.sum(measure)
        self.losses = self._or(losses, 0.0)
        self.reference = None if reference is None else self._or(reference, 0.0)
        self.entropy = None if entropy is None else self._or(entropy, 0.0)
        self.classes = classes

    @property
    def measure(self) -> Any:
        """The measure `p`, shape (n,): 0 where a sample takes no part."""
        return self.xp.ones_like(self.losses) if self._measure is None else self._measure

    def is_plain(self) -> bool:
        """Whether it is known, without reading values, that every sample has measure 1."""
        return self._measure is None

    @property
    def base(self) -> Any:
        """The old name of `measure`, for one more release."""
        _warn_of_base()
        return self.measure

    @property
    def count(self) -> Any:
        """How many samples take part, `sum_i p_i`: a 0-d array of the losses' dtype."""
        return self.xp.sum(self.measure) if self._count is None else self._count

    def sum(self, values: Any) -> Any:
        """`sum_i p_i x_i` over the samples that take part.

        Args:
            values: `x`, shape (n,), or (..., n) for several sums at once.

        Returns:
            The sum over the last axis.
        """
        if self._measure is None:
            return self.xp.sum(values, axis=-1)
        return self.xp.sum(self.xp.where(self._takes_part, self._measure * values, 0.0), axis=-1)

    def mean(self, values: Any) -> Any:
        """`sum_i p_i x_i / sum_i p_i` over the samples that take part; arguments and shapes as for `sum`."""
        if self._measure is None:
            return self.xp.mean(values, axis=-1)
        return self.sum(values) / self.count

    def max(self, values: Any) -> Any:
        """The largest of `values`, shape (n,), over the samples that take part; -inf where none does."""
        return self.xp.max(self._or(values, -float("inf")), axis=-1)

    def min(self, values: Any) -> Any:
        """The smallest of `values`, shape (n,), over the samples that take part; inf where none does."""
        return self.xp.min(self._or(values, float("inf")), axis=-1)

    def any(self, condition: Any) -> Any:
        """Whether `condition`, booleans of shape (n,), holds for a sample that takes part."""
        if self._takes_part is not None:
            condition = condition & self._takes_part
        return self.xp.any(condition, axis=-1)

    def reweighed(self, measure: Any) -> Batch:
        """The same batch under another measure, 0 wherever this one is."""
        return self._with(self.losses, measure, self.reference)

    def of_excess(self) -> Batch:
        """The batch whose losses are the excess over the reference model; it has no `reference` itself."""
        return self._with(self.losses - self.reference, self._measure, None)

    def only(self, values: Any) -> Any:
        """`values`, shape (n,), and 0 where a sample takes no part."""
        return self._or(values, 0.0)

    def arange(self, start: int, stop: int) -> Any:
        """The integers from `start` to `stop - 1` in the losses' dtype, on their device."""
        placed = {"device": self.losses.device} if "torch" in self.xp.__name__ else {}
        return self.xp.arange(start, stop, dtype=self.losses.dtype, **placed)

    def scalar(self, value: Any) -> Any:
        """A number as a 0-d array of the losses' dtype, on their device."""
        if "torch" in self.xp.__name__ and isinstance(value, (int, float)):
            return self.xp.full((), value, dtype=self.losses.dtype, device=self.losses.device)
        return self.xp.zeros_like(self.losses[0]) + value

    def cumulative_sum(self, values: Any) -> Any:
        """`x_1, x_1 + x_2, ...`, shape (n,), without the measure."""
        # Use the method, which every library has. The compat function looks up the namespace, which
        # torch.compile cannot trace without a warning.
        return values.cumsum(0)

    def _with(self, losses: Any, measure: Any, reference: Any) -> Batch:
        how: Any = {"xp": self.xp, "concrete": self.concrete, "any_size": self.any_size}
        how |= {"entropy": self.entropy, "classes": self.classes}
        return Batch(losses, measure, self.groups, reference=reference, **how)

    def _or(self, values: Any, other: float) -> Any:
        return values if self._takes_part is None else self.xp.where(self._takes_part, values, other)


def _warn_of_base() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        return  # a graph compiled with fullgraph=True cannot warn
    warnings.warn("base of rgd.Batch is now called measure", DeprecationWarning, stacklevel=3)
