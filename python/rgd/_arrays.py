"""What kind of array a caller gave, how a kernel reads it in place, and how to hand back the same kind.

NumPy arrays are read as they are, and everything else through DLPack as a NumPy view of the same memory. The
one dtype that NumPy cannot import, bfloat16, is left to the kernels, which speak DLPack themselves.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import numpy as np
import numpy.typing as npt


class SupportsDLPack(Protocol):
    """An array of any library that speaks DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


class Source(NamedTuple):
    """An input that has passed every check: floating, one value a sample, on the CPU, no gradient lost."""

    values: Any
    """What a kernel reads: a NumPy view, or an object that speaks DLPack."""
    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    """Dtype of the weights: float64 for float64 losses, else float32."""
    restore: Callable[[npt.NDArray[Any]], Any]
    """Turns a NumPy array into the kind of array the caller gave, in the same memory."""


def read(name: str, given: Any) -> Source:
    """Check an array argument and find out how to read it without a copy.

    Args:
        name: The argument's name, for the messages.
        given: What the caller gave.

    Raises:
        TypeError: If it is no array, or not of floating numbers.
        ValueError: If it is a scalar, is not in the CPU's memory, would lose its gradient, or cannot be read
            in place.
    """
    if isinstance(given, np.ndarray):
        return _read_numpy(name, cast("npt.NDArray[Any]", given), _same)
    if isinstance(given, (int, float, complex, np.generic)):
        _refuse_scalar(name)
    if type(given).__name__ == "PyCapsule":
        return _read_numpy(name, _view_of_capsule(name, given), _same)
    if not hasattr(given, "__dlpack__"):
        raise TypeError(
            f"{name} must be an array (NumPy, or any that speaks DLPack), got {type(given).__name__}: "
            f"pass np.asarray({name})"
        )
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.Tensor):
        _check_torch(name, given, torch)
        restore: Callable[[npt.NDArray[Any]], Any] = torch.from_numpy
    else:
        _check_jax(name, given)
        restore = _importer(given)
    _check_device(name, given)
    if str(getattr(given, "dtype", "")).endswith("bfloat16"):
        shape = tuple(int(length) for length in given.shape)
        if not shape:
            _refuse_scalar(name)
        return Source(given, shape, np.float32, restore)
    return _read_numpy(name, _view(name, given), restore)


def read_mask(where: Any, shape: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    """Check a mask: bool, of the losses' shape; None stays None."""
    if where is None:
        return None
    mask = _as_numpy("where", where)
    if mask.dtype != np.bool_:
        raise TypeError(f"where must be an array of bool, got {mask.dtype}: compare it, as in where=mask > 0")
    if mask.shape != shape:
        raise ValueError(f"where must have the shape of the losses, {shape}, got {mask.shape}")
    return mask


def read_mass(sample_weight: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float64] | None:
    """Check a base measure and give it the losses' shape: finite numbers >= 0; None stays None."""
    if sample_weight is None:
        return None
    mass = _as_numpy("sample_weight", sample_weight)
    if mass.dtype.kind not in "fiu":
        raise TypeError(f"sample_weight must be an array of numbers, got {mass.dtype}")
    mass = _by_sample("sample_weight", mass, shape).astype(np.float64)
    if mass.size and not (np.isfinite(mass).all() and mass.min() >= 0):
        wrong = mass[~(np.isfinite(mass) & (mass >= 0))][0]
        raise ValueError(f"sample_weight must hold finite numbers >= 0, got {wrong}")
    return mass


def read_groups(groups: Any, shape: tuple[int, ...]) -> npt.NDArray[np.int64] | None:
    """Check group numbers and give them the losses' shape: integers; None stays None."""
    if groups is None:
        return None
    numbers = _as_numpy("groups", groups)
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"groups must be an array of integers, got {numbers.dtype}")
    return _by_sample("groups", numbers, shape).astype(np.int64)


