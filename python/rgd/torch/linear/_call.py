"""One call of the linear cross-entropy: the choice of its way, and its functions in the graph of autograd."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rgd.torch._dtypes import accumulator, wide
from rgd.torch._head import LinearHead
from rgd.torch._modes import autocasts, graph_is_kept, in_transform, is_exporting, plain_and_eager
from rgd.torch._plan import Weigher
from rgd.torch._problem import Problem
from rgd.torch.backends._extras import Extras, take_extras
from rgd.torch.backends._formulas import (
    check_labels,
    divisor_of,
    factors_of,
    logsumexp_of,
    losses_of,
    mean_of,
    objective_of,
    product,
    shares_of,
    z_factors_of,
)
from rgd.torch.backends._registry import Backend, choose
from rgd.torch.functional import compute, finished
from rgd.torch.linear import _ops
from rgd.torch.linear._chunks import Gradients, Wanted, gradients_in_chunks, in_one_pass, losses_in_chunks
from rgd.torch.linear._rows import as_losses, as_rows, chunked, measure_of_targets
from rgd.torch.stats import Filled, Record


def compute_linear(problem: Problem, weigher: Weigher) -> tuple[Tensor, Record | None]:
    """The objective of a problem with a linear head, and the record of its weights if it may be kept.

    The state after the call and the extras are left in the weigher.
    """
    if not _served(problem):
        if cast("LinearHead", problem.head).shard is not None:
            raise RuntimeError(
                "vocab_group serves plain tensors in eager calls, not torch.func transforms, forward-mode "
                "differentiation or tensor subclasses"
            )
        return compute(_with_all_logits(problem), weigher)
    objective, record = _call_of(problem).run(weigher)
    return finished(objective, problem, weigher), record


class _Call(NamedTuple):
    """One call on plain tensors.

    Attributes:
        problem: The problem; class weight and adjustment are without grad, contiguous and in the
            accumulator's dtype, and class probabilities in `dtype`.
        dtype: The dtype that logits are computed in.
        backend: What computes weights and chunks.
    """

    problem: Problem
    dtype: torch.dtype
    backend: Backend

    def run(self, weigher: Weigher) -> tuple[Tensor, Record]:
        """The objective, in the accumulator's dtype, and the record of its weights."""
        plan, options = weigher.plan, self.problem.options
        per_target = options.per == "element" or len(self.problem.losses_shape()) < 2
        per_target = per_target and self.problem.segments is None
        pointwise = plan.pointwise and not plan.stateful and per_target
        # An operator knows weightings by their kernels alone.
        pointwise = pointwise and (plan.kind is not None or not torch.compiler.is_compiling())
        if pointwise and options.reduction != "none" and any(self.wanted()):
            return self._one_pass(weigher)
        return self._two_passes(weigher)

    def parameters(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors that may require a gradient: hidden states, the head's weight and bias."""
        head = cast("LinearHead", self.problem.head)
        return self.problem.logits, head.weight, head.bias

    def wanted(self) -> Wanted:
        """The gradients that the caller wants."""
        enabled = torch.is_grad_enabled()
        return Wanted(*(one is not None and one.requires_grad and enabled for one in self.parameters()))

    def _one_pass(self, weigher: Weigher) -> tuple[Tensor, Record]:
        problem, plan = self.problem, weigher.plan
        norm = as_rows(problem, self.norm(), 0)
        if torch.compiler.is_compiling():
            objective, *vectors, extras = _ops.one_pass(self._in_dtype(), self.wanted(), norm, plan)
            losses, weights = (as_losses(problem, vector) for vector in vectors)
            if problem.returns:
                self._take_extras(weigher, extras)
            value, divisor = self._reduced(losses, weights)
            # The mean of nothing is NaN, but the operator's sum is 0.
            objective = objective.masked_fill(value.isnan() & ~objective.isnan(), float("nan"))
            return objective, self._record(losses, weights, divisor)
        measure = measure_of_targets(problem, accumulator(self.dtype))
        measure, groups, reference = (
            None if one is None else as_rows(problem, one, 0)
            for one in (measure, weigher.groups, weigher.reference)
        )
        alone = Weigher(plan, groups, reference=reference)
        found = in_one_pass(self._chunked(), measure, norm, alone, self.wanted())
        losses, weights = as_losses(problem, found.losses), as_losses(problem, found.weights)
        logsumexp = None if found.logsumexp is None else as_losses(problem, found.logsumexp)
        if problem.returns:
            self._take_extras(weigher, found.extras)
        objective, divisor = self._reduced(losses, weights, logsumexp)
        kept = _Kept(objective, self._finished(found.gradients), weights)
        objective = cast("Tensor", _OnePass.apply(*self.parameters(), kept, self))
        return objective, self._record(losses, weights, divisor)

    def _two_passes(self, weigher: Weigher) -> tuple[Tensor, Record]:
        problem, compiling = self.problem, torch.compiler.is_compiling()
        with torch.no_grad():
            found = _ops.losses(self._in_dtype()) if compiling else losses_in_chunks(self._chunked())
            losses, logsumexp = (None if one is None else as_losses(problem, one) for one in found[:2])
            if problem.returns:
                self._take_extras(weigher, found[2])
            losses = cast("Tensor", losses)
            counted = problem.counted()
            of_units = self.backend.sample_weights(*problem.units(losses), weigher).to(losses.dtype)
            weights = problem.spread(of_units)
        if not any(self.wanted()):
            objective, divisor = self._reduced(losses, weights, logsumexp)
            return objective, self._record(losses, weights, divisor, of_units)
        factors = factors_of(losses, weights, counted, problem.measure)
        values = product(factors, losses)
        z_factors = z_factors_of(problem, losses)
        if logsumexp is not None and z_factors is not None:
            values = values + z_factors * logsumexp.square()
        if compiling:
            of_z = None if z_factors is None else as_rows(problem, z_factors, 0)
            flat = as_rows(problem, values, 0), as_rows(problem, factors, 0), of_z
            products = as_losses(problem, _ops.products(self._in_dtype(), self.wanted(), *flat))
        else:
            products = cast("Tensor", _Products.apply(*self.parameters(), values, factors, self))
        _, divisor = self._reduced(losses, weights)
        reduction = problem.options.reduction
        if reduction != "none":
            products = products.sum(dtype=wide(products))
            mean = divisor if problem.normalizer is None else problem.normalizer
            products = mean_of(products, mean) if reduction == "mean" else products
        return products.to(losses.dtype), self._record(losses, weights, divisor, of_units)

    # --- what both ways need ---

    def norm(self) -> Tensor:
        """What multiplies `w l` of each target in the objective."""
        problem, dtype = self.problem, accumulator(self.dtype)
        p = measure_of_targets(problem, dtype)
        norm = p
        if norm is None:
            norm = torch.ones(problem.losses_shape(), dtype=dtype, device=problem.target.device)
        if problem.options.reduction != "mean":
            return norm
        total = problem.normalizer
        if total is None:
            total = divisor_of(norm, problem.counted(), p, shares_of(problem, dtype))
        return torch.where(norm == 0, 0, mean_of(norm, total))

    def gradients(self, factors: Tensor, z_factors: Tensor | None, wanted: Wanted) -> Gradients:
        """The gradients of `sum_i factors_i l_i + z_factors_i Z_i^2`, by a pass over the chunks."""
        of_z = None if z_factors is None else as_rows(self.problem, z_factors, 0)
        flat = as_rows(self.problem, factors, 0)
        return self._finished(gradients_in_chunks(self._chunked(), flat, of_z, wanted))

    def differentiable(
        self, factors: Tensor, z_factors: Tensor | None, above: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients of `sum_i above_i (factors_i l_i + z_factors_i Z_i^2)`, to be differentiated again.

        They are taken from all logits.
        """
        problem = self.problem
        if cast("LinearHead", problem.head).shard is not None:
            raise RuntimeError("a split vocabulary has no second derivatives: leave vocab_group out")
        with torch.enable_grad():
            given = self._in_dtype()
            measure = measure_of_targets(problem, accumulator(self.dtype))
            if measure is not None:
                # Whatever a row holds that takes no part, it reaches no gradient.
                left_out = as_rows(problem, measure == 0, 1).view(*given.logits.shape[:-1], 1)
                given = given.changed(logits=given.logits.masked_fill(left_out, 0))
            whole = _with_all_logits(given)
            products = product(factors, losses_of(whole))
            if z_factors is not None:
                products = products + z_factors * logsumexp_of(whole).square()
            above = above.expand(factors.shape).to(products.dtype)
            wanted = [one for one in self.parameters() if one is not None and one.requires_grad]
            found = iter(torch.autograd.grad(products, wanted, above, create_graph=True))
        return tuple(
            next(found) if one is not None and one.requires_grad else None for one in self.parameters()
        )

    def _take_extras(self, weigher: Weigher, of_rows: Extras) -> None:
        found = {name: as_losses(self.problem, one) for name, one in of_rows.items()}
        take_extras(weigher, self.problem, found)

    def _chunked(self) -> Any:
        return chunked(self.problem, self.dtype, self.backend)

    def _in_dtype(self) -> Problem:
        """The problem in the dtype that logits are computed in; autograd sees the conversion."""
        head = cast("LinearHead", self.problem.head)
        bias = None if head.bias is None else head.bias.to(self.dtype)
        head = LinearHead(head.weight.to(self.dtype), bias, head.chunking, head.shard)
        return self.problem.changed(logits=self.problem.logits.to(self.dtype), head=head)

    def _reduced(
        self, losses: Tensor, weights: Tensor, logsumexp: Tensor | None = None
    ) -> tuple[Tensor, Tensor | float]:
        vectors = (None if one is None else one.to(wide(losses)) for one in (losses, weights, logsumexp))
        objective, divisor = objective_of(self.problem, *cast("Any", vectors))
        return objective.to(losses.dtype), divisor

    def _record(
        self, losses: Tensor, weights: Tensor, divisor: Tensor | float, of_units: Tensor | None = None
    ) -> Record:
        split = cast("LinearHead", self.problem.head).shard is not None
        name = "composite" if split else self.backend.name
        return Record.of(self.problem, Filled(losses, weights, divisor, of_units=of_units), name)

    def _finished(self, found: Gradients) -> Gradients:
        """The whole gradient of the input; all in the dtype they will have, or for float16 in float32."""
        input, weight, bias = self.parameters()
        of_input, of_weight, of_bias = found
        if of_input is not None:
            shard = cast("LinearHead", self.problem.head).shard
            if shard is not None:
                dist.all_reduce(of_input, group=shard.group)
            of_input = of_input.view(input.shape).to(_kept_in(input))
        return Gradients(
            of_input,
            None if of_weight is None else of_weight.to(_kept_in(weight)),
            None if of_bias is None or bias is None else of_bias.to(_kept_in(bias)),
        )


class _Kept(NamedTuple):
    """What the forward pass in one pass leaves for the backward pass."""

    objective: Tensor
    gradients: Gradients
    weights: Tensor


class _OnePass(torch.autograd.Function):
    """Hands the objective on, and keeps its gradients for the backward pass."""

    @staticmethod
    def forward(  # noqa: PLR0917 - the signature is torch's
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, kept: _Kept, call: _Call
    ) -> Tensor:
        # autograd keeps the tensors, and sees whether they are changed.
        ctx.save_for_backward(*kept.gradients, kept.weights, *call.problem.tensors())
        ctx.call = call._replace(problem=call.problem.without_tensors())
        return kept.objective

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        of_input, of_weight, of_bias, weights, *saved = ctx.saved_tensors
        gradients = of_input, of_weight, of_bias
        call = cast("_Call", ctx.call)
        call = call._replace(problem=call.problem.with_tensors(saved))
        (above,) = grad_outputs
        found: tuple[Tensor | None, ...]
        if torch.is_grad_enabled():
            norm, z_loss = call.norm(), call.problem.options.z_loss
            factors = (norm * weights).masked_fill(norm == 0, 0)
            found = call.differentiable(factors, z_loss * norm if z_loss else None, above)
        elif above.is_cpu and above.item() == 1.0 and not graph_is_kept():
            found = gradients
        else:
            found = tuple(None if one is None else one * above.to(one.dtype) for one in gradients)
        return *_in_dtypes_of(call.parameters(), found), None, None


class _Products(torch.autograd.Function):
    """What each target adds to the objective; the backward pass goes through the chunks once more."""

    @staticmethod
    def forward(  # noqa: PLR0917 - the signature is torch's
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        factors: Tensor,
        call: _Call,
    ) -> Tensor:
        ctx.save_for_backward(factors, *call.problem.tensors())
        ctx.call = call._replace(problem=call.problem.without_tensors())
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        factors, *saved = ctx.saved_tensors
        (above,) = grad_outputs
        call = cast("_Call", ctx.call)
        call = call._replace(problem=call.problem.with_tensors(saved))
        z_factors = z_factors_of(call.problem, factors)
        if torch.is_grad_enabled():
            found = call.differentiable(factors, z_factors, above)
        else:
            factors, z_factors = (
                None if one is None else (one * above).masked_fill(one == 0, 0)
                for one in (factors, z_factors)
            )
            found = call.gradients(cast("Tensor", factors), z_factors, Wanted(*ctx.needs_input_grad[:3]))
        return *_in_dtypes_of(call.parameters(), found), None, None, None


def _in_dtypes_of(
    parameters: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    pairs = zip(parameters, gradients, strict=True)
    return tuple(None if of is None or one is None else one.to(of.dtype) for of, one in pairs)


def _kept_in(tensor: Tensor) -> torch.dtype:
    """The dtype of a kept gradient, until it is multiplied by the incoming gradient."""
    return torch.float32 if tensor.dtype is torch.float16 else tensor.dtype


def _call_of(problem: Problem) -> _Call:
    kind, input = problem.logits.device.type, problem.logits
    dtype = cast("Any", torch).get_autocast_dtype(kind) if autocasts(kind) else input.dtype
    if dtype is torch.float16:
        # A float16 gradient of a mean underflows before the loss scale is applied: compute it in float32.
        dtype = torch.float32
    if input.dtype is torch.float64:
        dtype = torch.float64
    check_labels(problem)
    backend = choose(problem.tensors())
    class_weight, adjustment = (
        None if one is None else one.detach().to(accumulator(dtype)).contiguous()
        for one in (problem.class_weight, problem.adjustment)
    )
    target = problem.target if problem.has_labels() else problem.target.detach().to(dtype)
    # A copy: the caller may change its tensor before the backward pass reads it.
    measure = None if problem.measure is None else problem.measure.clone()
    problem = problem.changed(
        class_weight=class_weight, adjustment=adjustment, target=target, measure=measure
    )
    return _Call(problem, dtype, backend)


def _served(problem: Problem) -> bool:
    """Whether the chunks serve these tensors in the mode of the call."""
    if problem.target.requires_grad and torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return not is_exporting() and not in_transform()
    return plain_and_eager((*problem.tensors(), problem.given_measure, problem.reference))


def _with_all_logits(problem: Problem) -> Problem:
    """The same problem of its logits, by operations that can be differentiated any number of times."""
    weight, bias, chunking, _ = cast("LinearHead", problem.head)
    logits = F.linear(problem.logits, weight, bias)
    if chunking.logit_softcap is not None:
        logits = chunking.logit_softcap * torch.tanh(logits / chunking.logit_softcap)
    logits = (logits[:, :-1] if chunking.shift else logits).movedim(-1, 1)
    target = problem.target
    if not problem.has_labels():
        target = target.movedim(-1, 1)
        if target.dtype != logits.dtype:
            dtype = torch.promote_types(target.dtype, logits.dtype)
            logits, target = logits.to(dtype), target.to(dtype)
    return problem.changed(logits=logits, target=target, head=None)
