"""Writes what is said of the committed results: a page a row, the guide, two READMEs' tables, a forest plot.

`make evidence` runs it after the programs. A test compares the files with what this gives.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import math
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

from harness import Claim, Row, Table, holm
from harness.pictures import BLUE, GREY, INK, ORANGE, pyplot
from harness.problems import higher_is_better
from harness.results import Line

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import aa
import demo

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parents[1]
RESULTS = FOLDER / "results"
PLACEBO = "plain x mean weight"
WRITTEN = "<!-- written by examples/evidence/readme.py -->"


def rows() -> list[Row]:
    """Every program of this folder."""
    names = sorted(path.stem for path in FOLDER.glob("*.py") if path.name != "readme.py")
    return [importlib.import_module(name).ROW for name in names]


@functools.cache
def tables() -> dict[str, Table]:
    """The committed table of every program, by its name."""
    return {row.name: Table.read(row.path) for row in rows() if row.path.exists()}


def committed() -> list[Row]:
    """The programs with a committed table."""
    return [row for row in rows() if row.name in tables()]


@functools.cache
def adjusted() -> dict[str, float]:
    """p of every row's claim, by Holm's correction over the rows."""
    claims = {row.name: row.claim for row in committed()}
    return holm({name: claim.line(tables()[name]).p for name, claim in claims.items() if claim is not None})


def holds(row: Row) -> bool:
    """Whether the claim of a row holds."""
    return row.claim is not None and row.claim.holds(tables()[row.name], adjusted()[row.name])


def share(lines: list[Line]) -> str:
    """How many intervals exclude 0."""
    outside = sum(line.outside for line in lines)
    return f"{outside} of {len(lines)} ({100 * outside / len(lines):.1f}%)"


def placebos() -> list[Line]:
    """The comparisons of plain training times a mean weight with plain training, in all rows."""
    compared = [line for table in tables().values() for line in table.compared()]
    return [line for line in compared if line.arm.startswith(PLACEBO) and "NOT TUNED" not in line.setting]


# --- a page a row ---


def p_of(value: float) -> str:
    """A p value in words."""
    return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".")


def unit_of(line: Line) -> float:
    """100 for accuracies and shares, which are told in points."""
    return 100.0 if line.metric.endswith("share") else line.unit


def said(line: Line) -> str:
    """A difference, in points for accuracies and shares."""
    return line.points() if unit_of(line) == 100 else line.shown()


def verdict(row: Row) -> str:
    """What came of the claim, in a sentence."""
    if row.claim is None:
        return row.sentence(tables()[row.name])
    line = row.claim.line(tables()[row.name])
    unit = " points" if unit_of(line) == 100 else ""
    shown = said(line) + unit
    if line.metric.startswith("log_"):
        shown = f"{math.exp(line.difference):.2f} times as large"
    word = "It holds" if holds(row) else "It does not hold"
    return f"{word}: {shown}, {p_of(adjusted()[row.name])}."


def name_of(metric: str) -> str:
    """A metric in words."""
    return f"{metric.replace('_', ' ')}, %" if higher_is_better(metric) else metric.replace("_", " ")


def cell(line: Line) -> str:
    """A mean, with the difference to the baseline; bold where its interval excludes 0."""
    large = abs(line.mean) > 1000  # a seed that diverged: more digits would differ between versions of NumPy
    form = ".1f" if higher_is_better(line.metric) else ".3g" if large else ".3f"
    text = f"{line.unit * line.mean:{form}}"
    if not line.baseline:
        return text
    difference = line.shown(line.unit, form)
    return f"{text} (**{difference}**)" if line.outside else f"{text} ({difference})"


def of_setting(table: Table, setting: str) -> str:
    """The table of a setting: a line an arm, a column a metric."""
    metrics = [metric for metric in table.metrics if table.has(setting, metric)]
    lines = [
        f"| arm | against | {' | '.join(map(name_of, metrics))} |",
        f"|---|---|{'---|' * len(metrics)}",
    ]
    for arm in table.arms(setting):
        own = [table.line(setting, arm, metric) for metric in metrics]
        lines.append(f"| {arm} | {own[0].baseline or '-'} | {' | '.join(map(cell, own))} |")
    return "\n".join(lines)


def page(row: Row) -> str:
    """The page of a row."""
    table = tables()[row.name]
    about = ast.get_docstring(ast.parse((FOLDER / f"{row.name}.py").read_text())) or ""
    parts = [WRITTEN, f"# {row.title}"]
    if row.claim is not None:
        line = row.claim.line(table)
        unit = " points" if unit_of(line) == 100 else ""
        parts.append(f"**Claim, made in advance:** {row.claim.words} **{verdict(row)}**")
        surely = f"{unit_of(line) * line.detectable:.2g}{unit}"
        found = f"A difference of {surely} would have been found almost surely."
        parts.append(f"{found} {row.claim.of_paper(table)}".strip())
    parts.append(f"![{row.title}]({row.name}.png)")
    parts.append(row.sentence(table))
    told = (other for other in committed() if other.name in row.tells)
    parts += [f"[{other.title}]({other.name}.md): {other.sentence(tables()[other.name])}" for other in told]
    parts.append(
        "Means over the seeds; in brackets the difference to the baseline and half of its 95% interval, bold "
        "where that excludes 0. Only the claim is tested; all else is description."
    )
    for setting in filter(row.tabled, table.settings()) if row.tabled else table.settings():
        parts += [f"## {setting[0].upper()}{setting[1:]}", of_setting(table, setting)]
    parts += ["## How it was measured", about]
    numbers = f"[{row.name}.csv]({row.name}.csv), [{row.name}_runs.csv]({row.name}_runs.csv)"
    parts.append(f"{table.header['versions']}; {table.header['time']}. Numbers: {numbers}.")
    return "\n\n".join(parts) + "\n"


# --- the README of this folder ---


def answers() -> str:
    """The table of rows."""
    lines = ["| row | claim | answer |", "|---|---|---|"]
    for row in committed():
        if row.claim is not None:
            lines.append(f"| [{row.title}](results/{row.name}.md) | {row.claim.words} | {verdict(row)} |")
    missing = [f"[{row.name}.py]({row.name}.py)" for row in rows() if row.name not in tables()]
    if missing:
        lines += ["", f"Not yet run in full: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def checks() -> str:
    """How often intervals exclude 0 where there is nothing, or nearly nothing, to find."""
    plain = aa.rates(tables()["aa"])
    return (
        f"- Plain training against plain training ([A/A](results/aa.md)), intervals that exclude 0, of which "
        f"5% are expected: {plain}. Here the losses are taken where accuracy chose, against the rule.\n"
        f"- The placebo of all rows, plain training times a mean weight: {share(placebos())}. It is no exact "
        "null, for a constant factor moves the grid of learning rates and the weight decay.\n"
    )


# --- the guide ---


class Case(NamedTuple):
    """A line of `docs/which.md`."""

    have: str
    do: str
    measured: str
    row: str


def told(row: str, setting: str, arm: str, metric: str = "accuracy") -> str:
    """A difference; bold where it is the row's claim and that holds."""
    line = tables()[row].line(setting, arm, metric)
    (own,) = (r for r in committed() if r.name == row)
    text = said(line)
    claimed = own.claim is not None and line == own.claim.line(tables()[row])
    return f"**{text}**" if claimed and holds(own) else text


