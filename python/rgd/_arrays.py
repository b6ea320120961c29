"""Which kind of array a caller gave, how a kernel reads it in place, and how to return the same kind.

NumPy arrays are read directly. All other arrays are read through DLPack, by the importer of the kernels,
which checks the description of a tensor.
"""

from __future__ import annotations

import functools
import math
import numbers
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import numpy as np
import numpy.typing as npt

from rgd import _rgd

_FLOATS = ("float64", "float32", "float16", "bfloat16")


class SupportsDLPack(Protocol):
    """An array of any library that supports DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


class Source(NamedTuple):
    """An input that has passed every check: floating, one value a sample, on the CPU, no gradient lost."""

    values: Any
    """The object that a kernel reads: a NumPy array, or a tensor imported through DLPack."""
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
        BufferError: If the description of a DLPack tensor contradicts itself.
        TypeError: If it is no array, or not of floating numbers.
        ValueError: If it is a scalar, is not in the CPU's memory, would lose its gradient, or cannot be read
            in place.
    """
    if isinstance(given, np.ndarray):
        return _read_numpy(name, cast("npt.NDArray[Any]", given))
    if isinstance(given, (int, float, complex, np.generic)):
        _refuse_scalar(name)
    torch = sys.modules.get("torch")
    restore: Callable[[npt.NDArray[Any]], Any] = _same
    if torch is not None and isinstance(given, torch.Tensor):
        _check_torch(name, given, torch)
        restore = torch.from_numpy
    elif hasattr(given, "__dlpack__"):
        _check_jax(name, given)
        restore = _importer(given)
    elif type(given).__name__ != "PyCapsule":
        raise TypeError(
            f"{name} must be an array (NumPy, or any that speaks DLPack), got {type(given).__name__}: "
            f"pass {_dense(name, given)}"
        )
    borrowed = _rgd.Borrowed(name, given)
    dtype = borrowed.dtype
    if dtype not in _FLOATS:
        _refuse_dtype(name, dtype, f"{name}.real" if "complex" in dtype else f"{name}.astype(np.float32)")
    if not borrowed.shape:
        _refuse_scalar(name)
    return Source(borrowed, borrowed.shape, np.float64 if dtype == "float64" else np.float32, restore)


def refuse_masked(name: str, given: Any, fix: str | None = None) -> None:
    """Refuse a masked array of NumPy, or a list of them: its masked numbers would count like the others."""
    parts = cast("list[Any]", given) if isinstance(given, (list, tuple)) else [given]
    if any(isinstance(part, np.ma.MaskedArray) for part in parts):
        fix = fix or f"fill it, as {name}.filled(0) does, and leave samples out by where="
        raise TypeError(f"{name} is a masked array, and its mask would be lost: {fix}")


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


def read_measure(
    sample_weight: Any, shape: tuple[int, ...], *, scaled: bool = True
) -> npt.NDArray[np.float64] | None:
    """Check a measure and give it the losses' shape: finite numbers >= 0; None stays None.

    It is divided by a power of two, unless `scaled` is False: for results that depend on its size.
    """
    if sample_weight is None:
        return None
    measure = _as_numpy("sample_weight", sample_weight)
    if measure.dtype.kind not in "fiu":
        raise TypeError(f"sample_weight must be an array of numbers, got {measure.dtype}")
    measure = _by_sample("sample_weight", measure, shape).astype(np.float64)
    if measure.size and not (np.isfinite(measure).all() and measure.min() >= 0):
        wrong = measure[~(np.isfinite(measure) & (measure >= 0))][0]
        raise ValueError(f"sample_weight must hold finite numbers >= 0, got {wrong}")
    # Sums of the largest numbers would overflow.
    return measure / power_of(float(measure.max(initial=0.0))) if scaled else measure


def read_normalizer(normalizer: Any) -> float | None:
    """Check the number that a mean is divided by: positive, or an array of shape (); None stays None."""
    if normalizer is None:
        return None
    number: Any = normalizer
    if not isinstance(normalizer, numbers.Real):
        number = _as_numpy("normalizer", normalizer)
    if isinstance(number, bool) or np.ndim(number) or np.asarray(number).dtype.kind not in "fiu":
        raise TypeError(f"normalizer must be a positive number, got {normalizer!r}")
    if not 0.0 < float(number) < math.inf:
        raise ValueError(
            f"normalizer must be a positive number, got {float(number)}: how many losses count, or the sum "
            "of their sample weights, over all micro-batches of a step"
        )
    return float(number)


def power_of(largest: float) -> float:
    """A power of two to divide a measure by, for results that do not depend on the measure's scale.

    Args:
        largest: The largest of its numbers, finite.

    Returns:
        1.0 if sums and products of the numbers fit into float32, else the power of two below the largest.
    """
    if largest == 0.0 or 1e-18 <= largest <= 1e18:
        return 1.0
    return math.ldexp(1.0, math.frexp(largest)[1] - 1)


def power_of_products(largest: float) -> float:
    """A power of two to divide a measure by, so that its products with losses are not larger than these.

    Args:
        largest: The largest of its numbers, finite.

    Returns:
        The smallest power of two with which `p / factor` is at most 1; 1.0 for 0.
    """
    fraction, exponent = math.frexp(largest)
    return 1.0 if largest == 0.0 else math.ldexp(1.0, exponent - (fraction == 0.5))


