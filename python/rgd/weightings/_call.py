"""How the fronts call a weighting: its arguments, its kernel, its weights and its state."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

from rgd.weightings._base import Kernel, Weighting, by_kernel
from rgd.weightings._batch import Batch
from rgd.weightings._fields import needs_of, nested
from rgd.weightings.kl import KL


def resolve_weighting(weighting: Any, tau: Any = None, scale: Any = None) -> Weighting:
    """The weighting that a caller gave by `weighting=`, or by the short form, `tau=` and `scale=`.

    Args:
        weighting: A weighting, or None.
        tau: Clipping factor of `KL(tau, scale=scale)`, or None: `KL` then chooses it.
        scale: Scaling factor of `KL(tau, scale=scale)`, or None: `KL` then chooses it. With all three None:
            `KL(tau=1.0)`.

    Raises:
        ValueError: If `weighting` and `tau` or `scale` are given, or `KL` refuses the numbers.
        TypeError: If `weighting` is not a weighting.
    """
    if weighting is None:
        return KL(tau, scale=scale)
    for name, value in (("tau", tau), ("scale", scale)):
        if value is not None:
            raise ValueError(
                f"give {name} or weighting, not both: {name}=x is short for weighting=rgd.KL({name}=x)"
            )
    if isinstance(weighting, Weighting):
        return weighting
    if isinstance(weighting, type):
        raise TypeError(
            f"weighting must be an instance of rgd.Weighting, got the class {weighting.__name__}: "
            f"call it, as in {weighting.__name__}(...)"
        )
    hint = ""
    if isinstance(weighting, (int, float)):
        hint = f": did you mean {'tau' if weighting > 0 else 'scale'}={weighting!r}?"
    raise TypeError(f"weighting must be an rgd.Weighting, such as rgd.KL(tau=1.0), got {weighting!r}{hint}")


def kernel_of(weighting: Weighting) -> Kernel | None:
    """`weighting.kernel()`, if the class that defines its weights is the one that defines the kernel."""
    return weighting.kernel() if weighting.kernel_counts and not weighting.stateful else None


def step_kernel_of(weighting: Weighting) -> Kernel | None:
    """The same for a weighting that remembers: the kernel of its step."""
    return weighting.kernel() if weighting.kernel_counts and weighting.stateful else None


def weighting_of(kernel: Kernel) -> Weighting:
    """The weighting of a kernel's name and numbers: the inverse of `kernel_of`, for the same weights."""
    name, numbers = kernel
    outer, _, inner = name.removesuffix(")").partition("(")
    kind: Any = by_kernel[outer]
    return kind.of_kernel(numbers, inner) if inner else kind.of_kernel(numbers)


def weigh(weighting: Any, batch: Batch, state: Any = None) -> tuple[Any, Any]:
    """The weights of a batch with losses, and the state after it. Every front calls a member by this.

    Args:
        weighting: The member; or a `ByKernel`, which computes its step by the kernel.
        batch: Its losses, at least one.
        state: Its state, as arrays of the losses' kind; None for a member that keeps none.

    Returns:
        Weights, shape (n,), 0 where a sample takes no part, and the state. The state does not change if no
        sample takes part, or if a loss that takes part is not finite.

    Raises:
        ValueError: If the member returns weights of another shape than the losses'.
    """
    if not isinstance(weighting, Weighting):
        return weighting.step(batch, state)
    if batch.entropy is None and "entropy" in weighting.needs:
        refuse_without_logits(weighting)
    xp = batch.xp
    if not weighting.stateful:
        weights = weighting.weights(batch)
    else:
        name, result = type(weighting).__name__, cast("Any", weighting.step(batch, state))
        if not (isinstance(result, tuple) and len(cast("Any", result)) == 2):
            raise TypeError(
                f"{name}.step must return the weights and the new state, as in return weights, state"
            )
        weights, new = cast("Any", result)
        check_new_state(name, state, new)
        usable = (batch.count > 0) & ~batch.any(~xp.isfinite(batch.losses))

        def keep(before: Any, after: Any) -> Any:
            return xp.astype(xp.where(usable, after, before), before.dtype)

        state = map_state(keep, state, new)
    if getattr(weights, "shape", None) != batch.losses.shape:
        raise ValueError(
            f"{type(weighting).__name__}.weights must return one weight for each loss, shape "
            f"{tuple(batch.losses.shape)}, got {_shape(weights)}"
        )
    return batch.only(weights), state


def refuse_without_logits(weighting: Weighting, instead: str = "") -> None:
    """Refuse a weighting that reads the entropy of the logits, where there are losses alone.

    Args:
        weighting: The weighting.
        instead: What to do; empty for the functions that have logits.
    """
    for one in (weighting, *nested(weighting)):
        if "entropy" in one.needs:
            calls = (
                "call cross_entropy or linear_cross_entropy of rgd.torch or rgd.jax, or RGDLoss without base"
            )
            raise ValueError(
                f"{type(one).__name__} reads the entropy of the logits, which losses alone do not have: "
                f"{instead or calls}"
            )


