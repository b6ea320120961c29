"""Pictures of weights and losses; needs matplotlib, `rgd[plot]`.

Each function takes arrays of NumPy, torch (on any device) or JAX, or lists of numbers. It draws on the given
axes, or on those of a new figure, and returns them. It changes no global setting of matplotlib.

Example:
    >>> import matplotlib; matplotlib.use("agg")
    >>> import rgd, rgd.plot
    >>> ax = rgd.plot.weight_curve(rgd.CVaR(0.5), losses=[0.1, 0.4, 2.0])
    >>> ax.get_title(loc="left")
    'Weight against loss'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

import rgd
from rgd._suspects import Suspects
from rgd._to_numpy import as_floats, as_labels, as_numpy
from rgd.weightings import Weighting
from rgd.weightings._call import refuse_without_logits, resolve_weighting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heaviest_samples", "largest_losses", "suspects", "weight_curve", "weight_history"]

_INK, _MUTED, _GRID, _ACCENT, _PALE = "#1f2430", "#5d6675", "#e3e6eb", "#d55e00", "#c9d3e0"

_POINTS = 401
"""Losses at which a curve is computed."""

_PROBE_MASS = 2.0**-50
"""The base measure of a probe; a sample has 1. All probes together do not change a weight visibly."""


def weight_curve(
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    losses: Any = None,
    groups: Any = None,
    state: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """The weight of a sample against its loss, with the clip.

    Pointwise weights are a function of the loss alone, for `KL` `w = exp(scale * min(l, tau))`. Others depend
    on the batch, and so need `losses`. The curve then shows the weight that one more sample would have at
    each loss, with so small a measure that it does not change the other weights. Given losses are marked on
    the curve. If weights depend on groups too, the samples are marked without a curve.

    Args:
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` nor `scale` is given.
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        losses: Losses of a batch, of any shape with at least one axis.
        groups: The group of each sample, as for `rgd.sample_weights`.
        state: The state of a weighting that remembers; None for `weighting.init()`.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `losses` holds no floating numbers.
        ValueError: If `losses` is a scalar, or missing for weights that depend on the batch.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = weight_curve(tau=2.0)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('loss of the sample', 'weight')
    """
    weighting = resolve_weighting(weighting, tau, scale)
    refuse_without_logits(weighting, "draw the curve of its inner weighting")
    given = None if losses is None else as_floats("losses", losses)
    batch = None if given is None else given.ravel()
    if batch is None and not weighting.pointwise:
        raise ValueError(f"the weights of {weighting} depend on the batch: give its losses, losses=...")
    axes = _axes(ax)
    clip = float(weighting.clip)
    if batch is None:
        low, high = 0.0, 3 * clip if np.isfinite(clip) else 3.0
    else:
        finite = batch[np.isfinite(batch)]
        low, high = (min(0.0, finite.min()), finite.max()) if finite.size else (0.0, 1.0)
        high = max(high, 1.25 * clip if np.isfinite(clip) and high > 0.6 * clip else high)
        high = high if high > low else low + 1.0
    if weighting.pointwise:
        grid = np.union1d(np.linspace(low, high, _POINTS), [clip] if low < clip < high else [])
        _line(axes, grid, _weights(grid, weighting, None, state))
    if given is not None and batch is not None:
        weights = _weights(given, weighting, groups, state).ravel()
        if not weighting.pointwise and groups is None:
            _line(axes, *_between(batch, weights, weighting, state))
        axes.plot(
            batch, weights, linestyle="none", marker="o", markersize=5, alpha=0.55, zorder=4,
            color=_ACCENT, markeredgecolor="white", markeredgewidth=0.5, clip_on=False,
        )  # fmt: skip
    axes.axhline(1.0, color=_MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    axes.set_xlim(low, high)
    _mark_clip(axes, low, high, clip)
    _style(axes, "loss of the sample", "weight", "Weight against loss", str(weighting))
    return axes


def weight_history(
    weights: Sequence[Any],
    *,
    steps: Sequence[int] | None = None,
    bins: int = 40,
    ax: Axes | None = None,
) -> Axes:
    """The histogram of the weights over a training: the share of the samples with each weight at each step.

    Args:
        weights: The weights of a batch or an epoch, one array for each time.
        steps: The step of each array, in increasing order; None for 0, 1, 2, ...
        bins: The number of bins of each histogram.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an entry of `weights` holds no floating numbers.
        ValueError: If there are no weights, an entry is a scalar, or there is not one step for each.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = weight_history([np.ones(8), np.full(8, 1.5)], steps=[0, 100])
        >>> ax.get_xlabel()
        'step'
    """
    kept = [as_floats(f"weights[{i}]", w).ravel() for i, w in enumerate(weights)]
    kept = [w[np.isfinite(w)] for w in kept]
    if not any(w.size for w in kept):
        raise ValueError("weights holds no finite weight to draw: give one array for each step that was kept")
    times = np.arange(len(kept)) if steps is None else as_numpy(steps, "steps")
    if len(times) != len(kept) or np.any(np.diff(times) <= 0):
        raise ValueError(
            f"steps must hold {len(kept)} increasing numbers, one for each of weights, got {steps}"
        )
    every = np.concatenate(kept)
    low, high = float(every.min()), float(every.max())
    margin = 0.5 * max(high - low, 0.1) / bins
    edges = np.linspace(low - margin, high + margin, bins + 1)
    shares = np.stack([np.histogram(w, edges)[0] / max(w.size, 1) for w in kept], axis=1)
    axes = _axes(ax)
    mesh = axes.pcolormesh(
        _borders(times), edges, shares, cmap=_map(), norm=_root(), rasterized=True, shading="flat"
    )
    means = [float(w.mean()) if w.size else np.nan for w in kept]
    axes.plot(times, means, color=_INK, linewidth=1.6, label="mean weight")
    axes.legend(loc="upper right", frameon=True, facecolor="white", edgecolor="none", framealpha=0.85)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1%", "5%", "10%", "25%", "50%", "100%"])
    bar.set_label("share of the samples", color=_MUTED)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_MUTED, length=0)
    _style(axes, "step", "weight", "Weights over the training")
    axes.grid(visible=False)
    return axes


def heaviest_samples(
    losses: Any,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    groups: Any = None,
    state: Any = None,
    count: int = 10,
    names: Sequence[str] | None = None,
    images: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """The samples of a batch with the largest weights, the largest on top.

    Among samples of equal weight, such as clipped ones, the larger loss comes first. With a negative scale
    the samples of the smallest losses have the largest weights: to find wrong labels, use `largest_losses`.

    Args:
        losses: Losses of the batch, shape (N,).
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` nor `scale` is given.
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        groups: The group of each sample, as for `rgd.sample_weights`.
        state: The state of a weighting that remembers; None for `weighting.init()`.
        count: How many to show.
        names: The name of each sample, N strings; None for its index.
        images: A picture of each sample, shape (N, H, W), or (N, 3, H, W) with values from 0 to 1.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `losses` holds no floating numbers.
        ValueError: If `losses` has another number of axes than one or no elements, `names` or `images` do not
            have one entry a sample, or `count` is not positive.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = heaviest_samples([0.1, 3.0, 0.5], names=["a", "b", "c"], count=2)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['b', 'c']
    """
    ranked = _Ranked(
        losses, resolve_weighting(weighting, tau, scale), groups=groups, state=state, count=count,
        names=names, images=images,
    )  # fmt: skip
    weights, values = ranked.weights, ranked.losses
    chosen = np.lexsort((-values, -weights))[:count]
    clipped = values > ranked.weighting.clip
    notes = [f"loss {values[i]:.3g}" + (", clipped" if clipped[i] else "") for i in chosen]
    axes = ranked.draw(chosen, weights, notes, clipped, ax)
    axes.axvline(1.0, color=_MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=3)
    title = f"The {len(chosen)} heaviest of {len(values)} samples"
    _style(axes, "weight", "", title, str(ranked.weighting))
    axes.grid(visible=False, axis="y")
    return axes


def largest_losses(
    losses: Any,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    groups: Any = None,
    state: Any = None,
    count: int = 10,
    names: Sequence[str] | None = None,
    images: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """The samples of a batch with the largest losses, the largest on top, to find wrong labels.

    The order does not depend on the weighting. The weight of each sample is beside its bar.

    Args:
        losses: As for `heaviest_samples`.
        weighting: As for `heaviest_samples`.
        tau: As for `heaviest_samples`.
        scale: As for `heaviest_samples`.
        groups: As for `heaviest_samples`.
        state: As for `heaviest_samples`.
        count: As for `heaviest_samples`.
        names: As for `heaviest_samples`.
        images: As for `heaviest_samples`.
        ax: As for `heaviest_samples`.

    Returns:
        The axes.

    Raises:
        ImportError, TypeError, ValueError: As `heaviest_samples`.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> import rgd
        >>> ax = largest_losses([0.1, 3.0, 0.5], rgd.KL(scale=-0.7), names=["a", "b", "c"], count=2)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['b', 'c']
    """
    ranked = _Ranked(
        losses, resolve_weighting(weighting, tau, scale), groups=groups, state=state, count=count,
        names=names, images=images,
    )  # fmt: skip
    values = ranked.losses
    chosen = np.argsort(-values, kind="stable")[:count]
    notes = [f"weight {ranked.weights[i]:.3g}" for i in chosen]
    axes = ranked.draw(chosen, values, notes, values > ranked.weighting.clip, ax)
    title = f"The {len(chosen)} largest losses of {len(values)} samples"
    _style(axes, "loss", "", title, str(ranked.weighting))
    axes.grid(visible=False, axis="y")
    return axes


def suspects(
    found: Suspects,
    *,
    target: Any = None,
    classes: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    images: Any = None,
    count: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """The samples that look mislabelled, with the given label and the model's.

    Args:
        found: The result of `rgd.suspects`.
        target: The given labels of all samples, integers, shape (N,); None to leave them out.
        classes: The name of each class, strings; None for its number.
        names: As for `heaviest_samples`, of all samples.
        images: As for `heaviest_samples`, of all samples.
        count: As for `heaviest_samples`.
        ax: As for `heaviest_samples`.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `target` holds no integers.
        ValueError: If nothing was found, `names`, `images` or `target` are of too few samples, or `count` is
            not positive.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> import rgd
        >>> found = rgd.suspects([0.1, 3.0, 0.5], k=2, logits=[[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]])
        >>> ax = suspects(found, target=[1, 1, 1], classes=["cat", "dog"])
        >>> [text.get_text() for text in ax.texts]
        ['given dog, model cat', 'given dog, model cat']
    """
    if count < 1:
        raise ValueError(f"count must be a positive integer, got {count}")
    if not len(found.indices):
        raise ValueError("no suspects were found: there is nothing to draw")
    chosen = found.indices[:count]
    least = int(found.indices.max()) + 1
    labels = None if target is None else as_labels("target", target)
    pictures = None if images is None else as_numpy(images, "images")
    for name, given in (("target", labels), ("names", names), ("images", pictures)):
        if given is not None and len(given) < least:
            raise ValueError(f"{name} must have an entry for each sample, at least {least}, got {len(given)}")

    def called(label: Any) -> str:
        return str(label if classes is None else classes[label])

    notes = ["" if labels is None else f"given {called(labels[i])}" for i in chosen]
    if found.proposed is not None:
        says = [f"model {called(label)}" for label in found.proposed[:count]]
        notes = [", ".join(filter(None, pair)) for pair in zip(notes, says, strict=True)]
    rows = [f"sample {i}" if names is None else str(names[i]) for i in chosen]
    axes = _bars(
        found.losses[:count], notes, rows, marked=np.zeros(len(chosen), bool),
        pictures=None if pictures is None else pictures[chosen], ax=ax,
    )  # fmt: skip
    _style(axes, "loss", "", f"The first {len(chosen)} of {len(found.indices)} suspects", "")
    axes.grid(visible=False, axis="y")
    return axes


# --- what the pictures share ---


class _Ranked:
    """Samples to be drawn one below the other: the checked arguments, and the weights."""

    def __init__(
        self,
        losses: Any,
        weighting: Weighting,
        *,
        groups: Any,
        state: Any,
        count: int,
        names: Sequence[str] | None,
        images: Any,
    ) -> None:
        values = as_floats("losses", losses)
        if values.ndim != 1 or not values.size:
            raise ValueError(f"losses must have shape (N,), one loss a sample, got {values.shape}")
        if count < 1:
            raise ValueError(f"count must be a positive integer, got {count}")
        if names is not None and len(names) != len(values):
            raise ValueError(
                f"names must hold one string for each of {len(values)} samples, got {len(names)}"
            )
        pictures = None if images is None else as_numpy(images, "images")
        if pictures is not None and (len(pictures) != len(values) or pictures.ndim not in (3, 4)):
            raise ValueError(
                f"images must have shape (N, H, W) or (N, 3, H, W) with N = {len(values)}, got "
                f"{pictures.shape}"
            )
        self.losses = values
        self.weighting = weighting
        self.weights = _weights(values, weighting, groups, state)
        self.names = names
        self.pictures = pictures

    def draw(
        self,
        chosen: npt.NDArray[np.intp],
        lengths: npt.NDArray[np.float64],
        notes: list[str],
        marked: npt.NDArray[np.bool_],
        ax: Axes | None,
    ) -> Any:
        """A bar for each of the chosen samples, with a note, its name and its picture."""
        rows = [f"sample {i}" if self.names is None else str(self.names[i]) for i in chosen]
        pictures = None if self.pictures is None else self.pictures[chosen]
        return _bars(lengths[chosen], notes, rows, marked=marked[chosen], pictures=pictures, ax=ax)


def _bars(
    lengths: npt.NDArray[np.float64],
    notes: list[str],
    names: list[str],
    *,
    marked: npt.NDArray[np.bool_],
    pictures: npt.NDArray[Any] | None,
    ax: Axes | None,
) -> Any:
    """Bars one below the other, each with a note at its end, a name and a picture; infinite ones are cut."""
    rows = np.arange(len(lengths))
    axes = _axes(ax, height=max(2.4, 0.9 + 0.36 * len(lengths)))
    finite = lengths[np.isfinite(lengths)]
    largest = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    infinite = np.isposinf(lengths)
    lengths = np.where(infinite, 1.1 * largest, lengths)
    of_infinite = [", ".join(filter(None, ("∞", note))) for note in notes]
    notes = [of_infinite[i] if infinite[i] else note for i, note in enumerate(notes)]
    axes.barh(rows, lengths, height=0.68, color=[_ACCENT if m else _PALE for m in marked], zorder=2)
    for row, length, note in zip(rows, lengths, notes, strict=True):
        axes.annotate(
            note, (length, row), (5, 0), textcoords="offset points", va="center", fontsize=9, color=_MUTED
        )
    axes.set_xlim(0, 1.4 * largest)
    axes.set_ylim(len(lengths) - 0.5, -0.5)
    axes.set_yticks(rows, names)
    if pictures is not None:
        _thumbnails(axes, pictures, rows)
    return axes


def _weights(
    losses: npt.NDArray[np.float64],
    weighting: Weighting,
    groups: Any,
    state: Any,
    mass: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.float64]:
    """The weights, whether the weighting remembers or not."""
    if not weighting.stateful:
        if state is not None:
            raise ValueError(f"{weighting} keeps no state: leave state out")
        known: dict[str, Any] = {}
    else:
        known = {"state": weighting.init() if state is None else state}
    members = None if groups is None else as_numpy(groups, "groups")
    weigh: Any = rgd.sample_weights
    result = weigh(losses, weighting, sample_weight=mass, groups=members, **known)
    return result[0] if known else result


def _between(
    losses: npt.NDArray[np.float64], weights: npt.NDArray[Any], weighting: Weighting, state: Any
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The curve of weights that depend on the batch: samples of almost no mass between those of the batch.

    A weighting that ignores the base measure would change its weights if they were in the batch. Its curve
    is straight lines from sample to sample.
    """
    order = np.argsort(losses, kind="stable")
    shown = order[np.isfinite(losses[order]) & np.isfinite(weights[order])]
    knots = losses[shown]
    if not np.isfinite(losses).all() or not shown.size:
        return knots, weights[shown]
    probes = cast("Any", np.linspace(knots[0], knots[-1], _POINTS))
    grid = np.concatenate([losses, probes])
    mass = np.concatenate([np.ones(losses.size), np.full(_POINTS, _PROBE_MASS)])
    curve = _weights(grid, weighting, None, state, mass)
    if not np.allclose(curve[: losses.size], weights, rtol=1e-6, atol=1e-6 * float(weights[shown].max())):
        return knots, weights[shown]
    order = np.argsort(grid, kind="stable")
    return grid[order], curve[order]


