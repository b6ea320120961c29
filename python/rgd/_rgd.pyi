"""The Rust kernels.

Every tensor argument is a NumPy array, a CPU object that supports DLPack, or a `Borrowed`; none is copied.
Outputs are allocated by the caller, may be uninitialised, and are filled in place; they must not share memory
with another argument, except that a gradient may overwrite the logits. The accumulator's dtype is
float64 for float64 tensors, else float32. `threads` is the largest number of threads to use; a result does
not depend on it.

A weighting is given as the name of its kernel and its numbers:

- `"kl"`: tau, scale, and 1.0 for weights that are divided by their mean, else 0.0.
  `exp(scale * min(l, tau))`; the scale may be negative and tau infinite. Pointwise if not divided.
- `"kl_ball"`: radius. The worst distribution within a Kullback-Leibler ball.

An unknown name, or a wrong number of numbers, is a ValueError that lists the known names.
"""

from collections.abc import Sequence
from typing import Any, SupportsFloat

class Borrowed:
    """A DLPack tensor that was imported once, for any number of kernels to read.

    A capsule can be imported only once. The description of the tensor is checked: the tensor is in the CPU's
    memory, its numbers do not contradict each other, and every element has an address. Its deleter is called
    when this object is destroyed.

    Args:
        name: The argument's name, for the messages.
        given: An object that supports DLPack, or a capsule, which is consumed.

    Raises:
        BufferError: If the tensor's description contradicts itself.
        TypeError: If `given` is no such object, has a later major version, or its producer refuses.
        ValueError: If it is on another device, has no data, is not aligned, or is a capsule already
            consumed.
    """

    def __init__(self, name: str, given: Any) -> None: ...
    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""
    @property
    def dtype(self) -> str:
        """The name of the dtype, which need not be one that the kernels serve."""

class RepeatedCrossEntropy:
    """`cross_entropy` for calls whose tensors differ only in their addresses.

    Args:
        dtype: Of the logits: "float64", "float32", "float16" or "bfloat16".
        shape: Of the logits, (N, C) or (N, C, d1, ..., dk), none of them 0.
        narrow: Whether targets are int32, and not int64.
        kind: As for `cross_entropy`, and so are the others.
        numbers: Likewise.
        ignore_index: Likewise.
        label_smoothing: Likewise.
        per_sample: Likewise.
        reduction: Likewise.
        z_loss: Likewise.

    Raises:
        TypeError: If the dtype is another one.
        ValueError: If a setting does not fit.
    """

    def __init__(
        self,
        dtype: str,
        shape: Sequence[int],
        narrow: bool,
        kind: str,
        numbers: Sequence[float],
        ignore_index: int,
        label_smoothing: float,
        per_sample: bool,
        reduction: str,
        z_loss: float,
    ) -> None: ...
    def __call__(
        self,
        logits: int,
        target: int,
        losses: int,
        weights: int,
        objective: int,
        grad: int,
        threads: int,
        class_weight: Any | None,
        logit_adjustment: Any | None,
        measure: int | None = None,
        groups: int | None = None,
        state: Sequence[tuple[int, bool]] = (),
    ) -> tuple[float, int, int] | None:
        """Fill `losses`, `weights`, `objective` and `grad`; raises as `cross_entropy`.

        The first six are addresses of tensors. The caller guarantees that these are in the CPU's memory,
        contiguous, of the dtypes and shapes of this call, and that no output shares memory with another
        tensor. The objective is in the losses' dtype with `reduction="none"`, else in that of the logits. The
        same is true of the measure, in the losses' dtype, of the groups, int64, and of the leaves of the
        state, which are updated: each has an address, and says whether it is int64 and not float64.

        Returns what `cross_entropy` returns, and the number of targets whose measure is not 0. Returns None
        and fills nothing if a number of the measure is negative, not finite or above 1e18, or if the largest
        is below 1e-18 and not 0.
        """

