"""`use_linear_rgd`: the loss of a causal language model of transformers, re-weighted and without logits."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Generator
from typing import Any, cast

import torch
from torch import Tensor, nn

from rgd.integrations._criterion import HasCriterion
from rgd.integrations._inputs import keywords_of, normalizer_of, refuse_unknown, segments_of_rows
from rgd.integrations._sample_weight import COLUMN, of_labels
from rgd.torch._head import Chunking
from rgd.torch._modes import autocasts, evaluates
from rgd.torch.functional import cross_entropy
from rgd.torch.linear import LinearRGDLoss
from rgd.weightings import ERM, Weighting

# The model gets these values instead of logits. They show how it changes logits before its loss.
_PROBES = (0.5, 64.0)
_HALF = (torch.float16, torch.bfloat16)
# Replicas of a model run in threads of their own, and share one criterion.
_ONE_CALL = threading.RLock()


def use_linear_rgd(
    model: Any,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    per: str = "element",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    evaluate: str = "plain",
    chunk_bytes: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    process_group: Any = None,
    sync: bool = True,
    returns: tuple[str, ...] = (),
) -> LinearRGD:
    """Let a causal language model compute its loss re-weighted and without logits.

    After this call, training with labels computes head and loss together by
    `rgd.torch.linear_cross_entropy`: `outputs.loss` is the re-weighted objective and `outputs.logits` is
    None. The rest of the forward pass does not change. Labels are shifted as the model does it, and
    `shift_labels` are not shifted. The `Trainer` gives `num_items_in_batch`, and the objective is then
    `sum_i w_i l_i / num_items_in_batch`. Calls without labels, as in generation, and evaluations, which run
    under `torch.no_grad()` or in inference mode, are as before.

    The model takes `sample_weight=` too, of the labels' shape or one a row, in evaluations as well. The
    weighted losses are then divided by the sum of these weights over all micro-batches of a step, which
    `RGDTrainer` counts. In a call of your own, leave `num_items_in_batch` out or give that sum as a float.

    Copies of the model and the replicas of `nn.DataParallel` use their own parameters, and share the
    weighting with its state. Weights that depend on the batch are computed from a replica's part of it.

    Args:
        model: A causal language model of transformers, before it is wrapped or compiled. It may have adapters
            on other layers than the head.
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` nor `scale` is given.
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        per: "element" weights each token by its own loss; "sample" weights all tokens of a sequence by their
            mean loss. Sequences that are packed into a row are recognised by `position_ids` that restart,
            `cu_seq_lens_q`, `seq_idx` or an `attention_mask` that numbers them. The last token of a sequence
            then predicts nothing of the next one.
        weight: Class weights, shape (C,).
        ignore_index: The label of targets that do not count. The `Trainer` counts with -100.
        label_smoothing: In [0, 1]; `TrainingArguments.label_smoothing_factor` makes the `Trainer` compute
            another loss, from logits.
        evaluate: With "plain" an evaluation returns the model's own loss, with logits. "weighted" computes
            the re-weighted loss there too, without logits, and does not change the state.
        chunk_bytes: As for `linear_cross_entropy`.
        accumulate_dtype: As for `linear_cross_entropy`.
        process_group: As for `RGDLoss`.
        sync: As for `RGDLoss`.
        returns: As for `LinearRGDLoss`: `criterion.extras` of the handle then has these of the last call.

    Returns:
        A handle, which is a context manager too. `remove()` or the end of the `with` block restores the
        model's own loss. `stats()` describes the weights of the last call.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of range; if the model has no linear head or another loss than that
            of causal language models; if it is patched already.

    Note:
        The first call checks that the model passes the head's output to its loss without any change other
        than `final_logit_softcapping` and a logit scale of its configuration. If not, it raises a
        `RuntimeError`. A call with labels and a keyword that no part of the model takes, such as `groups`,
        raises a `TypeError`; the model alone would ignore it.

    Example:
        >>> with use_linear_rgd(model, tau=4.0) as handle:  # doctest: +SKIP
        ...     trainer.train()
        >>> handle.stats().effective_sample_size  # doctest: +SKIP

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    model = _causal_model(model)
    head = _head_of(model)
    softcap, logit_scale = _logit_settings(model)
    criterion = LinearRGDLoss.tie(
        head, weighting=weighting, tau=tau, scale=scale, per=per, weight=weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, evaluate=evaluate, logit_softcap=softcap, chunk_bytes=chunk_bytes,
        accumulate_dtype=accumulate_dtype, process_group=process_group, sync=sync, returns=returns,
    )  # fmt: skip
    return LinearRGD(model, criterion, logit_scale)


class LinearRGD(HasCriterion):
    """The handle that `use_linear_rgd` returns; see there.

    Args:
        model: The model, which is patched here.
        criterion: The loss of its head.
        logit_scale: The factor by which the model multiplies its logits.
    """

    def __init__(self, model: Any, criterion: LinearRGDLoss, logit_scale: float) -> None:
        self._model = model
        self._loss = _HeadLoss(criterion, logit_scale)
        self._active = True
        self.counts_weights = False  # whether num_items_in_batch is a sum of weights
        original = cast("Any", type(model)).forward
        self._known = keywords_of(model)
        # A forward that was set on the instance is kept on it, so that a copy of the model has its own.
        before: Any = _own(model).get("forward")
        self._place = f"_forward_before_linear_rgd_{id(self):x}"
        # This flag makes the `Trainer` count the labels of a step, for the loss here.
        self._model_takes_items = _takes_items(model)
        self._said: Any = _own(model).get("accepts_loss_kwargs")
        if not self._model_takes_items:
            model.accepts_loss_kwargs = True

        @functools.wraps(original if before is None else before)
        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            before: Any = _own(model).get(self._place)
            return self._forward(model, before or functools.partial(original, model), args, kwargs)

        vars(forward)["linear_rgd"] = self
        self._patched = types.MethodType(cast("Any", forward), model)
        if before is not None:
            _own(model)[self._place] = before
        model.forward = self._patched
        model._replicate_for_data_parallel = types.MethodType(_replicate_for_data_parallel, model)

    @property
    def criterion(self) -> LinearRGDLoss:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The loss of the head."""
        return self._loss.criterion

    def remove(self) -> None:
        """Restore the model's own loss. A second call does nothing."""
        self._active = False
        own = _own(self._model)
        if own.get("forward") is not self._patched:
            return  # another wrapper is around it, and calls it
        del own["forward"], own["_replicate_for_data_parallel"]
        if not self._model_takes_items:
            del own["accepts_loss_kwargs"]
            own.update({} if self._said is None else {"accepts_loss_kwargs": self._said})
        if self._place in own:
            own["forward"] = own.pop(self._place)

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
        items = kwargs.get("num_items_in_batch")
        if not self._model_takes_items:
            kwargs.pop("num_items_in_batch", None)
        weight: Tensor | None = kwargs.pop(COLUMN, None)
        # fused_lm_head is TRL's head, which has other outputs.
        if not self._active or kwargs.get("labels") is None or kwargs.get("fused_lm_head"):
            if weight is not None:
                raise TypeError(
                    "sample_weight= weights the losses of labels that use_linear_rgd computes, and this call "
                    "has none: leave it out"
                )
            return before(*args, **kwargs)
        refuse_unknown(model, self._known, kwargs, "use_linear_rgd")
        if weight is not None and isinstance(items, (Tensor, int)) and not self.counts_weights:
            raise TypeError(
                "num_items_in_batch counts labels, and with sample_weight the losses are divided by the sum "
                "of the weights: train with RGDTrainer, which counts it, leave num_items_in_batch out, or "
                "give the sum as a float"
            )
        if self.criterion.evaluate == "plain" and evaluates():
            if weight is None:
                return before(*args, **kwargs)
            plain = functools.partial(_plain_loss, weight, items, self.criterion.ignore_index)
            with _instead(model, "_loss_function", plain):
                return before(*args, **kwargs)
        as_tuple = kwargs.pop("return_dict", None) is False or model.config.return_dict is False
        head = _head_of(model)
        call = _Call(self._loss, head, model.training, kwargs, items)
        call.weight = weight
        if self.criterion.per == "sample":
            by_token = weight is not None and weight.dim() > 1
            ignored = self.criterion.ignore_index
            call.segments = segments_of_rows(kwargs, call.labels, call.shift, ignored, always=by_token)
            if weight is not None and call.segments is not None:
                call.weight = of_labels(weight, call.labels)
        # This keeps the hooks that accelerate may have put around the head.
        place = "_old_forward" if hasattr(head, "_old_forward") else "forward"
        # Replicas share one dict of hooks, so this hook goes into a copy of it.
        hooks = {**cast("Any", head)._forward_hooks, "use_linear_rgd": call.leave}
        with (
            _instead(head, place, call.head),
            _instead(head, "_forward_hooks", hooks),
            _instead(model, "_loss_function", call.loss),
        ):
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
    """The loss of a model's head, and the changes that the model makes to logits before the loss."""

    def __init__(self, criterion: LinearRGDLoss, logit_scale: float) -> None:
        self.criterion = criterion
        self.logit_scale = logit_scale
        self.checked = False
        chunking = cast("Chunking", getattr(criterion, "_chunking"))  # noqa: B009
        self.softcap = chunking.logit_softcap
        self.chunkings = (chunking._replace(shift=False), chunking._replace(shift=True))

    def objective(self, call: _Call, hidden: Tensor) -> Tensor:
        """The objective of a micro-batch; float32 for half precision."""
        with contextlib.nullcontext() if torch.compiler.is_compiling() else _ONE_CALL:
            return self._objective(call, hidden)

    def _objective(self, call: _Call, hidden: Tensor) -> Tensor:
        criterion = self.criterion
        criterion.training = call.training
        if criterion.linear is not call.module:  # it may have been replaced since the last call
            criterion.linear = call.module
        object.__setattr__(criterion, "_chunking", self.chunkings[call.shift])
        if criterion.weight is not None:
            criterion.weight = criterion.weight.to(hidden.device)
        kind = hidden.device.type
        # Under autocast the loss of half precision is float32, as that of the models is.
        single = hidden.dtype in _HALF and not autocasts(kind)
        with torch.autocast(kind, dtype=hidden.dtype) if single else contextlib.nullcontext():
            hidden = hidden if self.logit_scale == 1 else hidden * self.logit_scale
            normalizer = normalizer_of(call.items, hidden.device)
            labels, segments, weight = (
                None if one is None else one.to(hidden.device)
                for one in (call.labels, call.segments, call.weight)
            )
            return criterion(hidden, labels, sample_weight=weight, normalizer=normalizer, segments=segments)

    def check(self, found: Tensor) -> None:
        """Refuse a model that changes its logits in a way that is not known here."""
        expected = torch.tensor(_PROBES, dtype=torch.float64) * self.logit_scale
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
    """One forward pass: the functions that replace the head and the loss of the model."""

    def __init__(
        self, loss: _HeadLoss, head: nn.Module, training: bool, kwargs: dict[str, Any], items: Any
    ) -> None:
        self.of_head = loss
        self.module = head
        self.training = training
        self.shift = kwargs.get("shift_labels") is None
        self.labels: Tensor = kwargs["labels" if self.shift else "shift_labels"]
        self.items = items
        self.segments: Tensor | None = None
        self.weight: Tensor | None = None
        self.standin: Tensor | None = None
        self.stage = "begun"

    def head(self, hidden: Tensor) -> Tensor:
        """Replaces the head: computes the objective, and returns probe values instead of logits."""
        # Inside the head's forward pass its parameters are gathered, also if they are sharded between calls.
        objective = self.of_head.objective(self, hidden)
        self.stage = "logits made"
        return torch.cat([objective.reshape(1), objective.new_tensor(_PROBES)]).view(1, 1, -1)

    def leave(self, module: nn.Module, inputs: Any, standin: Tensor) -> None:
        """Keep the output of the head's module, after hooks such as those that shard parameters."""
        self.standin = standin

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Replaces the model's loss function: returns the objective."""
        self.stage = "done"
        ignored = self.of_head.criterion.ignore_index
        if kwargs.get("ignore_index", ignored) != ignored:
            raise ValueError(
                f"the call says ignore_index={kwargs['ignore_index']}, and the loss ignores {ignored}: give "
                "use_linear_rgd(ignore_index=...) instead"
            )
        logits: Tensor = args[0] if args else kwargs["logits"]
        if not self.of_head.checked:
            self.of_head.check(logits)
        return cast("Tensor", self.standin).view(-1)[0]


def _plain_loss(weight: Tensor, items: Any, ignored: int, *args: Any, **kwargs: Any) -> Tensor:
    """The loss of causal language models with weighted labels, which replaces the loss of a model."""
    named = dict(zip(("logits", "labels"), args, strict=False), **kwargs)
    logits, labels = named["logits"].float(), named.get("shift_labels")
    if labels is None:
        logits, labels = logits[:, :-1], named["labels"][:, 1:]
        weight = weight[:, 1:] if weight.dim() > 1 else weight
    labels = labels.to(logits.device)
    return cross_entropy(
        logits.flatten(0, -2), labels.flatten(), weighting=ERM(), ignore_index=ignored,
        sample_weight=of_labels(weight.to(logits.device), labels).flatten(),
        normalizer=normalizer_of(items, logits.device),
    )  # fmt: skip


@contextlib.contextmanager
def _instead(owner: Any, name: str, value: Any) -> Generator[None]:
    """Set an attribute of an instance within a `with` block."""
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


def _replicate_for_data_parallel(module: Any) -> Any:
    """The replica of a patched model for `nn.DataParallel`; methods bound to the model are bound to it."""
    replica = cast("Any", type(module))._replicate_for_data_parallel(module)
    for name, method in _own(module).items():
        if isinstance(method, types.MethodType) and method.__self__ is module:
            _own(replica)[name] = types.MethodType(method.__func__, replica)
    return replica


def _own(owner: Any) -> dict[str, Any]:
    """The attributes of an instance, without those of its class."""
    return owner.__dict__


def _takes_items(model: Any) -> bool:
    """Whether a model itself takes `num_items_in_batch`, found out as the `Trainer` does."""
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    parameters = inspect.signature(cast("Any", type(model)).forward).parameters.values()
    return any(one.kind is one.VAR_KEYWORD or one.name == "num_items_in_batch" for one in parameters)


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


def handle_of(model: Any) -> LinearRGD | None:
    """The handle of `use_linear_rgd` for a model, which accelerate may have wrapped; None without one."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward: Any = _own(model).get("forward")
    while forward is not None:
        found = getattr(forward, "linear_rgd", None)
        if found is not None:
            return found
        forward = getattr(forward, "__wrapped__", None)
    return None


def _own_loss(model: Any) -> str:
    return (
        f"{type(model).__name__} computes its loss in another way than by self.loss_function(logits, "
        "labels): apply rgd.torch.linear_cross_entropy to its hidden states yourself, or use rgd_loss_func, "
        "which works on logits"
    )