def check_reference_is_read(weighting: Weighting) -> None:
    """Refuse the losses of a reference model if no part of the weighting uses them."""
    if "reference" not in needs_of(weighting):
        raise ValueError(
            f"reference holds the losses that rgd.Excess compares with, and {weighting} looks at none: give "
            f"weighting=rgd.Excess({weighting}), or leave reference out"
        )


def check_reference_is_given(weighting: Weighting, reference: Any) -> None:
    """Refuse a call without the losses of a reference model if the weighting needs them."""
    if reference is None and "reference" in needs_of(weighting):
        raise ValueError(
            f"{weighting} compares losses with those of a reference model: give reference= with the losses, "
            "of their shape"
        )


def check_new_state(name: str, old: Any, new: Any) -> None:
    """Refuse a state of another structure, shapes or kind of number than before."""
    misfit = _misfit(old, new, lambda before, after: after <= before)
    if misfit is None:
        return
    before, after = misfit
    if _shape_of(before) == _shape_of(after) and not _has_parts(after):
        raise TypeError(
            f"{name}.init begins with {_kind_of(before)}, and {name}.step returns {_kind_of(after)} in its "
            "place, which would be cut: begin with a number of that kind in init(), such as 0.0"
        )
    raise ValueError(
        f"{name}.step must return a state of the structure and shapes that init() has, got {_brief(after)} "
        f"in the place of {_brief(before)}"
    )


def _misfit(old: Any, new: Any, ranks_fit: Callable[[int, int], bool]) -> tuple[Any, Any] | None:
    """The first part of the old state that the new one cannot replace, with the new part; None if all fit."""
    if isinstance(old, dict):
        keys = cast("dict[Any, Any]", old).keys()
        if not isinstance(new, dict) or cast("dict[Any, Any]", new).keys() != keys:
            return cast("Any", (old, new))
        parts: Any = [(old[key], new[key]) for key in keys]
    elif isinstance(old, (tuple, list)):
        if not isinstance(new, (tuple, list)) or len(cast("Any", new)) != len(cast("Any", old)):
            return cast("Any", (old, new))
        parts = list(zip(cast("Any", old), cast("Any", new), strict=True))
    else:
        fits = not _has_parts(new) and _shape_of(new) == _shape_of(old) and ranks_fit(_rank(old), _rank(new))
        return None if fits else (old, new)
    for before, after in parts:
        found = _misfit(before, after, ranks_fit)
        if found is not None:
            return found
    return None


def _has_parts(state: Any) -> bool:
    return isinstance(state, (dict, tuple, list))


def _shape_of(leaf: Any) -> tuple[int, ...]:
    return tuple(getattr(leaf, "shape", ()))


def _rank(leaf: Any) -> int:
    """0 for a bool, 1 for an integer, 2 for a real number. A leaf of a lower rank would truncate a number."""
    return ("truth values", "an integer", "a real number").index(_kind_of(leaf))


def _kind_of(leaf: Any) -> str:
    dtype = str(getattr(leaf, "dtype", type(leaf).__name__))
    return "truth values" if "bool" in dtype else "an integer" if "int" in dtype else "a real number"


def _brief(state: Any) -> str:
    if isinstance(state, dict):
        return f"a dict of {sorted(map(str, cast('dict[Any, Any]', state)))}"
    if isinstance(state, (tuple, list)):
        return f"a {type(cast('Any', state)).__name__} of {len(cast('Any', state))}"
    return f"shape {tuple(getattr(state, 'shape', ()))}"


def require_state(weighting: Weighting, state: Any, *, readable: bool = True) -> None:
    """Refuse a call without a state if the weighting needs one, and a state that does not fit the weighting.

    Args:
        weighting: The weighting.
        state: The caller's argument.
        readable: Whether shapes and kinds can be compared; False in a graph that is being compiled.
    """
    name = type(weighting).__name__
    if weighting.stateful and state is None:
        raise ValueError(
            f"{name} remembers earlier batches: start with state = weighting.init(), pass state=state, and "
            "keep the state that comes back: result, state = ...(..., state=state). "
            "rgd.torch.RGDLoss and RGD keep it themselves"
        )
    if state is None:
        return
    if not weighting.stateful:
        raise ValueError(f"{name} keeps no state: leave state out")
    misfit = _misfit(weighting.init(), state, operator.eq) if readable else None
    if misfit is not None:
        expected, given = misfit
        what = _brief(expected), _brief(given)
        what = what if what[0] != what[1] else (_kind_of(expected), _kind_of(given))
        raise ValueError(
            f"state is not one of {name}: begin with state = weighting.init() and pass on what the last call "
            f"returned; expected {what[0]}, got {what[1]}"
        )


def map_state(function: Callable[..., Any], *states: Any) -> Any:
    """`function` of the leaves of one or more states of equal structure, in that structure."""
    first: Any = states[0]
    if isinstance(first, dict):
        return {key: map_state(function, *(s[key] for s in states)) for key in cast("dict[str, Any]", first)}
    if isinstance(first, (tuple, list)):
        sequence: Any = cast("Any", first)
        kind: Any = sequence.__class__
        parts = [map_state(function, *part) for part in zip(*states, strict=True)]
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    return function(*states)


def _shape(weights: Any) -> Any:
    return tuple(weights.shape) if hasattr(weights, "shape") else type(weights).__name__
