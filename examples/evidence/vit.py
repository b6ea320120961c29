"""Images: a tiny vision transformer, with and without re-weighting by loss.

Asked: does RGD help a vision transformer?

Data: scikit-learn's digits, 500 images to train, 300 to choose, 997 to test. The transformer: patches of 2 by
2 pixels, 16 tokens of 16 numbers, two layers of two heads, the mean of the tokens to a linear layer; 5
thousand parameters.

Arms: cross-entropy; RGD (`rgd.KL(tau)`) on the same losses, tau 1 and 3; RGD whose tau validation chose among
the two, compared with cross-entropy that chose among two starts. Controls of tau 1: its weights divided by
their mean over the batch, cross-entropy times its mean weight, and the opposite sign.

Protocol: AdamW, batches of 32, 30 epochs (450 steps), a cosine schedule after a tenth of warm-up; the last
step's network is measured, over 12 seeds. Each seed chooses the learning rate of every arm by its own
validation accuracy. The weight decay is 0.1 for all: tuned as well, it was still growing after 600 runs. All
seeds and rates train in one tensor program (`torch.func.functional_call` under `torch.vmap`). `--bf16` runs
the forward pass under `torch.autocast` in bfloat16; the committed run is in float32, which is faster on most
CPUs. `--mixup` trains on mixtures of two images, with a share from Beta(0.2, 0.2) for each batch, the same
for all arms.

Run it with `make evidence ROW=vit`, or `python examples/evidence/vit.py --full`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from harness import (
    Arm,
    Cell,
    Claim,
    Classification,
    Grid,
    Outcome,
    Part,
    Problem,
    Reported,
    Result,
    Row,
    Session,
    Table,
    digits,
    main,
    recipe,
)
from harness.lineup import RGD, draw_lineup, lineup, said, sweeps
from harness.problems import stack
from harness.train import Weigher, orders
from torch import Tensor, nn
from torch.func import functional_call

TAUS = (1.0, 3.0)
WEIGHT_DECAY = 0.1
GRIDS = {
    "grid": Grid((4e-3, 8e-3, 1.6e-2), (WEIGHT_DECAY,), one_axis=True),
    "quick": Grid((1e-3, 1e-2, 1e-1), (WEIGHT_DECAY,), rate_factor=10.0, one_axis=True),
}
METRICS = ("accuracy", "worst_class_accuracy")
WIDTH, HEADS, LAYERS, PATCH, SIDE, CLASSES = 16, 2, 2, 2, 8, 10
# MIXUP: both parameters of the Beta distribution of the shares.
EPOCHS, BATCH, MIXUP, WARM_UP = 30, 32, 0.2, 0.1
BETAS, EPSILON = (0.9, 0.999), 1e-8


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.to_heads, self.from_heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_heads(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        shares = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        x = x + self.from_heads((shares @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class ViT(nn.Module):
    """Logits (B, 10) of images (B, 64)."""

    def __init__(self) -> None:
        super().__init__()
        tokens = (SIDE // PATCH) ** 2
        self.embed = nn.Linear(PATCH**2, WIDTH)
        self.positions = nn.Parameter(0.5 * torch.randn(tokens, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        grid = images.unflatten(-1, (SIDE // PATCH, PATCH, SIDE // PATCH, PATCH))
        patches = grid.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
        return self.head(self.norm(self.blocks(self.embed(patches) + self.positions)).mean(1))


@dataclasses.dataclass(frozen=True)
class Mixed(Classification):
    """Digits, of which training sees mixtures; themselves where `mixup` is 0."""

    bf16: bool = False
    mixup: float = MIXUP

    def key(self) -> str:
        return f"{super().key()} {self.bf16} {self.mixup}"

    def shares(self, seed: int, steps: int) -> npt.NDArray[np.float64]:
        """What is left of each image in the mixture, at every step."""
        if self.mixup == 0:
            return np.ones(steps)
        return np.random.default_rng([51, seed]).beta(self.mixup, self.mixup, steps)


def train(
    problem: Problem, arm: Arm, seeds: Sequence[int], cells: Sequence[Cell], snapshots: Sequence[int]
) -> dict[tuple[int, Cell], list[Outcome]]:
    """AdamW on all seeds and cells at once; model `s * K + k` is seed `s` with cell `k`."""
    if snapshots or not isinstance(problem, Mixed):
        raise TypeError("vit's trainer takes a Mixed problem and measures the last step only")
    begin = time.process_time()
    data = stack([problem.draw(seed) for seed in seeds])
    copies, models = len(cells), len(seeds) * len(cells)
    networks: list[ViT] = []
    for seed in seeds:
        torch.manual_seed(1000 + arm.seed(seed))
        networks += [ViT()] * copies
    names = [name for name, _ in networks[0].named_parameters()]
    parameters = [
        torch.stack([dict(n.named_parameters())[name] for n in networks]).detach() for name in names
    ]
    for parameter in parameters:
        parameter.requires_grad_()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    base = networks[0]

    def forward(some: Sequence[Tensor], images: Tensor) -> Tensor:
        def one(own: tuple[Tensor, ...], seen: Tensor) -> Tensor:
            return functional_call(base, dict(zip(names, own, strict=True)), (seen,))

        with torch.autocast("cpu", torch.bfloat16, enabled=problem.bf16):
            return torch.vmap(one)(tuple(some), images).float()

    rates, decays = (torch.tensor([cell[k] for _ in seeds for cell in cells]) for k in (0, 1))
    starts = [arm.seed(seed) for seed in seeds]
    batches = orders(starts, data.train.target.shape[1], problem.batch_size, problem.epochs)
    steps = batches.shape[1]
    shares = torch.tensor(np.stack([problem.shares(seed, steps) for seed in starts]), dtype=torch.float32)
    probabilities = F.one_hot(data.train.target, CLASSES).float()
    seed_axis = torch.arange(len(seeds))[:, None]
    weigher, weight_sum = Weigher(arm.weighting, models), torch.zeros(models, dtype=torch.float64)
    for step in range(steps):
        images, target = (x[seed_axis, batches[:, step]] for x in (data.train.inputs, probabilities))
        share = shares[:, step, None, None]
        # Each image is mixed with its neighbour in the batch, whose order is random.
        images, target = (
            (share * x + (1 - share) * x.roll(1, 1)).repeat_interleave(copies, 0) for x in (images, target)
        )
        outputs = forward(parameters, images)
        losses = -(target * outputs.log_softmax(-1)).sum(-1)
        weights = weigher(losses.detach(), torch.zeros_like(losses))
        weight_sum += weights.mean(1)
        gradients = torch.autograd.grad((weights * losses).sum() / problem.batch_size, parameters)
        warm = min(1.0, (step + 1) / (WARM_UP * steps))
        speed = rates * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.no_grad():
            for parameter, (mean, square), gradient in zip(parameters, moments, gradients, strict=True):
                mean.lerp_(gradient, 1 - BETAS[0])
                square.lerp_(gradient.square(), 1 - BETAS[1])
                size = (square / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(EPSILON)
                move = mean / (1 - BETAS[0] ** (step + 1)) / size
                per_model = speed.view(-1, *[1] * (parameter.dim() - 1))
                decay = decays.view_as(per_model)
                parameter.sub_(per_model * (move + decay * parameter))
    outcomes: dict[tuple[int, Cell], list[Outcome]] = {}
    for s, seed in enumerate(seeds):
        own = [p[s * copies : (s + 1) * copies].detach() for p in parameters]
        parts = [Part(*(x[s] for x in part)) for part in (data.validation, data.test)]
        with torch.no_grad():
            outputs = [forward(own, p.inputs.expand(copies, *p.inputs.shape)) for p in parts]
        validation, test = (
            problem.metrics(out, part, (outputs[0], parts[0]))
            for out, part in zip(outputs, parts, strict=True)
        )
        for k, cell in enumerate(cells):
            measured = ({m: v[k].item() for m, v in part.items()} for part in (validation, test))
            weight = weight_sum[s * copies + k].item() / steps
            outcomes[seed, cell] = [Outcome(*measured, weight, (time.process_time() - begin) / models)]
    return outcomes


def run(session: Session, bf16: bool = False, mixup: float = 0.0) -> list[Result]:
    base = digits(epochs=2 if session.quick else EPOCHS)
    taus = TAUS[:1] if session.quick else TAUS
    session.expect(sweeps(taus), **GRIDS)
    problem = Mixed(
        "digits, mixup" if mixup else "digits", base.draw, base.features, base.outputs, epochs=base.epochs,
        batch_size=BATCH, bf16=bf16, mixup=mixup,
    )  # fmt: skip
    best = functools.partial(session.sweep, problem, trainer=train, **GRIDS)
    return lineup(problem.name, best, taus, problem.select)


WORDS = {"accuracy": "accuracy", "worst_class_accuracy": "accuracy of the worst class"}


def picture(table: Table, path: pathlib.Path) -> None:
    draw_lineup("Tiny ViT", table, WORDS, path)


def sentence(table: Table) -> str:
    settings = [f"{setting}. {said(table, setting, WORDS)}." for setting in table.settings()]
    return f"A tiny vision transformer, against cross-entropy, in points. {' '.join(settings)}"


def own_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--bf16", action="store_true", help="the forward pass in bfloat16")
    parser.add_argument("--mixup", action="store_true", help="train on mixtures of two images")
    return parser


ROW = Row(
    "vit",
    "A tiny vision transformer",
    Claim(
        "digits",
        f"{RGD}1",
        "accuracy",
        "RGD raises the accuracy of a vision transformer.",
        Reported(1.01, "ImageNet-1K with ViT"),
    ),
    METRICS,
    run,
    picture,
    sentence,
    own_options,
)


def command_line(arguments: Sequence[str] | None = None) -> Table:
    """Runs the program as the command line says."""
    options, others = own_options().parse_known_args(arguments)
    shown = " ".join(f"--{name}" for name in ("bf16", "mixup") if getattr(options, name))
    if not shown:
        return main(ROW, others)
    other = functools.partial(run, bf16=options.bf16, mixup=MIXUP if options.mixup else 0.0)
    return main(*recipe(ROW, other, shown.replace("--", "").replace(" ", "_"), shown, others))


if __name__ == "__main__":
    command_line()
