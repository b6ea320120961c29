"""Times what a step of a loss in PyTorch cannot do without, beside the whole step.

Run `make bench BENCH=benches/floor.py`, or this file: `--write` writes the table of docs/speed.md. All parts
of a size are timed in turn, in one process, with one thread:

- the step, forward and backward from float32 logits, of `nn.CrossEntropyLoss` and of `RGDLoss`;
- a function in the graph of autograd that is given a loss and new memory for a gradient, and computes
  nothing;
- the kernel of `RGDLoss` alone, into existing memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from _report import described, machine, publish
from rgd import _rgd
from rgd.torch import RGDLoss
from torch import Tensor, nn
from torch_step import step
from tqdm import tqdm

SIZES = [(128, 10), (512, 100), (1024, 1000), (2048, 32000)]
PARTS = [
    "nn.CrossEntropyLoss",
    "RGDLoss",
    "a function that computes nothing",
    "the kernel",
]


class Ready(torch.autograd.Function):
    """Returns a loss whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return loss

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None  # so that autograd takes it without a copy
        return grad, None, None


def kernel_of(logits: Tensor, target: Tensor) -> Callable[[], Any]:
    """A call of the kernel, into memory that is there."""
    outputs = torch.empty(2, logits.shape[0]), torch.empty(()), torch.empty_like(logits)
    compute = _rgd.RepeatedCrossEntropy(
        "float32", logits.shape, False, "kl", (1.0, 0.5, 0.0), -100, 0.0, False, "mean", 0.0
    )
    (losses, weights), objective, grad = outputs

    def run() -> None:
        places = [one.data_ptr() for one in (logits, target, losses, weights, objective, grad)]
        compute(*places, torch.get_num_threads(), None, None)

    return run


def parts(size: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """What is timed at a size, by name."""
    logits, target = torch.randn(size).requires_grad_(), torch.randint(0, size[1], size[:1])
    loss, ready = torch.zeros(()), cast("Any", Ready).apply
    runs = (
        step(nn.CrossEntropyLoss(), logits, target),
        step(RGDLoss(), logits, target),
        step(lambda logits, _: ready(logits, loss, torch.empty(size)), logits, target),
        kernel_of(logits, target),
    )
    return dict(zip(PARTS, runs, strict=True))


def medians(runs: dict[str, Callable[[], Any]], budget: float) -> dict[str, float]:
    """The median time of each run in milliseconds, timed in turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + budget
    while time.perf_counter() < end:
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            found[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="also write the table of docs/speed.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    figures = [{"size": size, **medians(parts(size), 4.0)} for size in tqdm(SIZES, leave=False)]
    text = "\n".join([
        f"Milliseconds with one thread, float32, on {described(machine())}: a whole step, and",
        "what no step can do without. `make bench BENCH=benches/floor.py` measures it on your machine.",
        "",
        "| logits | " + " | ".join(PARTS) + " |",
        "|---" * (len(PARTS) + 1) + "|",
        *(f"| {one['size']} | " + " | ".join(f"{one[part]:.3f}" for part in PARTS) + " |" for one in figures),
    ])  # fmt: skip
    print(text)
    if arguments.write:
        publish("docs/speed.md", "floor", text, figures)


if __name__ == "__main__":
    main()
