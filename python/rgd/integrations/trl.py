"""TRL's trainers, re-weighted: supervised fine-tuning by tokens or sequences, DPO and reward models by pairs.

Each trainer is TRL's own but for its loss: the plain per-sample losses are taken from the one forward pass
that TRL makes, and TRL's metrics stay what they are. With `l_i` the loss of a token and `w_i` its weight, a
micro-batch of fine-tuning contributes `sum_i w_i l_i / num_items_in_batch`; with `l_i` the loss of a pair,
preferences contribute `mean(w * l)`. In an evaluation, under `torch.no_grad()`, every weight is 1.

A column `sample_weight` of the data set, numbers `p_i >= 0`, makes them `sum_i p_i w_i l_i / sum_i p_i`, with
the sum of all `p_i` that count in the step, in evaluations too.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rgd.integrations._criterion import HasCriterion
from rgd.integrations._inputs import refuse_settings_of_the_loss, segments_of_rows, shifted_segments
from rgd.integrations._linear_head import use_linear_rgd
from rgd.integrations._sample_weight import (
    COLUMN,
    TakesSampleWeight,
    of_labels,
    refuse_shifted_labels,
    without_weights,
)
from rgd.torch._checks import check_flag
from rgd.torch._modes import evaluates
from rgd.torch.loss import RGDLoss
from rgd.weightings import Weighting
from rgd.weightings._call import refuse_without_logits, resolve_weighting

if TYPE_CHECKING:

    class _Trainer:
        """The parts of TRL's trainers that are used here, with types, which TRL lacks."""

        args: Any
        accelerator: Any
        compute_loss_func: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any: ...
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any: ...
        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any: ...
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any: ...
        def _reject_skip_prepare_without_labels(self, datasets: Any, data_collator: Any) -> None: ...
        def _set_signature_columns_if_needed(self) -> None: ...
        def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any: ...
        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any: ...

    pack_dataset: Any

    SFTTrainer = DPOTrainer = RewardTrainer = _Trainer
else:
    from trl.data_utils import pack_dataset
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.reward_trainer import RewardTrainer
    from trl.trainer.sft_trainer import SFTTrainer

# How DPO's losses of a pair follow from its scaled difference of log-ratios; `e` is label_smoothing.
_DPO_LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": lambda margin, e: -F.logsigmoid(margin),
    "sigmoid_norm": lambda margin, e: -F.logsigmoid(margin),
    "hinge": lambda margin, e: F.relu(1 - margin),
    "robust": lambda margin, e: (e * F.logsigmoid(-margin) - (1 - e) * F.logsigmoid(margin)) / (1 - 2 * e),
    "ipo": lambda margin, e: (margin - 0.5).square(),
}
# These measure a completion by the mean over its tokens, not by the sum.
_DPO_MEANS = ("sigmoid_norm", "ipo")


def _unchanged(losses: Tensor) -> Tensor:
    return losses


class _Reweighted(HasCriterion, TakesSampleWeight):
    """What the trainers share: the weighting, its statistics, and weights from the data set."""

    criterion: RGDLoss


class _OfPairs(_Reweighted):
    """What the trainers of preferences share: the mean over pairs."""

    _mean_weight: Tensor | None = None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """TRL's, which returns None. Also keeps the mean weight of a step's pairs, over all processes."""
        given = [batch[COLUMN] for batch in batch_samples if batch.get(COLUMN) is not None]
        if given:
            weights = torch.cat([one.flatten().to(device) for one in given])
            accelerator: Any = cast("Any", self).accelerator
            total, count = accelerator.reduce(torch.stack([weights.sum(), weights.new_tensor(len(weights))]))
            self._mean_weight = total / count
        return super()._get_num_items_in_batch(batch_samples, device)

    def _mean(self, losses: Tensor, weight: Tensor | None) -> Tensor:
        """The objective of losses of pairs; their plain mean in an evaluation."""
        if weight is None:
            return losses.mean() if evaluates() else self.criterion(losses)
        weight = weight.to(losses.device)
        mean = weight.mean() if evaluates() or self._mean_weight is None else self._mean_weight
        # Where no pair of the step counts, the sum over it is 0.
        divisor = len(losses) * mean.to(losses).where(mean > 0, 1)
        return self.criterion(losses, sample_weight=weight, normalizer=divisor)


