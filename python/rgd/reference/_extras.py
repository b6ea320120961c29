"""The entropy, the logsumexp and the largest of the logits of each target, as written."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rgd.reference._arrays import array_of
from rgd.reference._cross_entropy import problem_of


def cross_entropy_extras(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    ignore_index: int = -100,
    logit_adjustment: npt.ArrayLike | None = None,
    where: npt.ArrayLike | None = None,
) -> dict[str, Any]:
    """What the logits of each target say beside its loss.

    With `q = softmax(logits)`, of the logits as adjusted,

        entropy = -sum_k q_k * log q_k
        logsumexp = log(sum_k exp(logits_k))
        correct = argmax(logits) == argmax(target)

    where the argmax of class indices is the class itself, and the first of equal numbers counts.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk), any real dtype; computed with in float64.
        target: Class indices or class probabilities, as in `cross_entropy_losses`.
        ignore_index: The class index that counts for nothing.
        logit_adjustment: Numbers (C,) that are added to the logits; None for zeros.
        where: Booleans that broadcast to the losses' shape.

    Returns:
        "entropy" and "logsumexp", float64, and "correct", bool, of the losses' shape; 0 where a target takes
        no part.

    Raises:
        ValueError, TypeError, IndexError: As `cross_entropy_losses`.

    Example:
        >>> import numpy as np
        >>> extras = cross_entropy_extras(np.zeros((1, 4)), np.array([0]))
        >>> extras["entropy"].round(4), extras["correct"]
        (array([1.3863]), array([ True]))
    """
    problem = problem_of(
        logits,
        target,
        None,
        ignore_index=ignore_index,
        label_smoothing=0.0,
        logit_adjustment=logit_adjustment,
        where=where,
    )
    target = array_of("target", target)
    if target.shape == problem.softmax.shape:
        target = np.argmax(target, axis=problem.class_axis)
    adjustment = 0.0 if logit_adjustment is None else array_of("logit_adjustment", logit_adjustment)
    rows = np.moveaxis(array_of("logits", logits, np.float64), problem.class_axis, -1) + adjustment
    first = (np.argmax(rows, axis=-1) == target) & ~np.any(np.isnan(rows), axis=-1)
    return {
        "entropy": problem.entropy,
        "logsumexp": np.where(problem.counted, problem.normalizers, 0.0),
        "correct": first & problem.counted,
    }
