"""Times a training step's loss, forward and backward from logits, against what a user has or would write.

Run `make bench BENCH=benches/torch_step.py`, or this file: `--json FILE` writes the figures, `--write` the
tables of README.md and docs/speed.md, `--quick` times the small sizes for a moment. Each pair A, B is timed
in turn, A B A B ..., in one process. The table gives the median of the pairwise ratios and its quartiles:
below 1, RGDLoss is faster.

A second table is about `returns=`: which kernels a step calls without it and with it, and what it costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _report import described, machine, place, publish, write
from rgd import _rgd
from rgd.torch import RGDLoss
from torch import Tensor, nn
from tqdm import tqdm

SIZES = [(128, 10), (512, 100), (1024, 1000), (8, 21, 256, 256), (2048, 32000), (256, 128256)]
DTYPES = [torch.float32, torch.bfloat16]
PEERS = [
    "nn.CrossEntropyLoss, one thread",
    "nn.CrossEntropyLoss",
    "plain-torch RGD",
    "torch.compile'd RGD",
    "memcpy of the logits",
]
# What the README shows of them, in float32.
FRONT_SIZES = [(128, 10), (1024, 1000), (2048, 32000)]
FRONT_PEERS = ["nn.CrossEntropyLoss", "plain-torch RGD"]


RETURNS = ("entropy", "logsumexp", "correct")


class Ratio(NamedTuple):
    """RGDLoss's time over the peer's, and the median times in milliseconds."""

    median: float
    low: float
    high: float
    rgd_ms: float
    peer_ms: float


def plain_rgd(logits: Tensor, target: Tensor) -> Tensor:
    """What a user would write."""
    losses = F.cross_entropy(logits, target, reduction="none")
    weights = (losses.clamp(max=1.0) / 2.0).exp().detach()
    return (weights * losses).mean()


def step(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Callable[[], None]:
    """One forward and backward; the gradient's memory is fresh each time, as in training."""

    def run() -> None:
        logits.grad = None
        loss(logits, target).backward()

    return run


def copy(buffer: Tensor, logits: Tensor) -> Callable[[], None]:
    """The lower limit: every logit read once, every gradient written once, into existing memory."""

    def run() -> None:
        buffer.copy_(logits.detach())

    return run


def seconds(run: Callable[[], None], repeat: int) -> float:
    """Time of one call, the mean of `repeat`."""
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - start) / repeat


def compare(rgd: Callable[[], None], peer: Callable[[], None], budget: float) -> Ratio:
    """Alternate the two for about `budget` seconds."""
    for run in (rgd, peer):
        run()
        run()
    once = seconds(rgd, 1) + seconds(peer, 1)
    pairs = max(7, min(41, int(budget / once)))
    repeat = max(1, int(budget / once / pairs))
    times = [(seconds(rgd, repeat), seconds(peer, repeat)) for _ in range(pairs)]
    low, median, high = statistics.quantiles([ours / peer for ours, peer in times], n=4)
    ours, theirs = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return Ratio(median, low, high, ours, theirs)


def ratios(
    size: tuple[int, ...], dtype: torch.dtype, compiled: Callable[[Tensor, Tensor], Tensor], budget: float
) -> list[Ratio]:
    """RGDLoss against each peer."""
    logits = torch.randn(size).to(dtype).requires_grad_()
    target = torch.randint(0, size[1], (size[0], *size[2:]))
    buffer = torch.zeros_like(logits)
    ours, plain = step(RGDLoss(), logits, target), step(nn.CrossEntropyLoss(), logits, target)
    peers = [plain, step(plain_rgd, logits, target), step(compiled, logits, target), copy(buffer, logits)]
    peers[2]()  # compiles for this size before the clock runs
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = compare(ours, plain, budget)
    torch.set_num_threads(threads)
    return [alone, *(compare(ours, peer, budget) for peer in peers)]


@contextmanager
def watched() -> Iterator[list[str]]:
    """The names of the Rust functions that are called, in turn."""
    called: list[str] = []

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            called.append(name)
            return function(*args, **options)

        return call

    plain = {name: one for name, one in vars(_rgd).items() if callable(one) and not isinstance(one, type)}
    try:
        for name, one in plain.items():
            setattr(_rgd, name, watch(name, one))
        yield called
    finally:
        for name, one in plain.items():
            setattr(_rgd, name, one)


