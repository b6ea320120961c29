"""The fields of a weighting: which of them are numbers, and functions on all of these numbers."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, cast

from rgd.weightings._base import Weighting, is_array


def fields(weighting: Weighting | type) -> tuple[dataclasses.Field[Any], ...]:
    """The dataclass fields of a weighting; none if its class is no dataclass."""
    return dataclasses.fields(cast("Any", weighting)) if dataclasses.is_dataclass(weighting) else ()


def nested(weighting: Weighting) -> list[Weighting]:
    """The weightings inside of a weighting, at any depth."""
    found: list[Weighting] = []
    for field in fields(weighting):
        inner = getattr(weighting, field.name)
        if isinstance(inner, Weighting):
            found += [inner, *nested(inner)]
    return found


def needs_of(weighting: Weighting) -> list[str]:
    """The `needs` of a weighting and of the weightings inside of it."""
    needs = list(weighting.needs)
    for inner in nested(weighting):
        needs += inner.needs
    return needs


@functools.cache
def numbers_of(kind: type) -> frozenset[str]:
    """The names of the fields of a weighting that hold a real number, or arrays of them.

    These are the fields annotated with `float`. A schedule may change them. Fields of other types, such as
    bool, int and str, do not change.
    """
    found: set[str] = set()
    for field in fields(kind):
        hint = _hint(kind, field.type)
        parts = typing.get_args(hint) if _is_union(hint) else (hint,)
        if float in parts or "setting" in field.metadata:
            found.add(field.name)
    return frozenset(found)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _hint(kind: type, annotation: Any) -> Any:
    """The type of an annotation, read separately, since names in other annotations may be unknown here."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, {**vars(typing), **vars(sys.modules[kind.__module__])})
    except Exception:
        spelled = annotation.replace(" ", "").removeprefix("typing.")
        return float if spelled in ("float", "float|None", "None|float", "Optional[float]") else annotation


def map_numbers(weighting: Weighting, function: Callable[[Any], Any]) -> Weighting:
    """The weighting with each of its numbers replaced by `function` of it; nothing is checked.

    Numbers are the fields that `numbers_of` names, of nested weightings too. None stays None.
    """
    refuse_more_than_fields(weighting)
    copy = object.__new__(type(weighting))
    names = numbers_of(type(weighting))
    for field in fields(weighting):
        value = getattr(weighting, field.name)
        if isinstance(value, Weighting):
            value = map_numbers(value, function)
        elif field.name in names and value is not None:
            value = function(value)
        object.__setattr__(copy, field.name, value)
    return copy


def refuse_more_than_fields(weighting: Weighting) -> None:
    """Refuse a weighting that stores more than its fields: a schedule or a trace would not change that."""
    extra = set(getattr(weighting, "__dict__", ())) - {field.name for field in fields(weighting)}
    if extra:
        name = type(weighting).__name__
        raise TypeError(
            f"{name} keeps {', '.join(sorted(extra))} beside its dataclass fields, which would not follow "
            f"when a number is scheduled or traced: make {name} a frozen dataclass whose fields are all it "
            "has, and compute the rest in weights(batch)"
        )


def holds_everywhere(weighting: Weighting) -> Any:
    """Whether every traced number of a weighting is allowed: True, or a traced bool.

    A number that can be read was checked at construction.
    """
    allowed: Any = weighting.numbers_fit()
    for field in fields(weighting):
        inner = getattr(weighting, field.name)
        if isinstance(inner, Weighting):
            allowed = allowed & holds_everywhere(inner)
    for name, check in weighting.settings:
        value = getattr(weighting, name)
        if is_array(value):
            allowed = allowed & check.holds(value)
    return allowed
