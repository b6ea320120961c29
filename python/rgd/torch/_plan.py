"""A weighting made ready for torch: its kernel and its numbers as data, and its use in one call."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, cast

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor

from rgd import _rgd
from rgd._arrays import power_of
from rgd._by_kernel import ByKernel
from rgd.torch._distributed import Sync, gather
from rgd.torch._dtypes import accumulator, wide
from rgd.torch._modes import is_exporting, values_can_be_read
from rgd.torch._state import Memory
from rgd.weightings import Batch, Weighting
from rgd.weightings._base import Kernel
from rgd.weightings._call import kernel_of, resolve_weighting, step_kernel_of, weigh, weighting_of
from rgd.weightings._fields import fields, map_numbers, needs_of, numbers_of


class Plan:
    """A weighting, and values computed once from it for all calls.

    A compiled graph must not be compiled again when a schedule changes a number. So it reads the numbers from
    tensors, `numbers` and those in `live`, which stay the same objects as long as only numbers change. They
    are on the CPU for any default device, with a copy on each device that was prepared.

    Attributes:
        weighting: As given, its numbers Python floats.
        kernel: The name of its Rust kernel and the kernel's numbers, or None.
        kind: The kernel's name, or None.
        numbers: The kernel's numbers, float64 on the CPU, or None.
        live: The weighting with each number a 0-d float64 tensor on the CPU.
        pointwise: `weighting.pointwise`.
        stateful: `weighting.stateful`.
        needs_entropy: Whether the weighting reads the entropy of the logits.
        step_kernel: The same for a weighting that remembers, whose kernel computes a step; or None.
        repeated: Objects that a backend keeps from call to call, by the dtype of the losses.
    """

    def __init__(self, weighting: Weighting, kernel: Kernel | None = None) -> None:
        self.weighting = weighting
        self.kernel: Kernel | None = kernel_of(weighting) if kernel is None else kernel
        self.kind = None if self.kernel is None else self.kernel[0]
        self.pointwise = weighting.pointwise
        self.stateful = weighting.stateful
        self.needs_entropy = "entropy" in needs_of(weighting)
        self.step_kernel = step_kernel_of(weighting)
        self.repeated: dict[torch.dtype, Any] = {}
        self._numbers: Tensor | None = None
        self._live: Weighting | None = None
        self._live_on: dict[str, Weighting] = {}
        self._numbers_on: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the objects that backends keep."""
        return {**self.__dict__, "repeated": {}, "_numbers_on": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "step_kernel" not in state:  # pickled by a release without kernels of steps
            self.step_kernel, self.repeated = step_kernel_of(self.weighting), {}
        if "needs_entropy" not in state:  # of a release before there were extras
            self.needs_entropy = False
        self._numbers_on = {}

    @classmethod
    def of_kernel(cls, kind: str, numbers: tuple[float, ...]) -> Plan:
        """The plan of a kernel, from its name and numbers, which are all that an operator gets."""
        return cls(weighting_of((kind, numbers)), (kind, numbers))

    @property
    def numbers(self) -> Tensor | None:
        if self._numbers is None and self.kernel is not None:
            self._numbers = _as_tensor(self.kernel[1])
        return self._numbers

    @property
    def live(self) -> Weighting:
        if self._live is None:
            self._live = map_numbers(self.weighting, _as_tensor)
        return self._live

    def in_graphs(self, device: torch.device) -> Weighting:
        """The weighting that a compiled graph reads: `live`, or its copy on a device that was prepared."""
        if self._live is None:
            return self.weighting
        return self._live_on.get(str(device), self._live)

    def numbers_on(self, device: torch.device) -> Tensor | None:
        """`numbers` on a device: a copy that stays the same object, as they do. Copying does not wait."""
        numbers = self.numbers
        if numbers is None or device.type == "cpu":
            return numbers
        found = self._numbers_on.get(str(device))
        if found is None:
            found = numbers.to(device, non_blocking=True)
            # A tensor that a graph computes must not be kept after the graph.
            if not torch.compiler.is_compiling():
                self._numbers_on[str(device)] = found
        return found

    def prepare(self, device: torch.device | None = None) -> Plan:
        """Make the tensors now, outside of any compiled graph, also those on a device."""
        _ = self.numbers, self.live
        if device is not None and device.type not in ("cpu", "meta") and str(device) not in self._live_on:
            self._live_on[str(device)] = map_numbers(
                self.weighting, lambda number: _as_tensor(number, device)
            )
            if device.type == "cuda":
                self.numbers_on(device)
        return self

    def replaced(self, weighting: Weighting) -> Plan:
        """The plan of another weighting: this one's tensors with new values, if only numbers differ."""
        new = Plan(weighting)
        if new.kind != self.kind or not same_but_for_numbers(weighting, self.weighting):
            return new.prepare()
        with torch.no_grad():
            if self.numbers is not None and new.kernel is not None:
                new_numbers = _as_tensor(new.kernel[1])
                for numbers in (self.numbers, *self._numbers_on.values()):
                    numbers.copy_(new_numbers, non_blocking=True)
            for live in (self.live, *self._live_on.values()):
                _copy_numbers(weighting, live)
        new._numbers, new._live, new._live_on = self._numbers, self._live, self._live_on
        new._numbers_on = self._numbers_on
        return new


class _Last(threading.local):
    """The arguments of this thread's last call of `plan_of`, and its plan."""

    call: tuple[Any, Any, Any, Plan | None] = None, None, None, None


_last = _Last()


def plan_of(weighting: Any, tau: Any, scale: Any) -> Plan:
    """The plan of a function's arguments; the last plan, if the arguments are the same objects."""
    if torch.compiler.is_compiling():
        return Plan(resolve_weighting(weighting, tau, scale))
    of_weighting, of_tau, of_scale, plan = _last.call
    if plan is None or not (of_weighting is weighting and of_tau is tau and of_scale is scale):
        plan = Plan(resolve_weighting(weighting, tau, scale))
        _last.call = weighting, tau, scale, plan
    return plan


class OfLogits(NamedTuple):
    """What a call wanted of its logits beside the losses.

    Attributes:
        found: By name, each of the losses' shape.
        entropy: The mean entropy of each weight's unit, of the units' shape, where the weighting reads it.
        classes: How many classes the logits have.
    """

    found: dict[str, Tensor]
    entropy: Tensor | None
    classes: int


class Weigher:
    """Weights the losses of one call. It holds the plan, the groups, the state and the process group.

    Attributes:
        plan: The weighting, made ready.
        groups: The group of each weight's unit, integers of the units' shape, or None.
        state: The state before the call and, once `weigh` has run, after it; or the `Memory` of a module,
            which updates it; None for a weighting without state.
        group: The processes that share the batch, or None.
        power: The power of two that the base measure of the call was divided by.
        reference: The loss of a reference model for each weight's unit, of the units' shape, or None.
        extras: What the call wanted of the logits; None where it wanted nothing.
    """

    __slots__ = ("extras", "group", "groups", "plan", "power", "reference", "state")

    def __init__(
        self,
        plan: Plan,
        groups: Tensor | None = None,
        state: Any = None,
        sync: Sync | None = None,
        power: float = 1.0,
        *,
        reference: Tensor | None = None,
    ) -> None:
        self.plan = plan
        self.groups = groups
        self.reference = reference
        self.extras: OfLogits | None = None
        self.state = state
        self.power = power
        alone = sync is None or (plan.pointwise and not plan.stateful)
        self.group = None if alone else sync.group()  # pyright: ignore[reportOptionalMemberAccess]

    def weigh(self, losses: Tensor, measure: Tensor | None, *, by_kernel: bool = False) -> Tensor:
        """The weights of a batch by the weighting's formula; `state` is replaced by the state after it.

        Args:
            losses: Any shape, floating.
            measure: The base measure, of the losses' shape, 0 where a loss takes no part; None for ones.
            by_kernel: Whether a kernel that computes steps replaces the formula.

        Returns:
            Weights of the losses' shape, without grad; float64 for float64 losses, else float32.
        """
        dtype = wide(losses)
        flat = losses.detach().reshape(-1).to(dtype)
        p = None if measure is None else measure.detach().reshape(-1).to(dtype)
        if p is not None and self.group is None and power_of(self.power) == 1.0 != self.power:
            p = p * self.power  # a formula may use the scale of the measure: it gets the caller's numbers
        groups = None if self.groups is None else self.groups.reshape(-1)
        reference = None if self.reference is None else self.reference.reshape(-1).to(dtype)
        entropy = classes = None
        if self.extras is not None and self.extras.entropy is not None:
            entropy, classes = self.extras.entropy.reshape(-1).to(dtype), self.extras.classes
        beside = groups, reference, entropy
        given = tuple(one for one in (flat, p, *beside) if one is not None)
        own = slice(0, flat.shape[0])
        if self.group is not None:
            # Other processes may have divided by another power.
            vectors = [flat, torch.ones_like(flat) if p is None else p * self.power]
            vectors += [one for one in beside if one is not None]
            (flat, p, *rest), first = gather(vectors, self.group)
            groups, reference, entropy = (None if one is None else rest.pop(0) for one in beside)
            own = slice(first, first + own.stop)
        if flat.shape[0] == 0:
            return losses.detach().to(accumulator(losses.dtype))
        if (
            by_kernel
            and self.group is None
            and isinstance(self.state, Memory)
            and self._steps_by_kernel(flat)
        ):
            weights = self._step(flat, p, groups, given)
            return weights.reshape(losses.shape).to(accumulator(losses.dtype))
        exporting = torch.compiler.is_compiling() and is_exporting()
        concrete = values_can_be_read(flat)
        batch = Batch(
            flat, p, groups, xp=xp, concrete=concrete, any_size=exporting, reference=reference,
            entropy=entropy, classes=classes,
        )  # fmt: skip
        in_graph = torch.compiler.is_compiling() and not exporting
        weighting: Any = self.plan.in_graphs(flat.device) if in_graph else self.plan.weighting
        if by_kernel and self._steps_by_kernel(flat):
            kernel: Any = self.plan.step_kernel
            weighting = ByKernel(self.plan.weighting, kernel, torch.get_num_threads())
        if isinstance(self.state, Memory):
            weights = self.state.weigh(weighting, batch, given)
        else:
            weights, self.state = weigh(weighting, batch, self.state)
        return weights[own].reshape(losses.shape).to(accumulator(losses.dtype))

    def _steps_by_kernel(self, losses: Tensor) -> bool:
        # This test comes first: otherwise the kernel's numbers would become part of a compiled graph.
        return values_can_be_read(losses) and self.plan.step_kernel is not None

    def _step(
        self, losses: Tensor, measure: Tensor | None, groups: Tensor | None, given: tuple[Tensor, ...]
    ) -> Tensor:
        """The weights of float64 losses, (n,), by a kernel that updates the state of a module."""
        kind, numbers = cast("Kernel", self.plan.step_kernel)
        if groups is not None and groups.dtype not in {torch.int32, torch.int64}:
            groups = groups.long()
        weights = torch.empty_like(losses)

        def fill(leaves: list[Tensor]) -> None:
            threads = torch.get_num_threads()
            _rgd.sample_weights(losses, weights, kind, numbers, threads, measure, groups, leaves)

        self.state.step(fill, given)
        return weights

    @property
    def kernel_serves(self) -> bool:
        """Whether the kernel of the weighting computes the weights of this call."""
        return self.plan.kind is not None and self.group is None


def _as_tensor(numbers: Any, device: torch.device | str = "cpu") -> Tensor:
    narrow = torch.device(device).type == "mps"
    return torch.tensor(numbers, dtype=torch.float32 if narrow else torch.float64, device=device)


def _copy_numbers(source: Weighting, live: Weighting) -> None:
    for field in fields(source):
        value, target = getattr(source, field.name), getattr(live, field.name)
        if isinstance(value, Weighting):
            _copy_numbers(value, target)
        elif isinstance(target, Tensor):
            target.fill_(float(value))


def same_but_for_numbers(one: Any, other: Any) -> bool:
    """Whether two weightings, with nested ones, differ only in the values of their numbers."""
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