class RepeatedWeights:
    """`sample_weights` without measure, groups and state, for calls that differ only in their addresses.

    Args:
        dtype: Of the losses: "float64", "float32", "float16" or "bfloat16".
        kind: Name of the weighting's kernel.
        numbers: The weighting's numbers.

    Raises:
        TypeError: If the dtype is another one.
        ValueError: If the kernel or its number of numbers is not known.
    """

    def __init__(self, dtype: str, kind: str, numbers: Sequence[float]) -> None: ...
    def __call__(self, losses: int, weights: int, count: int, threads: int) -> None:
        """Fill `weights`.

        The addresses are those of contiguous tensors in the CPU's memory that do not overlap, with `count`
        numbers each; the weights are float64 for float64 losses, else float32.
        """
    def objective(
        self,
        losses: int,
        weights: int,
        objective: int,
        factors: int,
        count: int,
        threads: int,
        reduction: str,
    ) -> None:
        """Fill `weights`, the objective of float32 or float64 losses, and what multiplies each loss in it.

        The addresses are as for a call, all of tensors in the losses' dtype. The objective is one number,
        `sum w l`, over `count` for "mean", or for "none" `w l` for each loss. The factors are `w`, over
        `count` for "mean".

        Raises:
            TypeError: If the losses are of another dtype.
            ValueError: If there are none.
        """

def sample_weights(
    losses: Any,
    weights: Any,
    kind: str,
    numbers: Sequence[float],
    threads: int,
    measure: Any | None = None,
    groups: Any | None = None,
    state: Sequence[Any] | None = None,
) -> None:
    """Fill `weights` from `losses`, and update `state`.

    A kernel over another one has it in its name, as `moving_average(kl)`. Its own numbers come first, and
    then those of the inner kernel.

    Args:
        losses: Of any shape, strides and float dtype.
        weights: Output of the same shape, contiguous, in the accumulator's dtype.
        kind: Name of the weighting's kernel.
        numbers: The weighting's numbers.
        threads: The largest number of threads to use.
        measure: Base measure of the losses' shape, any float dtype and strides, finite numbers >= 0; None for
            ones. Where it is 0, a loss takes no part, and its weight is 0.
        groups: The group of each loss, int64 or int32, of the losses' shape; for a kernel that asks for them.
        state: The leaves of the weighting's state in the order of `init()`, float64 and contiguous, of one
            entry if a leaf is a number; for a kernel that remembers. They do not change if no loss takes
            part, or if a loss that takes part is not finite.

    Raises:
        ValueError: If a shape does not fit, the kernel or its number of numbers is not known, the measure
            holds a number that is negative or not finite, groups or a state are missing, or a group is out of
            range. Nothing was written.
    """

def widen(values: Any, out: Any, threads: int) -> None:
    """Fill `out`, contiguous and float64, from values of the same shape, any strides and any float dtype."""

def weighted_sum(values: Any, weights: Any, measure: Any | None, threads: int) -> float:
    """The sum of `measure * weights * values`, accumulated in float64.

    A product with a weight of zero is zero, unless the value is NaN. Where `measure` is zero the sample takes
    no part: it adds zero for any value and weight.

    Args:
        values: Of any shape, strides and float dtype, as are the others.
        weights: Of the values' shape.
        measure: Base measure of the values' shape; None: all ones.
        threads: The largest number of threads to use.
    """

def weight_sums(losses: Any, weights: Any, measure: Any | None, clip: float, threads: int) -> dict[str, Any]:
    """The sums that the statistics are made of, in one pass over losses `l`, weights `w` and measure `p`.

    Samples of weight zero count like any other; those with `p = 0` take no part.

    Args:
        losses: Of any shape, strides and float dtype, as are the others.
        weights: Of the losses' shape.
        measure: Base measure `p` of the losses' shape; None: all ones.
        clip: The loss above which a sample counts as clipped.
        threads: The largest number of threads to use.

    Returns:
        The sums by the names of the fields of `rgd.stats.WeightSums`. A product `w l` is 0 where `w = 0`,
        unless `l` is NaN, and the largest weight of an empty batch is 0.
    """

