"""Counts the steps of Python in one call of each front of rgd.torch, and compares them with a budget.

Run `make bench-instructions`. For small tensors the interpreter takes most of the time of a call, and the
noise of a timing hides a change of 8%. So this counts the steps of the interpreter (bytecode instructions) in
the files of rgd. The count is the same on every machine with the same Python. A call that takes more than its
budget fails; `--write` makes the counts the new budget, for a change that is worth its cost.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import rgd
import torch
from rgd.torch import RGD, LinearRGDLoss, RGDLoss, cross_entropy, reweighted_mean, sample_weights
from torch import nn

BUDGET = Path(__file__).parent / "instructions.json"
HOUSE = str(Path(rgd.__file__).parent)
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def calls() -> dict[str, Callable[[], Any]]:
    """The calls that are counted, each of a kind that a training loop makes."""
    logits, target = torch.randn(128, 10, requires_grad=True), torch.randint(0, 10, (128,))
    losses, graded = torch.rand(128), torch.rand(128, requires_grad=True)
    mask, shares = losses > 0.2, torch.rand(128)
    plain, weighted, other = RGDLoss(), RGDLoss(weight=torch.ones(10)), RGDLoss()
    tail, base = RGDLoss(weighting=rgd.CVaR(0.1)), RGDLoss(base=nn.CrossEntropyLoss(reduction="none"))
    optimizer = RGD(torch.optim.SGD([graded], lr=0.0))
    head, hidden = LinearRGDLoss(16, 10), torch.randn(128, 16, requires_grad=True)
    return {
        "RGDLoss": lambda: plain(logits, target),
        "RGDLoss, forward and backward": lambda: plain(logits, target).backward(),
        "RGDLoss(weight=...)": lambda: weighted(logits, target),
        "RGDLoss(weighting=CVaR)": lambda: tail(logits, target),
        "RGDLoss, sample_weight=": lambda: other(logits, target, sample_weight=shares),
        "RGDLoss, where=": lambda: other(logits, target, where=mask),
        "RGDLoss(base=...)": lambda: base(logits, target),
        "LinearRGDLoss": lambda: head(hidden, target),
        "RGD.backward": lambda: optimizer.backward(graded * 1.0),
        "cross_entropy": lambda: cross_entropy(logits, target),
        "reweighted_mean": lambda: reweighted_mean(graded),
        "sample_weights": lambda: sample_weights(losses),
    }


def count(call: Callable[[], Any]) -> int:
    """The instructions of one call in the files of rgd, once everything is warm."""
    for _ in range(3):
        call()
    counted = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal counted
        if not frame.f_code.co_filename.startswith(HOUSE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        counted += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return counted


def main() -> None:
    """Print the counts beside their budget, and fail if one is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="take the counts as the new budget")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    counts = {name: count(call) for name, call in calls().items()}
    budgets = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    if arguments.write:
        budgets[VERSION] = counts
        BUDGET.write_text(json.dumps(dict(sorted(budgets.items())), indent=1) + "\n")
    budget = budgets.get(VERSION, {})
    print(f"instructions of Python {VERSION} in the files of rgd, one call\n")
    print("| call | count | budget |\n|---|---|---|")
    for name, counted in counts.items():
        print(f"| {name} | {counted} | {budget.get(name, '-')} |")
    if not budget:
        print(f"\nno budget for Python {VERSION}: nothing to compare with")
    over = [name for name, counted in counts.items() if name in budget and counted > budget[name]]
    if over:
        sys.exit(
            f"\nover the budget: {', '.join(over)}. Make the call cheaper, or run "
            "`python benches/instructions.py --write` if the change is worth it"
        )


if __name__ == "__main__":
    main()
