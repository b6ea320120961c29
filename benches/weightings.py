"""Times a training step's loss with each weighting, forward and backward from logits, and with peers' losses.

Run `make bench BENCH=benches/weightings.py`, or this file with `--json FILE` or `--quick`. Each loss is timed
in turn with `nn.CrossEntropyLoss`, A B A B ..., in one process; the table gives the median of the pairwise
ratios and their quartiles. A ratio of 0.5 says that the loss took half the time of `nn.CrossEntropyLoss`.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable

import rgd
import torch
import torch.nn.functional as F
from rgd.torch import RGDLoss
from torch import Tensor, nn
from torch_step import compare, machine, plain_rgd, step, write
from tqdm import tqdm

SIZES = [(128, 10), (512, 100), (1024, 1000)]
MEMBERS: dict[str, rgd.Weighting] = {
    "ERM()": rgd.ERM(),
    "KL(tau=1.0)": rgd.KL(tau=1.0),
    "KL(scale=-0.7)": rgd.KL(scale=-0.7),
    "KL(tau=1.0, normalize=True)": rgd.KL(tau=1.0, normalize=True),
    "KLBall(0.1)": rgd.KLBall(0.1),
    "ChiSquareBall(0.1)": rgd.ChiSquareBall(0.1),
    "CVaR(0.5)": rgd.CVaR(0.5),
    "Focal(1.0)": rgd.Focal(1.0),
    "MidrangeKL(0.5)": rgd.MidrangeKL(0.5),
    "Trimmed(KL(tau=1.0), 0.05)": rgd.Trimmed(rgd.KL(tau=1.0), 0.05),
}
Loss = Callable[[Tensor, Tensor], Tensor]


def peers() -> dict[str, Loss]:
    """What one would use without rgd; those that are installed."""
    found: dict[str, Loss] = {"KL(tau=1) in plain torch": plain_rgd}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own docstrings warn when they are compiled
            sqwash = importlib.import_module("sqwash")
    except ModuleNotFoundError:
        return found

    def superquantile(logits: Tensor, target: Tensor) -> Tensor:
        return sqwash.reduce_superquantile(F.cross_entropy(logits, target, reduction="none"), 0.5)

    found["superquantile(0.5) of sqwash, which is CVaR(0.5)"] = superquantile
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="a fraction of the time")
    arguments = parser.parse_args()
    budget = 0.2 if arguments.quick else 2.0
    torch.manual_seed(0)
    losses: dict[str, Loss] = {f"`{name}`": RGDLoss(weighting=member) for name, member in MEMBERS.items()}
    losses |= peers()
    found = []
    with tqdm(total=len(losses) * len(SIZES), leave=False) as progress:
        for name, loss in losses.items():
            ratios = []
            for size in SIZES:
                progress.set_description(f"{name} {size}")
                logits = torch.randn(size).requires_grad_()
                target = torch.randint(0, size[1], size[:1])
                plain = step(nn.CrossEntropyLoss(), logits, target)
                ratios.append(compare(plain, step(loss, logits, target), budget))
                progress.update()
            found.append((name, ratios))

    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print("time over that of nn.CrossEntropyLoss, float32 logits: median of pairwise ratios (quartiles)\n")
    print("| loss | " + " | ".join(str(size) for size in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    for name, ratios in found:
        cells = [f"{r.median:.2f} ({r.low:.2f}-{r.high:.2f})" for r in ratios]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if arguments.json:
        figures = [
            {"loss": name, "size": size, **ratio._asdict()}
            for name, ratios in found
            for size, ratio in zip(SIZES, ratios, strict=True)
        ]
        write(arguments.json, figures)


if __name__ == "__main__":
    main()