def cross_entropy(
    logits: Any,
    target: Any,
    class_weight: Any | None,
    measure: Any | None,
    kind: str,
    numbers: Sequence[float],
    ignore_index: int,
    label_smoothing: float,
    per_sample: bool,
    reduction: str,
    losses: Any,
    weights: Any,
    objective: Any,
    grad: Any | None,
    threads: int,
    logit_adjustment: Any | None = None,
    z_loss: float = 0.0,
    normalizer: SupportsFloat | None = None,
) -> tuple[float, int]:
    """Re-weighted cross-entropy, and its gradient if `grad` is given.

    A weight of zero gives a product and a gradient of zero, also for an infinite loss; a NaN loss stays NaN.

    With a z-loss `z`, `p * w * l` in the objective becomes `p * w * l + p * z * Z^2`, with `Z` the logsumexp
    of the target's adjusted logits. Neither the weight nor the class weight multiplies this term, "mean"
    divides it like the rest, and a target that takes no part adds nothing. It does not change losses and
    weights.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk); float32, float64, float16 or bfloat16.
        target: Class indices, int64 or int32, of the logits' shape without the class axis; or class
            probabilities of the logits' shape and dtype.
        class_weight: (C,), contiguous, in the accumulator's dtype.
        measure: Base measure `p`, contiguous, in the accumulator's dtype: one a target or, with
            `per_sample`, one a sample. A target with `p = 0` takes no part, as if it were ignored, and its
            index is not read.
        kind: Name of the weighting's kernel.
        numbers: The weighting's numbers.
        ignore_index: The index of a target that takes no part.
        label_smoothing: In [0, 1].
        per_sample: Whether a weight is shared by all targets of a sample of the leading axis.
        reduction: "none", "mean" or "sum".
        losses: Output, one loss a target; accumulator's dtype, contiguous. 0 for a target that takes no part.
        weights: Output: one a target or, with `per_sample`, one a sample; accumulator's dtype, contiguous.
            The weight `w`, not `p * w`; 0 where nothing takes part.
        objective: Output: a 0-d value, or for "none" one `p * w * l` a target; accumulator's dtype,
            contiguous.
        grad: Output of the logits' shape and dtype, any strides: the gradient of the objective (for "none",
            of the sum of its elements). It may be the logits themselves, the same elements at the same
            addresses: then the gradient overwrites them, to the same bits. A call that is interrupted or runs
            out of memory leaves some of them overwritten.
        threads: The largest number of threads to use.
        logit_adjustment: (C,), contiguous, in the accumulator's dtype: added to the logits of each class as
            they are read. The gradient is that with respect to the logits; this is a constant.
        z_loss: The factor `z`, a finite number >= 0.
        normalizer: A positive number that "mean" divides by; None for the denominator of this call.

    Returns:
        The denominator of "mean" (the sum of `p` times the target's class weight; for class probabilities,
        of `p`), and the number of targets that take part.

    Raises:
        IndexError: If a target is out of range; names the class and its position. Nothing was written.
        TypeError: If dtypes do not fit.
        ValueError: If shapes, devices or a setting do not fit, or if the weighting is not known or remembers
            earlier batches.
    """

def cross_entropy_losses(
    logits: Any,
    target: Any,
    class_weight: Any | None,
    ignore_index: int,
    label_smoothing: float,
    losses: Any,
    threads: int,
    logit_adjustment: Any | None = None,
    logsumexp: Any | None = None,
) -> int:
    """Fill `losses`, one a target and 0 for an ignored one; arguments and errors as for `cross_entropy`.

    Args:
        logits: As for `cross_entropy`, like all that is not named here.
        target: As there.
        class_weight: As there.
        ignore_index: As there.
        label_smoothing: As there.
        losses: Output, as there.
        threads: As there.
        logit_adjustment: As there.
        logsumexp: Output like `losses`, if it is wanted: the logsumexp `Z` of each target's adjusted logits,
            for a z-loss; 0 for an ignored target.

    Returns:
        The number of targets that are not ignored.
    """

