"""`RGDLoss`, the loss module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rgd.diagnostics import WeightStats
from rgd.torch import _ops
from rgd.torch._backend import is_exporting
from rgd.torch._checks import (
    REDUCTIONS,
    UNITS,
    check_choice,
    check_class_weight,
    check_label_smoothing,
    check_losses,
    check_where,
)
from rgd.torch._group import Sync
from rgd.torch._record import Record
from rgd.torch.functional import classify, weighted
from rgd.weightings import Weighting, resolve_weighting


class RGDLoss(nn.Module):
    """Cross-entropy, or any per-sample loss, re-weighted towards hard samples.

    A drop-in for `nn.CrossEntropyLoss`.

    Each sample's loss `l_i` is multiplied by `w_i = exp(min(l_i, tau) / (tau + 1))`, a constant to
    autograd, and the products are reduced as `nn.CrossEntropyLoss` reduces losses.

    Args:
        weight: Class weights, shape (C,); kept in the state dict, as in `nn.CrossEntropyLoss`.
        ignore_index: Class index of targets that count for nothing.
        reduction: "none", "mean" or "sum".
        label_smoothing: In [0, 1].
        tau: Short for `weighting=KL(tau)`.
        weighting: What turns losses into weights, `rgd.KL` or `rgd.KLBall`; `KL(tau=1.0)` if neither it nor
            `tau` is given.
        base: The per-sample loss to re-weight instead of cross-entropy: a callable whose result has at
            least one axis, such as `nn.BCEWithLogitsLoss(reduction="none")`. It takes its own settings, so
            `weight`, `ignore_index` and `label_smoothing` must be left alone.
        per: "element" weights each target by its own loss; "sample" weights all targets of a sample of the
            leading axis (a sequence, an image) by their mean loss.
        process_group: With normalised weights or a `KLBall`, the processes that share a batch: the weights
            are those of their losses together. None: the default group, once `torch.distributed` is
            initialised. Every process of the group then has to call the loss, one with an empty batch too;
            where only some do, as in an evaluation by one process, use a loss with `sync=False`. Pointwise
            weights ask no one.
        sync: False for weights of this process's losses alone.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a setting is out of range, or settings exclude each other.

    Shape:
        As `nn.CrossEntropyLoss`: input (C,), (N, C) or (N, C, d1, ..., dk) with class indices (any integer
        dtype) of the same shape without C, or class probabilities of the same shape. With `base`: whatever
        it takes.

    Example:
        >>> import torch
        >>> criterion = RGDLoss(tau=1.0)
        >>> logits = torch.zeros(8, 3, requires_grad=True)
        >>> criterion(logits, torch.arange(8) % 3).backward()
        >>> criterion.stats().effective_sample_size
        8.0

    References:
        Kumar et al., "Stochastic Re-weighted Gradient Descent via Distributionally Robust Optimization",
        TMLR 2024, arXiv 2306.09222, Algorithm 1.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        tau: float | None = None,
        weighting: Weighting | None = None,
        base: Callable[..., Tensor] | None = None,
        per: str = "element",
        process_group: Any = None,
        sync: bool = True,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("per", per, UNITS)
        check_class_weight(weight)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
        smoothing = check_label_smoothing(label_smoothing)
        if base is not None:
            if not callable(base):
                raise TypeError(f"base must be a callable that returns per-sample losses, got {base!r}")
            if weight is not None or ignore_index != -100 or smoothing != 0.0:
                raise ValueError(
                    "weight, ignore_index and label_smoothing are settings of the built-in cross-entropy: "
                    "with base, give them to base itself"
                )
            own_reduction = getattr(base, "reduction", "none")
            if own_reduction != "none":
                raise ValueError(
                    f"base reduces its losses to one number (reduction={own_reduction!r}), and weighting "
                    'that re-weights nothing: build it with reduction="none"; RGDLoss(reduction=...) reduces'
                )
        self.register_buffer("weight", weight)
        self.base = base
        self._settings = _ops.CrossEntropySettings(
            resolve_weighting(tau, weighting), ignore_index, smoothing, reduction, per
        )
        self._sync = Sync(process_group, sync)
        self._record: Record | None = None

    @property
    def weighting(self) -> Weighting:
        """What turns losses into weights."""
        return self._settings.weighting

    @property
    def ignore_index(self) -> int:
        """Class index of targets that count for nothing."""
        return self._settings.ignore_index

    @property
    def reduction(self) -> str:
        """How losses become an objective."""
        return self._settings.reduction

    @property
    def label_smoothing(self) -> float:
        """The share of a target's mass that is spread over all classes."""
        return self._settings.label_smoothing

    @property
    def per(self) -> str:
        """What a weight belongs to."""
        return self._settings.per

    @property
    def backend(self) -> str | None:
        """What computed the last call, "rust" or "composite"; None where `stats` has no call to describe."""
        return None if self._record is None else self._record.path

    def forward(self, input: Tensor, *args: Any, where: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The re-weighted objective.

        Args:
            input: Logits or, with `base`, its first argument.
            *args: The target or, with `base`, its other arguments.
            where: With `base`, a mask, bool, of the shape of its losses: which of them count, as in
                `reweighted_mean`. For the built-in cross-entropy, mark targets by `ignore_index` instead.
            **kwargs: `target=`, or keyword arguments of `base`.

        Returns:
            A scalar or, with `reduction="none"`, one value a target.

        Raises:
            IndexError: If a class index is out of range.
            TypeError: If a tensor's dtype does not fit.
            ValueError: If a shape does not fit, `base` returns a scalar, or `where` is given without `base`.
        """
        if self.base is None:
            if where is not None:
                raise ValueError(
                    "where goes with base: the built-in cross-entropy leaves out the targets that equal "
                    f"ignore_index, as in target.masked_fill(~where, {self.ignore_index})"
                )
            return self._classify(input, *args, **kwargs)
        losses = check_losses(self.base(input, *args, **kwargs))
        check_where(where, losses)
        return self._keep(*weighted(losses, self.weighting, self.reduction, self.per, where, self._sync))

    def _classify(self, input: Tensor, target: Tensor) -> Tensor:
        return self._keep(*classify(input, target, self.weight, self._settings, self._sync))

    def _keep(self, objective: Tensor, record: Record | None) -> Tensor:
        # An exported program has no side effects.
        if record is not None or not is_exporting():
            object.__setattr__(self, "_record", record)  # nn.Module's own costs ten times as much
        return objective

    def stats(self, *, sync: bool = False) -> WeightStats:
        """What the weights of the last call were like; computed now, from what that call left behind.

        Args:
            sync: Whether to describe the batches of all processes of the group together. Every process then
                has to ask.

        Returns:
            The plain (ERM) mean loss, the re-weighted objective's mean, the effective sample size, the KL
            divergence of the weights from uniform, the largest weight and the share of clipped losses, over
            targets (with `per="sample"`, over samples) not ignored.

        Raises:
            RuntimeError: If the loss has not been called yet, or its last call was under a `torch.func`
                transform.
        """
        if self._record is None:
            raise RuntimeError(
                "stats() describes the last call of the loss, and there has been none yet; calls under "
                "torch.func transforms and torch.export leave nothing behind to describe"
            )
        return self._record.stats(self.weighting, self._sync.group() if sync else None)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        settings = [f"weighting={self.weighting}"]
        if self.base is None:
            settings.append(f"ignore_index={self.ignore_index}")
            settings.append(f"label_smoothing={self.label_smoothing}")
        settings += [f"reduction={self.reduction!r}", f"per={self.per!r}"]
        return ", ".join(settings)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what the last call left behind."""
        return {**self.__dict__, "_record": None}
