"""Pictures of what the weights do; needs matplotlib, `rgd[plot]`.

Each function draws on the axes it is given, or on those of a new figure, and returns them. No global setting
of matplotlib is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import rgd
from rgd.diagnostics import clipping_factor
from rgd.torch._checks import check_losses
from rgd.weightings import KL, Weighting, resolve_weighting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heaviest_samples", "weight_curve", "weight_history"]

_INK, _MUTED, _GRID, _ACCENT, _PALE = "#1f2430", "#5d6675", "#e3e6eb", "#d55e00", "#c9d3e0"


def weight_curve(
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    losses: Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The weight of a sample against its loss, with the clip.

    For pointwise weights this is `w = exp(scale * min(l, tau))`. Normalised weights and those of a `KLBall`
    depend on the batch, and so need `losses`. With losses, they are marked on the curve.

    Args:
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` is given.
        tau: Short for `weighting=KL(tau)`.
        losses: Losses of a batch, of any shape with at least one axis.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `losses` is not a float tensor.
        ValueError: If `losses` is a scalar, or missing for weights that depend on the batch.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = weight_curve(tau=2.0)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('loss of the sample', 'weight')
    """
    weighting = resolve_weighting(tau, weighting)
    batch = None if losses is None else _numbers(losses)
    pointwise = isinstance(weighting, KL) and not weighting.normalize
    if batch is None and not pointwise:
        raise ValueError(f"the weights of {weighting} depend on the batch: give its losses, losses=...")
    axes = _axes(ax)
    clip = clipping_factor(weighting)
    if batch is None:
        low, high = 0.0, 3 * clip if np.isfinite(clip) else 3.0
    else:
        finite = batch[np.isfinite(batch)]
        low, high = (min(0.0, finite.min()), finite.max()) if finite.size else (0.0, 1.0)
        high = max(high, 1.25 * clip if np.isfinite(clip) and high > 0.6 * clip else high)
        high = high if high > low else low + 1.0
    if pointwise:
        grid = np.union1d(np.linspace(low, high, 401), [clip] if low < clip < high else [])
        axes.plot(grid, rgd.sample_weights(grid, weighting), color=_ACCENT, linewidth=2.2, zorder=3)
    if batch is not None:
        weights = rgd.sample_weights(batch, weighting)
        order = np.argsort(batch, kind="stable")
        if not pointwise:
            grid, between = _exponential(batch[order], weights[order])
            axes.plot(grid, between, color=_ACCENT, linewidth=2.2, zorder=3)
        axes.plot(
            batch, weights, linestyle="none", marker="o", markersize=5, alpha=0.55, zorder=4,
            color=_ACCENT, markeredgecolor="white", markeredgewidth=0.5, clip_on=False,
        )  # fmt: skip
    axes.axhline(1.0, color=_MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    axes.set_xlim(low, high)
    _ends(axes, low, high, clip)
    _style(axes, "loss of the sample", "weight", "Weight against loss", str(weighting))
    return axes


def weight_history(
    weights: Sequence[Tensor],
    *,
    steps: Sequence[int] | None = None,
    bins: int = 40,
    ax: Axes | None = None,
) -> Axes:
    """The histogram of the weights over a training: which share of the samples had which weight, and when.

    Args:
        weights: The weights of a batch or an epoch, one tensor for each time they were kept.
        steps: When that was, in increasing order; None for 0, 1, 2, ...
        bins: The number of bins of each histogram.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no weights, or not one step for each.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = weight_history([torch.ones(8), torch.full((8,), 1.5)], steps=[0, 100])
        >>> ax.get_xlabel()
        'step'
    """
    kept = [_numbers(check_losses(w)) for w in weights]
    kept = [w[np.isfinite(w)] for w in kept]
    if not any(w.size for w in kept):
        raise ValueError(
            "weights holds no finite weight to draw: give one tensor for each step that was kept"
        )
    times = np.arange(len(kept)) if steps is None else np.asarray(steps)
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
    losses: Tensor,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    count: int = 10,
    names: Sequence[str] | None = None,
    images: Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The samples of a batch that weigh most, the heaviest on top: look here for rare cases and wrong labels.

    Among samples of one weight, clipped ones for instance, the larger loss comes first.

    Args:
        losses: Losses of the batch, shape (N,).
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` is given.
        tau: Short for `weighting=KL(tau)`.
        count: How many to show.
        names: What to call each sample, N strings; None for its index.
        images: A picture of each sample, shape (N, H, W), or (N, 3, H, W) with values from 0 to 1.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `losses` is not a float tensor.
        ValueError: If `losses` has another number of axes than one or no elements, `names` or `images` do not
            have one entry a sample, or `count` is not positive.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = heaviest_samples(torch.tensor([0.1, 3.0, 0.5]), names=["a", "b", "c"], count=2)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['b', 'c']
    """
    weighting = resolve_weighting(tau, weighting)
    check_losses(losses)
    if losses.dim() != 1 or not losses.numel():
        raise ValueError(f"losses must have shape (N,), one loss a sample, got {tuple(losses.shape)}")
    if count < 1:
        raise ValueError(f"count must be a positive integer, got {count}")
    if names is not None and len(names) != len(losses):
        raise ValueError(f"names must hold one string for each of {len(losses)} samples, got {len(names)}")
    if images is not None and (len(images) != len(losses) or images.dim() not in (3, 4)):
        raise ValueError(
            f"images must have shape (N, H, W) or (N, 3, H, W) with N = {len(losses)}, got "
            f"{tuple(images.shape)}"
        )
    values = _numbers(losses)
    weights = rgd.sample_weights(values, weighting)
    chosen = np.lexsort((-values, -weights))[:count]
    rows = np.arange(len(chosen))
    axes = _axes(ax, height=max(2.4, 0.9 + 0.36 * len(chosen)))
    clipped = values[chosen] > clipping_factor(weighting)
    axes.barh(rows, weights[chosen], height=0.68, color=[_ACCENT if c else _PALE for c in clipped], zorder=2)
    largest = float(np.nanmax(weights[chosen]))
    for row, sample, is_clipped in zip(rows, chosen, clipped, strict=True):
        note = f"loss {values[sample]:.3g}" + (", clipped" if is_clipped else "")
        axes.annotate(
            note, (weights[sample], row), (5, 0), textcoords="offset points", va="center", fontsize=9,
            color=_MUTED,
        )  # fmt: skip
    axes.axvline(1.0, color=_MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=3)
    axes.set_xlim(0, 1.4 * largest)
    axes.set_ylim(len(chosen) - 0.5, -0.5)
    axes.set_yticks(rows, [f"sample {i}" if names is None else names[i] for i in chosen])
    if images is not None:
        _thumbnails(axes, images.detach().cpu()[torch.tensor(chosen)], rows)
    _style(axes, "weight", "", f"The {len(chosen)} heaviest of {len(values)} samples", str(weighting))
    axes.grid(visible=False, axis="y")
    return axes


# --- what the pictures share ---


def _exponential(
    losses: npt.NDArray[Any], weights: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The curve through increasing losses and their weights, which grow exponentially between them."""
    shown = np.isfinite(losses) & (weights > 0)
    if not shown.any():
        return losses, weights
    knots = losses[shown]
    even = cast("Any", np.linspace(knots[0], knots[-1], 401))
    grid = np.sort(np.concatenate([even, knots]))
    return grid, np.exp(np.interp(grid, knots, np.log(weights[shown])))


def _axes(ax: Any, height: float = 3.8) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("rgd.torch.plot draws with matplotlib: pip install matplotlib") from error
    plt: Any = pyplot
    return plt.figure(figsize=(6.4, height), layout="constrained").add_subplot()


def _map() -> Any:
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415

    return LinearSegmentedColormap.from_list("weights", ["#ffffff", "#fbd9bd", _ACCENT, "#7a2e00"])


def _root() -> Any:
    """Square roots of shares: what few samples do is seen too."""
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


def _ends(axes: Any, low: float, high: float, clip: float) -> None:
    """Mark the clip, where it is in sight."""
    if not low < clip < high:
        return
    axes.axvspan(clip, high, color=_PALE, alpha=0.25, linewidth=0, zorder=0)
    axes.axvline(clip, color=_INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=2)
    axes.annotate(
        f"clipped above tau = {clip:g}", (clip, 0.12), (6, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", fontsize=9, color=_INK,
    )  # fmt: skip


def _thumbnails(axes: Any, images: Tensor, rows: npt.NDArray[np.intp]) -> None:
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage  # noqa: PLC0415

    pictures: Any = images.float().movedim(1, -1).numpy() if images.dim() == 4 else images.float().numpy()
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


def _numbers(values: Tensor) -> npt.NDArray[np.float64]:
    flat: Any = check_losses(values).detach().double().cpu().flatten().numpy()
    return flat