class RGDSFTTrainer(_Reweighted, SFTTrainer):
    """`trl.SFTTrainer` with re-weighted tokens, or sequences.

    The losses are those of TRL's fused head, so there is no second forward pass as with `compute_loss_func`,
    and no logits of all tokens. That head takes four matrix products; `linear=True` takes three. The
    auxiliary loss of a mixture of experts is added as TRL adds it, and is not weighted.

    Args:
        *args: As for `trl.SFTTrainer`.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` nor `scale` is given.
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        per: "element" weights each token by its own loss; "sample" weights all tokens of a sequence by their
            mean loss, those that are packed into a row too.
        linear: True to compute the head and its gradients in one pass in training, by `use_linear_rgd`.
            `entropy` and `mean_token_accuracy` are logged as ever, of the tokens that count; under
            `nn.DataParallel` in evaluations alone.
        **kwargs: As for `trl.SFTTrainer`. The data sets may have a column `sample_weight`: a number a row, or
            one a token beside `input_ids`, which is truncated and packed with them.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of range, or another weighting of tokens or another loss is asked for:
            `loss_type="dft"`, `label_smoothing_factor`, `compute_loss_func`; if `per="sample"` meets rows
            that do not say where sequences begin, `packing_strategy="wrapped"`; or under DeepSpeed's sequence
            parallelism, where the model itself reduces its loss.

    Example:
        >>> trainer = RGDSFTTrainer(model, train_dataset=dataset, tau=1.0)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        weighting: Weighting | None = None,
        tau: float | None = None,
        scale: float | None = None,
        per: str = "element",
        linear: bool = False,
        **kwargs: Any,
    ) -> None:
        linear = check_flag("linear", linear)
        if not linear:
            refuse_without_logits(resolve_weighting(weighting, tau, scale), "give linear=True")
        criterion = RGDLoss(
            base=None if linear else _unchanged,
            reduction="none",
            weighting=weighting,
            tau=tau,
            scale=scale,
            per=per,
        )
        super().__init__(*args, **kwargs)
        self.criterion = criterion
        self.linear = linear
        settings = self.args
        if settings.loss_type == "dft":
            raise ValueError(
                'loss_type="dft" weights each token by its probability, and RGDSFTTrainer would weight it '
                'again: leave loss_type at "nll"; weighting=rgd.KL(scale=-1.0) is that weight'
            )
        if self.compute_loss_func is not None or settings.label_smoothing_factor:
            raise ValueError(
                "compute_loss_func and label_smoothing_factor replace the loss that RGDSFTTrainer weights: "
                "leave them out, or use trl.SFTTrainer with "
                "compute_loss_func=rgd_loss_func(label_smoothing=...)"
            )
        if per == "sample" and settings.packing and settings.packing_strategy == "wrapped":
            raise ValueError(
                'per="sample" weights sequences, and packing_strategy="wrapped" does not say where in a row '
                'they begin: use packing_strategy="bfd", or per="element"'
            )
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and parallel.sp_enabled:
            raise ValueError(
                "RGDSFTTrainer does not work under sequence parallelism, where the model reduces its own "
                "loss: use context parallelism, or none"
            )
        if self.linear:
            trainer: Any = self
            # Replicas of nn.DataParallel share one criterion, which keeps the extras of the last of them.
            returns = () if settings.n_gpu > 1 else ("entropy", "correct")
            self.criterion = use_linear_rgd(
                trainer.model, weighting, tau=tau, scale=scale, per=per, returns=returns
            ).criterion

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss of a micro-batch, each token's log-probability times its weight."""
        inputs, weight = without_weights(inputs)
        if weight is not None:
            refuse_shifted_labels(inputs)
        refuse_settings_of_the_loss(inputs, "RGDSFTTrainer")
        if self.linear and not evaluates():
            return self._linear_loss(model, inputs, return_outputs, num_items_in_batch, weight)
        segments: Tensor | None = None
        if self.criterion.per == "sample" and not evaluates():
            segments = _segments_of_losses(inputs, weight is not None and weight.dim() > 1)
        by_token: Tensor | None = None if weight is None else of_labels(weight, inputs["labels"])[:, 1:]

        def reweighted(*args: Any, **kwargs: Any) -> Any:
            outputs = model(*args, **kwargs)
            if not kwargs.get("fused_lm_head"):
                return outputs
            log_probs, kept = outputs.log_probs, outputs.label_mask.bool()
            if not evaluates():
                given = by_token if segments is not None or self.criterion.per == "element" else weight
                log_probs = -self.criterion(-log_probs, where=kept, segments=segments, sample_weight=given)
            elif by_token is not None:
                log_probs = by_token * log_probs.masked_fill(by_token == 0, 0)
            if by_token is not None:
                log_probs = log_probs * _over_weights(by_token, kept, num_items_in_batch)
            outputs.log_probs = log_probs
            return outputs

        return super().compute_loss(reweighted, inputs, return_outputs, num_items_in_batch)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        """TRL's, which also keeps a column of weights, truncated and packed like `input_ids`."""
        processing_class, config, packing, formatting_func, name = args
        columns = dataset.column_names or list(next(iter(dataset)))
        if COLUMN not in columns:
            return super()._prepare_dataset(dataset, *args)
        by_token = np.ndim(next(iter(dataset))[COLUMN]) > 0
        if by_token and "input_ids" not in columns:
            raise ValueError(
                "sample_weight has one a token, and the data set has no input_ids that they stand beside: "
                "tokenize it first, or give one a row"
            )
        if packing:
            # TRL's packing drops other columns, and cuts sequences by itself.
            whole = copy.copy(config)
            whole.max_length = None
        else:
            whole = config
        if by_token:
            cut = _cut_of(whole)
            dataset = dataset.map(_cut_weights, fn_kwargs={"cut": cut})
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, name)
        if not packing:
            return dataset
        if config.max_length is None:
            raise ValueError("packing needs max_length, the length of a row: give SFTConfig(max_length=...)")
        if not by_token:
            dataset = dataset.map(_weights_of_tokens)
        dataset = dataset.select_columns(["input_ids", "labels", COLUMN])
        dataset = pack_dataset(dataset, config.max_length, config.packing_strategy)
        return dataset.shuffle(seed=config.seed) if config.shuffle_dataset else dataset

    def _reject_skip_prepare_without_labels(self, datasets: Any, data_collator: Any) -> None:
        inner = getattr(data_collator, "collator", data_collator)
        super()._reject_skip_prepare_without_labels(datasets, inner)

    def _linear_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: Tensor | int | None,
        weight: Tensor | None,
    ) -> Any:
        trainer: Any = self

        def in_one_pass(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            given = {} if weight is None else {COLUMN: weight}
            with _without_auxiliary_loss(self.accelerator.unwrap_model(trainer.model)):
                outputs = model(*args, **kwargs, **given, num_items_in_batch=1.0)
            labels = kwargs.get("shift_labels")
            labels = kwargs["labels"][:, 1:] if labels is None else labels
            # TRL divides the sum of these by the number of items, and takes the metrics from the others.
            outputs.log_probs = -outputs.loss
            mask = outputs.label_mask = labels != -100
            outputs.entropy = outputs.is_top1 = torch.zeros((), device=outputs.loss.device)
            extras = self.criterion.extras
            if extras is not None:
                outputs.entropy, outputs.is_top1 = extras["entropy"], extras["correct"]
            if weight is not None:
                by_token = of_labels(weight, kwargs["labels"])[:, 1:]
                share = _over_weights(by_token, mask, num_items_in_batch)
                outputs.log_probs = outputs.log_probs * share
                # TRL divides by the number of labels, and the extras are of those with a weight alone.
                by_count = mask.sum() / (mask & (by_token != 0)).sum().clamp(min=1)
                outputs.entropy, outputs.is_top1 = outputs.entropy * by_count, outputs.is_top1 * by_count
            return outputs

        result = super().compute_loss(in_one_pass, inputs, return_outputs, num_items_in_batch)
        if not self.criterion.returns:
            for name in ("entropy", "mean_token_accuracy"):
                trainer._metrics["train"].pop(name, None)
        return result


@contextlib.contextmanager
def _without_auxiliary_loss(model: Any) -> Generator[None]:
    """Make a mixture of experts return its auxiliary loss and not add it to its own loss: TRL adds it."""
    name = "router_aux_loss_coef"
    changed = [
        (one, getattr(one, name)) for one in (model, model.config.get_text_config()) if hasattr(one, name)
    ]
    for one, _ in changed:
        setattr(one, name, 0.0)
    try:
        yield
    finally:
        for one, coefficient in changed:
            setattr(one, name, coefficient)


class RGDDPOTrainer(_OfPairs, DPOTrainer):
    """`trl.DPOTrainer` with re-weighted pairs of a preferred and a rejected completion.

    The loss of a pair is `l_i = -log sigmoid(beta * (log-ratio of the chosen - log-ratio of the rejected))`,
    or what another `loss_type` says: sigmoid, sigmoid_norm, hinge, ipo, robust, or a combination of them with
    `loss_weights`, which is weighted as one loss.

    Args:
        *args: As for `trl.DPOTrainer`.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` nor `scale` is given.
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        **kwargs: As for `trl.DPOTrainer`. The data sets may have a column `sample_weight`, one a pair.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of range, or for a `loss_type` that is not among these, an
            `f_divergence_type` other than reverse_kl, `ld_alpha` or `use_weighting`.

    Example:
        >>> trainer = RGDDPOTrainer(model, train_dataset=dataset, tau=1.0)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        weighting: Weighting | None = None,
        tau: float | None = None,
        scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        weighting = resolve_weighting(weighting, tau, scale)
        refuse_without_logits(weighting, "give another weighting for pairs")
        criterion = RGDLoss(base=_unchanged, weighting=weighting)
        super().__init__(*args, **kwargs)
        self.criterion = criterion
        trainer: Any = self
        unknown = [kind for kind in trainer.loss_types if kind not in _DPO_LOSSES]
        if unknown:
            raise ValueError(
                f"RGDDPOTrainer does not know the loss of a pair for loss_type={unknown[0]!r}: use one of "
                + ", ".join(_DPO_LOSSES)
            )
        for name, value, expected in (
            ("f_divergence_type", trainer.f_divergence_type, "reverse_kl"),
            ("ld_alpha", trainer.ld_alpha, None),
            ("use_weighting", trainer.use_weighting, False),
        ):
            if value != expected:
                raise ValueError(
                    f"RGDDPOTrainer needs {name}={expected!r}, got {value!r}: it would be left out of the "
                    "losses that set the weights"
                )

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs, weight = without_weights(inputs)
        refuse_settings_of_the_loss(inputs, "RGDDPOTrainer")
        trainer: Any = self
        seen: list[Any] = []
        reference: list[Any] = []

        def recorded(*args: Any, **kwargs: Any) -> Any:
            outputs = model(*args, **kwargs)
            seen.append(outputs)
            return outputs

        def record(_module: Any, _inputs: Any, outputs: Any) -> None:
            reference.append(outputs)

        judge = trainer.model if trainer.ref_model is None else trainer.ref_model
        hook = judge.register_forward_hook(record)
        try:
            result = super()._compute_loss(recorded, inputs, return_outputs)
        finally:
            hook.remove()
        outputs = seen[0]  # if the logits are wanted, another pass after this one computes them
        mask = inputs["completion_mask"][:, 1:]
        log_probs = outputs.log_probs[:, -mask.size(1) :].sum(1)
        if trainer.precompute_ref_logps:
            before = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            before = _reference_of(reference, trainer).log_probs[:, -mask.size(1) :].sum(1)
        losses = self._losses(log_probs - before.to(log_probs.device), inputs["completion_mask"])
        loss = self._mean(losses, weight)
        if trainer.aux_loss_enabled:
            loss = loss + trainer.router_aux_loss_coef * outputs.aux_loss
        return (loss, result[1]) if return_outputs else loss

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, of a batch without its weights."""
        return super().compute_ref_log_probs(model, without_weights(inputs)[0])

    def _losses(self, log_ratios: Tensor, completion_mask: Tensor) -> Tensor:
        """The loss of each pair, from log-ratios of first all chosen, then all rejected completions."""
        trainer: Any = self
        lengths = completion_mask.sum(1).clamp(min=1)
        losses = torch.zeros_like(log_ratios[: len(log_ratios) // 2])
        for kind, share in zip(trainer.loss_types, trainer.loss_weights, strict=True):
            ratios = log_ratios / lengths if kind in _DPO_MEANS else log_ratios
            chosen, rejected = ratios.chunk(2)
            margin = trainer.beta * (chosen - rejected)
            loss = _DPO_LOSSES[kind](margin, trainer.label_smoothing)
            if kind == "ipo":  # (difference - 1/(2 beta))^2 is (margin - 1/2)^2 / beta^2
                loss = loss / trainer.beta**2
            losses = losses + share * loss
        return losses


class RGDRewardTrainer(_OfPairs, RewardTrainer):
    """`trl.RewardTrainer` with re-weighted pairs.

    The loss of a pair is `l_i = -log sigmoid(r_chosen - r_rejected - margin)`. The term of
    `center_rewards_coefficient` is added to the objective as it is.

    Args:
        *args: As for `trl.RewardTrainer`.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` nor `scale` is given.
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        **kwargs: As for `trl.RewardTrainer`. The data sets may have a column `sample_weight`, one a pair.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of range.

    Example:
        >>> trainer = RGDRewardTrainer(model, train_dataset=dataset, tau=1.0)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        weighting: Weighting | None = None,
        tau: float | None = None,
        scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        weighting = resolve_weighting(weighting, tau, scale)
        refuse_without_logits(weighting, "give another weighting for pairs")
        criterion = RGDLoss(base=_unchanged, weighting=weighting)
        super().__init__(*args, **kwargs)
        self.criterion = criterion

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective of a micro-batch of pairs."""
        inputs, weight = without_weights(inputs)
        refuse_settings_of_the_loss(inputs, "RGDRewardTrainer")
        seen: list[Any] = []

        def recorded(*args: Any, **kwargs: Any) -> Any:
            outputs = model(*args, **kwargs)
            seen.append(outputs)
            return outputs

        result = super().compute_loss(recorded, inputs, return_outputs, num_items_in_batch)
        chosen, rejected = seen[0].logits.squeeze(-1).chunk(2)
        margin = chosen - rejected
        if "margin" in inputs:
            margin = margin - inputs["margin"]
        loss = self._mean(-F.logsigmoid(margin), weight)
        coefficient = self.args.center_rewards_coefficient
        if coefficient is not None:
            loss = loss + coefficient * (chosen + rejected).square().mean()
        return (loss, result[1]) if return_outputs else loss


def _segments_of_losses(inputs: dict[str, Any], always: bool) -> Tensor | None:
    """The sequence of each loss of a packed batch, as TRL's fused head lays them out; None for rows."""
    shifted = inputs.get("shift_labels")
    labels = inputs["labels"] if shifted is None else shifted
    segments = segments_of_rows(inputs, labels, shifted is None, -100, always=always)
    return segments if segments is None or shifted is not None else shifted_segments(segments)


def _over_weights(weight: Tensor, kept: Tensor, items: Tensor | int | None) -> Tensor:
    """What makes of TRL's division one by the sum of the weights.

    TRL divides by the number of items, or by that of the labels of this batch, and by 1 where that is less.

    Args:
        weight: One a label.
        kept: Which labels count.
        items: The sum of the weights of the step; None for that of this batch.
    """
    counted = (weight * kept).sum() if items is None else torch.as_tensor(items, device=weight.device)
    divided_by = kept.sum() if items is None else counted
    return divided_by.clamp(min=1) / counted.where(counted > 0, 1)


def _cut_of(config: Any) -> slice:
    """What TRL leaves of a row that is longer than `max_length`."""
    if config.max_length is None:
        return slice(None)
    ends = config.truncation_mode == "keep_end"
    return slice(-config.max_length, None) if ends else slice(None, config.max_length)


def _cut_weights(row: dict[str, Any], cut: slice) -> dict[str, Any]:
    weights, ids = row[COLUMN], row["input_ids"]
    if len(weights) != len(ids):
        raise ValueError(
            f"sample_weight of a row has {len(weights)} entries, and its input_ids {len(ids)}: give one for "
            "each, or one for the row"
        )
    return {COLUMN: weights[cut]}


def _weights_of_tokens(row: dict[str, Any]) -> dict[str, Any]:
    return {COLUMN: [row[COLUMN]] * len(row["input_ids"])}


def _reference_of(outputs: list[Any], trainer: Any) -> Any:
    """The reference's output: the only one of its module, or the last, where adapters are switched off."""
    fused = [given for given in outputs if getattr(given, "log_probs", None) is not None]
    expected = 1 if trainer.ref_model is not None else 2
    if len(fused) != expected:
        raise RuntimeError(
            f"RGDDPOTrainer expected {expected} fused forward passes of the reference's module, got "
            f"{len(fused)}: this version of trl computes its reference in another way, so set "
            "precompute_ref_log_probs=True"
        )
    return fused[-1]
