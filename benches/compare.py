"""Times training steps of this tree against those of an older commit, in turn.

Run `make bench-compare REV=...`. The older commit is checked out and built under `target/compare`. Each tree
runs in a process of its own, and one waits while the other is timed, A B B A ..., so that a slower machine
slows both. The table gives the median of the pairwise ratios and its quartiles. Above 1, this tree is slower.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TREES = ROOT / "target" / "compare"
# A worker builds these cases. An older tree may lack a feature, and then has no figure for its case.
CASES = [
    "(128, 10) float32",
    "(128, 10) bfloat16",
    "(512, 100) float32",
    "(1024, 1000) float32",
    "(128, 10) class weights",
    "(128, 10) CVaR(0.1)",
    "(128, 10) KLBall(0.1)",
    "(128, 10) base=CrossEntropyLoss",
    "sample_weights of 128",
    "linear head (256, 64, 1000)",
]


def work(case: str) -> Callable[[], Any]:
    """The function that a worker times."""
    import rgd  # noqa: PLC0415 - of the tree that the worker stands for
    import torch  # noqa: PLC0415
    from rgd.torch import LinearRGDLoss, RGDLoss, sample_weights  # noqa: PLC0415

    torch.manual_seed(0)
    if case.startswith("sample_weights"):
        losses = torch.rand(128)
        return lambda: sample_weights(losses)
    if case.startswith("linear"):
        logits, target, loss = torch.randn(256, 64), torch.randint(0, 1000, (256,)), LinearRGDLoss(64, 1000)
    else:
        rows, classes = (int(number) for number in case[1 : case.index(")")].split(", "))
        logits, target = torch.randn(rows, classes), torch.randint(0, classes, (rows,))
        logits = logits.bfloat16() if "bfloat16" in case else logits
        options: dict[str, Any] = {}
        if "class weights" in case:
            options["weight"] = torch.ones(classes)
        if "base" in case:
            options["base"] = torch.nn.CrossEntropyLoss(reduction="none")
        for member in ("CVaR", "KLBall"):
            if member in case:
                options["weighting"] = getattr(rgd, member)(0.1)
        loss = RGDLoss(**options)
    logits.requires_grad_()

    def step() -> None:
        logits.grad = None
        loss(logits, target).backward()

    return step


def serve(threads: int) -> None:
    """A worker: it reads a case and a number of calls a line, and answers with the median time in seconds."""
    import time  # noqa: PLC0415

    import torch  # noqa: PLC0415

    torch.set_num_threads(threads)
    steps: dict[str, Callable[[], Any]] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        case, number = line.rstrip().split("|")
        if case not in steps:
            try:
                steps[case] = work(case)
            except (AttributeError, TypeError):  # the tree is older than this call
                print("nan", flush=True)
                continue
            for _ in range(50):
                steps[case]()
        times = []
        for _ in range(int(number)):
            start = time.perf_counter()
            steps[case]()
            times.append(time.perf_counter() - start)
        print(statistics.median(times), flush=True)


def build(revision: str) -> Path:
    """The folder of an older commit, built."""
    name = subprocess.run(
        ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    tree = TREES / name[:12]
    extension = tree / "python" / "rgd" / "_rgd.abi3.so"
    if not extension.exists():
        tree.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", name], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=tree, check=True, input=archive)
        print(f"building {revision} (some minutes)", flush=True)
        subprocess.run(
            ["cargo", "rustc", "--quiet", "--release", "--features=python", "--lib", "--crate-type=cdylib"],
            cwd=tree, check=True, env={**os.environ, "PYO3_PYTHON": sys.executable},
        )  # fmt: skip
        built = next((tree / "target" / "release").glob("*rgd.so"))
        built.replace(extension)
    return tree


class Tree:
    """A worker of one tree."""

    def __init__(self, tree: Path, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(tree / "python")},
        )  # fmt: skip
        self.answer()

    def answer(self) -> str:
        """The next line that the worker writes."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit("a worker has ended: its error is above")
        return line

    def seconds(self, case: str, number: int) -> float:
        """The median time of some calls."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{case}|{number}\n")
        self.process.stdin.flush()
        return float(self.answer())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revision", nargs="?", help="the older commit")
    parser.add_argument("--pairs", type=int, default=100, help="how many pairs are timed of each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--serve", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    if arguments.revision is None:
        parser.error("name the older commit, as in make bench-compare REV=HEAD~5")
    trees = [Tree(tree, arguments.threads) for tree in (build(arguments.revision), ROOT)]
    rows = []
    for case in tqdm(CASES, leave=False):
        number = 3 if "1000" in case else 10
        pairs = []
        for turn in range(arguments.pairs):
            order = (0, 1) if turn % 2 else (1, 0)
            times = {which: trees[which].seconds(case, number) for which in order}
            pairs.append((times[0], times[1]))
        if any(math.isnan(one) for pair in pairs for one in pair):
            rows.append(f"| {case} | - | - | - |")
            continue
        low, median, high = statistics.quantiles([new / old for old, new in pairs], n=4)
        old, new = (1e6 * statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append(f"| {case} | {old:.1f} | {new:.1f} | {median:.2f} ({low:.2f}-{high:.2f}) |")
    print(f"forward and backward, {arguments.threads} thread(s), medians of {arguments.pairs} pairs\n")
    print(f"| step | {arguments.revision}, us | this tree, us | ratio (quartiles) |\n|---|---|---|---|")
    print("\n".join(rows))
    return None


if __name__ == "__main__":
    main()
