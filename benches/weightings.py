"""Times a training step's loss with each weighting and in each call, and with peers' losses.

Run `make bench BENCH=benches/weightings.py`, or this file: `--json FILE` writes the figures, `--write` the
tables of docs/speed.md, `--quick` takes a fraction of the time. A step is forward and backward from logits.
Each loss is timed in turn with `nn.CrossEntropyLoss`, A B A B ..., in one process, with one thread and with
torch's number of threads. The tables give the median of the pairwise ratios and its quartiles. A ratio of 0.5
says that the loss took half the time of `nn.CrossEntropyLoss`.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import rgd
import torch
import torch.nn.functional as F
from _report import described, machine, publish, write
from rgd.torch import RGDLoss, cross_entropy
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
HEADS = {"weightings": "loss", "calls": "call"}
Loss = Callable[[Tensor, Tensor], Tensor]


def peers() -> dict[str, Loss]:
    """The losses of other packages that one would use without rgd, if they are installed."""
    found: dict[str, Loss] = {"KL(tau=1) in plain torch": plain_rgd}
    sqwash, absgd = _imported("sqwash"), _imported("absgd.losses.ABLosses")
    if sqwash is not None:
        found["superquantile(0.5) of sqwash, which is CVaR(0.5)"] = lambda logits, target: (
            sqwash.reduce_superquantile(F.cross_entropy(logits, target, reduction="none"), 0.5)
        )
    if absgd is not None:
        moving = absgd.ABLoss(1.0)
        moving.updateLambda()
        found["ABLoss of absgd, which is MovingAverage(KL)"] = moving
    return found


def _imported(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their own docstrings, as they are compiled
            return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def members() -> dict[str, Loss]:
    """`RGDLoss` with every built-in weighting."""
    losses: dict[str, Loss] = {f"`{name}`": RGDLoss(weighting=member) for name, member in MEMBERS.items()}
    groups = {size: torch.arange(size[0]) % 4 for size in SIZES}
    by_group = RGDLoss(weighting=rgd.GroupDRO(4, step_size=0.01))
    losses["`GroupDRO(4, 0.01)`"] = lambda logits, target: by_group(
        logits, target, groups=groups[tuple(logits.shape)]
    )
    return losses


def calls() -> dict[str, Loss]:
    """The default weighting in other calls than `RGDLoss()(logits, target)`."""
    weighted, masked, each = RGDLoss(), RGDLoss(), RGDLoss(reduction="none")
    base = RGDLoss(base=nn.CrossEntropyLoss(reduction="none"))
    p = {size: torch.rand(size[0]) for size in SIZES}
    mask = {size: one > 0.2 for size, one in p.items()}
    return {
        "`cross_entropy(logits, target)`": cross_entropy,
        "`RGDLoss()`, `sample_weight=`": lambda logits, target: weighted(
            logits, target, sample_weight=p[tuple(logits.shape)]
        ),
        "`RGDLoss()`, `where=`": lambda logits, target: masked(
            logits, target, where=mask[tuple(logits.shape)]
        ),
        '`RGDLoss(reduction="none")`, and its mean': lambda logits, target: each(logits, target).mean(),
        "`RGDLoss(base=nn.CrossEntropyLoss(...))`": base,
        "unweighted: `nn.CrossEntropyLoss(...)`, and its mean": lambda logits, target: F.cross_entropy(
            logits, target, reduction="none"
        ).mean(),
    }


def measured(losses: dict[str, Loss], budget: float, progress: Any) -> list[dict[str, Any]]:
    """A figure for each loss, size and number of threads."""
    found, all_threads = [], torch.get_num_threads()
    for name, loss in losses.items():
        for size in SIZES:
            progress.set_description(f"{name} {size}")
            logits, target = torch.randn(size).requires_grad_(), torch.randint(0, size[1], size[:1])
            plain = step(nn.CrossEntropyLoss(), logits, target)
            for threads in (1, all_threads):
                torch.set_num_threads(threads)
                ratio = compare(step(loss, logits, target), plain, budget)
                found.append({"loss": name, "size": size, "threads": threads, **ratio._asdict()})
            progress.update()
    return found


def table(figures: list[dict[str, Any]], head: str, found: dict[str, Any]) -> str:
    """A line a loss, two columns a size; `found` is the machine of the figures."""
    text = [
        f"One step of loss, forward and backward from float32 logits, on {described(found)}:",
        "its time over that of `nn.CrossEntropyLoss`, median of pairs timed in turn, with quartiles.",
        f"Below 1, it is faster. Of two columns of a size the first is for one thread, the second for "
        f"{figures[-1]['threads']}.",
        "`make bench BENCH=benches/weightings.py` measures it on your machine.",
        "",
        f"| {head} | " + " | ".join(f"{size} | " for size in SIZES) + "|",
        "|---|" + "---|---|" * len(SIZES),
    ]
    for name in dict.fromkeys(figure["loss"] for figure in figures):
        cells = [
            f"{figure['median']:.2f} ({figure['low']:.2f}-{figure['high']:.2f})"
            for figure in figures
            if figure["loss"] == name
        ]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="a fraction of the time")
    parser.add_argument("--write", action="store_true", help="also write the tables of docs/speed.md")
    arguments = parser.parse_args()
    budget = 0.2 if arguments.quick else 1.2
    torch.manual_seed(0)
    of_members, of_calls = members() | peers(), calls()
    with tqdm(total=(len(of_members) + len(of_calls)) * len(SIZES), leave=False) as progress:
        found = {
            "weightings": measured(of_members, budget, progress),
            "calls": measured(of_calls, budget, progress),
        }
    texts = {name: table(figures, HEADS[name], machine()) for name, figures in found.items()}
    print("\n\n".join(texts.values()))
    if arguments.json:
        write(arguments.json, [figure for figures in found.values() for figure in figures])
    if arguments.write:
        for name, text in texts.items():
            publish("docs/speed.md", name, text, found[name])


if __name__ == "__main__":
    main()
