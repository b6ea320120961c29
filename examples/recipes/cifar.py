"""CIFAR-10 and CIFAR-100, as they are, with human label noise (CIFAR-N) or long-tailed (CIFAR-LT).

Asked: on the real data, what do RGD, its opposite (`rgd.KL(scale=-0.7)`), class-balanced weights and logit
adjustment gain over plain training (ERM), in accuracy, on the rare classes and in the tail of the losses?

    python examples/recipes/cifar.py --data ~/data --dataset cifar10
    python examples/recipes/cifar.py --data ~/data --dataset cifar10 --labels ~/data/CIFAR-10_human.pt
    python examples/recipes/cifar.py --data ~/data --dataset cifar100 --imbalance 100

`~/data` holds `cifar-10-batches-py/` or `cifar-100-python/`, the "python version" of
https://www.cs.toronto.edu/~kriz/cifar.html; `cifar_files.py` beside this file says what is in them. Nothing
is fetched. It needs what `make evidence` needs (torch, scikit-learn, matplotlib, tqdm), and no torchvision.

Network and training: the ResNet-32 of He et al., "Deep residual learning for image recognition", CVPR 2016,
section 4.2 (464,154 parameters for ten classes, shortcuts without parameters); images padded by 4, cropped
and flipped at random; SGD with momentum 0.9, batches of 128, 200 epochs, a linear warm-up over 5, then a
cosine schedule, or `--schedule step`, a tenth at a half and again at three quarters, as there. On a GPU that
has bfloat16 the forward pass runs in it. The network of the last step is measured.

Protocol, that of `examples/evidence`, whose harness does it: learning rate and weight decay are chosen for
every arm by the accuracy on a tenth of the training set that is held out, from a grid that grows until the
best value lies inside; test data choose nothing. Each of the `--seeds` (12) chooses for itself. One seed
gives all arms the same split, initial network, batches, crops and flips, and differences are taken seed by
seed. Held-out labels are as noisy as the training labels. With `--imbalance` the held-out part is balanced
and drawn first, so the largest class has 4500 images (of CIFAR-100: 450). An arm takes 9 cells a seed, more
where its grid grows; `--untuned` trains one cell alone, and its table says NOT TUNED.

Everything is written to `--output`. Finished runs are kept there and the run under way is saved after every
epoch: the same command goes on where it was stopped, and one that only adds arms or seeds trains only those.
For several GPUs, start a process on each with `--only` and other `--arms`, all into one folder; the command
without `--only` then makes the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import rgd
import torch
import torch.nn.functional as F
from cifar_files import LAYOUTS, Cifar, held, human_labels, long_tail, read, split
from common import Parser, found_precision, write
from rgd.torch import RGDLoss
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "evidence"))

from harness import (
    Arm,
    Cell,
    Chosen,
    Classification,
    Data,
    Grid,
    Outcome,
    Part,
    Problem,
    Result,
    Store,
    Table,
    mean_one,
    opposite_sign,
    sweep,
    times_mean_weight,
    untuned,
)
from harness.pictures import intervals, save
from harness.row import text, versions

METRICS = (
    "accuracy", "balanced_accuracy", "worst_class_accuracy", "mean_loss", "worst_tenth", "scaled_mean_loss",
    "scaled_worst_tenth",
)  # fmt: skip
MOMENTUM, PADDING, EVALUATED_AT_ONCE = 0.9, 4, 1000
NOISY_SETS = {"cifar10": "worse_label", "cifar100": "noisy_label"}


# --- the arms ---


def class_balanced(counts: Tensor) -> Tensor:
    """Class weights (1, C) of counts (1, C)."""
    return torch.tensor(rgd.class_balanced(counts[0]), dtype=torch.float32)[None]


@dataclasses.dataclass(frozen=True)
class CifarArm(Arm):
    """An arm that may add the logarithm of the classes' shares to the logits while it trains."""

    logit_adjustment: bool = False

    def key(self) -> str:
        return f"{super().key()} {self.logit_adjustment}"

    def criterion(self, counts: Tensor) -> RGDLoss:
        """The loss of training, for classes with these counts (C,)."""
        weight = None if self.class_weights is None else self.class_weights(counts[None])[0]
        adjustment = (
            torch.tensor(rgd.log_prior(counts), dtype=torch.float32) if self.logit_adjustment else None
        )
        return RGDLoss(weight, weighting=self.weighting or rgd.ERM(), logit_adjustment=adjustment)