def read_groups(groups: Any, shape: tuple[int, ...]) -> npt.NDArray[np.int64] | None:
    """Check group numbers and give them the losses' shape: integers; None stays None."""
    if groups is None:
        return None
    numbers = _as_numpy("groups", groups)
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"groups must be an array of integers, got {numbers.dtype}")
    return _by_sample("groups", numbers, shape).astype(np.int64)


def read_reference(
    reference: Any, shape: tuple[int, ...], takes_part: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.float64] | None:
    """Check the losses of a reference model: floats of the losses' shape, finite wherever one takes part."""
    if reference is None:
        return None
    compared = _as_numpy("reference", reference)
    if compared.dtype.kind != "f":
        raise TypeError(f"reference must be an array of losses, floats, got {compared.dtype}")
    if compared.shape != shape:
        raise ValueError(
            f"reference must have the shape of the losses, {shape}, got {compared.shape}: the losses of the "
            "reference model for the same samples"
        )
    wrong = ~np.isfinite(compared) if takes_part is None else ~np.isfinite(compared) & takes_part
    if wrong.any():
        raise ValueError(
            f"reference must hold finite losses wherever a sample takes part, got {compared[wrong][0]}: "
            "leave such samples out, by where= or sample_weight="
        )
    return compared.astype(np.float64)


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
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.Tensor):
        _check_torch_values(name, given, torch)
        # NumPy has no bfloat16.
        given = given.float() if given.dtype is torch.bfloat16 else given
    refuse_masked(name, given)
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


def _read_numpy(name: str, array: npt.NDArray[Any]) -> Source:
    refuse_masked(name, array, f"pass {name}.compressed()")
    dtype: Any = array.dtype
    floating = (dtype.kind == "f" and dtype.itemsize <= 8) or dtype.name == "bfloat16"
    if not (floating and dtype.isnative):
        fix = {
            "c": f"{name}.real",
            "O": f"np.asarray({name}, dtype=np.float64)",
            "f": f"{name}.astype(np.float64)",
        }.get(dtype.kind, f"{name}.astype(np.float32)")
        _refuse_dtype(name, dtype, fix)
    if array.ndim == 0:
        _refuse_scalar(name)
    if not array.flags.aligned or any(stride % dtype.itemsize for stride in array.strides):
        raise ValueError(
            f"{name} is not aligned to its dtype {dtype} and cannot be read in place: pass {name}.copy()"
        )
    return Source(array, array.shape, np.float64 if dtype.itemsize == 8 else np.float32, _same)


def _check_torch(name: str, tensor: Any, torch: Any) -> None:
    if tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, and NumPy's functions would lose its gradient: use "
            f"rgd.torch.sample_weights or rgd.torch.reweighted_mean, or pass {name}.detach()"
        )
    _check_torch_values(name, tensor, torch)
    if tensor.is_neg():
        raise ValueError(f"{name} is a view whose negation is pending: pass {name}.resolve_neg()")


def _check_torch_values(name: str, tensor: Any, torch: Any) -> None:
    """Refuse a tensor of torch whose values do not lie one by one in the CPU's memory."""
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor, whose rows differ in length: pass torch.cat({name}.unbind())"
        )
    if cast("Any", type(tensor)).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, a tensor subclass whose values are not in its own memory: "
            "pass a plain torch.Tensor"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}, expected torch.strided: pass {name}.to_dense()")
    if tensor.device.type == "meta":
        raise ValueError(
            f"{name} must be on the CPU, got a tensor on meta, which has a shape and no values: make it on "
            "the CPU"
        )
    if tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be on the CPU, got a tensor on {tensor.device}: move it there, as {name}.cpu() does"
        )
    if tensor.is_quantized:
        raise TypeError(f"{name} is quantized, {tensor.dtype}: pass {name}.dequantize()")
    if "float8" in str(tensor.dtype):
        raise TypeError(f"{name} is {tensor.dtype}, which nothing can be computed in: pass {name}.float()")


def _check_jax(name: str, given: Any) -> None:
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(given, jax.core.Tracer):
        raise TypeError(f"{name} is traced by JAX and has no values yet: under jit, grad or vmap use rgd.jax")


def _importer(given: Any) -> Callable[[npt.NDArray[Any]], Any]:
    """`from_dlpack` of the library that `given` comes from, or a function that returns the NumPy array."""
    if hasattr(given, "__array_namespace__"):
        namespace = given.__array_namespace__()
    else:
        namespace = sys.modules.get(type(given).__module__.partition(".")[0])
    return getattr(namespace, "from_dlpack", _same)


def _same(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array


def _dense(name: str, given: Any) -> str:
    """The call that makes a dense array, for the error message: sparse arrays have a method for it."""
    for method in ("toarray", "todense"):
        if hasattr(given, method):
            return f"{name}.{method}()"
    return f"np.asarray({name})"


def _refuse_scalar(name: str) -> NoReturn:
    raise ValueError(
        f"{name} is a scalar: pass an array with one value a sample. Weighting a loss already reduced over "
        'the batch re-weights nothing; reduction="none" gives one loss a sample'
    )


def _refuse_dtype(name: str, dtype: Any, fix: str) -> NoReturn:
    raise TypeError(
        f"{name} must be float64, float32, float16 or bfloat16 in native byte order, got {dtype}: pass {fix}"
    )
