"""The loss of the Hugging Face `Trainer`, re-weighted, and a callback that logs statistics of the weights.

The `Trainer` adds up the gradients of several micro-batches and devices, and gives the loss the number of all
their labels. So the loss of a micro-batch is `sum_i w_i l_i / num_items_in_batch`, over its labels that are
not ignored.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgd.integrations._criterion import HasCriterion
from rgd.integrations._inputs import (
    normalizer_of,
    refuse_flattened_labels,
    segments_of_rows,
    shifted_segments,
)
from rgd.integrations._linear_head import LinearRGD, use_linear_rgd
from rgd.integrations._sample_weight import COLUMN, of_labels
from rgd.stats import WeightStats
from rgd.torch._checks import ENTRYWISE, check_choice, check_not_broadcast
from rgd.torch._modes import evaluates
from rgd.torch.loss import RGDLoss
from rgd.weightings import Weighting

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from rgd.integrations._trainer import RGDTrainer

    class CallbackHandler:
        """The object of a trainer that calls its callbacks."""

        callbacks: list[Any]
else:
    try:
        from transformers import TrainerCallback
        from transformers.trainer_callback import CallbackHandler
    except ImportError:  # `rgd_loss_func` does not need it
        TrainerCallback = object

__all__ = ["LinearRGD", "RGDLossFunc", "RGDStatsCallback", "RGDTrainer", "rgd_loss_func", "use_linear_rgd"]

_Settings = ParamSpec("_Settings")
_Result = TypeVar("_Result")

_PROBLEM_BASES: dict[str, Callable[..., nn.Module]] = {
    "regression": nn.MSELoss,
    "multi_label_classification": nn.BCEWithLogitsLoss,
}
_PROBLEM_TYPES = (*_PROBLEM_BASES, "single_label_classification")
# Outputs with logits and a label for each position, which the position itself predicts.
_ALIGNED = ("Seq2SeqLMOutput", "MaskedLMOutput", "TokenClassifierOutput")


def __getattr__(name: str) -> Any:
    if name == "RGDTrainer":  # it needs the Trainer, which takes long to import
        from rgd.integrations._trainer import RGDTrainer  # noqa: PLC0415

        return RGDTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _settings_only(function: Callable[_Settings, _Result]) -> Callable[_Settings, _Result]:
    """Let a function raise if the `Trainer` was given the function itself instead of its result."""

    @functools.wraps(function)
    def checked(*args: _Settings.args, **kwargs: _Settings.kwargs) -> _Result:
        if "num_items_in_batch" in kwargs or len(args) > 1:
            raise TypeError(
                "rgd_loss_func was called with a model's outputs and labels: it takes settings and returns "
                "the loss, so call it where you hand it over, Trainer(compute_loss_func=rgd_loss_func()). "
                "(Its settings other than weighting are keyword arguments.)"
            )
        return function(*args, **kwargs)

    return checked


@_settings_only
def rgd_loss_func(
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    per: str = "element",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    shift_labels: bool | None = None,
    base: Callable[..., Tensor] | None = None,
    problem_type: str | None = None,
    evaluate: str = "plain",
    aux_loss_coef: float | None = None,
) -> RGDLossFunc:
    """A loss for `Trainer(compute_loss_func=...)`: cross-entropy re-weighted towards hard tokens or rows.

    With `l_i` the loss of label `i` and `w_i` its weight, a constant to autograd, a micro-batch contributes
    `sum_i w_i l_i / num_items_in_batch`. The default weights depend on their own losses alone, so gradient
    accumulation and data parallelism change nothing. Weights that depend on the batch are computed over the
    micro-batches of all processes together.

    The `Trainer` calls the function for its evaluation loss too, under `torch.no_grad()`. That loss is plain,
    unweighted, so that `load_best_model_at_end` and early stopping compare the right numbers. Such a call
    changes neither a state nor `stats()`.

    The `Trainer` passes the model's outputs and the labels to the function, and nothing else of the batch. An
    `RGDTrainer` passes the whole batch, with the column `sample_weight` and the inputs that show packed
    sequences. The function needs logits. For a causal language model, `use_linear_rgd` computes the same
    without them, in a fraction of the memory.

    Args:
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` nor `scale` is given.
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        per: "element" weights each label (a token) by its own loss; "sample" weights all labels of a row (a
            sequence) by their mean loss. Both are the same if a row has one label. In an `RGDTrainer`,
            sequences that are packed into a row are recognised as by `use_linear_rgd`. A `Trainer` does not
            pass `position_ids` to the function. The function then refuses a batch of one row with the labels
            that `DataCollatorWithFlattening` makes of whole texts, and takes any other row as one sequence.
        weight: Class weights, shape (C,).
        ignore_index: The label of padding, which does not count. The `Trainer` counts with -100.
        label_smoothing: In [0, 1]. A `compute_loss_func` does not receive
            `TrainingArguments.label_smoothing_factor`.
        shift_labels: Whether position `t` predicts label `t + 1`, as in a causal language model. None:
            decided by the model's output: yes for a `CausalLMOutput` and similar outputs, no for the outputs
            of masked, encoder-decoder and token classification models, an error for an unknown output that
            has a label for each position.
        base: The loss of each label instead of cross-entropy, called with logits and labels, such as
            `nn.L1Loss(reduction="none")`. Logits (N, 1) fit labels (N,); shapes that broadcast are refused.
            It excludes `weight`, `ignore_index`, `label_smoothing` and `problem_type`.
        problem_type: As in a model's configuration: "regression" is short for
            `base=nn.MSELoss(reduction="none")`, "multi_label_classification" for
            `base=nn.BCEWithLogitsLoss(reduction="none")`; "single_label_classification" is cross-entropy.
        evaluate: "plain" leaves losses unweighted under `torch.no_grad()` and in inference mode; "weighted"
            weights them there too.
        aux_loss_coef: The factor of the auxiliary loss of a mixture of experts, `outputs.aux_loss`, which the
            model returns with `output_router_logits=True`. The model adds it to its own loss, so give
            `model.config.router_aux_loss_coef`, or 0 to leave it out. It is neither weighted nor divided by
            the number of items.

    Returns:
        A function of `(outputs, labels, num_items_in_batch=None)` that returns a scalar; `stats()` describes
        the weights of its last weighted call.

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
    check_choice("evaluate", evaluate, ("plain", "weighted"))
    if problem_type is not None:
        check_choice("problem_type", problem_type, _PROBLEM_TYPES)
        if base is not None:
            raise ValueError(f"base and problem_type={problem_type!r} both name the loss: give one of them")
        if problem_type in _PROBLEM_BASES:
            base = _PROBLEM_BASES[problem_type](reduction="none")
    criterion = RGDLoss(
        weight, ignore_index=ignore_index, label_smoothing=label_smoothing, tau=tau, scale=scale,
        weighting=weighting, base=base, per=per, evaluate=evaluate,
    )  # fmt: skip
    if base is not None:
        criterion.base = _FittedBase(base)
    return RGDLossFunc(criterion, shift_labels, _check_coefficient(aux_loss_coef))


class _FittedBase(nn.Module):
    """A loss that takes logits (N, 1) with labels (N,), and refuses shapes that broadcast."""

    def __init__(self, base: Callable[..., Tensor]) -> None:
        super().__init__()
        self.base = base

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        entrywise = isinstance(self.base, ENTRYWISE)
        if entrywise or labels.is_floating_point():
            if logits.shape == (*labels.shape, 1):
                logits = logits.squeeze(-1)
            elif labels.shape == (*logits.shape, 1):
                labels = labels.squeeze(-1)
        if entrywise and labels.shape != logits.shape:
            raise ValueError(
                f"labels must have the shape of the logits, {tuple(logits.shape)}, got {tuple(labels.shape)}"
            )
        if entrywise and not labels.is_floating_point():
            labels = labels.to(logits.dtype)
        losses: Any = self.base(logits, labels)
        if isinstance(losses, Tensor):
            check_not_broadcast(self.base, losses, (logits, labels))
        return losses


class RGDLossFunc(HasCriterion):
    """The loss function that `rgd_loss_func` returns; see there.

    Args:
        criterion: The re-weighted loss.
        shift_labels: Whether labels are shifted; None to decide by the model's output.
        aux_loss_coef: The factor of the auxiliary loss of a mixture of experts.
    """

    takes_batch = True

    def __init__(
        self, criterion: RGDLoss, shift_labels: bool | None = None, aux_loss_coef: float | None = None
    ) -> None:
        self.criterion = criterion
        self._shift_labels = shift_labels
        self._aux_loss_coef = aux_loss_coef

    def __call__(
        self,
        outputs: Any,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        batch: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The loss of a micro-batch.

        Args:
            outputs: The model's, with `logits` of shape (..., C), or a tuple that begins with them.
            labels: Class indices, shape (...), or what `base` takes.
            num_items_in_batch: The number of labels of the whole batch that are not ignored, or with weights
                the sum of theirs; None to take those of `labels`.
            batch: The rest of the batch, as an `RGDTrainer` gives it: `sample_weight`, of the labels' shape
                or one a row, and the model's inputs that show packed sequences; None if it is not known.

        Returns:
            A scalar, float32 for logits of half precision.

        Raises:
            ValueError: If there are no labels or no logits, if their shapes do not fit, if the outputs do
                not tell whether labels have to be shifted, if they hold an auxiliary loss without a
                coefficient for it, or if a row is packed with `per="sample"`.
        """
        _refuse_question_answering(outputs)
        if labels is None:
            raise ValueError(
                "labels is None: the Trainer found no column of that name in the batch, so name it 'labels'"
            )
        auxiliary = self._auxiliary(outputs)
        criterion = self.criterion
        by_sample = criterion.per == "sample" and (criterion.evaluate == "weighted" or not evaluates())
        if by_sample and batch is None:
            refuse_flattened_labels(labels, criterion.ignore_index)
        logits = _logits(outputs)
        # The division by num_items_in_batch happens after the sum, as in the models' own losses.
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        labels = labels.to(logits.device)
        shifts = self._shifts(outputs, logits, labels)
        weight: Any = None if batch is None else batch.get(COLUMN)
        segments: Tensor | None = None
        if batch is not None and by_sample and labels.dim() == 2:
            by_token = weight is not None and weight.dim() > 1
            ignored = criterion.ignore_index
            segments = segments_of_rows(batch, labels, shifts, ignored, always=by_token)
        if weight is not None:
            weight = weight.to(logits.device)
            if segments is not None or criterion.per == "element":
                weight = of_labels(weight, labels)
        if shifts:
            # In int64, since a narrower dtype may not hold ignore_index.
            labels = F.pad(labels[..., 1:].to(torch.int64), (0, 1), value=criterion.ignore_index)
            segments = None if segments is None else F.pad(shifted_segments(segments), (0, 1), value=-1)
            if weight is not None and weight.dim() > 1:
                weight = F.pad(weight[..., 1:], (0, 1))
        if criterion.weight is not None:
            criterion.to(logits.device)
        if criterion.base is None:
            logits, labels = self._fit(logits, labels)
            weight = weight if weight is None or criterion.per == "sample" else weight.reshape(labels.shape)
        normalizer = normalizer_of(num_items_in_batch, logits.device)
        loss = criterion(logits, labels, normalizer=normalizer, sample_weight=weight, segments=segments)
        return loss if auxiliary is None else loss + auxiliary.to(loss.device)

    def __repr__(self) -> str:
        settings = f"shift_labels={self._shift_labels}, aux_loss_coef={self._aux_loss_coef}"
        return f"rgd_loss_func({self.criterion.extra_repr()}, {settings})"

    def _auxiliary(self, outputs: Any) -> Tensor | None:
        """The auxiliary loss of a mixture of experts times its coefficient, as in the model's own loss."""
        _refuse_router_losses(outputs)
        found = _entry(outputs, "aux_loss")
        if found is None:
            if self._aux_loss_coef:
                raise ValueError(
                    f"aux_loss_coef={self._aux_loss_coef} was given, and the model's outputs hold no "
                    "aux_loss: set model.config.output_router_logits = True, or leave aux_loss_coef out"
                )
            return None
        if self._aux_loss_coef is None:
            raise ValueError(
                "the model's outputs hold the auxiliary loss of a mixture of experts, aux_loss, which the "
                "model would add to its own loss: give rgd_loss_func("
                "aux_loss_coef=model.config.router_aux_loss_coef), or 0 to leave it out"
            )
        return self._aux_loss_coef * found if self._aux_loss_coef else None

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
                f"labels holds {labels.dtype}, and cross-entropy takes integers: for several labels a row "
                'give rgd_loss_func(problem_type="multi_label_classification"), for numbers to be predicted '
                'problem_type="regression", for another loss base='
            )
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                "labels must have the shape of the logits without their last axis, "
                f"{tuple(logits.shape[:-1])}, got {tuple(labels.shape)}; for a model whose loss is of "
                "another kind give rgd_loss_func(base=...)"
            )
        if self.criterion.per == "sample" and labels.dim() > 1:
            return logits.movedim(-1, 1), labels
        return logits.flatten(0, -2), labels.flatten()


class RGDStatsCallback(TrainerCallback):
    """Adds the statistics of a loss's weights to what the `Trainer` logs of the training.

    The names are `rgd/mean_loss` (the plain loss, by which to compare runs), `rgd/objective`,
    `rgd/effective_sample_size`, `rgd/kl_to_uniform`, `rgd/max_weight` and `rgd/clipped_share`, of the last
    micro-batch of this process before the log. `rgd.WeightStats` says what they mean. They are computed only
    at steps that are logged. They go into `trainer.state.log_history`, to the reporters of `report_to` and to
    the console. For this the callback moves to the front of the trainer's callbacks when the training starts,
    whether it was given by `callbacks=[...]` or by `add_callback`.

    It warns if the training starts with `label_smoothing_factor`. A `compute_loss_func` does not receive
    this, and with `use_linear_rgd` it makes the `Trainer` compute another loss.

    Args:
        loss_func: The function that `rgd_loss_func` returned, given to the `Trainer` as `compute_loss_func`;
            or another object with `stats()`: the handle of `use_linear_rgd`, an `RGDLoss`, or a trainer of
            `rgd.integrations.trl`.
        prefix: What the names begin with.

    Raises:
        TypeError: If `loss_func` has no `stats`.

    Example:
        >>> loss_func = rgd_loss_func(tau=1.0)
        >>> callback = RGDStatsCallback(loss_func)
    """

    def __init__(self, loss_func: Any, prefix: str = "rgd") -> None:
        super().__init__()
        if isinstance(loss_func, type) or not callable(getattr(loss_func, "stats", None)):
            raise TypeError(
                "loss_func must be what rgd_loss_func(...) returned, the same object as the Trainer's "
                f"compute_loss_func, got {loss_func!r}"
            )
        self.loss_func = loss_func
        self.prefix = prefix

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move before the callbacks that report, and warn of a label smoothing that has no effect."""
        callbacks = _callbacks_with(self)
        if callbacks is not None:
            # The callbacks before it each move by one, so the trainer's loop over the list goes on after it.
            callbacks.remove(self)
            callbacks.insert(0, self)
        if isinstance(self.loss_func, LinearRGD) and args.label_smoothing_factor:
            warnings.warn(
                f"TrainingArguments.label_smoothing_factor={args.label_smoothing_factor} makes the Trainer "
                "compute a loss of its own from logits, without weights. Give "
                f"use_linear_rgd(label_smoothing={args.label_smoothing_factor}) instead",
                UserWarning,
                stacklevel=2,
            )
        if isinstance(self.loss_func, RGDLossFunc) and args.label_smoothing_factor:
            warnings.warn(
                f"TrainingArguments.label_smoothing_factor={args.label_smoothing_factor} has no effect: the "
                "Trainer applies it in its own loss, not in a compute_loss_func. Give "
                f"rgd_loss_func(label_smoothing={args.label_smoothing_factor}) instead",
                UserWarning,
                stacklevel=2,
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the statistics to a log of the training."""
        if logs is None or "loss" not in logs:  # an evaluation's, or the summary at the end
            return
        try:
            stats = cast("WeightStats", self.loss_func.stats())
        except RuntimeError:  # not called yet
            return
        numbers = {
            f"{self.prefix}/{name}": float(value)
            for name, value in vars(stats).items()
            if value is not None and name not in ("count", "groups")
        }
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)


def _callbacks_with(callback: RGDStatsCallback) -> list[Any] | None:
    """The trainer's list that holds a callback; None if no trainer calls it.

    A trainer does not pass this list to its callbacks, so it is looked up in the calling frame.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and any(each is callback for each in caller.callbacks):
            return caller.callbacks
        frame = frame.f_back
    return None


def _check_coefficient(coefficient: Any) -> float | None:
    if coefficient is None:
        return None
    if isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)):
        raise TypeError(f"aux_loss_coef must be a number, got {coefficient!r}")
    if not (math.isfinite(coefficient) and coefficient >= 0):
        raise ValueError(f"aux_loss_coef must be finite and at least 0, got {coefficient}")
    return float(coefficient)


def _entry(outputs: Any, name: str) -> Any:
    """An entry of a model's outputs; None where there is none."""
    if isinstance(outputs, Mapping):
        return cast("Mapping[str, Any]", outputs).get(name)
    return getattr(outputs, name, None)


def _refuse_question_answering(outputs: Any) -> None:
    if _entry(outputs, "start_logits") is not None and _entry(outputs, "logits") is None:
        raise ValueError(
            "the model's outputs hold no logits but start_logits: rgd_loss_func does not serve question "
            "answering, where an example has two losses, of its start and of its end. Subclass the Trainer: "
            'in compute_loss add F.cross_entropy(outputs.start_logits, start_positions, reduction="none") '
            "and the same of the end, halve the sum, and return rgd.torch.reweighted_mean of that"
        )


def _refuse_router_losses(outputs: Any) -> None:
    """Refuse losses of routers that have other names and coefficients than `aux_loss`."""
    for name in ("encoder_aux_loss", "decoder_aux_loss", "encoder_z_loss", "decoder_z_loss"):
        if _entry(outputs, name) is not None:
            raise ValueError(
                f"the model's outputs hold {name}, which the model would add to its own loss and "
                "rgd_loss_func does not: set model.config.output_router_logits = False to train without it, "
                "or subclass the Trainer and add it in compute_loss"
            )


def _logits(outputs: Any) -> Tensor:
    kind = type(outputs).__name__
    logits = _entry(outputs, "logits")
    if isinstance(outputs, tuple):
        logits = next(iter(cast("tuple[Any, ...]", outputs)), None)
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        raise ValueError(
            f"the model's outputs, a {kind}, hold no logits: rgd_loss_func re-weights the cross-entropy of "
            "outputs.logits against labels"
        )
    return logits