ERM, RGD, ADJUSTED, BALANCED = "ERM", "RGD", "logit-adjustment", "class-balanced"
ON_TOP = f"{RGD}-on-{ADJUSTED}"
ARMS = {
    arm.name: arm
    for arm in (
        CifarArm(ERM),
        CifarArm(RGD, rgd.KL(1.0)),
        CifarArm("s=-0.7", rgd.KL(scale=-0.7)),
        CifarArm(BALANCED, class_weights=class_balanced),
        CifarArm(ADJUSTED, logit_adjustment=True),
        CifarArm(ON_TOP, rgd.KL(1.0), logit_adjustment=True),
    )
}
BASELINES = {ERM: "", ON_TOP: ADJUSTED}
FOR_ALL, FOR_RARE_CLASSES = (ERM, RGD, "s=-0.7"), (BALANCED, ADJUSTED, ON_TOP)


def chosen_arms(names: Sequence[str], scales: Sequence[float], alone: bool = False) -> list[CifarArm]:
    """The arms, unless `alone` with those they are compared with, in the order of `ARMS`; then the scales."""
    compared_with = () if alone else (ERM, *(BASELINES[name] for name in names if name in BASELINES))
    wanted = {*names, *compared_with}
    arms = [arm for name, arm in ARMS.items() if name in wanted]
    more = [CifarArm(f"s={scale:g}", rgd.KL(scale=scale)) for scale in scales]
    return arms + [arm for arm in more if arm.name not in wanted]