def _line(axes: Any, losses: npt.NDArray[Any], weights: npt.NDArray[Any]) -> None:
    axes.plot(losses, weights, color=_ACCENT, linewidth=2.2, zorder=3)


def _axes(ax: Any, height: float = 3.8) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("rgd.plot draws with matplotlib: pip install matplotlib") from error
    plt: Any = pyplot
    return plt.figure(figsize=(6.4, height), layout="constrained").add_subplot()


def _map() -> Any:
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415

    return LinearSegmentedColormap.from_list("weights", ["#ffffff", "#fbd9bd", _ACCENT, "#7a2e00"])


def _root() -> Any:
    """Square roots of shares, so that small shares are visible too."""
    from matplotlib.colors import PowerNorm  # noqa: PLC0415

    return PowerNorm(0.5, vmin=0.0, vmax=1.0)


def _style(axes: Any, x: str, y: str, title: str, subtitle: str | None = None) -> None:
    axes.set_xlabel(x, color=_MUTED)
    axes.set_ylabel(y, color=_MUTED)
    axes.set_title(title, loc="left", color=_INK, fontsize=11.5, fontweight="bold", pad=22 if subtitle else 8)
    if subtitle:
        axes.annotate(
            subtitle, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", fontsize=9,
            color=_MUTED,
        )  # fmt: skip
    axes.tick_params(colors=_MUTED, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_GRID)
    axes.set_axisbelow(True)
    axes.grid(color=_GRID, linewidth=0.8)


