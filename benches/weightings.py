"""Times a training step's loss with each weighting, forward and backward from logits, and with peers' losses.

Run `make bench BENCH=benches/weightings.py`, or this file: `--json FILE` writes the figures, `--write` the
table of docs/speed.md, `--quick` takes a fraction of the time. Each loss is timed in turn with
`nn.CrossEntropyLoss`, A B A B ..., in one process. The table gives the median of the pairwise ratios and its
quartiles. A ratio of 0.5 says that the loss took half the time of `nn.CrossEntropyLoss`.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable

import rgd
import torch
import torch.nn.functional as F
from _report import described, publish, write
from rgd.torch import RGDLoss
from torch import Tensor, nn
from torch_step import compare, plain_rgd, step
from tqdm import tqdm

SIZES = [(128, 10), (512, 100), (1024, 1000)]
MEMBERS: dict[str, rgd.Weighting] = {
    "ERM()": rgd.ERM(),
    "KL(tau=1.0)": rgd.KL(tau=1.0),
    "KL(scale=-0.7)": rgd.KL(scale=-0.7),
    "KL(tau=1.0, normalize=True)": rgd.KL(tau=1.0, normalize=True),
    "KLBall(0.1)": rgd.KLBall(0.1),
    "ChiSquareBall(0.1)": rgd.ChiSquareBall(0.1),
    "ChiSquare(1.0)": rgd.ChiSquare(1.0),
    "CVaR(0.5)": rgd.CVaR(0.5),
    "CVaR(0.5, smoothing=0.5)": rgd.CVaR(0.5, smoothing=0.5),
    "Focal(1.0)": rgd.Focal(1.0),
    "MidrangeKL(0.5)": rgd.MidrangeKL(0.5),
    "Trimmed(KL(tau=1.0), 0.05)": rgd.Trimmed(rgd.KL(tau=1.0), 0.05),
    "MovingAverage(KL(tau=1.0), 0.9)": rgd.MovingAverage(rgd.KL(tau=1.0), 0.9),
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
    parser.add_argument("--write", action="store_true", help="also write the table of docs/speed.md")
    arguments = parser.parse_args()
    budget = 0.2 if arguments.quick else 2.0
    torch.manual_seed(0)
    losses: dict[str, Loss] = {f"`{name}`": RGDLoss(weighting=member) for name, member in MEMBERS.items()}
    groups = {size: torch.arange(size[0]) % 4 for size in SIZES}
    by_group = RGDLoss(weighting=rgd.GroupDRO(4, step_size=0.01))
    losses["`GroupDRO(4, 0.01)`"] = lambda logits, target: by_group(
        logits, target, groups=groups[tuple(logits.shape)]
    )
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
                ratios.append(compare(step(loss, logits, target), plain, budget))
                progress.update()
            found.append((name, ratios))

    text = [
        f"One step of loss, forward and backward from float32 logits, on {described()}, "
        f"{torch.get_num_threads()} threads:",
        "its time over that of `nn.CrossEntropyLoss`, median of pairs timed in turn, with quartiles.",
        "Below 1, it is faster.",
        "`make bench BENCH=benches/weightings.py` measures it on your machine.",
        "",
        "| loss | " + " | ".join(str(size) for size in SIZES) + " |",
        "|---|" + "---|" * len(SIZES),
    ]
    for name, ratios in found:
        cells = [f"{r.median:.2f} ({r.low:.2f}-{r.high:.2f})" for r in ratios]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    print("\n".join(text))
    figures = [
        {"loss": name, "size": size, **ratio._asdict()}
        for name, ratios in found
        for size, ratio in zip(SIZES, ratios, strict=True)
    ]
    if arguments.json:
        write(arguments.json, figures)
    if arguments.write:
        publish("docs/speed.md", "weightings", "\n".join(text), figures)


if __name__ == "__main__":
    main()
