"""A `Trainer` of transformers whose loss sees the whole batch: a column of weights, and packed sequences."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from rgd.integrations._linear_head import handle_of
from rgd.integrations._sample_weight import TakesSampleWeight, refuse_shifted_labels, without_weights

if TYPE_CHECKING:

    class Trainer:
        """What the `Trainer` of transformers is used for here."""

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

    A column `sample_weight` of the data set, numbers `p >= 0`, one a row or one a token beside `input_ids`,
    is kept by `remove_unused_columns`, and laid, padded and shifted with the labels. The objective of a step
    is `sum_i p_i w_i l_i / sum_i p_i` over all labels that count, of all its micro-batches and processes. Its
    evaluation loss is `sum_i p_i l_i / sum_i p_i` of a batch. Where all weights are 1, and without the
    column, it is a `Trainer`.

    The function of `rgd_loss_func` sees what the model is told of packed sequences, such as `position_ids`,
    and weights each as a sample of its own with `per="sample"`.

    Args:
        *args: As for `transformers.Trainer`. The loss is `compute_loss_func=rgd_loss_func(...)`, or that of a
            model that `use_linear_rgd` has patched.
        **kwargs: As for `transformers.Trainer`.

    Raises:
        TypeError: If a weight is no number, as a batch is made.
        ValueError: As a batch is made, if a row has no weight or one that is negative or not finite, or too
            few for its tokens; in a step, if neither of the two losses is there to hear the weights.

    Example:
        >>> trainer = RGDTrainer(  # doctest: +SKIP
        ...     model, args, train_dataset=rows, compute_loss_func=rgd_loss_func(tau=1.0)
        ... )
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, which sees all of it."""
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
