"""Calls of the Rust kernels on torch's tensors, with new outputs, and the steps over the chunks of a head."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rgd import _rgd
from rgd.torch._dtypes import accumulator
from rgd.torch._plan import Plan, Weigher
from rgd.torch._problem import Problem, targets_shape
from rgd.torch.backends._extras import Extras, where_counted
from rgd.torch.backends._graph import Computed
from rgd.torch.backends._memory import empty_like
from rgd.torch.backends._steps import FormulaStep, Rows
from rgd.torch.stats import Filled
from rgd.weightings._base import Kernel


def fill_weights(losses: Tensor, kernel: Kernel, measure: Tensor | None = None) -> Tensor:
    """The weights of losses by the kernel of a weighting; 0 where the measure is 0."""
    weights = losses.new_empty(losses.shape, dtype=accumulator(losses.dtype))
    given = _plain(losses.detach())
    _rgd.sample_weights(given, weights, *kernel, torch.get_num_threads(), _measure_of(measure))
    return weights


def fill_plain_weights(losses: Tensor, plan: Plan) -> Tensor:
    """The same without a measure, with objects of the last call that the plan keeps: a third of the time."""
    if losses.is_neg() or not losses.is_contiguous():
        return fill_weights(losses, cast("Kernel", plan.kernel))
    weights = torch.empty_like(losses, dtype=accumulator(losses.dtype))
    repeated_weights(losses.dtype, plan)(
        losses.data_ptr(), weights.data_ptr(), losses.numel(), torch.get_num_threads()
    )
    return weights


def repeated_weights(dtype: torch.dtype, plan: Plan) -> _rgd.RepeatedWeights:
    """What the plan has kept of the last call with losses of a dtype, or keeps from now on."""
    repeated = plan.repeated.get(dtype)
    if repeated is None:
        kind, numbers = cast("Kernel", plan.kernel)
        repeated = plan.repeated[dtype] = _rgd.RepeatedWeights(
            str(dtype).removeprefix("torch."), kind, numbers
        )
    return repeated


def _measure_of(measure: Tensor | None) -> Tensor | None:
    if measure is None:
        return None
    return _plain(measure.detach() if measure.is_floating_point() else measure.double())


def fill(problem: Problem, kernel: Kernel, with_grad: bool) -> Computed:
    """Losses, weights, objective and gradient in one call of the kernels."""
    logits, target = _plain(problem.logits.detach()), _plain(problem.target.detach())
    ignore_index, smoothing, reduction, per, inplace, z_loss = problem.options
    losses = _empty_losses(logits, target)
    # empty_like takes a third of the time of new_empty.
    weights = losses.new_empty(losses.shape[:1]) if per == "sample" else torch.empty_like(losses)
    objective = torch.empty_like(losses) if reduction == "none" else losses.new_empty(())
    grad = (logits if inplace else empty_like(logits)) if with_grad else None
    divisor, count = _rgd.cross_entropy(
        logits, target, _by_class(problem.class_weight, losses.dtype), problem.measure, *kernel,
        ignore_index, smoothing, per == "sample", reduction, losses, weights, objective, grad,
        torch.get_num_threads(), _by_class(problem.adjustment, losses.dtype), z_loss, problem.normalizer,
    )  # fmt: skip
    return Computed(objective, grad, Filled(losses, weights, divisor, count == losses.numel()))


def fill_losses(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """The loss of each target and, with a z-loss, the logsumexp of its logits."""
    logits, target = _plain(problem.logits.detach()), _plain(problem.target.detach())
    losses, options = _empty_losses(logits, target), problem.options
    logsumexp = torch.empty_like(losses) if options.z_loss else None
    _rgd.cross_entropy_losses(
        logits, target, _by_class(problem.class_weight, losses.dtype), options.ignore_index,
        options.label_smoothing, losses, torch.get_num_threads(),
        _by_class(problem.adjustment, losses.dtype), logsumexp,
    )  # fmt: skip
    return losses, logsumexp


def fill_gradient(
    problem: Problem, losses: Tensor, weights: Tensor, logsumexp: Tensor | None, with_grad: bool
) -> Computed:
    """Objective and gradient of given losses and weights; `logsumexp` comes from `fill_losses`."""
    logits, target = _plain(problem.logits.detach()), _plain(problem.target.detach())
    ignore_index, smoothing, reduction, per, inplace, z_loss = problem.options
    objective = torch.empty_like(losses) if reduction == "none" else losses.new_empty(())
    grad = (logits if inplace else empty_like(logits)) if with_grad else None
    divisor, count = _rgd.cross_entropy_gradient(
        logits, target, _by_class(problem.class_weight, losses.dtype), problem.measure, ignore_index,
        smoothing, per == "sample", reduction, losses, weights.contiguous(), objective, grad,
        torch.get_num_threads(), _by_class(problem.adjustment, losses.dtype), z_loss, logsumexp,
        problem.normalizer,
    )  # fmt: skip
    return Computed(objective, grad, Filled(losses, weights, divisor, count == losses.numel()))


def fill_extras(problem: Problem) -> Extras:
    """What `problem.returns` names, each of the losses' shape, by one more pass over the logits."""
    logits, target = _plain(problem.logits.detach()), _plain(problem.target.detach())
    like = _empty_losses(logits, target)
    found = {name: torch.empty_like(like) for name in problem.returns}
    _rgd.cross_entropy_extras(
        logits, target, problem.options.ignore_index, torch.get_num_threads(),
        _by_class(problem.adjustment, like.dtype), **found,
    )  # fmt: skip
    if "correct" in found:
        found["correct"] = found["correct"] != 0
    return found if problem.has_labels() else where_counted(problem, found)


