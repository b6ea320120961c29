"""A language model trained from scratch: what re-weighting sequences does to the tail, and what it costs.

Asked: how much does RGD lower the loss of the worst tenth of the sequences, and how much does the mean loss
rise for it?

Data: the sources of Python's standard library as bytes, in sequences of 64, each seen once. A tenth of the
files gives the sequences that choose, a tenth those that test, the others train; which ones is drawn anew for
every seed. The text depends on the version of Python, which the header of the table names. `--data FILE`
takes another text, which is cut into pieces of 64 KiB in place of files; tables go to `results/<name of the
file>`.

The network is that of `examples/lm_pretrain.py`, 119 thousand parameters: two layers of width 64, the head
tied to the embedding, with `LinearRGDLoss(per="sample")`: a sequence is weighted by its mean loss.

Arms: cross-entropy (`rgd.ERM()`); RGD (`rgd.KL(tau=3)`); RGD that weights every byte by its own loss; the
control cross-entropy times RGD's mean weight; RGD with weights of mean one; RGD with the opposite sign; CVaR
of half of the sequences.

Protocol: 250 steps of 16 sequences, a tenth of warm-up and a cosine down to a tenth; AdamW; the last step's
network is measured, over 12 seeds. Each seed chooses the learning rate of every arm by its own mean
validation loss. The weight decay is 0.1 on the matrices for all: no sequence is seen twice. "accuracy" is the
share of bytes that are predicted right. "scaled" losses are after temperature scaling, by the temperature
with the smallest validation loss.

Run it with `make evidence ROW=lm`, or `python examples/evidence/lm.py --full`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import rgd
import torch
import torch.nn.functional as F
from harness import (
    Arm,
    Cell,
    Claim,
    Grid,
    Outcome,
    Result,
    Row,
    Session,
    Table,
    main,
    mean_one,
    opposite_sign,
    recipe,
    times_mean_weight,
)
from harness.pictures import intervals, save
from harness.problems import worst_tenth
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from lm_pretrain import GPT, Pretraining, Size, optimizer_of, pieces_of, rate_at, standard_library

PLAIN, RGD, CONTROL = "cross-entropy", "RGD, tau 3", "plain x mean weight of RGD"
TOKENS = "RGD, tau 3, by byte"
METRICS = ("accuracy", "mean_loss", "worst_tenth", "scaled_mean_loss", "scaled_worst_tenth")
LIBRARY = "standard library"
MODEL = Size(classes=256, width=64, layers=2, heads=4, length=64, batch=16)
QUICK_MODEL = MODEL._replace(width=16, layers=1, heads=2, length=16, batch=8)
VALIDATION, TEST, WEIGHT_DECAY = 256, 1024, 0.1
NEWTON_STEPS = 4
STEPS, QUICK_STEPS = 250, 8
GRIDS = {
    "grid": Grid((0.002, 0.004, 0.008), (WEIGHT_DECAY,), one_axis=True),
    "quick": Grid((0.003, 0.03, 0.3), (WEIGHT_DECAY,), rate_factor=10.0, one_axis=True),
}


@dataclasses.dataclass(frozen=True)
class LanguageArm(Arm):
    """An arm that weights every sequence by its mean loss, or with `per="element"` every byte by its own."""

    per: str = "sample"

    def key(self) -> str:
        return f"{super().key()} {self.per}"


class Split(NamedTuple):
    """Bytes (n, length) to train, to choose and to test, from different files."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Language:
    """A text to learn in a number of steps, as `sweep` needs it."""

    name: str
    texts: Sequence[bytes]
    model: Size
    steps: int
    held_out: tuple[int, int] = (VALIDATION, TEST)
    select: str = "mean_loss"

    def key(self) -> str:
        size = sum(map(len, self.texts))
        return f"{self.name} {len(self.texts)} {size} {self.model} {self.steps} {self.held_out}"

    def draw(self, seed: int) -> Split:
        """Sequences of one seed."""
        random = np.random.default_rng([61, seed])
        order = random.permutation(len(self.texts))
        tenth = max(1, len(order) // 10)
        files = np.split(order, [tenth, 2 * tenth])
        numbers = (*self.held_out, self.steps * self.model.batch)
        validation, test, train = (
            self.sequences([self.texts[k] for k in some], number, random)
            for some, number in zip(files, numbers, strict=True)
        )
        return Split(train, validation, test)

    def sequences(self, texts: Sequence[bytes], number: int, random: np.random.Generator) -> Tensor:
        """Some of the sequences of some files, no two of which overlap."""
        length = self.model.length
        whole = [np.frombuffer(t, np.uint8)[: len(t) // length * length].reshape(-1, length) for t in texts]
        found = np.concatenate(whole) if whole else np.empty((0, length), np.uint8)
        if len(found) < number:
            raise ValueError(
                f"{self.name} has {len(found)} sequences of {length} bytes for a part that needs {number}: "
                "give a longer text"
            )
        return torch.tensor(random.permutation(found)[:number].astype(np.int64))


def train(
    problem: Language, arm: LanguageArm, seeds: Sequence[int], cells: Sequence[Cell], snapshots: Sequence[int]
) -> dict[tuple[int, Cell], list[Outcome]]:
    """One model after the other, each sequence once; the last step is measured."""
    if snapshots:
        raise ValueError("lm's trainer measures the last step only")
    outcomes: dict[tuple[int, Cell], list[Outcome]] = {}
    for seed in seeds:
        split = problem.draw(seed)
        for cell in cells:
            begin = time.process_time()
            torch.manual_seed(1000 + arm.seed(seed))
            training = Pretraining(problem.model, arm.weighting or rgd.ERM(), arm.per)
            weight_sum = 0.0
            optimizer = optimizer_of(training, cell.learning_rate, cell.weight_decay)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, functools.partial(rate_at, steps=problem.steps)
            )
            for batch in split.train.split(problem.model.batch):
                optimizer.zero_grad()
                training(batch).backward()
                optimizer.step()
                schedule.step()
                weights = training.criterion.last_weights
                weight_sum += 1.0 if weights is None else weights.mean().item()
            validation, test = measure(training.model, split)
            seconds = time.process_time() - begin
            outcomes[seed, cell] = [Outcome(validation, test, weight_sum / problem.steps, seconds)]
    return outcomes


@torch.no_grad()
def measure(model: GPT, split: Split) -> list[dict[str, float]]:
    """Plain metrics on the sequences that choose and on those that test."""
    logits = [F.linear(model(ids)[:, :-1], model.embedding.weight) for ids in (split.validation, split.test)]
    scale = inverse_temperature(logits[0], split.validation[:, 1:])
    return [metrics(own, ids[:, 1:], scale) for own, ids in zip(logits, split[1:], strict=True)]


def metrics(logits: Tensor, target: Tensor, scale: float) -> dict[str, float]:
    """Of logits (n, T, C) and bytes (n, T)."""
    losses, scaled = (
        F.cross_entropy((factor * logits).transpose(1, 2), target, reduction="none").double().mean(1)
        for factor in (1.0, scale)
    )
    right = (logits.argmax(-1) == target).double().mean()
    return {
        "accuracy": right.item() if losses.isfinite().all() else float("nan"),
        "mean_loss": losses.mean().item(),
        "worst_tenth": worst_tenth(losses).item(),
        "scaled_mean_loss": scaled.mean().item(),
        "scaled_worst_tenth": worst_tenth(scaled).item(),
    }


def inverse_temperature(logits: Tensor, target: Tensor) -> float:
    """The factor of the logits with the smallest mean loss, by Newton's method; the loss is convex in it."""
    scale = 1.0
    for _ in range(NEWTON_STEPS):
        shares = (scale * logits).softmax(-1)
        mean = (shares * logits).sum(-1)
        slope = (mean - logits.gather(-1, target[..., None]).squeeze(-1)).mean().item()
        curvature = ((shares * logits.square()).sum(-1) - mean.square()).mean().item()
        scale -= slope / curvature if curvature > 0 else 0.0
    return scale


# --- the comparison ---


def of_length(name: str, steps: int) -> str:
    """The name of a setting."""
    return f"{name}, {steps} steps"


def run(session: Session, path: pathlib.Path | None = None) -> list[Result]:
    texts = standard_library() if path is None else pieces_of(path)
    name = LIBRARY if path is None else path.stem
    model = QUICK_MODEL if session.quick else MODEL
    held_out = (32, 64) if session.quick else (VALIDATION, TEST)
    steps = QUICK_STEPS if session.quick else STEPS
    weighted = LanguageArm(RGD, rgd.KL(3.0))
    arms = [
        LanguageArm(TOKENS, rgd.KL(3.0), per="element"),
        mean_one(weighted),
        opposite_sign(weighted),
        LanguageArm("CVaR(0.5)", rgd.CVaR(0.5)),
    ]
    session.expect(3 + len(arms), **GRIDS)
    problem = Language(of_length(name, steps), texts, model, steps, held_out)
    best = functools.partial(session.sweep, problem, trainer=train, **GRIDS)
    plain, chosen = best(LanguageArm(PLAIN)), best(weighted)
    control = best(times_mean_weight(weighted, chosen.mean_weight)).renamed(CONTROL)
    others = [chosen, control, *map(best, arms)]
    return [Result(problem.name, plain), *(Result(problem.name, c, PLAIN) for c in others)]


# --- what came out ---


def picture(table: Table, path: pathlib.Path) -> None:
    (setting,) = table.settings()
    names = [arm for arm in table.arms(setting) if arm != PLAIN]
    arms = {arm: arm.replace("plain x mean weight of RGD", "placebo of RGD") for arm in names}
    words = {"worst_tenth": "worst tenth", "mean_loss": "mean"}
    title = f"Bytes of text: difference to cross-entropy, {table.lines[0].seeds} seeds"
    save(intervals(table, arms, words, title), path, table)


def sentence(table: Table) -> str:
    (setting,) = table.settings()
    parts: list[str] = []
    for arm in (a for a in table.arms(setting) if a != PLAIN):
        tail, mean = (table.line(setting, arm, metric).shown() for metric in ("worst_tenth", "mean_loss"))
        parts.append(f"{arm}: worst tenth {tail}, mean {mean}")
    return f"Losses in nats a byte, against cross-entropy, {setting}. {'; '.join(parts)}."


def own_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data", type=pathlib.Path, help="a text file")
    return parser


ROW = Row(
    "lm",
    "A language model, one pass",
    Claim(
        of_length(LIBRARY, STEPS),
        RGD,
        "worst_tenth",
        "RGD by sequence lowers the loss of the worst tenth of the sequences.",
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
    if options.data is None:
        return main(ROW, others)
    other = functools.partial(run, path=options.data)
    return main(*recipe(ROW, other, options.data.stem, f"--data {options.data.name}", others))


if __name__ == "__main__":
    command_line()
