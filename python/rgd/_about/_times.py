"""The times of RGDLoss and nn.CrossEntropyLoss, measured in turn, so that a slower machine slows both."""

# torch may not be installed, so pyright does not know its types here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rgd._about._installed import usable

SIZES = ((128, 10), (4096, 10), (256, 1000), (1024, 32_000))
SECONDS = 20.0
"""Seconds for each size, less than half of its share of two minutes, since the last pair may be slow."""
PAIRS = 300
BLOCK = 2e-3
"""The least time that the calls between two readings of the clock take together."""


def steps(sizes: Sequence[tuple[int, int]] = SIZES, seconds: float = SECONDS) -> dict[str, Any]:
    """Time forward and backward of both losses on float32 logits on the CPU.

    Args:
        sizes: Samples and classes.
        seconds: How long each size is timed.

    Returns:
        `problem`, which is None or says why there are no times; `threads`; and `rows`: for each size the
        median seconds of both, the quartiles of the ratio and the number of pairs.
    """
    if not usable("torch"):
        return {"problem": "torch is not installed", "threads": None, "rows": []}
    import torch  # noqa: PLC0415

    rows = [_row(samples, classes, seconds) for samples, classes in sizes]
    return {"problem": None, "threads": torch.get_num_threads(), "rows": rows}


def _row(samples: int, classes: int, seconds: float) -> dict[str, Any]:
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    from rgd.torch import RGDLoss  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, classes, generator=generator).requires_grad_()
    target = torch.randint(classes, (samples,), generator=generator)

    def step(criterion: Any) -> Callable[[], None]:
        def run() -> None:
            logits.grad = None
            criterion(logits, target).backward()

        return run

    ours, theirs = step(RGDLoss()), step(nn.CrossEntropyLoss())
    end = time.perf_counter() + seconds
    for one in (ours, theirs):
        one()
    calls = max(1, round(BLOCK / _seconds_of(ours, 1)))
    times: list[tuple[float, float]] = []
    while len(times) < PAIRS and (not times or time.perf_counter() < end):
        # The two swap their order from pair to pair.
        pair = (ours, theirs) if len(times) % 2 else (theirs, ours)
        seconds_of = {run: _seconds_of(run, calls) for run in pair}
        times.append((seconds_of[ours], seconds_of[theirs]))
    both = np.array(times)
    quartiles = np.quantile(both[:, 0] / both[:, 1], [0.25, 0.5, 0.75])
    medians = np.median(both, axis=0)
    return {
        "samples": samples,
        "classes": classes,
        "rgd_seconds": float(medians[0]),
        "cross_entropy_seconds": float(medians[1]),
        "ratio": [float(quartile) for quartile in quartiles],
        "pairs": len(times),
    }


def _seconds_of(run: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls
