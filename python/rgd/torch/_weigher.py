"""A weighting made ready for torch: its kernel, its numbers as data, its state; and its part in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rgd.torch._distributed import Sync
from rgd.weightings import KL, Weighting
from rgd.weightings._base import (
    Kernel,
    fields,
    kernel_of,
    map_numbers,
    map_state,
    numbers_of,
    require_state,
)


class Plan:
    """A weighting, and what a call needs of it, computed once.

    A compiled graph must not be compiled again when a schedule changes a number. So it reads the numbers from
    tensors, `numbers` and those in `live`, which stay the same objects as long as only numbers change.

    Attributes:
        weighting: As given, its numbers Python floats.
        kernel: Its Rust kernel and the numbers of that, or None.
        kind: The kernel's name, or None.
        numbers: The kernel's numbers, float64 on the CPU, or None.
        live: The weighting with each number a 0-d float64 tensor on the CPU.
        pointwise: `weighting.pointwise`.
        stateful: `weighting.stateful`.
    """

    def __init__(self, weighting: Weighting) -> None:
        self.weighting = weighting
        self.kernel: Kernel | None = kernel_of(weighting)
        self.kind = None if self.kernel is None else self.kernel[0]
        self.pointwise = weighting.pointwise
        self.stateful = weighting.stateful
        self._numbers: Tensor | None = None
        self._live: Weighting | None = None

    @property
    def numbers(self) -> Tensor | None:
        if self._numbers is None and self.kernel is not None:
            self._numbers = torch.tensor(self.kernel[1], dtype=torch.float64)
        return self._numbers

    @property
    def live(self) -> Weighting:
        if self._live is None:
            self._live = map_numbers(self.weighting, _as_tensor)
        return self._live

    @property
    def in_graphs(self) -> Weighting:
        """The weighting that a compiled graph reads: `live`, where the plan was prepared for one."""
        return self.weighting if self._live is None else self._live

    def prepare(self) -> Plan:
        """Make the tensors now, outside of any compiled graph."""
        _ = self.numbers, self.live
        return self

    def replaced(self, weighting: Weighting) -> Plan:
        """The plan of another weighting: this one's tensors with new values, if only numbers differ."""
        new = Plan(weighting)
        if new.kind != self.kind or not same_but_for_numbers(weighting, self.weighting):
            return new.prepare()
        with torch.no_grad():
            if self.numbers is not None and new.kernel is not None:
                self.numbers.copy_(torch.tensor(new.kernel[1], dtype=torch.float64))
            _copy_numbers(weighting, self.live)
        new._numbers, new._live = self._numbers, self._live
        return new


class KernelPlan(Plan):
    """The plan of the kernel "kl", known by its numbers alone, as an operator gets it."""

    def __init__(self, kernel: Kernel) -> None:
        tau, scale, _ = kernel[1]
        super().__init__(KL(tau, scale=scale))


class Weigher:
    """What weights the losses of one call: a plan, the groups, the state, and who shares the batch.

    Attributes:
        plan: The weighting, made ready.
        groups: The group of each weight's unit, integers of the units' shape, or None.
        state: The state before the call and, once `composite.weigh` has run, after it; None where none is
            kept.
        group: The processes that share the batch, or None.
        unit: What the base measure of the call is measured in.
    """

    __slots__ = ("group", "groups", "plan", "state", "unit")

    def __init__(
        self, plan: Plan, groups: Tensor | None = None, state: Any = None, sync: Sync | None = None
    ) -> None:
        self.plan = plan
        self.groups = groups
        self.state = state
        self.unit = 1.0
        alone = sync is None or (plan.pointwise and not plan.stateful)
        self.group = None if alone else sync.group()  # pyright: ignore[reportOptionalMemberAccess]

    def kernel_serves(self, base: Tensor | None) -> bool:
        """Whether the Rust kernel of the weighting computes the weights of this call."""
        plan = self.plan
        return plan.kind is not None and self.group is None and (base is None or plan.pointwise)


