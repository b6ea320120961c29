"""ImageNet with a network of timm, re-weighted or plain, on one process or several.

    python examples/recipes/imagenet.py --data IMAGENET --weighting none kl
    torchrun --standalone --nproc-per-node 8 examples/recipes/imagenet.py --data IMAGENET --weighting none kl

IMAGENET holds `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`, a folder a class in both; any other images laid
out so will do. Nothing is fetched. It needs `pip install timm tqdm`.

Each weighting is trained after the other from the same initial network on the same batches. `--tau` and
`--scale` take several values, and `rgd.KL(tau, scale=scale)` is trained for every pair: the clip and the
scale of the paper's Figure 1.

    ... --weighting none kl --tau 0.5 1 3 --scale 0.25 0.5 1

The paper (arXiv 2306.09222) reports +1.01% on ImageNet-1K with ViT. Its settings are not repeated here. The
defaults are those of big_vision's `vit_s16_i1k.py` ("Better plain ViT baselines for ImageNet-1k", arXiv
2205.01580; 76.5% after 90 epochs) as far as timm has them: AdamW, 1024 images a step of all processes
together, 90 epochs, learning rate 0.001 after a warm-up of 8 epochs, then a cosine to 0; weight decay 0.1,
which AdamW multiplies by the learning rate (big_vision's own number, 1e-4, is the product); crops of at least
5% of the image, RandAugment, mixup 0.2. What differs: timm's `vit_small_patch16_224` has a class token and
learned positions, and gradients are clipped only with `--clip-gradients`, since clipping undoes part of what
weights do.

A hundredth of the training images is held out: choose learning rate and weight decay of each weighting by
`held_out_accuracy`, and look at `val` after that. What is measured is always plain: accuracy, top-5 accuracy,
mean loss, mean loss of the worst tenth of the images, accuracy of the worst class.

`--output` gets a folder a weighting, with `log.jsonl`, a line an epoch, and `last.pt`, from which the same
command goes on, after a stop in the middle of an epoch too, to the same numbers (on a GPU, but for the order
in which it adds). Augmentation, mixup and order follow from the seed, the step and the image, so any number
of processes that divides the batch trains on the same batches. Networks with batch normalisation see the
statistics of each process's part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pathlib
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import rgd
import timm
import torch
import torch.distributed as dist
from common import Parser, found_precision, write
from rgd.torch import RGDLoss
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.dataset import ImageDataset
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

SMALLEST_CROP = 0.05
# The options that decide the result of a run beside its weighting. A run is resumed only if none has changed.
SETTINGS = (
    "model", "image_size", "epochs", "batch", "optimizer", "lr", "weight_decay", "warm_up", "mixup", "cutmix",
    "smoothing", "auto_augment", "drop_path", "clip_gradients", "hold_out", "seed",
)  # fmt: skip


class Process(NamedTuple):
    """Which of the processes this is, and where it computes."""

    rank: int
    size: int
    device: torch.device


# --- data ---


class Seeded(Dataset[tuple[Tensor, int]]):
    """Images by (epoch, index): the pair and the seed decide the augmentation, whichever process draws it."""

    def __init__(self, images: ImageDataset, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        state = mixed(self.seed, 1, *key)
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)
        return self.images[key[1]]


def mixed(*numbers: int) -> int:
    """A seed made of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def order(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The images of an epoch."""
    return np.random.default_rng([71, seed, epoch]).permutation(rows)


def own_part(batch: np.ndarray, rank: int, size: int) -> np.ndarray:
    """A process's part of a batch: images that mixup pairs, first with last, stay together."""
    half = len(batch) // 2 // size
    first = np.arange(rank * half, (rank + 1) * half)
    return batch[np.concatenate([first, len(batch) - 1 - first[::-1]])]


class Batches(Sampler[list[tuple[int, int]]]):
    """This process's part of every step from one step on."""

    def __init__(self, rows: np.ndarray, options: argparse.Namespace, process: Process, begin: int) -> None:
        self.rows, self.options, self.process, self.begin = rows, options, process, begin
        self.per_epoch = len(rows) // options.batch

    def __len__(self) -> int:
        return self.per_epoch * self.options.epochs - self.begin

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch, of_epoch = self.options.batch, (-1, self.rows)
        for step in range(self.begin, self.per_epoch * self.options.epochs):
            epoch, k = divmod(step, self.per_epoch)
            if of_epoch[0] != epoch:
                of_epoch = (epoch, order(self.rows, self.options.seed, epoch))
            part = own_part(of_epoch[1][k * batch : (k + 1) * batch], self.process.rank, self.process.size)
            yield [(epoch, int(index)) for index in part]


class Images(NamedTuple):
    """Training images augmented and plain, rows to train and held out, and the validation images."""

    train: Seeded
    plain: ImageDataset
    rows: np.ndarray
    held_out: np.ndarray
    validation: ImageDataset
    classes: int


def read(options: argparse.Namespace, config: dict[str, Any]) -> Images:
    """Finds the images, and checks that both parts have the same classes."""
    for part in ("train", "val"):
        folder = options.data / part
        if not any(path.is_dir() for path in folder.glob("*")):
            raise FileNotFoundError(
                f"{folder} holds no folders: --data must name a folder with train/<wnid>/*.JPEG and "
                "val/<wnid>/*.JPEG; the archive of ILSVRC's validation images is flat, and has to be sorted "
                "into a folder a class first"
            )
    augmented = create_transform(
        config["input_size"], is_training=True, scale=(SMALLEST_CROP, 1.0), color_jitter=0.0,
        auto_augment=None if options.auto_augment == "none" else options.auto_augment,
        interpolation=config["interpolation"], mean=config["mean"], std=config["std"],
    )  # fmt: skip
    plain = create_transform(**config)
    train = ImageDataset(str(options.data / "train"), transform=augmented)
    seen = ImageDataset(str(options.data / "train"), transform=plain)
    validation = ImageDataset(str(options.data / "val"), transform=plain)
    names, others = (set(part.reader.class_to_idx) for part in (train, validation))
    if names != others:
        raise ValueError(
            f"train and val must have the same classes: only one of them has {sorted(names ^ others)[:5]}"
        )
    rows = np.random.default_rng(70).permutation(len(train))
    held_out = round(options.hold_out * len(train))
    if len(rows) - held_out < options.batch:
        raise ValueError(f"--batch {options.batch} is more than the {len(rows) - held_out} training images")
    held, left = np.sort(rows[:held_out]), np.sort(rows[held_out:])
    return Images(Seeded(train, options.seed), seen, left, held, validation, len(names))


# --- measuring ---


@torch.no_grad()
def measure(
    model: nn.Module, images: ImageDataset, rows: np.ndarray, options: argparse.Namespace, process: Process
) -> dict[str, float]:
    """Plain metrics over rows of a data set, each process's share put together."""
    model.eval()
    found = torch.zeros(len(rows), 4, device=process.device)
    places = np.arange(len(rows))[process.rank :: process.size]
    subset = torch.utils.data.Subset(images, rows[places].tolist())
    batch = max(1, options.batch // process.size)
    at = 0
    for inputs, labels in DataLoader(subset, batch, num_workers=options.workers):
        target = labels.to(process.device)
        logits = forward(model, inputs.to(process.device), options.precision)
        best = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        losses = F.cross_entropy(logits, target, reduction="none")
        values = torch.stack([losses, best[:, 0], best.any(1), target], 1)
        found[torch.from_numpy(places[at : at + len(target)]).to(process.device)] = values.to(found.dtype)
        at += len(target)
    if process.size > 1:
        dist.all_reduce(found)
    losses, first, five, target = found.cpu().double().unbind(1)
    counts = target.long().bincount()
    right = target.long().bincount(first)[counts > 0] / counts[counts > 0]
    return {
        "accuracy": first.mean().item(),
        "top5_accuracy": five.mean().item(),
        "worst_class_accuracy": right.min().item(),
        "mean_loss": losses.mean().item(),
        "worst_tenth": losses.topk(max(1, round(0.1 * len(losses)))).values.mean().item(),
    }


def forward(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Logits, in the default dtype."""
    dtype = torch.get_default_dtype()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return model(images.to(dtype)).to(dtype)


# --- training ---


def network(options: argparse.Namespace, classes: int) -> nn.Module:
    """The network of timm, with random weights that the seed decides."""
    torch.manual_seed(mixed(options.seed, 0))
    settings: dict[str, Any] = {"num_classes": classes}
    fixed = timm.get_pretrained_cfg(options.model)
    if options.image_size is not None and fixed is not None and fixed.fixed_input_size:
        settings["img_size"] = options.image_size
    if options.drop_path:
        settings["drop_path_rate"] = options.drop_path
    return timm.create_model(options.model, **settings)


def speed(step: int, steps: int, warm_up: int) -> float:
    """The learning rate of a step as a multiple of the largest: linear, then a cosine to 0."""
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def train(
    options: argparse.Namespace,
    data: Images,
    weighting: rgd.Weighting,
    folder: pathlib.Path,
    process: Process,
) -> dict[str, Any]:
    """Trains with one weighting, from its last checkpoint if there is one; gives the last line of its log."""
    model = network(options, data.classes).to(process.device)
    mixing = options.mixup > 0 or options.cutmix > 0
    criterion = RGDLoss(weighting=weighting, label_smoothing=0.0 if mixing else options.smoothing)
    criterion.to(process.device)
    mixup = Mixup(options.mixup, options.cutmix, label_smoothing=options.smoothing, num_classes=data.classes)
    optimizer = create_optimizer_v2(
        model, opt=options.optimizer, lr=options.lr, weight_decay=options.weight_decay
    )
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings |= {"weighting": repr(weighting), "precision": options.precision}
    settings |= {"images": len(data.rows), "classes": data.classes}
    path, parts = folder / "last.pt", {"model": model, "criterion": criterion, "optimizer": optimizer}
    begin, log = resume(path, settings, parts, process)
    batches = Batches(data.rows, options, process, begin)
    per_epoch, steps = batches.per_epoch, begin + len(batches)
    loader = DataLoader(
        data.train,
        batch_sampler=batches,
        num_workers=options.workers,
        pin_memory=process.device.type == "cuda",
    )
    parallel: nn.Module = model
    if process.size > 1:
        devices = [process.device.index] if process.device.type == "cuda" else None
        parallel = DistributedDataParallel(model, device_ids=devices)
    bar = tqdm(
        total=steps, initial=begin, desc=folder.name, unit="step", disable=True if process.rank else None
    )
    since = time.perf_counter()
    for step, (images, labels) in enumerate(loader, begin):
        parallel.train()
        inputs, target = (x.to(process.device, non_blocking=True) for x in (images, labels))
        np.random.seed(mixed(options.seed, 2, step))  # mixup draws from it, alike in every process
        torch.manual_seed(mixed(options.seed, 3, step, process.rank))  # dropout and stochastic depth
        if mixing:
            inputs, target = mixup(inputs, target)
            target = target.to(torch.get_default_dtype())
        rate = options.lr * speed(step, steps, options.warm_up * per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        criterion(forward(parallel, inputs, options.precision), target).backward()
        if options.clip_gradients is not None:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_gradients)
        optimizer.step()
        bar.update()
        ended = (step + 1) % per_epoch == 0
        if ended:
            line: dict[str, Any] = {"epoch": (step + 1) // per_epoch, "step": step + 1, "rate": rate}
            # The statistics of the last batch. Every process must call this.
            line |= criterion.stats(sync=process.size > 1).to_dict("train_")
            if len(data.held_out):
                held_out = measure(model, data.plain, data.held_out, options, process)
                line |= {f"held_out_{name}": value for name, value in held_out.items()}
            line |= measure(model, data.validation, np.arange(len(data.validation)), options, process)
            line["seconds"] = round(time.perf_counter() - since, 3)
            since = time.perf_counter()
            log.append(line)
            bar.set_postfix(accuracy=f"{line['accuracy']:.4f}")
        if process.rank == 0 and (ended or (step + 1) % options.save_every == 0):
            save(path, settings, parts, step + 1, log)
    bar.close()
    return log[-1]


def save(
    path: pathlib.Path, settings: dict[str, Any], parts: dict[str, Any], step: int, log: list[dict[str, Any]]
) -> None:
    """Writes checkpoint and log; a program that is stopped meanwhile leaves the older checkpoint."""
    states = {name: part.state_dict() for name, part in parts.items()}
    write({"settings": settings, "step": step, "log": log} | states, path)
    path.with_name("log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def resume(
    path: pathlib.Path, settings: dict[str, Any], parts: dict[str, Any], process: Process
) -> tuple[int, list[dict[str, Any]]]:
    """The step to begin with and the log so far, having loaded a checkpoint if there is one."""
    if not path.exists():
        return 0, []
    kept = torch.load(path, map_location=process.device, weights_only=True)
    other = [
        f"{name} {kept['settings'].get(name)}"
        for name in settings
        if kept["settings"].get(name) != settings[name]
    ]
    if other:
        raise ValueError(
            f"{path} was made with other settings ({', '.join(other)}): give those, or another --output"
        )
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    return kept["step"], kept["log"]


# --- the command ---


def weightings(options: argparse.Namespace) -> dict[str, rgd.Weighting]:
    """The weightings to train with, by the name of their folders."""
    found: dict[str, rgd.Weighting] = {}
    if "none" in options.weighting:
        found["none"] = rgd.ERM()
    if "kl" in options.weighting:
        for tau, scale in itertools.product(options.tau or (None,), options.scale or (None,)):
            given = {"tau": tau, "scale": scale}
            given = {name: value for name, value in given.items() if value is not None}
            weighting = rgd.KL(**given, normalize=options.normalize)
            shown = given or {"tau": weighting.tau}
            name = "_".join(["kl", *(f"{key}-{value:g}" for key, value in shown.items())])
            found[name + "_normalized" * options.normalize] = weighting
    return found


def started(device: str | None) -> Process:
    """Joins the processes that torchrun started, if it did."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" not in os.environ:
        return Process(0, 1, torch.device(kind))
    here = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Process(dist.get_rank(), dist.get_world_size(), here)


def parser() -> argparse.ArgumentParser:
    out = Parser(description="ImageNet with a network of timm, re-weighted or plain")
    add = out.add

    add("--data", type=pathlib.Path, required=True, help="the folder of train/ and val/")
    add("--output", type=pathlib.Path, default=pathlib.Path("runs/imagenet"), help="logs and checkpoints")
    add("--weighting", nargs="+", choices=("none", "kl"), default=("kl",), help="none is plain training")
    add("--tau", nargs="+", type=float, help="clips of rgd.KL; 1 if neither clip nor scale is given")
    add("--scale", nargs="+", type=float, help="scales of rgd.KL; 1 / (tau + 1) if not given")
    add("--normalize", action="store_true", help="divide the weights by their mean over the batch")
    add("--model", default="vit_small_patch16_224", help="any name of timm.list_models()")
    add("--image-size", type=int, help="side of the images, if not the model's own")
    add("--epochs", type=int, default=90, help="of training")
    add("--batch", type=int, default=1024, help="images a step, of all processes together")
    add("--optimizer", default="adamw", help="any of timm's")
    add("--lr", type=float, default=1e-3, help="the largest learning rate")
    add("--weight-decay", type=float, default=0.1, help="of matrices; AdamW multiplies it by the rate")
    add("--warm-up", type=int, default=8, help="epochs")
    add("--mixup", type=float, default=0.2, help="alpha; 0 for none")
    add("--cutmix", type=float, default=0.0, help="alpha; 0 for none")
    add("--smoothing", type=float, default=0.0, help="label smoothing")
    add("--auto-augment", default="rand-m10-n2", help="timm's words for it; none for crops and flips alone")
    add("--drop-path", type=float, default=0.0, help="stochastic depth")
    add("--clip-gradients", type=float, metavar="NORM", help="to a norm; off if not given")
    add("--hold-out", type=float, default=0.01, help="share of the training images to choose settings by")
    add("--seed", type=int, default=0, help="of network, order and augmentation")
    add("--workers", type=int, default=8, help="that read images, of each process")
    add("--save-every", type=int, default=1000, help="steps between checkpoints, beside the ends of epochs")
    add("--precision", choices=("bfloat16", "float32"), help="bfloat16 where the GPU has it")
    add("--device", help="cuda if there is one, else cpu")
    return out


def check(options: argparse.Namespace, process: Process) -> None:
    """Refuses options that make no sense."""
    if options.batch < 1 or options.batch % (2 * process.size):
        raise ValueError(
            f"--batch must be a multiple of {2 * process.size}, an even number for each process, got "
            f"{options.batch}"
        )
    if not 0 <= options.hold_out < 1:
        raise ValueError(f"--hold-out must lie in [0, 1), got {options.hold_out:g}")
    if "kl" not in options.weighting and (options.tau or options.scale or options.normalize):
        raise ValueError("--tau, --scale and --normalize are for --weighting kl")


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Trains with each weighting and prints the results."""
    options = parser().parse_args(arguments)
    process = started(options.device)
    check(options, process)
    options.precision = options.precision or found_precision(process.device)
    known = timm.get_pretrained_cfg(options.model)
    config = resolve_data_config(
        {"img_size": options.image_size} if options.image_size else {},
        pretrained_cfg={} if known is None else known.to_dict(),
    )
    data = read(options, config)
    results: dict[str, dict[str, Any]] = {}
    for name, weighting in weightings(options).items():
        results[name] = train(options, data, weighting, options.output / name, process)
    if process.rank == 0:
        metrics = ("accuracy", "top5_accuracy", "worst_class_accuracy", "mean_loss", "worst_tenth")
        print(f"\n{'':<28}" + "".join(f"{metric:>22}" for metric in metrics))
        for name, line in results.items():
            print(f"{name:<28}" + "".join(f"{line[metric]:>22.4f}" for metric in metrics))
        print(f"\nLogs and checkpoints: {options.output}")
    if process.size > 1:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    main()
