"""Images: a tiny vision transformer with mixup, with and without re-weighting by loss.

Asked: does RGD help a vision transformer trained with mixup, where every target is a mixture of two classes?

Data: scikit-learn's digits, 500 images to train, 300 to choose, 997 to test. The transformer: patches of 2 by
2 pixels, 16 tokens of 16 numbers, two layers of two heads, the mean of the tokens to a linear layer; 5
thousand parameters.

Arms: cross-entropy of the mixed class probabilities; RGD (`rgd.KL(tau=1)`) on the same losses; the control
cross-entropy times RGD's mean weight.

Protocol: mixup with a share from Beta(0.2, 0.2) for each batch, the same for all arms; AdamW, batches of 32,
30 epochs (450 steps), a cosine schedule after a tenth of warm-up; the last step's network is measured, on
images that are not mixed, over 12 seeds. The learning rate is chosen for every arm by the mean validation
accuracy, inside its grid; for want of time the weight decay is not tuned (0.05 for all) and no arm tunes tau.
All seeds and rates train in one tensor program (`torch.func.functional_call` under `torch.vmap`).
`--bf16` runs the forward pass under `torch.autocast` in bfloat16, as the quick run does; the committed run is
in float32, which is faster on most CPUs.

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
import rgd
import torch
import torch.nn.functional as F
from harness import (
    Arm,
    Cell,
    Chosen,
    Classification,
    Grid,
    Outcome,
    Part,
    Problem,
    Result,
    Row,
    Session,
    Table,
    digits,
    main,
    sweep,
    times_mean_weight,
)
from harness.pictures import intervals, save
from harness.problems import stack
from harness.train import Weigher, orders
from torch import Tensor, nn
from torch.func import functional_call

PLAIN, RGD, CONTROL = "cross-entropy", "RGD, tau 1", "plain x mean weight of RGD"
METRICS = (
    "accuracy",
    "worst_class_accuracy",
    "mean_loss",
    "scaled_mean_loss",
    "worst_tenth",
    "scaled_worst_tenth",
)
WIDTH, HEADS, LAYERS, PATCH, SIDE, CLASSES = 16, 2, 2, 2, 8, 10
EPOCHS, BATCH, WEIGHT_DECAY, MIXUP, WARM_UP = 30, 32, 0.05, 0.2, 0.1
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
    """Digits, of which training sees mixtures."""

    bf16: bool = False

    def key(self) -> str:
        return f"{super().key()} {self.bf16}"


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
        torch.manual_seed(1000 + seed)
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
    batches = orders(seeds, data.train.target.shape[1], problem.batch_size, problem.epochs)
    steps = batches.shape[1]
    shares = torch.tensor(
        np.stack([np.random.default_rng([51, seed]).beta(MIXUP, MIXUP, steps) for seed in seeds]),
        dtype=torch.float32,
    )
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


def run(session: Session, bf16: bool = False) -> list[Result]:
    base = digits(epochs=1 if session.quick else EPOCHS)
    problem = Mixed(
        "digits, mixup", base.draw, base.features, base.outputs, epochs=base.epochs, batch_size=BATCH,
        bf16=bf16 or session.quick,
    )  # fmt: skip
    rates = (1e-3, 1e-2) if session.quick else (4e-3, 8e-3, 1.6e-2)
    grid = Grid(rates, (WEIGHT_DECAY,), rate_factor=10.0 if session.quick else 2.0, one_axis=True)

    def best(arm: Arm) -> Chosen:
        return sweep(
            problem, arm, grid=grid, seeds=session.seeds, store=session.store, trainer=train,
            progress=session.progress,
        )  # fmt: skip

    if session.progress is not None:
        session.progress.total = 3 * session.seeds * len(rates)
    plain, weighted = best(Arm(PLAIN)), best(Arm(RGD, rgd.KL(1.0)))
    control = best(times_mean_weight(weighted.arm, weighted.mean_weight)).renamed(CONTROL)
    setting = problem.name
    return [Result(setting, plain), Result(setting, weighted, PLAIN), Result(setting, control, PLAIN)]


def picture(table: Table, path: pathlib.Path) -> None:
    (setting,) = table.settings()
    arms = {RGD: RGD, CONTROL: "x mean weight"}
    title = (
        f"Tiny ViT, {setting}: difference to cross-entropy, {table.lines[0].seeds} seeds; grey: no finding"
    )
    save(intervals(table, setting, arms, title), path, table)


def sentence(table: Table) -> str:
    (setting,) = table.settings()
    parts: list[str] = []
    for arm in (RGD, CONTROL):
        accuracy, mean, tail = (table.line(setting, arm, m) for m in ("accuracy", "mean_loss", "worst_tenth"))
        scaled = table.line(setting, arm, "scaled_worst_tenth").shown()
        losses = f"mean loss {mean.shown()}, worst tenth {tail.shown()}, after temperature scaling {scaled}"
        parts.append(f"{arm}: accuracy {accuracy.points()} points, {losses}")
    return f"Digits with mixup, against cross-entropy. {'; '.join(parts)}."


ROW = Row("vit", "A tiny vision transformer, mixup", METRICS, run, picture, sentence)


def command_line() -> None:
    """The option of this program, before those that all have."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--bf16", action="store_true", help="the forward pass in bfloat16")
    options, others = parser.parse_known_args()
    if options.bf16:
        row = dataclasses.replace(ROW, run=functools.partial(run, bf16=True))
        main(row, ["--output", str(ROW.path.parent / "bf16"), *others])
        return
    main(ROW, others)


if __name__ == "__main__":
    command_line()