def _by_sample(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """An array of the losses' shape, from one of that shape or of one entry for each of the leading axis."""
    if array.shape == shape:
        return array
    if array.shape == shape[:1]:
        return np.broadcast_to(np.expand_dims(array, tuple(range(1, len(shape)))), shape)
    raise ValueError(
        f"{name} must have the shape of the losses, {shape}, or one entry a sample, {shape[:1]}, got "
        f"{array.shape}"
    )


def _as_numpy(name: str, given: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(given)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(f"{name} cannot be read as a NumPy array: {reason}") from error


@functools.cache
def available_cores() -> int:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_numpy(name: str, array: npt.NDArray[Any], restore: Callable[[npt.NDArray[Any]], Any]) -> Source:
    dtype: Any = array.dtype
    floating = (dtype.kind == "f" and dtype.itemsize <= 8) or dtype.name == "bfloat16"
    if not (floating and dtype.isnative):
        _refuse_dtype(name, dtype)
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, and its mask would be lost: pass {name}.compressed()")
    if array.ndim == 0:
        _refuse_scalar(name)
    if not array.flags.aligned or any(stride % dtype.itemsize for stride in array.strides):
        raise ValueError(
            f"{name} is not aligned to its dtype {dtype} and cannot be read in place: pass {name}.copy()"
        )
    return Source(array, array.shape, np.float64 if dtype.itemsize == 8 else np.float32, restore)


def _check_torch(name: str, tensor: Any, torch: Any) -> None:
    if tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, and NumPy's functions would lose its gradient: use "
            f"rgd.torch.sample_weights or rgd.torch.reweighted_mean, or pass {name}.detach()"
        )
    if cast("Any", type(tensor)).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, a tensor subclass whose values are not in its own memory: "
            "pass a plain torch.Tensor"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}, expected torch.strided: pass {name}.to_dense()")
    if tensor.device.type != "cpu":
        _refuse_device(name, str(tensor.device))
    if tensor.is_neg():
        raise ValueError(f"{name} is a view whose negation is pending: pass {name}.resolve_neg()")


def _check_jax(name: str, given: Any) -> None:
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(given, jax.core.Tracer):
        raise TypeError(f"{name} is traced by JAX and has no values yet: under jit, grad or vmap use rgd.jax")


_DEVICES = {
    1: "cpu",
    2: "cuda",
    4: "opencl",
    7: "vulkan",
    8: "metal",
    9: "vpi",
    10: "rocm",
    13: "cuda (managed memory)",
    14: "oneapi",
    15: "webgpu",
    16: "hexagon",
    17: "maia",
    18: "trainium",
}
_HOST_MEMORY = {1, 3, 11}
"""DLPack's device types whose memory the CPU addresses: kDLCPU, kDLCUDAHost and kDLROCMHost (pinned)."""


def _check_device(name: str, given: Any) -> None:
    try:
        kind, index = given.__dlpack_device__()
    except Exception as error:
        _refuse_unreadable(name, given, error)
    if int(kind) not in _HOST_MEMORY:
        _refuse_device(name, f"{_DEVICES.get(int(kind), f'DLPack device type {int(kind)}')}:{index}")


def _view(name: str, given: Any) -> npt.NDArray[Any]:
    try:
        return np.from_dlpack(given)
    except Exception as error:
        _refuse_unreadable(name, given, error)


class _Exporter:
    """Lends a bare capsule the method that `np.from_dlpack` asks for."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def _view_of_capsule(name: str, capsule: Any) -> npt.NDArray[Any]:
    if '"used_dltensor' in repr(capsule):
        raise ValueError(
            f"{name} is a DLPack capsule already consumed: one can be read once, so pass the array itself"
        )
    if '"dltensor' not in repr(capsule):
        raise TypeError(f"{name} must be an array or a DLPack capsule, got {capsule!r}")
    try:
        return np.from_dlpack(_Exporter(capsule))
    except Exception as error:
        raise TypeError(
            f"{name} is a DLPack capsule that NumPy cannot read ({error}): pass the array itself"
        ) from error


def _importer(given: Any) -> Callable[[npt.NDArray[Any]], Any]:
    """`from_dlpack` of the library `given` comes from; where it has none, a NumPy array stays one."""
    if hasattr(given, "__array_namespace__"):
        namespace = given.__array_namespace__()
    else:
        namespace = sys.modules.get(type(given).__module__.partition(".")[0])
    return getattr(namespace, "from_dlpack", _same)


def _same(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array


def _refuse_scalar(name: str) -> NoReturn:
    raise ValueError(
        f"{name} is a scalar: pass an array with one value a sample. Weighting a loss already reduced over "
        'the batch re-weights nothing; reduction="none" gives one loss a sample'
    )


def _refuse_dtype(name: str, dtype: np.dtype[Any]) -> NoReturn:
    fix = {
        "i": f"{name}.astype(np.float32)",
        "u": f"{name}.astype(np.float32)",
        "b": f"{name}.astype(np.float32)",
        "c": f"{name}.real",
        "O": f"np.asarray({name}, dtype=np.float64)",
        "f": f"{name}.astype(np.float64)",
    }.get(dtype.kind, f"{name}.astype(np.float32)")
    raise TypeError(
        f"{name} must be float64, float32, float16 or bfloat16 in native byte order, got {dtype}: pass {fix}"
    )


def _refuse_device(name: str, device: str) -> NoReturn:
    raise ValueError(
        f"{name} must be on the CPU, got a tensor on {device}: move it there, as {name}.cpu() does in torch"
    )


def _refuse_unreadable(name: str, given: Any, error: Exception) -> NoReturn:
    reason = str(error).partition("\n")[0]
    raise TypeError(f"{name}, a {type(given).__name__}, cannot be read through DLPack: {reason}") from error
