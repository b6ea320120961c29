"""Writes the tables of `README.md`, `docs/which.md` and the README of the project from the committed results.

`make evidence` runs it after the programs. A test compares the files with what this gives.
"""

from __future__ import annotations

import functools
import importlib
import math
import pathlib
import sys
from typing import NamedTuple

from harness import FINDING, Row, Table
from harness.problems import higher_is_better

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import demo

FOLDER = pathlib.Path(__file__).parent
BEGIN, END = "<!-- results: written by readme.py -->\n", "<!-- end of results -->"


def rows() -> list[Row]:
    """Every program of this folder."""
    names = sorted(path.stem for path in FOLDER.glob("*.py") if path.name != "readme.py")
    return [importlib.import_module(name).ROW for name in names]


@functools.cache
def tables() -> dict[str, Table]:
    """The committed table of every program, by its name."""
    return {row.name: Table.read(row.path) for row in rows() if row.path.exists()}


def results() -> str:
    """The table."""
    lines = ["| row | command | result |", "|---|---|---|"]
    comparisons = findings = 0
    for row in (row for row in rows() if row.name in tables()):
        table = tables()[row.name]
        comparisons, findings = comparisons + table.comparisons, findings + len(table.findings())
        found = f"{len(table.findings())} of {table.comparisons} comparisons are findings."
        links = f"[table](results/{row.name}.csv), [picture](results/{row.name}.png)"
        lines.append(
            f"| [{row.title}]({row.name}.py) | `make evidence ROW={row.name}` "
            f"| {row.sentence(table)} {found} {links} |"
        )
    return "\n".join(lines) + (
        f"\n\nAll rows together made {comparisons} comparisons; {findings} are findings, and about "
        f"{comparisons * FINDING:.0f} would be by chance alone.\n"
    )


class Case(NamedTuple):
    """A line of `docs/which.md`."""

    case: str
    use: str
    result: str
    row: str


