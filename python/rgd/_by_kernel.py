"""A step of a weighting that remembers, computed by its Rust kernel."""

from __future__ import annotations

from typing import Any

from rgd import _rgd
from rgd.weightings import Batch, Weighting
from rgd.weightings._base import Kernel
from rgd.weightings._call import map_state


class ByKernel:
    """Stands for a weighting in `weigh`, and computes its step by the kernel.

    Args:
        weighting: The weighting.
        kernel: Its kernel.
        threads: The largest number of threads to use.
    """

    def __init__(self, weighting: Weighting, kernel: Kernel, threads: int) -> None:
        self._weighting, self._kernel, self._threads = weighting, kernel, threads

    def step(self, batch: Batch, state: Any) -> tuple[Any, Any]:
        """As `Weighting.step`, for a batch whose values can be read; the state given stays as it is."""
        xp = batch.xp
        leaves: list[Any] = []

        def copied(_: Any, leaf: Any) -> Any:
            leaves.append(xp.astype(leaf, xp.float64, copy=True))
            return leaves[-1]

        def narrowed(before: Any, after: Any) -> Any:
            return xp.astype(after, before.dtype)

        # The kernel takes the leaves in the order of `init()`; the keys of this dict may have another order.
        after = map_state(copied, self._weighting.init(), state)
        weights = xp.empty_like(batch.losses)
        measure = None if batch.is_plain() else batch.measure
        _rgd.sample_weights(
            batch.losses, weights, *self._kernel, self._threads, measure, batch.groups, leaves
        )
        return weights, map_state(narrowed, state, after)
