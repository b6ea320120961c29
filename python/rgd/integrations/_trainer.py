"""A `Trainer` of transformers whose loss gets the whole batch: with weights, and with packed sequences."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from rgd.integrations._linear_head import handle_of
from rgd.integrations._sample_weight import TakesSampleWeight, refuse_shifted_labels, without_weights

if TYPE_CHECKING:

    class Trainer:
        """The methods of the `Trainer` of transformers that are used here."""

        accelerator: Any
        compute_loss_func: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any: ...
        def _set_signature_columns_if_needed(self) -> None: ...
        def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any: ...
        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any: ...
else:
    from transformers import Trainer


class RGDTrainer(TakesSampleWeight, Trainer):
    """`transformers.Trainer` for `rgd_loss_func` and `use_linear_rgd`, with weights from the data set.

    The data set may have a column `sample_weight`, numbers `p >= 0`, one a row or one a token beside
    `input_ids`. `remove_unused_columns` keeps it, and it is padded and shifted with the labels. The objective
    of a step is `sum_i p_i w_i l_i / sum_i p_i` over the labels that count, of all micro-batches and
    processes. The evaluation loss is `sum_i p_i l_i / sum_i p_i` of a batch. Without the column, or if all
    weights are 1, it works as a `Trainer`.

    The function of `rgd_loss_func` gets the model's inputs, such as `position_ids`, which show the sequences
    that are packed into a row. With `per="sample"` it gives each of them a weight of its own.

    Args:
        *args: As for `transformers.Trainer`. The loss is `compute_loss_func=rgd_loss_func(...)`, or that of a
            model that `use_linear_rgd` has patched.
        **kwargs: As for `transformers.Trainer`.

    Raises:
        TypeError: When a batch is made, if a weight is no number.
        ValueError: When a batch is made, if a row has no weight or one that is negative or not finite, or too
            few for its tokens; in a step, if the model has neither of the two losses that use the weights.

    Example:
        >>> trainer = RGDTrainer(  # doctest: +SKIP
        ...     model, args, train_dataset=rows, compute_loss_func=rgd_loss_func(tau=1.0)
        ... )
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, from all entries of the batch."""
        given = return_outputs, num_items_in_batch
        rest, weight = without_weights(inputs)
        if weight is not None:
            refuse_shifted_labels(inputs)
        function, handle = self.compute_loss_func, handle_of(self.accelerator.unwrap_model(model))
        if getattr(function, "takes_batch", False):
            # The Trainer takes the labels out of what it is given.
            self.compute_loss_func = functools.partial(function, batch=inputs)
            try:
                return super().compute_loss(model, {**rest}, *given)
            finally:
                self.compute_loss_func = function
        if weight is None:
            return super().compute_loss(model, inputs, *given)
        if handle is None or function is not None:
            raise ValueError(
                "the data set has a column sample_weight, and the loss of this trainer would not hear it: "
                "give compute_loss_func=rgd_loss_func(...), call use_linear_rgd(model) before, or leave the "
                "column out"
            )
        handle.counts_weights = True
        try:
            return super().compute_loss(model, inputs, *given)
        finally:
            handle.counts_weights = False
