"""Meta-learning: RGD over the losses of the tasks of a meta-batch, on sinusoids and on few-shot digits.

Asked: what does weighting the tasks by their loss after adaptation do to the mean over test tasks and to the
worst tenth of them?

Arms: MAML; MAML with RGD over the tasks (`rgd.KL(tau=1)` and `rgd.KL(tau=3)`); with `rgd.CVaR(0.5)`. Controls
for tau = 3: weights divided by their mean over the meta-batch, plain MAML times the mean weight, the opposite
sign. Each is compared with plain MAML; the better of the two tau, chosen on validation tasks, with plain MAML
that chose among two starts.

Sinusoids, as Finn et al. (ICML 2017, section 5.1): a task is a sine of amplitude 0.1 to 5 and phase 0 to pi
on [-5, 5], 10 points to adapt to and 10 points to measure the squared error; one step of adaptation at rate
0.01, differentiated through. Smaller than theirs: two hidden layers of 32.

Digits: a task is 5 classes with one image each to adapt to (5 ways, 1 shot) and further images to classify, 5
of each class in meta-training, 15 in validation and test. Classes are scikit-learn's ten digits and, as is
usual for Omniglot, what they become when turned: each digit upright and turned by 90 degrees, and both
mirrored where the mirror image is a figure of its own (3, 4, 6, 7, 9; 0, 1 and 8 stay as they are, 2 and 5
become each other). Half turns are left out: they make a 9 of a 6. That is 30 classes. For each seed 4 digits
are drawn to meta-train, 3 to choose and 3 to test: a test task has no digit, turned or not, that
meta-training or validation saw. One hidden layer of 32, pixels of mean about 0 and deviation about 1, one
step of adaptation at rate 0.4, differentiated through. With so few classes to learn from, MAML stays below
the nearest neighbour in pixels (84% right): the row compares arms and sets no record. Tried before, on
validation tasks of plain MAML: pixels from 0 to 1, 5 shots, 64 units, two layers, inner rates 0.1 and 1.5,
fewer and more turns.

Protocol: 16 tasks a meta-batch; Adam with a cosine schedule, 500 meta-steps on sinusoids and 200 on digits;
the last step's network is measured on 300 test tasks. Adam's learning rate and weight decay (added to the
gradient) are chosen for every arm and by each seed, by the mean loss over its 200 validation tasks. Classes,
tasks and initial network depend on the seed alone. "worst_tenth" is the mean loss of the tenth of the tasks
with the largest loss, "worst_tenth_accuracy" the mean accuracy of the tenth with the lowest accuracy.

Real data: `python examples/evidence/maml.py --full --omniglot FOLDER`, which holds `images_background` and
`images_evaluation` with `<alphabet>/<character>/*.png` (a fifth of the background characters chooses, the
four turns are classes), or `--mini-imagenet FOLDER`, with `train`, `val` and `test` of `<wnid>/*.jpg`. The
network of four convolutional blocks (Vinyals et al. 2016) and the settings of Finn et al.: Omniglot, 28 by 28
pixels, 64 filters, 32 tasks, one inner step at 0.4, 40,000 meta-steps (with more than 5 ways 16 tasks, 5
inner steps at 0.1); mini-ImageNet, 84 by 84, 32 filters, 4 tasks, 5 inner steps at 0.01, 60,000 meta-steps;
but with the cosine schedule, and 15 images of each class to measure. Arms: MAML, RGD (tau 3), MAML times its
mean weight; the learning rate alone is tuned. `--ways 20`, `--shots 5`, `--steps 1000`, and `--first-order`,
which needs less memory. On a GPU if there is one; one network after the other, each kept when it is done.
Tables go to `results/omniglot` and `results/mini-imagenet`.

Run it with `make evidence ROW=maml`, or `python examples/evidence/maml.py --full`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import rgd
import torch
from harness import Arm, Claim, Grid, Result, Row, Session, Table, few_shot, main, recipe, tuned
from harness.arms import mean_one, opposite_sign, times_mean_weight
from harness.few_shot import Parts, Tasks, draw_tasks
from harness.meta import TRAIN, Draw, MetaProblem, meta_train
from harness.pictures import differences, pyplot, save
from harness.train import initial
from torch import Tensor

SHOTS, HIDDEN = 10, 32
PLAIN, BUDGET, RGD, RGD_1, TUNED = "MAML", "MAML, as many runs", "RGD, tau 3", "RGD, tau 1", "RGD, tuned tau"
METRICS = ("accuracy", "worst_tenth_accuracy", "mean_loss", "worst_tenth")
HERE, DIGITS = "sinusoids, 10 shots", "digits, 5 ways, 1 shot"
GRIDS = {
    HERE: Grid((0.0025, 0.005, 0.01, 0.02), (0.0, 1e-4, 2e-4, 4e-4)),
    DIGITS: Grid((0.0015, 0.003, 0.006), (0.0, 0.02, 0.04, 0.08)),
}
GRIDS_OF_IMAGES = {
    "grid": Grid((0.0005, 0.001, 0.002), (0.0,), one_axis=True),
    "quick": Grid((1e-4, 1e-2, 1.0), (0.0,), rate_factor=10.0, one_axis=True),
}


def network(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        x = (x @ weight + bias).relu()
    return x @ parameters[-2] + parameters[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class Sinusoids(MetaProblem):
    """Sines to fit."""

    name: str = HERE
    steps: int = 500
    inner_rate: float = 0.01

    def drawer(self, seed: int) -> Draw:
        generator = torch.Generator().manual_seed(4000 + seed)

        def draw(part: int, tasks: int) -> Tasks:
            del part
            amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
            phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
            x = 10 * torch.rand(tasks, 2 * SHOTS, 1, generator=generator) - 5
            y = amplitude * torch.sin(x + phase)
            return Tasks(x[:, :SHOTS], y[:, :SHOTS], x[:, SHOTS:], y[:, SHOTS:])

        return draw

    def initial(self, seeds: Sequence[int], copies: int) -> list[Tensor]:
        return initial((1, HIDDEN, HIDDEN, 1), seeds, copies)

    def outputs(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        return network(parameters, x)

    def scores(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (outputs - y).square().mean()}


@dataclasses.dataclass(frozen=True, eq=False)
class FewShot(MetaProblem):
    """Images to classify; a convolutional network where there are filters."""

    name: str = DIGITS
    steps: int = 200
    inner_rate: float = 0.4
    ways: int = 5
    shots: int = 1
    queries: int = 5
    measured: int = 15
    parts: Callable[[int], Parts] = few_shot.digit_parts
    channels: int = 0
    side: int = 8
    filters: int = 0
    size: str = ""  # of the data, that other data make another key

    def drawer(self, seed: int) -> Draw:
        generator = torch.Generator().manual_seed(4000 + seed)
        parts = self.parts(seed)
        parts.check(self.ways, self.shots + max(self.queries, self.measured))

        def draw(part: int, tasks: int) -> Tasks:
            queries = self.queries if part == TRAIN else self.measured
            return draw_tasks(parts[part], tasks, self.ways, self.shots, queries, generator)

        return draw

    def initial(self, seeds: Sequence[int], copies: int) -> list[Tensor]:
        if not self.filters:
            return initial((self.side**2, HIDDEN, self.ways), seeds, copies)
        shape = (self.channels, self.side, self.filters, self.ways)
        of_seeds = (few_shot.initial_convolutions(*shape, seed) for seed in seeds)
        return [torch.stack(same).repeat_interleave(copies, 0) for same in zip(*of_seeds, strict=True)]

    def outputs(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        return (few_shot.convolutions if self.filters else network)(parameters, x)

    def scores(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        loss = (outputs.logsumexp(-1) - (outputs * y).sum(-1)).mean()
        # A network that diverged is not right by chance.
        right = torch.where(loss.isfinite(), (outputs.argmax(-1) == y.argmax(-1)).float().mean(), torch.nan)
        return {"loss": loss, "accuracy": right}


# --- the comparison ---


def run(session: Session) -> list[Result]:
    session.expect(8 if session.quick else 18, GRIDS[DIGITS])
    small = {"steps": 5, "validation": 20, "test": 20} if session.quick else {}
    problems = (Sinusoids(**small), FewShot(**small))
    return [result for problem in problems for result in compare(session, problem)]


def compare(session: Session, problem: MetaProblem) -> list[Result]:
    """All arms on one problem; fewer in a quick run."""
    best = functools.partial(session.sweep, problem, grid=GRIDS[problem.name], trainer=meta_train)
    weighted = Arm(RGD, rgd.KL(3.0))
    arms = [Arm(PLAIN), weighted]
    arms += [] if session.quick else [Arm(RGD_1, rgd.KL(1.0)), Arm("CVaR(0.5)", rgd.CVaR(0.5))]
    chosen = {arm.name: best(arm) for arm in arms}
    controls = [mean_one(weighted), times_mean_weight(weighted, chosen[RGD].mean_weight)]
    controls += [] if session.quick else [opposite_sign(weighted)]
    chosen |= {arm.name: best(arm) for arm in controls}
    results = [Result(problem.name, c, "" if name == PLAIN else PLAIN) for name, c in chosen.items()]
    if session.quick:
        return results
    taus = [chosen[RGD_1], chosen[RGD]]
    starts = [chosen[PLAIN], *(best(Arm(PLAIN).started(k)) for k in range(1, len(taus)))]
    plain = tuned(BUDGET, starts, problem.select)
    found = tuned(TUNED, taus, problem.select)
    return [*results, Result(problem.name, plain), Result(problem.name, found, BUDGET)]


class Options(NamedTuple):
    """Of the recipe for real data; None for what Finn et al. took."""

    ways: int = 5
    shots: int = 1
    steps: int | None = None
    first_order: bool = False


def images(name: str, folder: pathlib.Path, options: Options, quick: bool) -> FewShot:
    """The problem of a folder of Omniglot or mini-ImageNet."""
    if name == "omniglot":
        parts = few_shot.omniglot(folder)
        title, channels, side, filters, steps = "Omniglot", 1, few_shot.OMNIGLOT_SIDE, 64, 40_000
        inner_rate, inner_steps, tasks = (0.4, 1, 32) if options.ways <= 5 else (0.1, 5, 16)
    else:
        side = few_shot.OMNIGLOT_SIDE if quick else few_shot.MINI_IMAGENET_SIDE
        parts = few_shot.mini_imagenet(folder, side)
        title, channels, filters, steps = "mini-ImageNet", 3, 32, 60_000
        inner_rate, inner_steps, tasks = 0.01, 5, 4
    of_first = parts(0)
    of_first.check(options.ways, options.shots + (2 if quick else 15))
    problem = FewShot(
        f"{title}, {options.ways} ways, {options.shots} shot{'s' * (options.shots > 1)}",
        options.steps or steps, inner_rate, tasks, inner_steps, options.first_order, test=600, at_once=4,
        device="cuda" if torch.cuda.is_available() else "cpu", ways=options.ways, shots=options.shots,
        queries=15, parts=parts, channels=channels, side=side, filters=filters,
        size=str([(len(part.names), int(part.counts.sum())) for part in of_first]),
    )  # fmt: skip
    if quick:
        small = {"tasks": 2, "validation": 2, "test": 4, "queries": 2, "measured": 2, "filters": 4}
        problem = dataclasses.replace(problem, **{"steps": options.steps or 2}, **small)
    return problem


def run_images(session: Session, name: str, folder: pathlib.Path, options: Options) -> list[Result]:
    problem = images(name, folder, options, session.quick)
    best = functools.partial(session.sweep, problem, trainer=meta_train, one_by_one=True, **GRIDS_OF_IMAGES)
    session.expect(3, **GRIDS_OF_IMAGES)
    plain, weighted = best(Arm(PLAIN)), best(Arm(RGD, rgd.KL(3.0)))
    control = best(times_mean_weight(weighted.arm, weighted.mean_weight))
    return [Result(problem.name, plain), *(Result(problem.name, c, PLAIN) for c in (weighted, control))]


# --- what came out ---


def picture(table: Table, path: pathlib.Path) -> None:
    settings = table.settings()
    figure, axes = pyplot().subplots(1, len(settings), figsize=(5.6 * len(settings), 3.8), squeeze=False)
    for panel, setting in zip(axes[0], settings, strict=True):
        metric = "accuracy" if table.has(setting, "accuracy") else "mean_loss"
        arms = [a for a in table.arms(setting) if table.line(setting, a, metric).baseline]
        differences(panel, [table.line(setting, arm, metric) for arm in arms])
        unit = "accuracy, points" if metric == "accuracy" else "squared error"
        panel.set_title(setting, loc="left", fontsize=11)
        panel.locator_params(axis="x", nbins=6)
        panel.set_xlabel(f"{unit}; {'right' if metric == 'accuracy' else 'left'} is better")
        panel.grid(axis="x", color="#e3e6eb")
        panel.tick_params(length=0)
        panel.set_yticks(range(0, -len(arms), -1), [shortened(arm) for arm in arms])
    figure.suptitle(
        f"Mean over test tasks: difference to MAML and 95% interval, {table.lines[0].seeds} seeds",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def shortened(arm: str) -> str:
    """An arm's name where there is little room."""
    if arm == TUNED:
        return "tuned tau, as many runs"
    return arm.replace(f"plain x mean weight of {RGD}", "placebo of tau 3")


