"""The loss of the Hugging Face `Trainer`, re-weighted: a function for its `compute_loss_func`.

The `Trainer` adds up gradients of several micro-batches, and of several devices, and tells the loss how many
labels they hold together. So the loss of a micro-batch is `sum_i w_i l_i / num_items_in_batch`, over its
labels not ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rgd.stats import WeightStats
from rgd.torch.loss import RGDLoss
from rgd.weightings import Weighting

# Outputs with logits and a label for each position, which the position itself predicts.
_ALIGNED = ("Seq2SeqLMOutput", "MaskedLMOutput", "TokenClassifierOutput")


def rgd_loss_func(
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    per: str = "element",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    shift_labels: bool | None = None,
    base: Callable[..., Tensor] | None = None,
) -> RGDLossFunc:
    """A loss for `Trainer(compute_loss_func=...)`: cross-entropy re-weighted towards hard tokens or rows.

    With `l_i` the loss of label `i` and `w_i` its weight, a constant to autograd, a micro-batch contributes
    `sum_i w_i l_i / num_items_in_batch`. The default weights depend on their own losses alone, so gradient
    accumulation and data parallelism change nothing. Weights that depend on the batch are taken over the
    micro-batch, of all processes together.

    The `Trainer` calls the function for its evaluation loss too, which is then the re-weighted one; `stats()`
    holds the plain mean of the last call.

    Args:
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` is given.
        tau: Short for `weighting=KL(tau)`.
        per: "element" weights each label (a token) by its own loss; "sample" weights all labels of a row (a
            sequence) by their mean loss. The two are the same where a row has one label.
        weight: Class weights, shape (C,).
        ignore_index: The label that pads: it counts for nothing. The `Trainer` counts with -100.
        label_smoothing: In [0, 1]; `TrainingArguments.label_smoothing_factor` is not heard by a
            `compute_loss_func`.
        shift_labels: Whether position `t` predicts label `t + 1`, as in a causal language model. None:
            decided by the model's output: yes for a `CausalLMOutput` and its kin, no for the outputs of
            masked, encoder-decoder and token classification models, an error for one that is not known and
            has a label for each position.
        base: The loss of each label instead of cross-entropy, called with logits and labels, such as
            `nn.BCEWithLogitsLoss(reduction="none")` for several labels a row. It excludes `weight`,
            `ignore_index` and `label_smoothing`.

    Returns:
        A function of `(outputs, labels, num_items_in_batch=None)` that returns a scalar; `stats()` describes
        the weights of its last call.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of range, or settings exclude each other.

    Example:
        >>> import torch
        >>> loss_func = rgd_loss_func(tau=1.0)
        >>> logits, labels = torch.zeros(2, 4, 3), torch.tensor([[0, 1, 2, -100], [1, 1, -100, -100]])
        >>> loss_func({"logits": logits}, labels, num_items_in_batch=torch.tensor(5))
        Traceback (most recent call last):
        ...
        ValueError: outputs of type dict do not tell whether this is a causal language model, ...
        >>> loss_func = rgd_loss_func(tau=1.0, shift_labels=False)
        >>> loss_func({"logits": logits}, labels, num_items_in_batch=torch.tensor(5))
        tensor(1.8113)

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    if shift_labels not in (None, True, False):
        raise TypeError(f"shift_labels must be True, False or None, got {shift_labels!r}")
    settings: dict[str, Any] = {
        "weight": weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "tau": tau,
        "weighting": weighting,
        "base": base,
        "per": per,
    }
    return RGDLossFunc(
        RGDLoss(reduction="sum", **settings), RGDLoss(reduction="mean", **settings), shift_labels
    )


class RGDLossFunc:
    """What `rgd_loss_func` returns; see there.

    Args:
        total: The loss that sums, for when the number of items is given.
        mean: The same loss but that it averages, for when it is not.
        shift_labels: Whether labels are shifted; None to decide by the model's output.
    """

    def __init__(self, total: RGDLoss, mean: RGDLoss, shift_labels: bool | None) -> None:
        self._total = total
        self._mean = mean
        # One state, whichever of the two is called.
        self._total.weighting_state = self._mean.weighting_state
        self._shift_labels = shift_labels
        self._last = mean

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a micro-batch.

        Args:
            outputs: The model's, with `logits` of shape (..., C), or a tuple that begins with them.
            labels: Class indices, shape (...), or what `base` takes.
            num_items_in_batch: How many labels not ignored the whole batch has; None for those of `labels`.

        Returns:
            A scalar, float32 for logits of half precision.

        Raises:
            ValueError: If there are no labels or no logits, if their shapes do not fit, or if the outputs do
                not tell whether labels have to be shifted.
        """
        if labels is None:
            raise ValueError(
                "labels is None: the Trainer found no column of that name in the batch, so name it 'labels'"
            )
        logits = _logits(outputs)
        # As the models' own losses do: the division by num_items_in_batch happens after the sum.
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        labels = labels.to(logits.device)
        if self._shifts(outputs, logits, labels):
            labels = F.pad(labels[..., 1:], (0, 1), value=self._total.ignore_index)
        self._last = self._mean if num_items_in_batch is None else self._total
        if self._last.weight is not None:
            self._last.to(logits.device)
        if self._last.base is None:
            logits, labels = self._fit(logits, labels)
        loss = self._last(logits, labels)
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch

    @property
    def weighting(self) -> Weighting:
        """What turns losses into weights; another may be set between steps, as `WeightingSchedule` does."""
        return self._mean.weighting

    @weighting.setter
    def weighting(self, weighting: Weighting) -> None:
        self._mean.weighting = weighting
        self._total.weighting = weighting
        self._total.weighting_state = self._mean.weighting_state

    def stats(self) -> WeightStats:
        """What the weights of the last call were like, as `RGDLoss.stats()` tells."""
        return self._last.stats()

    def __repr__(self) -> str:
        return f"rgd_loss_func({self._mean.extra_repr()}, shift_labels={self._shift_labels})"

    def _shifts(self, outputs: Any, logits: Tensor, labels: Tensor) -> bool:
        if self._shift_labels is not None:
            return self._shift_labels
        if labels.dim() < 2 or logits.dim() != labels.dim() + 1:
            return False
        name = type(outputs).__name__
        if "CausalLMOutput" in name:
            return True
        if any(known in name for known in _ALIGNED):
            return False
        raise ValueError(
            f"outputs of type {name} do not tell whether this is a causal language model, whose labels "
            "have to be shifted: give rgd_loss_func(shift_labels=True) if it is, or shift_labels=False"
        )

    def _fit(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels as cross-entropy takes them, the class axis second."""
        if labels.is_floating_point():
            raise ValueError(
                f"labels holds {labels.dtype}: for several labels a row or a regression give the loss, as in "
                'rgd_loss_func(base=nn.BCEWithLogitsLoss(reduction="none"))'
            )
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                "labels must have the shape of the logits without their last axis, "
                f"{tuple(logits.shape[:-1])}, got {tuple(labels.shape)}; for a model whose loss is of "
                "another kind give rgd_loss_func(base=...)"
            )
        if self._last.per == "sample" and labels.dim() > 1:
            return logits.movedim(-1, 1), labels
        return logits.flatten(0, -2), labels.flatten()


def _logits(outputs: Any) -> Tensor:
    kind = type(outputs).__name__
    if isinstance(outputs, Mapping):
        logits: Any = cast("Mapping[str, Any]", outputs).get("logits")
    elif isinstance(outputs, tuple):
        logits = next(iter(cast("tuple[Any, ...]", outputs)), None)
    else:
        logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        raise ValueError(
            f"the model's outputs, a {kind}, hold no logits: rgd_loss_func re-weights the cross-entropy of "
            "outputs.logits against labels"
        )
    return logits
