"""`RGDLoss`, the loss module."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from rgd._extras import check_returns
from rgd.stats import WeightStats
from rgd.torch._checks import (
    EVALUATIONS,
    check_choice,
    check_class_weight,
    check_logit_adjustment,
    check_losses,
    check_not_broadcast,
)
from rgd.torch._dial import Dial, number_of
from rgd.torch._distributed import Sync
from rgd.torch._measure import check_groups
from rgd.torch._modes import evaluates, in_transform, is_exporting, recomputes
from rgd.torch._plan import Plan, Weigher
from rgd.torch._problem import Given, Options, problem_of
from rgd.torch._state import Memory, WeightingState, state_for
from rgd.torch.backends._extras import Extras
from rgd.torch.backends.rust import Accepted, Left, accepted, again, record_of
from rgd.torch.functional import compute, found_by, reweighted, wanting, weigher_of
from rgd.torch.segments import check_segments
from rgd.torch.stats import Advisor, Record, Totals, remark_on
from rgd.weightings import ERM, Weighting
from rgd.weightings._call import refuse_without_logits, resolve_weighting


class InitSignature:
    """The signature of a class, which `__new__` would hide; that of an instance is the one of its call."""

    def __get__(self, instance: Any, owner: Any) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")
        of_init = inspect.signature(owner.__init__)
        return of_init.replace(parameters=list(of_init.parameters.values())[1:])


class RGDLoss(Dial, nn.Module):
    """Cross-entropy, or any per-sample loss, in which each sample is weighted by its own loss.

    A drop-in for `nn.CrossEntropyLoss`.

    Each sample's loss `l_i` is multiplied by a weight `w_i`, a constant to autograd, and the products are
    reduced as `nn.CrossEntropyLoss` reduces losses. The weighting is a dial, `w_i = exp(scale * min(l_i,
    tau))`:

    - `RGDLoss(scale=-0.7)` resists wrong labels: a sample of large loss weighs less;
    - `RGDLoss(weighting=rgd.ERM())` is plain training, `nn.CrossEntropyLoss`;
    - `RGDLoss(tau=3.0)` trains harder on what is hard: `scale` is `1 / (tau + 1)` (the paper's RGD, and with
      `tau=1.0` the default).

    Any other member of `rgd`, such as `rgd.CVaR(0.1)`, or a weighting of your own takes its place. Unlike in
    `nn.CrossEntropyLoss`, a class without mass in the target adds nothing where its logit is -inf.

    Args:
        weight: Class weights, shape (C,); kept in the state dict, as in `nn.CrossEntropyLoss`.
        ignore_index: Class index of targets that count for nothing.
        reduction: "none", "mean" or "sum".
        label_smoothing: In [0, 1].
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        weighting: What turns losses into weights, a member of `rgd` or a subclass of `rgd.Weighting` of your
            own; `KL(tau=1.0)` if none of the three is given.
        base: The per-sample loss to re-weight instead of cross-entropy: a callable whose result has at
            least one axis, such as `nn.BCEWithLogitsLoss(reduction="none")`. It takes its own settings, so
            `weight`, `ignore_index`, `label_smoothing` and `logit_adjustment` must be left alone.
        per: "element" weights each target by its own loss; "sample" weights all targets of a sample of the
            leading axis (a sequence, an image) by their mean loss.
        logit_adjustment: Numbers `a`, shape (C,), constants: the loss is that of `input + a`, in training and
            in evaluation; kept in the state dict. `rgd.log_prior` makes them of class counts, for a rare
            class. Predictions come from the logits without it.
        z_loss: As for `cross_entropy`: a number >= 0, for training alone.
        returns: As for `cross_entropy`, but for `base`: names out of "entropy", "logsumexp" and "correct".
            Each call, an evaluation too, then leaves these of its logits in `extras`.
        evaluate: "plain" for the unweighted loss where nothing is trained: under `torch.no_grad()` or
            inference mode, whatever the mode of the module, and in eval mode on losses that need no gradient.
            Such a call asks no other process, updates no state and leaves nothing for `stats`. Class weights,
            reduction and `sample_weight` count as in training. "weighted" keeps the weights: for training
            without gradients. It updates no state there either.
        inplace: True to let the gradient take the place of the logits, as in `cross_entropy`.
        warn: Whether to warn, once, where the statistics of a call in training mode say that re-weighting
            cannot matter: all losses are above the clip, or near zero. It looks at the calls 1, 2, 4, 8 and
            so on, outside of compiled graphs.
        process_group: For a weighting that depends on the batch, the processes that share it: the weights
            are those of their losses together. None: the default group, once `torch.distributed` is
            initialised. Every process of the group then has to call the loss, one with an empty batch too;
            where only some do, as in an evaluation by one process, use a loss with `sync=False`. Pointwise
            weights ask no one.
        sync: False for weights of this process's losses alone.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a setting is out of range, or settings exclude each other.

    Shape:
        As `nn.CrossEntropyLoss`: input (C,), (N, C) or (N, C, d1, ..., dk) with class indices (any integer
        dtype) of the same shape without C, or class probabilities of the same shape. With `base`: whatever
        it takes.

    Example:
        >>> import torch
        >>> criterion = RGDLoss(tau=1.0)
        >>> logits = torch.zeros(8, 3, requires_grad=True)
        >>> criterion(logits, torch.arange(8) % 3).backward()
        >>> criterion.stats().effective_sample_size
        8.0

    References:
        Kumar et al., "Stochastic Re-weighted Gradient Descent via Distributionally Robust Optimization",
        TMLR 2024, arXiv 2306.09222, Algorithm 1.
    """

    # TorchScript compiles properties, and reads annotations of a class but not those in its methods.
    __jit_unused_properties__ = (
        "weighting", "tau", "scale", "backend", "returns", "extras", "last_losses", "last_weights", "_record",
    )  # fmt: skip
    __jit_ignored_attributes__ = ("tau", "scale")  # they raise where the weighting has none
    __signature__ = InitSignature()
    z_loss = 0.0  # of a loss, too, that an earlier release has pickled
    _accepted = _extras = _left = None
    _returns = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> RGDLoss:
        """Without `base`, an instance of `nn.CrossEntropyLoss` too: some trainers ask for that class."""
        kind: Any = _RGDCrossEntropyLoss if cls is RGDLoss and kwargs.get("base") is None else cls
        return super().__new__(kind)

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        tau: float | None = None,
        scale: float | None = None,
        weighting: Weighting | None = None,
        base: Callable[..., Tensor] | None = None,
        per: str = "element",
        logit_adjustment: Tensor | None = None,
        z_loss: float = 0.0,
        returns: tuple[str, ...] = (),
        evaluate: str = "plain",
        inplace: bool = False,
        warn: bool = False,
        process_group: Any = None,
        sync: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        options = Options(ignore_index, label_smoothing, reduction, per, inplace, z_loss).checked()
        check_choice("evaluate", evaluate, EVALUATIONS)
        weight, logit_adjustment = check_class_weight(weight), check_logit_adjustment(logit_adjustment)
        returns = check_returns(returns)
        if base is not None:
            _check_base_loss(base)
            options.refuse_beside_base(weight, logit_adjustment, returns)
        self.weight: Tensor | None
        self.logit_adjustment: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("logit_adjustment", logit_adjustment)
        self.base = base
        self.ignore_index, self.label_smoothing, self.reduction, self.per, self.inplace, self.z_loss = options
        self.evaluate = evaluate
        self._returns = returns
        self._extras: Extras | None = None
        self._plan: Plan
        self.weighting_state: WeightingState | None = None
        self._sync = Sync(process_group, sync)
        self.weighting = resolve_weighting(weighting, tau, scale)
        self._accepted: Accepted | None = None
        self._left: Record | Left | None = None
        self._logits: weakref.ref[Tensor] | None = None
        self._totals: Totals | None = None
        self._advisor = Advisor() if warn else None

    @property
    def weighting(self) -> Weighting:
        """What turns losses into weights; another may be set between steps.

        A weighting of the same class keeps the state, and a compiled graph is not compiled again where only
        numbers change.
        """
        return self._plan.weighting

    @weighting.setter
    def weighting(self, weighting: Weighting) -> None:
        plan: Plan | None = self.__dict__.get("_plan")
        weighting = resolve_weighting(weighting)
        if self.base is not None:
            refuse_without_logits(
                weighting,
                "leave base out, for the built-in cross-entropy of logits, or give another weighting",
            )
        self.weighting_state = state_for(
            weighting, None if plan is None else plan.weighting, self.weighting_state, shared=self._sync.sync
        )
        plan = Plan(weighting).prepare() if plan is None else plan.replaced(weighting)
        object.__setattr__(self, "_plan", plan)

    def __getattr__(self, name: str) -> Any:
        # A property that raises AttributeError ends here. A module would say that there is no such name.
        if name in ("tau", "scale"):
            return number_of(self.weighting, name)
        return super().__getattr__(name)

    @property
    def _record(self) -> Record | None:
        """The record of the last call, or None."""
        left = self._left
        if left is not None and not isinstance(left, Record):
            left = record_of(left)
            object.__setattr__(self, "_left", left)
        return left

    @property
    def backend(self) -> str | None:
        """What computed the last call, "rust" or "composite"; None where `stats` has no call to describe."""
        return None if self._record is None else self._record.backend

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
            input: Logits or, with `base`, its first argument.
            target: Class indices or class probabilities or, with `base`, its second argument, if it has one.
            *args: With `base`, its other arguments.
            where: Mask, bool, of the losses' shape: which of them count. (The built-in cross-entropy with
                `per="sample"` takes one of shape (N,).)
            sample_weight: The base measure `p`, numbers >= 0, of the losses' shape or (N,); with
                `per="sample"` of shape (N,). The objective is `sum p w l / sum p`.
            groups: The group of each sample, integers, of the same shapes, for `GroupDRO` and `stats`.
            normalizer: As for `cross_entropy`: what "mean" divides by, the same in all micro-batches of a
                step. `stats().objective` is divided by it too.
            segments: With `per="sample"`, which sequence of its row a target belongs to, integers of the
                losses' shape, as for `cross_entropy`. Weights and `stats` are then those of the sequences.
            num_segments: As for `cross_entropy`.
            reference: The losses of a reference model, of the losses' shape, for `rgd.Excess`; as for
                `cross_entropy`. An evaluation leaves it alone.
            **kwargs: Keyword arguments of `base`.

        Returns:
            A scalar or, with `reduction="none"`, one value a target.

        Raises:
            IndexError: If a class index is out of range.
            TypeError: If a tensor's dtype does not fit.
            ValueError: If a shape does not fit, if `base` returns a scalar or losses that are weighted
                already, or if it broadcasts its arguments against each other, as (N, 1) against (N,).
        """
        base = self.base
        repeatable = (
            normalizer is None and reference is None and segments is None and num_segments is None
            and base is None and not args and not kwargs and not torch.compiler.is_compiling()
        )  # fmt: skip
        known = self._accepted if repeatable else None
        if known is not None:
            bare = where is None and sample_weight is None and groups is None
            objective = self._again(known, input, target, None if bare else (where, sample_weight, groups))
            if objective is not None:
                return objective
        if base is None:
            if target is None or args or kwargs:
                if "num_items_in_batch" in kwargs:
                    raise TypeError(
                        "an RGDLoss is no compute_loss_func: give "
                        "Trainer(compute_loss_func=rgd_loss_func(...)), from rgd.integrations.transformers"
                    )
                raise TypeError(
                    "without base, the loss takes input and target (and where=, sample_weight=, ...), got "
                    + ("no target" if target is None else f"{len(args) + len(kwargs)} more arguments")
                )
            losses = input
        else:
            given = (input, *args) if target is None and not args else (input, target, *args)
            hint = ": base must return one loss a sample"
            losses = check_losses(base(*given, **kwargs), "what base returns", hint)
            check_not_broadcast(base, losses, (*given, *kwargs.values()))
        plan, memory, sync = self._part_of(losses)
        groups, reference = (None, None) if plan is _PLAIN else (groups, reference)
        if base is None:
            by_class = self.weight, self.logit_adjustment
            more = normalizer, segments, num_segments, reference
            given = Given(losses, target, *by_class, where, sample_weight, groups, *more)
            problem = problem_of(given, options_of(self, plan is not _PLAIN))
            returns = self._returns
            if returns or plan.needs_entropy:
                problem = wanting(problem, returns, plan)
                repeatable = False
            weigher = weigher_of(problem, plan, memory, sync)
            objective, record = compute(problem, weigher)
            if returns:
                self._keep_extras(found_by(weigher))
            if repeatable:
                object.__setattr__(self, "_accepted", accepted(given, problem, plan, record))
        else:
            units = check_segments(segments, num_segments, self.per, losses.shape, losses.device)
            if units is None:
                groups = check_groups(groups, losses.shape, losses.device, self.per)
            elif groups is not None:
                groups = units[0].groups(groups, losses.device)
            objective, record = reweighted(
                losses, Weigher(plan, groups, memory, sync),
                reduction=self.reduction, per=self.per, where=where, sample_weight=sample_weight,
                normalizer=normalizer, segments=units, reference=reference,
            )  # fmt: skip
            record = None if record is None else record.guarded()
        if plan is not _PLAIN:
            self._keep(record, losses if base is None else None)
        return objective

    def _again(
        self, known: Accepted, input: Tensor, target: Any, beside: tuple[Any, Any, Any] | None
    ) -> Tensor | None:
        """The objective of a call like the last one; None for a call that must go the whole way."""
        # `training` and `evaluate` ask nothing of a call that needs a gradient, and is no step of a state.
        plan, buffers = self._plan, self._buffers
        if not (self._totals is None and self._advisor is None and (not plan.stateful or self.training)):
            return None
        # `known` is no tensor: a buffer that has gone, as where a parameter has its name, does not fit.
        by_class: Any = buffers.get("weight", known), buffers.get("logit_adjustment", known)
        options = (
            self.ignore_index, self.label_smoothing, self.reduction, self.per, self.inplace, self.z_loss
        )  # fmt: skip
        state: Any = self._modules.get("weighting_state") if plan.stateful else None
        found = again(
            known, input, target, beside,
            options=options, plan=plan, by_class=by_class, sharing=self._sync, state=state,
        )  # fmt: skip
        if found is None:
            return None
        kept = self.__dict__  # the way around nn.Module, which looks for parameters first
        objective, kept["_left"] = found
        kept["_logits"] = weakref.ref(input)
        return objective

    def _part_of(self, *trained: Tensor | None) -> tuple[Plan, Memory | None, Sync]:
        """Weighting, state and sharing of a call; none of them in an evaluation, which trains nothing."""
        if self.evaluate == "plain":
            if evaluates():
                return _PLAIN, None, _ALONE
            if not self.training:
                needs = (isinstance(one, Tensor) and one.requires_grad for one in trained)
                if not (torch.is_grad_enabled() and any(needs)):
                    return _PLAIN, None, _ALONE
        state = self.weighting_state
        return self._plan, None if state is None else self._memory(state), self._sync

    def _keep(self, record: Record | None, logits: Tensor | None = None) -> None:
        """Keep what a call leaves behind: its record, and in training its part of the totals."""
        if recomputes():  # the call that is repeated has left it behind
            return
        if record is not None and not (record.measure is record.groups is record.reference is None):
            record = record.with_copies()
        if record is not None and self._extras is not None:
            record = record.changed(extras=self._extras)
        # An exported program has no side effects.
        if record is not None or not is_exporting():
            object.__setattr__(self, "_left", record)  # nn.Module's own costs ten times as much
        if record is not None and self._trains():
            if self._totals is not None:
                self._totals.add(record, self.weighting)
            if self._advisor is not None and not torch.compiler.is_compiling():
                self._advisor.look(record, self.weighting, logits)
        if logits is not None and not torch.compiler.is_compiling():
            object.__setattr__(self, "_logits", weakref.ref(logits))

    def _keep_extras(self, found: Extras) -> None:
        """Keep what a call returns of its logits; nothing of one whose tensors must not outlive it."""
        if not (recomputes() or is_exporting()):
            asked = None if in_transform() else {name: found[name] for name in self._returns}
            object.__setattr__(self, "_extras", asked)

    def _trains(self) -> bool:
        """Whether a weighted call moves the state and counts in the totals."""
        return self.training and not evaluates()

    def _memory(self, state: WeightingState) -> Memory:
        if in_transform():
            raise RuntimeError(
                f"{type(self.weighting).__name__} remembers earlier batches, and a module cannot keep what "
                "is computed under a torch.func transform: use rgd.torch.cross_entropy or reweighted_mean "
                "with state="
            )
        return Memory(state, self._trains())

    @property
    def returns(self) -> tuple[str, ...]:
        """The names of what each call leaves in `extras`."""
        return self._returns

    @property
    def extras(self) -> dict[str, Tensor] | None:
        """What the last call, in training or evaluation, was to return of its logits, by name, without grad.

        Each tensor has the targets' shape, 0 for a target that takes no part. None before the first call,
        after one under a `torch.func` transform, and where nothing is asked for.
        """
        return None if self._extras is None else dict(self._extras)

    @property
    def last_losses(self) -> Tensor | None:
        """A copy of the last call's plain losses, without grad: one a target; by `per="sample"` too.

        0 for a target that takes no part; None where `stats` has no call to describe.
        """
        return None if self._record is None else self._record.losses.clone()

    @property
    def last_weights(self) -> Tensor | None:
        """A copy of the last call's weights, without grad: one a target or, by `per="sample"`, one a sample.

        0 for a target that takes no part; None where `stats` has no call to describe.
        """
        return None if self._record is None else self._record.weights.clone()

    def stats(self, *, groups: Tensor | None = None, total: bool = False, sync: bool = False) -> WeightStats:
        """The statistics of the weights of the last call; computed now, from what that call left behind.

        Args:
            groups: The group of each sample of that call, integers of the losses' shape or (N,): adds the
                statistics of each group, with the means of `returns`. None: those of the call, if it had any.
            total: Whether to describe all weighted calls in training mode since `reset_stats()` together: an
                epoch, or the micro-batches of a step. Their sums are exact; `worst_tenth` is None, since it
                cannot be computed from sums. Groups are those that eager calls on the CPU were given.
            sync: Whether to describe the batches of all processes of the group together. Every process then
                has to ask.

        Returns:
            The plain (ERM) mean loss and that of the worst tenth, the re-weighted objective's mean, the
            effective sample size, the KL divergence of the weights from uniform, the largest weight and the
            share of clipped losses, over targets (with `per="sample"`, over samples) not ignored.

        Raises:
            RuntimeError: If the loss has not been called yet, or its last call was under a `torch.func`
                transform, or if losses that `base` returned were changed in place since. With `total`, if
                `reset_stats()` has not been called.
            ValueError: If both `groups` and `total` are given.
        """
        if total:
            if groups is not None:
                raise ValueError("groups describe the last call: ask for stats(groups=...) without total")
            if self._totals is None:
                raise RuntimeError(
                    "stats(total=True) describes the calls since reset_stats(): call that where an epoch "
                    "begins"
                )
            return self._totals.stats(self.weighting, self._sync.group() if sync else None, self._returns)
        if self._record is None:
            raise RuntimeError(
                "stats() describes the last call of the loss, and there has been none yet; calls under "
                "torch.func transforms and torch.export leave nothing behind to describe"
            )
        record = self._record
        groups = record.groups_of(groups)
        stats = record.stats(self.weighting, groups, self._sync.group() if sync else None)
        remark = None if self._logits is None else remark_on(self._logits())
        return stats if remark is None else stats.remarked(remark)

    def reset_stats(self) -> None:
        """Set the totals of `stats(total=True)` to zero. The first call also switches them on.

        From then on each call in training adds its sums to them.

        Example:
            >>> import torch
            >>> criterion = RGDLoss()
            >>> criterion.reset_stats()
            >>> for _ in range(3):
            ...     _ = criterion(torch.zeros(8, 2), torch.arange(8) % 2)
            >>> criterion.stats(total=True).count
            24
        """
        if self._totals is None:
            self._totals = Totals()
        self._totals.reset()

    def reset_parameters(self) -> None:
        """Set the state of a weighting that remembers back to the state before its first batch."""
        if self.weighting_state is not None:
            self.weighting_state.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RGDLoss:
        apply: Any = cast("Any", super())._apply
        apply(fn, recurse)
        with torch.no_grad():
            self._plan.prepare(fn(torch.empty(0, dtype=torch.uint8, device="cpu")).device)
        return self

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        settings = [f"weighting={self.weighting}"]
        if self.base is None:
            settings.append(f"ignore_index={self.ignore_index}")
            settings.append(f"label_smoothing={self.label_smoothing}")
        settings += [f"reduction={self.reduction!r}", f"per={self.per!r}", f"evaluate={self.evaluate!r}"]
        settings += ["inplace=True"] if self.inplace else []
        settings += [f"z_loss={self.z_loss}"] if self.z_loss else []
        settings += [f"returns={self._returns}"] if self._returns else []
        return ", ".join(settings)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) in (RGDLoss, _RGDCrossEntropyLoss):
            return _blank, (type(self) is RGDLoss,), self.__getstate__()
        return super().__reduce_ex__(protocol)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what calls have left behind."""
        advisor = None if self._advisor is None else Advisor()
        left_behind = {"_accepted": None, "_left": None, "_logits": None, "_totals": None, "_extras": None}
        return {**self.__dict__, **left_behind, "_advisor": advisor}


def options_of(loss: RGDLoss, trains: bool) -> Options:
    """The options of a loss as they are now, since attributes may be set; an evaluation has no z-loss."""
    z_loss = loss.z_loss if trains else 0.0
    return Options(loss.ignore_index, loss.label_smoothing, loss.reduction, loss.per, loss.inplace, z_loss)


# A scripted model may hold the loss: TorchScript then leaves `forward` alone, which it cannot compile.
cast("Any", torch.jit).ignore(RGDLoss.forward)


class _RGDCrossEntropyLoss(RGDLoss, nn.CrossEntropyLoss):
    """What `RGDLoss()` is without `base`: a cross-entropy of logits, to trainers that ask for that class."""

    # TorchScript ignores only what is in the class itself.
    tau = RGDLoss.tau  # pyright: ignore[reportIncompatibleMethodOverride]
    scale = RGDLoss.scale  # pyright: ignore[reportIncompatibleMethodOverride]


# It goes by the name that it was made by.
_RGDCrossEntropyLoss.__name__ = _RGDCrossEntropyLoss.__qualname__ = "RGDLoss"
_RGDCrossEntropyLoss.__doc__ = RGDLoss.__doc__


def _blank(has_base: bool) -> RGDLoss:
    """An instance without attributes, for a copy or a pickle to fill."""
    return nn.Module.__new__(RGDLoss if has_base else _RGDCrossEntropyLoss)


def _check_base_loss(base: Any) -> None:
    if isinstance(base, type):
        raise TypeError(
            f"base must be a loss, got the class {base.__name__}: call it, as in "
            f'{base.__name__}(reduction="none")'
        )
    if not callable(base):
        raise TypeError(f"base must be a callable that returns per-sample losses, got {base!r}")
    if isinstance(getattr(base, "_orig_mod", base), RGDLoss):  # compiled, perhaps
        raise ValueError(
            "base is an RGDLoss already, and a second one would weigh every loss twice: give the plain loss, "
            "or use the inner RGDLoss alone"
        )
    # A loss from elsewhere is judged by what it returns: some leave an attribute at "mean" that they ignore.
    reduction = getattr(base, "reduction", "none")
    if type(base).__module__.startswith("torch.nn") and reduction != "none":
        raise ValueError(
            f"base reduces its losses to one number (reduction={reduction!r}), and weighting "
            'that re-weights nothing: build it with reduction="none"; RGDLoss(reduction=...) reduces'
        )


_PLAIN = Plan(ERM()).prepare()
_ALONE = Sync(sync=False)
