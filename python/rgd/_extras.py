"""What `returns=` may name, for torch and JAX."""

from __future__ import annotations

from typing import Any, cast

from rgd.weightings import Weighting
from rgd.weightings._fields import needs_of

EXTRAS: tuple[str, ...] = ("entropy", "logsumexp", "correct")
"""Of the logits of each target: their entropy, their logsumexp, and whether they put its class first."""


def check_returns(returns: Any) -> tuple[str, ...]:
    """The names of what a call shall return beside its loss.

    Raises:
        TypeError: If `returns` is no tuple or list.
        ValueError: If a name is not known, or is there twice.
    """
    if isinstance(returns, str) or not isinstance(returns, (tuple, list)):
        fix = f": give returns=({returns!r},)" if isinstance(returns, str) else ""
        raise TypeError(f"returns must be a tuple of names, such as ('entropy',), got {returns!r}{fix}")
    names = tuple(cast("tuple[Any, ...]", returns))
    for i, name in enumerate(names):
        if name not in EXTRAS or name in names[:i]:  # torch 2.8 compiles no tuple.count
            allowed = ", ".join(map(repr, EXTRAS))
            raise ValueError(f"returns must hold names out of {allowed}, each at most once, got {returns!r}")
    return names


def with_needed(returns: tuple[str, ...], weighting: Weighting) -> tuple[str, ...]:
    """The names of what a call wants of its logits: what it shall return, and what the weighting reads."""
    wanted = "entropy" not in returns and "entropy" in needs_of(weighting)
    return (*returns, "entropy") if wanted else returns


def read_entropy(extras: dict[str, Any], weighting: Weighting) -> Any:
    """The entropy among the extras, where the weighting reads it; else None."""
    return extras["entropy"] if "entropy" in needs_of(weighting) else None


def with_extras(loss: Any, extras: Any, returns: tuple[str, ...], state: Any, after: Any) -> Any:
    """What a function returns: the loss, and beside it the extras and the new state that were asked for."""
    if not returns:
        return loss if state is None else (loss, after)
    asked = {name: extras[name] for name in returns}
    return loss, (asked if state is None else (asked, after))
