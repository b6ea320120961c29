"""The checks of the fronts for weightings that read the entropy of the logits: their cross-entropies.

Losses alone have no entropy. So the weights are seen in the elements `p * w * l` of a cross-entropy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from rgd.testing._subject import CLASSES, SIZE, Case, Floats, Subject, attempt, known, pairs, split
from rgd.weightings._call import map_state

_Call = Callable[[Case, Any], tuple[Any, Any]]
"""Maps a case and the state before it to `p * w * l`, as NumPy, and the state after it."""


def check_torch_logits(subject: Subject, torch: Any) -> None:
    """`rgd.torch.cross_entropy` and `linear_cross_entropy`, eager and compiled."""
    front: Any = importlib.import_module("rgd.torch")
    logits, target, _, _ = _batch()
    logits, target = torch.tensor(logits), torch.tensor(target)
    head = torch.eye(CLASSES, dtype=logits.dtype)
    groups, reference = (
        None if one is None else torch.tensor(one) for one in (subject.groups, subject.reference)
    )

    def options(where: Any, measure: Any, state: Any) -> dict[str, Any]:
        return {
            "weighting": subject.weighting, "reduction": "none", "where": where, "sample_weight": measure,
            "groups": groups, "reference": reference, "state": state,
        }  # fmt: skip

    def whole(*given: Any) -> Any:
        return front.cross_entropy(logits, target, **options(*given))

    def linear(*given: Any) -> Any:
        return front.linear_cross_entropy(logits, head, target, **options(*given))

    torch.compiler.reset()
    compiled = torch.compile(whole, fullgraph=True, backend="eager", dynamic=False)

    def calls(function: Any) -> _Call:
        def call(case: Case, state: Any) -> tuple[Any, Any]:
            products, state = split(function(torch.tensor(case.where), torch.tensor(case.measure), state))
            return products.numpy(), None if state is None else map_state(np.asarray, state)

        return call

    _compare(subject, "torch", calls(whole))
    _compare(subject, "a linear head of torch", calls(linear))
    _compare(subject, "torch.compile", calls(compiled))


def check_jax_logits(subject: Subject, jax: Any, enable_x64: Any) -> None:
    """`rgd.jax.cross_entropy` and `linear_cross_entropy`, under `jit` with traced settings."""
    front: Any = importlib.import_module("rgd.jax")
    logits, target, _, _ = _batch()

    def whole(weighting: Any, *given: Any) -> Any:
        return front.cross_entropy(logits, target, **options(weighting, *given))

    def linear(weighting: Any, *given: Any) -> Any:
        return front.linear_cross_entropy(logits, np.eye(CLASSES), target, **options(weighting, *given))

    def options(weighting: Any, where: Any, measure: Any, state: Any) -> dict[str, Any]:
        return {
            "weighting": weighting, "reduction": "none", "where": where, "sample_weight": measure,
            "groups": subject.groups, "reference": subject.reference, "state": state,
        }  # fmt: skip

    def calls(function: Any) -> _Call:
        traced = jax.jit(function)

        def call(case: Case, state: Any) -> tuple[Any, Any]:
            products, state = split(traced(subject.weighting, case.where, case.measure, state))
            return np.asarray(products), None if state is None else map_state(np.asarray, state)

        return call

    with enable_x64(True):
        _compare(subject, "jax.jit with traced settings", calls(whole))
        _compare(subject, "a linear head under jax.jit", calls(linear))


def _batch() -> tuple[Floats, Floats, Floats, Floats]:
    """Logits and their targets, with the losses and the entropies of both."""
    rng = np.random.default_rng(3)
    logits, target = 2 * rng.standard_normal((SIZE, CLASSES)), rng.integers(0, CLASSES, SIZE)
    log_q = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    return logits, target, -log_q[np.arange(SIZE), target], -np.sum(np.exp(log_q) * log_q, axis=1)


def _compare(subject: Subject, where: str, call: _Call) -> None:
    """Two cases in turn through a front, against the formula in NumPy."""
    _, _, losses, entropy = _batch()
    before = subject.weighting.init() if subject.weighting.stateful else None
    state = before
    for case in subject.cases()[:2]:
        weights, before = subject.run(
            case.situation, losses, where=case.where, measure=case.measure, state=before, entropy=entropy
        )
        expected = np.where(case.where, case.measure, 0.0) * weights * losses
        products, state = attempt(subject, where, call, case, state)
        sentence = f"gives other weighted losses in {where} than by its formula in NumPy for {case.situation}"
        subject.compare(products, expected, sentence)
        for actual, wanted in pairs(known(state).get("state", ()), known(before).get("state", ())):
            sentence = (
                f"is left with another state by {where} than by its step in NumPy after {case.situation}"
            )
            subject.compare(actual, wanted, sentence)