def paper(row: str) -> str:
    """What a row says of the paper's figure, in short."""
    table = tables()[row]
    (own,) = (r for r in committed() if r.name == row)
    assert own.claim is not None
    found = own.claim.of_paper(table)
    for end in ("excluded here", "could not have told"):
        if end in found:
            assert own.claim.paper is not None
            return f"the paper's +{own.claim.paper.points:g}: {end}"
    return "the paper's figure lies within the interval"


def ratio(group: str, arm: str) -> str:
    """The error in rare directions over that of plain training."""
    line = tables()["rare"].line(f"{group}, step 500", arm, "log_rare_loss")
    return f"{math.exp(line.difference):.2f}"


def false_share(here: str, arm: str) -> str:
    """How many of the suspects have a right label."""
    return f"{100 * tables()['suspects'].line(here, arm, 'false_share').mean:.1f}%"


def lowered() -> str:
    """Which weightings lowered the loss of the worst tenth in a setting; the interval excludes 0."""
    found = {
        line.arm
        for line in tables()["frontier"].compared()
        if line.metric.endswith("worst_tenth") and line.outside and line.better
    }
    return f"lowered by {', '.join(sorted(found))}" if found else "no weighting lowered it"


def cases() -> list[Case]:
    """What to do for what, the strong ones first; only what has a committed result."""
    outliers, colour, credit = "noise 0.1, 5% outliers", "colour on digits", "German credit, by sex"
    half, shift = "digits, 30% pairs", "MNIST-1D, 30% pairs"
    candidates: list[Callable[[], Case]] = [
        lambda: Case(
            "Wrong labels",
            "turn the dial from 0 to -1 by half-time ([how](torch.md#wrong-labels-train-against-them))",
            f"accuracy, 30% pair flips: digits {told('ramp', half, 'ramp to -1')} points, MNIST-1D "
            f"{told('ramp', shift, 'ramp to -1')}; none wrong "
            f"{told('ramp', 'digits, right labels', 'ramp to -1')}, "
            f"{told('ramp', 'MNIST-1D, right labels', 'ramp to -1')}",
            "ramp",
        ),
        lambda: Case(
            "Wrong labels, in one word",
            "`RGDLoss(scale=-0.7)`, or -0.5; not -1 from the start",
            f"digits, 40% wrong: {told('dial', 'digits, 40% wrong labels', 's = -0.7')} points; none wrong: "
            f"{told('dial', 'digits, 0% wrong labels', 's = -0.7')}, MNIST-1D "
            f"{told('ramp', 'MNIST-1D, right labels', 's = -0.7')}",
            "dial",
        ),
        lambda: Case(
            "Wrong labels to be found and corrected",
            "`rgd.suspects` on the losses of the training ([how](torch.md#wrong-labels-find-them))",
            f"right labels among the suspects, digits, 30% pairs: {false_share(half, 's = -0.7')}, cleanlab "
            f"{false_share(half, 'cleanlab')} ({told('suspects', half, 's = -0.7', 'false_share')})",
            "suspects",
        ),
        lambda: Case(
            "Known groups, one of them served badly",
            "balance them: by a sampler, or `rgd.GroupDRO(groups, step_size=0)` ([how](groups.md))",
            "worst group, sampler and step 0: colour "
            f"{told('groups', colour, 'balanced sampler', 'worst_group_accuracy')} points, "
            f"{told('groups', colour, 'group balancing', 'worst_group_accuracy')}; credit "
            f"{told('groups', credit, 'balanced sampler', 'worst_group_accuracy')}, "
            f"{told('groups', credit, 'group balancing', 'worst_group_accuracy')}",
            "groups",
        ),
        lambda: Case(
            "A trained model, a pool of text that is mostly garbage, some clean text to choose the rate",
            '`RGDLoss(weighting=rgd.KL(scale=-3, normalize=True), per="sample")`',
            f"clean text {told('polluted', 'by accuracy', 's = -3')} points over not going on; worst tenth's "
            f"loss {told('polluted', 'by mean loss', 's = -3', 'worst_tenth')}; from scratch "
            f"{told('scratch', 'by accuracy', 's = -3')} against clean alone",
            "polluted",
        ),
        lambda: Case(
            "Rare classes, from scratch",
            "`logit_adjustment=rgd.log_prior(counts)` with `rgd.ERM()`",
            "balanced accuracy: digits "
            f"{told('imbalance', 'digits, factor 50', 'logit adjustment', 'balanced_accuracy')} points, RGD "
            f"{told('imbalance', 'digits, factor 50', 'RGD', 'balanced_accuracy')}",
            "imbalance",
        ),
        lambda: Case(
            "Rare classes, in fine-tuning",
            "`RGDLoss(tau=3)`",
            "worst group of classes "
            f"{told('text', 'both tasks', 'RGD, tau 3', 'worst_group_accuracy')} points, accuracy "
            f"{told('text', 'both tasks', 'RGD, tau 3')}; tau chosen by validation: "
            f"{told('text', 'both tasks', 'RGD, tuned tau', 'worst_group_accuracy')}",
            "text",
        ),
        lambda: Case(
            "Outliers in regression",
            "Huber's loss, or a small negative scale without a clip",
            f"error in rare directions over plain's: s = -0.1 {ratio(outliers, 's = -0.1, no clip')}, Huber "
            f"{ratio(outliers, 'Huber loss')}, with tau = 1 {ratio(outliers, 'RGD, tau 1, opposite sign')}",
            "rare",
        ),
        lambda: Case(
            "A tail that you are judged by",
            "choose learning rate and decay by it",
            f"loss of the worst tenth: {lowered()}; CVaR(0.5), digits "
            f"{told('frontier', 'digits, chosen by the worst tenth', 'CVaR(0.5)', 'worst_tenth')}",
            "frontier",
        ),
        lambda: Case(
            "Domains that training does not show",
            "plain training",
            f"RGD {told('domains', 'all angles', 'RGD')} points; {paper('domains')}",
            "domains",
        ),
        lambda: Case(
            "Tables",
            "plain training, a network or trees",
            f"RGD, network {told('tabular', 'balanced sets', 'RGD, tau 1')} points, {paper('tabular')}; "
            f"trees {told('trees', 'balanced sets', 'RGD, tau 1')}",
            "tabular",
        ),
        lambda: Case(
            "Images, clean labels",
            "plain training",
            f"RGD, a tiny transformer {told('vit', 'digits', 'RGD, tau 1')} points; {paper('vit')}",
            "vit",
        ),
        lambda: Case(
            "A language model from scratch",
            "plain training, with `linear_cross_entropy`",
            "RGD by sequence, nats a byte: worst tenth "
            f"{told('lm', 'standard library, 250 steps', 'RGD, tau 3', 'worst_tenth')}, mean "
            f"{told('lm', 'standard library, 250 steps', 'RGD, tau 3', 'mean_loss')}",
            "lm",
        ),
        lambda: Case(
            "Meta-learning",
            "plain MAML",
            f"RGD, sinusoids: error {told('maml', 'sinusoids, 10 shots', 'RGD, tau 1', 'mean_loss')}",
            "maml",
        ),
    ]
    found: list[Case] = []
    for candidate in candidates:
        with contextlib.suppress(KeyError):  # the row has no committed result yet
            found.append(candidate())
    return found


