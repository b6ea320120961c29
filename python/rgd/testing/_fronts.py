"""The checks of the fronts: each must give the numbers that the formula gives in NumPy."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

import rgd
from rgd.testing._logits import check_jax_logits, check_torch_logits
from rgd.testing._subject import Case, Subject, attempt, known, pairs, split, structure
from rgd.weightings._call import kernel_of, map_state

_Call = Callable[[Case, Any], tuple[Any, Any]]
"""Maps a case and the state before it to the weights, as NumPy, and the state after it."""


def _compare_cases(subject: Subject, where: str, call: _Call, dtype: Any = np.float64) -> None:
    """Each case in turn through a front, against the formula in NumPy of the same dtype."""
    state = subject.weighting.init() if subject.weighting.stateful else None
    for case, expected, _, after in subject.follow(dtype):
        weights, state = attempt(subject, where, call, case, state)
        sentence = f"gives other weights in {where} than by its formula in NumPy for {case.situation}"
        subject.compare(weights, expected, sentence, losses=case.losses, dtype=dtype)
        if subject.weighting.stateful:
            sentence = (
                f"is left with another state by {where} than by its step in NumPy after {case.situation}"
            )
            if structure(state) != structure(after):
                subject.fail(f"{sentence}: {structure(state)} in place of {structure(after)}")
            for actual, wanted in pairs(state, after):
                subject.compare(actual, wanted, sentence, dtype=dtype)


def _compare_rows(subject: Subject, where: str, call: Callable[..., Any], dtype: Any = np.float64) -> None:
    """Two cases as the rows of one array through a vmapped function."""
    cases = subject.cases()[:2]
    rows = [np.stack([getattr(case, name) for case in cases]) for name in ("losses", "where", "measure")]
    weights = attempt(subject, where, call, *rows)
    for row, case in zip(weights, cases, strict=True):
        expected = subject.weights(
            case.situation, case.losses, where=case.where, measure=case.measure, dtype=dtype
        )
        sentence = f"gives other weights in {where} than by its formula in NumPy for {case.situation}"
        subject.compare(row, expected, sentence, losses=case.losses, dtype=dtype)


def _check_numpy(subject: Subject) -> None:
    """`rgd.sample_weights`, through the kernel where there is one."""
    if subject.entropy is not None:
        return  # NumPy has functions of losses alone
    kernel = kernel_of(subject.weighting)
    where = "rgd.sample_weights" if kernel is None else f"its kernel {kernel[0]!r}"
    weigh_with: Any = rgd.sample_weights

    def call(case: Case, state: Any) -> tuple[Any, Any]:
        # A kernel has separate code for batches without a measure.
        plain = bool(case.where.all()) and bool((case.measure == 1).all())
        options: dict[str, Any] = {} if plain else {"where": case.where, "sample_weight": case.measure}
        options["reference"] = subject.reference
        return split(
            weigh_with(case.losses, subject.weighting, groups=case.groups, **options, **known(state))
        )

    _compare_cases(subject, where, call)
    empty, none = (None if one is None else one[:0] for one in (subject.groups, subject.reference))
    for dtype in (np.float64, np.float32, np.float16):
        attempt(
            subject, f"{where} ({np.dtype(dtype)})", weigh_with, subject.losses[:0].astype(dtype),
            subject.weighting, groups=empty, reference=none, **known(subject.weighting.init()),
        )  # fmt: skip
        case = subject.cases()[0]
        case = case._replace(losses=case.losses.astype(dtype))
        weights, _ = attempt(subject, f"{where} ({np.dtype(dtype)})", call, case, _first(subject))
        expected = subject.weights(case.situation, subject.losses)
        sentence = f"gives other weights for {np.dtype(dtype)} losses"
        subject.compare(weights, expected, sentence, losses=case.losses, dtype=weights.dtype)


def _check_torch(subject: Subject) -> None:
    """`rgd.torch.sample_weights`: eager, compiled, vmapped, in every dtype."""
    torch: Any = importlib.import_module("torch")
    if subject.entropy is not None:
        check_torch_logits(subject, torch)
        return
    sample_weights: Any = importlib.import_module("rgd.torch").sample_weights
    weighting = subject.weighting
    groups, reference = (
        None if one is None else torch.tensor(one) for one in (subject.groups, subject.reference)
    )

    def plain(losses: Any, where: Any, measure: Any, state: Any) -> Any:
        return sample_weights(
            losses, weighting, where=where, sample_weight=measure, groups=groups, state=state,
            reference=reference,
        )  # fmt: skip

    def calls(function: Any, dtype: Any) -> _Call:
        def call(case: Case, state: Any) -> tuple[Any, Any]:
            losses, measure = torch.tensor(case.losses, dtype=dtype), torch.tensor(case.measure, dtype=dtype)
            weights, state = split(function(losses, torch.tensor(case.where), measure, state))
            return weights.numpy(), None if state is None else map_state(np.asarray, state)

        return call

    _compare_cases(subject, "torch", calls(plain, torch.float64))
    _compare_cases(subject, "torch (float32)", calls(plain, torch.float32), np.float32)
    for dtype in (torch.float16, torch.bfloat16):
        where = f"torch ({dtype})"
        case = subject.cases()[0]
        weights, _ = attempt(subject, where, calls(plain, dtype), case, _first(subject))
        sentence = f"gives other weights in {where}"
        expected = subject.weights(case.situation, case.losses)
        subject.compare(weights, expected, sentence, losses=case.losses, dtype=np.float32)

    torch.compiler.reset()
    compiled = torch.compile(plain, fullgraph=True, backend="eager", dynamic=False)
    with warnings.catch_warnings():
        # Functions of array_api_compat that are traced all the same, such as `xp.cumulative_sum`.
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        _compare_cases(subject, "torch.compile", calls(compiled, torch.float64))

    first = _first(subject)

    def row(losses: Any, where: Any, measure: Any) -> Any:
        return plain(losses, where, measure, first)

    def vmapped(*rows: Any) -> Any:
        return split(torch.func.vmap(row)(*(torch.tensor(row) for row in rows)))[0].numpy()

    _compare_rows(subject, "torch.func.vmap", vmapped)


def _check_jax(subject: Subject) -> None:
    """`rgd.jax.sample_weights`: under `jit` with traced settings, under `vmap`, in every dtype."""
    jax: Any = importlib.import_module("jax")
    jnp: Any = jax.numpy
    sample_weights: Any = importlib.import_module("rgd.jax").sample_weights
    enable_x64: Any = getattr(jax, "enable_x64", None)
    if enable_x64 is None:  # JAX before 0.8
        enable_x64 = importlib.import_module("jax.experimental").enable_x64
    if subject.entropy is not None:
        check_jax_logits(subject, jax, enable_x64)
        return
    groups = None if subject.groups is None else jnp.asarray(subject.groups)

    def plain(weighting: Any, losses: Any, where: Any, measure: Any, state: Any) -> Any:
        return sample_weights(
            losses, weighting, where=where, sample_weight=measure, groups=groups, state=state,
            reference=subject.reference,
        )  # fmt: skip

    traced = jax.jit(plain)

    def call(case: Case, state: Any) -> tuple[Any, Any]:
        result = traced(subject.weighting, jnp.asarray(case.losses), case.where, case.measure, state)
        weights, state = split(result)
        return np.asarray(weights), None if state is None else map_state(np.asarray, state)

    with enable_x64(True):
        _compare_cases(subject, "jax.jit with traced settings", call)

    first = _first(subject)

    def row(losses: Any, where: Any, measure: Any) -> Any:
        return split(plain(subject.weighting, losses, where, measure, first))[0]

    def rows_of(dtype: Any) -> Callable[..., Any]:
        function: Any = jax.jit(jax.vmap(row))

        def rows(losses: Any, where: Any, measure: Any) -> Any:
            return np.asarray(function(jnp.asarray(losses, dtype), where, jnp.asarray(measure, jnp.float32)))

        return rows

    _compare_rows(subject, "jax.vmap (float32)", rows_of(jnp.float32), np.float32)
    _compare_rows(subject, "jax.vmap (bfloat16)", rows_of(jnp.bfloat16), np.float32)


FRONT_CHECKS: dict[str, Callable[[Subject], None]] = {
    "numpy": _check_numpy,
    "torch": _check_torch,
    "jax": _check_jax,
}


def _first(subject: Subject) -> Any:
    return subject.weighting.init() if subject.weighting.stateful else None
