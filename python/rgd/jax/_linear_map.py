"""A linear map with a transpose of its own: forward mode for functions that compute their own gradient.

`jax.custom_vjp` has no forward mode. With `jax.custom_jvp`, JAX derives the transpose of the tangents by
itself. If a rule computes its tangents by a `linear_map`, JAX uses the transpose that is given here instead.
"""

# Some types of jax are partly unknown to pyright.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

_primitive = Primitive("rgd_linear_map")
_primitive.multiple_results = True


def linear_map(
    forward: Callable[[Any, Any], Any], backward: Callable[[Any, Any], Any], constants: Any, moves: Any
) -> Any:
    """`forward(constants, moves)`, linear in `moves`.

    Args:
        forward: Of `jax.numpy`, without collectives. JAX differentiates it in the constants.
        backward: From the constants and cotangents of the results to cotangents of the moves, in any dtype.
        constants: A pytree of arrays.
        moves: A pytree of arrays.
    """
    leaves, structure = jax.tree_util.tree_flatten(constants)
    count = len(leaves)
    program, results = jax.make_jaxpr(forward, return_shape=True)(constants, moves)
    of_results = jax.tree_util.tree_structure(results)

    def flat_backward(*arguments: Any) -> list[Any]:
        cotangents = of_results.unflatten(arguments[count:])
        return jax.tree_util.tree_leaves(backward(structure.unflatten(arguments[:count]), cotangents))

    arguments = *leaves, *jax.tree_util.tree_leaves(moves)
    return of_results.unflatten(
        _primitive.bind(*arguments, forward=program, backward=flat_backward, count=count)
    )


def _computed(*arguments: Any, forward: Any, backward: Any, count: int) -> list[Any]:
    del backward, count
    return jaxpr_as_fun(forward)(*arguments)


def _shapes(*arguments: Any, forward: Any, backward: Any, count: int) -> list[Any]:
    del arguments, backward, count
    return forward.out_avals


def _transposed(
    cotangents: Sequence[Any], *arguments: Any, forward: Any, backward: Any, count: int
) -> list[Any]:
    del forward
    gradients = backward(*arguments[:count], *map(ad.instantiate_zeros, cotangents))
    return [None] * count + [
        gradient.astype(move.aval.dtype) if ad.is_undefined_primal(move) else None
        for gradient, move in zip(gradients, arguments[count:], strict=True)
    ]


def _differentiated(
    primals: Sequence[Any], tangents: Sequence[Any], *, forward: Any, backward: Any, count: int
) -> tuple[list[Any], list[Any]]:
    """The derivative: in the moves it is the map itself, in the constants JAX differentiates `forward`."""
    constants, moves = primals[:count], primals[count:]
    terms: list[list[Any]] = []

    def at(constants: Sequence[Any], moves: Sequence[Any]) -> list[Any]:
        return _primitive.bind(*constants, *moves, forward=forward, backward=backward, count=count)

    if any(type(tangent) is not ad.Zero for tangent in tangents[count:]):
        terms.append(at(constants, [ad.instantiate_zeros(tangent) for tangent in tangents[count:]]))
    if changed := [place for place in range(count) if type(tangents[place]) is not ad.Zero]:

        def of_changed(*values: Any) -> list[Any]:
            own = dict(zip(changed, values, strict=True))
            return jaxpr_as_fun(forward)(*(own.get(place, x) for place, x in enumerate(primals)))

        directions = [tangents[place] for place in changed]
        terms.append(jax.jvp(of_changed, [primals[place] for place in changed], directions)[1])
    return at(constants, moves), [sum(rest, first) for first, *rest in zip(*terms, strict=True)]


def _batched(
    arguments: Sequence[Any], axes: Sequence[int | None], *, forward: Any, backward: Any, count: int
) -> tuple[list[Any], list[int]]:
    """The batched map: all moves and results get the batch axis, so that all cotangents have it too."""
    size = next(x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None)
    constants, of_constants = arguments[:count], axes[:count]
    moves = [
        jnp.broadcast_to(move, (size, *move.shape)) if axis is None else jnp.moveaxis(move, axis, 0)
        for move, axis in zip(arguments[count:], axes[count:], strict=True)
    ]

    def mapped(function: Callable[..., Any], others: int) -> Callable[..., Any]:
        return jax.vmap(function, (*of_constants, *[0] * others), axis_size=size)

    outputs = len(forward.out_avals)
    program = jax.make_jaxpr(mapped(jaxpr_as_fun(forward), len(moves)))(*constants, *moves)
    results = _primitive.bind(
        *constants, *moves, forward=program, backward=mapped(backward, outputs), count=count
    )
    return results, [0] * outputs


_primitive.def_impl(_computed)
_primitive.def_abstract_eval(_shapes)
mlir.register_lowering(_primitive, mlir.lower_fun(_computed, multiple_results=True))
ad.primitive_transposes[_primitive] = _transposed
ad.primitive_jvps[_primitive] = _differentiated
batching.primitive_batchers[_primitive] = _batched
