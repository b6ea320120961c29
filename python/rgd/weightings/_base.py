"""The base class of every weighting: what a member is, and how the fronts call it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import operator
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

from rgd.weightings._batch import Batch

Kernel = tuple[str, tuple[float, ...]]
"""The name of a Rust kernel and the numbers it takes."""


class Weighting:
    """What turns the losses of a batch into weights.

    A weighting is a frozen dataclass that defines `weights(batch)`. The formula is written once, in the
    operations of the Python array API (`batch.xp`), and then works in NumPy, in torch on every device,
    compiled and vmapped, and in JAX under its transformations. Numbers of the dataclass enter the formula in
    arithmetic, as `self.power * batch.losses`: under a transformation they may be traced, so no `if` may
    depend on them.

    A weighting that remembers defines `init()` and `step(batch, state)` instead of `weights`.

    Attributes:
        pointwise: Whether each weight depends on its own loss alone. Then no batch is gathered from other
            processes, and micro-batches change nothing.
        mean_one: Whether the weights average to one over the batch. A promise that
            `rgd.testing.check_weighting` tests; nothing is normalised by it.
        clip: The loss from which on a weight no longer changes; infinite where there is none. It is used by
            the statistics.
        kernel_counts: Whether `kernel` is defined in the class that defines `weights`; set for each subclass.
        settings: The names of the numbers that are checked, and their ranges; set for each subclass.

    Example:
        >>> import dataclasses, numpy as np, rgd
        >>> @dataclasses.dataclass(frozen=True)
        ... class Softer(rgd.Weighting):
        ...     power: float = 0.5
        ...     pointwise = True
        ...     def weights(self, batch):
        ...         return (1 + batch.losses) ** self.power
        >>> rgd.sample_weights(np.array([0.0, 3.0]), Softer())
        array([1., 2.])
    """

    pointwise: ClassVar[bool] = False
    mean_one: ClassVar[bool] = False
    clip: ClassVar[float] = math.inf
    kernel_counts: ClassVar[bool] = False
    settings: ClassVar[tuple[tuple[str, Setting], ...]] = ()

    def weights(self, batch: Batch) -> Any:
        """The weights of a batch.

        Args:
            batch: The losses, shape (n,) with n > 0, and the sums that heed mask and base measure.

        Returns:
            Weights, shape (n,), of the losses' kind of array. What stands where a sample takes no part does
            not matter: fronts write 0 there.
        """
        name, steps = type(self).__name__, type(self).step is not Weighting.step
        if self.stateful is not steps:
            there, missing = ("step", "init(self)") if steps else ("init", "step(self, batch, state)")
            raise NotImplementedError(
                f"{name} defines {there}, and must define {missing} too: see rgd.Weighting"
            )
        if self.stateful:
            raise ValueError(f"the weights of {name} depend on its state: call step(batch, state)")
        raise NotImplementedError(f"{name} must define weights(self, batch)")

    def log_weights(self, batch: Batch) -> Any:
        """The logarithms of the weights; a member whose weights may overflow gives them by a formula."""
        return batch.xp.log(self.weights(batch))

    def kernel(self) -> Kernel | None:
        """The Rust kernel that computes the same weights, by name, and its numbers; None where there is none.

        It counts only in the class that defines `weights`: a subclass that changes the formula must not
        inherit the kernel of another.
        """
        return None

    def numbers_fit(self) -> Any:
        """Whether traced numbers fit each other: True, or a traced bool. Others are checked when given."""
        return True

    def init(self) -> Any:
        """The state before the first batch: numbers or NumPy arrays, possibly nested in dicts and tuples."""
        return ()

    def step(self, batch: Batch, state: Any) -> tuple[Any, Any]:
        """The weights of a batch, and the state after it.

        Args:
            batch: As for `weights`.
            state: What `init` or the last `step` returned, as arrays of the losses' kind.

        Returns:
            Weights, shape (n,), and the new state, of the same structure and shapes.
        """
        return self.weights(batch), state

    @property
    def stateful(self) -> bool:
        """Whether this weighting remembers earlier batches."""
        return type(self).init is not Weighting.init

    def __post_init__(self) -> None:
        for name, check in self.settings:
            object.__setattr__(self, name, check.read(name, getattr(self, name)))

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name in inspect.get_annotations(cls):
            if name in _reserved():
                raise TypeError(
                    f"a field of {cls.__name__} is named {name!r}, which rgd.Weighting uses: rename it"
                )
        owners = [next(kind for kind in cls.__mro__ if name in vars(kind)) for name in ("kernel", "weights")]
        cls.kernel_counts = owners[0] is owners[1]
        # The fields of a dataclass are still class attributes here. Their metadata is read now, and not when
        # a weighting is made: that may be within a compiled graph.
        for name, field in list(vars(cls).items()):
            if isinstance(field, dataclasses.Field):
                check = cast("Setting | None", field.metadata.get("setting"))
                cls.settings += () if check is None else ((name, check),)
        for observe in _observers:
            observe(cls)


class Setting(NamedTuple):
    """What a number of a weighting may be: kept in the metadata of its dataclass field.

    Attributes:
        says: How a message names it, as "a positive number".
        holds: The test, in operations that work on a float and on a traced number.
        optional: Whether None is allowed.
        alternative: What a message adds about other values.
    """

    says: str
    holds: Callable[[Any], Any]
    optional: bool = False
    alternative: str = ""

    def read(self, name: str, value: Any) -> Any:
        """The value as a float, checked where it can be read; a JAX array or traced value as it is."""
        if value is None and self.optional:
            return None
        array: Any = value
        if _is_jax(value):
            if str(array.dtype).endswith("bool"):
                raise TypeError(f"{name} must be a number, got an array of dtype {array.dtype}")
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        else:
            value = float(value)
        for number in readable(value):
            if not self.holds(number):
                raise ValueError(f"{name} must be {self.says}{self.alternative}, got {number}")
        return value


def setting(
    says: str,
    holds: Callable[[Any], Any],
    *,
    default: Any = dataclasses.MISSING,
    optional: bool = False,
    alternative: str = "",
) -> Any:
    """A dataclass field that holds a number within a range; arguments as for `Setting`."""
    metadata = {"setting": Setting(says, holds, optional, alternative)}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def is_array(value: Any) -> bool:
    """Whether a setting is an array of JAX or torch, traced perhaps, in place of a Python number."""
    # torch is asked first: torch.compile can trace an isinstance of torch.Tensor, and not one of jax.Array.
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ())) or _is_jax(value)


def _is_jax(value: Any) -> bool:
    # No JAX array exists before jax is imported, and this package must not import it.
    return isinstance(value, getattr(sys.modules.get("jax"), "Array", ()))


def readable(value: Any) -> list[float]:
    """The numbers of a setting that can be read now; of a traced one, or of None, there is none."""
    if value is None:
        return []
    if not _is_jax(value):
        return [value]
    if isinstance(value, sys.modules["jax"].core.Tracer):
        return []
    return [float(number) for number in value.reshape(-1)]


def holds_everywhere(weighting: Weighting) -> Any:
    """Whether every traced number of a weighting is allowed: True, or a traced bool.

    A number that can be read was checked at construction.
    """
    allowed: Any = weighting.numbers_fit()
    for field in fields(weighting):
        inner = getattr(weighting, field.name)
        if isinstance(inner, Weighting):
            allowed = allowed & holds_everywhere(inner)
    for name, check in weighting.settings:
        value = getattr(weighting, name)
        if is_array(value):
            allowed = allowed & check.holds(value)
    return allowed


def resolve_weighting(weighting: Any, tau: Any = None) -> Weighting:
    """The weighting a caller asked for by `weighting=`, or by `tau=`, its short form.

    Args:
        weighting: A weighting, or None.
        tau: Clipping factor of `KL(tau)`, or None. With neither given: `KL(tau=1.0)`.

    Raises:
        ValueError: If both are given.
        TypeError: If `weighting` is not a weighting.
    """
    if weighting is None:
        from rgd.weightings.kl import KL  # noqa: PLC0415 - a member; the base knows none but the default

        return KL(tau)
    if tau is not None:
        raise ValueError("give tau or weighting, not both: tau=t is short for weighting=rgd.KL(tau=t)")
    if isinstance(weighting, Weighting):
        return weighting
    if isinstance(weighting, type):
        raise TypeError(
            f"weighting must be an instance of rgd.Weighting, got the class {weighting.__name__}: "
            f"call it, as in {weighting.__name__}(...)"
        )
    hint = f": did you mean tau={weighting!r}?" if isinstance(weighting, (int, float)) else ""
    raise TypeError(f"weighting must be an rgd.Weighting, such as rgd.KL(tau=1.0), got {weighting!r}{hint}")


def refuse_more_than_fields(weighting: Weighting) -> None:
    """Refuse a weighting that keeps a value beside its fields: a schedule or a trace would not change it."""
    extra = set(getattr(weighting, "__dict__", ())) - {field.name for field in fields(weighting)}
    if extra:
        name = type(weighting).__name__
        raise TypeError(
            f"{name} keeps {', '.join(sorted(extra))} beside its dataclass fields, which would not follow "
            f"when a number is scheduled or traced: make {name} a frozen dataclass whose fields are all it "
            "has, and compute the rest in weights(batch)"
        )


def kernel_of(weighting: Weighting) -> Kernel | None:
    """`weighting.kernel()`, if the class that defines its weights is the one that defines the kernel."""
    return weighting.kernel() if weighting.kernel_counts and not weighting.stateful else None


def weigh(weighting: Weighting, batch: Batch, state: Any = None) -> tuple[Any, Any]:
    """The weights of a batch with losses, and the state after it: how every front calls a member.

    Args:
        weighting: The member.
        batch: Its losses, at least one.
        state: Its state, as arrays of the losses' kind; None for a member that keeps none.

    Returns:
        Weights, shape (n,), 0 where a sample takes no part, and the state. The state is as it was where no
        sample takes part, or a loss that takes part is not finite.

    Raises:
        ValueError: If the member returns weights of another shape than the losses'.
    """
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
    """The first part of a state whose place another cannot take, and that other; None where all fit."""
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
    """0 for a truth value, 1 for an integer, 2 for a real number: a leaf of a lower rank would cut it."""
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
    """Refuse a call without the state that a weighting needs, with one that it does not, or with another's.

    Args:
        weighting: The weighting.
        state: What the caller gave.
        readable: Whether shapes and kinds can be compared now, and not in a graph that is being compiled.
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


