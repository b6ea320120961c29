"""One call of the linear cross-entropy: what is checked, which way it takes, and what autograd is told."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rgd.torch import _linear_ops
from rgd.torch._checks import (
    check_groups,
    check_logit_adjustment,
    in_unit,
)
from rgd.torch._chunks import Gradients, Head, Wanted, gradients_of, in_one_pass, losses_of, rows_of
from rgd.torch._distributed import Sync
from rgd.torch._linear_checks import Chunking, Shard, check_head, check_targets
from rgd.torch._modes import graph_is_kept, is_exporting
from rgd.torch._record import Record
from rgd.torch._steps import ComposedStep, RustStep, VocabStep
from rgd.torch._weigher import Plan, Weigher
from rgd.torch._weighted import mark_weighted
from rgd.torch.backends import composite
from rgd.torch.backends._options import Options, accumulator, wide
from rgd.torch.backends._registry import (
    autocasts,
    choose,
    in_transform,
    plain_and_eager,
)
from rgd.torch.functional import base_of, classify, in_ones


def classify_linear(  # noqa: PLR0917
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    options: Options,
    chunking: Chunking,
    plan: Plan,
    sync: Sync,
    where: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Tensor | None = None,
    state: Any = None,
    adjustment: Tensor | None = None,
) -> tuple[Tensor, Record | None, Any]:
    """The re-weighted cross-entropy of a checked head, the record if it may be kept, and the state."""
    check_head(input, linear_weight, linear_bias)
    if chunking.vocab_group is not None and torch.compiler.is_compiling():
        raise RuntimeError("vocab_group is for eager calls: keep the loss out of the compiled function")
    shard = None if chunking.vocab_group is None else Shard.of(chunking.vocab_group, linear_weight)
    classes = linear_weight.shape[0] if shard is None else shard.classes
    check_targets(input, target, class_weight, classes, options, chunking, shard)
    check_logit_adjustment(adjustment, input.new_empty(0, classes))
    adjustment = None if adjustment is None else adjustment.detach()
    if chunking.shift:
        target = target[:, 1:]
        vectors = (_shifted(one, input) for one in (where, sample_weight, groups))
        where, sample_weight, groups = vectors
    tensors = (input, linear_weight, linear_bias, target, class_weight, where, sample_weight)
    if not _served(tensors, target):
        if shard is not None:
            raise RuntimeError(
                "vocab_group serves plain tensors in eager calls, not torch.func transforms, forward-mode "
                "differentiation or tensor subclasses"
            )
        logits = whole_logits(input, linear_weight, linear_bias, chunking.logit_softcap)
        logits = logits[:, :-1] if chunking.shift else logits
        target = target.movedim(-1, 1) if target.is_floating_point() else target
        return classify(
            logits.movedim(-1, 1), target, class_weight, options, plan, sync,
            where, sample_weight, groups, state, adjustment,
        )  # fmt: skip

    shape = input.shape[:-1] if not chunking.shift else torch.Size((input.shape[0], target.shape[1]))
    per = options.per if len(shape) > 1 else "element"
    base = base_of(shape, input, where, sample_weight, per)
    weigher, given = Weigher(plan, check_groups(groups, shape, input.device, per), state, sync), base
    if base is not None and sample_weight is not None:
        base, weigher.unit = in_unit(base, accumulator(input.dtype), options.reduction)
    call = _Call(
        input,
        linear_weight,
        linear_bias,
        target,
        class_weight,
        options,
        chunking,
        shard,
        shape,
        base,
        adjustment,
    )
    objective, record = call.run(weigher, per)
    if not autocasts(input.device.type):
        objective = objective.to(input.dtype)
    if options.reduction == "none":
        mark_weighted(objective, plan.kernel)
    return objective, in_ones(record, given, weigher.unit), weigher.state


class _Call:
    """One call on plain tensors: the head made ready for its chunks, and what the objective is made of."""

    def __init__(  # noqa: PLR0917
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        options: Options,
        chunking: Chunking,
        shard: Shard | None,
        shape: torch.Size,
        base: Tensor | None,
        adjustment: Tensor | None,
    ) -> None:
        self.tensors: tuple[Any, ...] = (input, weight, bias)
        self.places = input.shape[:-1]
        self.chunking = chunking
        self.shard = shard
        self.shape = shape
        self.base = base
        self.options = options
        kind = input.device.type
        self.dtype = cast("Any", torch).get_autocast_dtype(kind) if autocasts(kind) else input.dtype
        if self.dtype is torch.float16:
            # float16 has no room for the gradient of a mean before the loss scale has been applied to it.
            self.dtype = torch.float32
        if input.dtype is torch.float64:
            self.dtype = torch.float64
        if target.is_floating_point():
            target = target.detach().to(self.dtype)
            self.counted = None
        else:
            fits = target.dtype is torch.int32 and -(2**31) <= options.ignore_index < 2**31
            target = target if fits or target.dtype is torch.int64 else target.to(torch.int64)
            target = composite.labels_in_use(target, base, options.ignore_index)
            self.counted = target != options.ignore_index
            classes = weight.shape[0] if shard is None else shard.classes
            composite.check_labels(target, classes, options.ignore_index, chunking.shift)
        self.target = target
        self.accumulator = accumulator(self.dtype)
        self.class_weight, self.adjustment = (
            None if one is None else one.detach().to(self.accumulator).contiguous()
            for one in (class_weight, adjustment)
        )
        self.chosen = choose(input, target, weight, bias, class_weight, base)
        self.backend = "composite" if shard is not None else self.chosen.name

    # --- what is asked for ---

    @property
    def wanted(self) -> Wanted:
        """Which gradients the caller asks for."""
        enabled = torch.is_grad_enabled()
        return Wanted(*(one is not None and one.requires_grad and enabled for one in self.tensors))

    def run(self, weigher: Weigher, per: str) -> tuple[Tensor, Record]:
        """The objective, in the accumulator's dtype, and the record of its weights."""
        plan, options = weigher.plan, self.options
        pointwise = plan.pointwise and not plan.stateful and per == "element"
        # An operator knows weightings by their kernels alone.
        pointwise = pointwise and (plan.kind == "kl" or not torch.compiler.is_compiling())
        if pointwise and options.reduction != "none" and any(self.wanted):
            return self._one_pass(weigher)
        return self._two_passes(weigher, per)

    # --- vectors over the rows of the input ---

    def rows(self, values: Tensor | None, fill: float) -> Tensor | None:
        """A tensor of the losses' shape, perhaps with a class axis, as entries for each row of the input."""
        if values is None:
            return None
        if self.chunking.shift:
            values = F.pad(values, (0, self.places[1] - self.shape[1]), value=fill)
        return values.reshape(self.places.numel(), *values.shape[len(self.shape) :])

    def losses_like(self, values: Tensor) -> Tensor:
        """Entries for each row of the input as a tensor of the losses' shape."""
        values = values.view(self.places)
        return values[:, :-1] if self.chunking.shift else values

    @property
    def by_target(self) -> Tensor | None:
        """The base measure, one a target, 0 for what takes no part; None where all is one."""
        if self.base is None:
            return None if self.counted is None else self.counted.to(self.accumulator)
        base = self.base.to(self.accumulator)
        base = composite.spread(base, base.new_empty(self.shape)).expand(self.shape)
        # The kernels read it as it lies in memory, which `expand` alone leaves as it was.
        return base.contiguous() if self.counted is None else base.masked_fill(~self.counted, 0)

    def takes_part(self) -> Tensor | None:
        """Which rows of the input take part, bool; None for all of them."""
        base = self.by_target
        if base is None and not self.chunking.shift:
            return None
        mask = (
            torch.ones(self.shape, dtype=torch.bool, device=self.target.device) if base is None else base != 0
        )
        return self.rows(mask, 0)

    def head(self) -> Head:
        """The head in the dtype it is computed in."""
        input, weight = (one.detach().to(self.dtype) for one in self.tensors[:2])
        bias = None if self.tensors[2] is None else self.tensors[2].detach().to(self.dtype)
        options, shard = self.options, self.shard
        step: Any
        if shard is not None:
            step = VocabStep(
                self.class_weight, options, shard.group, shard.first, shard.classes, self.adjustment
            )
        else:
            kind = RustStep if self.backend == "rust" else ComposedStep
            step = kind(self.class_weight, options, self.adjustment)
        target = cast("Tensor", self.rows(self.target, options.ignore_index))
        widest = weight.shape[0] if shard is None else shard.widest
        dtype = self.chunking.accumulate_dtype or accumulator(self.dtype)
        return Head(
            input.flatten(0, -2), weight, bias, target, self.chunking.logit_softcap,
            rows_of(self.chunking.chunk_bytes, widest, weight.shape[1], self.dtype, dtype), dtype, step,
        )  # fmt: skip

    def arguments(self) -> tuple[Any, ...]:
        """The head as the arguments of an operator, which autograd sees."""
        input, weight = (one.to(self.dtype) for one in self.tensors[:2])
        bias = None if self.tensors[2] is None else self.tensors[2].to(self.dtype)
        dtype = self.chunking.accumulate_dtype or self.accumulator
        classes, features = weight.shape
        rows = rows_of(self.chunking.chunk_bytes, classes, features, self.dtype, dtype)
        return (
            input.flatten(0, -2), weight, bias, self.target, self.class_weight, self.takes_part(),
            self.adjustment, self.options.ignore_index, self.options.label_smoothing,
            self.chunking.logit_softcap, rows, str(dtype).removeprefix("torch."), self.chunking.shift,
        )  # fmt: skip

    # --- the two ways ---

    def norm(self) -> Tensor:
        """What multiplies `w l` of each target in the objective."""
        p = self.by_target
        norm = self.like_losses().fill_(1.0) if p is None else p
        if self.options.reduction != "mean":
            return norm
        shares = composite.shares_of(self.target, self.class_weight, self.counted, self.accumulator)
        total = composite.mass_of(norm, self.counted, p, shares)
        return torch.where(norm == 0, 0, composite.mean_of(norm, total))

    def _one_pass(self, weigher: Weigher) -> tuple[Tensor, Record]:
        norm, plan = cast("Tensor", self.rows(self.norm(), 0)), weigher.plan
        if torch.compiler.is_compiling():
            objective, *vectors = _linear_ops.one_pass(
                *self.arguments(), *self.wanted, norm, plan.kind, plan.numbers
            )
            losses, weights = (self.losses_like(vector) for vector in vectors[:2])
            value, denominator = self._reduced(losses, weights)
            # The operator's sum is 0 for the mean of nothing, which is NaN.
            objective = objective.masked_fill(value.isnan() & ~objective.isnan(), float("nan"))
            return objective, self._record(losses, weights, denominator, weigher)
        groups, base = self.rows(weigher.groups, 0), self.rows(self.by_target, 0)
        found = in_one_pass(self.head(), self.takes_part(), base, norm, Weigher(plan, groups), self.wanted)
        losses, weights = self.losses_like(found[0]), self.losses_like(found[1])
        objective, denominator = self._reduced(losses, weights)
        objective = _OnePass.apply(*self.tensors, objective, self._finished(found[2]), self, weights)
        return cast("Tensor", objective), self._record(losses, weights, denominator, weigher)

    def _two_passes(self, weigher: Weigher, per: str) -> tuple[Tensor, Record]:
        compiling = torch.compiler.is_compiling()
        with torch.no_grad():
            flat = (
                _linear_ops.losses(*self.arguments())
                if compiling
                else losses_of(self.head(), self.takes_part())
            )
            losses = self.losses_like(flat)
            units = composite.units_of(losses, self.counted, self.base, per)
            weights = self.chosen.sample_weights(*units, weigher).to(losses.dtype)
        if not any(self.wanted):
            objective, denominator = self._reduced(losses, weights)
            return objective, self._record(losses, weights, denominator, weigher)
        factors = composite.factors_of(losses, weights, self.counted, self.base, 1.0, "sum")
        if compiling:
            flat = _linear_ops.products(*self.arguments(), *self.wanted, flat, self.rows(factors, 0))
            products = self.losses_like(flat)
        else:
            products = cast("Tensor", _Products.apply(*self.tensors, losses, factors, self))
        _, denominator = self._reduced(losses, weights)
        reduction = self.options.reduction
        if reduction != "none":
            products = products.sum(dtype=wide(products))
            products = composite.mean_of(products, denominator) if reduction == "mean" else products
        return products.to(losses.dtype), self._record(losses, weights, denominator, weigher)

    def like_losses(self) -> Tensor:
        """An uninitialised tensor of the losses' shape."""
        return torch.empty(self.shape, dtype=self.accumulator, device=self.target.device)

    def _reduced(self, losses: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | float]:
        shares = composite.shares_of(self.target, self.class_weight, self.counted, wide(losses))
        objective, denominator = composite.reduce_losses(
            losses.to(wide(losses)),
            weights.to(wide(losses)),
            self.counted,
            self.base,
            self.options.reduction,
            shares,
        )
        return objective.to(losses.dtype), denominator

    def _record(
        self, losses: Tensor, weights: Tensor, denominator: Tensor | float, weigher: Weigher
    ) -> Record:
        return Record(losses, weights, denominator, self.base, self.counted, weigher.groups, self.backend)

    def _finished(self, found: Gradients) -> Gradients:
        """The whole gradient of the input; all in the dtype they will have, or for float16 in float32."""
        input, weight, bias = self.tensors
        of_input, of_weight, of_bias = found
        if of_input is not None:
            if self.shard is not None:
                dist.all_reduce(of_input, group=self.shard.group)
            of_input = of_input.view(input.shape).to(_kept(input))
        return Gradients(
            of_input,
            None if of_weight is None else of_weight.to(_kept(weight)),
            None if of_bias is None or bias is None else of_bias.to(_kept(bias)),
        )

    def gradients(self, factors: Tensor, wanted: Wanted) -> Gradients:
        """The gradients of `sum_i factors_i l_i`, by a pass over the chunks."""
        flat = cast("Tensor", self.rows(factors, 0))
        return self._finished(gradients_of(self.head(), self.takes_part(), flat, wanted))

    def differentiable(self, factors: Tensor, above: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `sum_i above_i factors_i l_i` from all logits, to be differentiated again."""
        if self.shard is not None:
            raise RuntimeError("a split vocabulary has no second derivatives: leave vocab_group out")
        with torch.enable_grad():
            given, weight, bias = (None if one is None else one.to(self.dtype) for one in self.tensors)
            input, takes_part = cast("Tensor", given), self.takes_part()
            if takes_part is not None:
                input = input.masked_fill(~takes_part.view(*input.shape[:-1], 1), 0)
            logits = whole_logits(input, cast("Tensor", weight), bias, self.chunking.logit_softcap)
            logits = logits[:, :-1] if self.chunking.shift else logits
            target = self.target.reshape(self.shape.numel(), *self.target.shape[len(self.shape) :])
            logits = logits.reshape(target.shape[0], logits.shape[-1])
            losses, _ = composite.cross_entropy_losses(
                logits, target, self.class_weight, self.options, self.adjustment
            )
            products = composite.product(factors.reshape(-1), losses)
            above = above.expand(factors.shape).reshape(-1).to(products.dtype)
            wanted = [one for one in self.tensors if one is not None and one.requires_grad]
            found = iter(torch.autograd.grad(products, wanted, above, create_graph=True))
        return tuple(next(found) if one is not None and one.requires_grad else None for one in self.tensors)

    # --- between the passes ---

    def let_go(self) -> tuple[Tensor | None, ...]:
        """The tensors of the call, for autograd to keep, which also sees whether they are changed."""
        tensors = (*self.tensors, self.target, self.class_weight, self.adjustment)
        self.tensors = (None, None, None)
        return tensors

    def holding(self, *tensors: Tensor | None) -> _Call:
        """The call with the tensors that autograd kept."""
        call = copy.copy(self)
        input, weight, bias, target, call.class_weight, call.adjustment = tensors
        call.tensors, call.target = (input, weight, bias), cast("Tensor", target)
        return call


class _OnePass(torch.autograd.Function):
    """Hands the objective on, and keeps its gradients for the backward pass."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        objective: Tensor,
        gradients: Gradients,
        call: _Call,
        weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*gradients, weights, *call.let_go())
        ctx.call = call
        return objective

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, weights, input, weight, bias, target, class_weight, adjustment = ctx.saved_tensors
        (above,) = grad_outputs
        found: tuple[Tensor | None, ...]
        if torch.is_grad_enabled():
            call = cast("_Call", ctx.call).holding(input, weight, bias, target, class_weight, adjustment)
            norm = call.norm()
            found = call.differentiable((norm * weights).masked_fill(norm == 0, 0), above)
        elif above.is_cpu and above.item() == 1.0 and not graph_is_kept():
            found = tuple(gradients)
        else:
            found = tuple(None if one is None else one * above.to(one.dtype) for one in gradients)
        found = tuple(
            None if one is None else one.to(of.dtype)
            for one, of in zip(found, (input, weight, bias), strict=True)
        )
        return *found, None, None, None, None


