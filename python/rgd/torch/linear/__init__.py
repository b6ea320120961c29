"""Re-weighted cross-entropy of a linear head, without its logits: the function and the module."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rgd._extras import check_returns, with_extras
from rgd.torch._checks import check_class_weight, check_logit_adjustment
from rgd.torch._distributed import sync_of
from rgd.torch._head import Chunking, LinearHead
from rgd.torch._plan import plan_of
from rgd.torch._problem import Given, Options, problem_of
from rgd.torch._state import functional_state
from rgd.torch.functional import found_by, wanting, weigher_of
from rgd.torch.linear._call import compute_linear
from rgd.torch.loss import RGDLoss, options_of
from rgd.weightings import Weighting


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_adjustment: Tensor | None = None,
    z_loss: float = 0.0,
    tau: float | None = None,
    scale: float | None = None,
    weighting: Weighting | None = None,
    per: str = "element",
    where: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    segments: Tensor | None = None,
    num_segments: int | None = None,
    state: Any = None,
    logit_softcap: float | None = None,
    shift: bool = False,
    chunk_bytes: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    vocab_group: Any = None,
    process_group: Any = None,
    sync: bool = True,
    reference: Tensor | None = None,
    returns: tuple[str, ...] = (),
) -> Any:
    """`cross_entropy(F.linear(input, linear_weight, linear_bias), target)` without its logits in memory.

    The head of a language model: the input is worked through in chunks of some rows, and the logits of a
    chunk take the place of those of the last one. A pointwise weight is known inside the chunk, so that
    losses, weights and the gradients of `input`, `linear_weight` and `linear_bias` take one pass: three
    matrix products, as without weights. Weightings over the batch, `per="sample"` and `reduction="none"` take
    two passes and four products: the losses in the forward pass, the gradients in the backward pass. Where
    no gradient is asked for, only losses are computed; a frozen head gets no gradient computed. Rows whose
    target is ignored are left out on the CPU, and what they hold, be it NaN, reaches no result.

    Args:
        input: Shape (N, D) or (B, T, D), hidden states; float32, float64, float16 or bfloat16.
        linear_weight: Shape (C, D), the dtype of `input`. The weight of an `nn.Linear` head, or of an
            embedding that is tied to it.
        target: Class indices (any integer dtype) of the shape of `input` without D, or class probabilities of
            that shape and C.
        linear_bias: Shape (C,).
        weight: Class weights, shape (C,).
        ignore_index: Class index of targets that count for nothing.
        reduction: "none", "mean" or "sum".
        label_smoothing: In [0, 1].
        logit_adjustment: As for `cross_entropy`, shape (C,); added after a soft cap.
        z_loss: As for `cross_entropy`.
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        weighting: As for `cross_entropy`.
        per: As for `cross_entropy`: "element" weights each target, "sample" each entry of the leading axis, a
            sequence for an input of shape (B, T, D).
        where: As for `cross_entropy`, of the targets' shape.
        sample_weight: As for `cross_entropy`, of the targets' shape or of one entry a sample.
        groups: As for `cross_entropy`.
        normalizer: As for `cross_entropy`.
        segments: As for `cross_entropy`, of the shape of `target`, and so is what goes with them. With
            `shift`, target t + 1 counts only if it is of the segment of position t.
        num_segments: As for `cross_entropy`.
        state: As for `cross_entropy`.
        logit_softcap: If given, logits are `logit_softcap * tanh(z / logit_softcap)`, as in Gemma.
        shift: True where position t of the input, (B, T, D), predicts target t + 1, as in a causal language
            model. `target`, `where`, `sample_weight` and `groups` keep the shape (B, T): an entry belongs to
            the target at its place, and the first of each sequence is not used. The input is not
            copied.
        chunk_bytes: How many bytes the logits of a chunk may take; at least one row. None: 32 MiB, or an
            eighth of the head's gradient or 128 rows where that is more.
        accumulate_dtype: The dtype that the gradients of the head are summed in over the chunks; None for
            float32, and float64 for float64.
        vocab_group: The processes of a tensor-parallel head. Each gives the same `input` and `target` and its
            own slice of `linear_weight` and `linear_bias`, in the order of the ranks; `target` counts classes
            over all slices; `weight` and `logit_adjustment` hold all of them. Each gets the objective of the
            whole, the whole gradient of `input`, and that of its slice.
        process_group: As for `reweighted_mean`.
        sync: As for `reweighted_mean`.
        reference: As for `cross_entropy`, of the shape of the losses: with `shift` it is (B, T - 1).
        returns: As for `cross_entropy`, of the logits after a soft cap, read while a chunk is in memory. With
            `shift` they are (B, T - 1), as the losses.

    Returns:
        As `cross_entropy`; with `reduction="none"` of the targets' shape, (B, T - 1) with `shift`. With
        `state`: that and the new state; with `returns` as `cross_entropy`.

    Raises:
        IndexError: If a class index is out of range.
        TypeError: If a tensor's dtype does not fit.
        ValueError: If a shape, a device or a setting does not fit.

    Note:
        float16 is computed in float32, which takes a copy of the head. Tensor subclasses, `torch.func`
        transforms, forward-mode differentiation, exported graphs, class probabilities that require grad, and
        second derivatives make all logits, as `F.linear` does.

    Example:
        >>> import torch
        >>> from rgd.torch import linear_cross_entropy
        >>> hidden = torch.ones(2, 3, 4, requires_grad=True)
        >>> head = torch.zeros(5, 4, requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, head, torch.zeros(2, 3, dtype=torch.long), tau=1.0)
        >>> loss
        tensor(2.6535, grad_fn=...)
        >>> loss.backward()

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1, for the weights.
    """
    class_weight, adjustment = check_class_weight(weight), check_logit_adjustment(logit_adjustment)
    options = Options(ignore_index, label_smoothing, reduction, per, z_loss=z_loss).checked()
    chunking = Chunking(logit_softcap, shift, chunk_bytes, accumulate_dtype, vocab_group).checked()
    plan, sharing = plan_of(weighting, tau, scale), sync_of(process_group, sync)
    given = Given(
        input,
        target,
        class_weight,
        adjustment,
        where,
        sample_weight,
        groups,
        normalizer,
        segments,
        num_segments,
        reference,
    )
    problem = problem_of(given, options, LinearHead(linear_weight, linear_bias, chunking))
    if returns != () or plan.needs_entropy:
        returns = check_returns(returns)
        problem = wanting(problem, returns, plan)
    memory = functional_state(plan.weighting, state, problem.logits.device)
    weigher = weigher_of(problem, plan, memory, sharing)
    objective, _ = compute_linear(problem, weigher)
    if returns:
        return with_extras(objective, found_by(weigher), returns, state, weigher.state)
    return objective if state is None else (objective, weigher.state)


class LinearRGDLoss(RGDLoss):
    """A linear head and its re-weighted cross-entropy in one, without logits in memory.

    What `nn.LinearCrossEntropyLoss` is to `nn.CrossEntropyLoss`; see `linear_cross_entropy` for how it is
    computed. The other settings, `stats`, the state and what holds in eval mode are those of `RGDLoss`.

    Args:
        in_features: D, the size of a hidden state.
        num_classes: C. With `vocab_group`, the classes of this process's slice.
        bias: Whether the head has a bias.
        device: Where the head is made.
        dtype: The dtype of the head.
        linear_weight: A head that is there already, a parameter of shape (C, D), as `lm_head.weight`: it is
            shared, and `in_features` and `num_classes` may be left out. `tie` takes the whole module.
        weight: Class weights, shape (C,).
        ignore_index: Class index of targets that count for nothing.
        reduction: "none", "mean" or "sum".
        label_smoothing: In [0, 1].
        logit_adjustment: As for `cross_entropy`, shape (C,); added after a soft cap.
        z_loss: As for `cross_entropy`.
        returns: As for `RGDLoss`, of the logits after a soft cap.
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        weighting: As for `RGDLoss`.
        per: As for `RGDLoss`.
        evaluate: As for `RGDLoss`.
        warn: As for `RGDLoss`.
        logit_softcap: As for `linear_cross_entropy`.
        shift: As for `linear_cross_entropy`.
        chunk_bytes: As for `linear_cross_entropy`.
        accumulate_dtype: As for `linear_cross_entropy`.
        vocab_group: As for `linear_cross_entropy`.
        process_group: As for `RGDLoss`.
        sync: As for `RGDLoss`.

    Attributes:
        linear: The head, an `nn.Linear`, or what `tie` was given.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a setting is out of range, or sizes do not fit each other.

    Shape:
        Input (N, D) or (B, T, D), with class indices of shape (N,) or (B, T), or class probabilities with C
        as a last axis.

    Example:
        >>> import torch
        >>> from rgd.torch import LinearRGDLoss
        >>> criterion = LinearRGDLoss(4, 5, tau=1.0)
        >>> hidden, target = torch.randn(2, 3, 4, requires_grad=True), torch.zeros(2, 3, dtype=torch.long)
        >>> criterion(hidden, target).backward()
        >>> criterion.linear.weight.grad.shape
        torch.Size([5, 4])
        >>> lm_head = torch.nn.Linear(4, 5, bias=False)
        >>> LinearRGDLoss.tie(lm_head, shift=True).linear is lm_head
        True
    """

    def __init__(
        self,
        in_features: int | None = None,
        num_classes: int | None = None,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        linear_weight: nn.Parameter | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_adjustment: Tensor | None = None,
        z_loss: float = 0.0,
        returns: tuple[str, ...] = (),
        tau: float | None = None,
        scale: float | None = None,
        weighting: Weighting | None = None,
        per: str = "element",
        evaluate: str = "plain",
        warn: bool = False,
        logit_softcap: float | None = None,
        shift: bool = False,
        chunk_bytes: int | None = None,
        accumulate_dtype: torch.dtype | None = None,
        vocab_group: Any = None,
        process_group: Any = None,
        sync: bool = True,
    ) -> None:
        super().__init__(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            logit_adjustment=logit_adjustment, z_loss=z_loss, returns=returns, tau=tau, scale=scale,
            weighting=weighting, per=per, evaluate=evaluate, warn=warn, process_group=process_group,
            sync=sync,
        )  # fmt: skip
        self._chunking = Chunking(logit_softcap, shift, chunk_bytes, accumulate_dtype, vocab_group).checked()
        if linear_weight is None:
            if in_features is None or num_classes is None:
                raise TypeError(
                    "in_features and num_classes say how large the head is: LinearRGDLoss(in_features, "
                    "num_classes); for a head that is there already, LinearRGDLoss.tie(lm_head)"
                )
            self.linear: nn.Module = nn.Linear(
                in_features, num_classes, bias=bias, device=device, dtype=dtype
            )
            return
        if bias or device is not None or dtype is not None:
            raise ValueError("bias, device and dtype are for a new head: leave them out with linear_weight")
        self.linear = _head_of(linear_weight, in_features, num_classes)

    @classmethod
    def tie(cls, lm_head: nn.Module, **settings: Any) -> LinearRGDLoss:
        """The loss of an existing head, which it shares.

        Args:
            lm_head: A module with a `weight` of shape (C, D) and perhaps a `bias` of shape (C,): an
                `nn.Linear`, or the `nn.Embedding` of tied embeddings.
            **settings: Those of the loss but for `in_features`, `num_classes`, `bias`, `device`, `dtype` and
                `linear_weight`.

        Returns:
            A loss whose `linear` is `lm_head`.

        Raises:
            TypeError: If `lm_head` is no such module.
            ValueError: As the class.
        """
        weight = getattr(lm_head, "weight", None)
        if not isinstance(lm_head, nn.Module) or not isinstance(weight, Tensor) or weight.dim() != 2:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                "lm_head must be a module with a weight of shape (C, D), such as nn.Linear or "
                f"nn.Embedding, got {type(lm_head).__name__}: for a parameter, "
                "LinearRGDLoss(linear_weight=parameter)"
            )
        new = {"in_features", "num_classes", "bias", "device", "dtype", "linear_weight"} & set(settings)
        if new:
            raise TypeError(f"tie takes the head as it is: leave {', '.join(sorted(new))} out")
        classes, features = weight.shape
        loss = cls(features, classes, device="meta", **settings)
        loss.linear = lm_head
        return loss

    def forward(
        self,
        input: Tensor,
        target: Tensor | None = None,
        *args: Any,
        where: Tensor | None = None,
        sample_weight: Tensor | None = None,
        groups: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        segments: Tensor | None = None,
        num_segments: int | None = None,
        reference: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The re-weighted objective.

        Args:
            input: Hidden states, (N, D) or (B, T, D).
            target: Class indices of shape (N,) or (B, T), or class probabilities.
            *args: None.
            where: Mask, bool, of the targets' shape.
            sample_weight: As for `linear_cross_entropy`.
            groups: As for `linear_cross_entropy`.
            normalizer: As for `linear_cross_entropy`.
            segments: As for `linear_cross_entropy`.
            num_segments: As for `linear_cross_entropy`.
            reference: As for `linear_cross_entropy`.
            **kwargs: None.

        Returns:
            A scalar or, with `reduction="none"`, one value a target.

        Raises:
            IndexError, TypeError, ValueError: As `linear_cross_entropy`.
        """
        if target is None or args or kwargs:
            raise TypeError(
                "the loss takes input and target (and where=, sample_weight=, ...), got "
                + ("no target" if target is None else f"{len(args) + len(kwargs)} more arguments")
            )
        weight, bias = cast("Any", self.linear.weight), getattr(self.linear, "bias", None)
        plan, memory, sync = self._part_of(input, weight)
        is_plain = plan is not self._plan
        by_class = self.weight, self.logit_adjustment
        groups, reference = (None, None) if is_plain else (groups, reference)
        more = normalizer, segments, num_segments, reference
        given = Given(input, target, *by_class, where, sample_weight, groups, *more)
        problem = problem_of(given, options_of(self, not is_plain), LinearHead(weight, bias, self._chunking))
        returns = self._returns
        if returns or plan.needs_entropy:
            problem = wanting(problem, returns, plan)
        weigher = weigher_of(problem, plan, memory, sync)
        objective, record = compute_linear(problem, weigher)
        if returns:
            self._keep_extras(found_by(weigher))
        if not is_plain:
            self._keep(record)
        return objective

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        given = {name: value for name, value in self._chunking._asdict().items() if value}
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in given.items())])


def _head_of(weight: nn.Parameter, in_features: int | None, num_classes: int | None) -> nn.Module:
    """A head around a parameter that is there already."""
    if not isinstance(weight, nn.Parameter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            "linear_weight must be an nn.Parameter, as lm_head.weight is, got "
            f"{type(weight).__name__}: LinearRGDLoss.tie(lm_head) takes a module"
        )
    if weight.dim() != 2:
        raise ValueError(f"linear_weight must have shape (C, D), got {tuple(weight.shape)}")
    classes, features = weight.shape
    if in_features not in (None, features) or num_classes not in (None, classes):
        raise ValueError(
            f"linear_weight has shape {(classes, features)}, which does not fit "
            f"in_features={in_features} and num_classes={num_classes}: leave these out"
        )
    head = nn.Linear(features, classes, bias=False, device="meta")
    head.weight = weight
    return head


cast("Any", torch.jit).ignore(LinearRGDLoss.forward)
