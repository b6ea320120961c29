"""The kernels at the edges: many classes, far losses, small stacks, no memory and interrupts."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rgd
from rgd import _rgd

EPSILON = float(np.finfo(np.float32).eps)
CHUNK = 32
"""Classes that the kernel sums in float32 before it goes on in float64."""


def cross_entropy(
    logits: Any,
    target: Any,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "none",
    per_sample: bool = False,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """The kernel's losses, objective and gradient, with weights of one."""
    shape = logits.shape[:1] + logits.shape[2:]
    dtype = np.float64 if logits.dtype == np.float64 else np.float32
    losses, grad = np.empty(shape, dtype), np.empty_like(logits)
    weights = np.empty(shape[:1] if per_sample else shape, dtype)
    objective = np.empty(shape if reduction == "none" else (), dtype)
    _rgd.cross_entropy(
        logits, target, None, None, "kl", (math.inf, 0.0, 0.0), -100, label_smoothing, per_sample, reduction,
        losses, weights, objective, grad, 1,
    )  # fmt: skip
    return losses, objective, grad


def exact(logits: Any, mass: Any) -> tuple[Any, Any]:
    """Losses and gradient in float64, the classes on axis 1."""
    x, t = logits.astype(np.float64), mass.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    normalizer = np.log(np.exp(x).sum(1, keepdims=True))
    total = t.sum(1, keepdims=True)
    return (t * (normalizer - x)).sum(1), total * np.exp(x - normalizer) - t


@pytest.mark.parametrize("shape", [(1, 70000, 2), (1, 32768, 3, 2), (3, 33, 5)])
@pytest.mark.parametrize("kind", ["labels", "smoothing", "probabilities"])
def test_sums_over_a_strided_class_axis_keep_their_digits_however_many_classes_there_are(
    shape: tuple[int, ...], kind: str
) -> None:
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal(shape)).astype(np.float32)
    classes, spatial = shape[1], shape[:1] + shape[2:]
    smoothing = 0.3 if kind == "smoothing" else 0.0
    labels = rng.integers(0, classes, spatial)
    if kind == "probabilities":
        q = rng.random(shape).astype(np.float32)
        target: Any = q / q.sum(1, keepdims=True)
        mass = target
    else:
        target = labels
        mass = np.moveaxis(np.eye(classes, dtype=np.float32)[labels], -1, 1) if classes < 100 else None
        if mass is None:
            mass = np.zeros(shape, np.float32)
            np.put_along_axis(mass, np.expand_dims(labels, 1), 1.0, 1)
        mass = (1 - smoothing) * mass.astype(np.float64) + smoothing / classes
    losses, _, grad = cross_entropy(logits, target, label_smoothing=smoothing)
    expected, expected_grad = exact(logits, mass)
    # A sum of a chunk, a product each, the exponential's 2 ulp, and the roundings of what is made of them.
    bound = (CHUNK / 2 + 8) * EPSILON
    np.testing.assert_allclose(losses, expected, rtol=bound)
    np.testing.assert_allclose(grad, expected_grad, rtol=bound, atol=bound * np.abs(expected_grad).max())


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_sum_over_nothing_is_zero_and_not_minus_zero(per_sample: bool) -> None:
    shape = (0, 4, 3)
    labels = np.zeros((0, 3), np.int64)
    _, objective, _ = cross_entropy(np.zeros(shape), labels, reduction="sum", per_sample=per_sample)
    assert math.copysign(1.0, float(objective)) == 1.0
    assert math.copysign(1.0, _rgd.weighted_sum(np.zeros(0), np.zeros(0), None, 1)) == 1.0


def divergence(weights: npt.NDArray[np.float64]) -> float:
    q = weights / weights.sum()
    q = q[q > 0]
    return float((q * np.log(q * weights.size)).sum())


SPREADS: dict[str, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    "1e150": lambda x: np.append(x, -1e150),
    "1e160": lambda x: np.append(x, -1e160),
    "1e300": lambda x: np.append(x, -1e300),
    "the largest numbers": lambda x: np.append(x, -1.7e308),
    "beyond the largest number": lambda x: 1.7e308 * (2 * x - 1),
    "subnormal": lambda x: 1e-310 * x,
}


