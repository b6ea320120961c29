"""The Rust kernels.

Every tensor argument is a NumPy array or a CPU object that speaks DLPack; none is copied.
Outputs are allocated by the caller and filled in place. `threads` is the largest number of threads to use.
"""

from typing import Any

from rgd.weightings import Weighting

def sample_weights(losses: Any, weights: Any, weighting: Weighting, threads: int) -> None:
    """Fill `weights` (same shape as `losses`; float64 where losses are float64, else float32)."""

def weighted_sum(values: Any, weights: Any, threads: int) -> float:
    """The sum of `values * weights`, accumulated in float64."""

def weight_sums(
    losses: Any, weights: Any, tau: float, threads: int
) -> tuple[int, float, float, float, float, float, float, int]:
    """The sums the diagnostics are made of, in one pass over losses and weights of one shape.

    Samples of weight zero count like any other.

    Returns:
        count, sum(l), sum(w), sum(w * l), sum(w * w), sum(w * log(w)), max(w), and how many losses exceed
        `tau`.
    """

def cross_entropy(
    logits: Any,
    target: Any,
    class_weight: Any | None,
    weighting: Weighting,
    ignore_index: int,
    label_smoothing: float,
    per_sample: bool,
    reduction: str,
    losses: Any,
    weights: Any,
    objective: Any,
    grad: Any | None,
    threads: int,
) -> tuple[float, int]:
    """Re-weighted cross-entropy, and its gradient where `grad` is given.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk); float32, float64, float16 or bfloat16.
        target: Class indices, int64 or int32, of the logits' shape without the class axis; or class
            probabilities of the logits' shape and dtype.
        class_weight: (C,), contiguous, in the accumulator's dtype: float64 for float64 logits, else float32.
        weighting: Turns losses into weights.
        ignore_index: The target that counts for nothing.
        label_smoothing: In [0, 1].
        per_sample: Whether a weight is shared by all targets of a sample of the leading dimension.
        reduction: "none", "mean" or "sum".
        losses: Output, one loss a target; accumulator's dtype, contiguous. 0 for an ignored target.
        weights: Output: one a target or, with `per_sample`, one a sample; accumulator's dtype, contiguous. 0
            where all is ignored.
        objective: Output: a 0-d value, or for "none" one a target; accumulator's dtype, contiguous.
        grad: Output of the logits' shape and dtype, any strides: the gradient of the objective (for "none",
            of the sum of its elements).
        threads: The largest number of threads to use.

    Returns:
        The denominator of "mean", and the number of targets not ignored.

    Raises:
        IndexError: If a target is out of range; names the class and its position. Nothing was written.
        TypeError: If dtypes do not fit.
        ValueError: If shapes, devices or a setting do not fit.
    """

def xla_handler() -> object:
    """The XLA FFI handler of the fused cross-entropy for the CPU, for `jax.ffi.register_ffi_target`.

    Its operands are logits (..., C), labels (...), int32, -1 for one that counts for nothing, and settings
    (..., 4): tau, scale, norm and label smoothing of each row. Its results are losses (...) and weights
    (...), in the settings' dtype (float64 for float64 logits, else float32), and the gradient of
    `norm * w * l`, of the logits' shape and dtype. A label out of range makes its row of every result NaN.
    """