def cross_entropy_extras(
    logits: Any,
    target: Any,
    ignore_index: int,
    threads: int,
    logit_adjustment: Any | None = None,
    entropy: Any | None = None,
    logsumexp: Any | None = None,
    correct: Any | None = None,
) -> None:
    """What the logits of each target say beside its loss; arguments and errors as for `cross_entropy`.

    Args:
        logits: As for `cross_entropy`, like all that is not named here.
        target: As there.
        ignore_index: As there.
        threads: As there.
        logit_adjustment: As there.
        entropy: Output like losses, if it is wanted: `-sum_k q_k log q_k` of `q = softmax(logits)`.
        logsumexp: Likewise: the logsumexp of the logits.
        correct: Likewise: 1 where the class of the target is the first of those with the largest logit (for
            class probabilities: the first of the most probable), else 0.
    """

def cross_entropy_gradient(
    logits: Any,
    target: Any,
    class_weight: Any | None,
    measure: Any | None,
    ignore_index: int,
    label_smoothing: float,
    per_sample: bool,
    reduction: str,
    losses: Any,
    weights: Any,
    objective: Any,
    grad: Any | None,
    threads: int,
    logit_adjustment: Any | None = None,
    z_loss: float = 0.0,
    logsumexp: Any | None = None,
    normalizer: SupportsFloat | None = None,
) -> tuple[float, int]:
    """The objective of given losses and weights, and its gradient if `grad` is given.

    With the losses of `cross_entropy_losses` and their pointwise weights, this is the second half of
    `cross_entropy`, to the last bit. The weights may be any numbers, and are constants of the gradient.

    Args:
        logits: As for `cross_entropy`, like all that is not named here.
        target: As there.
        class_weight: As there.
        measure: As there, for any weights.
        ignore_index: As there.
        label_smoothing: As there.
        per_sample: As there.
        reduction: As there.
        losses: Input: one loss a target, accumulator's dtype, contiguous, 0 for an ignored target.
        weights: Input: one weight a target or, with `per_sample`, one a sample; accumulator's dtype,
            contiguous. It must be finite also where no target takes part.
        objective: Output, as there.
        grad: Output, as there.
        threads: As there.
        logit_adjustment: As there.
        z_loss: As there.
        logsumexp: Input, needed if `z_loss` is not 0: the output of `cross_entropy_losses`.
        normalizer: As there.

    Returns:
        As `cross_entropy`.

    Raises:
        ValueError: Also for a z-loss without `logsumexp`.
    """

def cross_entropy_rows(
    logits: Any,
    target: Any,
    class_weight: Any | None,
    norms: Any,
    kind: str,
    numbers: Sequence[float],
    ignore_index: int,
    label_smoothing: float,
    losses: Any,
    weights: Any,
    grad: Any | None,
    threads: int,
    logit_adjustment: Any | None = None,
    z_loss: float = 0.0,
    logsumexp: Any | None = None,
) -> int:
    """Losses, pointwise weights, and the gradient of `sum_i norm_i * (w_i * l_i + z * Z_i^2)`.

    It is for callers that compute the logits of some rows at a time. The norm of a row is the factor of its
    part of the objective: its base measure over the divisor of all rows.

    Args:
        logits: As for `cross_entropy`, like all that is not named here.
        target: As there.
        class_weight: As there.
        norms: One a target, contiguous, in the accumulator's dtype. Where it is 0 the gradient is 0, for any
            weight; loss and weight are computed as for other targets.
        kind: As there, of a pointwise weighting.
        numbers: As there.
        ignore_index: As there.
        label_smoothing: As there.
        losses: Output, as there.
        weights: Output, as there, one a target.
        grad: Output, as there, if it is wanted.
        threads: As there.
        logit_adjustment: As there.
        z_loss: As there.
        logsumexp: Output, as for `cross_entropy_losses`.

    Returns:
        The number of targets that are not ignored.

    Raises:
        ValueError: Also if the weighting is not pointwise.
    """

def cross_entropy_rows_gradient(
    logits: Any,
    target: Any,
    class_weight: Any | None,
    norms: Any,
    weights: Any | None,
    ignore_index: int,
    label_smoothing: float,
    grad: Any,
    threads: int,
    logit_adjustment: Any | None = None,
    z_loss: float = 0.0,
) -> int:
    """The gradient of `sum_i norm_i * (w_i * l_i + z * Z_i^2)` with given weights.

    With the weights of `cross_entropy_rows` this is its gradient, to the last bit.

    Args:
        logits: As for `cross_entropy`, like all that is not named here.
        target: As there.
        class_weight: As there.
        norms: As for `cross_entropy_rows`.
        weights: One a target, contiguous, in the accumulator's dtype; None for ones.
        ignore_index: As there.
        label_smoothing: As there.
        grad: Output, as there.
        threads: As there.
        logit_adjustment: As there.
        z_loss: As there.

    Returns:
        The number of targets that are not ignored.
    """