class WeightingState(nn.Module):
    """The state of a weighting as buffers: in checkpoints, moved with the module, broadcast by DDP.

    Buffers exist from construction. They stay as wide as they are under `.half()` and `.bfloat16()`.

    Args:
        weighting: The weighting whose `init()` gives the first state.
    """

    def __init__(self, weighting: Weighting) -> None:
        super().__init__()
        state = weighting.init()
        self._names = _named(state)

        def register(name: str, leaf: Any) -> None:
            array: Any = np.array(leaf)
            value: Any = torch.as_tensor(array)
            narrow = value.is_floating_point() and value.dtype.itemsize < 4
            self.register_buffer(name, value.float() if narrow else value)

        map_state(register, self._names, state)

    def read(self, device: torch.device) -> Any:
        """The state, its leaves copies of the buffers on a device."""
        # Copies: autograd or a caller may keep them, and the buffers are written to.

        def copied(name: str) -> Any:
            return getattr(self, name).to(device, copy=True)

        return map_state(copied, self._names)

    @torch.no_grad()
    def write(self, state: Any) -> None:
        """Take over the state after a batch."""

        def put(name: str, value: Any) -> None:
            # Not copy_: compiled by torch 2.8, it leaves a 0-d buffer as it was.
            getattr(self, name)[...] = value

        map_state(put, self._names, state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightingState:
        before = dict(self.named_buffers())
        apply: Any = cast("Any", super())._apply

        def in_float32(buffer: Tensor) -> Tensor:
            return fn(buffer.float() if buffer.is_floating_point() else buffer)

        try:
            apply(fn, recurse)
        except TypeError:  # a device without float64
            apply(in_float32, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                setattr(self, name, buffer.to(moved.device))
        return self


def functional_state(weighting: Weighting, state: Any, device: torch.device) -> Any:
    """The state given to a function, checked, as tensors."""
    require_state(weighting, state)
    if state is None:
        return None

    def as_tensor(leaf: Any) -> Tensor:
        # A Python float is as wide here as in a buffer of `WeightingState`, on devices that have float64.
        tensor = torch.as_tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None)
        narrow = device.type == "mps" and tensor.dtype is torch.float64
        return (tensor.float() if narrow else tensor).to(device)

    return map_state(as_tensor, state)


def _as_tensor(number: float) -> Tensor:
    return torch.tensor(float(number), dtype=torch.float64)


def _copy_numbers(source: Weighting, live: Weighting) -> None:
    for field in fields(source):
        value, target = getattr(source, field.name), getattr(live, field.name)
        if isinstance(value, Weighting):
            _copy_numbers(value, target)
        elif isinstance(target, Tensor):
            target.fill_(float(value))


def same_but_for_numbers(one: Any, other: Any) -> bool:
    """Whether two weightings, nested ones included, differ in the values of their numbers alone."""
    if one.__class__ is not other.__class__:
        return False
    numbers = numbers_of(one.__class__)
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Weighting) or isinstance(b, Weighting):
            if not same_but_for_numbers(a, b):
                return False
        elif field.name in numbers:
            if (a is None) != (b is None):
                return False
        elif a is not b and not bool(np.array_equal(a, b)):
            return False
    return True


def _named(state: Any) -> Any:
    """A state with a name for a buffer in the place of each leaf: its path, made fit for an attribute.

    Raises:
        ValueError: If two leaves would have one name.
    """
    paths: list[str] = []

    def named(part: Any, path: str) -> Any:
        if isinstance(part, dict):
            items = cast("dict[Any, Any]", part).items()
            return {key: named(inner, f"{path}_{key}" if path else str(key)) for key, inner in items}
        if isinstance(part, (tuple, list)):
            sequence: Any = cast("Any", part)
            inner = [named(each, f"{path or 'state'}_{i}") for i, each in enumerate(sequence)]
            return type(sequence)(*inner) if hasattr(sequence, "_fields") else type(sequence)(inner)
        name = (path or "state").replace(".", "_")
        # An attribute that every module has must stay what it is.
        name = f"{name}_" if hasattr(_MODULE, name) or name == "_names" else name
        if name in paths:
            raise ValueError(f"two numbers of the state would be the buffer {name!r}: rename a key of init()")
        paths.append(name)
        return name

    return named(state, "")


_MODULE = nn.Module()
