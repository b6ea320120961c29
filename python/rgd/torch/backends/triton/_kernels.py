# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton's language has no types that a type checker understands.
"""The cross-entropy as Triton programs. Each program computes a few rows of logits; they share no memory.

With the mass `m_k` of a target over the classes, `M = sum_k m_k`, and `Z` the logsumexp of the adjusted
logits `x`, the loss of a row is `sum_k m_k (Z - x_k)`. The gradient of `f l + z Z^2` with respect to `x_k` is
`f (M softmax(x)_k - m_k) + 2 z Z softmax(x)_k`.

A row that fits the registers of its program is read once (`ONCE`). A longer row is read in blocks: once for
its sums, with a running maximum, and again for its gradient. The element of a row and class `k` is at
`(row // inner) outer + (row % inner) inner_stride + k class_stride`, in 64 bits. Arguments that a call does
not need are None, and their code is left out. Logits are converted to float32 right after they are read.
"""

import triton
import triton.language as tl


@triton.jit
def _logits_tile(logits, at_row, class_stride, k, inside, adjustment, classes):
    """Adjusted logits in float32; -inf outside of the row."""
    at = at_row[:, None] + (k.to(tl.int64) * class_stride)[None, :]
    x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
    if adjustment is not None:
        x += tl.load(adjustment + k.to(tl.int64), mask=k < classes, other=0.0)[None, :]
    return x


