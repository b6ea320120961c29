"""A function that checks the contract of a weighting, for the members of `rgd` and for weightings of users.

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
    """Check that a weighting keeps the contract of `rgd.Weighting`; raise if it does not.

    It is checked on batches of losses >= 0:

    - the weighting is a frozen dataclass, and a copy or an unpickled one compares and hashes equal;
    - a weighting that remembers always starts from the same state and keeps its structure, and `step` does
      not write to the state it is given;
    - the weights are finite numbers >= 0, one for each loss, and equal for equal losses;
    - the weights are permuted with the samples; a masked sample has the same effect as no sample; a sample of
      integer `sample_weight` k has the same effect as k samples;
    - with `mean_one` the weights average to one; with `pointwise` each weight is the same in a batch of one;
      above `clip` they no longer change; `log_weights` are their logarithms;
    - a NaN loss, an infinite one, an empty batch and a batch of one raise nothing; a NaN loss does not change
      the other weights of a `pointwise` member (the objective is NaN in any case);
    - every front gives the same numbers: NumPy, through the kernel if there is one; torch eager, compiled
      with `fullgraph=True` and under `torch.func.vmap`; JAX under `jit`, with the weighting's numbers traced
      too, and under `vmap`; in float64, float32 and half precision. A weighting that remembers is tested on
      several batches in turn; batches with NaN, with infinity or without samples do not change its state;
    - one that reads the entropy of the logits is tested in the cross-entropies of torch, eager and compiled,
      and of JAX under `jit`, in float64.

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