class RustStep(FormulaStep):
    """The step over a chunk by the kernels, in place on its logits."""

    def losses(self, logits: Tensor, target: Tensor, logsumexp: Tensor | None = None) -> Tensor:
        losses, found = fill_losses(self.problem.changed(logits=logits, target=target))
        if logsumexp is not None and found is not None:
            logsumexp[...] = found
        return losses

    def write_gradient(
        self, logits: Tensor, target: Tensor, factors: Tensor, z_factors: Tensor | None = None
    ) -> None:
        problem, options = self.problem, self.problem.options
        weights, norms, z_loss = None, factors, 0.0
        if z_factors is not None:
            # The kernel takes factors as `norm w` and z_factors as `norm z_loss`.
            norms, z_loss = z_factors / options.z_loss, options.z_loss
            weights = torch.where(norms == 0, 0, factors / norms)
        _rgd.cross_entropy_rows_gradient(
            logits, target, problem.class_weight, norms, weights, options.ignore_index,
            options.label_smoothing, logits, torch.get_num_threads(), problem.adjustment, z_loss,
        )  # fmt: skip

    def weigh_and_write_gradient(
        self, rows: Rows, weigher: Weigher, losses: Tensor, weights: Tensor, logsumexp: Tensor | None = None
    ) -> None:
        if weigher.plan.kernel is None:
            super().weigh_and_write_gradient(rows, weigher, losses, weights, logsumexp)
            return
        problem, options = self.problem, self.problem.options
        _rgd.cross_entropy_rows(
            rows.logits, rows.target, problem.class_weight, rows.norm, *weigher.plan.kernel,
            options.ignore_index, options.label_smoothing, losses, weights, rows.logits,
            torch.get_num_threads(), problem.adjustment, options.z_loss, logsumexp,
        )  # fmt: skip


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without a lazy negation (of a conjugate's imaginary part), which DLPack cannot express."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _empty_losses(logits: Tensor, target: Tensor) -> Tensor:
    """An uninitialised loss for each target."""
    dtype = accumulator(logits.dtype)
    if not target.is_floating_point():
        return torch.empty_like(target, dtype=dtype, memory_format=torch.contiguous_format)
    return logits.new_empty(targets_shape(target.shape), dtype=dtype)


def _by_class(numbers: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One number a class, in the form that the kernels read."""
    return None if numbers is None else _plain(numbers.detach()).to(dtype).contiguous()
