"""Writes the tables of `README.md`, `docs/which.md` and the README of the project from the committed results.

`make evidence` runs it after the programs. A test compares the files with what this gives.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
from typing import NamedTuple

from harness import Row, Table

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import demo

FOLDER = pathlib.Path(__file__).parent
BEGIN, END = "<!-- results: written by readme.py -->\n", "<!-- end of results -->"


def rows() -> list[Row]:
    """Every program of this folder."""
    names = sorted(path.stem for path in FOLDER.glob("*.py") if path.name != "readme.py")
    return [importlib.import_module(name).ROW for name in names]


def results() -> str:
    """The table."""
    lines = ["| row | command | result |", "|---|---|---|"]
    for row in rows():
        if row.path.exists():
            table = Table.read(row.path)
            found = f"{len(table.findings())} of {table.comparisons} comparisons are findings."
            links = f"[table](results/{row.name}.csv), [picture](results/{row.name}.png)"
            lines.append(
                f"| [{row.title}]({row.name}.py) | `make evidence ROW={row.name}` "
                f"| {row.sentence(table)} {found} {links} |"
            )
    return "\n".join(lines) + "\n"


class Case(NamedTuple):
    """A line of `docs/which.md`."""

    case: str
    use: str
    result: str
    row: str


def cases() -> list[Case]:
    """What to use for what, each line with what was measured."""
    done = [row for row in rows() if row.path.exists()]
    tables = {row.name: Table.read(row.path) for row in done}
    sentences = {row.name: row.sentence(tables[row.name]) for row in done}

    def points(row: str, setting: str, arm: str, metric: str = "accuracy") -> str:
        return tables[row].line(setting, arm, metric).points()

    def nats(row: str, setting: str, arm: str, metric: str = "worst_tenth") -> str:
        return tables[row].line(setting, arm, metric).shown(form=".2f")

    def mean_loss(row: str) -> str:
        return tables[row].line("balanced sets, chosen by mean loss", "RGD, tau 1", "mean_loss").shown()

    def both(arm: str, metric: str = "accuracy") -> str:
        shown = points if metric.endswith("accuracy") else nats
        settings = ("Debian, 44 classes", "Docstrings, 46 classes")
        return " and ".join(shown("text", setting, arm, metric) for setting in settings)

    def of_imbalance(setting: str) -> str:
        arms = ("logit adjustment", "class-balanced", "RGD")
        shown = [f"{arm} {points('imbalance', setting, arm, 'balanced_accuracy')}" for arm in arms]
        return f"{shown[0]} points, {', '.join(shown[1:])}"

    def of_language(steps: int, arm: str) -> str:
        setting = f"standard library, {steps} steps"
        tail, mean = (tables["lm"].line(setting, arm, m).shown() for m in ("worst_tenth", "mean_loss"))
        return f"worst tenth {tail}, mean {mean}"

    noisy, some, clean = (f"digits, {noise}% wrong labels" for noise in (40, 20, 0))
    left_out = "all angles"
    digits = "digits, chosen by mean loss"
    sines, few_digits = "sinusoids, 10 shots", "digits, 5 ways, 1 shot"
    return [
        Case(
            "Wrong labels",
            "`rgd.KL(scale=-0.7)`, or -0.5; not -1, which learns badly from scratch",
            f"40% wrong: accuracy {points('dial', noisy, 's = -0.7')} points; none wrong: "
            f"{points('dial', clean, 's = -0.7')}. The wrong way, s = 0.5: "
            f"{points('dial', noisy, 's = 0.5')}",
            "dial",
        ),
        Case(
            "RGD where some labels may be wrong",
            "the default clip, `tau=1`: it bounds what one sample can do",
            f"20% wrong: accuracy {points('clip', some, 'tau = 1, s = 0.5')} points at tau = 1, "
            f"{points('clip', some, 'tau = 3, s = 0.5')} at tau = 3, "
            f"{points('clip', some, 'tau = inf, s = 0.5')} without a clip",
            "clip",
        ),
        Case(
            "Few samples of some classes",
            "not a weighting: `RGDLoss(weighting=rgd.ERM(), logit_adjustment=...)` with "
            "`rgd.log_prior(counts)`, or `weight=` from `rgd.class_balanced(counts)`",
            f"balanced accuracy, digits: {of_imbalance('digits, factor 50')}; MNIST-1D: "
            f"{of_imbalance('MNIST-1D, factor 50')}",
            "imbalance",
        ),
        Case(
            "Known groups or domains",
            "`rgd.GroupDRO(groups, step_size)`, and expect little",
            f"an angle left out: GroupDRO {points('domains', left_out, 'GroupDRO')} points, RGD "
            f"{points('domains', left_out, 'RGD')}",
            "domains",
        ),
        Case(
            "A tail that matters",
            "temperature scaling; in training, `rgd.CVaR(0.5)` or `rgd.ChiSquareBall(0.1)`",
            f"loss of the worst tenth, digits: CVaR(0.5) {nats('frontier', digits, 'CVaR(0.5)')}, "
            f"ChiSquareBall(0.1) {nats('frontier', digits, 'ChiSquareBall(0.1)')}, RGD "
            f"{nats('frontier', digits, 'KL(tau=1)')}; after temperature scaling CVaR(0.5) "
            f"{nats('frontier', digits, 'CVaR(0.5)', 'scaled_worst_tenth')}",
            "frontier",
        ),
        Case(
            "Nothing special, clean labels",
            "plain training, `rgd.ERM()`",
            f"digits, s = 0.5: accuracy {points('dial', clean, 's = 0.5')} points; 43 tables of KEEL, RGD: "
            f"{points('tabular', 'balanced sets', 'RGD, tau 1')}, mean loss where it chooses the rate "
            f"{mean_loss('tabular')}; a tiny vision transformer, RGD: "
            f"{points('vit', 'digits, no mixup', 'RGD, tau 1')}, with mixup "
            f"{points('vit', 'digits, mixup', 'RGD, tau 1')}",
            "tabular",
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
            f"tables of KEEL: accuracy {points('trees', 'balanced sets', 'RGD, tau 1')} points, mean loss "
            f"where it chooses the rate {mean_loss('trees')}",
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
            "a tuned learning rate first",
            sentences["rare"].partition(";")[0] + ".",
            "rare",
        ),
        Case(
            "Pre-training a language model",
            "plain training, with `linear_cross_entropy`",
            "nats a byte after 500 steps, RGD (tau 3) by sequence: "
            f"{of_language(500, 'RGD, tau 3')}; by byte: {of_language(500, 'RGD, tau 3, by byte')}",
            "lm",
        ),
    ]


def decisions() -> str:
    """The table of `docs/which.md`."""
    lines = ["| you have | use | measured | row |", "|---|---|---|---|"]
    for case in cases():
        link = f"[{case.row}](../examples/evidence/{case.row}.py)" if case.row else "-"
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
    dial = Table.read(FOLDER / "results" / "dial.csv")
    begin, end = "<!-- table: written by examples/evidence/readme.py -->\n", "<!-- end of table -->"
    return {
        FOLDER / "README.md": between(FOLDER / "README.md", BEGIN, END, results()),
        which: between(which, begin, end, decisions()),
        front: between(front, begin, end, demo.markdown(dial)),
    }


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
