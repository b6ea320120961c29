"""`RGD`: any torch optimizer, for the re-weighted objective of per-sample losses.

An optimizer gets gradients in which the samples are already summed. So the wrapper works before the backward
pass: it takes the losses, one a sample, weights them, and calls backward on their weighted mean. The wrapped
optimizer makes the step, and has the parameter groups, the state and the hooks.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rgd.torch._checks import check_losses
from rgd.torch._dial import Dial, number_of
from rgd.torch._distributed import Sync
from rgd.torch._measure import check_groups, measure_of
from rgd.torch._modes import evaluates, recomputes
from rgd.torch._plan import Plan, Weigher
from rgd.torch._state import Memory, WeightingState, state_for
from rgd.torch.functional import reweighted
from rgd.torch.loss import InitSignature
from rgd.torch.stats import Advisor
from rgd.weightings import Weighting
from rgd.weightings._call import refuse_without_logits, resolve_weighting

_OF_LOGITS = "use rgd.torch.RGDLoss as the loss and the optimizer alone"


class _Shared:
    """An attribute of the wrapper that is read, set and deleted on the wrapped optimizer."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Any, owner: type | None = None) -> Any:
        return self if wrapper is None else getattr(wrapper.optimizer, self._name)

    def __set__(self, wrapper: Any, value: Any) -> None:
        setattr(wrapper.optimizer, self._name, value)

    def __delete__(self, wrapper: Any) -> None:
        delattr(wrapper.optimizer, self._name)


@dataclasses.dataclass
class _Now:
    """The values that change between steps, in one object, so that Lightning's shallow copies share them."""

    plan: Plan
    state: WeightingState | None
    awaits_gradient: bool = False
    was_asked: bool = False