@triton.jit
def _probabilities(target, at_row, class_stride, k, inside):
    """The probabilities of a tile in float32; 0 outside of the row."""
    at = at_row[:, None] + (k.to(tl.int64) * class_stride)[None, :]
    return tl.load(target + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _soft_mass(probabilities, k, inside, class_weight, classes, keep, share):
    """The mass of probabilities and smoothing on the classes, without that of labels; 0 outside a row."""
    mass = tl.where(inside, share, 0.0)
    if probabilities is not None:
        mass += keep * probabilities
    if class_weight is not None:
        mass *= tl.load(class_weight + k.to(tl.int64), mask=k < classes, other=0.0)[None, :]
    return mass


@triton.jit
def _finite(top):
    """The maximum of a row, or 0 if it is -inf, so that a difference with it is not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _pull(mass, x, pivot):
    """The sums of `m_k (x_k - pivot)`; a class without mass adds 0 where its logit is -inf."""
    distance = tl.where((mass == 0.0) & (x == float("-inf")), 0.0, x - pivot[:, None])
    return tl.sum(mass * distance, 1)


@triton.jit
def _entropy_pull(x, top):
    """The sums of `e (x - top)` with `e = exp(x - top)`; a class whose probability is 0 adds 0."""
    distance = x - _finite(top)[:, None]
    e = tl.exp(distance)
    return tl.sum(tl.where(e == 0.0, 0.0, e * distance), 1)


@triton.jit
def _first_class(values, k, first, largest):
    """The first class with the largest value in this block and those before; -1 if a value is NaN.

    Args:
        values: Those of this block; -inf outside of the row.
        k: The classes of the block.
        first: The result of the blocks before, or 0.
        largest: Their largest value, or -inf.
    """
    here = tl.max(values, 1)
    place = tl.where(values == here[:, None], k[None, :], 2147483647)
    place = tl.min(tl.where(values != values, -1, place), 1)
    place = tl.where((place < 0) | (here > largest), place, first)
    return tl.where(first < 0, first, place)


@triton.jit
def _ordered(probabilities, inside):
    """Probabilities as `torch.argmax` orders them: NaN is the largest; -inf outside of the row."""
    largest = tl.where(probabilities == probabilities, probabilities, float("inf"))
    return tl.where(inside, largest, float("-inf"))


@triton.jit
def _weight(loss, numbers, KIND):
    """The pointwise weight of a loss, computed in float64 and rounded once; NaN stays NaN."""
    loss = loss.to(tl.float64)
    plain = tl.where(loss == loss, 1.0, loss)
    if KIND == "focal":
        gamma = tl.load(numbers)
        loss = tl.where(loss < 0.0, 0.0, loss)
        # Compute 1 - exp(-l) by its series where the difference would cancel.
        series = loss * (1 - loss / 2 * (1 - loss / 3 * (1 - loss / 4 * (1 - loss / 5))))
        unlikely = tl.where(loss < 1e-3, series, 1 - tl.exp(-loss))
        weight = tl.where(gamma == 0.0, plain, tl.exp(gamma * tl.log(unlikely)))
    elif KIND == "threshold":
        weight = tl.where(loss > tl.load(numbers), 0.0, plain)
    else:  # "kl", the only other kernel in `_passes.KINDS`
        tau, scale = tl.load(numbers), tl.load(numbers + 1)
        clipped = tl.where(loss > tau, tau, loss)
        weight = tl.where(scale == 0.0, plain, tl.exp(scale * clipped))
    return weight.to(tl.float32)


@triton.jit
def _gradient_tile(x, top, total, mass, soft_mass, label_mass, label, k, factor, z_factor):
    """The gradient of a tile; 0 in rows whose factors are 0, even if they hold NaN.

    Args:
        x: The adjusted logits.
        top: The maximum of each row.
        total: The sum of its `exp(x - top)`.
        mass: The sum of its mass.
        soft_mass: The mass on the classes of the tile, or None.
        label_mass: The mass on the label of each row, or None.
        label: The label.
        k: The classes of the tile.
        factor: `f` of each row.
        z_factor: `2 z Z` of each row, or None.
    """
    softmax = tl.exp(x - _finite(top)[:, None]) * (1.0 / total)[:, None]
    distance = mass[:, None] * softmax
    if soft_mass is not None:
        distance -= soft_mass
    if label_mass is not None:
        distance -= tl.where(k[None, :] == label[:, None], label_mass[:, None], 0.0)
    gradient = tl.where((factor == 0.0)[:, None], 0.0, factor[:, None] * distance)
    if z_factor is not None:
        gradient += tl.where((z_factor == 0.0)[:, None], 0.0, z_factor[:, None] * softmax)
    return gradient


@triton.jit
def _store_tile(gradient, at_row, class_stride, k, inside, tile):
    at = at_row[:, None] + (k.to(tl.int64) * class_stride)[None, :]
    tl.store(gradient + at, tile.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _label_of(target, row, exists, ignore_index, classes):
    """The label of each row, whether it is not ignored, and whether it is a class."""
    label = tl.load(target + row, mask=exists, other=0).to(tl.int64)
    counts = exists & (label != ignore_index)
    is_class = counts & (label >= 0) & (label < classes)
    return tl.where(is_class, label, -1), counts, is_class


@triton.jit
def _label_mass(class_weight, label, is_class, keep):
    """The mass on the label of each row; NaN if the label is no class."""
    mass = tl.where(is_class, keep, float("nan"))
    if class_weight is not None:
        mass *= tl.load(class_weight + label, mask=is_class, other=0.0)
    return mass


@triton.jit
def cross_entropy_rows(
    logits, target, class_weight, adjustment, measure, divisor, numbers, factors, z_factors,
    losses, logsumexp, sums, weights, values, extras, gradient,
    rows, classes, inner, ignore_index, keep, share, z_loss,
    logits_outer, logits_inner, logits_class, target_outer, target_inner, target_class,
    gradient_outer, gradient_inner, gradient_class,
    KIND: tl.constexpr, LABELS: tl.constexpr, SOFT: tl.constexpr, Z_LOSS: tl.constexpr,
    ONCE: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The losses of rows and, if wanted, their weights and the gradient, which may overwrite the logits.

    Args:
        logits: Read; overwritten if `gradient` is the same memory.
        target: Labels, one a row, or probabilities.
        class_weight: float32, one a class; as `adjustment`.
        adjustment: The numbers added to the logits.
        measure: float32, one a row, 0 where it takes no part; the factor of its part of the objective.
        divisor: The divisor of the gradient's factors, one number.
        numbers: The numbers of the weighting's kernel, float64.
        factors: With KIND "given", `f` of each row.
        z_factors: With KIND "given", `z` of each row.
        losses: float32, one a row, as the next ones.
        logsumexp: `Z`.
        sums: The maxima of the rows, then their sums of `exp(x - maximum)`, then their masses.
        weights: The weights.
        values: The term of each row in the sum of the objective, `p (w l + z_loss Z^2)`.
        extras: The entropies of the rows, then their `Z`, then 1 where the class of the target is the first
            of those with the largest logit, and 0 elsewhere.
        gradient: With KIND "given" that of `sum_i f_i l_i + z_i Z_i^2`, else that of the objective.
        rows: How many rows; `classes` and `inner` likewise.
        classes: How many classes.
        inner: How many rows lie within one outer stride.
        ignore_index: The label of rows that take no part, which are not read.
        keep: `1 - label_smoothing`.
        share: `label_smoothing / classes`.
        z_loss: The factor of the squared logsumexp.
        logits_outer: The strides of the logits; those of probabilities and gradient follow.
        logits_inner: As above.
        logits_class: As above.
        target_outer: As above.
        target_inner: As above.
        target_class: As above.
        gradient_outer: As above.
        gradient_inner: As above.
        gradient_class: As above.
        KIND: "kl" or "focal": the kernel of the weighting; "none": losses only; "given": factors are given.
        LABELS: Whether targets are labels.
        SOFT: Whether other classes than the label have mass, by probabilities or smoothing.
        Z_LOSS: Whether there is a z-loss.
        ONCE: Whether a block holds all classes.
        ALIGN: A divisor of the classes and the outer strides; 1 if Triton finds the divisor by itself.
        ROWS: How many rows a program has.
        BLOCK: How many classes a block has.
    """
    if ALIGN > 1:  # The same numbers, as multiples that the compiler can see.
        classes = classes // ALIGN * ALIGN
        gradient_outer = gradient_outer // ALIGN * ALIGN
        logits_outer = logits_outer // ALIGN * ALIGN
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    at_row = (row // inner) * logits_outer + (row % inner) * logits_inner
    at_gradient = (row // inner) * gradient_outer + (row % inner) * gradient_inner
    at_target = (row // inner) * target_outer + (row % inner) * target_inner
    if LABELS:
        label, counts, is_class = _label_of(target, row, exists, ignore_index, classes)
        at_label = at_row + tl.where(is_class, label, 0) * logits_class
        pivot = tl.load(logits + at_label, mask=is_class, other=float("nan")).to(tl.float32)
        if adjustment is not None:
            pivot += tl.load(adjustment + label, mask=is_class, other=0.0)
        label_mass = _label_mass(class_weight, label, is_class, keep)
    else:
        label, counts, label_mass = None, exists, None
        pivot = tl.load(logits + at_row, mask=exists, other=0.0).to(tl.float32)
        if adjustment is not None:
            pivot += tl.load(adjustment)
    label_logit = pivot
    # Sums of differences with this number, which is near the logits of the row, lose no digits.
    pivot = tl.where((pivot - pivot) == 0.0, pivot, 0.0)

    mass = tl.zeros((ROWS,), tl.float32)
    pull = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    if extras is not None:
        entropy_pull = tl.zeros((ROWS,), tl.float32)
        first = tl.zeros((ROWS,), tl.int32)
        likeliest = tl.zeros((ROWS,), tl.int32)
        likelihood = tl.full((ROWS,), float("-inf"), tl.float32)
    if ONCE:
        k = tl.arange(0, BLOCK)
        inside = counts[:, None] & (k < classes)[None, :]
        x = _logits_tile(logits, at_row, logits_class, k, inside, adjustment, classes)
        before = top
        top = tl.max(x, 1)
        total = tl.sum(tl.exp(x - _finite(top)[:, None]), 1)
        if extras is not None:
            entropy_pull = _entropy_pull(x, top)
            first = _first_class(x, k, first, before)
        soft_mass = None
        if SOFT:
            probabilities = None
            if not LABELS:
                probabilities = _probabilities(target, at_target, target_class, k, inside)
                if extras is not None:
                    likeliest = _first_class(_ordered(probabilities, inside), k, likeliest, likelihood)
            soft_mass = _soft_mass(probabilities, k, inside, class_weight, classes, keep, share)
            mass += tl.sum(soft_mass, 1)
            pull += _pull(soft_mass, x, pivot)
    else:
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, classes, BLOCK):
            k = start + tl.arange(0, BLOCK)
            inside = counts[:, None] & (k < classes)[None, :]
            x = _logits_tile(logits, at_row, logits_class, k, inside, adjustment, classes)
            higher = tl.maximum(top, tl.max(x, 1))
            if extras is not None:
                first = _first_class(x, k, first, top)
                moved = tl.where(top == float("-inf"), 0.0, top - _finite(higher))
                entropy_pull = tl.exp(moved) * (entropy_pull + moved * total) + _entropy_pull(x, higher)
            total *= tl.exp(top - _finite(higher))
            total += tl.sum(tl.exp(x - _finite(higher)[:, None]), 1)
            top = higher
            if SOFT:
                probabilities = None
                if not LABELS:
                    probabilities = _probabilities(target, at_target, target_class, k, inside)
                    if extras is not None:
                        ordered = _ordered(probabilities, inside)
                        likeliest = _first_class(ordered, k, likeliest, likelihood)
                        likelihood = tl.maximum(likelihood, tl.max(ordered, 1))
                soft_mass = _soft_mass(probabilities, k, inside, class_weight, classes, keep, share)
                mass += tl.sum(soft_mass, 1)
                pull += _pull(soft_mass, x, pivot)

    log_total = tl.log(total)
    loss = mass
    if SOFT:
        loss = mass * (top - pivot + log_total) - pull
    if LABELS:
        distance = top - label_logit + log_total
        distance = tl.where((label_mass == 0.0) & (distance == float("inf")), 0.0, distance)
        loss += label_mass * distance
        mass += label_mass
    loss = tl.where(counts, loss, 0.0)
    z = tl.where(counts, top + log_total, 0.0)
    if losses is not None:
        tl.store(losses + row, loss, mask=exists)
    if logsumexp is not None:
        tl.store(logsumexp + row, z, mask=exists)
    if sums is not None:
        tl.store(sums + row, tl.where(counts, top, 0.0), mask=exists)
        tl.store(sums + (row + rows), tl.where(counts, total, 1.0), mask=exists)
        tl.store(sums + (row + rows + rows), tl.where(counts, mass, 0.0), mask=exists)

    if extras is not None:
        entropy = log_total - entropy_pull / total
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
        tl.store(extras + row, tl.where(counts, entropy, 0.0), mask=exists)
        # Here z is NaN where the largest logit is infinite, and a logsumexp is infinite there.
        infinite = counts & (top == float("inf")) & (first >= 0)
        tl.store(extras + (row + rows), tl.where(infinite, top, z), mask=exists)
        correct = counts & (first >= 0) & (first == (label if LABELS else likeliest))
        tl.store(extras + (row + rows + rows), tl.where(correct, 1.0, 0.0), mask=exists)

    if KIND != "none":
        z_factor = None
        if KIND == "given":
            factor = tl.load(factors + row, mask=exists, other=0.0)
            if z_factors is not None:
                z_factor = tl.load(z_factors + row, mask=exists, other=0.0)
                z_factor = tl.where(z_factor == 0.0, 0.0, 2.0 * z_factor * z)
        else:
            p = tl.where(counts, 1.0, 0.0)
            if measure is not None:
                p *= tl.load(measure + row, mask=exists, other=0.0)
            takes_part = p != 0.0
            weight = tl.where(takes_part, _weight(loss, numbers, KIND), 0.0)
            tl.store(weights + row, weight, mask=exists)
            value = tl.where((weight == 0.0) & (loss == loss), 0.0, weight * loss)
            if Z_LOSS:
                value += z_loss * z * z
            tl.store(values + row, tl.where(takes_part, p * value, 0.0), mask=exists)
            norm = p
            if divisor is not None:
                by = tl.load(divisor).to(tl.float32)
                norm = p / tl.where(by == 0.0, float("nan"), by)
            factor = tl.where(takes_part, weight * norm, 0.0)
            if Z_LOSS:
                z_factor = tl.where(takes_part, 2.0 * z_loss * norm * z, 0.0)
        if gradient is not None:
            if ONCE:
                tile = _gradient_tile(x, top, total, mass, soft_mass, label_mass, label, k, factor, z_factor)
                inside = exists[:, None] & (k < classes)[None, :]
                _store_tile(gradient, at_gradient, gradient_class, k, inside, tile)
            else:
                for start in range(0, classes, BLOCK):
                    k = start + tl.arange(0, BLOCK)
                    inside = counts[:, None] & (k < classes)[None, :]
                    x = _logits_tile(logits, at_row, logits_class, k, inside, adjustment, classes)
                    soft_mass = None
                    if SOFT:
                        probabilities = None
                        if not LABELS:
                            probabilities = _probabilities(target, at_target, target_class, k, inside)
                        soft_mass = _soft_mass(probabilities, k, inside, class_weight, classes, keep, share)
                    tile = _gradient_tile(
                        x, top, total, mass, soft_mass, label_mass, label, k, factor, z_factor
                    )
                    inside = exists[:, None] & (k < classes)[None, :]
                    _store_tile(gradient, at_gradient, gradient_class, k, inside, tile)


@triton.jit
def gradient_blocks(
    logits, target, class_weight, adjustment, factors, z_factors, sums, gradient,
    rows, classes, inner, ignore_index, keep, share,
    logits_outer, logits_inner, logits_class, target_outer, target_inner, target_class,
    gradient_outer, gradient_inner, gradient_class,
    LABELS: tl.constexpr, SOFT: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of `sum_i f_i l_i + z_i Z_i^2` from the sums of the rows; each program computes a block.

    Arguments are as for `cross_entropy_rows`, which computed `sums`. `factors` are 0 for rows that take no
    part.
    """
    if ALIGN > 1:  # The same numbers, as multiples that the compiler can see.
        classes = classes // ALIGN * ALIGN
        gradient_outer = gradient_outer // ALIGN * ALIGN
        logits_outer = logits_outer // ALIGN * ALIGN
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = row < rows
    factor = tl.load(factors + row, mask=exists, other=0.0)
    reads = factor != 0.0
    top = tl.load(sums + row, mask=exists, other=0.0)
    total = tl.load(sums + (row + rows), mask=exists, other=1.0)
    mass = tl.load(sums + (row + rows + rows), mask=exists, other=0.0)
    z_factor = None
    if z_factors is not None:
        z_factor = tl.load(z_factors + row, mask=exists, other=0.0)
        reads = reads | (z_factor != 0.0)
        z_factor = tl.where(z_factor == 0.0, 0.0, 2.0 * z_factor * (top + tl.log(total)))
    inside = reads[:, None] & (k < classes)[None, :]
    at_row = (row // inner) * logits_outer + (row % inner) * logits_inner
    at_gradient = (row // inner) * gradient_outer + (row % inner) * gradient_inner
    at_target = (row // inner) * target_outer + (row % inner) * target_inner
    label, label_mass, soft_mass = None, None, None
    if LABELS:
        label, _counts, is_class = _label_of(target, row, exists, ignore_index, classes)
        label_mass = _label_mass(class_weight, label, is_class, keep)
    if SOFT:
        probabilities = None
        if not LABELS:
            probabilities = _probabilities(target, at_target, target_class, k, inside)
        soft_mass = _soft_mass(probabilities, k, inside, class_weight, classes, keep, share)
    x = _logits_tile(logits, at_row, logits_class, k, inside, adjustment, classes)
    tile = _gradient_tile(x, top, total, mass, soft_mass, label_mass, label, k, factor, z_factor)
    inside = exists[:, None] & (k < classes)[None, :]
    _store_tile(gradient, at_gradient, gradient_class, k, inside, tile)


@triton.jit
def scale_blocks(
    gradient, above, rows, classes, inner, gradient_outer, gradient_inner, gradient_class, above_stride,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply rows of a gradient by numbers, in place. A row with the number 1 is neither read nor written.

    Args:
        gradient: Read and written.
        above: One number, of stride 0, or one a row.
        rows: As for `cross_entropy_rows`, with the next five.
        classes: As there.
        inner: As there.
        gradient_outer: As there.
        gradient_inner: As there.
        gradient_class: As there.
        above_stride: 0 or 1.
        ALIGN: As there.
        ROWS: As there.
        BLOCK: As there.
    """
    if ALIGN > 1:  # The same numbers, as multiples that the compiler can see.
        classes = classes // ALIGN * ALIGN
        gradient_outer = gradient_outer // ALIGN * ALIGN
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(above + row * above_stride, mask=row < rows, other=1.0).to(tl.float32)
    inside = ((row < rows) & (factor != 1.0))[:, None] & (k < classes)[None, :]
    at = ((row // inner) * gradient_outer + (row % inner) * gradient_inner)[:, None]
    at += (k.to(tl.int64) * gradient_class)[None, :]
    tile = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    tl.store(gradient + at, tile.to(gradient.dtype.element_ty), mask=inside)
