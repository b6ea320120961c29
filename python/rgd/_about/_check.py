"""Weights and the cross-entropy with its gradient, from every front that is installed, against the oracle.

A result may differ from the oracle's, relative to the oracle's largest number, by `8 * length * eps`: sums of
`length` samples or classes, rounded in the result's dtype.
"""

# torch and jax may not be installed, so pyright does not know their types here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import rgd
from rgd import reference
from rgd._about._installed import in_a_line, torch_backends, torch_devices, usable

SAMPLES, CLASSES = 256, 100

WEIGHTINGS: tuple[rgd.Weighting, ...] = (
    rgd.KL(),
    rgd.KL(scale=-0.7),
    rgd.KL(normalize=True),
    rgd.KLBall(0.1),
    rgd.ChiSquareBall(0.5),
    rgd.CVaR(0.1),
)


class Result(NamedTuple):
    """One comparison.

    Attributes:
        what: What was computed, and how.
        problem: What is wrong; None where nothing is.
    """

    what: str
    problem: str | None


def check() -> list[Result]:
    """Compare everything that is installed."""
    found = [
        _compared(f"NumPy weights, {np.dtype(dtype).name}", dtype, SAMPLES, _numpy_weights(dtype))
        for dtype in (np.float64, np.float32)
    ]
    if usable("torch"):
        for device in torch_devices():
            # Apple's devices have no float64.
            dtypes = (np.float32,) if device == "mps" else (np.float64, np.float32)
            found += [
                _compared(f"torch on {device}, {name}, {np.dtype(dtype).name}", dtype, CLASSES, computed)
                for dtype in dtypes
                for name in torch_backends()
                if (computed := _torch_cross_entropy(device, name, dtype)) is not None
            ]
    if usable("jax"):
        found += [
            _compared(f"JAX under jit, {name}, float32", np.float32, CLASSES, _jax_cross_entropy(name))
            for name in ("rust", "jnp")
        ]
    return found


Pair = tuple[str, Any, Any]
"""A comparison: its name, the result, and the oracle's result."""


def _compared(what: str, dtype: Any, length: int, computed: Callable[[], Iterator[Pair]]) -> Result:
    tolerance = 8 * length * float(np.finfo(dtype).eps)
    try:
        problems = [
            f"{name} differs from the oracle's by {difference:.1e} of its largest number: "
            f"rounding explains {tolerance:.1e}"
            for name, result, expected in computed()
            if not (difference := _difference(result, expected)) <= tolerance
        ]
    except Exception as error:
        problems = [in_a_line(error)]
    return Result(what, "; ".join(problems) or None)


def _difference(result: Any, expected: Any) -> float:
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    if result.shape != expected.shape:
        return float("inf")
    return float(np.abs(result - expected).max() / np.abs(expected).max())


def _numpy_weights(dtype: Any) -> Callable[[], Iterator[Pair]]:
    def computed() -> Iterator[Pair]:
        losses = np.random.default_rng(0).exponential(size=SAMPLES).astype(dtype)
        for weighting in WEIGHTINGS:
            yield (
                str(weighting),
                rgd.sample_weights(losses, weighting),
                reference.sample_weights(losses, weighting),
            )

    return computed


def _problem(dtype: Any) -> tuple[Any, Any]:
    """Logits and labels."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(SAMPLES, CLASSES)).astype(dtype), rng.integers(CLASSES, size=SAMPLES)


def _pairs(weighting: rgd.Weighting, dtype: Any, objective: Any, gradient: Any) -> Iterator[Pair]:
    logits, labels = _problem(dtype)
    yield (
        f"the objective of {weighting}",
        objective,
        reference.cross_entropy(logits, labels, weighting=weighting),
    )
    yield (
        f"the gradient of {weighting}",
        gradient,
        reference.cross_entropy_grad(logits, labels, weighting=weighting),
    )


def _torch_cross_entropy(device: str, name: str, dtype: Any) -> Callable[[], Iterator[Pair]] | None:
    """None where the backend does not serve such a call."""
    import torch  # noqa: PLC0415

    from rgd.torch import RGDLoss, backend  # noqa: PLC0415

    arrays = _problem(dtype)

    def step(weighting: rgd.Weighting) -> tuple[Any, Any]:
        logits, labels = (torch.as_tensor(array, device=device) for array in arrays)
        logits.requires_grad_()
        with backend(name):
            objective = RGDLoss(weighting=weighting)(logits, labels)
            objective.backward()
        return objective.item(), logits.grad.cpu().numpy()  # pyright: ignore[reportOptionalMemberAccess]

    def computed() -> Iterator[Pair]:
        for weighting in WEIGHTINGS:
            yield from _pairs(weighting, dtype, *step(weighting))

    try:
        step(WEIGHTINGS[0])
    except RuntimeError as error:
        if "was asked for, but" in str(error):
            return None
    except Exception:
        return computed  # Calling it raises the same error again, which the caller reports.
    return computed


def _jax_cross_entropy(name: Any) -> Callable[[], Iterator[Pair]]:
    def computed() -> Iterator[Pair]:
        import jax  # noqa: PLC0415

        from rgd.jax import cross_entropy  # noqa: PLC0415

        logits, labels = _problem(np.float32)

        def objective(logits: Any) -> Any:
            return cross_entropy(logits, labels.astype(np.int32), backend=name)

        value, gradient = jax.jit(jax.value_and_grad(objective))(logits)
        yield from _pairs(rgd.KL(), np.float32, value, gradient)

    return computed
