"""Takes a column `sample_weight` of a data set to the loss: keeps the column, collates it, and sums it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

COLUMN = "sample_weight"

if TYPE_CHECKING:

    class _Trainer:
        """The methods of the `Trainer` of transformers that are used here."""

        data_collator: Any
        _signature_columns: list[str] | None

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def _set_signature_columns_if_needed(self) -> None: ...
        def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any: ...
        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any: ...
else:
    _Trainer = object


class TakesSampleWeight(_Trainer):
    """A trainer whose batches hold the column `sample_weight` of its data set, and which sums it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data_collator = WeightCollator(self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if COLUMN not in columns:
            self._signature_columns = [*columns, COLUMN]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of a step, and the number that the sum of their losses is divided by."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counted = counted_by_weight(batches)
        if counted is not batches and not hasattr(super(), "_get_num_items_in_batch"):  # some count here
            items = _no_zero(super().get_batch_samples(iter(counted), len(counted), device)[1])
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        counted = counted_by_weight(batch_samples)
        items = super()._get_num_items_in_batch(counted, device)
        return items if counted is batch_samples else _no_zero(items)


def without_weights(inputs: Any) -> tuple[Any, Tensor | None]:
    """The batch that a model gets, and the weights that came with it."""
    if COLUMN not in inputs:
        return inputs, None
    return {name: value for name, value in inputs.items() if name != COLUMN}, inputs[COLUMN]


def refuse_shifted_labels(inputs: Any) -> None:
    """Refuse a batch with weights and `shift_labels`: the weights are not shifted."""
    if inputs.get("shift_labels") is not None:
        raise ValueError(
            "sample_weight is laid beside labels, and this batch holds shift_labels: train without sequence "
            "parallelism"
        )


class WeightCollator:
    """A collator that pads, flattens or packs the weights of its rows as their labels.

    Args:
        collator: The collator of rows without weights.
    """

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, features: Sequence[Any]) -> Any:
        """The batch; with `sample_weight`, float32, if the rows have it.

        It has the shape of the labels, and is 0 where they are padded. If each row has one weight, and rows
        are not flattened into one, it has one entry a row.

        Raises:
            TypeError: If a weight is no number.
            ValueError: If only some rows have a weight, if one is negative or not finite, or if a row has
                neither one weight nor one for each of its tokens.
        """
        if not any(isinstance(one, Mapping) and COLUMN in one for one in features):
            return self.collator(features)
        weights = [_weights_of(one, place) for place, one in enumerate(features)]
        lengths = [_length_of(one) for one in features]
        rest = [{name: value for name, value in one.items() if name != COLUMN} for one in features]
        batch: Any = self.collator(rest)
        batch[COLUMN] = laid_out(weights, lengths, batch)
        return batch

    def __repr__(self) -> str:
        return f"WeightCollator({self.collator!r})"


def _weights_of(row: Any, place: int) -> Tensor:
    given = row.get(COLUMN)
    if given is None:
        raise ValueError(
            f"row {place} of a batch has no sample_weight, and others have one: give every row one"
        )
    try:
        found = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"sample_weight must be a number, or one a token beside input_ids, got {given!r}"
        ) from error
    if found.dim() > 1:
        raise ValueError(
            f"sample_weight must be a number, or one a token beside input_ids, got shape {tuple(found.shape)}"
        )
    if not bool(((found >= 0) & (found < math.inf)).all()):
        raise ValueError(f"sample_weight must hold finite numbers >= 0, got {given!r}")
    return found


def _length_of(row: Any) -> int | None:
    ids = row.get("input_ids")
    return None if ids is None else len(ids)


def laid_out(weights: list[Tensor], lengths: list[int | None], batch: Mapping[str, Any]) -> Tensor:
    """The weights of rows as one tensor: of the shape of the labels, or one entry a row.

    Args:
        weights: For each row a scalar, or one weight a token.
        lengths: How many tokens each row has; None where it has no `input_ids`.
        batch: The collated rows.
    """
    labels = batch.get("labels")
    by_row = all(not one.dim() for one in weights)
    flattened = isinstance(labels, Tensor) and labels.dim() == 2 and len(weights) != labels.shape[0] == 1
    if by_row and not flattened:
        return torch.stack(weights)
    if not isinstance(labels, Tensor) or labels.dim() != 2 or any(one is None for one in lengths):
        raise ValueError(
            "sample_weight has one a token, and this batch has no labels of tokens: give one a row instead"
        )
    rows = [
        one if one.dim() else one.expand(cast("int", length))
        for one, length in zip(weights, lengths, strict=True)
    ]
    for place, (one, length) in enumerate(zip(rows, lengths, strict=True)):
        if one.shape[0] != length:
            raise ValueError(
                f"sample_weight of row {place} of a batch has {one.shape[0]} entries, and its input_ids "
                f"{length}: give one for each, or one for the row"
            )
    if flattened:
        rows = [torch.cat(rows)]
    if len(rows) != labels.shape[0] or any(one.shape[0] > labels.shape[1] for one in rows):
        raise ValueError(
            f"sample_weight cannot be laid beside labels of shape {tuple(labels.shape)}, which the collator "
            f"made of {len(weights)} rows: truncate rows in the data set, not in the collator"
        )
    result = torch.zeros(labels.shape)
    mask = batch.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.shape == labels.shape else None
    for place, one in enumerate(rows):
        # If the mask counts all tokens, they may be at the right, after padding.
        own = None if mask is None else mask[place] != 0
        if own is not None and int(own.sum()) == one.shape[0]:
            result[place, own] = one
        else:
            result[place, : one.shape[0]] = one
    return result


def of_labels(weight: Tensor, labels: Tensor) -> Tensor:
    """Weights of the labels' shape, from these or from one a row."""
    if weight.shape == labels.shape:
        return weight
    return weight.reshape(-1, *[1] * (labels.dim() - 1)).expand(labels.shape)


def counted_by_weight(batches: list[Any]) -> list[Any]:
    """Micro-batches in whose labels the `Trainer` counts the sum of the weights instead of the labels."""
    weighed = [_weighed(batch) for batch in batches]
    return weighed if any(one is not batch for one, batch in zip(weighed, batches, strict=True)) else batches


def _weighed(batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        return batch
    given = cast("Mapping[str, Any]", batch)
    labels, weight = given.get("labels"), given.get(COLUMN)
    if labels is None or weight is None:
        return given
    return {**given, "labels": _Weighed(labels, of_labels(weight, labels))}


def _no_zero(items: Any) -> Any:
    """The sum of the weights. 1 if all are 0: the sum of the losses is 0 then, and so is the step."""
    return items.where(items > 0, 1) if isinstance(items, Tensor) else items


class _Weighed:
    """Labels for which `labels.ne(-100).sum()`, the count of the `Trainer`, is the sum of their weights."""

    def __init__(self, labels: Tensor, weight: Tensor) -> None:
        self.labels = labels
        self.weight = weight

    def __getitem__(self, places: Any) -> _Weighed:
        return _Weighed(self.labels[places], self.weight[places])

    def ne(self, ignored: int) -> Tensor:
        """The weight of each label that counts."""
        return self.weight * self.labels.ne(ignored)