def sentence(table: Table) -> str:
    return " ".join(of_setting(table, setting) for setting in table.settings())


def of_setting(table: Table, setting: str) -> str:
    accurate = table.has(setting, "accuracy")

    def shown(arm: str) -> str:
        mean, tail = (table.line(setting, arm, metric).shown() for metric in ("mean_loss", "worst_tenth"))
        losses = f"mean {mean}, worst tenth {tail}"
        if not accurate:
            return f"{arm}: {losses}"
        points = [table.line(setting, arm, m).points() for m in ("accuracy", "worst_tenth_accuracy")]
        return f"{arm}: {points[0]} points, worst tenth of the tasks {points[1]}; loss {losses}"

    def plain(metric: str) -> float:
        return table.line(setting, PLAIN, metric).mean

    begin = f"squared error of test tasks against MAML (mean {plain('mean_loss'):.3f}, worst tenth "
    begin += f"{plain('worst_tenth'):.3f})"
    if accurate:
        shares = (100 * plain(metric) for metric in ("accuracy", "worst_tenth_accuracy"))
        begin = "accuracy on test tasks against MAML ({:.1f}%, worst tenth of the tasks {:.1f}%)".format(
            *shares
        )
    known = table.arms(setting)
    arms = [a for a in (RGD, RGD_1, TUNED, "CVaR(0.5)") if any(arm.startswith(a) for arm in known)]
    title = setting if setting.startswith("mini-") else f"{setting[0].upper()}{setting[1:]}"
    return f"{title}: {begin}. {'; '.join(map(shown, arms))}."


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, got {text!r}")
    return int(text)