# --- the network ---


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters: every other pixel, and channels of zeros."""

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.stride, self.new = channels // before, channels - before
        self.conv1 = nn.Conv2d(before, channels, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        if self.new:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new // 2))
        return (x + y).relu()


class ResNet(nn.Module):
    """Logits (B, C) of images (B, 3, 32, 32), from 6 n + 2 layers: He et al. 2016, section 4.2."""

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"--depth must be 6 n + 2, such as 8, 20 or 32, got {depth}")
        channels = [16] * (depth // 6) + [32] * (depth // 6) + [64] * (depth // 6)
        self.conv, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*map(Block, [16, *channels[:-1]], channels))
        self.head = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.norm(self.conv(images)).relu()).mean((2, 3)))


# --- training ---


@dataclasses.dataclass(frozen=True)
class CifarProblem(Classification):
    """A data set to learn, and how: what decides the result of a run beside arm, rates and seed."""

    features: int = 3 * 32 * 32
    outputs: int = 10
    depth: int = 32
    warm_up: int = 5
    schedule: str = "cosine"
    precision: str = "float32"
    content: str = ""

    def key(self) -> str:
        own = (self.depth, self.warm_up, self.schedule, self.precision, self.content)
        return f"{super().key()} {own}"

    def speed(self, step: int, steps: int) -> float:
        """The learning rate of a step as a multiple of the largest."""
        done = step / steps
        rate = 0.5 + 0.5 * math.cos(math.pi * done)
        if self.schedule == "step":
            rate = 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
        warm_up_steps = self.warm_up * steps // self.epochs
        return min(1.0, (step + 1) / (warm_up_steps + 1)) * rate


def draw(seed: int, data: Cifar, labels: np.ndarray, validation: float, sizes: Sequence[int] | None) -> Data:
    """The three parts of a seed. Test images are those of the data set, with its own labels."""
    train, chosen_by = split(labels, seed, validation, sizes)
    parts = [(data.train_images[rows], labels[rows]) for rows in (train, chosen_by)]
    parts.append((data.test_images, data.test_labels))
    tensors = [(torch.from_numpy(images), torch.from_numpy(target)) for images, target in parts]
    return Data(*(Part(images, target, torch.zeros_like(target)) for images, target in tensors))


def crop_and_flip(images: Tensor, corners: Tensor, flips: Tensor) -> Tensor:
    """Images (B, C, S, S) padded by zeros, cut out at corners (B, 2) and mirrored where `flips` (B,)."""
    side = images.shape[-1]
    padded = F.pad(images, (PADDING,) * 4)
    along = torch.arange(side, device=images.device)
    rows = corners[:, :1] + along
    columns = corners[:, 1:] + torch.where(flips[:, None], along.flip(0), along)
    batch = torch.arange(len(images), device=images.device)
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What trains a run, one after the other, and saves the one under way after every epoch."""

    store: Store
    folder: pathlib.Path
    device: torch.device

    def __call__(
        self,
        problem: Problem,
        arm: Arm,
        seeds: Sequence[int],
        cells: Sequence[Cell],
        snapshots: Sequence[int],
    ) -> dict[tuple[int, Cell], list[Outcome]]:
        if snapshots or not isinstance(problem, CifarProblem) or not isinstance(arm, CifarArm):
            raise TypeError(
                "this trainer takes a CifarProblem and a CifarArm, and measures the last step only"
            )
        return {(s, c): [self.run(problem, arm, s, c)] for s in seeds for c in cells}

    def run(self, problem: CifarProblem, arm: CifarArm, seed: int, cell: Cell) -> Outcome:
        """Trains a network, from its last finished epoch if it was begun before, and measures it."""
        begin = time.perf_counter()
        data = problem.draw(seed)
        if len(data.train.target) < problem.batch_size:
            raise ValueError(
                f"--batch {problem.batch_size} is more than the {len(data.train.target)} training images"
            )
        normal = normalisation(data.train.inputs, self.device)
        torch.manual_seed(1000 + seed)
        model = ResNet(problem.depth, problem.outputs).to(self.device, memory_format=torch.channels_last)
        criterion = arm.criterion(data.train.target.bincount(minlength=problem.outputs)).to(self.device)
        optimizer = torch.optim.SGD(
            model.parameters(), cell.learning_rate, MOMENTUM, weight_decay=cell.weight_decay
        )
        path = self.folder / f"{self.store.key(problem, arm, seed, cell, ())[:20]}.pt"
        parts = {"model": model, "criterion": criterion, "optimizer": optimizer}
        epoch, weight_sum, before = self.resume(path, parts)
        train = Part(*(x.to(self.device) for x in data.train))
        name = f"{arm.name}, rate {cell.learning_rate:g}, decay {cell.weight_decay:g}, seed {seed}"
        bar = tqdm(total=problem.epochs, initial=epoch, desc=name, unit="epoch", leave=False, disable=None)
        with bar:
            while epoch < problem.epochs:
                weight_sum += self.steps(problem, parts, cell, train, normal, seed, epoch)
                epoch += 1
                states = {part: x.state_dict() for part, x in parts.items()}
                seconds = before + time.perf_counter() - begin
                write(states | {"epoch": epoch, "weight_sum": weight_sum, "seconds": seconds}, path)
                bar.update()
        validation, test = (self.outputs(model, part.inputs, normal, problem.precision) for part in data[1:])
        measured = (
            {m: v.item() for m, v in problem.metrics(out, part, (validation, data.validation)).items()}
            for out, part in zip((validation, test), data[1:], strict=True)
        )
        outcome = Outcome(*measured, weight_sum / problem.epochs, before + time.perf_counter() - begin)
        path.unlink()
        return outcome

    def steps(  # noqa: PLR0917
        self,
        problem: CifarProblem,
        parts: dict[str, Any],
        cell: Cell,
        train: Part,
        normal: tuple[Tensor, ...],
        seed: int,
        epoch: int,
    ) -> float:
        """The steps of one epoch; gives their mean weight. What does not fill a batch waits an epoch."""
        model, criterion, optimizer = parts["model"], parts["criterion"], parts["optimizer"]
        scale, shift = normal
        samples, batch = len(train.target), problem.batch_size
        batches = samples // batch
        random = np.random.default_rng([62, seed, epoch])
        drawn = (
            random.permutation(samples),
            random.integers(0, 2 * PADDING + 1, (samples, 2)),
            random.random(samples) < 0.5,
        )
        order, corners, flips = (torch.from_numpy(x).to(self.device) for x in drawn)
        total = torch.zeros((), device=self.device)
        for k in range(batches):
            rows = order[k * batch : (k + 1) * batch]
            images = crop_and_flip((train.inputs[rows] - shift) * scale, corners[rows], flips[rows])
            rate = cell.learning_rate * problem.speed(epoch * batches + k, batches * problem.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            criterion(self.forward(model, images, problem.precision), train.target[rows]).backward()
            optimizer.step()
            total += criterion.last_weights.mean()
        return total.item() / batches

    def resume(self, path: pathlib.Path, parts: dict[str, Any]) -> tuple[int, float, float]:
        """Finished epochs, the sum of their mean weights, and seconds of a run; zeros for a new one."""
        if not path.exists():
            return 0, 0.0, 0.0
        kept = torch.load(path, map_location=self.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(kept[name])
        return kept["epoch"], kept["weight_sum"], kept["seconds"]

    def forward(self, model: nn.Module, images: Tensor, precision: str) -> Tensor:
        """Logits, in the dtype of the images."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return model(images.contiguous(memory_format=torch.channels_last)).to(images.dtype)

    @torch.no_grad()
    def outputs(self, model: nn.Module, images: Tensor, normal: tuple[Tensor, ...], precision: str) -> Tensor:
        """Logits (1, n, C) of all images, on the CPU."""
        scale, shift = normal
        model.eval()
        some = [(part.to(self.device) - shift) * scale for part in images.split(EVALUATED_AT_ONCE)]
        return torch.cat([self.forward(model, part, precision).cpu() for part in some])[None]


def normalisation(images: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """One over the deviation, and the mean, of each channel of the training images, (1, 3, 1, 1)."""
    histograms = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)]).double()
    shares, values = histograms / histograms.sum(1, keepdim=True), torch.arange(256).double()
    mean = shares @ values
    deviation = ((shares @ values.square()) - mean.square()).sqrt().clamp(min=1.0)
    dtype = torch.get_default_dtype()
    return tuple(x.to(dtype).view(1, 3, 1, 1).to(device) for x in (1 / deviation, mean))


# --- the command ---


def found_device() -> torch.device:
    """A GPU if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def parser() -> argparse.ArgumentParser:
    out = Parser(
        description="RGD and others on CIFAR-10 and CIFAR-100, with human label noise or long-tailed"
    )
    add = out.add

    add("--data", type=pathlib.Path, required=True, help="where the folder of the python version is")
    add("--dataset", choices=tuple(LAYOUTS), default="cifar10", help="which data set")
    add("--labels", type=pathlib.Path, help="CIFAR-10_human.pt or CIFAR-100_human.pt of CIFAR-N")
    add("--label-set", help="which labels of that file; worse_label for CIFAR-10, noisy_label for CIFAR-100")
    add("--imbalance", type=float, metavar="FACTOR", help="largest class over smallest, as in CIFAR-LT")
    add("--arms", nargs="+", choices=tuple(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}; {ERM} always")
    add("--only", action="store_true", help="train the named arms alone and make no table")
    add("--scale", nargs="+", type=float, default=(), metavar="S", help="further arms rgd.KL(scale=S)")
    add(
        "--controls", action="store_true", help="RGD's weights over their mean, their mean, the opposite sign"
    )
    add("--seeds", type=int, default=12, help="that are measured")
    add(
        "--rates",
        nargs="+",
        type=float,
        default=(0.05, 0.1, 0.2),
        metavar="R",
        help="learning rates to begin with",
    )
    add(
        "--decays",
        nargs="+",
        type=float,
        default=(2.5e-4, 5e-4, 1e-3),
        metavar="D",
        help="weight decays to begin with",
    )
    add(
        "--untuned", nargs=2, type=float, metavar=("RATE", "DECAY"), help="one cell for all arms, no evidence"
    )
    add("--validation", type=float, default=0.1, help="share of each class that is held out to choose by")
    add("--depth", type=int, default=32, help="of the ResNet, 6 n + 2")
    add("--epochs", type=int, default=200, help="of training")
    add("--batch", type=int, default=128, help="images a step")
    add("--warm-up", type=int, default=5, help="epochs")
    add("--schedule", choices=("cosine", "step"), default="cosine", help="of the rate")
    add("--device", type=torch.device, help="the GPU if there is one, else the CPU")
    add("--precision", choices=("bfloat16", "float32"), help="bfloat16 where the GPU has it")
    add("--output", type=pathlib.Path, help="folder of runs, table and picture; runs/<setting> by default")
    return out


def check(options: argparse.Namespace) -> None:
    """Refuses options that make no sense."""
    if options.labels is not None and options.imbalance is not None:
        raise ValueError("--labels and --imbalance are two experiments: give one of them")
    if options.label_set is not None and options.labels is None:
        raise ValueError("--label-set names labels of a file: give the file with --labels")
    if options.imbalance is not None and options.imbalance <= 1:
        raise ValueError(
            f"--imbalance must be above 1, got {options.imbalance:g}: leave it out for no imbalance"
        )
    if options.only and not (options.arms or options.scale):
        raise ValueError("--only trains the arms that --arms or --scale names: give one of them")
    if options.seeds < 2:
        raise ValueError(f"--seeds must be at least 2 for an interval, got {options.seeds}")
    if not 0 < options.validation < 1:
        raise ValueError(f"--validation must lie between 0 and 1, got {options.validation:g}")


def prepared(options: argparse.Namespace, precision: str) -> CifarProblem:
    """Reads the files."""
    data = read(options.data, options.dataset)
    classes, labels, sizes = len(data.names), data.train_labels, None
    setting = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[options.dataset]
    if options.labels is not None:
        name = options.label_set or NOISY_SETS[options.dataset]
        labels = human_labels(options.labels, name, labels, classes)
        wrong = float(np.mean(labels != data.train_labels))
        setting += f", {name} ({100 * wrong:.1f}% wrong)"
    if options.imbalance is not None:
        largest = int(np.bincount(labels, minlength=classes).min())
        sizes = long_tail(largest - held(largest, options.validation), options.imbalance, classes)
        setting += f", long-tailed, factor {options.imbalance:g}"
        print(
            f"training images of each class: {sizes[0]} ({data.names[0]}) to {sizes[-1]} ({data.names[-1]})"
        )
    content = hashlib.sha256(labels.tobytes() + data.train_images.tobytes() + data.test_images.tobytes())
    return CifarProblem(
        setting,
        functools.partial(draw, data=data, labels=labels, validation=options.validation, sizes=sizes),
        outputs=classes, hidden=(), epochs=options.epochs, batch_size=options.batch, depth=options.depth,
        warm_up=options.warm_up, schedule=options.schedule, precision=precision,
        content=f"{content.hexdigest()[:16]} {options.validation:g}",
    )  # fmt: skip


def compared(options: argparse.Namespace, problem: CifarProblem, trainer: Trainer) -> list[Result]:
    """Trains every arm, and returns the arm that each is compared with."""
    names = options.arms or (FOR_ALL + FOR_RARE_CLASSES if options.imbalance is not None else FOR_ALL)
    if options.only:
        names = options.arms or ()
    arms = chosen_arms(names, options.scale, alone=options.only)
    grid = Grid(tuple(sorted(options.rates)), tuple(sorted(options.decays)))
    runs = options.seeds * (len(grid.cells()) if options.untuned is None else 1)
    with tqdm(desc=problem.name, total=runs * len(arms), unit="run", disable=None) as progress:

        def best(arm: Arm) -> Chosen:
            if options.untuned is not None:
                return untuned(
                    problem, arm, Cell(*options.untuned), seeds=options.seeds, store=trainer.store,
                    trainer=trainer, progress=progress, one_by_one=True,
                )  # fmt: skip
            return sweep(
                problem, arm, grid=grid, seeds=options.seeds,
                store=trainer.store, trainer=trainer, progress=progress, one_by_one=True,
            )  # fmt: skip

        results: list[Result] = []
        for arm in arms:
            chosen = best(arm)
            results.append(Result(problem.name, chosen, BASELINES.get(arm.name, ERM)))
            if options.controls and arm.name == RGD:
                controls = (mean_one(arm), times_mean_weight(arm, chosen.mean_weight), opposite_sign(arm))
                results += [Result(problem.name, best(control), ERM) for control in controls]
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    (setting,) = table.settings()
    lines = {arm: table.line(setting, arm, METRICS[0]) for arm in table.arms(setting)}
    arms = {a: a if line.baseline == ERM else f"{a}, against {line.baseline}" for a, line in lines.items()}
    arms.pop(ERM)
    marks = "hollow: the interval holds 0" + (", NOT TUNED" if "NOT TUNED" in table.runs[0]["grid"] else "")
    title = f"Difference to {ERM}, {table.lines[0].seeds} seeds; {marks}"
    words = {metric: metric.replace("_", " ") for metric in METRICS}
    save(intervals(table, arms, words, title), path, table)


def main(arguments: Sequence[str] | None = None) -> Table | None:
    """Reads, trains, prints, and writes the table and the picture; None with `--only`."""
    options = parser().parse_args(arguments)
    check(options)
    device = options.device or found_device()
    precision = options.precision or found_precision(device)
    torch.backends.cudnn.benchmark = True
    problem = prepared(options, precision)
    folder = options.output or pathlib.Path("runs") / problem.name.replace(", ", "_").replace(" ", "-")
    print(f"{problem.name} on {device} in {precision}; runs are kept in {folder}")
    store = Store(folder / "runs.jsonl", pathlib.Path(__file__))
    try:
        results = compared(options, problem, Trainer(store, folder, device))
    except KeyboardInterrupt:
        raise SystemExit("\nstopped: the same command goes on from the last finished epoch") from None
    if options.only:
        print("trained; the same command without --only makes the table")
        return None
    given = sys.argv[1:] if arguments is None else arguments
    header = {
        "command": f"python examples/recipes/cifar.py {' '.join(given)}",
        "versions": f"{versions()}, {device.type} in {precision}",
        "time": f"{store.seconds():.0f} s of training",
    }
    table = Table.of(header, METRICS, results)
    path = folder / "cifar.csv"
    table.write(path)
    print(text(table))
    picture(table, path.with_suffix(".png"))
    print(f"\nTable: {path}\nPicture: {path.with_suffix('.png')}")
    return table


if __name__ == "__main__":
    main()
