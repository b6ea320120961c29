"""`use_linear_rgd`: the loss of a causal language model of transformers, re-weighted and without logits."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Generator
from typing import Any, cast

import torch
from torch import Tensor, nn

from rgd.stats import WeightStats
from rgd.torch._linear_checks import Chunking
from rgd.torch.backends._registry import autocasts
from rgd.torch.linear import LinearRGDLoss
from rgd.weightings import Weighting

# Values that take the place of logits, to see what a model does to them before its loss.
_PROBES = (0.5, 64.0)
_HALF = (torch.float16, torch.bfloat16)


def use_linear_rgd(
    model: Any,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    per: str = "element",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    evaluate: str = "plain",
    chunk_bytes: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    process_group: Any = None,
    sync: bool = True,
) -> LinearRGD:
    """Let a causal language model compute its loss re-weighted and without logits.

    From then on, where the model is trained with labels, its head and its loss are one
    `rgd.torch.linear_cross_entropy`: `outputs.loss` is the re-weighted objective and `outputs.logits` is
    None. The rest of its forward pass is its own. Labels are shifted as the model does it, `shift_labels` are
    taken as they are, and with `num_items_in_batch`, which the `Trainer` gives, the objective is
    `sum_i w_i l_i / num_items_in_batch`. Calls without labels, as in generation, and evaluations are as
    before.

    Args:
        model: A causal language model of transformers, before it is wrapped or compiled. One with adapters on
            other layers than the head is fine.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` is given.
        tau: Short for `weighting=KL(tau)`.
        per: "element" weights each token by its own loss; "sample" weights all tokens of a row by their mean
            loss.
        weight: Class weights, shape (C,).
        ignore_index: The label that counts for nothing. The `Trainer` counts with -100.
        label_smoothing: In [0, 1]; `TrainingArguments.label_smoothing_factor` makes the `Trainer` compute
            another loss, from logits.
        evaluate: "plain" leaves the model as it was where it is in eval mode and gradients are off: its own
            loss, with logits. "weighted" computes the re-weighted loss there too, without logits.
        chunk_bytes: As for `linear_cross_entropy`.
        accumulate_dtype: As for `linear_cross_entropy`.
        process_group: As for `RGDLoss`.
        sync: As for `RGDLoss`.

    Returns:
        A handle, which is a context manager too: `remove()` or the end of the `with` block give the model its
        own loss back; `stats()` describes the weights of the last call.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of range; if the model has no linear head or another loss than that
            of causal language models; if it is patched already.

    Note:
        The first call checks that the model hands the head's output to its loss as it is, but for
        `final_logit_softcapping` and a logit scale of its configuration, and raises a `RuntimeError` if not.

    Example:
        >>> with use_linear_rgd(model, tau=4.0) as handle:  # doctest: +SKIP
        ...     trainer.train()
        >>> handle.stats().effective_sample_size  # doctest: +SKIP

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    model = _causal_model(model)
    head = _head_of(model)
    softcap, scale = _logit_settings(model)
    criterion = LinearRGDLoss.tie(
        head, weighting=weighting, tau=tau, per=per, weight=weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, evaluate=evaluate, logit_softcap=softcap, chunk_bytes=chunk_bytes,
        accumulate_dtype=accumulate_dtype, process_group=process_group, sync=sync,
    )  # fmt: skip
    return LinearRGD(model, criterion, scale)


class LinearRGD:
    """What `use_linear_rgd` returns; see there.

    Args:
        model: The model, which is patched here.
        criterion: The loss of its head.
        scale: What the model multiplies its logits by.
    """

    def __init__(self, model: Any, criterion: LinearRGDLoss, scale: float) -> None:
        self._model = model
        self._loss = _HeadLoss(criterion, scale)
        self._active = True
        # What stood in the instance, not in its class: a copy of the model must not call this one.
        self._before: Any = _own(model).get("forward")
        original = cast("Any", type(model)).forward

        @functools.wraps(original if self._before is None else self._before)
        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            before: Any = functools.partial(original, model) if self._before is None else self._before
            return self._forward(model, before, args, kwargs)

        vars(forward)["linear_rgd"] = self
        self._patched = types.MethodType(cast("Any", forward), model)
        model.forward = self._patched

    @property
    def criterion(self) -> LinearRGDLoss:
        """The loss of the head."""
        return self._loss.criterion

    @property
    def weighting(self) -> Weighting:
        """What turns losses into weights; another may be set between steps, as `WeightingSchedule` does."""
        return self.criterion.weighting

    @weighting.setter
    def weighting(self, weighting: Weighting) -> None:
        self.criterion.weighting = weighting

    def stats(self) -> WeightStats:
        """What the weights of the last weighted call were like, as `RGDLoss.stats()` tells."""
        return self.criterion.stats()

    def remove(self) -> None:
        """Give the model its own loss back; once more does nothing."""
        self._active = False
        if _own(self._model).get("forward") is not self._patched:
            return  # something has been wrapped around it, and calls through
        if self._before is None:
            del self._model.forward
        else:
            self._model.forward = self._before

    def __enter__(self) -> LinearRGD:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"use_linear_rgd({type(self._model).__name__}, {self.criterion.extra_repr()})"

    def _forward(self, model: Any, before: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1:  # labels may be among them
            bound = inspect.signature(cast("Any", type(model)).forward).bind_partial(model, *args)
            args, kwargs = (), {**dict(list(bound.arguments.items())[1:]), **kwargs}
        trains = model.training or torch.is_grad_enabled() or self.criterion.evaluate == "weighted"
        # fused_lm_head is a head of TRL's, with outputs of its own.
        if not self._active or kwargs.get("labels") is None or not trains or kwargs.get("fused_lm_head"):
            return before(*args, **kwargs)
        as_tuple = kwargs.pop("return_dict", None) is False or model.config.return_dict is False
        head = _head_of(model)
        self._loss.attach(head, model.training)
        call = _Call(self._loss, kwargs)
        # Where accelerate has put hooks around the head, they stay.
        place = "_old_forward" if hasattr(head, "_old_forward") else "forward"
        with _instead(head, place, call.head), _instead(model, "_loss_function", call.loss):
            try:
                outputs = before(*args, **kwargs, return_dict=True)
            except Exception as error:
                if call.stage != "logits made":
                    raise
                raise RuntimeError(_own_loss(model)) from error
        if call.stage != "done":
            raise RuntimeError(_own_loss(model))
        outputs.logits = None
        return outputs.to_tuple() if as_tuple else outputs


class _HeadLoss:
    """The loss of the head of a model, and what the model does between the two."""

    def __init__(self, criterion: LinearRGDLoss, scale: float) -> None:
        self.criterion = criterion
        self.scale = scale
        self.checked = False
        chunking = cast("Chunking", getattr(criterion, "_chunking"))  # noqa: B009
        self.softcap = chunking.logit_softcap
        self.chunkings = (chunking._replace(shift=False), chunking._replace(shift=True))

    def attach(self, head: nn.Module, training: bool) -> None:
        """Take the head and the mode of a call; the head may have been replaced since the last one."""
        self.criterion.training = training
        if self.criterion.linear is not head:
            self.criterion.linear = head

    def objective(self, hidden: Tensor, labels: Tensor, shift: bool, items: Tensor | int | None) -> Tensor:
        """The objective of a micro-batch; float32 for half precision."""
        criterion = self.criterion
        object.__setattr__(criterion, "_chunking", self.chunkings[shift])
        criterion.reduction = "mean" if items is None else "sum"
        if criterion.weight is not None:
            criterion.weight = criterion.weight.to(hidden.device)
        kind = hidden.device.type
        # Under autocast the loss of half precision is float32, as the models' own are.
        single = hidden.dtype in _HALF and not autocasts(kind)
        with torch.autocast(kind, dtype=hidden.dtype) if single else contextlib.nullcontext():
            hidden = hidden if self.scale == 1 else hidden * self.scale
            objective: Tensor = criterion(hidden, labels.to(hidden.device))
        if items is None:
            return objective
        return objective / (items.to(objective.device) if isinstance(items, Tensor) else items)

    def check(self, found: Tensor) -> None:
        """Refuse a model that changes its logits in a way that is not known here."""
        expected = torch.tensor(_PROBES, dtype=torch.float64) * self.scale
        expected = expected if self.softcap is None else self.softcap * torch.tanh(expected / self.softcap)
        probes = found.detach().reshape(-1)[1:].to("cpu", torch.float64)
        seen, wanted = cast("Any", probes).tolist(), cast("Any", expected).tolist()
        # A model in bfloat16 rounds them by 2^-9 in each of up to three steps.
        if probes.shape != expected.shape or not torch.allclose(probes, expected, rtol=2**-7, atol=0):
            raise RuntimeError(
                "this model changes its logits between head and loss in a way that use_linear_rgd does not "
                f"know: {list(_PROBES)} became {seen}, and by final_logit_softcapping and the logit scale of "
                f"its configuration they should become {wanted}. Apply "
                "rgd.torch.linear_cross_entropy to its hidden states yourself, or use rgd_loss_func"
            )
        self.checked = True


class _Call:
    """One forward pass: what takes the place of the head, and what of the loss."""

    def __init__(self, loss: _HeadLoss, kwargs: dict[str, Any]) -> None:
        self.of_head = loss
        self.shift = kwargs.get("shift_labels") is None
        self.labels: Tensor = kwargs["labels" if self.shift else "shift_labels"]
        self.items = kwargs.get("num_items_in_batch")
        self.standin: Tensor | None = None
        self.stage = "begun"

    def head(self, hidden: Tensor) -> Tensor:
        """The objective, where the head gives logits; and values that show what the model does to these."""
        # In the head's own forward pass its parameters are at hand, wherever they are kept between calls.
        objective = self.of_head.objective(hidden, self.labels, self.shift, self.items)
        self.standin = torch.cat([objective.reshape(1), objective.new_tensor(_PROBES)]).view(1, 1, -1)
        self.stage = "logits made"
        return self.standin

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The objective, where the model's loss function gives the plain loss."""
        self.stage = "done"
        logits: Tensor = args[0] if args else kwargs["logits"]
        if not self.of_head.checked:
            self.of_head.check(logits)
        unchanged = self.of_head.scale == 1 and self.of_head.softcap is None
        # What arrives has passed the hooks of the head's module, which those who shard parameters count on.
        return (logits if unchanged else cast("Tensor", self.standin)).view(-1)[0]


@contextlib.contextmanager
def _instead(owner: Any, name: str, value: Any) -> Generator[None]:
    """Another value of an attribute of an instance, for a while."""
    missing = object()
    before = _own(owner).get(name, missing)
    _own(owner)[name] = value
    try:
        yield
    finally:
        if before is missing:
            del _own(owner)[name]
        else:
            _own(owner)[name] = before


def _own(owner: Any) -> dict[str, Any]:
    """The attributes of an instance, without those of its class."""
    return owner.__dict__


def _causal_model(model: Any) -> Any:
    """The model whose forward pass has the head in it, if its loss is that of causal language models."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not callable(getattr(model, "get_output_embeddings", None)):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        hint = "for a model of your own, use rgd.torch.LinearRGDLoss.tie(head)"
        hint = hint if inner is None else f"give the {type(inner).__name__} inside it, before it is wrapped"
        raise ValueError(
            "use_linear_rgd takes a causal language model of transformers, which has "
            f"get_output_embeddings(), got {name}: {hint}"
        )
    if getattr(_own(model).get("forward"), "linear_rgd", None) is not None:
        raise ValueError(f"this {name} is patched by use_linear_rgd already: remove() the first handle")
    config = getattr(model, "config", None)
    loss = getattr(model, "loss_function", None)
    kind = getattr(loss, "__name__", type(loss).__name__)
    if kind != "ForCausalLMLoss" or getattr(config, "is_encoder_decoder", False):
        how = "is an encoder-decoder model" if kind == "ForCausalLMLoss" else f"has the loss {kind}"
        raise ValueError(
            f"use_linear_rgd replaces the loss of causal language models, ForCausalLMLoss, and {name} {how}: "
            "apply rgd.torch.linear_cross_entropy to its hidden states yourself, or use rgd_loss_func"
        )
    return model


def _head_of(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
        return head
    got = "None" if head is None else f"a {type(head).__module__}.{type(head).__name__}"
    raise ValueError(
        f"the head of {type(model).__name__}, get_output_embeddings(), must be an nn.Linear, got {got}: "
        "leave the head out of adapters and quantisation, or use rgd_loss_func, which works on logits"
    )


def _logit_settings(model: Any) -> tuple[float | None, float]:
    """The softcap of a model's logits, and the factor before it, from its configuration."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if isinstance(factor, (int, float)):
            return softcap, float(factor)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return softcap, 1.0
    return softcap, divisor if config.model_type == "hyperclovax" else 1 / divisor


def _own_loss(model: Any) -> str:
    return (
        f"{type(model).__name__} computes its loss in another way than by self.loss_function(logits, "
        "labels): apply rgd.torch.linear_cross_entropy to its hidden states yourself, or use rgd_loss_func, "
        "which works on logits"
    )