def own_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    data = parser.add_mutually_exclusive_group()
    for name in ("omniglot", "mini-imagenet"):
        data.add_argument(f"--{name}", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--ways", type=positive, default=5, help="classes of a task")
    parser.add_argument("--shots", type=positive, default=1, help="images of each class to adapt to")
    parser.add_argument("--steps", type=positive, help="meta-steps")
    parser.add_argument("--first-order", action="store_true", help="no second derivatives: less memory")
    return parser


ROW = Row(
    "maml",
    "Meta-learning (MAML)",
    Claim(HERE, RGD_1, "mean_loss", "RGD over the tasks lowers the error of test tasks (sinusoids)."),
    METRICS,
    run,
    picture,
    sentence,
    own_options,
)


def command_line(arguments: Sequence[str] | None = None) -> Table:
    """Runs the program as the command line says."""
    chosen, others = own_options().parse_known_args(arguments)
    given = {"omniglot": chosen.omniglot, "mini-imagenet": chosen.mini_imagenet}
    options = Options(chosen.ways, chosen.shots, chosen.steps, chosen.first_order)
    for name, folder in given.items():
        if folder is not None:
            shown = f"--{name} {folder.name} --ways {chosen.ways} --shots {chosen.shots}"
            shown += f" --steps {chosen.steps}" if chosen.steps else ""
            shown += " --first-order" if chosen.first_order else ""
            other = functools.partial(run_images, name=name, folder=folder, options=options)
            return main(*recipe(ROW, other, name, shown, others))
    if options != Options():
        raise SystemExit("--ways, --shots, --steps and --first-order go with --omniglot or --mini-imagenet")
    return main(ROW, others)


if __name__ == "__main__":
    command_line()
