"""Times a training step's loss, forward and backward from logits, against what a user has or would write.

Run `make bench BENCH=benches/torch_step.py`, or this file with `--json FILE` or `--quick`. Each pair A, B is
timed in turn, A B A B ..., in one process; the table gives the median of the pairwise ratios and their
quartiles. A ratio of 2 says that RGDLoss took half the time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rgd.torch import RGDLoss
from torch import Tensor, nn
from tqdm import tqdm

SIZES = [(128, 10), (512, 100), (1024, 1000), (8, 21, 256, 256), (2048, 32000)]
DTYPES = [torch.float32, torch.bfloat16]
PEERS = ["nn.CrossEntropyLoss", "plain-torch RGD", "torch.compile'd RGD", "memcpy of the logits"]


class Ratio(NamedTuple):
    """Peer's time over RGDLoss's, and the median times in milliseconds."""

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


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """What the figures were measured with."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write(path: str, figures: list[dict[str, object]]) -> None:
    """The figures as JSON, with the machine."""
    Path(path).write_text(json.dumps({"machine": machine(), "figures": figures}, indent=1) + "\n")


def step(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Callable[[], None]:
    """One forward and backward; the gradient's memory is fresh each time, as in training."""

    def run() -> None:
        logits.grad = None
        loss(logits, target).backward()

    return run


def copy(buffer: Tensor, logits: Tensor) -> Callable[[], None]:
    """The limit: every logit read once, every gradient written once, into memory that is already there."""

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
    low, median, high = statistics.quantiles([peer / ours for ours, peer in times], n=4)
    ours, theirs = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return Ratio(median, low, high, ours, theirs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="the small sizes only, for a fraction of the time"
    )
    arguments = parser.parse_args()
    sizes = SIZES[:3] if arguments.quick else SIZES
    budget = 0.3 if arguments.quick else 3.0
    torch.manual_seed(0)
    compiled = torch.compile(plain_rgd)
    rows = []
    progress = tqdm([(size, dtype) for size in sizes for dtype in DTYPES], leave=False)
    for size, dtype in progress:
        progress.set_description(f"{tuple(size)} {str(dtype).removeprefix('torch.')}")
        logits = torch.randn(size).to(dtype).requires_grad_()
        target = torch.randint(0, size[1], (size[0], *size[2:]))
        buffer = torch.zeros_like(logits)
        peers = [
            step(nn.CrossEntropyLoss(), logits, target),
            step(plain_rgd, logits, target),
            step(compiled, logits, target),
            copy(buffer, logits),
        ]
        # Compiled code for this size, before the clock runs.
        peers[2]()
        ours = step(RGDLoss(), logits, target)
        rows.append((size, dtype, [compare(ours, peer, budget) for peer in peers]))
    progress.close()

    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print("time of the peer over the time of RGDLoss: median of pairwise ratios (quartiles)\n")
    print("| logits | dtype | RGDLoss, ms | " + " | ".join(PEERS) + " |")
    print("|---|---|---|" + "---|" * len(PEERS))
    for size, dtype, ratios in rows:
        cells = [f"{r.median:.2f} ({r.low:.2f}-{r.high:.2f})" for r in ratios]
        name = str(dtype).removeprefix("torch.")
        print(f"| {tuple(size)} | {name} | {ratios[0].rgd_ms:.3f} | " + " | ".join(cells) + " |")
    if arguments.json:
        figures = [
            {"size": size, "dtype": str(dtype), "peer": peer, **ratio._asdict()}
            for size, dtype, ratios in rows
            for peer, ratio in zip(PEERS, ratios, strict=True)
        ]
        write(arguments.json, figures)


if __name__ == "__main__":
    main()
