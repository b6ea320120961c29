"""Which backend computes a call: the Rust kernels, plain torch operations, or one that was registered.

All backends give the same numbers, so the choice is made without a message: the first backend that serves the
tensors of the call. `backend` overrides the choice and shows it, for debugging. docs/add_a_backend.md adds a
backend.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from rgd.torch._plan import Weigher
from rgd.torch._problem import Problem
from rgd.torch.backends._steps import Step
from rgd.torch.stats import Record

ENVIRONMENT = "RGD_BACKEND"


class Backend(Protocol):
    """The parts of a backend, which computes weights and the re-weighted cross-entropy of torch tensors."""

    name: str

    def refusal(self, tensors: tuple[Tensor | None, ...], compiling: bool) -> str | None:
        """The reason why a call on these tensors, eager or compiled, cannot be served; None if it can.

        Args:
            tensors: Losses and their measure; or `Problem.tensors()`, of which the second is the target.
            compiling: Whether the call is recorded in a compiled graph.
        """
        ...

    def sample_weights(self, losses: Tensor, measure: Tensor | None, weigher: Weigher) -> Tensor:
        """Weights of the losses' shape, without grad. `weigher` then holds the state after the call."""
        ...

    def cross_entropy(self, problem: Problem, weigher: Weigher) -> tuple[Tensor, Record | None]:
        """The re-weighted objective, in the dtype losses are computed in, and the record of its weights.

        The record is None if tensors must not be kept after the call.
        """
        ...

    def step(self, problem: Problem) -> Step:
        """The object that computes the chunks of a linear head.

        The problem's class weight and adjustment are without grad, contiguous, in the accumulator's dtype.
        """
        ...


_backends: list[Backend] = []
_on_request: list[Backend] = []
"""The backends that serve only calls that name them."""


class Registration:
    """A registered backend; `remove()` unregisters it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def remove(self) -> None:
        """Unregister the backend. A second call does nothing."""
        for registered in (_backends, _on_request):
            registered[:] = [one for one in registered if one is not self._backend]
        _state.lead()


def register(backend: Backend, *, on_request: bool = False) -> Registration:
    """Add a backend. It is asked before those that are registered already.

    Args:
        backend: An object with the `name` and the methods of `Backend`.
        on_request: Whether it serves only calls that name it, by `backend("...")` or `RGD_BACKEND`.

    Returns:
        A handle whose `remove()` unregisters the backend.

    Raises:
        TypeError: If a part of `Backend` is missing.
        ValueError: If there is a backend of this name.
    """
    missing = [part for part in _PARTS if not hasattr(backend, part)]
    if missing:
        raise TypeError(
            f"a backend has name, refusal, sample_weights, cross_entropy and step: {type(backend).__name__} "
            f"has no {', '.join(missing)}"
        )
    if any(one.name == backend.name for one in (*_backends, *_on_request)):
        raise ValueError(f"there is a backend of the name {backend.name!r} already: choose another")
    (_on_request if on_request else _backends).insert(0, backend)
    _state.lead()
    return Registration(backend)


_PARTS = ("name", "refusal", "sample_weights", "cross_entropy", "step")


def _check(name: Any, source: str) -> str | None:
    known = [one.name for one in (*_backends, *_on_request)]
    if name is not None and name not in known:
        allowed = ", ".join(repr(one) for one in known)
        raise ValueError(f"{source} must be {allowed} or None (the default choice), got {name!r}")
    return name


class _State:
    """The state of the switch. It is an object, because torch 2.8 compiles class variables as constants.

    Attributes:
        forced: The name of the backend that must be taken, or None.
        ran: The list that gets the names of the backends that ran, or None.
        leader: The name of the backend that is asked first, if neither of these two is set; else None.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[str | None, list[str]]] = []
        # `choose` checks the name, since the backend may be registered later.
        self._environment = os.environ.get(ENVIRONMENT) or None
        self.forced = self._environment
        self.ran: list[str] | None = None
        self.leader: str | None = None

    def enter(self, block: tuple[str | None, list[str]]) -> None:
        """Begin a block. Blocks of several threads may overlap."""
        with _lock:
            self._blocks.append(block)
            self._settle()

    def leave(self, block: tuple[str | None, list[str]]) -> None:
        """End a block, which need not be the last that began."""
        with _lock:
            self._blocks = [one for one in self._blocks if one is not block]
            self._settle()

    def _settle(self) -> None:
        # A block without a name only watches. The choice of an outer block or of the environment remains.
        named = [name for name, _ in self._blocks if name is not None]
        self.forced = named[-1] if named else self._environment
        self.ran = self._blocks[-1][1] if self._blocks else None
        self.lead()

    def lead(self) -> None:
        """Note anew which backend is asked first."""
        self.leader = _backends[0].name if self.forced is None and self.ran is None and _backends else None


_lock = threading.Lock()
_state = _State()


def choose(tensors: tuple[Tensor | None, ...]) -> Backend:
    """The backend of a call on these tensors.

    Raises:
        RuntimeError: If the chosen backend cannot serve the call. (In a compiled graph another backend serves
            the call instead.)
        ValueError: If the environment names an unknown backend.
    """
    forced, compiling = _state.forced, torch.compiler.is_compiling()
    chosen, known = _backends[-1], forced is None
    for one in _backends if forced is None else (*_backends, *_on_request):
        if forced is not None and one.name != forced:
            continue
        known = True
        reason = one.refusal(tensors, compiling)
        if reason is None:
            chosen = one
            break
        if forced is not None and not compiling:
            raise RuntimeError(f'backend("{forced}") was asked for, but {reason}')
    if not known:
        _check(forced, f"the environment variable {ENVIRONMENT}")
    if not compiling and _state.ran is not None:
        _state.ran.append(chosen.name)
    return chosen


def leads(name: str) -> bool:
    """Whether the backend of this name is asked first, and no block or environment variable is active."""
    return _state.leader == name


class backend:  # noqa: N801 - used as a function
    """Choose the backend within a `with` block, and see which one ran.

    By default `rgd.torch` runs its Rust kernels for plain CPU tensors, and the same computation in torch
    operations for everything else: other devices, tensor subclasses, `torch.func` transforms, forward-mode
    differentiation, double backward. The environment variable `RGD_BACKEND` sets the choice for a whole
    process. The switch is for debugging: it applies to all threads, and `torch.compile` compiles again when
    it changes.

    Args:
        name: "rust", "composite", "triton", the name of a backend that was registered, or None for the
            default choice, which is never "triton".

    Returns:
        A context manager that returns a list of the backends of the calls within the block, in the order of
        the calls, without compiled calls.

    Raises:
        ValueError: If `name` is none of these.
        RuntimeError: Within the block, from a call that the backend of this name cannot serve.

    Example:
        >>> import torch
        >>> from rgd.torch import backend, sample_weights
        >>> losses = torch.tensor([0.0, 2.0])
        >>> with backend() as ran:
        ...     _ = sample_weights(losses), torch.func.vmap(sample_weights)(losses.view(1, 2))
        >>> ran
        ['rust', 'composite']
        >>> with backend("composite") as ran:
        ...     _ = sample_weights(losses)
        >>> ran
        ['composite']
    """

    def __init__(self, name: str | None = None) -> None:
        self._name = _check(name, "backend")

    def __enter__(self) -> list[str]:
        self._block: tuple[str | None, list[str]] = (self._name, [])
        _state.enter(self._block)
        return self._block[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _state.leave(self._block)
