"""The passes over the chunks of a linear head as operators of torch, which compiled graphs call."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from rgd.torch._dtypes import accumulator
from rgd.torch._head import LinearHead
from rgd.torch._operators import (
    LENGTH,
    PROBLEM,
    define,
    empty_extras,
    extras_by_name,
    extras_in_order,
    flattened,
    library,
    numbers_of,
    or_empty,
    rebuilt,
    register_fake,
)
from rgd.torch._plan import Plan, Weigher
from rgd.torch._problem import Problem
from rgd.torch.backends._extras import Extras
from rgd.torch.backends._formulas import check_labels
from rgd.torch.backends._registry import choose
from rgd.torch.linear._chunks import (
    ChunkedHead,
    Gradients,
    Wanted,
    gradients_in_chunks,
    in_one_pass,
    losses_in_chunks,
)
from rgd.torch.linear._rows import as_rows, chunked, measure_of_targets

_WANTED = "bool want_input, bool want_weight, bool want_bias"
define({
    "linear_one_pass": f"({PROBLEM}, {_WANTED}, Tensor norm, str kind, Tensor numbers) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "linear_losses": f"({PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "linear_products": f"({PROBLEM}, {_WANTED}, Tensor values, Tensor factors, Tensor? z_factors) -> Tensor",
    "linear_gradients": f"({PROBLEM}, {_WANTED}, Tensor factors, Tensor? z_factors) "
    "-> (Tensor, Tensor, Tensor)",
})  # fmt: skip
_one_pass: Any = torch.ops.rgd.linear_one_pass.default
_losses: Any = torch.ops.rgd.linear_losses.default
_products: Any = torch.ops.rgd.linear_products.default
_gradients: Any = torch.ops.rgd.linear_gradients.default


def one_pass(
    problem: Problem, wanted: Wanted, norm: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Extras]:
    """Objective, losses, weights and extras, by one pass that leaves the gradients for backward."""
    objective, losses, weights, _, _, _, *extras = _one_pass(
        *flattened(problem), *wanted, norm, plan.kind, plan.numbers
    )
    return objective, losses, weights, extras_by_name(problem, extras)


def losses(problem: Problem) -> tuple[Tensor, Tensor | None, Extras]:
    """The loss of each row, with a z-loss the logsumexp of its logits, and the extras that are wanted."""
    losses, logsumexp, *extras = _losses(*flattened(problem))
    return losses, logsumexp if problem.options.z_loss else None, extras_by_name(problem, extras)


def products(
    problem: Problem, wanted: Wanted, values: Tensor, factors: Tensor, z_factors: Tensor | None
) -> Tensor:
    """What each row adds to the objective; the backward pass goes through the chunks."""
    return _products(*flattened(problem), *wanted, values, factors, z_factors)


def _read(given: tuple[Any, ...]) -> tuple[Problem, ChunkedHead]:
    """The problem of an operator, and its head."""
    problem = rebuilt(given)
    # The call could not check them: values cannot be read while a graph is compiled.
    check_labels(problem)
    backend = choose(problem.tensors())
    by_class = {
        name: None if one is None else one.detach().contiguous()
        for name, one in (("class_weight", problem.class_weight), ("adjustment", problem.adjustment))
    }
    problem = problem.changed(**by_class)
    return problem, chunked(problem, problem.logits.dtype, backend)


def _wanted(given: tuple[Any, ...]) -> Wanted:
    return Wanted(*given[LENGTH : LENGTH + 3])


def _filled(found: Gradients, problem: Problem) -> tuple[Tensor, ...]:
    """Gradients in the dtype and shape of their tensors; an empty tensor for one that is not wanted."""
    logits = problem.logits
    of_input, *others = (None if one is None else one.to(logits.dtype) for one in found)
    of_input = None if of_input is None else of_input.view(logits.shape)
    return tuple(or_empty(one, logits) for one in (of_input, *others))


def _fake_gradients(given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    problem = rebuilt(given)
    weight = cast("LinearHead", problem.head).weight
    shapes = (problem.logits.shape, weight.shape, weight.shape[:1])
    pairs = zip(shapes, _wanted(given), strict=True)
    return tuple(problem.logits.new_empty(shape if want else (0,)) for shape, want in pairs)


def _fake_losses(given: tuple[Any, ...]) -> Tensor:
    input = given[0]
    # torch.Size.numel would make the number of rows a constant of the graph.
    return input.new_empty((math.prod(input.shape[:-1]),), dtype=accumulator(input.dtype))


_KEY = "CompositeExplicitAutograd"


@library.impl("rgd::linear_one_pass", _KEY)
@torch.no_grad()
def _(*given: Any) -> tuple[Tensor, ...]:
    (problem, head), (norm, kind, numbers) = _read(given), given[LENGTH + 3 :]
    measure = measure_of_targets(problem, norm.dtype)
    measure = None if measure is None else as_rows(problem, measure, 0)
    weigher = Weigher(Plan.of_kernel(kind, numbers_of(numbers)))
    losses, weights, logsumexp, found, extras = in_one_pass(head, measure, norm, weigher, _wanted(given))
    objective = (norm.double() * weights.double() * losses.double()).masked_fill(norm * weights == 0, 0).sum()
    if logsumexp is not None:
        by_z = norm.double() * head.z_loss * logsumexp.double().square()
        objective = objective + by_z.masked_fill(norm == 0, 0).sum()
    of_rows = extras_in_order(extras, losses)
    return objective.to(losses.dtype), losses, weights, *_filled(found, problem), *of_rows


@register_fake("rgd::linear_one_pass")
def _(*given: Any) -> tuple[Tensor, ...]:
    losses = _fake_losses(given)
    of_rows = empty_extras(rebuilt(given), losses.shape, losses.dtype)
    return losses.new_empty(()), losses, torch.empty_like(losses), *_fake_gradients(given), *of_rows


@library.impl("rgd::linear_losses", _KEY)
@torch.no_grad()
def _(*given: Any) -> tuple[Tensor, ...]:
    losses, logsumexp, extras = losses_in_chunks(_read(given)[1])
    return losses, or_empty(logsumexp, losses), *extras_in_order(extras, losses)


@register_fake("rgd::linear_losses")
def _(*given: Any) -> tuple[Tensor, ...]:
    losses, problem = _fake_losses(given), rebuilt(given)
    logsumexp = torch.empty_like(losses) if problem.options.z_loss else losses.new_empty(0)
    return losses, logsumexp, *empty_extras(problem, losses.shape, losses.dtype)


@library.impl("rgd::linear_products", _KEY)
def _(*given: Any) -> Tensor:
    return given[LENGTH + 3].clone()


@register_fake("rgd::linear_products")
def _(*given: Any) -> Tensor:
    return _fake_losses(given)


@library.impl("rgd::linear_gradients", _KEY)
@torch.no_grad()
def _(*given: Any) -> tuple[Tensor, ...]:
    problem, head = _read(given)
    factors, z_factors = given[LENGTH + 3 :]
    return _filled(gradients_in_chunks(head, factors, z_factors, _wanted(given)), problem)


@register_fake("rgd::linear_gradients")
def _(*given: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(given)


# --- the gradients of the operators ---

# The places of input, weight and bias among the arguments.
_INPUT, _WEIGHT, _BIAS = 0, 6, 7


def _in_places(found: Any, length: int) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * length
    gradients[_INPUT], gradients[_WEIGHT], gradients[_BIAS] = found
    return tuple(gradients)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, losses, weights, *others = output
    ctx.save_for_backward(*others[:3])
    ctx.wanted, ctx.length = _wanted(inputs), len(inputs)
    ctx.mark_non_differentiable(losses, weights, *others)


def _scaled(ctx: Any, above: Tensor, *_: Any) -> tuple[Any, ...]:
    pairs = zip(ctx.saved_tensors, ctx.wanted, strict=True)
    return _in_places([one * above.to(one.dtype) if want else None for one, want in pairs], ctx.length)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    problem = rebuilt(inputs)
    ctx.save_for_backward(*inputs[LENGTH + 4 :], *problem.tensors())
    ctx.problem = problem.without_tensors()
    ctx.wanted, ctx.length = _wanted(inputs), len(inputs)


def _by_a_pass(ctx: Any, above: Tensor) -> tuple[Any, ...]:
    factors, z_factors, *tensors = ctx.saved_tensors
    factors = torch.where(factors == 0, 0, factors * above)
    z_factors = None if z_factors is None else torch.where(z_factors == 0, 0, z_factors * above)
    problem = ctx.problem.with_tensors(tensors)
    found = _gradients(*flattened(problem), *ctx.wanted, factors, z_factors)
    pairs = zip(found, ctx.wanted, strict=True)
    return _in_places([one if want else None for one, want in pairs], ctx.length)


library.register_autograd("rgd::linear_one_pass", _scaled, setup_context=_keep_gradients)
library.register_autograd("rgd::linear_products", _by_a_pass, setup_context=_keep_inputs)
