"""The arms of a program that asks what RGD does to a network: the clipping factors, and the controls.

RGD with each clipping factor tau, and with the one that validation chose, which is compared with
cross-entropy given as many runs. The controls are those of the first tau: its weights divided by their mean,
cross-entropy times its mean weight, and the opposite sign.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import rgd

from harness.arms import Arm, mean_one, opposite_sign, times_mean_weight
from harness.pictures import intervals, save
from harness.results import Result, Table
from harness.sweep import Chosen, tuned

PLAIN, PLAIN_BUDGET, TUNED = "cross-entropy", "cross-entropy, as many runs", "RGD, tuned tau"
RGD = "RGD, tau "
MEAN_ONE, CONTROL, OPPOSITE = "RGD, mean one", "plain x mean weight of RGD", "RGD, opposite sign"
CONTROLS = {MEAN_ONE: "mean one", CONTROL: "x mean weight", OPPOSITE: "opposite sign"}


def name(tau: float) -> str:
    """What tables call RGD with a clipping factor."""
    return f"{RGD}{tau:g}"


def lineup(
    setting: str,
    best: Callable[..., Chosen],
    taus: Sequence[float],
    select: str,
    controls: Sequence[str] = tuple(CONTROLS),
) -> list[Result]:
    """All arms in a setting, each with what it is compared with.

    Args:
        setting: What the table calls it.
        best: Tunes an arm, as `Session.sweep` does for a problem.
        taus: The clipping factors; the controls are those of the first.
        select: The metric that validation chooses tau by.
        controls: Which of `CONTROLS`.
    """
    starts = [best(Arm(PLAIN).started(k)) for k in range(len(taus))]
    plain, budget = starts[0], tuned(PLAIN_BUDGET, starts, select)
    weighted = [best(Arm(name(tau), rgd.KL(tau))) for tau in taus]
    first = weighted[0]
    arms = {
        MEAN_ONE: mean_one(first.arm),
        CONTROL: times_mean_weight(first.arm, first.mean_weight),
        OPPOSITE: opposite_sign(first.arm),
    }
    return [
        Result(setting, plain),
        Result(setting, budget),
        *(Result(setting, chosen, PLAIN) for chosen in weighted),
        Result(setting, tuned(TUNED, weighted, select), PLAIN_BUDGET),
        *(Result(setting, best(arms[control]).renamed(control), PLAIN) for control in controls),
    ]


def sweeps(taus: Sequence[float], controls: Sequence[str] = tuple(CONTROLS)) -> int:
    """How many sweeps of all seeds `lineup` takes."""
    return 2 * len(taus) + len(controls)


def taus_of(table: Table) -> list[str]:
    """The arms of RGD with a given tau, in their order."""
    return [arm for arm in table.arms(table.settings()[0]) if arm.startswith(RGD)]


def controls_of(table: Table) -> dict[str, str]:
    """The controls that were run, and what to call them in short."""
    arms = table.arms(table.settings()[0])
    return {arm: word for arm, word in CONTROLS.items() if arm in arms}


def labels(table: Table) -> dict[str, str]:
    """The arms that are compared, in the order of a picture, and what to call them there."""
    rgds = [*taus_of(table), TUNED]
    return {arm: arm for arm in rgds} | {arm: f"control: {word}" for arm, word in controls_of(table).items()}


def draw_lineup(
    what: str,
    table: Table,
    metrics: dict[str, str],
    path: pathlib.Path,
    settings: Sequence[str] | None = None,
) -> None:
    """The picture of a program: `pictures.intervals` of `metrics` for all arms that are compared."""
    title = f"{what}: difference to cross-entropy, 95% interval"
    save(intervals(table, labels(table), metrics, title, settings), path, table)


def said(table: Table, setting: str, metrics: dict[str, str]) -> str:
    """What came out in a setting, for a sentence.

    Args:
        table: Of the program.
        setting: Of the table.
        metrics: What is said of RGD with the first and the last tau, and what to call it. The first is said
            of the tuned tau and of the controls.
    """

    def shown(arm: str, metric: str) -> str:
        return table.line(setting, arm, metric).said()

    first, *_, last = taus_of(table) * 2
    parts = [
        f"{arm}: {', '.join(f'{word} {shown(arm, metric)}' for metric, word in metrics.items())}"
        for arm in dict.fromkeys((first, last))
    ]
    metric, word = next(iter(metrics.items()))
    parts.append(f"tuned tau, against as many runs: {word} {shown(TUNED, metric)}")
    controls = ", ".join(f"{short} {shown(arm, metric)}" for arm, short in controls_of(table).items())
    return f"{'; '.join(parts)}; controls of {first}: {controls}"
