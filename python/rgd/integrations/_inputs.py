"""Reads a batch: keywords that no part of a model uses, how many labels count, how a row is packed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rgd.torch.segments import begins_after_the_first

# Arguments that the losses of `rgd.torch` take beside logits and labels.
_OF_THE_LOSS = ("where", "sample_weight", "groups", "segments")
# Keyword arguments that the decorators and the loss of a model of transformers use.
_OF_TRANSFORMERS = (
    "num_items_in_batch", "shift_labels", "ignore_index", "return_dict", "fused_lm_head",
    # Its collators of packed rows add these for the models that need them.
    "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip

_PACKED = (
    'per="sample" weights a row by its mean loss, and a row of this batch holds several sequences ({found}), '
    "which would share one weight: give each sequence a row of its own, with padding, use RGDTrainer, "
    'which tells them apart, or use per="element"'
)


def normalizer_of(items: Tensor | float | None, device: torch.device) -> Tensor | float | None:
    """The `normalizer=` of the loss, from the number of labels that the `Trainer` counted in a batch."""
    if isinstance(items, Tensor):
        if items.is_cpu and not torch.compiler.is_compiling() and not bool(items):
            return None  # no label counts: the mean of nothing, which is NaN
        return items.to(device).reshape(())
    return items or None


def refuse_settings_of_the_loss(batch: Mapping[str, Any], who: str) -> None:
    """Refuse a batch with arguments of `RGDLoss`, such as `groups`, which the model would get and ignore."""
    for name in _OF_THE_LOSS:
        if batch.get(name) is not None:
            raise TypeError(
                f"{who} does not take {name}=, and the model would ignore it: leave it out of the batch "
                "(rgd.torch.cross_entropy and linear_cross_entropy take where, sample_weight and groups)"
            )


def refuse_unknown(model: Any, known: frozenset[str], kwargs: Mapping[str, Any], who: str) -> None:
    """Refuse a keyword that no part of a model takes: the model's `**kwargs` would silently ignore it.

    Args:
        model: A model of transformers.
        known: What `keywords_of` returned for it.
        kwargs: The keywords of a call with labels.
        who: The name of the caller in the message.
    """
    unknown = [name for name, value in kwargs.items() if value is not None and name not in known]
    if not unknown:
        return
    refuse_settings_of_the_loss({name: kwargs[name] for name in unknown}, who)
    inner = set(_keywords_within(model))
    for name in unknown:
        if name not in inner and name not in _OF_THE_LOSS:
            raise TypeError(
                f"{name}= is no argument of {type(model).__name__} nor of its layers, and {who} does not "
                "take it: it would be ignored, so leave it out"
            )


def keywords_of(model: Any) -> frozenset[str]:
    """The keywords that a model of transformers takes: those of its forward, and those of all models."""
    utils = importlib.import_module("transformers.utils")
    shared = getattr(getattr(utils, "TransformersKwargs", None), "__annotations__", {})
    # A subclass may pass on all of its arguments, and a forward set on the instance may take more of them.
    owners: list[Any] = [model, *type(model).__mro__]
    own = [name for owner in owners if "forward" in vars(owner) for name in _named(vars(owner)["forward"])]
    return frozenset((*own, *shared, *_OF_TRANSFORMERS))


def _keywords_within(model: Any) -> Iterator[str]:
    """The keywords that the layers of a model and its attention function take."""
    kinds: set[Any] = {type(module) for module in model.modules()}
    for kind in kinds:
        yield from _named(kind.forward)
    functions = getattr(importlib.import_module("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation in functions:
        yield from _named(functions[implementation])


def _named(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def segments_of_rows(
    batch: Mapping[str, Any], labels: Tensor, shift: bool, ignore_index: int, *, always: bool = False
) -> Tensor | None:
    """The sequence that each position of a packed batch belongs to; None where each row is one sequence.

    Args:
        batch: What the model is called with.
        labels: Shape (B, T).
        shift: Whether position `t` predicts label `t + 1`, so that the first label of a row is not used.
        ignore_index: The label of targets that do not count.
        always: Whether to return segments also if each row is one sequence.

    Returns:
        The `segments=` of the loss, int64 of the labels' shape. Without `shift`, -1 stands where the last
        token of a sequence would predict the first of the next.
    """
    kept = labels != ignore_index
    accounts = [numbers.to(labels.device).expand(labels.shape) for numbers in _accounts(batch, labels)]
    if not any(_share_rows(numbers[:, shift:], kept[:, shift:]) for numbers in accounts):
        mask = _mask(batch, labels)
        one = torch.zeros_like(labels, dtype=torch.int64)
        return (one if mask is None else one.masked_fill(mask == 0, -1)) if always else None
    begins = torch.stack([numbers[:, 1:] != numbers[:, :-1] for numbers in accounts]).any(0)
    segments = F.pad(begins.cumsum(1), (1, 0))
    return segments if shift else segments.masked_fill(F.pad(begins, (0, 1)), -1)


def shifted_segments(segments: Tensor) -> Tensor:
    """The segments of shifted labels: a label counts if the position before it is in the same sequence."""
    return segments[:, 1:].masked_fill(segments[:, 1:] != segments[:, :-1], -1)


def _share_rows(numbers: Tensor, used: Tensor) -> bool:
    """Whether labels of several sequences are used in one row."""
    if numbers.shape[1] == 0:
        return False
    outside = torch.iinfo(numbers.dtype)
    first = numbers.where(used, outside.max).amin(1)
    return bool((first < numbers.where(used, outside.min).amax(1)).any())


def _accounts(batch: Mapping[str, Any], labels: Tensor) -> Iterator[Tensor]:
    """Each input that says which sequence a position belongs to, as one number a position."""
    mask = _mask(batch, labels)
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape[-1] == labels.shape[-1]:
        # If a token has several positions, as in models of images and text, the first one is time.
        positions = positions[0] if positions.dim() == 3 else positions.reshape(-1, labels.shape[-1])
        begins = begins_after_the_first(positions)
        if mask is not None:
            begins = begins & (mask[:, 1:] != 0).to(begins.device)
        yield F.pad(begins.cumsum(1), (1, 0))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        ends = batch.get(name)
        if isinstance(ends, Tensor):
            places = torch.arange(labels.numel(), device=ends.device, dtype=ends.dtype)
            yield torch.bucketize(places, ends.flatten()[1:], right=True).view(labels.shape)
    numbers = batch.get("seq_idx")
    if isinstance(numbers, Tensor) and numbers.shape == labels.shape:
        yield numbers
    if mask is not None and not mask.is_floating_point() and mask.dtype is not torch.bool:
        # Some collators number the sequences of a row in its mask; 0 is padding.
        yield mask.clamp(min=1)


def _mask(batch: Mapping[str, Any], labels: Tensor) -> Tensor | None:
    mask = batch.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.shape == labels.shape else None


def refuse_flattened_labels(labels: Tensor, ignore_index: int) -> None:
    """Refuse the labels that `DataCollatorWithFlattening` makes of several whole texts.

    It puts the texts into one row and masks the first label of each, so that a single masked label is between
    two that count. If longer parts are masked, such as prompts, the labels do not show whether a row holds
    several texts: a conversation of several turns has such labels too.
    """
    labels = cast("Any", labels)
    if labels.dim() != 2 or labels.shape[0] != 1 or labels.shape[1] < 4 or labels.is_floating_point():
        return
    kept = labels[0] != ignore_index
    lone = kept[:-2] & ~kept[1:-1] & kept[2:]
    if bool(~kept[0] & lone.any()):
        raise ValueError(
            _PACKED.format(
                found="its labels are those of DataCollatorWithFlattening: one masked label between two that "
                "count, and the first masked"
            )
        )
