"""Polluted text: a character network goes on with a pool of which most is garbage.

Asked: where 70% of the new sequences are shuffled characters and nobody has marked them, by how much do
weights that favour small losses raise the accuracy on clean text, and how do they compare with choosing by a
reference model?

Data: the sources of Python's standard library as characters, with blanks in a row as one. A sequence has 56
characters, of which the last 48 are predicted, each from the 8 before it. A network is trained on 300 clean
sequences: the prior. It goes on with these 300 and a pool of 4800 more, 70% of which have their characters
shuffled within the sequence. 300 clean sequences choose and 400 test. All parts are from different files,
drawn anew for every seed. The text depends on the version of Python, which the header of the table names.

Arms, which go on with clean and pool: plain cross-entropy; s = -1 and s = -3, `rgd.KL(scale=s,
normalize=True)` with a sequence weighted by its mean loss; RGD (`rgd.KL(tau=3)`) by sequence. With the prior
as a reference model:

- "Rho-1" keeps the half of each batch with the largest excess loss, that is the loss minus the reference's
  loss: by character, as in Lin et al., "Rho-1: Not all tokens are what you need", NeurIPS 2024, arXiv
  2404.07965, section 2.2, or by sequence. This is `rgd.CVaR(0.5)` of the excess losses.
- "half with small reference loss" keeps the half of each batch that the reference predicts best, a filter by
  perplexity. It is no part of Rho-1.
- "exp(-3 reference loss)" weights each sequence by this number, divided by its mean over the batch: s = -3
  with losses that are fixed in advance.

Controls: "weights of others" gives every sequence the s = -3 weight of its neighbour in the batch, which is
as uneven and knows nothing; plain training times the mean weight of RGD (s = -3 has mean weight one, so that
its placebo is plain training itself); going on with the 300 clean sequences alone; and an oracle that is told
which sequences are clean.

Protocol: a multilayer perceptron with 96 hidden units on embedded characters, SGD with momentum 0.9, batches
of 24 sequences, a cosine schedule, 212 steps for every arm (one pass over clean and pool); the last step's
network is measured. Every seed has its own text, prior and order of batches, and chooses the learning rate of
every arm by its own clean validation sequences. The rate 0 is among the choices, for every arm: who sees on
clean text that going on does harm keeps the prior. "plain at rate 0.2" shows what going on does, with a rate
that nothing chose. The weight decay is 0.001 for all, since no sequence of the pool is seen twice; the prior
chooses both. Arms with fewer sequences see them more often. The setting "by accuracy" chooses by validation
accuracy and reports accuracy; "by mean loss" chooses by loss and reports losses. Both choose among the same
trainings. "worst_tenth" is the mean loss of the tenth of the test sequences with the largest losses.
`scratch.py` trains on the same text without the prior.

Run it with `make evidence ROW=polluted`, or `python examples/evidence/polluted.py --full`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import rgd
import torch
import torch.nn.functional as F
from harness import (
    Arm,
    Cell,
    Chosen,
    Claim,
    Grid,
    MeanOne,
    Outcome,
    Result,
    Row,
    Session,
    Table,
    main,
    times_mean_weight,
    untuned,
)
from harness.pictures import differences, pyplot, save
from harness.problems import worst_tenth
from harness.train import MOMENTUM, Weigher, orders
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from lm_pretrain import standard_library

PLAIN, PRIOR, GOES_ON = "plain", "prior", "plain at rate 0.2"
DIAL, RGD, CLEAN, ORACLE = "s = -3", "RGD, tau 3", "300 clean alone", "clean alone (oracle)"
RHO, RHO_SEQUENCE = "Rho-1", "Rho-1 by sequence"
HALF, FIXED = "half with small reference loss", "exp(-3 reference loss)"
OTHERS, PLACEBO = "weights of others", f"plain x mean weight of {RGD}"
BY_ACCURACY, BY_LOSS = "by accuracy", "by mean loss"
METRICS = ("accuracy", "mean_loss", "worst_tenth")
REPORTED = {BY_ACCURACY: ("accuracy", METRICS[:1]), BY_LOSS: ("mean_loss", METRICS[1:])}

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT, PREDICTED = 8, 48
EMBEDDED, HIDDEN, BATCH = 16, 96, 24


class FromPrior(Grid):
    """A grid whose smallest rate is 0, the prior as it is. It is no edge: there is nothing below it."""

    def grown(self, best: Cell) -> Grid:
        """The grid with one value more at each edge that `best` lies at."""
        return self if best.learning_rate == 0 else super().grown(best)


PRIOR_GRID = Grid((0.4, 0.8, 1.6), (0.001, 0.002, 0.004))
WEIGHT_DECAY, FIXED_RATE = 0.001, 0.2
GRIDS = {
    "grid": FromPrior((0.0, 0.05, 0.1, 0.2, 0.4), (WEIGHT_DECAY,), one_axis=True),
    "quick": FromPrior((0.0, 0.1, 0.4), (WEIGHT_DECAY,), one_axis=True),
}


class Sizes(NamedTuple):
    """Of a problem: how many sequences, and epochs of each stage."""

    clean: int = 300
    pool: int = 4800
    validation: int = 300
    test: int = 400
    prior_epochs: int = 30
    epochs: int = 1


SHUFFLED = 0.7
QUICK = Sizes(48, 96, 20, 40, 2, 1)


@dataclasses.dataclass(frozen=True)
class SequenceArm(Arm):
    """An arm that weights sequences or characters.

    Args:
        sees: What the weighting is of: the "loss", the "excess" over the reference's loss, or the "reference"
            loss, which does not change while the network is trained.
        per: Whether a "sample", that is a sequence, has a weight by its mean, or each "element", a character.
        on: Which sequences it goes on with: "all", those that are not "shuffled", or the "first" 300.
    """

    sees: str = "loss"
    per: str = "sample"
    on: str = "all"

    def key(self) -> str:
        return f"{super().key()} {self.sees} {self.per} {self.on}"


@dataclasses.dataclass(frozen=True)
class Neighbour(rgd.Weighting):
    """The weights of another member, each given to the next sample of the batch."""

    weighting: rgd.Weighting
    mean_one = True

    def weights(self, batch: rgd.Batch) -> Any:
        """`w` of the sample before."""
        return batch.xp.roll(self.weighting.weights(batch), 1)


# --- the text ---


class Split(NamedTuple):
    """Sequences of character numbers (n, CONTEXT + PREDICTED), and which of those that train are shuffled.

    The clean sequences are the first of the training sequences.
    """

    train: Tensor
    shuffled: Tensor
    validation: Tensor
    test: Tensor


@functools.cache
def library() -> tuple[npt.NDArray[np.uint8], ...]:
    """The files of the standard library as numbers of characters.

    Blanks in a row count as one, and characters that are not in `CHARACTERS` are left out.
    """
    numbers = np.full(256, len(CHARACTERS), np.uint8)
    numbers[list(CHARACTERS.encode())] = range(len(CHARACTERS))
    texts = (re.sub(rb"[ \t]+", b" ", text) for text in standard_library())
    files = [numbers[np.frombuffer(text, np.uint8)] for text in texts]
    return tuple(file[file < len(CHARACTERS)] for file in files)


def sequences(
    files: Sequence[npt.NDArray[np.uint8]], number: int, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Some of the sequences of some files, no two of which overlap."""
    length = CONTEXT + PREDICTED
    found = np.concatenate([file[: len(file) // length * length].reshape(-1, length) for file in files])
    return random.permutation(found)[:number].astype(np.int64)


def shuffle(rows: npt.NDArray[np.int64], random: np.random.Generator) -> npt.NDArray[np.int64]:
    """The sequences (n, L) with the characters of each in random order."""
    return random.permuted(rows, axis=1)


@dataclasses.dataclass(frozen=True)
class Polluted:
    """The prior, or where `prior` has the cell of every seed's prior, what goes on from it.

    Args:
        name: For the progress bar.
        sizes: Of the parts.
        select: The metric that chooses.
        prior: The cells.
        scratch: Whether new networks are trained instead on what would go on from the prior, for as many
            steps as both trainings take together.
    """

    name: str
    sizes: Sizes
    select: str = "mean_loss"
    prior: tuple[Cell, ...] = ()
    scratch: bool = False

    def key(self) -> str:
        size = sum(map(len, library()))
        begun = "scratch" if self.scratch else [tuple(cell) for cell in self.prior]
        return f"polluted {size} {self.sizes} {begun}"

    def steps(self) -> int:
        """How many steps a training takes."""
        first = self.sizes.clean // BATCH * self.sizes.prior_epochs
        then = (self.sizes.clean + self.sizes.pool) // BATCH * self.sizes.epochs
        return first + then if self.scratch else then if self.prior else first

    def draw(self, seed: int) -> Split:
        """The sequences of a seed. A tenth of the files chooses, a tenth tests."""
        return split(self.sizes, seed)


@functools.cache
def split(sizes: Sizes, seed: int) -> Split:
    random = np.random.default_rng([71, seed])
    files = library()
    order = random.permutation(len(files))
    tenth = len(order) // 10
    numbers = (sizes.validation, sizes.test, sizes.clean + sizes.pool)
    validation, test, train = (
        sequences([files[k] for k in some], number, random)
        for some, number in zip(np.split(order, [tenth, 2 * tenth]), numbers, strict=True)
    )
    shuffled = np.zeros(len(train), np.bool_)
    shuffled[sizes.clean : sizes.clean + round(SHUFFLED * sizes.pool)] = True
    train[shuffled] = shuffle(train[shuffled], random)
    return Split(*map(torch.tensor, (train, shuffled, validation, test)))


# --- the network: every parameter has an axis of models in front ---


def initial(seeds: Sequence[int]) -> list[Tensor]:
    """Embedding (S, V, e), then weights and biases of two layers, uniform as those of `torch.nn.Linear`."""
    models: list[list[Tensor]] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(1000 + seed)
        parameters = [torch.randn(len(CHARACTERS), EMBEDDED, generator=generator)]
        for rows, columns in ((CONTEXT * EMBEDDED, HIDDEN), (HIDDEN, len(CHARACTERS))):
            for shape in ((rows, columns), (1, columns)):
                uniform = 2 * torch.rand(shape, generator=generator) - 1
                parameters.append(uniform / math.sqrt(rows))
        models.append(parameters)
    return [torch.stack(same) for same in zip(*models, strict=True)]


def forward(parameters: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Logits (M, B * PREDICTED, V) of sequences (M, B, CONTEXT + PREDICTED)."""
    table, *layers = parameters
    models, characters, _ = table.shape
    places = rows + characters * torch.arange(models)[:, None, None]
    embedded = F.embedding(places, table.flatten(0, 1))
    windows = [embedded[:, :, k : k + PREDICTED] for k in range(CONTEXT)]
    hidden = torch.baddbmm(layers[1], torch.cat(windows, -1).flatten(1, 2), layers[0]).relu()
    return torch.baddbmm(layers[3], hidden, layers[2])


def losses_of(logits: Tensor, rows: Tensor) -> Tensor:
    """Losses (M, B, PREDICTED) of logits and their sequences (M, B, CONTEXT + PREDICTED)."""
    target = rows[:, :, CONTEXT:]
    flat = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return flat.view(target.shape)


@torch.no_grad()
def evaluated(parameters: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (K, n, PREDICTED) of K networks on sequences (n, L), and which predictions are right."""
    losses: list[Tensor] = []
    right: list[Tensor] = []
    for some in rows.split(100):
        expanded = some.expand(len(parameters[0]), *some.shape)
        logits = forward(parameters, expanded)
        losses.append(losses_of(logits, expanded))
        right.append(logits.argmax(-1).view(losses[-1].shape) == expanded[:, :, CONTEXT:])
    return torch.cat(losses, 1), torch.cat(right, 1)


def measured(parameters: Sequence[Tensor], rows: Tensor) -> list[dict[str, float]]:
    """The metrics of each of K networks on sequences (n, L)."""
    losses, right = evaluated(parameters, rows)
    of_sequence = losses.double().mean(2)
    accuracy = right.double().mean((1, 2)).where(of_sequence.isfinite().all(1), torch.nan)
    values = zip(
        accuracy.tolist(), of_sequence.mean(1).tolist(), worst_tenth(of_sequence).tolist(), strict=True
    )
    return [dict(zip(METRICS, one, strict=True)) for one in values]


# --- training ---


def train(
    problem: Polluted,
    arm: SequenceArm,
    seeds: Sequence[int],
    cells: Sequence[Cell],
    snapshots: Sequence[int] = (),
) -> dict[tuple[int, Cell], list[Outcome]]:
    """All networks at once; the last step is measured."""
    if snapshots:
        raise ValueError("polluted's trainer measures the last step only")
    begin = time.process_time()
    networks, mean_weights = trained(problem, arm, seeds, cells)
    outcomes: dict[tuple[int, Cell], list[Outcome]] = {}
    copies = len(cells)
    for s, seed in enumerate(seeds):
        own = [parameter[s * copies : (s + 1) * copies] for parameter in networks]
        validation, test = (measured(own, part) for part in problem.draw(seed)[2:])
        share = (time.process_time() - begin) / len(seeds) / copies
        for k, cell in enumerate(cells):
            mean_weight = mean_weights[s * copies + k]
            outcomes[seed, cell] = [Outcome(validation[k], test[k], mean_weight, share)]
    return outcomes


def trained(
    problem: Polluted, arm: SequenceArm, seeds: Sequence[int], cells: Sequence[Cell]
) -> tuple[list[Tensor], list[float]]:
    """The parameters of networks `seed, cell` in their order, and the mean weight of each training."""
    sizes, copies, models = problem.sizes, len(cells), len(seeds) * len(cells)
    starts = [arm.seed(seed) for seed in seeds]
    splits = [problem.draw(seed) for seed in seeds]
    if problem.prior:
        begun = [prior(sizes, seed, problem.prior[seed]) for seed in seeds]
        parameters = [torch.stack(same) for same in zip(*begun, strict=True)]
    else:
        parameters = initial(starts)
    if problem.prior or problem.scratch:
        kept = [kept_of(arm, own, sizes) for own in splits]
    else:
        kept = [torch.arange(sizes.clean)] * len(seeds)
    steps = problem.steps()
    rows = torch.stack([own.train[some] for own, some in zip(splits, kept, strict=True)])
    reference = reference_losses(parameters, rows) if arm.sees != "loss" else None
    parameters = [p.repeat_interleave(copies, 0).requires_grad_() for p in parameters]
    velocities = [torch.zeros_like(p) for p in parameters]
    rate, decay = (
        torch.tensor([cell[k] for _ in seeds for cell in cells]).view(models, 1, 1) for k in (0, 1)
    )
    batches = orders(starts, rows.shape[1], BATCH, math.ceil(steps / (rows.shape[1] // BATCH)))
    weigher = Weigher(arm.weighting, models)
    weight_sum = torch.zeros(models, dtype=torch.float64)
    seed_axis = torch.arange(len(seeds))[:, None]
    for step in range(steps):
        chosen = batches[:, step]
        some = rows[seed_axis, chosen].repeat_interleave(copies, 0)
        losses = losses_of(forward(parameters, some), some)
        seen = losses.detach()
        if reference is not None:
            of_batch = reference[seed_axis, chosen].repeat_interleave(copies, 0)
            seen = of_batch if arm.sees == "reference" else seen - of_batch
        weights = weights_of(weigher, seen, arm.per)
        weight_sum += weights.mean((1, 2))
        gradients = torch.autograd.grad((weights * losses).mean((1, 2)).sum(), parameters)
        speed = rate * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.no_grad():
            for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
                velocity.mul_(MOMENTUM).add_(torch.addcmul(gradient, decay, parameter))
                parameter.addcmul_(speed, velocity, value=-1)
    return [p.detach() for p in parameters], (weight_sum / steps).tolist()


def weights_of(weigher: Weigher, seen: Tensor, per: str) -> Tensor:
    """Weights (M, B, 1) of sequences by their mean, or (M, B, T) of characters, of numbers (M, B, T)."""
    values = seen.mean(2, keepdim=True) if per == "sample" else seen
    return weigher(values.flatten(1), torch.zeros(0)).view(values.shape)


def kept_of(arm: SequenceArm, own: Split, sizes: Sizes) -> Tensor:
    """The training sequences that an arm goes on with."""
    if arm.on == "first":
        return torch.arange(sizes.clean)
    if arm.on == "clean":
        return (~own.shuffled).nonzero().squeeze(1)
    return torch.arange(len(own.train))


def reference_losses(parameters: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Losses (S, n, PREDICTED) of each seed's sequences (S, n, L) by its own reference network."""
    own = [[parameter[s : s + 1] for parameter in parameters] for s in range(len(rows))]
    return torch.cat([evaluated(network, some)[0] for network, some in zip(own, rows, strict=True)])


@functools.cache
def prior(sizes: Sizes, seed: int, cell: Cell) -> list[Tensor]:
    """The parameters of a seed's prior, trained at a cell."""
    networks, _ = trained(Polluted(PRIOR, sizes), SequenceArm(PLAIN), [seed], [cell])
    return [parameter[0] for parameter in networks]


# --- the comparison ---


def arms() -> list[SequenceArm]:
    """What is compared with plain training."""
    dial = rgd.KL(scale=-3.0, normalize=True)
    half = MeanOne(rgd.Trimmed(rgd.ERM(), 0.5))
    return [
        SequenceArm("s = -1", rgd.KL(scale=-1.0, normalize=True)),
        SequenceArm(DIAL, dial),
        SequenceArm(RHO, rgd.CVaR(0.5), sees="excess", per="element"),
        SequenceArm(RHO_SEQUENCE, rgd.CVaR(0.5), sees="excess"),
        SequenceArm(HALF, half, sees="reference"),
        SequenceArm(FIXED, dial, sees="reference"),
        SequenceArm(RGD, rgd.KL(3.0)),
        SequenceArm(OTHERS, Neighbour(dial)),
        SequenceArm(CLEAN, on="first"),
        SequenceArm(ORACLE, on="clean"),
    ]


def reported(chosen: Chosen, metrics: Sequence[str]) -> Chosen:
    """The same with some of its metrics."""
    outcomes = tuple(
        tuple(one._replace(test={metric: one.test[metric] for metric in metrics}) for one in of_seed)
        for of_seed in chosen.outcomes
    )
    return dataclasses.replace(chosen, outcomes=outcomes)


def run(session: Session) -> list[Result]:
    sizes = QUICK if session.quick else Sizes()
    compared = [arm for arm in arms() if not session.quick or arm.name in {DIAL, RHO, FIXED, RGD}]
    session.expect(len(compared) + 2, **GRIDS)  # both settings choose among the same trainings
    results: list[Result] = []
    first = session.sweep(Polluted(PRIOR, sizes), SequenceArm(PRIOR), PRIOR_GRID, trainer=train)
    cells = tuple(choice.cell for choice in first.choices)
    for here, (select, metrics) in REPORTED.items():
        problem = Polluted(here, sizes, select, cells)
        sweep = functools.partial(session.sweep, problem, trainer=train, **GRIDS)
        results.append(Result(here, reported(sweep(SequenceArm(PLAIN)), metrics)))
        results.append(Result(here, reported(first, metrics), PLAIN))
        going_on = untuned(
            problem, SequenceArm(PLAIN), Cell(FIXED_RATE, WEIGHT_DECAY), seeds=session.seeds,
            store=session.store, trainer=train,
        )  # fmt: skip
        results.append(Result(here, reported(going_on.renamed(GOES_ON), metrics), PLAIN))
        for arm in compared:
            chosen = sweep(arm)
            results.append(Result(here, reported(chosen, metrics), PLAIN))
            if arm.name == RGD:
                control = sweep(times_mean_weight(arm, chosen.mean_weight)).renamed(PLACEBO)
                results.append(Result(here, reported(control, metrics), PLAIN))
    return results


# --- what came out ---


def picture(table: Table, path: pathlib.Path) -> None:
    names = [arm for arm in table.arms(BY_ACCURACY) if arm != PLAIN]
    draw(table, path, names, "A pool with 70% shuffled characters: clean test text against plain training")


def draw(table: Table, path: pathlib.Path, names: Sequence[str], title: str) -> None:
    """A panel a metric: the differences of some arms to their baseline."""
    plt = pyplot()
    panels_of = [(here, metric) for here, (_, metrics) in REPORTED.items() for metric in metrics]
    words = {
        "accuracy": "accuracy, points",
        "mean_loss": "mean loss, nats",
        "worst_tenth": "worst tenth, nats",
    }
    size = (12, 1.3 + 0.27 * len(names))
    figure, axes = plt.subplots(1, len(panels_of), figsize=size, sharey=True)
    for panel, (here, metric) in zip(axes, panels_of, strict=True):
        differences(panel, [table.line(here, arm, metric) for arm in names], markersize=5)
        panel.set_yticks(
            range(0, -len(names), -1),
            [name.replace("plain x mean weight of", "placebo of") for name in names],
        )
        panel.set_ylim(0.6 - len(names), 0.6)
        panel.set_title(words[metric], loc="left", fontsize=11)
        panel.set_xlabel("better →" if metric == "accuracy" else "← better")
        panel.tick_params(length=0)
        panel.grid(axis="x", color="#e3e6eb")
    figure.suptitle(
        f"{title}, 95% interval, {table.lines[0].seeds} seeds",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def sentence(table: Table) -> str:
    names = table.arms(BY_ACCURACY)
    shown = [
        arm for arm in (GOES_ON, "s = -1", DIAL, FIXED, RHO, HALF, OTHERS, RGD, CLEAN, ORACLE) if arm in names
    ]
    accuracy = ", ".join(f"{arm} {table.line(BY_ACCURACY, arm, 'accuracy').points()}" for arm in shown)
    kept = [
        arm
        for arm in names
        if arm != PRIOR and {float(run["learning_rate"]) for run in table.by_arm[BY_ACCURACY, arm]} == {0.0}
    ]
    chose = f" In all seeds {', '.join(kept)} chose rate 0, which is the prior as it was." if kept else ""
    losses, tails = (
        ", ".join(
            f"{arm} {table.line(BY_LOSS, arm, metric).shown()}" for arm in (DIAL, FIXED, RHO) if arm in names
        )
        for metric in ("mean_loss", "worst_tenth")
    )
    return (
        "On clean test text, against plain training on clean and pool with a chosen rate, 0 among the "
        f"choices.{chose} Accuracy in points: {accuracy}. "
        f"Mean loss in nats a character: {losses}. Worst tenth: {tails}."
    )


ROW = Row(
    "polluted",
    "Polluted text: 70% of the pool is shuffled characters",
    Claim(
        BY_ACCURACY,
        DIAL,
        "accuracy",
        "With a prior, KL(scale=-3, normalize=True) by sequence raises accuracy on clean text.",
    ),
    METRICS,
    run,
    picture,
    sentence,
    tells=("scratch",),
)

if __name__ == "__main__":
    main(ROW)
