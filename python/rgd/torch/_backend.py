"""Which implementation computes a call: the Rust kernels, or plain torch operations.

Both give the same numbers, so the choice is made silently. `backend` overrides it, and shows it, for
debugging.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

RUST = "rust"
COMPOSITE = "composite"
ENVIRONMENT = "RGD_BACKEND"

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_internals: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_transforms_active = _internals._are_functorch_transforms_active
_dispatch_modes = _internals._len_torch_dispatch_stack
_tracing_state = _internals._get_tracing_state
_forward_ad: Any = forward_ad
# Asked once: not every torch can trace the question.
_AUTOCASTING = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "privateuseone", "xla", "xpu")
    if torch.amp.is_autocast_available(kind)
)


def _check(name: Any, source: str) -> str | None:
    if name not in (RUST, COMPOSITE, None):
        raise ValueError(
            f"{source} must be {RUST!r}, {COMPOSITE!r} or None (the default choice), got {name!r}"
        )
    return name


class _State:
    """An object, not a class of variables: torch 2.8 compiles those once and for all."""

    def __init__(self) -> None:
        self.forced = _check(os.environ.get(ENVIRONMENT) or None, f"the environment variable {ENVIRONMENT}")
        self.ran: list[str] | None = None


_state = _State()


class backend:  # noqa: N801 - used as a function
    """Choose the implementation within a `with` block, and see which one ran.

    Left alone, `rgd.torch` runs its Rust kernels for plain CPU tensors, and the same computation in torch
    operations for everything else: other devices, tensor subclasses, `torch.func` transforms, forward-mode
    differentiation, double backward. The environment variable `RGD_BACKEND` sets the choice for a whole
    process. The switch is for debugging: it holds for all threads, and `torch.compile` compiles again where
    it changes.

    Args:
        name: "rust", "composite", or None for the default choice.

    Returns:
        A context manager that gives a list: the implementation of each call within the block, "rust" or
        "composite", in the order of the calls. Compiled calls are left out of it.

    Raises:
        ValueError: If `name` is none of these.
        RuntimeError: Within the block, from a call that the Rust kernels cannot serve, where "rust" is
            asked for.

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
        self._outer = (_state.forced, _state.ran)
        ran: list[str] = []
        # Without a name the block only watches: what an outer block or the environment asked for still holds.
        _state.forced, _state.ran = self._name or _state.forced, ran
        return ran

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _state.forced, _state.ran = self._outer


def must_forget() -> bool:
    """Whether the tensors of this call must not outlive it: in a `torch.func` transform or `torch.export`."""
    return _transforms_active() or (torch.compiler.is_compiling() and is_exporting())


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; never for one that knows no autocast, as "meta"."""
    return device_type in _AUTOCASTING and torch.is_autocast_enabled(device_type)


def rust_serves(a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> bool:
    """Whether the Rust kernels compute a call on these tensors; where not, torch operations do.

    Not called while compiling.
    """
    serves = (
        type(a) in _PLAIN
        and a.is_cpu
        and (b is None or (type(b) in _PLAIN and b.is_cpu))
        and (c is None or (type(c) in _PLAIN and c.is_cpu))
        and not _transforms_active()
        and _forward_ad._current_level < 0
        and not _dispatch_modes()
        and _tracing_state() is None
    )
    if _state.forced is not None:
        if _state.forced == COMPOSITE:
            serves = False
        elif not serves:
            raise _refusal((a, b, c))
    if _state.ran is not None:
        _state.ran.append(RUST if serves else COMPOSITE)
    return serves


def must_not_serve() -> None:
    """Say that a call goes through torch operations, for a reason that the tensors do not show."""
    if _state.forced == RUST:
        raise RuntimeError(
            'backend("rust") was asked for, but class probabilities that require grad take torch operations: '
            "call target.detach() first, or leave the choice to rgd"
        )
    if _state.ran is not None:
        _state.ran.append(COMPOSITE)


def op_serves(a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> bool:
    """While compiling: whether the graph calls the Rust kernels as an operator, or holds torch operations.

    An exported graph holds torch operations, so that it runs where `rgd` is not installed.
    """
    return (
        _state.forced != COMPOSITE
        and a.device.type == "cpu"
        and (b is None or b.device.type == "cpu")
        and (c is None or c.device.type == "cpu")
        and not is_exporting()
        and not _transforms_active()
    )


def is_exporting() -> bool:
    """Whether `torch.export` is tracing."""
    return _compiler._is_exporting_flag if _HAS_EXPORTING_FLAG else torch.compiler.is_exporting()


# The flag itself where there is one: torch 2.8 traces `is_exporting` as True in any compiled graph.
_compiler: Any = torch.compiler
_HAS_EXPORTING_FLAG = hasattr(_compiler, "_is_exporting_flag")


def _refusal(tensors: tuple[Tensor | None, ...]) -> RuntimeError:
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return RuntimeError(
                f'backend("rust") was asked for, but a tensor is on {tensor.device}: the Rust kernels serve '
                "the CPU"
            )
        if tensor is not None and type(tensor) not in _PLAIN:
            return RuntimeError(
                f'backend("rust") was asked for, but a tensor is a {type(tensor).__name__}: the Rust kernels '
                "serve plain tensors"
            )
    return RuntimeError(
        'backend("rust") was asked for, but a torch.func transform, forward-mode differentiation, a dispatch '
        "mode or a tracer is active: the Rust kernels serve plain eager calls"
    )
