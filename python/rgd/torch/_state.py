"""The state of a weighting between batches, in the buffers of a module or as an argument of a function."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from rgd.torch._modes import graph_is_kept, is_exporting, may_be_recomputed, recomputes
from rgd.weightings import Weighting
from rgd.weightings._batch import Batch
from rgd.weightings._call import map_state, require_state, weigh
from rgd.weightings._fields import fields

# Guards states and totals of all modules, so that calls from several threads count once each. One lock for
# all: it is held for a few operations on n numbers, and a module with a lock of its own could not be copied.
_lock = threading.RLock()


def _new_lock() -> None:
    global _lock  # noqa: PLW0603
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def one_at_a_time() -> contextlib.AbstractContextManager[Any]:
    """A context in which one thread at a time updates states and totals. A compiled graph takes no lock."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _lock


class _Past(NamedTuple):
    """A call whose forward pass may be repeated in backward: its arguments, and the state before it."""

    given: tuple[Tensor, ...]
    state: Any


class WeightingState(nn.Module):
    """The state of a weighting as buffers: in checkpoints, moved with the module, broadcast by DDP.

    It begins on the CPU for any default device, so a module built on the meta device has it too. Its dtype
    does not change under `.half()` and `.bfloat16()`, and `to_empty` keeps its values.

    Args:
        weighting: The weighting whose `init()` gives the first state.
        shared: Whether all processes have the same state. If not, it is in checkpoints too, but in no buffer,
            because DistributedDataParallel would overwrite it with the state of the first process.
    """

    def __init__(self, weighting: Weighting, *, shared: bool = True) -> None:
        super().__init__()
        state = weighting.init()
        self._names = _named(state)
        self._kind = type(weighting).__name__
        self._shared = shared
        self._first: dict[str, Any] = {}
        # The tensors that were written here or loaded. If a buffer is another tensor, it holds no state.
        self._known: dict[str, Tensor] = {}
        self._past: deque[_Past] = deque(maxlen=64)
        self._token = _token_of(self)

        def register(name: str, leaf: Any) -> None:
            array: Any = np.array(leaf)
            value = torch.as_tensor(array, device="cpu")
            if value.is_floating_point() and value.dtype.itemsize < 4:
                value = value.float()
            self._first[name] = value.tolist()  # pyright: ignore[reportUnknownMemberType]
            if shared:
                self.register_buffer(name, value)
            self._put(name, value)

        map_state(register, self._names, state)

    def _weigh(self, weighting: Any, batch: Batch, given: tuple[Tensor, ...], trains: bool) -> Tensor:
        """The weights of a batch. A call that trains also replaces the state by the state after the batch.

        Args:
            weighting: The weighting.
            batch: The losses, with those of other processes.
            given: The vectors of this process that the weights depend on, by which a repeated forward pass
                is recognised.
            trains: Whether the call trains.

        Raises:
            RuntimeError: If a backward pass repeats a call, and the state before that call is not known.
        """
        with one_at_a_time():
            if trains and recomputes():
                return weigh(weighting, batch, self._before(given))[0]
            before = self.read(batch.losses.device)
            weights, after = weigh(weighting, batch, before)
            if trains:
                if may_be_recomputed():
                    self._past.append(_Past(tuple(one.clone() for one in given), before))
                self.write(after)
            return weights

    def _step(self, fill: Callable[[list[Tensor]], None], given: tuple[Tensor, ...], trains: bool) -> None:
        """As `_weigh`, for a kernel on the CPU: it computes the weights and the state after the batch.

        Args:
            fill: Takes the leaves of the state in float64, in the order of `init()`, and updates them.
            given: As for `_weigh`.
            trains: Whether the call trains.
        """
        with one_at_a_time(), torch.no_grad():
            if trains and recomputes():
                fill([leaf.to(torch.float64, copy=True) for leaf in _leaves(self._before(given))])
                return
            before = self.read(torch.device("cpu")) if trains and may_be_recomputed() else None
            self._settle()
            self._refuse_meta()
            own = [self._get(name) for name in self._first]
            leaves = [leaf.to("cpu", torch.float64, copy=True) for leaf in own]
            fill(leaves)
            if trains:
                if before is not None:
                    self._past.append(_Past(tuple(one.clone() for one in given), before))
                for leaf, new in zip(own, leaves, strict=True):
                    leaf.copy_(new)

    def moved_by(self, compute: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        """Call a kernel that moves the state in place.

        Args:
            compute: Takes what is given and, for each leaf in the order of `init()`, its address and whether
                it holds int64 and not float64.
            given: The other arguments.

        Returns:
            What the kernel returns.
        """
        with _lock:
            places = self._places()
            if places is not None:
                return compute(*given, places)
            self._settle()
            self._refuse_meta()
            own = self._known.values()
            leaves = [leaf if _is_wide(leaf) else leaf.to("cpu", torch.float64, copy=True) for leaf in own]
            found = compute(*given, [(leaf.data_ptr(), leaf.dtype is torch.int64) for leaf in leaves])
            for leaf, new in zip(own, leaves, strict=True):
                if leaf is not new:
                    with torch.no_grad():
                        leaf.copy_(new)
            return found

    def _places(self) -> list[tuple[int, bool]] | None:
        """As `moved_by` says, for leaves that were not replaced and that a kernel can use as they are."""
        held = self._buffers if self._shared else self.__dict__
        places: list[tuple[int, bool]] = []
        for name, leaf in self._known.items():
            if held.get(name) is not leaf or not _is_wide(leaf):
                return None
            places.append((leaf.data_ptr(), leaf.dtype is torch.int64))
        return places

    def _refuse_meta(self) -> None:
        if any(leaf.is_meta for leaf in self._known.values()):
            raise RuntimeError(
                f"the state of {self._kind} was moved to the meta device, which keeps no values: call "
                "reset_parameters() or load_state_dict() once the module is on a real device"
            )

    def read(self, device: torch.device) -> Any:
        """The state, its leaves copies of the buffers on a device."""
        if torch.compiler.is_compiling():
            _settle_while_tracing(self._token)
        else:
            self._settle()
        if not is_exporting() and device.type != "meta":
            self._refuse_meta()

        # These are copies, since autograd or a caller may keep them, and the buffers change.
        def copied(name: str) -> Any:
            leaf = self._get(name)
            if torch.compiler.is_compiling() and not is_exporting():
                return _remembered(leaf).to(device)
            return leaf.to(device, copy=True)

        return map_state(copied, self._names)

    @torch.no_grad()
    def write(self, state: Any) -> None:
        """Store the state after a batch."""

        def put(name: str, value: Any) -> None:
            # Do not use copy_: if torch 2.8 compiles it, it does not change a 0-d buffer.
            self._get(name)[...] = value

        map_state(put, self._names, state)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the state back to the state before the first batch."""
        for name, first in self._first.items():
            leaf = self._get(name)
            leaf.copy_(torch.tensor(first, dtype=leaf.dtype, device="cpu"))
            self._put(name, leaf)
        self._past.clear()

    def fits(self, other: WeightingState) -> bool:
        """Whether another state has the same numbers, by name and shape."""
        own, others = ({n: s._get(n).shape for n in s._known} for s in (self, other))
        return own == others

    def _before(self, given: tuple[Tensor, ...]) -> Any:
        """The state before the call that a backward pass repeats."""
        found = [past for past in self._past if _same(past.given, given)]
        if not found or not all(_same(_leaves(past.state), _leaves(found[0].state)) for past in found):
            raise RuntimeError(
                f"a checkpoint repeats a call of {self._kind}, which remembers earlier batches, and the "
                "state before that call is not known: call the criterion outside the checkpoint"
            )
        if not graph_is_kept():  # then this backward pass is the last through the call
            kept = (past for past in self._past if past is not found[0])
            self._past = deque(kept, maxlen=self._past.maxlen)
        return found[0].state

    def _get(self, name: str) -> Tensor:
        return getattr(self, name)

    def _put(self, name: str, leaf: Tensor) -> None:
        setattr(self, name, leaf)
        self._known[name] = leaf

    def _settle(self) -> None:
        """Reset each number whose tensor was replaced by one that was neither written nor loaded here.

        Where a checkpoint has no entry, some loaders put in uninitialised memory without saying so.
        """
        held = self._buffers if self._shared else self.__dict__
        if not all(held.get(name) is known for name, known in self._known.items()):
            self._settle_replaced()

    @torch.no_grad()
    def _settle_replaced(self) -> None:
        for name, known in self._known.items():
            leaf = self._get(name)
            if leaf is known or leaf.is_meta:
                continue
            # Keep a copy of the former values, and a tensor that transformers marks as loaded.
            kept = known.shape == leaf.shape and not known.is_meta and _same((known,), (leaf,))
            if not kept and not getattr(leaf, "_is_hf_initialized", False):
                if not getattr(self, "_is_hf_initialized", False):
                    warnings.warn(
                        f"the state {name!r} of {self._kind} was replaced by a tensor that load_state_dict() "
                        "did not load, so the weighting begins anew: load a state with load_state_dict() or "
                        "call reset_parameters()",
                        stacklevel=2,
                    )
                leaf.copy_(torch.tensor(self._first[name], dtype=leaf.dtype, device="cpu"))
            self._put(name, leaf)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightingState:
        self._settle()
        with torch.no_grad():
            for name, before in list(self._known.items()):
                try:
                    moved = fn(before)
                except TypeError:  # the device has no float64
                    moved = fn(before.float())
                if moved.dtype != before.dtype and moved.is_floating_point() and moved.dtype.itemsize < 4:
                    moved = before.to(moved.device)
                # A tensor that `to_empty` returns is uninitialised.
                if moved is not before and not before.is_meta and not moved.is_meta:
                    moved.copy_(before)
                setattr(self, name, moved)
                if not before.is_meta or moved.is_meta:
                    self._known[name] = moved
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._settle()
        for name in self._known:
            leaf = self._get(name)
            destination[prefix + name] = leaf if keep_vars else leaf.detach()

    def _load_from_state_dict(  # noqa: PLR0917 - the signature is torch's
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not given:
            missing_keys += [prefix + name for name in self._known]
            return
        own = {name: tuple(self._get(name).shape) for name in self._known}
        shapes = {name: tuple(value.shape) for name, value in given.items()}
        if shapes != own:
            error_msgs.append(
                f"{prefix.rstrip('.')} holds the state of another weighting, {shapes}, than that of "
                f"{self._kind}, {own}: build the loss with the weighting that the checkpoint was trained "
                "with, or take these entries out of the checkpoint"
            )
            return
        with torch.no_grad():
            for name, value in given.items():
                leaf, assigns = self._get(name), local_metadata.get("assign_to_params_buffers", False)
                if assigns or leaf.is_meta:
                    leaf = value.detach().to(leaf.dtype, copy=not assigns)
                else:
                    leaf.copy_(value)
                self._put(name, leaf)
        self._past.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the calls of this process."""
        return {**self.__dict__, "_past": deque(maxlen=self._past.maxlen)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # pyright: ignore[reportUnknownMemberType]
        self._token = _token_of(self)


class Memory(NamedTuple):
    """The state of a module in one call, and whether the call trains."""

    state: WeightingState
    trains: bool

    def step(self, fill: Callable[[list[Tensor]], None], given: tuple[Tensor, ...]) -> None:
        """Let a kernel compute the weights and update the state; `fill` takes its leaves in float64."""
        self.state._step(fill, given, self.trains)  # pyright: ignore[reportPrivateUsage]

    def weigh(self, weighting: Any, batch: Batch, given: tuple[Tensor, ...]) -> Tensor:
        """The weights of a batch; `given` are the vectors of this process that they depend on."""
        return self.state._weigh(weighting, batch, given, self.trains)  # pyright: ignore[reportPrivateUsage]


def _is_wide(leaf: Tensor) -> bool:
    return leaf.is_cpu and leaf.dtype in _WIDE and leaf.is_contiguous()


_WIDE = (torch.float64, torch.int64)


def functional_state(weighting: Weighting, state: Any, device: torch.device | None) -> Any:
    """The state that was given to a function, checked, as tensors."""
    require_state(weighting, state, readable=not torch.compiler.is_compiling())
    if state is None:
        return None

    def as_tensor(leaf: Any) -> Tensor:
        # A Python float becomes float64 if the device has it, as in a buffer of `WeightingState`.
        tensor = torch.as_tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None)
        narrow = device is not None and device.type == "mps" and tensor.dtype is torch.float64
        return (tensor.float() if narrow else tensor).to(device)

    return map_state(as_tensor, state)


# The function below runs while a graph is compiled, and can take strings but no modules.
_by_token: weakref.WeakValueDictionary[str, WeightingState] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _token_of(state: WeightingState) -> str:
    token = f"state {next(_numbers)}"
    _by_token[token] = state
    # A decorator would import the compiler, which takes seconds, also if nothing is compiled.
    cast("Any", torch.compiler).assume_constant_result(_settle_while_tracing)
    return token


def _settle_while_tracing(token: str) -> bool:
    """`_settle` at the time a graph is compiled: the graph itself cannot compare the identity of tensors."""
    _by_token[token]._settle()  # pyright: ignore[reportPrivateUsage]
    return True


_library: Any = torch.library
for _name in ("remembered", "is_first_pass"):
    _library.define(f"rgd::{_name}", "(Tensor tensor) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_remembered: Any = torch.ops.rgd.remembered.default
is_first_pass: Any = torch.ops.rgd.is_first_pass.default
"""Whether a compiled graph runs in a forward pass, and not in a backward pass that repeats one: 0-d, bool."""


@_library.impl("rgd::remembered", "CompositeExplicitAutograd")
def _(tensor: Tensor) -> Tensor:
    # This is asked when the graph runs, because a checkpoint around the graph runs it again in backward.
    if recomputes():
        raise RuntimeError(
            "a checkpoint repeats a compiled call of a weighting that remembers earlier batches, and the "
            "state before that call is not known: call the criterion outside the checkpoint"
        )
    return tensor.clone()


@_library.register_fake("rgd::remembered")
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


@_library.impl("rgd::is_first_pass", "CompositeExplicitAutograd")
def _(tensor: Tensor) -> Tensor:
    return tensor.new_full((), not recomputes(), dtype=torch.bool)


@_library.register_fake("rgd::is_first_pass")
def _(tensor: Tensor) -> Tensor:
    return tensor.new_empty((), dtype=torch.bool)


def _same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether tensors are equal in every number; NaN equals NaN."""
    if len(one) != len(other):
        return False
    for a, b in zip(one, other, strict=True):
        b_there = b.to(a.device)
        if a.shape != b.shape or not bool(((a == b_there) | (a.isnan() & b_there.isnan())).all()):
            return False
    return True


def _leaves(state: Any) -> tuple[Tensor, ...]:
    leaves: list[Tensor] = []
    map_state(leaves.append, state)
    return tuple(leaves)


def _named(state: Any) -> Any:
    """The state with each leaf replaced by the name of its buffer: its path, as an attribute name.

    Raises:
        ValueError: If two leaves would have the same name.
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
        # The name must not replace an attribute that every module has.
        name = f"{name}_" if hasattr(WeightingState, name) or name in _ATTRIBUTES else name
        if name in paths:
            raise ValueError(f"two numbers of the state would be the buffer {name!r}: rename a key of init()")
        paths.append(name)
        return name

    return named(state, "")


_ATTRIBUTES = {*vars(nn.Module()), "_names", "_kind", "_shared", "_first", "_known", "_past", "_token"}


def state_for(
    weighting: Weighting, before: Weighting | None, state: WeightingState | None, *, shared: bool = True
) -> WeightingState | None:
    """The state of a weighting that takes the place of another: kept where both are of one class."""
    if not weighting.stateful:
        return None
    fresh = WeightingState(weighting, shared=shared)
    if state is not None and before is not None and _of_one_class(before, weighting):
        return state if state.fits(fresh) else fresh
    return fresh


def _of_one_class(one: Weighting, other: Weighting) -> bool:
    """Whether two weightings are of one class, and so are those nested in them that remember."""
    if type(one) is not type(other):
        return False
    nested = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)]
    inner = [(a, b) for a, b in nested if isinstance(a, Weighting) and isinstance(b, Weighting)]
    return all(_of_one_class(a, b) for a, b in inner if a.stateful or b.stateful)
