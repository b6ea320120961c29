"""The look of the pictures, and a heat map."""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.problems import higher_is_better
from harness.results import Line, Table

INK, MUTED, GRID = "#1f2430", "#5d6675", "#e3e6eb"
BLUE, ORANGE, GREY, GREEN, PURPLE = "#0072b2", "#d55e00", "#7a8699", "#009e73", "#cc79a7"


def pyplot() -> Any:
    """`matplotlib.pyplot` without a screen, in the style of the project's pictures."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    plt.rcParams.update({
        "font.size": 10.5, "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "text.color": INK,
        "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False,
        "axes.axisbelow": True, "savefig.dpi": 130, "figure.constrained_layout.use": True,
    })  # fmt: skip
    return plt


def name_points(panel: Any, named: Mapping[str, Sequence[float]], points: Sequence[Sequence[float]]) -> None:
    """Writes names beside points, each where it covers no point and no other name, if there is such a place.

    Args:
        panel: The axes of a finished figure, whose limits and places stay as they are from now on.
        named: The points with a name, in the data's coordinates.
        points: All points.
    """
    from matplotlib.text import Text  # noqa: PLC0415

    panel.set_xlim(*panel.get_xlim())
    panel.set_ylim(*panel.get_ylim())
    panel.figure.draw_without_rendering()
    panel.figure.set_layout_engine("none")  # it would move the axes under the names
    places = sorted(
        itertools.product((8, -8, 26, -26), (-3, 9, -15, 21, -27, 33, -39, 45, -51)),
        key=lambda place: math.hypot(*place),
    )
    taken = [panel.transData.transform(point) for point in points]
    names: list[Any] = []
    for name, point in named.items():
        best, fewest = None, math.inf
        for dx, dy in places:
            arrow = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6} if math.hypot(dx, dy) > 14 else None
            text = panel.annotate(
                name, point, xytext=(dx, dy), textcoords="offset points", fontsize=8, color=INK,
                ha="left" if dx > 0 else "right",
                arrowprops=arrow,
            )  # fmt: skip
            text.get_window_extent()  # moves the words to their place
            box = Text.get_window_extent(text).padded(7)  # of the words alone; a marker has a radius of 6
            covered = sum(box.contains(*other) for other in taken) + sum(box.overlaps(o) for o in names)
            outside = not panel.bbox.contains(box.x0, box.y0) or not panel.bbox.contains(box.x1, box.y1)
            covered += len(points) * outside
            if covered < fewest:
                if best is not None:
                    best.remove()
                best, fewest = text, covered
            else:
                text.remove()
            if fewest == 0:
                break
        assert best is not None
        names.append(Text.get_window_extent(best).padded(1))


def save(figure: Any, path: pathlib.Path, table: Table) -> None:
    """Writes a picture that names the statistics it was drawn from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Comment": f"table {table.fingerprint()}"})
    pyplot().close(figure)


def heat_map(
    axes: Any,
    values: npt.NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limit: float,
    outside: npt.NDArray[np.bool_],
    good_is_high: bool = True,
    digits: int = 1,
) -> None:
    """Differences (rows, columns) from blue, better, over white, none, to orange, worse.

    Bold where the 95% interval excludes 0.
    """
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415

    ends = (ORANGE, "#ffffff", BLUE)
    colors = LinearSegmentedColormap.from_list("dial", ends if good_is_high else ends[::-1])
    axes.imshow(values, cmap=colors, vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        strong = abs(value) > 0.8 * limit
        axes.text(
            j, i, f"{value:+.{digits}f}", ha="center", va="center", fontsize=9.5,
            color="white" if strong else INK, fontweight="bold" if outside[i, j] else "normal",
        )  # fmt: skip
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def differences(panel: Any, lines: Sequence[Line], **style: Any) -> None:
    """Differences to the baseline with 95% intervals, one below the other; accuracies in points.

    Blue is better, orange worse; a hollow marker where the 95% interval holds 0.
    """
    panel.axvline(0, color=MUTED, linewidth=0.8)
    for k, line in enumerate(lines):
        color = BLUE if line.better else ORANGE
        x, half = line.unit * np.array([line.difference, line.difference_half])
        face = color if line.outside else "white"
        panel.errorbar([x], [-k], xerr=[half], fmt="o", color=color, markerfacecolor=face, **style)


def intervals(
    table: Table,
    arms: dict[str, str],
    metrics: dict[str, str],
    title: str,
    settings: Sequence[str] | None = None,
) -> Any:
    """A figure of `differences`: a line of panels a setting, a panel a metric.

    Args:
        table: What to draw.
        arms: The arms, from top to bottom, and what to call them.
        metrics: From left to right, and what to call them; the unit is added.
        title: Of the figure.
        settings: From top to bottom; None for all.
    """
    plt, settings = pyplot(), table.settings() if settings is None else settings
    size = (1.9 + 2.5 * len(metrics), 0.6 + len(settings) * (0.9 + 0.27 * len(arms)))
    figure, axes = plt.subplots(len(settings), len(metrics), figsize=size, sharey=True, squeeze=False)
    for setting, panels in zip(settings, axes, strict=True):
        for panel, (metric, word) in zip(panels, metrics.items(), strict=True):
            differences(panel, [table.line(setting, arm, metric) for arm in arms], markersize=5)
            unit = "points" if higher_is_better(metric) else "nats"
            panel.set_yticks(range(0, -len(arms), -1), list(arms.values()))
            panel.set_ylim(0.6 - len(arms), 0.6)
            panel.locator_params(axis="x", nbins=4)
            panel.set_xlabel(f"{word}, {unit}", fontsize=9.5)
            panel.tick_params(length=0)
        panels[0].set_title(setting, loc="left", fontsize=10.5, fontweight="bold")
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    return figure