def _mark_clip(axes: Any, low: float, high: float, clip: float) -> None:
    """Mark the clip, if it lies within the axes."""
    if not low < clip < high:
        return
    axes.axvspan(clip, high, color=_PALE, alpha=0.25, linewidth=0, zorder=0)
    axes.axvline(clip, color=_INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=2)
    axes.annotate(
        f"clipped above {clip:g}", (clip, 0.12), (6, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", fontsize=9, color=_INK,
    )  # fmt: skip


def _thumbnails(axes: Any, images: npt.NDArray[Any], rows: npt.NDArray[np.intp]) -> None:
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage  # noqa: PLC0415

    pictures = np.moveaxis(images, 1, -1) if images.ndim == 4 else images
    height = axes.get_window_extent().height * 72 / axes.figure.dpi / len(rows)
    for picture, row in zip(pictures, rows, strict=True):
        box = OffsetImage(
            picture, zoom=0.8 * height / picture.shape[0], cmap="gray_r", interpolation="nearest"
        )
        axes.add_artist(
            AnnotationBbox(
                box, (0, row), (-0.6 * height, 0), xycoords="data", boxcoords="offset points", frameon=False,
                box_alignment=(0.5, 0.5), annotation_clip=False,
            )
        )  # fmt: skip
    axes.tick_params(axis="y", pad=1.25 * height)


def _borders(times: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The borders of columns around increasing times."""
    if len(times) == 1:
        return np.array([times[0] - 0.5, times[0] + 0.5], dtype=np.float64)
    middle = (times[1:] + times[:-1]) / 2
    return np.concatenate([[times[0] - (middle[0] - times[0])], middle, [2 * times[-1] - middle[-1]]])
