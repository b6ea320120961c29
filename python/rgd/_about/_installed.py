"""What is installed, the machine, and which backend computes a call of each front."""

# torch and jax may not be installed, so pyright does not know their types here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import rgd
from rgd import _rgd
from rgd._arrays import available_cores

IMPORTED = ("torch", "jax")
"""Libraries that a front of `rgd` needs. Each is imported, since an installed one may still be broken."""

NAMED = (
    "numpy",
    "array-api-compat",
    *IMPORTED,
    "jaxlib",
    "optax",
    "triton",
    "transformers",
    "accelerate",
    "trl",
    "lightning",
    "scikit-learn",
    "lightgbm",
    "xgboost",
    "catboost",
    "matplotlib",
)


def versions() -> list[dict[str, str | None]]:
    """Name, version (None where it is not installed) and error (None where all is well) of each library."""
    found: list[dict[str, str | None]] = [
        {"name": "rgd", "version": rgd.__version__, "error": None},
        {"name": "Python", "version": f"{platform.python_version()} ({platform.platform()})", "error": None},
    ]
    for name in NAMED:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        error = why_broken(name) if name in IMPORTED else None
        found.append({"name": name, "version": version, "error": error})
    return found


@functools.cache
def why_broken(library: str) -> str | None:
    """Why an installed library cannot be imported; None if it can be, or if it is not installed."""
    try:
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name == library:
            return None
        return f"installed, and cannot be imported: {in_a_line(error)}"
    except Exception as error:
        return f"installed, and cannot be imported: {in_a_line(error)}"
    return None


def usable(library: str) -> bool:
    """Whether a library is installed and can be imported."""
    return why_broken(library) is None and importlib.util.find_spec(library) is not None


def in_a_line(error: BaseException) -> str:
    """An error's kind and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def machine() -> dict[str, Any]:
    """The processor, and how many threads each front uses."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "architecture": platform.machine(),
        "instruction_set": _rgd.isa(),
        "instruction_sets": " ".join(_rgd.available_isas()),
        "cores": available_cores(),
    }
    if usable("torch"):
        import torch  # noqa: PLC0415

        importlib.import_module("rgd.torch")  # which looks for torch's threads
        found["torch_threads"] = torch.get_num_threads()
        found["torch_threads_shared"] = _rgd.shares_threads()
    if os.environ.get("RGD_BACKEND"):
        found["RGD_BACKEND"] = os.environ["RGD_BACKEND"]
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def backends() -> list[dict[str, Any]]:
    """For each front and device: the backend of a plain cross-entropy, and why the others are not taken."""
    found = [{"front": "rgd (NumPy)", "device": "cpu", "active": "rust", "others": {}}]
    if usable("torch"):
        found += [_of_torch(device) for device in torch_devices()]
    if usable("jax"):
        found += _of_jax()
    return found


def _why_not(error: Exception) -> str:
    """The reason why the requested backend cannot serve the call, without the rest of the message."""
    return str(error).partition("was asked for, but ")[2] or in_a_line(error)


def torch_devices() -> list[str]:
    """The types of device that torch finds here, the CPU first."""
    import torch  # noqa: PLC0415

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu", *([accelerator.type] if accelerator is not None else [])]


def torch_backends() -> list[str]:
    """The names of the backends in `rgd.torch`."""
    from rgd.torch import backends  # noqa: PLC0415

    return [name for name in backends.__all__ if isinstance(getattr(backends, name), ModuleType)]


def _of_torch(device: str) -> dict[str, Any]:
    import torch  # noqa: PLC0415

    from rgd.torch import backend, cross_entropy  # noqa: PLC0415

    def run(name: str | None) -> str:
        logits = torch.zeros(2, 3, device=device, requires_grad=True)
        with backend(name) as ran:
            cross_entropy(logits, torch.zeros(2, dtype=torch.int64, device=device))
        return ran[-1]

    others: dict[str, str] = {}
    active = None
    try:
        active = run(None)
    except Exception as error:
        others["the default choice"] = _why_not(error)
    for name in torch_backends():
        if name == active:
            continue
        try:
            run(name)
        except Exception as error:
            others[name] = _why_not(error)
        else:
            others[name] = f'it serves such calls too, where backend("{name}") or RGD_BACKEND asks for it'
    return {"front": "rgd.torch", "device": device, "active": active, "others": others}


def _of_jax() -> list[dict[str, Any]]:
    import jax  # noqa: PLC0415

    from rgd.jax import _ffi  # noqa: PLC0415

    try:
        platforms = list(dict.fromkeys(str(device.platform) for device in jax.devices()))
    except Exception as error:
        reason = {"the default choice": in_a_line(error)}
        return [{"front": "rgd.jax", "device": "none", "active": None, "others": reason}]
    found: list[dict[str, Any]] = []
    for name in platforms:
        others: dict[str, str] = {}
        active = "jnp"
        if name != "cpu":
            others["rust"] = "the kernel is for the CPU"
        else:
            try:
                _ffi.register()
            except Exception as error:
                others["rust"] = in_a_line(error)
            else:
                if jax.device_count() > 1:
                    others["rust"] = 'there are several CPU devices: backend="rust" within shard_map takes it'
                else:
                    active = "rust"
                    others["jnp"] = "it serves what the kernel does not, small logits and few classes"
        found.append({"front": "rgd.jax", "device": name, "active": active, "others": others})
    return found
