"""Times the head of a language model, hidden states to gradients, against what a user has or would write.

Run `make bench BENCH=benches/linear_cross_entropy.py`, or this file with `--json FILE`, `--threads N`,
`--sizes N,D,C ...`, `--dtypes NAME ...` or `--quick`. `--write` measures the ways of docs/speed.md and writes
its table. The ways take turns in one process, each forward and
backward with respect to hidden states and head. The table gives, for each, the median over the rounds of its
time and of rgd's time over it (quartiles), and the peak of the process's memory above hidden states, head and
targets, gradients included (Linux; `VmHWM`, in a process of its own).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import rgd
import torch
import torch.nn.functional as F
from _report import described, machine, publish, write
from rgd.torch import RGDLoss, linear_cross_entropy
from torch import Tensor, nn
from tqdm import tqdm

SIZES = [(2048, 256, 32000), (4096, 768, 50257), (1024, 2048, 128256)]
QUICK = [(256, 64, 4000)]
OURS = "rgd.torch.linear_cross_entropy"
PRODUCTS = "three products alone"

CHUNKED = "torch's chunked, unweighted"
WHOLE = "F.linear + nn.CrossEntropyLoss, unweighted"
# The rows of the table in docs/speed.md, in words.
WORDS = {
    PRODUCTS: "the three matrix products alone",
    CHUNKED: "torch's chunked `F.linear_cross_entropy`, unweighted",
    "torch's chunked, weights outside": "the same, with weights computed outside of it",
    WHOLE: "`F.linear` and `nn.CrossEntropyLoss`, unweighted",
    "F.linear + plain-torch RGD": "`F.linear` and RGD in plain torch",
}

Head = Callable[[Tensor, Tensor, Tensor], Any]


class Result(NamedTuple):
    """The result of one way at a size and dtype: seconds, rgd's time over its time (quartiles), megabytes."""

    seconds: float
    median: float
    low: float
    high: float
    megabytes: float | None


def cross_entropy(hidden: Tensor, head: Tensor, target: Tensor) -> None:
    """The unweighted loss that most training code has."""
    nn.CrossEntropyLoss()(F.linear(hidden, head), target).backward()


def plain_rgd(hidden: Tensor, head: Tensor, target: Tensor) -> None:
    """Re-weighting in plain torch."""
    losses = F.cross_entropy(F.linear(hidden, head), target, reduction="none")
    weights = (losses.clamp(max=1.0) / 2.0).exp().detach()
    (weights * losses).mean().backward()


def rgd_loss(hidden: Tensor, head: Tensor, target: Tensor) -> None:
    """RGDLoss of all logits."""
    RGDLoss()(F.linear(hidden, head), target).backward()


def rgd_loss_in_place(hidden: Tensor, head: Tensor, target: Tensor) -> None:
    """RGDLoss of all logits, which the gradient overwrites."""
    RGDLoss(inplace=True)(F.linear(hidden, head), target).backward()


def chunked(hidden: Tensor, head: Tensor, target: Tensor) -> None:
    """torch's chunks: unweighted."""
    options = nn.LinearCrossEntropyOptions()
    F.linear_cross_entropy(hidden, head, target, options=options).backward()


def chunked_outside(hidden: Tensor, head: Tensor, target: Tensor) -> None:
    """torch's chunks with weights that are computed outside of them, after all losses are known."""
    options = nn.LinearCrossEntropyOptions()
    losses = F.linear_cross_entropy(hidden, head, target, reduction="none", options=options)
    weights = (losses.detach().clamp(max=1.0) / 2.0).exp()
    (weights * losses).mean().backward()


def one_pass(hidden: Tensor, head: Tensor, target: Tensor) -> None:
    """rgd's chunks: re-weighted."""
    linear_cross_entropy(hidden, head, target, tau=1.0).backward()


def one_pass_with_extras(hidden: Tensor, head: Tensor, target: Tensor) -> None:
    """The same, with all that `returns=` names."""
    names = "entropy", "logsumexp", "correct"
    loss, _ = linear_cross_entropy(hidden, head, target, tau=1.0, returns=names)
    loss.backward()


def gated(hidden: Tensor, head: Tensor, target: Tensor) -> None:
    """rgd's chunks, weighted by the entropy."""
    linear_cross_entropy(hidden, head, target, weighting=rgd.EntropyGate(rgd.ERM())).backward()


def products(hidden: Tensor, head: Tensor, target: Tensor) -> None:
    """The three matrix products alone, each whole, into existing memory: the lower limit of the time."""
    n, classes = hidden.shape[0], head.shape[0]
    key = (n, hidden.shape[1], classes, hidden.dtype)
    if key not in _BUFFERS:
        _BUFFERS.clear()
        _BUFFERS[key] = hidden.new_empty(n, classes), torch.empty_like(hidden), torch.empty_like(head)
    logits, of_hidden, of_head = _BUFFERS[key]
    with torch.no_grad():
        torch.mm(hidden, head.t(), out=logits)
        torch.mm(logits, head, out=of_hidden)
        torch.mm(logits.t(), hidden, out=of_head)


_BUFFERS: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}