def cases() -> list[Case]:
    """What to use for what, each line with what was measured."""

    def points(row: str, setting: str, arm: str, metric: str = "accuracy") -> str:
        return tables()[row].line(setting, arm, metric).points()

    def nats(row: str, setting: str, arm: str, metric: str = "worst_tenth") -> str:
        return tables()[row].line(setting, arm, metric).shown(form=".2f")

    def mean_loss(row: str) -> str:
        return tables()[row].line("balanced sets, chosen by mean loss", "RGD, tau 1", "mean_loss").shown()

    def both(arm: str, metric: str = "accuracy") -> str:
        shown = points if higher_is_better(metric) else nats
        settings = ("Debian, 44 classes", "Docstrings, 46 classes")
        return " and ".join(shown("text", setting, arm, metric) for setting in settings)

    def of_imbalance(setting: str) -> str:
        arms = ("logit adjustment", "class-balanced", "RGD")
        shown = [f"{arm} {points('imbalance', setting, arm, 'balanced_accuracy')}" for arm in arms]
        return f"{shown[0]} points, {', '.join(shown[1:])}"

    def of_language(steps: int, arm: str) -> str:
        setting = f"standard library, {steps} steps"
        tail, mean = (tables()["lm"].line(setting, arm, m).shown() for m in ("worst_tenth", "mean_loss"))
        return f"worst tenth {tail}, mean {mean}"

    def of_frontier(setting: str) -> str:
        arms = {"CVaR(0.5)": "CVaR(0.5)", "ChiSquareBall(0.1)": "ChiSquareBall(0.1)", "RGD": "KL(tau=1)"}
        return ", ".join(f"{name} {nats('frontier', setting, arm)}" for name, arm in arms.items())

    def of_rare(group: str, arm: str) -> str:
        line = tables()["rare"].line(f"{group}, step 500", arm, "log_rare_loss")
        return f"{math.exp(line.difference):.2f}" + ("" if line.finding else " (no finding)")

    cancer = "breast cancer, 40% wrong labels"
    noisy, some, clean = (f"digits, {noise}% wrong labels" for noise in (40, 20, 0))
    left_out = "all angles"
    sines, few_digits = "sinusoids, 10 shots", "digits, 5 ways, 1 shot"
    return [
        Case(
            "Wrong labels",
            "`rgd.KL(scale=-0.7)`, or -0.5; not -1, which learns badly from scratch",
            f"digits, 40% wrong: accuracy {points('dial', noisy, 's = -0.7')} points (the wrong way, "
            f"s = 0.5: {points('dial', noisy, 's = 0.5')}; s = -1: {points('dial', noisy, 's = -1')}); none "
            f"wrong: {points('dial', clean, 's = -0.7')}, and the worst tenth "
            f"{nats('dial', clean, 's = -0.7')}. Breast cancer, 40% wrong: "
            f"{points('dial', cancer, 's = -0.7')}",
            "dial",
        ),
        Case(
            "RGD where some labels may be wrong",
            "the default clip, `tau=1`: it bounds what one sample can do",
            f"20% wrong, all at s = 0.5: accuracy {points('clip', some, 'tau = 1, s = 0.5')} points at "
            f"tau = 1, {points('clip', some, 'tau = 3, s = 0.5')} at tau = 3, "
            f"{points('clip', some, 'tau = inf, s = 0.5')} without a clip; `RGDLoss(tau=3)`, s = 0.25: "
            f"{points('clip', some, 'tau = 3, s = 0.25')}",
            "clip",
        ),
        Case(
            "Few samples of some classes",
            "not a weighting: `RGDLoss(weighting=rgd.ERM(), logit_adjustment=...)` with "
            "`rgd.log_prior(counts)`, or `weight=` from `rgd.class_balanced(counts, beta=0.999)`",
            f"balanced accuracy, digits: {of_imbalance('digits, factor 50')}; MNIST-1D: "
            f"{of_imbalance('MNIST-1D, factor 50')}",
            "imbalance",
        ),
        Case(
            "Known groups or domains",
            "`rgd.GroupDRO(groups, step_size)`, and expect little",
            f"an angle left out: GroupDRO {points('domains', left_out, 'GroupDRO')} points, worst angle "
            f"{points('domains', left_out, 'GroupDRO', 'worst_angle_accuracy')}; RGD "
            f"{points('domains', left_out, 'RGD')}, worst tenth {nats('domains', left_out, 'RGD')}, its "
            f"opposite {nats('domains', left_out, 'RGD, opposite sign')}",
            "domains",
        ),
        Case(
            "A tail that matters",
            "first choose learning rate and weight decay by the worst tenth of the validation losses; "
            "`rgd.CVaR(0.5)` or `rgd.ChiSquareBall(0.1)` reached that tail on digits at a lower mean loss",
            "loss of the worst tenth. Digits, rates chosen by the mean: "
            f"{of_frontier('digits, chosen by mean loss')}; chosen by the worst tenth: "
            f"{of_frontier('digits, chosen by the worst tenth')} (mean loss, CVaR(0.5): "
            f"{nats('frontier', 'digits, chosen by the worst tenth', 'CVaR(0.5)', 'mean_loss')}). Diabetes: "
            f"{of_frontier('diabetes, chosen by mean loss')}. A language model, CVaR(0.5): "
            f"{of_language(250, 'CVaR(0.5)')}",
            "frontier",
        ),
        Case(
            "Nothing special, clean labels",
            "plain training, `rgd.ERM()`",
            f"digits, s = 0.5 without a clip: accuracy {points('dial', clean, 's = 0.5')} points; 43 tables "
            f"of KEEL, RGD: {points('tabular', 'balanced sets', 'RGD, tau 1')}, mean loss, chosen by mean "
            f"loss, {mean_loss('tabular')}; a tiny vision transformer, RGD: "
            f"{points('vit', 'digits, no mixup', 'RGD, tau 1')}, with mixup "
            f"{points('vit', 'digits, mixup', 'RGD, tau 1')}",
            "dial tabular vit",
        ),
        Case(
            "Fine-tuning a strong model",
            "plain training; RGD buys calibration of the tail, and with `tau=3` some accuracy in rare "
            "classes for some mean loss",
            f"a small BERT, two long-tailed tasks, RGD: accuracy {both('RGD, tau 1')} points, worst tenth "
            f"{both('RGD, tau 1', 'worst_tenth')}, after temperature scaling "
            f"{both('RGD, tau 1', 'scaled_worst_tenth')}; tau = 3: worst group of classes "
            f"{both('RGD, tau 3', 'worst_group_accuracy')} points, mean loss "
            f"{both('RGD, tau 3', 'mean_loss')}",
            "text",
        ),
        Case(
            "Boosted trees",
            "their own objective",
            f"tables of KEEL: accuracy {points('trees', 'balanced sets', 'RGD, tau 1')} points, mean loss, "
            f"chosen by mean loss, {mean_loss('trees')}",
            "trees",
        ),
        Case(
            "Meta-learning, few shots",
            "plain MAML",
            "test tasks, RGD, tau = 3. Sinusoids: error, mean "
            f"{nats('maml', sines, 'RGD, tau 3', 'mean_loss')}, worst tenth "
            f"{nats('maml', sines, 'RGD, tau 3')}. "
            f"Digits: accuracy {points('maml', few_digits, 'RGD, tau 3')} points, worst tenth of the tasks "
            f"{points('maml', few_digits, 'RGD, tau 3', 'worst_tenth_accuracy')}",
            "maml",
        ),
        Case(
            "Rare directions in regression",
            "a tuned learning rate first; with outliers, a negative scale",
            "squared error after 500 steps over plain training's: RGD "
            f"{of_rare('noise 0.1', 'RGD, tau 1')}; with 5% outliers RGD "
            f"{of_rare('noise 0.1, 5% outliers', 'RGD, tau 1')}, opposite sign "
            f"{of_rare('noise 0.1, 5% outliers', 'RGD, tau 1, opposite sign')}; at one rate that was not "
            f"tuned, RGD {of_rare('noise 0.1, NOT TUNED', 'RGD, tau 1')}, with mean-one weights "
            f"{of_rare('noise 0.1, NOT TUNED', 'RGD, tau 1, mean one')}, plain x mean weight "
            f"{of_rare('noise 0.1, NOT TUNED', 'plain x mean weight')}",
            "rare",
        ),
        Case(
            "Pre-training a language model",
            "plain training, with `linear_cross_entropy`",
            'nats a byte after 500 steps, RGD (tau 3), `per="sample"`: '
            f'{of_language(500, "RGD, tau 3")}; `per="element"`: {of_language(500, "RGD, tau 3, by byte")}',
            "lm",
        ),
    ]


def decisions() -> str:
    """The table of `docs/which.md`."""
    lines = ["| you have | use | measured | row |", "|---|---|---|---|"]
    for case in cases():
        link = ", ".join(f"[{name}](../examples/evidence/{name}.py)" for name in case.row.split())
        lines.append(f"| {case.case} | {case.use} | {case.result} | {link} |")
    return "\n".join(lines) + "\n"


def between(page: pathlib.Path, begin: str, end: str, table: str) -> str:
    """A page with another table between two marks."""
    before, rest = page.read_text().split(begin)
    return before + begin + table + end + rest.split(end)[1]


def pages() -> dict[pathlib.Path, str]:
    """The pages as they should be."""
    root = FOLDER.parents[1]
    which, front = root / "docs" / "which.md", root / "README.md"
    begin, end = "<!-- table: written by examples/evidence/readme.py -->\n", "<!-- end of table -->"
    return {
        FOLDER / "README.md": between(FOLDER / "README.md", BEGIN, END, results()),
        which: between(which, begin, end, decisions()),
        front: between(front, begin, end, demo.markdown(tables()["dial"])),
    }


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
