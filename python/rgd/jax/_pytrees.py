"""The weightings and the statistics as pytrees.

The numbers of a weighting are leaves, named by their fields, and weightings inside it are subtrees.
Everything else (bool, int, str, functions) is part of the structure. Later subclasses are registered when
they are defined.
"""

# Some types of jax are partly unknown to pyright.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from rgd.stats import GroupStats, WeightStats
from rgd.weightings import Weighting
from rgd.weightings._base import observe_subclasses
from rgd.weightings._fields import fields, numbers_of, refuse_more_than_fields

_Rest = tuple[tuple[str, ...], tuple[tuple[str, Any], ...]] | Weighting
"""Names of the children, and the other fields with their values; or the weighting, if it is no dataclass."""


class Structure(NamedTuple):
    """The parts of a weighting that are fixed when a call is traced.

    Attributes:
        tree: The structure of its pytree.
        numbers: Its leaves that are Python numbers; None for a leaf that is an array.
    """

    tree: Any
    numbers: tuple[Any, ...]


def split(weighting: Weighting) -> tuple[Structure, list[Any]]:
    """The fixed parts of a weighting, and its arrays, which `jax.jit` may trace."""
    leaves, tree = jax.tree_util.tree_flatten(weighting)
    arrays = [leaf if hasattr(leaf, "shape") else None for leaf in leaves]
    return Structure(tree, tuple(None if hasattr(leaf, "shape") else leaf for leaf in leaves)), arrays


def joined(structure: Structure, arrays: list[Any]) -> Weighting:
    """The weighting whose parts `split` returned."""
    leaves = [
        number if array is None else array for number, array in zip(structure.numbers, arrays, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure.tree, leaves)


def _flatten(weighting: Weighting) -> tuple[tuple[Any, ...], _Rest]:
    refuse_more_than_fields(weighting)
    if not fields(weighting):
        return (), weighting
    numbers = numbers_of(type(weighting))
    names: list[str] = []
    static: list[tuple[str, Any]] = []
    for field in fields(weighting):
        value = getattr(weighting, field.name)
        if field.name in numbers or isinstance(value, Weighting):
            names.append(field.name)
        else:
            static.append((field.name, value))
    return tuple(getattr(weighting, name) for name in names), (tuple(names), tuple(static))


def _flatten_with_keys(weighting: Weighting) -> tuple[tuple[tuple[Any, Any], ...], _Rest]:
    children, rest = _flatten(weighting)
    names = () if isinstance(rest, Weighting) else rest[0]
    keys = (jax.tree_util.GetAttrKey(name) for name in names)
    return tuple(zip(keys, children, strict=True)), rest


def _unflatten(kind: type[Weighting], rest: _Rest, children: Iterable[Any]) -> Weighting:
    """A weighting with these leaves, unchecked: a pytree's leaves may be tracers, shapes or placeholders."""
    if isinstance(rest, Weighting):
        return rest
    names, static = rest
    weighting = object.__new__(kind)
    for name, value in (*zip(names, children, strict=True), *static):
        object.__setattr__(weighting, name, value)
    return weighting


def _register(kind: type[Weighting]) -> None:
    jax.tree_util.register_pytree_with_keys(
        kind, _flatten_with_keys, functools.partial(_unflatten, kind), _flatten
    )


observe_subclasses(_register)
jax.tree_util.register_dataclass(GroupStats)
jax.tree_util.register_dataclass(WeightStats)
