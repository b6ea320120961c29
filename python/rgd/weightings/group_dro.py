"""Worst case over known groups."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import numpy as np
import numpy.typing as npt

from rgd.weightings._base import Kernel, Weighting, setting
from rgd.weightings._batch import Batch
from rgd.weightings._limits import difference, times


@dataclasses.dataclass(frozen=True)
class GroupDRO(Weighting):
    """Group distributionally robust optimization: groups with a large loss get more weight, step by step.

    Each group `g` has a share `q_g`, uniform at the start. At each batch `q_g <- q_g exp(step_size * mean
    loss of g)`, and the shares are divided by their sum. A group that is absent counts as loss 0. A sample of
    group `g` then has the weight `n q_g / n_g`, with `n_g` of the batch's `n` samples in its group, so that
    the objective is `sum_g q_g * mean loss of g`. Give the groups in the call, as `groups=`.

    The state is `{"shares": q}`. A batch with a loss that is not finite does not change it.

    Args:
        groups: The number of groups, a positive integer; a sample's group is a number in 0..groups-1.
        step_size: Step size of the shares, a finite number >= 0 in units of 1/loss.

    Raises:
        TypeError: If `groups` is not an integer, or `step_size` not a number.
        ValueError: If `groups` is not positive, or `step_size` is negative or not finite.

    Example:
        >>> import numpy as np, rgd
        >>> weighting = rgd.GroupDRO(groups=2, step_size=1.0)
        >>> losses, groups = np.array([0.0, 0.0, 2.0]), np.array([0, 0, 1])
        >>> weights, state = rgd.sample_weights(losses, weighting, groups=groups, state=weighting.init())
        >>> weights.round(4), state["shares"].round(4)
        (array([0.1788, 0.1788, 2.6424]), array([0.1192, 0.8808]))

    References:
        Sagawa, Koh, Hashimoto, Liang, "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020,
        Algorithm 1, as in the authors' code.
    """

    kernel_name = "group_dro"

    groups: int
    step_size: float = setting(
        "a finite number >= 0", lambda step_size: (step_size >= 0) & (step_size < float("inf"))
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.groups, bool) or not isinstance(self.groups, numbers.Integral):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"groups must be the number of groups, an integer, got {self.groups!r}")
        if self.groups < 1:
            raise ValueError(f"groups must be the number of groups, at least 1, got {self.groups}")
        object.__setattr__(self, "groups", int(self.groups))

    def init(self) -> dict[str, npt.NDArray[np.float64]]:
        """Equal shares."""
        return {"shares": np.full(self.groups, 1.0 / self.groups)}

    def step(self, batch: Batch, state: Any) -> tuple[Any, Any]:
        """`n q_g / n_g` with the new `q`."""
        xp, losses = batch.xp, batch.losses
        if batch.groups is None:
            raise ValueError("GroupDRO needs the group of each sample: give groups= with the losses")
        outside = (batch.groups < 0) | (batch.groups >= self.groups)
        if batch.concrete and bool(batch.any(outside)):
            raise ValueError(
                f"groups must lie in 0..{self.groups - 1} for GroupDRO(groups={self.groups}), got "
                f"{int(xp.min(batch.groups))} to {int(xp.max(batch.groups))}"
            )
        numbers_of_groups = xp.astype(batch.arange(0, self.groups), batch.groups.dtype)
        member = xp.astype(batch.groups == numbers_of_groups[:, None], losses.dtype)  # (groups, n)
        sizes = batch.sum(member)
        present = sizes > 0
        sizes = xp.where(present, sizes, 1.0)
        # The losses of other groups are replaced by 0; an infinite one times 0 would be NaN.
        mean_losses = batch.sum(xp.where(member > 0, losses, 0.0)) / sizes
        rise = times(xp, self.step_size, xp.where(present, mean_losses, 0.0))
        # Groups of infinite loss share all the weight, also if their shares had become 0.
        logarithm = xp.where(rise == float("inf"), rise, xp.log(state["shares"]) + rise)
        shares = xp.exp(difference(xp, logarithm, xp.max(logarithm)))
        shares = shares / xp.sum(shares)
        weights = xp.sum(xp.where(member > 0, (batch.count * shares / sizes)[:, None], 0.0), axis=0)
        return xp.where(outside, float("nan"), weights), {"shares": shares}

    def kernel(self) -> Kernel:
        """The kernel `group_dro`: the number of groups and the step size."""
        return self.kernel_name, (self.groups, self.step_size)
