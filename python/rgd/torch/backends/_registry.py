"""Which backend computes a call: the Rust kernels, or plain torch operations.

All backends give the same numbers, so the choice is made silently: the first one that serves the tensors of
the call. `backend` overrides it, and shows it, for debugging. A new backend is a class with a `name` and the
three methods of `Backend`, and a call of `register`.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rgd.torch._modes import is_exporting

if TYPE_CHECKING:
    from rgd.torch._record import Record
    from rgd.torch._weigher import Weigher
    from rgd.torch.backends._options import Options

ENVIRONMENT = "RGD_BACKEND"


class Backend(Protocol):
    """What computes weights and the re-weighted cross-entropy of torch tensors."""

    name: str

    def refusal(self, tensors: tuple[Tensor | None, ...], compiling: bool) -> str | None:
        """Why a call on these tensors, eager or compiled, cannot be served; None where it can."""
        ...

    def sample_weights(self, losses: Tensor, base: Tensor | None, weigher: Weigher) -> Tensor:
        """Weights of the losses' shape, without grad; the state after the call is left in `weigher`."""
        ...

    def cross_entropy(  # noqa: PLR0917
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        base: Tensor | None,
        options: Options,
        weigher: Weigher,
        adjustment: Tensor | None = None,
    ) -> tuple[Tensor, Record | None]:
        """The re-weighted objective, in the dtype losses are computed in, and the record of its weights.

        `adjustment`, (C,) without grad, is added to the logits, in the dtype that losses are computed in.

        There is no record where its tensors must not outlive the call.
        """
        ...


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_internals: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_transforms_active = _internals._are_functorch_transforms_active
_dispatch_modes = _internals._len_torch_dispatch_stack
_tracing_state = _internals._get_tracing_state
_forward_ad: Any = forward_ad
# Asked once, here: older torch cannot compile a call of is_autocast_available.
_AUTOCASTING = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "privateuseone", "xla", "xpu")
    if torch.amp.is_autocast_available(kind)
)

_backends: list[Backend] = []


def register(backend: Backend, *, first: bool = False) -> None:
    """Add a backend: behind those there are, or with `first` before them."""
    _backends.insert(0 if first else len(_backends), backend)


def _check(name: Any, source: str) -> str | None:
    # RGD_BACKEND is checked while this module is imported, when no backend is registered yet.
    known = [backend.name for backend in _backends] or ["rust", "composite"]
    if name is not None and name not in known:
        allowed = ", ".join(repr(one) for one in known)
        raise ValueError(f"{source} must be {allowed} or None (the default choice), got {name!r}")
    return name


class _State:
    """An object, not a class of variables: torch 2.8 compiles those once and for all."""

    def __init__(self) -> None:
        self._environment = _check(
            os.environ.get(ENVIRONMENT) or None, f"the environment variable {ENVIRONMENT}"
        )
        self._blocks: list[tuple[str | None, list[str]]] = []
        self.forced = self._environment
        self.ran: list[str] | None = None

    def enter(self, block: tuple[str | None, list[str]]) -> None:
        """Let a block hold; blocks of several threads may overlap."""
        with _lock:
            self._blocks.append(block)
            self._settle()

    def leave(self, block: tuple[str | None, list[str]]) -> None:
        """End a block, wherever it stands among those that hold."""
        with _lock:
            self._blocks = [one for one in self._blocks if one is not block]
            self._settle()

    def _settle(self) -> None:
        # A block without a name only watches: what an outer one or the environment asked for still holds.
        named = [name for name, _ in self._blocks if name is not None]
        self.forced = named[-1] if named else self._environment
        self.ran = self._blocks[-1][1] if self._blocks else None


_lock = threading.Lock()
_state = _State()


def choose(*tensors: Tensor | None) -> Backend:
    """The backend of a call on these tensors.

    Raises:
        RuntimeError: If a backend is asked for that cannot serve the call. (In a compiled graph one that can
            takes its place.)
    """
    forced, compiling = _state.forced, torch.compiler.is_compiling()
    chosen = _backends[-1]
    for one in _backends:
        if forced is not None and one.name != forced:
            continue
        reason = one.refusal(tensors, compiling)
        if reason is None:
            chosen = one
            break
        if forced is not None and not compiling:
            raise RuntimeError(f'backend("{forced}") was asked for, but {reason}')
    if not compiling and _state.ran is not None:
        _state.ran.append(chosen.name)
    return chosen


class backend:  # noqa: N801 - used as a function
    """Choose the backend within a `with` block, and see which one ran.

    Left alone, `rgd.torch` runs its Rust kernels for plain CPU tensors, and the same computation in torch
    operations for everything else: other devices, tensor subclasses, `torch.func` transforms, forward-mode
    differentiation, double backward. The environment variable `RGD_BACKEND` sets the choice for a whole
    process. The switch is for debugging: it holds for all threads, and `torch.compile` compiles again where
    it changes.

    Args:
        name: "rust", "composite", or None for the default choice.

    Returns:
        A context manager that gives a list: the backend of each call within the block, "rust" or
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
        self._block: tuple[str | None, list[str]] = (self._name, [])
        _state.enter(self._block)
        return self._block[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _state.leave(self._block)


def must_forget() -> bool:
    """Whether the tensors of this call must not outlive it: in a `torch.func` transform or `torch.export`."""
    return _transforms_active() or (torch.compiler.is_compiling() and is_exporting())


def in_transform() -> bool:
    """Whether a `torch.func` transform is active, whose tensors end with it."""
    return _transforms_active()


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; never for one that knows no autocast, as "meta"."""
    return device_type in _AUTOCASTING and torch.is_autocast_enabled(device_type)


def served_in_eager_mode(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether all tensors are plain ones on the CPU, and no mode asks for more than plain eager calls."""
    for tensor in tensors:
        if tensor is not None and not (type(tensor) in _PLAIN and tensor.is_cpu):
            return False
    return _mode_is_eager()


def plain_and_eager(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether all tensors are plain ones with memory, and no mode asks for more than plain eager calls."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta):
            return False
    return _mode_is_eager()


def _mode_is_eager() -> bool:
    return (
        not _transforms_active()
        and _forward_ad._current_level < 0
        and not _dispatch_modes()
        and _tracing_state() is None
    )


def served_in_graphs(tensors: tuple[Tensor | None, ...]) -> bool:
    """While compiling: whether the graph may call the Rust kernels as an operator.

    An exported graph holds torch operations, so that it runs where `rgd` is not installed.
    """
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return False
    return not is_exporting() and not _transforms_active()


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether the values of a tensor may be looked at without waiting for a device or ending a trace."""
    return not torch.compiler.is_compiling() and served_in_eager_mode((tensor,))


def why_not_plain(tensors: tuple[Tensor | None, ...]) -> str:
    """What of the tensors or the mode keeps a call from the Rust kernels."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}: the Rust kernels serve the CPU"
        if tensor is not None and type(tensor) not in _PLAIN:
            return f"a tensor is a {type(tensor).__name__}: the Rust kernels serve plain tensors"
    return (
        "a torch.func transform, forward-mode differentiation, a dispatch mode or a tracer is active: the "
        "Rust kernels serve plain eager calls"
    )