def guide() -> str:
    """The table of `docs/which.md`."""
    lines = ["| you have | do | measured against plain training | picture |", "|---|---|---|---|"]
    for case in cases():
        link = f"[{case.row}](../examples/evidence/results/{case.row}.md)"
        lines.append(f"| {case.have} | {case.do} | {case.measured} | {link} |")
    return "\n".join(lines) + "\n"


# --- the forest plot ---


def forest() -> dict[str, list[Line]]:
    """The claims that are told in points of accuracy, and the placebos of their rows."""
    claims = {row.name: row.claim for row in committed()}
    return {
        name: [claim.line(tables()[name]), *placebos_of(name, claim)]
        for name, claim in claims.items()
        if claim is not None and higher_is_better(claim.metric)
    }


def placebos_of(name: str, claim: Claim) -> list[Line]:
    """The placebos of a row, in the setting and by the metric of its claim."""
    own = (claim.setting, claim.metric)
    lines = (line for line in tables()[name].compared() if (line.setting, line.metric) == own)
    return [line for line in lines if line.arm.startswith(PLACEBO)]


def forest_key() -> str:
    """What the forest plot was drawn from."""
    shown = {name: [[f"{x:.6g}" for x in line[7:9]] for line in lines] for name, lines in forest().items()}
    return f"claims {shown}"