def map_numbers(weighting: Weighting, function: Callable[[Any], Any]) -> Weighting:
    """The weighting with `function` of each of its numbers in their place; nothing is checked.

    Numbers are the fields that `numbers_of` names, of nested weightings too. None stays None.
    """
    refuse_more_than_fields(weighting)
    copy = object.__new__(type(weighting))
    names = numbers_of(type(weighting))
    for field in fields(weighting):
        value = getattr(weighting, field.name)
        if isinstance(value, Weighting):
            value = map_numbers(value, function)
        elif field.name in names and value is not None:
            value = function(value)
        object.__setattr__(copy, field.name, value)
    return copy


def fields(weighting: Weighting | type) -> tuple[dataclasses.Field[Any], ...]:
    """The dataclass fields of a weighting; none where its class is no dataclass."""
    return dataclasses.fields(cast("Any", weighting)) if dataclasses.is_dataclass(weighting) else ()


@functools.cache
def numbers_of(kind: type) -> frozenset[str]:
    """The names of the fields of a weighting that hold a real number, or arrays of them.

    They are those annotated with `float`; bool, int, str and the like are part of what a weighting is, and
    not numbers that a schedule changes.
    """
    found: set[str] = set()
    for field in fields(kind):
        hint = _hint(kind, field.type)
        parts = typing.get_args(hint) if _is_union(hint) else (hint,)
        if float in parts or "setting" in field.metadata:
            found.add(field.name)
    return frozenset(found)


def _hint(kind: type, annotation: Any) -> Any:
    """What an annotation stands for, read on its own: a name that another one uses may not be known here."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, {**vars(typing), **vars(sys.modules[kind.__module__])})
    except Exception:
        spelled = annotation.replace(" ", "").removeprefix("typing.")
        return float if spelled in ("float", "float|None", "None|float", "Optional[float]") else annotation


def observe_subclasses(observe: Callable[[type[Weighting]], None]) -> None:
    """Call `observe` with every subclass of `Weighting`, those that are defined later too."""
    _observers.append(observe)
    pending = Weighting.__subclasses__()
    while pending:
        kind = pending.pop()
        observe(kind)
        pending += kind.__subclasses__()


_observers: list[Callable[[type[Weighting]], None]] = []


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _shape(weights: Any) -> Any:
    return tuple(weights.shape) if hasattr(weights, "shape") else type(weights).__name__


def _reserved() -> set[str]:
    """What a field of a weighting must not be called: the methods and what is set for each subclass."""
    return {name for name in vars(Weighting) if not name.startswith("_")} - {"pointwise", "mean_one", "clip"}
