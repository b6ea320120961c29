"""The protocol: the base class of every weighting, and the numbers that it may have."""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

from rgd.weightings._batch import Batch

Kernel = tuple[str, tuple[float, ...]]
"""The name of a Rust kernel and the numbers it takes."""


class Weighting:
    """The base class of weightings, which turn the losses of a batch into weights.

    A weighting is a frozen dataclass that defines `weights(batch)`. The formula is written once, in the
    operations of the Python array API (`batch.xp`), and then works in NumPy, in torch on every device,
    compiled and vmapped, and in JAX under its transformations. Numbers of the dataclass enter the formula in
    arithmetic, as `self.power * batch.losses`: under a transformation they may be traced, so no `if` may
    depend on them.

    A weighting that remembers defines `init()` and `step(batch, state)` instead of `weights`.

    Attributes:
        pointwise: Whether each weight depends on its own loss alone. Then no batch is gathered from other
            processes, and micro-batches change nothing.
        mean_one: Whether the weights average to one over the batch. `rgd.testing.check_weighting` tests this;
            it does not normalise the weights.
        clip: The loss above which a weight no longer changes; infinite if there is none. Only the statistics
            use it.
        is_plain: Whether every weight is 1, as in plain training.
        needs: The attributes of a batch that the formula reads and not every call has: "reference", or
            "entropy", the entropy of the logits of each loss, with `batch.classes`, the number of classes. A
            call without them raises.
        kernel_name: The name of the Rust kernel whose numbers `of_kernel` reads.
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
    is_plain: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    kernel_name: ClassVar[str] = ""
    kernel_counts: ClassVar[bool] = False
    settings: ClassVar[tuple[tuple[str, Setting], ...]] = ()

    def weights(self, batch: Batch) -> Any:
        """The weights of a batch.

        Args:
            batch: The losses, shape (n,) with n > 0, and sums over them that use mask and measure.

        Returns:
            Weights, shape (n,), of the losses' kind of array. For samples that take no part they may be any
            number: fronts write 0 there.
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
        """The logarithms of the weights. A member whose weights may overflow overrides it with a formula."""
        return batch.xp.log(self.weights(batch))

    def kernel(self) -> Kernel | None:
        """The name of the Rust kernel that computes the same weights, and its numbers; None if there is none.

        It counts only in the class that defines `weights` or `step`, so that a subclass that changes the
        formula does not use its parent's kernel.
        """
        return None

    @classmethod
    def of_kernel(cls, numbers: tuple[float, ...]) -> Weighting:
        """The weighting whose `kernel` returns these numbers, for compiled graphs, which know only them."""
        raise NotImplementedError(f"{cls.__name__} must define of_kernel(cls, numbers) beside kernel_name")

    def numbers_fit(self) -> Any:
        """Whether traced numbers fit each other: True, or a traced bool. Known ones are checked before."""
        return True

    def init(self) -> Any:
        """The state before the first batch: numbers or NumPy arrays, possibly nested in dicts and tuples."""
        return ()

    def step(self, batch: Batch, state: Any) -> tuple[Any, Any]:
        """The weights of a batch, and the state after it.

        Args:
            batch: As for `weights`.
            state: The state from `init` or from the last `step`, as arrays of the losses' kind.

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
        needs: Any = cls.needs
        known = isinstance(needs, tuple) and {"entropy", "reference"}.issuperset(cast("Any", needs))
        if not (known or isinstance(needs, property)):
            raise TypeError(
                f"needs of {cls.__name__} must be a tuple of names out of 'entropy' and 'reference', got "
                f"{needs!r}"
            )
        formula = next(kind for kind in cls.__mro__ if "weights" in vars(kind) or "step" in vars(kind))
        cls.kernel_counts = next(kind for kind in cls.__mro__ if "kernel" in vars(kind)) is formula
        if "kernel_name" in vars(cls):
            by_kernel[cls.kernel_name] = cls
        # The fields of a dataclass are still class attributes here. Their metadata is read now, since a
        # weighting may be made within a compiled graph.
        for name, field in list(vars(cls).items()):
            if isinstance(field, dataclasses.Field):
                check = cast("Setting | None", field.metadata.get("setting"))
                cls.settings += () if check is None else ((name, check),)
        for observe in _observers:
            observe(cls)


class Setting(NamedTuple):
    """The allowed range of a number of a weighting, kept in the metadata of its dataclass field.

    Attributes:
        says: The words for the range in a message, such as "a positive number".
        holds: The test, in operations that work on a float and on a traced number.
        optional: Whether None is allowed.
        alternative: A hint for other values that a message adds.
    """

    says: str
    holds: Callable[[Any], Any]
    optional: bool = False
    alternative: str = ""

    def read(self, name: str, value: Any) -> Any:
        """The value as a float, checked if it can be read; a JAX array or traced value unchanged."""
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
    """Whether a setting is an array of JAX or torch, possibly traced, and not a Python number."""
    # Check for torch first: torch.compile can trace an isinstance of torch.Tensor, but not of jax.Array.
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ())) or _is_jax(value)


def _is_jax(value: Any) -> bool:
    # Without jax in sys.modules there is no JAX array, and this package must not import jax.
    return isinstance(value, getattr(sys.modules.get("jax"), "Array", ()))


def readable(value: Any) -> list[float]:
    """The numbers of a setting that can be read now; none for a traced setting or for None."""
    if value is None:
        return []
    if not _is_jax(value):
        return [value]
    if isinstance(value, sys.modules["jax"].core.Tracer):
        return []
    return [float(number) for number in value.reshape(-1)]


def observe_subclasses(observe: Callable[[type[Weighting]], None]) -> None:
    """Call `observe` with every subclass of `Weighting`, also with those that are defined later."""
    _observers.append(observe)
    pending = Weighting.__subclasses__()
    while pending:
        kind = pending.pop()
        observe(kind)
        pending += kind.__subclasses__()


_observers: list[Callable[[type[Weighting]], None]] = []
by_kernel: dict[str, type[Weighting]] = {}
"""The classes whose `of_kernel` reads the numbers of a kernel, by its name."""


def _reserved() -> set[str]:
    """The names that a field of a weighting must not have: methods, and attributes set for each subclass."""
    return {name for name in vars(Weighting) if not name.startswith("_")} - {"pointwise", "mean_one", "clip"}