def draw_forest(path: pathlib.Path) -> None:
    """A line a row: its claim, the intervals of its placebos in grey, the paper's figure as a diamond."""
    plt = pyplot()
    found, by_name = forest(), {row.name: row for row in committed()}
    order = sorted(found, key=lambda name: -found[name][0].difference)
    figure, panel = plt.subplots(figsize=(9.5, 1.3 + 0.42 * len(order)))
    panel.axvline(0, color=GREY, linewidth=0.9)
    panel.use_sticky_edges = False  # keeps the bars off the frame
    for k, name in enumerate(order):
        line, *others = found[name]
        for other in others:
            center, half = 100 * other.difference, 100 * other.difference_half
            panel.barh(-k, 2 * half, left=center - half, height=0.55, color=GREY, alpha=0.18, linewidth=0)
        color = BLUE if line.difference > 0 else ORANGE
        full = color if holds(by_name[name]) else "white"
        panel.errorbar(
            100 * line.difference, -k, xerr=100 * line.difference_half, fmt="o", color=color,
            markerfacecolor=full, markersize=6,
        )  # fmt: skip
        claim = by_name[name].claim
        assert claim is not None
        if claim.paper is not None and not claim.paper.metric:
            panel.plot(claim.paper.points, -k, "D", color=INK, markersize=5)
    panel.set_yticks(range(0, -len(order), -1), [by_name[name].title for name in order])
    panel.tick_params(length=0)
    panel.grid(axis="x", color="#e3e6eb")
    panel.set_xlabel("claim of the row against plain training, points of its accuracy")
    others = [row.name for row in committed() if row.claim is not None and row.name not in found]
    figure.suptitle(
        "Full: the claim holds. Grey: plain times the mean weight of a loss weighting of the row.\n"
        f"Diamond: the paper's gain. Not in points of accuracy, on their pages: {', '.join(others)}.",
        x=0.012, ha="left", fontsize=10.5, fontweight="bold",
    )  # fmt: skip
    figure.savefig(path, metadata={"Comment": forest_key()})
    plt.close(figure)


# --- files ---


def between(path: pathlib.Path, begin: str, end: str, text: str) -> str:
    """A page with another text between two marks."""
    before, rest = path.read_text().split(begin)
    return before + begin + text + end + rest.split(end)[1]


def pages() -> dict[pathlib.Path, str]:
    """The pages as they should be."""
    which, front, here = ROOT / "docs" / "which.md", ROOT / "README.md", FOLDER / "README.md"
    begin, end = "<!-- table: written by examples/evidence/readme.py -->\n", "<!-- end of table -->"
    evidence = between(here, begin, end, answers())
    mark, stop = "<!-- checks: written by readme.py -->\n", "<!-- end of checks -->"
    before, rest = evidence.split(mark)
    return {
        here: before + mark + checks() + stop + rest.split(stop)[1],
        which: between(which, begin, end, guide()),
        front: between(front, begin, end, demo.markdown(tables()["ramp"])),
        **{RESULTS / f"{row.name}.md": page(row) for row in committed()},
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
    draw_forest(RESULTS / "forest.png")