def returns_row(size: tuple[int, ...], dtype: torch.dtype, budget: float) -> str:
    """A line of the second table: the kernels of a step without `returns=` and with it, and the ratio."""
    logits = torch.randn(size).to(dtype).requires_grad_()
    target = torch.randint(0, size[1], (size[0], *size[2:]))
    steps = [step(RGDLoss(returns=names), logits, target) for names in (RETURNS, ())]
    kernels = []
    for run in steps:
        with watched() as called:
            run()
        kernels.append(", ".join(f"`{name}`" for name in called))
    found = cell(compare(*steps, budget)._asdict())
    name = str(dtype).removeprefix("torch.")
    return f"| {size} | {name} | {kernels[1]} | {kernels[0]} | {found} |"


def cell(figure: dict[str, Any]) -> str:
    """A ratio with its quartiles."""
    return f"{figure['median']:.2f} ({figure['low']:.2f}-{figure['high']:.2f})"


def full_table(figures: list[dict[str, Any]], found: dict[str, Any]) -> str:
    """The table of docs/speed.md: every size, dtype and peer.

    Args:
        figures: One ratio each, a row's in the order of `PEERS`.
        found: The machine they were measured with.
    """
    lines = [
        f"One step of loss, forward and backward from logits, on {described(found)}: the time of "
        "`RGDLoss()` over",
        "that of each alternative, median of pairs timed in turn, with quartiles. Below 1, it is faster.",
        f"One column is for one thread, the others for {found['threads']}.",
        "`make bench BENCH=benches/torch_step.py` measures it on your machine.",
        "",
        "| logits | dtype | RGDLoss, ms | " + " | ".join(PEERS) + " |",
        "|---|---|---|" + "---|" * len(PEERS),
    ]
    for start in range(0, len(figures), len(PEERS)):
        row = figures[start : start + len(PEERS)]
        head = f"| {tuple(row[0]['size'])} | {row[0]['dtype']} | {row[1]['rgd_ms']:.3f} | "
        lines.append(head + " | ".join(map(cell, row)) + " |")
    return "\n".join(lines)


def front_table(figures: list[dict[str, Any]], found: dict[str, Any]) -> str:
    """The table of README.md: three sizes, against two peers."""
    by_key = {(tuple(figure["size"]), figure["dtype"], figure["peer"]): figure for figure in figures}
    lines = [
        f"One step of loss, forward and backward from float32 logits, on {described(found)}, "
        f"{found['threads']} threads:",
        "the time of `RGDLoss()`, and its ratio to two others. Below 1, it is faster.",
        "",
        "| logits | RGDLoss, ms | " + " | ".join(f"over {peer}" for peer in FRONT_PEERS) + " |",
        "|---|---|" + "---|" * len(FRONT_PEERS),
    ]
    for size in FRONT_SIZES:
        row = [by_key[size, "float32", peer] for peer in FRONT_PEERS]
        lines.append(f"| {size} | {row[0]['rgd_ms']:.3f} | " + " | ".join(map(cell, row)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--write", action="store_true", help="also write the pages' tables")
    parser.add_argument(
        "--quick", action="store_true", help="the small sizes only, for a fraction of the time"
    )
    arguments = parser.parse_args()
    if arguments.write and arguments.quick:
        parser.error("--write needs every size, measured in full: leave out --quick")
    sizes, budget = (SIZES[:3], 0.3) if arguments.quick else (SIZES, 3.0)
    torch.manual_seed(0)
    compiled = torch.compile(plain_rgd)
    rows, more = [], []
    progress = tqdm([(size, dtype) for size in sizes for dtype in DTYPES], leave=False)
    for size, dtype in progress:
        name = str(dtype).removeprefix("torch.")
        progress.set_description(f"{size} {name}")
        rows.append((size, name, ratios(size, dtype, compiled, budget)))
        more.append(returns_row(size, dtype, budget))
    progress.close()

    figures = [
        {"size": size, "dtype": name, "peer": peer, **ratio._asdict()}
        for size, name, found in rows
        for peer, ratio in zip(PEERS, found, strict=True)
    ]
    print(full_table(figures, machine()))
    print(f"\nThe time of `RGDLoss(returns={RETURNS})` over that of `RGDLoss()`:\n")
    print("| logits | dtype | kernels without returns= | kernels with it | time over RGDLoss() |")
    print("|---|---|---|---|---|", *more, sep="\n")
    if arguments.json:
        write(arguments.json, figures)
    if arguments.write:
        publish("docs/speed.md", "torch_step", full_table(figures, machine()), figures)
        place("README.md", "torch_step, three rows", front_table(figures, machine()))


if __name__ == "__main__":
    main()