@pytest.mark.parametrize("spread", list(SPREADS))
@pytest.mark.parametrize(("count", "radius"), [(15, 0.1), (99, 0.05), (99, 0.5)])
def test_the_ball_meets_its_radius_whatever_the_spread_of_the_losses(
    spread: str, count: int, radius: float
) -> None:
    losses = SPREADS[spread](np.linspace(0.0, 1.0, count))
    weights = rgd.sample_weights(losses, rgd.KLBall(radius))
    # Losses of 1e-310 have 40 bits, and the divergence is as sensitive to theirs as to beta.
    assert divergence(weights) == pytest.approx(radius, rel=1e-9)


def run_in_small_stack(kibibytes: int, body: str) -> None:
    """Runs statements in a thread of such a stack, in a process of their own."""
    program = f"""
import threading
import numpy as np, rgd
from rgd import _rgd
losses = np.linspace(0.0, 3.0, 5000)
def body():
{textwrap.indent(textwrap.dedent(body), "    ")}
body()
threading.stack_size({kibibytes} * 1024)
done = []
thread = threading.Thread(target=lambda: (body(), done.append(1)))
thread.start()
thread.join()
assert done
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.returncode, result.stderr)


CALLS = {
    "KL": "rgd.sample_weights(losses, rgd.KL(tau=1.0))",
    "KLBall": "rgd.sample_weights(losses, rgd.KLBall(0.1))",
    "reweighted_mean": "rgd.reweighted_mean(losses, tau=1.0)",
    "weight_stats": "rgd.weight_stats(losses, losses)",
    "cross_entropy": """
        for shape in [(8, 10), (8, 1000), (2, 100, 4)]:
            targets = shape[:1] + shape[2:]
            losses, weights, objective = np.empty(targets), np.empty(targets), np.empty(())
            grad = np.empty(shape)
            _rgd.cross_entropy(
                np.zeros(shape), np.zeros(targets, np.int64), None, None, "kl", (1.0, 0.5, 0.0), -100, 0.1,
                False, "mean", losses, weights, objective, grad, 1,
            )
    """,
}


@pytest.mark.parametrize("call", list(CALLS))
def test_kernels_run_in_a_thread_with_a_stack_of_64_kib(call: str) -> None:
    run_in_small_stack(64, CALLS[call])


def test_working_memory_that_is_not_there_is_a_memory_error_that_says_how_much() -> None:
    program = """
import numpy as np
from rgd import _rgd
shape = (16, 2**31 - 1)
logits = np.broadcast_to(np.zeros((16, 1), np.float32), shape)
out = [np.empty(16, np.float32), np.empty(16, np.float32), np.empty((), np.float32)]
try:
    _rgd.cross_entropy(
        logits, np.zeros(16, np.int64), None, None, "kl", (1.0, 0.5, 0.0), -100, 0.0, False, "mean", *out,
        None, 1,
    )
except MemoryError as error:
    print(error)
"""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))\n" + program
    result = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.returncode, result.stderr)
    assert f"could not allocate {4 * 16 * (2**31 - 1)} bytes (128.0 GiB)" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a process sends itself the signal")
@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_stops_a_long_kernel(threads: int) -> None:
    # All losses lie in one place in memory; the kernel would take many times as long as the test waits.
    losses = np.broadcast_to(np.linspace(0.0, 3.0, 4096), (40_000, 4096))
    weights = np.empty(losses.shape)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    # A shell starts what runs in the background with the signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _rgd.sample_weights(losses, weights, "kl_ball", (0.1,), threads)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, handler)
    # 0.3 s until the signal, 0.2 s until the kernel looks; the rest is for a busy machine.
    assert time.monotonic() - started < 2.0


def test_daemon_threads_in_a_kernel_do_not_abort_the_interpreter_at_its_exit() -> None:
    program = """
import threading, time
import numpy as np, rgd
losses = np.linspace(0.0, 3.0, 200)
def work():
    while True:
        rgd.sample_weights(losses)
        rgd.sample_weights(losses, rgd.KLBall(0.1))
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
"""
    for _ in range(8):
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert result.returncode == 0, (result.returncode, result.stderr)