def ways() -> dict[str, Head]:
    """Each way by its name; torch's own chunks where this torch has them."""
    found: dict[str, Head] = {OURS: one_pass, PRODUCTS: products}
    if hasattr(nn, "LinearCrossEntropyOptions"):
        found[CHUNKED] = chunked
        found["torch's chunked, weights outside"] = chunked_outside
    found[f"{OURS}(returns=...)"] = one_pass_with_extras
    found[f"{OURS}, EntropyGate(ERM())"] = gated
    found[WHOLE] = cross_entropy
    found["F.linear + plain-torch RGD"] = plain_rgd
    found["F.linear + RGDLoss"] = rgd_loss
    found["F.linear + RGDLoss(inplace=True)"] = rgd_loss_in_place
    return found


def memory(name: str) -> int:
    """A line of the process's status in bytes."""
    status = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def peak(way: str, size: tuple[int, int, int], dtype: str) -> float | None:
    """Megabytes at the peak of one run above those before it, in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads())]
    command += ["--peak", way, dtype, *map(str, size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(way: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """What `peak` reads."""
    run = ways()[way]
    run(*inputs((16, 8, 64), dtype))  # libraries are loaded, threads started
    given = inputs(size, dtype)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    run(*given)
    print((memory("VmHWM") - before) / 1e6)


def inputs(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets."""
    n, features, classes = size
    torch.manual_seed(0)
    hidden = torch.randn(n, features).to(dtype).requires_grad_()
    head = (torch.randn(classes, features) / features**0.5).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, classes, (n,))


def compare(
    size: tuple[int, int, int], dtype: torch.dtype, rounds: int, names: Iterable[str]
) -> dict[str, Result]:
    """The ways of these names in turn at one size."""
    hidden, head, target = inputs(size, dtype)

    def prepared(way: Head) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = head.grad = None
            way(hidden, head, target)

        return run

    runs = {name: prepared(way) for name, way in ways().items() if name in names}
    name_of_dtype = str(dtype).removeprefix("torch.")
    megabytes = {name: None if name == PRODUCTS else peak(name, size, name_of_dtype) for name in runs}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    _BUFFERS.clear()
    results = {}
    for name, taken in times.items():
        ratios = [ours / other for ours, other in zip(times[OURS], taken, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
        results[name] = Result(statistics.median(taken), median, low, high, megabytes[name])
    return results


def table(figures: list[dict[str, Any]]) -> str:
    """The table of docs/speed.md: a row a way, a column a size and dtype."""
    columns = list(dict.fromkeys((one["size"], one["dtype"]) for one in figures))
    found = {(one["way"], (one["size"], one["dtype"])): one for one in figures}
    lines = [
        "The head of a language model, from hidden states to gradients, sizes (N, D, C), on",
        f"{described()}: the time of `linear_cross_entropy` with RGD over that of each",
        "alternative, median of rounds in turn, with quartiles. Below 1, it is faster. The last row is the",
        "peak of the memory in MB above hidden states and head: of rgd, of torch's chunked head, of all",
        "logits.",
        "`make bench BENCH=benches/linear_cross_entropy.py` measures it.",
        "",
        "| | " + " | ".join(f"{size}, {dtype}" for size, dtype in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for way, words in WORDS.items():
        cells = [found[way, column] for column in columns if (way, column) in found]
        if cells:
            shown = (f"{one['median']:.2f} ({one['low']:.2f}-{one['high']:.2f})" for one in cells)
            lines.append(f"| {words} | " + " | ".join(shown) + " |")
    peaks = [[found[way, column]["megabytes"] for way in (OURS, CHUNKED, WHOLE)] for column in columns]
    lines.append("| memory | " + " | ".join(", ".join(f"{one:.0f}" for one in peak) for peak in peaks) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="a small size only")
    parser.add_argument("--sizes", nargs="+", metavar="N,D,C", help="other sizes than those of the file")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="dtypes to measure")
    parser.add_argument("--threads", type=int, help="torch's threads; by default torch's own choice")
    parser.add_argument("--rounds", type=int, default=5, help="how often the ways take turns")
    parser.add_argument(
        "--write", action="store_true", help="write the table of docs/speed.md, of fewer ways"
    )
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.peak:
        way, dtype, *size = arguments.peak
        print_peak(way, getattr(torch, dtype), tuple(map(int, size)))
        return
    sizes = QUICK if arguments.quick else SIZES
    if arguments.sizes:
        sizes = [tuple(int(part) for part in size.split(",")) for size in arguments.sizes]

    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    names = (OURS, *WORDS) if arguments.write else tuple(ways())
    figures: list[dict[str, Any]] = []
    for size in sizes:
        for dtype in tqdm([getattr(torch, d) for d in arguments.dtypes], leave=False, desc=str(size)):
            results = compare(size, dtype, arguments.rounds, names)
            name = str(dtype).removeprefix("torch.")
            print(f"\n(N, D, C) = {size}, {name}\n")
            print("| way | seconds | rgd's time over it (quartiles) | peak memory, MB |")
            print("|---|---|---|---|")
            for way, result in results.items():
                megabytes = "" if result.megabytes is None else f"{result.megabytes:.0f}"
                ratio = f"{result.median:.2f} ({result.low:.2f}-{result.high:.2f})"
                print(f"| {way} | {result.seconds:.3f} | {ratio} | {megabytes} |", flush=True)
                figures.append({"size": size, "dtype": name, "way": way, **result._asdict()})
    if arguments.json:
        write(arguments.json, figures)
    if arguments.write:
        publish("docs/speed.md", "linear", table(figures), figures)


if __name__ == "__main__":
    main()
