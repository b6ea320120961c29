"""The contract of a weighting as a function, for the members of `rgd` and for a user's own.

Example:
    >>> import rgd, rgd.testing
    >>> rgd.testing.check_weighting(rgd.KLBall(radius=0.1), fronts=["numpy"])
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from rgd.testing._formula import FORMULA_CHECKS
from rgd.testing._fronts import FRONT_CHECKS
from rgd.testing._subject import Subject
from rgd.weightings import Weighting
from rgd.weightings._call import resolve_weighting

__all__ = ["check_weighting"]


def check_weighting(
    weighting: Weighting, *, groups: int | None = None, fronts: Sequence[str] | None = None
) -> None:
    """Check that a weighting keeps the contract of `rgd.Weighting`; return quietly if it does.

    Checked on batches of losses >= 0:

    - the weighting is a frozen dataclass, and a copy or an unpickled one compares and hashes equal;
    - one that remembers starts from one state, keeps its structure, and `step` does not write to it;
    - its weights are finite numbers >= 0, one for each loss, and equal for equal losses;
    - they follow the samples in whatever order these come; a masked sample is as good as left out; a sample
      of integer `sample_weight` k is as good as k samples;
    - with `mean_one` they average to one; with `pointwise` each is what it would be alone; from `clip` on
      they no longer change; `log_weights` are their logarithms;
    - a NaN loss, an infinite one, an empty batch and a batch of one raise nothing; a NaN loss leaves the
      other weights of a `pointwise` member alone (the objective is NaN in any case);
    - every front gives the same numbers: NumPy, through the kernel where there is one; torch eager, compiled
      with `fullgraph=True` and under `torch.func.vmap`; JAX under `jit`, with the weighting's numbers traced
      too, and under `vmap`; in float64, float32 and half precision. A weighting that remembers is followed
      over several batches: those of NaN, of infinity and of no sample leave its state as it was.

    Args:
        weighting: The weighting, its settings Python numbers.
        groups: For a weighting that needs the group of each sample: how many groups there are.
        fronts: Which of "numpy", "torch" and "jax" to compare; None for those that are installed.
            `torch.compile`'s caches are cleared before torch is checked.

    Raises:
        AssertionError: If the contract is broken; the message says how, for which weighting.
        TypeError: If `weighting` is no weighting.
        ValueError: If `fronts` names something else.

    Example:
        >>> import dataclasses, rgd, rgd.testing
        >>> @dataclasses.dataclass(frozen=True)
        ... class Twice(rgd.Weighting):
        ...     mean_one = True
        ...     def weights(self, batch):
        ...         return 2 + 0 * batch.losses
        >>> rgd.testing.check_weighting(Twice(), fronts=["numpy"])
        Traceback (most recent call last):
        ...
        AssertionError: Twice() is declared mean_one, but its weights average to 2 over an ordinary batch
    """
    if resolve_weighting(weighting) is not weighting:
        raise TypeError("weighting must be an rgd.Weighting, such as rgd.KL(tau=1.0), got None")
    chosen = (
        [name for name in FRONT_CHECKS if importlib.util.find_spec(name)] if fronts is None else list(fronts)
    )
    for name in chosen:
        if name not in FRONT_CHECKS:
            raise ValueError(f"fronts must hold names out of {', '.join(FRONT_CHECKS)}, got {name!r}")
    subject = Subject(weighting, groups)
    for check in FORMULA_CHECKS:
        check(subject)
    for name in chosen:
        FRONT_CHECKS[name](subject)