class RGD(Dial, torch.optim.Optimizer):
    """Re-weighted gradient descent with any torch optimizer: it descends `mean(w * losses)`, `w` constant.

    The wrapped optimizer gets the gradient of Algorithm 1, `1/n sum_i w_i grad(l_i)` with
    `w_i = exp(min(l_i, tau) / (tau + 1))`. The wrapper has the same `param_groups`, `state`, `defaults` and
    hooks, so that you may give either to a learning rate scheduler, to `torch.amp.GradScaler` or to gradient
    clipping. A checkpoint of one loads into the other; it does not hold the weighting.

    Args:
        optimizer: Any `torch.optim.Optimizer`, not wrapped before. Attributes that `RGD` does not have are
            looked up there.
        weighting: Turns losses into weights, a member of `rgd` or a subclass of `rgd.Weighting`;
            `KL(tau=1.0)` if neither it nor `tau` nor `scale` is given.
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        warn: As in `RGDLoss`: whether to warn once if re-weighting has no effect.
        process_group: As in `reweighted_mean`: the processes that share a batch.
        sync: As in `reweighted_mean`.

    Attributes:
        optimizer: The wrapped optimizer.
        weighting: Turns losses into weights; another may be set between steps. One of the same class
            keeps the state.
        weighting_state: The state of a weighting that remembers.

    Raises:
        TypeError: If `optimizer` is no `torch.optim.Optimizer`, `weighting` no weighting, or `tau` not a
            number.
        ValueError: If `optimizer` is wrapped in `RGD` already, which would weight every loss twice, if both
            `tau` and `weighting` are given, or if `tau` is not positive.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = RGD(torch.optim.SGD(model.parameters(), lr=0.1), tau=1.0)
        >>> cross_entropy = torch.nn.CrossEntropyLoss(reduction="none")
        >>> losses = cross_entropy(model(torch.ones(8, 2)), torch.arange(8) % 3)
        >>> optimizer.zero_grad()
        >>> objective = optimizer.backward(losses)
        >>> optimizer.step()

    References:
        Kumar et al., "Stochastic Re-weighted Gradient Descent via Distributionally Robust Optimization", TMLR
        2024, arXiv 2306.09222, Algorithm 1.
    """

    optimizer: torch.optim.Optimizer
    _sync: Sync
    _now: _Now
    _advisor: Advisor | None

    param_groups = cast("list[dict[str, Any]]", _Shared())
    state = cast("Any", _Shared())
    defaults = cast("dict[str, Any]", _Shared())
    _optimizer_step_pre_hooks = cast("Any", _Shared())
    _optimizer_step_post_hooks = cast("Any", _Shared())
    _optimizer_state_dict_pre_hooks = cast("Any", _Shared())
    _optimizer_state_dict_post_hooks = cast("Any", _Shared())
    _optimizer_load_state_dict_pre_hooks = cast("Any", _Shared())
    _optimizer_load_state_dict_post_hooks = cast("Any", _Shared())
    __signature__ = InitSignature()
    # GradScaler sets these on the wrapper, and the fused step of the wrapped optimizer reads them.
    grad_scale = cast("Any", _Shared())
    found_inf = cast("Any", _Shared())

    def __new__(cls, *args: Any, **kwargs: Any) -> RGD:
        """Refuse an argument that is no optimizer, before Python complains of the other arguments."""
        if args or "optimizer" in kwargs:
            _check_optimizer(args[0] if args else kwargs["optimizer"])
        return super().__new__(cls)

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weighting: Weighting | None = None,
        *,
        tau: float | None = None,
        scale: float | None = None,
        warn: bool = False,
        process_group: Any = None,
        sync: bool = True,
    ) -> None:
        weighting = resolve_weighting(weighting, tau, scale)
        refuse_without_logits(weighting, _OF_LOGITS)
        sharing = Sync(process_group, sync)
        advisor = Advisor() if warn else None
        self.__setstate__(
            {
                "optimizer": optimizer,
                "weighting": weighting,
                "_sync": sharing,
                "_state": None,
                "_advisor": advisor,
            }
        )

    @property
    def weighting(self) -> Weighting:
        """The weighting, which turns losses into weights."""
        return self._now.plan.weighting

    @weighting.setter
    def weighting(self, weighting: Weighting) -> None:
        weighting = resolve_weighting(weighting)
        refuse_without_logits(weighting, _OF_LOGITS)
        now = self._now
        now.state = state_for(weighting, now.plan.weighting, now.state)
        now.plan = now.plan.replaced(weighting)

    @property
    def weighting_state(self) -> WeightingState | None:
        """The state of the weighting, a module of buffers; None for a weighting without state."""
        return self._now.state

    def objective(
        self,
        losses: Tensor,
        *,
        where: Tensor | None = None,
        sample_weight: Tensor | None = None,
        groups: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:
        """The objective `sum p w l / sum p`, or `mean(w * losses)` without `p`, to call `backward()` on.

        Use it if you have to call backward yourself: under `GradScaler`,
        `scaler.scale(optimizer.objective(losses)).backward()`; to accumulate the gradients of `k` equal
        micro-batches, `(optimizer.objective(losses) / k).backward()`.

        Args:
            losses: Losses of any shape with at least one axis; float32, float64, float16 or bfloat16.
            where: Mask, bool, of the losses' shape: which of them count.
            sample_weight: The base measure `p`, numbers >= 0, of the losses' shape or (N,).
            groups: The group of each sample, integers of the losses' shape or (N,), for `GroupDRO`.
            reference: The losses of a reference model, of the losses' shape, for `rgd.Excess`.

        Returns:
            A scalar of the losses' dtype, differentiable with respect to `losses`.

        Raises:
            TypeError: If `losses` is not a float tensor, or another argument is of the wrong type.
            ValueError: If `losses` is a scalar or weighted already, or another argument does not fit it.

        Example:
            >>> import torch
            >>> w = torch.zeros(1, requires_grad=True)
            >>> optimizer = RGD(torch.optim.SGD([w], lr=0.1), tau=1.0)
            >>> optimizer.objective(torch.tensor([0.0, 2.0]) + w)
            tensor(1.6487, grad_fn=...)
        """
        check_losses(losses)
        state, trains = self._now.state, not evaluates()
        memory = None if state is None else Memory(state.to(losses.device), trains)
        members = check_groups(groups, losses.shape, losses.device, "element")
        weigher = Weigher(self._now.plan, members, memory, self._sync)
        objective, record = reweighted(
            losses, weigher, where=where, sample_weight=sample_weight, reference=reference
        )
        looks = trains and not torch.compiler.is_compiling() and not recomputes()
        if self._advisor is not None and record is not None and looks:
            self._advisor.look(record, self.weighting)
        self._now.awaits_gradient = objective.requires_grad
        self._now.was_asked = True
        return objective

    def backward(
        self,
        losses: Tensor,
        *,
        where: Tensor | None = None,
        sample_weight: Tensor | None = None,
        groups: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        reference: Tensor | None = None,
    ) -> Tensor:
        """Add the gradient of the objective to the parameters' `grad`.

        Args:
            losses: Losses of any shape with at least one axis, with a graph behind them; float32, float64,
                float16 or bfloat16.
            where: As for `objective`.
            sample_weight: As for `objective`.
            groups: As for `objective`.
            retain_graph: As in `torch.Tensor.backward`.
            create_graph: As in `torch.Tensor.backward`.
            reference: As for `objective`.

        Returns:
            The objective, a scalar without grad, to log.

        Raises:
            RuntimeError: If `losses` does not require grad.
            TypeError: If `losses` is not a float tensor.
            ValueError: If `losses` is a scalar, or weighted already.
        """
        if isinstance(losses, Tensor) and not (losses.requires_grad and torch.is_grad_enabled()):  # pyright: ignore[reportUnnecessaryIsInstance]
            check_losses(losses)
            check_groups(groups, losses.shape, losses.device, "element")
            measure_of(losses.shape, losses, where, sample_weight)
            raise RuntimeError(
                "losses does not require grad, so there is nothing to call backward on: compute it from the "
                "parameters, outside of torch.no_grad() and without detach()"
            )
        now, state = self._now, self._now.state
        before = None if state is None else state.read(losses.device)
        awaited, asked = now.awaits_gradient, now.was_asked
        try:
            objective = self.objective(
                losses, where=where, sample_weight=sample_weight, groups=groups, reference=reference
            )
            torch.autograd.backward(objective, retain_graph=retain_graph, create_graph=create_graph)
        except BaseException:
            # If the backward pass failed, the state is that before the batch.
            if state is not None:
                state.write(before)
            now.awaits_gradient, now.was_asked = awaited, asked
            raise
        return objective.detach()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the wrapped optimizer make its step.

        Args:
            closure: A function that evaluates the model and returns the losses, one a sample. The wrapped
                optimizer may call it many times (`torch.optim.LBFGS`). After each call the gradients are
                cleared, and `backward` is called on the objective, so the closure need not do this. A closure
                may return None, as Lightning's does in manual optimization. The step then uses the gradients
                of the last `backward(losses)`.

        Returns:
            What the wrapped optimizer returns: with a closure the objective of its first evaluation, else
            None.

        Raises:
            RuntimeError: If an objective has been computed since the last step and no parameter has a
                gradient: backward was not called, or the losses do not depend on these parameters. Or if the
                losses of the closure do not require grad.
            TypeError: If the closure returns neither a float tensor nor None, or None and no objective has
                been computed since the last step.
            ValueError: If the closure returns a scalar.

        Example:
            >>> import torch
            >>> x = torch.tensor([3.0], requires_grad=True)
            >>> optimizer = RGD(torch.optim.LBFGS([x]), tau=1.0)
            >>> objective = optimizer.step(lambda: (x - torch.tensor([0.0, 1.0])) ** 2)
        """
        step: Callable[..., Any] = self.optimizer.step
        if closure is None:
            self._warn_of_plain_training()
            self._check_gradient()
            result = step()
        else:
            result = step(lambda: self._evaluate(closure))
        self._now.awaits_gradient = False
        return result

    def _warn_of_plain_training(self) -> None:
        """Warn once of a step whose gradients come from no objective of this wrapper."""
        if self._now.was_asked:
            return
        grads = (p.grad for group in self.param_groups for p in group["params"] if p.grad is not None)
        # torch initialises an optimizer's state by a step with gradients of zero, which is no training.
        if not any(grad.is_sparse or bool(grad.count_nonzero()) for grad in grads):
            return
        self._now.was_asked = True
        warnings.warn(
            "RGD makes a step, and no objective was asked for: the gradients are those of plain training. "
            "Call optimizer.backward(losses) with the loss of each sample in place of loss.backward(); where "
            "a trainer calls backward itself, use rgd.torch.RGDLoss as the loss",
            stacklevel=3,
        )

    @torch.enable_grad()
    def _evaluate(self, closure: Callable[[], Any]) -> Tensor | None:
        losses = closure()
        if losses is None:
            if not self._now.awaits_gradient:
                raise TypeError(
                    "the closure returned None, and there has been no backward(losses) since the last step: "
                    "let it return the loss of each sample, or call optimizer.backward(losses) before step()"
                )
            self._check_gradient()
            return None
        if isinstance(losses, (int, float)) or (isinstance(losses, Tensor) and losses.dim() == 0):
            raise ValueError(
                "the closure returned one number, and weighting that re-weights nothing: return the loss "
                'of each sample, as reduction="none" gives, and leave backward to RGD. Where a trainer '
                "brings its own closure (as Lightning's automatic optimization does), use the bare "
                "optimizer and RGDLoss as the criterion"
            )
        check_losses(losses)
        self.zero_grad()
        objective = self.backward(losses)
        self._check_gradient()
        return objective

    def _check_gradient(self) -> None:
        """Refuse a step that would be lost. Empty parameters, such as those of a shard, are skipped."""
        if not self._now.awaits_gradient:
            return
        parameters = (p for group in self.param_groups for p in group["params"] if p.numel())
        first = next(parameters, None)
        if first is not None and first.grad is None and all(p.grad is None for p in parameters):
            raise RuntimeError(
                "no parameter of this optimizer has a gradient, so the step would be lost: call "
                "optimizer.backward(losses), or backward() on optimizer.objective(losses), after "
                "zero_grad() and before step(), with losses computed from the parameters that the "
                "optimizer was given"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the parameters' gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the wrapped optimizer another group of parameters."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, and the state of a weighting that remembers."""
        saved = self.optimizer.state_dict()
        state = self._now.state
        return saved if state is None else {**saved, "weighting_state": state.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, whether it was saved with this wrapper or without.

        Raises:
            RuntimeError: If it holds the state of another weighting than this wrapper's.
        """
        remembered, state = state_dict.get("weighting_state"), self._now.state
        if remembered is not None and state is not None:
            copy.deepcopy(state).load_state_dict(remembered)  # raises, before anything is changed
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "weighting_state"})
        if remembered is not None and state is not None:
            state.load_state_dict(remembered)

    def __getattr__(self, name: str) -> Any:
        # Python calls this for missing attributes only. While a copy is made, `optimizer` is missing too.
        if name in ("optimizer", "_now"):
            raise AttributeError(name)
        if name in ("tau", "scale"):  # these properties raised AttributeError
            return number_of(self.weighting, name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "weighting": self.weighting,
            "_sync": self._sync,
            "_state": self._now.state,
            "_advisor": self._advisor,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        weighting, remembered = state.pop("weighting"), state.pop("_state", None)
        self.__dict__.update({"_advisor": None, **state})
        self._now = _Now(Plan(weighting), state_for(weighting, weighting, remembered))

    def _patch_step_function(self) -> None:
        """Does nothing, so that hooks run once: the wrapped optimizer's step calls them."""

    def __repr__(self) -> str:
        return f"RGD (weighting={self.weighting})\n{self.optimizer}"


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        is_class = isinstance(optimizer, type)
        given = f"the class {optimizer.__name__}" if is_class else type(optimizer).__name__
        kind = optimizer.__name__ if is_class and issubclass(optimizer, torch.optim.Optimizer) else "AdamW"
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {given}: give one with its parameters, as in "
            f"RGD(torch.optim.{kind}(model.parameters(), lr=1e-3))"
        )
    inner: Any = optimizer
    while inner is not None:
        if isinstance(inner, RGD):
            raise ValueError(
                "optimizer is wrapped in RGD already, and a second wrapper would weigh every loss twice: "
                "give the wrapped one, optimizer.optimizer, or set optimizer.weighting"
            )
        inner = getattr(inner, "optimizer", None)