class _Products(torch.autograd.Function):
    """`factors_i l_i` of each target; the backward pass goes through the chunks once more."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        losses: Tensor,
        factors: Tensor,
        call: _Call,
    ) -> Tensor:
        ctx.save_for_backward(factors, *call.let_go())
        ctx.call = call
        return composite.product(factors, losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        factors, *saved = ctx.saved_tensors
        (above,) = grad_outputs
        call = cast("_Call", ctx.call).holding(*saved)
        if torch.is_grad_enabled():
            found = call.differentiable(factors, above)
        else:
            factors = (factors * above).masked_fill(factors == 0, 0)
            found = call.gradients(factors, Wanted(*ctx.needs_input_grad[:3]))
        cast_back = (
            None if one is None else one.to(of.dtype) for one, of in zip(found, saved[:3], strict=True)
        )
        return *cast_back, None, None, None


def _kept(tensor: Tensor) -> torch.dtype:
    """The dtype that a gradient is kept in until it is multiplied by what comes from above."""
    return torch.float32 if tensor.dtype is torch.float16 else tensor.dtype


def _shifted(values: Tensor | None, input: Tensor) -> Tensor | None:
    """Entries of the targets that are used, of a tensor of the targets' shape; one entry a sample stays."""
    if not isinstance(values, Tensor) or values.shape != input.shape[:2]:
        return values
    return values[:, 1:]


def _served(tensors: tuple[Tensor | None, ...], target: Tensor) -> bool:
    """Whether the chunks serve these tensors in the mode of the call."""
    if target.requires_grad and torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return not is_exporting() and not in_transform()
    return plain_and_eager(tensors)


def whole_logits(input: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """All logits at once, by operations that can be differentiated any number of times."""
    logits = F.linear(input, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