def boosting_losses(loss: str, margins: Any, labels: Any, losses: Any, threads: int) -> int | None:
    """Fill `losses` for boosted trees; arguments as for `boosting_derivatives`.

    Returns:
        The first sample whose label is not allowed, if there is one; the output is then undefined.
    """

def boosting_derivatives(
    loss: str,
    margins: Any,
    labels: Any,
    measure: Any | None,
    weights: Any | None,
    kind: str | None,
    numbers: Sequence[float],
    curvature: float | None,
    gradient: Any,
    hessian: Any,
    threads: int,
) -> tuple[tuple[str, int] | None, float]:
    """Fill gradient and Hessian (the diagonal) of `measure * weight * loss` for trees, weights constant.

    Args:
        loss: "logistic", "softmax" or "squared_error".
        margins: (n, k), float32 or float64, any strides; k is 1 unless for "softmax".
        labels: (n,), any float dtype and strides: in [0, 1], or classes, or any finite numbers.
        measure: Base measure, (n,), finite numbers >= 0; None: all ones.
        weights: (n,), instead of a weighting.
        kind: Name of the kernel of a pointwise weighting, instead of weights.
        numbers: The weighting's numbers.
        curvature: A factor of the Hessian; None for the gradient's absolute value instead of the Hessian.
        gradient: Output, float64, of the margins' shape, any strides.
        hessian: Output, as the gradient.
        threads: The largest number of threads to use.

    Returns:
        The fault, "label", "measure" or "overflow" (a derivative that does not fit into float32, or a
        negative weight), and the first sample that has it; None if there is no fault. Then the largest
        weight of the samples whose measure is not 0. If there is a fault, the output is undefined.
    """

def label_out_of_range(label: int, position: Sequence[int], classes: int) -> str:
    """The message of the kernels for a label that is no class.

    Args:
        label: The label.
        position: Its position in the target.
        classes: The number of classes.

    Returns:
        The message of an IndexError.
    """

def isa() -> str:
    """The instruction set of the kernels: the widest of this processor, or the one that `RGD_ISA` names.

    Returns:
        "avx512", "avx2", "neon" or "baseline".
    """

def available_isas() -> list[str]:
    """The instruction sets of this processor, the widest first. `RGD_ISA` may name any of them.

    Another name is a ValueError when `rgd` is imported.
    """

def share_threads(gomp_parallel: int) -> None:
    """Let the kernels of the torch front run on the threads of an OpenMP library.

    Only the first call has an effect.

    Args:
        gomp_parallel: The address of the library's `GOMP_parallel`. The library must stay loaded.

    Raises:
        ValueError: If the address is 0.
    """

def shares_threads() -> bool:
    """Whether they do in this process. A child of `fork` has threads of its own."""

def xla_handler() -> object:
    """The XLA FFI handler of the fused cross-entropy for the CPU, for `jax.ffi.register_ffi_target`.

    Its operands are logits (..., C), labels (...), int32, -1 for one that takes no part, settings
    (..., 3 + K): norm (the factor of the row's part of the objective, with its sample weight), label
    smoothing, z-loss and the K numbers of the weighting of each row, and a logit adjustment, (C,), or (0,)
    for none, after any number of the rows' leading axes. Its string attribute `kind` names the weighting's
    kernel, which must be pointwise; an unknown name is an XLA error that lists the known names. Its results
    are losses (...) and weights (...), in the settings' dtype (float64 for float64 logits, else float32), the
    gradient of `norm * (w * l + z * Z^2)`, of the logits' shape and dtype, and `Z`, the logsumexp of each
    row's adjusted logits, (...), or (0,) if it is not wanted. A label out of range makes its row of every
    result NaN.
    """
